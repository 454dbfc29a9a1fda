# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The extents of a disk: where each keeps the bytes of its part (VMware's "Virtual Disk Format 5.0").

Offsets in an extent count from where it begins on the disk. Whoever calls holds the node's lock where tables are looked at.
"""

from __future__ import annotations

from ...cache import TableCache
from ...extent import ZERO
from ...kernels import table_runs
from .header import SECTOR, Layout, read_layout, read_sesparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Optional, Union

    from ...hooks import OpenFlags
    from ...node import Node
    from .descriptor import ExtentLine
    from .image import Vmdk

    Run = tuple[int, int, int, int]  # offset, length, kind, offset in the file
    AnyExtent = Union["FlatExtent", "ZeroExtent", "SparseExtent"]

HOLE, ZEROES, DATA = range(3)  # kinds of grains

PAGE = 4096  # bytes of a directory that are read at a time
CACHE = 8 << 20  # bytes of grain tables that are kept
TABLES_MAX = 4096  # and how many of them
PAGES_MAX = 256  # of a directory
ZERO_ENTRY = 1


class FlatExtent:
    """A run of plain bytes in a file."""

    compressed = False
    grain = 0

    def __init__(self, file: Node, start: int, line: ExtentLine) -> None:
        self.file = file
        self.start = start
        self.size = line.sectors * SECTOR
        self.kind = line.kind
        self.first = line.start_sector * SECTOR

    @property
    def end(self) -> int:
        return self.start + self.size


class ZeroExtent:
    """A part of the disk that reads as zeroes, and has no file."""

    compressed = False
    grain = 0

    def __init__(self, start: int, line: ExtentLine) -> None:
        self.start = start
        self.size = line.sectors * SECTOR
        self.kind = line.kind

    @property
    def end(self) -> int:
        return self.start + self.size


class SparseExtent:
    """Grains that are found through a directory of tables.

    Tables and the pages of the directory are cached; a changed table is written to its redundant copy too, by write.py.
    """

    def __init__(self, image: Vmdk, file: Node, start: int, kind: str, layout: Layout) -> None:
        self.image = image
        self.file = file
        self.start = start
        self.kind = kind
        self.layout = layout
        self.size = layout.capacity
        self.grain = layout.grain
        self.compressed = layout.compressed
        tables = min(CACHE // layout.table_size, TABLES_MAX)
        self.tables = TableCache(file, layout.table_size, tables, image.barrier)
        self.copies = TableCache(file, layout.table_size, TABLES_MAX, image.barrier)  # of tables that were changed
        self.directory = TableCache(file, PAGE, PAGES_MAX)  # only read: what follows a directory is no part of it
        self.new_tables: dict[int, int] = {}  # entries of directories that are to be written: place in the file -> table's place
        self._stored = (0, 0)  # a range of the file that is no hole, as far as is known
        self.next = -1  # where the next grain goes in the file; -1: to be seen
        self.untouched = 0  # nothing was ever written from here on
        self.pending = bytearray()  # compressed grains that are not in the file yet, and
        self.pending_at = 0  # where they belong

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def span(self) -> int:
        """Bytes of the disk that a table stands for."""
        return self.grain * self.layout.gtes

    def table_offset(self, index: int, backup: bool = False) -> int:
        """Where table `index` (or its redundant copy) is in the file; 0 where there is none."""
        layout = self.layout
        position = index * layout.width
        start = layout.backup if backup else layout.directory
        if self.new_tables and start + position in self.new_tables:
            return self.new_tables[start + position]
        page = self.directory.get(start + position // PAGE * PAGE)
        return self._table_place(int.from_bytes(page[position % PAGE : position % PAGE + layout.width], "little"))

    def _table_place(self, value: int) -> int:
        if self.layout.width == 4:
            return value * SECTOR
        if value >> 32 != 0x10000000:
            return 0
        return self.layout.tables + (value & 0xFFFFFFFF) * self.layout.table_size

    def _missing_tables(self, index: int, most: int) -> int:
        """How many tables from `index` on, which is not there, are not there; at least 1, at most `most`."""
        width = self.layout.width
        position = index * width
        page = self.directory.get(self.layout.directory + position // PAGE * PAGE)
        first = position % PAGE // width
        run = table_runs(page, width, False, first, min(most, PAGE // width - first), 0, 1)[0]
        return run[1] if not run[2] else 1

    def _empty_tables(self, index: int, place: int, most: int) -> int:
        """How many tables from `index` on, the first of which is at `place`, are holes of the file and so without a grain."""
        size = self.layout.table_size
        if most < 2 or size % SECTOR or self.layout.width != 4 or self.tables.dirty or self._stored[0] <= place < self._stored[1]:
            return 0
        position = index * 4
        page = self.directory.get(self.layout.directory + position // PAGE * PAGE)
        first = position % PAGE // 4
        run = table_runs(page, 4, False, first, min(most, PAGE // 4 - first), size // SECTOR, 1)[0]
        length = min(run[1] if run[3] else 1, (self.file.size - place) // size) * size
        if length <= 0:
            return 0
        _start, count, status = self.file.block_status(place, length, True, 1)[0][:3]
        if status & ZERO and count >= size:
            return count // size
        self._stored = (place, place + count)
        return 0

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """How a range is stored, in whole grains: ascending, without gaps. Takes the node's lock."""
        end = min(offset + length, self.size)
        span, grain = self.span, self.grain
        position = offset
        while position < end:
            index = position // span
            base = index * span
            with self.image._lock:
                place = self.table_offset(index)
                most = (end - 1) // span - index + 1
                count = self._missing_tables(index, most) if not place else self._empty_tables(index, place, most)
                if count:
                    found: list[Run] = [(base, count * span, HOLE, 0)]
                    stop = base + count * span
                else:
                    first = (position - base) // grain
                    stop = min(base + span, -(-end // grain) * grain)
                    found = self._table_runs(base, self.tables.get(place), first, (stop - base) // grain - first)
            yield from found
            position = stop

    def _table_runs(self, base: int, table: bytearray, first: int, count: int) -> list[Run]:
        """The runs of `count` entries of one table, whose first grain is at `base` of the extent."""
        grain = self.grain
        step = 1 << 48 if self.layout.width == 8 else grain // SECTOR
        found: list[Run] = []
        for index, number, value, used in table_runs(table, self.layout.width, False, first, count, step, count):
            kind, place = self.decode(value)
            offset = base + index * grain
            if number == 1 or not used and kind != DATA or self.compressed and kind == DATA:
                found.append((offset, number * grain, kind, place))
            elif used and kind == DATA and self.decode(value + (number - 1) * step) == (DATA, place + (number - 1) * grain):
                found.append((offset, number * grain, kind, place))
            else:  # several in one and the same place, or a count that goes up from what is no place
                for turn in range(number):
                    found.append((offset + turn * grain, grain, *self.decode(value + turn * used)))
        return found

    def decode(self, value: int) -> tuple[int, int]:
        """The kind of the grain that a table entry stands for, and where it is in the file."""
        layout = self.layout
        if layout.width == 4:
            if not value:
                return HOLE, 0
            if value == ZERO_ENTRY and layout.zero_grains:
                return ZEROES, 0
            return DATA, value * SECTOR
        kind = value >> 60
        if kind in (1, 2):  # unmapped by the guest, or zero
            return ZEROES, 0
        if kind != 3:
            return HOLE, 0
        number = value >> 48 & 0xFFF | (value & 0xFFFFFFFFFFFF) << 12
        return DATA, layout.grains + number * self.grain

    def entries(self, index: int) -> Optional[bytearray]:
        """The table `index`, None where there is none."""
        place = self.table_offset(index)
        return self.tables.get(place) if place else None

    def find(self, offset: int) -> tuple[int, int]:
        """(kind, offset in the file) of the grain that holds `offset`."""
        table = self.entries(offset // self.span)
        if table is None:
            return HOLE, 0
        position = offset % self.span // self.grain * self.layout.width
        return self.decode(int.from_bytes(table[position : position + self.layout.width], "little"))


def open_extent(image: Vmdk, file: Node, start: int, line: ExtentLine, flags: OpenFlags) -> AnyExtent:
    """The extent that `line` of a descriptor names, in `file`, at byte `start` of the disk. Raises Error."""
    from ...errors import ReadOnly
    from .descriptor import FLAT_KINDS

    if line.read_only and flags.writable:
        raise ReadOnly("The extent '%s' can only be read" % line.name, filename=image.filename, errno=13)
    if line.kind in FLAT_KINDS:
        return FlatExtent(file, start, line)
    layout = read_sesparse(file) if line.kind == "SESPARSE" else read_layout(file, flags.writable)
    if layout.read_only and flags.writable:
        raise ReadOnly(layout.read_only, filename=image.filename, errno=95)
    return SparseExtent(image, file, start, line.kind, layout)
