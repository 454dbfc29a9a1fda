# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Moment: the content that a node had at one time, while it goes on being written.

What all who keep it share: the filters copy-before-write and snapshot-access, and the backup job, which copies the rest in the background
(https://www.qemu.org/docs/master/interop/live-block-operations.html).
"""

from __future__ import annotations

import errno
import os
from threading import Condition, Thread

from .errors import Error, OptionError
from .extent import ZERO
from .node import CHUNK, Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterator, Optional

    from .bitmaps import Bitmap

MIN_UNIT = 64 << 10  # bytes that are copied at a time, at least
MAX_UNIT = 1 << 31  # and at most
PIECE = 1 << 16  # clusters whose states are kept in one piece
RUN = 4 << 20  # bytes that are taken at a time where several clusters need it

PENDING, IN_FLIGHT, DONE, OUT = range(4)  # states of a cluster; OUT is none of ours: never wanted, or discarded


class Clusters:
    """A state for each cluster of a disk. Pieces of which nothing was changed take no memory."""

    def __init__(self, count: int, state: int) -> None:
        self.count = count
        self._initial = bytes([state]) * PIECE
        self._pieces: dict[int, bytearray] = {}

    def run(self, first: int, end: int) -> tuple[int, int]:
        """The state of the cluster `first`, and the first one behind it, `end` at most, that is in another state."""
        state = -1
        at = first
        while at < end:
            index, low = divmod(at, PIECE)
            piece = self._pieces.get(index, self._initial)
            if state < 0:
                state = piece[low]
            high = min(PIECE, low + end - at)
            length = len(piece[low:high]) - len(piece[low:high].lstrip(bytes([state])))
            at += length
            if length < high - low:
                break
        return state, at

    def set(self, first: int, end: int, state: int) -> None:
        """Put the clusters from `first` to before `end` into `state`."""
        at = first
        while at < end:
            index, low = divmod(at, PIECE)
            high = min(PIECE, low + end - at)
            if index not in self._pieces:
                self._pieces[index] = bytearray(self._initial)
            self._pieces[index][low:high] = bytes([state]) * (high - low)
            at += high - low


class Moment:
    """The content that `source` had when this was made: in `target` as far as it was copied there, still in `source` otherwise.

    Whoever writes to `source` calls `before_write` for the range and writes when it returns; any number of threads may do so, and read
    and copy at the same time. `unit` is the size of a cluster in bytes: of `target`'s clusters, MIN_UNIT and `min_unit` the largest.
    With `bitmap` only what is dirty there is of interest. `compress` stores compressed clusters. A copy that fails, or takes more than
    `timeout` seconds (0: as long as it takes), fails the write that waits for it, or with `breaks` ends the moment instead: it cannot be read any more.
    """

    def __init__(
        self,
        source: Node,
        target: Node,
        *,
        min_unit: int = 0,
        bitmap: Optional[Bitmap] = None,
        compress: bool = False,
        timeout: float = 0,
        breaks: bool = False,
    ) -> None:
        self.source = source
        self.target = target
        self.size = source.size
        self.unit = _unit(target, min_unit)
        self.copied = 0  # bytes, so far
        self.broken: Optional[BaseException] = None
        self._compress = compress
        self._timeout = timeout
        self._breaks = breaks
        self._changed = Condition()  # and the lock of all that follows
        self._clusters = Clusters(-(-self.size // self.unit), PENDING if bitmap is None else OUT)
        self._frozen: list[tuple[int, int]] = []  # clusters that are being read from the source: first, end
        self._workers: list[Thread] = []
        if bitmap is not None:
            for offset, length in bitmap.runs():
                self._clusters.set(*self._around(offset, length), PENDING)

    def _around(self, offset: int, length: int) -> tuple[int, int]:
        """The clusters that a range touches: the first, and the one behind the last."""
        return min(offset // self.unit, self._clusters.count), min(-(-(offset + length) // self.unit), self._clusters.count)

    # -- writers -------------------------------------------------------------------------------------------------

    def before_write(self, offset: int, length: int) -> None:
        """Return when the source may be written in a range: what the moment needs of it is in the target, and nobody reads it from the source.

        Raises what the copy raised, Error (ETIMEDOUT).
        """
        first, end = self._around(offset, length)
        if first >= end:
            return
        if self.broken is None:
            try:
                self._copy_in_time(first, end)
            except (Error, OSError) as exc:
                if not self._breaks:
                    raise
                self.end(exc)
        with self._changed:
            while any(low < end and first < high for low, high in self._frozen):
                self._changed.wait()

    def _copy_in_time(self, first: int, end: int) -> None:
        if not self._timeout:
            self._copy(first, end)
            return
        with self._changed:
            if all(state in (DONE, OUT) for _low, _high, state in self._runs(first, end)):
                return
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self._copy(first, end)
            except (Error, OSError) as exc:
                failures.append(exc)

        worker = Thread(target=work, name="copy-before-write")
        with self._changed:
            self._workers = [one for one in self._workers if one.is_alive()] + [worker]
            worker.start()
        worker.join(self._timeout)
        if worker.is_alive():
            raise Error(os.strerror(errno.ETIMEDOUT), errno=errno.ETIMEDOUT)
        if failures:
            raise failures[0]

    def end(self, reason: BaseException) -> None:
        """The moment cannot be kept any more."""
        with self._changed:
            self.broken = self.broken or reason
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when no copy that ran out of time is under way any more."""
        for worker in list(self._workers):
            worker.join()

    # -- copying -------------------------------------------------------------------------------------------------

    def copy(self, offset: int, length: int) -> None:
        """Return when all of a range that is of interest is in the target. Raises Error and OSError; what was not copied is still to be."""
        self._copy(*self._around(offset, length))

    def pending(self, offset: int = 0) -> Optional[tuple[int, int]]:
        """The first run of bytes at `offset` or behind it that is still to be copied (or is being copied): (offset, length)."""
        with self._changed:
            for low, high, state in self._runs(offset // self.unit, self._clusters.count):
                if state in (PENDING, IN_FLIGHT):
                    return low * self.unit, min(high * self.unit, self.size) - low * self.unit
        return None

    def remaining(self) -> int:
        """Bytes that are still to be copied, or are being copied."""
        with self._changed:
            runs = [(low, high) for low, high, state in self._runs(0, self._clusters.count) if state in (PENDING, IN_FLIGHT)]
        return sum(min(high * self.unit, self.size) - low * self.unit for low, high in runs)

    def exclude(self, offset: int, length: int) -> None:
        """Whole clusters in a range are of no interest (any more): they are not copied, and cannot be read."""
        first = -(-offset // self.unit)
        end = self._clusters.count if offset + length >= self.size else (offset + length) // self.unit
        with self._changed:
            while first < end and any(state == IN_FLIGHT for _low, _high, state in self._runs(first, end)):
                self._changed.wait()
            if first < end:
                self._clusters.set(first, end, OUT)

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Neighbours of one state: (first, end, state). Under the lock."""
        while first < end:
            state, stop = self._clusters.run(first, end)
            yield first, stop, state
            first = stop

    def _take(self, first: int, end: int) -> tuple[int, int]:
        """Some clusters of a range that the caller must copy now; none where all is done. Waits for those that others copy."""
        with self._changed:
            while self.broken is None:
                busy = False
                for low, high, state in self._runs(first, end):
                    if state == PENDING:
                        high = min(high, low + max(1, RUN // self.unit))
                        self._clusters.set(low, high, IN_FLIGHT)
                        return low, high
                    busy = busy or state == IN_FLIGHT
                if not busy:
                    break
                self._changed.wait()
        return end, end

    def _copy(self, first: int, end: int) -> None:
        while True:
            low, high = self._take(first, end)
            if low == high:
                return
            state = PENDING
            try:
                self._move(low * self.unit, min(high * self.unit, self.size))
                state = DONE
            finally:
                with self._changed:
                    self._clusters.set(low, high, state)
                    if state == DONE:
                        self.copied += min(high * self.unit, self.size) - low * self.unit
                    self._changed.notify_all()

    def _move(self, start: int, end: int) -> None:
        """Copy bytes; zeroes as such."""
        extents = self.source.resolve(start, end - start, want_zero=True)
        if self._compress and not all(extent.status & ZERO for extent in extents):
            self._move_compressed(start, end)
            return
        for offset, length, status, _host, _host_offset in extents:
            if status & ZERO:
                self.target.pwrite_zeroes(offset, length, unmap=True)
                continue
            for at in range(offset, offset + length, CHUNK):
                self.target.pwrite(at, self.source.pread(at, min(CHUNK, offset + length - at)))

    def _move_compressed(self, start: int, end: int) -> None:
        step = self.target.allocation_unit or self.unit
        for at in range(start, end, step):
            data = self.source.pread(at, min(step, end - at))
            if any(data):
                self.target.write_compressed(at, data)
            else:
                self.target.pwrite_zeroes(at, len(data), unmap=True)

    # -- readers -------------------------------------------------------------------------------------------------

    def visit(self, offset: int, length: int, use: Callable[[Node, int, int], None]) -> None:
        """Call use(node, offset, length) for each part of a range: `node` has its content there, and keeps it until `use` returns.

        Raises Error (EACCES) where a part of the range is of no interest, or the moment could not be kept.
        """
        end = offset + length
        while offset < end:
            with self._changed:
                first, stop = self._around(offset, end - offset)
                if self.broken is not None or any(state == OUT for _low, _high, state in self._runs(first, stop)):
                    raise Error(os.strerror(errno.EACCES), offset=offset, errno=errno.EACCES)
                node, high = self._holder(first, stop)
                frozen = (first, high)
                if node is self.source:
                    self._frozen.append(frozen)
            count = min(end, high * self.unit) - offset
            try:
                use(node, offset, count)
            finally:
                if node is self.source:
                    with self._changed:
                        self._frozen.remove(frozen)
                        self._changed.notify_all()
            offset += count

    def _holder(self, first: int, end: int) -> tuple[Node, int]:
        """Who has the content of the cluster `first`, and the first cluster behind it that is elsewhere. Under the lock."""
        node: Optional[Node] = None
        for low, _high, state in self._runs(first, end):
            holder = self.target if state == DONE else self.source
            if node is not None and holder is not node:
                return node, low
            node = holder
        return node or self.source, end

    def discard(self, offset: int, length: int) -> None:
        """Whole clusters in a range are of no interest any more, and the target may give them back."""
        self.exclude(offset, length)
        first = -(-offset // self.unit) * self.unit
        end = self.size if offset + length >= self.size else (offset + length) // self.unit * self.unit
        if first < end:
            self.target.pdiscard(first, end - first)


def _unit(target: Node, least: int) -> int:
    if least & (least - 1):
        raise OptionError("Cannot create block-copy-state: min-cluster-size needs to be a power of 2", errno=errno.EINVAL)
    if least > MAX_UNIT:
        raise OptionError("Cannot create block-copy-state: min-cluster-size too large: %d > %d" % (least, MAX_UNIT), errno=errno.EINVAL)
    return max(MIN_UNIT, target.cluster_size, least)
