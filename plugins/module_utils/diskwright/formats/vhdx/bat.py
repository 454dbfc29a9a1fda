# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The BAT: where each block of the disk is (https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-vhdx/, section 2.5).

After the entries of as many blocks as one block of the sector bitmap describes, a chunk, comes the entry of that bitmap.
"""

from __future__ import annotations

from ...cache import TableCache
from ...kernels import table_runs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterator

    from ...node import Node
    from .layout import Layout

    # index, count, state, place of the first block in the file; the blocks of a run follow one another there
    Run = tuple[int, int, int, int]

NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED = 0, 1, 2, 3
UNMAPPED_OLD = 5  # of version 0.95 of the specification
FULLY_PRESENT, PARTIALLY_PRESENT = 6, 7
STATE_MASK = 7
OFFSET_MASK = 0xFFFFFFFFFFF00000

PAGE = 64 << 10  # bytes of the table that are read at a time
PAGE_ENTRIES = PAGE // 8
PAGES = 256  # in memory: 16 MiB, however large the table is
SECTOR = 4096  # bytes of the table that are written at a time
RUNS = 1024  # that are looked up at a time


class Bat:
    """The BAT of `layout` in `file`. The caller holds `lock`, the node's, for all but `runs`, which takes it by itself.

    What was changed waits in memory; `before` must bring it into the file (see `changed_sectors`) where room is needed.
    """

    def __init__(self, file: Node, layout: Layout, lock: object, before: Callable[[], None]) -> None:
        self.offset = layout.bat_offset
        self.ratio = layout.ratio
        self.block_size = layout.block_size
        self._lock = lock
        self._pages = TableCache(file, PAGE, PAGES, before)
        self._changed: set[int] = set()  # offsets in the table, multiples of SECTOR

    def _entry(self, position: int) -> int:
        page, at = divmod(8 * position, PAGE)
        return int.from_bytes(self._pages.get(self.offset + page * PAGE)[at : at + 8], "little")

    def get(self, index: int) -> tuple[int, int]:
        """(state, place) of the block `index`."""
        value = self._entry(index + index // self.ratio)
        return value & STATE_MASK, value & OFFSET_MASK

    def bitmap(self, chunk: int) -> tuple[int, int]:
        """(state, place) of the sector bitmap of a chunk."""
        value = self._entry(chunk * (self.ratio + 1) + self.ratio)
        return value & STATE_MASK, value & OFFSET_MASK

    def set(self, index: int, place: int) -> None:
        """The block `index` is at `place` from now on, all of it."""
        at = 8 * (index + index // self.ratio)
        page, within = divmod(at, PAGE)
        table = self._pages.get(self.offset + page * PAGE)
        table[within : within + 8] = (place | FULLY_PRESENT).to_bytes(8, "little")
        self._pages.mark(self.offset + page * PAGE)
        self._changed.add(at // SECTOR * SECTOR)

    def changed_sectors(self) -> list[tuple[int, bytes]]:
        """(offset in the file, content) of what is not in the file yet, ascending."""
        found = []
        for at in sorted(self._changed):
            page, within = divmod(at, PAGE)
            found.append((self.offset + at, bytes(self._pages.get(self.offset + page * PAGE)[within : within + SECTOR])))
        return found

    def written(self) -> None:
        """All that was changed is in the file."""
        self._changed.clear()
        self._pages.dirty.clear()

    def runs(self, first: int, count: int) -> Iterator[Run]:
        """The blocks from `first` on in runs of one state."""
        end = first + count
        while first < end:
            stop = min(end, (first // self.ratio + 1) * self.ratio)
            page, at = divmod(first + first // self.ratio, PAGE_ENTRIES)
            with self._lock:  # type: ignore[attr-defined]
                table = self._pages.get(self.offset + page * PAGE)
                found = table_runs(table, 8, False, at, min(stop - first, PAGE_ENTRIES - at), self.block_size, RUNS)
            base = first - at
            for index, length, value, step in found:
                state, place = value & STATE_MASK, value & OFFSET_MASK
                if step or length == 1 or state not in (FULLY_PRESENT, PARTIALLY_PRESENT):
                    yield base + index, length, state, place
                else:  # many blocks in one place
                    for again in range(length):
                        yield base + index + again, 1, state, place
            first = base + found[-1][0] + found[-1][1]
