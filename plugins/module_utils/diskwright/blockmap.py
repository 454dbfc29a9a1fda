# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What images share that keep the disk in blocks of one size, found by one table of 32-bit entries (VDI, VHD, Parallels;
https://en.wikipedia.org/wiki/VHD_(file_format) and others).

Such a format has no backing file that is written over, so a block that is not there reads as zeroes, and so does the room for
a new one at the end of the file: it can be in the table as soon as it is reserved, and nothing around a write has to be kept.
"""

from __future__ import annotations

import sys

from .cache import TableCache
from .errors import Corrupt
from .extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from .node import Alloc, Format

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from typing import Callable, Iterable, Iterator, Optional

    from .node import Node

    # index, count, value of the first entry, what every next one is larger by (0 or the step asked for)
    Run = tuple[int, int, int, int]

PAGE = 64 << 10  # bytes of the table that are read and written at a time
PAGE_ENTRIES = PAGE // 4
PAGES = 256  # in memory: 16 MiB, however large the table is
RUNS = 1024  # that are looked up at a time
STORED = DATA | OFFSET_VALID | ALLOCATED
UNSTORED = ZERO | ALLOCATED


class BlockMap:
    """The table of `count` entries at byte `offset` of `file`; entries behind the end of the file are zero.

    The caller holds `lock`, the node's, for all but `runs`, which takes it by itself. Changed pages that make room for
    others are written once `before` was called.
    """

    def __init__(self, file: Node, offset: int, count: int, order: str, lock: object, before: Callable[[], None]) -> None:
        """`order` is the byte order, "little" or "big"."""
        self.file = file
        self.offset = offset
        self.count = count
        self._order = order
        self._lock = lock
        self._pages = TableCache(file, PAGE, PAGES, before, offset + 4 * count)

    @property
    def changed(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._pages.dirty)

    def get(self, index: int) -> int:
        """The entry `index`."""
        page, at = divmod(4 * index, PAGE)
        return int.from_bytes(self._pages.get(self.offset + page * PAGE)[at : at + 4], self._order)  # type: ignore[arg-type]

    def set(self, index: int, value: int) -> None:
        """Change the entry `index`; in the file after `write`."""
        page, at = divmod(4 * index, PAGE)
        place = self.offset + page * PAGE
        self._pages.get(place)[at : at + 4] = value.to_bytes(4, self._order)  # type: ignore[arg-type]
        self._pages.mark(place)

    def write(self) -> None:
        """Bring all changes into the file. Raises OSError or Error."""
        self._pages.write()

    def runs(self, start: int, count: int, step: int) -> Iterator[Run]:
        """The entries from `start` on in runs: equal ones, or such that ascend by `step`."""
        from .kernels import table_runs

        end = min(start + count, self.count)
        while start < end:
            page, first = divmod(start, PAGE_ENTRIES)
            place = self.offset + page * PAGE
            with self._lock:  # type: ignore[attr-defined]
                hole = self._hole(place)
                if not hole:
                    most = min(end - start, PAGE_ENTRIES - first)
                    found = table_runs(self._pages.get(place), 4, self._order == "big", first, most, step, RUNS)
            if hole:
                count = min(end - start, hole // 4 - first)
                yield start, count, 0, 0
                start += count
                continue
            base = start - first
            for index, length, value, used in found:
                yield base + index, length, value, used
            start = base + found[-1][0] + found[-1][1]

    def _hole(self, place: int) -> int:
        """How many bytes from the page at `place` on are zero because the file has nothing there: whole pages, or all."""
        if place in self._pages or self.changed:
            return 0
        end = self.offset + 4 * self.count
        inside = min(end, self.file.size) - place
        if inside > 0:
            extent = self.file.resolve(place, inside, True, 1)[0]
            if extent.host is not None:
                return 0
            if extent.length < inside:
                return extent.length // PAGE * PAGE
        return end - place

    def unused(self, first: int, step: int, low: int, count: int) -> bytearray:
        """Which of the numbers low .. low + count have no entry `first` + number * `step`, nor one that lies over it: 1, others 0."""
        free = bytearray(b"\1") * count
        for _index, length, value, used in self.runs(0, self.count, step):
            places = ((value, length),) if used == step and (value - first) % step == 0 else ((value + at * used, 1) for at in range(length if used else 1))
            for place, many in places:
                begin = (place - first) // step - low
                end = begin + many + (1 if (place - first) % step else 0)
                begin, end = max(begin, 0), min(end, count)
                if begin < end:
                    free[begin:end] = bytes(end - begin)
        return free


class BlockFormat(Format):
    """A format whose guest blocks are wherever a BlockMap says.

    A driver says how its table is to be read (`_runs`), where a block is that will be written (`_locate`) and finds room for
    one that is not there (`_take`).
    """

    zero_initialized = True
    block_size = 0  # bytes
    stored = STORED  # the status of a block that is there

    def preload(self) -> None:
        """See Hooks.preload."""
        from . import kernels

        del kernels
        super().preload()

    def _runs(self, first: int, count: int) -> Iterable[tuple[int, int, Optional[int]]]:
        """(index, count, host offset or None) of the blocks from `first` on; those of a run follow one another in the file."""
        raise NotImplementedError(self.driver)

    def _locate(self, index: int) -> Optional[int]:
        """The host offset of a block that will be written, None where it is not there. Raises Corrupt for a place that
        cannot be a block's. The lock is held."""
        raise NotImplementedError(self.driver)

    def _take(self, index: int) -> int:
        """Room for the block `index`, which reads as zeroes: its host offset. The lock is held."""
        raise NotImplementedError(self.driver)

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        size = self.block_size
        first = offset // size
        for index, count, place in self._runs(first, -(-(offset + length) // size) - first):
            if place is None:
                yield Extent(index * size, count * size, UNSTORED)
            else:
                yield Extent(index * size, count * size, self.stored, self.file, place)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        size = self.block_size
        end = offset + length
        allocs: list[Alloc] = []
        with self._lock:
            while offset < end:
                index, within = divmod(offset, size)
                place = self._locate(index)
                if place is None:
                    place = self._take(index)
                place += within
                count = min(end - offset, size - within)
                if allocs and allocs[-1].host_offset + allocs[-1].length == place:
                    allocs[-1].length += count
                else:
                    allocs.append(Alloc(offset, count, self.file, place))
                offset += count
        return allocs

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        """What is not there is zero already; what is there becomes zero where it is."""
        size = self.block_size
        for start, count, _status, host, place in self._extents(offset, length):
            if host is not None:
                with self._lock:
                    for index in range(start // size, -(-(start + count) // size)):
                        self._locate(index)
                host.pwrite_zeroes(place, count, unmap)
        return offset, length

    def _prepare(self, place: int, untouched: int) -> int:
        """Make the new block at host offset `place` read as zeroes; `untouched`: from there on nothing was ever written."""
        end = place + self.block_size
        if self.file.growable:
            end = min(end, untouched)
        if place < end:
            self.file.pwrite_zeroes(place, end - place)
        return place

    def _outside(self, index: int, place: int) -> Corrupt:
        """The error for a block whose place cannot be one."""
        text = "%s: block %d is said to be at %#x, where none can be" % (self.filename or self.driver, index, place)
        return Corrupt(text, filename=self.filename, offset=place)


def little_endian(entries: array[int]) -> bytes:
    """The bytes of an array of native entries in little-endian order."""
    if sys.byteorder == "big":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()
