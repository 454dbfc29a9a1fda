# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Compare the content of two nodes (https://www.qemu.org/docs/master/tools/qemu-img.html, compare)."""

from __future__ import annotations

from ..errors import Error
from ..extent import ALLOCATED, COMPRESSED, DATA, OFFSET_VALID, ZERO
from .crew import Crew
from .pieces import CHUNK, EXTENTS, NEARBY, Loader, failure, source_runs
from .transfer import THREADS, thread_count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterator, Optional, Union

    from ..node import Node
    from .pieces import Read, Run

    # offset, length, what the two nodes have there
    Place = tuple[Node, int]
    Pair = tuple[int, int, list[Read], list[Read]]

SECTOR = 512  # bytes; differences are told apart no finer
LOOK = 512  # clusters whose status QEMU looks at in one go, unless its driver looks at a table,
MOST = (1 << 31) - 512  # but never at more bytes than this
STATUS = DATA | ZERO | OFFSET_VALID | ALLOCATED | COMPRESSED  # what strict compares, and
END = 0x100  # whether it is the last of the image

# What was found first.
CONTENT = "content"
STATUS_DIFFERS = "status"


class StatusError(Error):
    """The block status of one of the images cannot be read."""


class ReadError(Error):
    """The content of one of the images cannot be read."""


class Difference:
    """The first difference: its offset in bytes (a multiple of 512) and its kind, CONTENT or STATUS_DIFFERS."""

    __slots__ = ("offset", "kind")

    def __init__(self, offset: int, kind: str) -> None:
        self.offset = offset
        self.kind = kind


def compare(
    left: Node,
    right: Node,
    *,
    strict: bool = False,
    threads: int = THREADS,
    progress: Optional[Callable[[int, int], None]] = None,
) -> Optional[Difference]:
    """The first difference between two nodes, None if there is none; beyond the end of the shorter one are zeroes.

    With `strict` the status of the ranges (allocated, zero, compressed) must be the same too. `progress` is called with
    (bytes done, bytes in all) in the caller's thread. Raises StatusError and ReadError.
    """
    comparison = Comparison(left, right, strict)
    comparison.progress = progress
    return comparison.run(max(1, thread_count(threads, (left,)), thread_count(threads, (right,))))


