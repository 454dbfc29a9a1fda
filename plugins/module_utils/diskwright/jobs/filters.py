# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The filters that jobs put on top of the node that they work on: nodes that see all that is written there
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, MirrorCopyMode)."""

from __future__ import annotations

from threading import Event, Lock

from ..bitmaps import Bitmap
from ..errors import Error
from ..filter import Filter
from ..node import RESIZE, WRITE, Alloc
from ..options import NodeRef, Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

    from ..node import Node, OpenFlags

PIECE = 4096  # bytes of a bitmap that are kept together


class JobFilterOptions(Options):
    """A job's filter is made by its job alone."""

    file: NodeRef = opt(help="the node that the job works on")


def only_through(flags: OpenFlags) -> OpenFlags:
    """How a job's filter, being opened with `flags`, uses what it is on top of: once it has users itself, nobody writes past it."""
    perm, shared = flags.permissions()
    return flags.but(shared=shared & ~(WRITE | RESIZE)) if perm else flags


class JobFilter(Filter):
    """All passes through, but a write waits while the job works on the same unit, and the job while it is written.

    `unit` is in bytes. Writes go through `written`, whatever they are.
    """

    options_class = JobFilterOptions
    unit = 1

    def __init__(self, options: Options, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self.growable = False

    @classmethod
    def child_flags(cls, role: str, flags: OpenFlags) -> OpenFlags:
        return only_through(flags)

    def lock(self, offset: int, length: int) -> Any:
        """Keep writers away from the units of a range; `release` takes the result. Only to be called where writers may wait: inside
        a request."""
        return self.serialise(offset, length, self.unit)

    def written(self, offset: int, length: int, write: Callable[[], None], view: Optional[memoryview], unmap: bool) -> None:
        """Carry out `write`, which writes `view` to the child; None: zeroes, or with `unmap` it discards."""
        entry = self.lock(offset, length)
        try:
            write()
        finally:
            self.release(entry)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self.written(host_offset, len(view), lambda: self.file.pwrite(host_offset, view), view, False)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self.written(offset, length, lambda: self.file.pwrite_zeroes(offset, length, unmap), None, False)
        return offset, length

    def _discard(self, offset: int, length: int) -> None:
        self.written(offset, length, lambda: self.file.pdiscard(offset, length), None, True)

    def _truncate(self, size: int, preallocation: str) -> None:
        raise Error("Node '%s' is busy: block device is in use by block job: %s" % (self.file.name, self.job_kind))

    job_kind = ""


class StreamTop(JobFilter):
    """On top of a node into which its backing chain is copied."""

    driver = "copy-on-read"
    job_kind = "stream"


class CommitTop(JobFilter):
    """On top of the nodes that are copied into their base."""

    driver = "commit_top"
    job_kind = "commit"


class MirrorTop(JobFilter):
    """On top of a node of which another one is to become a copy: it notes what is written, or writes it to both at once."""

    driver = "mirror_top"
    job_kind = "mirror"
    target: Node

    def begin(self, target: Node, granularity: int, blocking: bool) -> None:
        """Note writes from now on; with `blocking` what is written goes to `target` as well before a write is done."""
        self.target = target
        self.unit = granularity
        self.blocking = blocking
        self.bits = Bitmap("", granularity, self.size, True, PIECE)
        self.guard = Lock()  # of `bits`
        self.dirty_bytes = 0
        self.news = Event()  # set when something becomes dirty
        self.failed: Optional[BaseException] = None  # a write to the target that did not work

    def mark(self, offset: int, length: int) -> None:
        """Note that a range is not in the target."""
        with self.guard:
            self.dirty_bytes -= self._count(offset, length)
            self.bits.set(offset, length)
            self.dirty_bytes += self._count(offset, length)
        self.news.set()

    def _count(self, offset: int, length: int) -> int:
        """Bytes that are dirty in the units of a range."""
        return sum(count for _offset, count in self.bits.runs(offset, offset + length))

    def _clear(self, offset: int, length: int) -> None:
        """Whole units are clean now."""
        self.dirty_bytes -= self._count(offset, length)
        unset(self.bits, offset, length)

    def peek(self, position: int) -> Optional[tuple[int, int]]:
        """The first dirty range at `position` or behind it, or else the first of all: (offset, length)."""
        with self.guard:
            return self._first(position)

    def _first(self, position: int) -> Optional[tuple[int, int]]:
        return first_run(self.bits, position, self.bits.size) or first_run(self.bits, 0, position)

    def take(self, position: int, most: int) -> Optional[tuple[int, int]]:
        """The same, of at most `most` bytes: it is clean now."""
        with self.guard:
            found = self._first(position)
            if found is None:
                return None
            length = min(found[1], max(most // self.unit, 1) * self.unit)
            self._clear(found[0], length)
            return found[0], min(length, self.bits.size - found[0])

    def clean(self, offset: int, length: int) -> None:
        """A range is about to be copied."""
        with self.guard:
            self._clear(offset, length)

    def remaining(self) -> int:
        """Bytes that are dirty."""
        return self.dirty_bytes

    def written(self, offset: int, length: int, write: Callable[[], None], view: Optional[memoryview], unmap: bool) -> None:
        """See JobFilter.written: the target is written after the child, and what it did not get is dirty."""
        if not self.blocking:
            try:
                write()
            finally:
                self.mark(offset, length)  # not before it is written: the job could read what was there before
            return
        entry = self.lock(offset, length)
        done = False
        try:
            write()
            if self.failed is None and not unmap:  # what was discarded reads as the drivers like: the job finds out
                try:
                    self._copy(offset, length, view)
                    done = True
                except (Error, OSError) as exc:
                    self.failed = exc
        finally:
            if not done:
                self.mark(offset, length)
            self.release(entry)

    def _copy(self, offset: int, length: int, view: Optional[memoryview]) -> None:
        if view is not None:
            self.target.pwrite(offset, view)
        else:
            self.target.pwrite_zeroes(offset, length)
        first = -(-offset // self.unit) * self.unit
        end = offset + length if offset + length >= self.bits.size else (offset + length) // self.unit * self.unit
        if first < end:
            with self.guard:
                self._clear(first, end - first)


def first_run(bitmap: Bitmap, start: int, end: int) -> Optional[tuple[int, int]]:
    """The first run of set bits that touches start .. end: (offset, length); None where there is none."""
    return next(bitmap.runs(start, end, 1), None)


def unset(bitmap: Bitmap, offset: int, length: int) -> None:
    """Clear the bits of whole units in a range, which begins at a unit; a last unit at the end of the disk is whole."""
    from ..bitmaps import _fill

    first = offset // bitmap.granularity
    end = bitmap.bits if offset + length >= bitmap.size else (offset + length) // bitmap.granularity
    per_piece = bitmap.piece * 8
    while first < end:
        index, low = divmod(first, per_piece)
        high = min(per_piece, end - index * per_piece)
        if bitmap.get(index) is not None:
            _fill(bitmap.change(index), low, high, False)
        first = index * per_piece + high