class Comparison:
    """One comparison under way."""

    def __init__(self, left: Node, right: Node, strict: bool) -> None:
        from ..kernels import first_difference, nonzero_runs

        self._first_difference = first_difference
        self._nonzero_runs = nonzero_runs
        self.left = left
        self.right = right
        self.size = max(left.size, right.size)
        self.strict = strict
        self.progress: Optional[Callable[[int, int], None]] = None
        self._loader = Loader()
        self._caller = 0
        # (offset, rank, what was found there): the first of them is the result, whoever was faster
        self._outcomes: list[tuple[int, int, Union[Difference, Error]]] = []

    def run(self, threads: int) -> Optional[Difference]:
        """Compare with so many threads."""
        from _thread import get_ident

        self._caller = get_ident()
        if self.progress is not None:
            self.progress(0, self.size)
        for node in (self.left, self.right):
            node.preload()
        self._crew = Crew(self._pairs())
        self._crew.run(self._member, threads)
        if not self._outcomes:
            if self.progress is not None:
                self.progress(self.size, self.size)
            return None
        outcome = min(self._outcomes, key=lambda found: found[:2])[2]
        if isinstance(outcome, Error):
            raise outcome
        return outcome

    def _member(self) -> None:
        """What each thread does."""
        from _thread import get_ident

        progress = self.progress if get_ident() == self._caller else None
        buffers = bytearray(CHUNK), bytearray(CHUNK)
        while True:
            item = self._crew.take()
            if item is None:
                return
            offset, length, left, right = item[0]
            self._compare(offset, length, left, right, buffers)
            if progress is not None and not self._outcomes:
                progress(offset + length, self.size)

    def _compare(self, offset: int, length: int, left: list[Read], right: list[Read], buffers: tuple[bytearray, bytearray]) -> None:
        """Compare one piece; a side without reads is zero."""
        views = memoryview(buffers[0]), memoryview(buffers[1])
        for rank, (node, reads) in enumerate(((self.left, left), (self.right, right))):
            try:
                if reads:
                    self._loader.load(reads, views[rank], length)
            except (Error, OSError) as exc:
                at = self._loader.culprit(reads, views[rank])
                error = failure("Error while reading offset", offset + at, exc, ReadError, " of %s" % node.filename)
                self._note(offset + at, 2 + rank, error)
                if at:  # what comes before may differ
                    self._compare(offset, at, _first(left, at), _first(right, at), buffers)
                return
        if left and right:
            if length == CHUNK:
                at = self._first_difference(*buffers)
            else:
                at = self._first_difference(views[0][:length], views[1][:length])
        else:
            runs = self._nonzero_runs(views[0] if left else views[1], 0, length, SECTOR)
            at = runs[0][0] if runs else -1
        if at >= 0:
            at = offset + at // SECTOR * SECTOR
            self._note(at, 4, Difference(at, CONTENT))

    def _note(self, offset: int, rank: int, outcome: Union[Difference, Error]) -> None:
        """Note an outcome: nothing behind it needs to be looked at."""
        self._outcomes.append((offset, rank, outcome))
        self._crew.stop()

    def _pairs(self) -> Iterator[Pair]:
        """The pieces in which at least one side has data, ascending; ends where the status cannot be read or differs."""
        first = limit = stop = 0
        left: list[Read] = []
        right: list[Read] = []
        for offset, length, runs in self._common_runs():
            if runs[0] is None and runs[1] is None:
                if (left or right) and (offset + length >= limit or length >= NEARBY):
                    yield first, stop - first, left, right
                    left, right = [], []
                continue
            end = offset + length
            position = offset
            while position < end:
                if not (left or right):
                    first = position
                    limit = (first // CHUNK + 1) * CHUNK
                count = min(end, limit) - position
                for run, reads in zip(runs, (left, right)):
                    if run is not None:
                        reads.append((run[0], run[1] + position - offset, position - first, count))
                position += count
                stop = position
                if stop == limit:
                    yield first, stop - first, left, right
                    left, right = [], []
        if left or right:
            yield first, stop - first, left, right

    def _common_runs(self) -> Iterator[tuple[int, int, tuple[Optional[Place], Optional[Place]]]]:
        """Runs in which both sides are of one kind: offset, length, and where each side has its bytes (None: zero)."""
        nodes = self.left, self.right
        runs = [self._runs(node) for node in nodes]
        statuses = [self._statuses(node) for node in nodes] if self.strict else []
        current: list[Run] = [(0, 0, ZERO, None, 0)] * 2
        flags = [(0, 0, 0)] * 2
        position = 0
        while position < self.size:
            for side, node in enumerate(nodes):
                try:
                    while current[side][0] + current[side][1] <= position:
                        current[side] = next(runs[side])  # pylint: disable=stop-iteration-return
                    while self.strict and flags[side][0] + flags[side][1] <= position:
                        flags[side] = next(statuses[side])  # pylint: disable=stop-iteration-return
                except (Error, OSError) as exc:
                    words = "Sector allocation test failed for %s" % node.filename
                    self._note(position, side, StatusError(words, filename=node.filename, offset=position, hint=str(exc)))
                    return
            end = min(run[0] + run[1] for run in current)
            if self.strict:
                if flags[0][2] != flags[1][2]:
                    self._note(position, 2, Difference(position, STATUS_DIFFERS))
                    return
                end = min(end, min(flag[0] + flag[1] for flag in flags))
            places = [(run[3], run[4] + position - run[0]) if run[3] is not None else None for run in current]
            yield position, end - position, (places[0], places[1])
            position = end

    def _runs(self, node: Node) -> Iterator[Run]:
        """The content of one side, with zeroes up to the size of the other."""
        yield from source_runs((node,))
        yield node.size, self.size - node.size, ZERO, None, 0

    def _statuses(self, node: Node) -> Iterator[tuple[int, int, int]]:
        """(offset, length, flags) of one side, whichever layer they come from; what ends with the image is marked so.

        An image in clusters is looked at as much at a time as QEMU does, since only the last look sees the end.
        """
        window = min(node.table_span or node.cluster_size * LOOK, MOST) or node.size
        for offset in range(0, node.size, window or 1):
            last = (offset, 0, -1)
            for start, count, flags in _status_of_chain(node, offset, min(window, node.size - offset)):
                if last[2] == flags:
                    last = (last[0], last[1] + count, flags)
                    continue
                if last[1]:
                    yield last
                last = (start, count, flags)
            yield last[0], last[1], last[2] | (END if last[0] + last[1] == node.size else 0)


def _first(reads: list[Read], length: int) -> list[Read]:
    """The reads that fill the first `length` bytes."""
    return [(host, host_offset, at, min(count, length - at)) for host, host_offset, at, count in reads if at < length]


def _status_of_chain(node: Node, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    end = offset + length
    while offset < end:
        for start, count, status, _host, _host_offset in node.block_status(offset, end - offset, True, EXTENTS):
            backing = node.backing
            inside = count if status & STATUS or backing is None else max(0, min(count, backing.size - start))
            if inside and not status & STATUS and backing is not None:
                yield from _status_of_chain(backing, start, inside)
            elif inside:
                yield start, inside, status & STATUS or ZERO
            if inside < count:  # behind the end of a short backing file
                yield start + inside, count - inside, ZERO | ALLOCATED
            offset = start + count
