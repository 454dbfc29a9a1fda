# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The image: opening, mapping, writing and growing (https://www.qemu.org/docs/master/interop/qed_spec.html).

Room is taken at the end of the file. Tables stay in memory until a flush, which writes new L2 tables, waits for them and
the data, and only then writes what points at them: after a crash some clusters are not used by anything, and that is all.
So the mark NEED_CHECK, which other programs may have left, is never set here.
"""

from __future__ import annotations

import errno
import os
import sys
from array import array

from ... import kernels
from ...cache import TableCache
from ...errors import Corrupt, Error, OptionError
from ...extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from ...node import MAX_SIZE, Alloc, Format, OpenFlags
from ...parts import part
from . import header as layout
from .header import QedCreateOptions, QedOptions, check_name, plan_header, read_header, set_backing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator, Optional, Sequence

    from diskwright.tally import CheckResult

    from ...hooks import Reference
    from ...node import Node

UNALLOCATED = 0
ZERO_CLUSTER = 1
PAGE = 64 << 10  # bytes; tables are read and written in such parts
CACHE = 32 << 20  # bytes of tables that are kept
RUNS = 4096  # asked from the kernel at a time


class Qed(Format):
    """A qed image."""

    driver = "qed"
    options_class = QedOptions
    create_options = QedCreateOptions
    creatable = True
    supports_backing = True
    zero_initialized = True

    def __init__(self, options: QedOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        file = self.file
        self.header = read_header(file.pread(0, min(layout.Header.SIZE, file.size)), file.size)
        self.cluster_size = self.allocation_unit = self.header.cluster_size
        self.table_span = self.header.reach
        self._size = self.header.image_size
        self._read_names()
        self.load_tables()
        if flags.writable:
            self._open_for_writing()

    def _read_names(self) -> None:
        header = self.header
        if not header.features & layout.BACKING_FILE:
            return
        check_name(header)
        at, length = header.backing_filename_offset, header.backing_filename_size
        name = self.file.pread(at, max(0, min(length, self.file.size - at))).partition(b"\0")[0]
        self.backing_filename = os.fsdecode(name) or None
        if header.features & layout.BACKING_FORMAT_NO_PROBE:
            self.backing_format = "raw"

    def load_tables(self) -> None:
        """Forget what is known of the tables, unwritten changes included, and of the end of the file."""
        table = self.header.table_bytes
        self.page = min(PAGE, table)
        self.end = layout.whole_clusters(self.file.size, self.cluster_size)  # where new clusters come to lie
        self.cache = TableCache(self.file, self.page, CACHE // self.page, self.write_back)
        self.fresh: set[int] = set()  # pages of L2 tables that nothing in the file points at yet
        self.free: list[tuple[int, int]] = []  # (offset, length) of clusters that were taken and given back

    def _open_for_writing(self) -> None:
        if self.header.autoclear_features:  # none is known
            self.header.autoclear_features = 0
            self.update_header()
        if self.header.features & layout.NEED_CHECK and not self.flags.check:
            self._check("all")

    def _changed_flags(self, old: OpenFlags) -> None:
        if self.flags.writable and not old.writable:
            self.load_tables()
            self._open_for_writing()

    # -- tables --------------------------------------------------------------------------------------------------

    def get_page(self, table: int, index: int) -> tuple[int, bytearray, int]:
        """The part of the table at `table` that holds entry `index`: its offset, its bytes, and the entry's number in it."""
        number, rest = divmod(index * 8, self.page)
        offset = table + number * self.page
        return offset, self.cache.get(offset), rest // 8

    def l2_offset(self, index: int) -> int:
        """The offset of the L2 table of L1 entry `index`, 0 for none. Raises Corrupt."""
        _offset, page, at = self.get_page(self.header.l1_table_offset, index)
        value = int.from_bytes(page[at * 8 : at * 8 + 8], "little")
        if value and not self.holds(value, self.header.table_bytes):
            raise self._invalid("L2 table", value)
        return value

    def holds(self, offset: int, length: int) -> bool:
        """Whether clusters of `length` bytes in all can be at `offset`."""
        first = self.header.header_size * self.cluster_size
        return not offset % self.cluster_size and first <= offset and offset + length <= self.end

    def _invalid(self, what: str, offset: int) -> Corrupt:
        text = "%s: %s offset %#x is not in the file" % (self.filename, what, offset)
        return Corrupt(text, filename=self.filename, offset=offset, errno=errno.EINVAL)

    def runs(self, page: bytearray, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(number, count, value) of runs of entries of a page: equal ones if value is 0 or 1, else a cluster further each."""
        end = first + count
        while first < end:
            for number, length, value, step in kernels.table_runs(page, 8, False, first, end - first, self.cluster_size, RUNS):
                first = number + length
                if value > ZERO_CLUSTER and not step:
                    for place in range(number, first):
                        yield place, 1, value
                elif value <= ZERO_CLUSTER and step:  # the others only seem to follow
                    first = number + 1
                    yield number, 1, value
                    break
                else:
                    yield number, length, value

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(guest offset, L1 index, entries) of a cluster-aligned range, cut so that each part lies in one page of a table."""
        reach, size = self.header.reach, self.cluster_size
        step = self.page // 8 * size
        while start < end:
            index, rest = divmod(start, reach)
            stop = min(end, index * reach + (rest // step + 1) * step)
            yield start, index, (stop - start) // size
            start = stop

    # -- looking up ----------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        end = offset + length
        while offset < end:
            with self._lock:
                extents, offset = self._map_part(offset, end)
            yield from extents

    def _map_part(self, offset: int, end: int) -> tuple[list[Extent], int]:
        """Extents from `offset` on, as far as a page of an L2 table or a run of absent ones reaches, and where they end."""
        reach, size = self.header.reach, self.cluster_size
        index = offset // reach
        l2_offset = self.l2_offset(index)
        if not l2_offset:
            stop = self._next_table(index, -(-end // reach))
            return [Extent(index * reach, (stop - index) * reach, 0)], stop * reach
        position, _index, count = next(self._parts(offset // size * size, min(-(-end // size) * size, (index + 1) * reach)))
        _place, page, first = self.get_page(l2_offset, position % reach // size)
        extents = []
        for number, run, value in self.runs(page, first, count):
            start = position + (number - first) * size
            if value == UNALLOCATED:
                extents.append(Extent(start, run * size, 0))
            elif value == ZERO_CLUSTER:
                extents.append(Extent(start, run * size, ZERO | ALLOCATED))
            else:
                inside = run * size if self.holds(value, run * size) else max(0, self.end - value) if self.holds(value, size) else 0
                if inside:
                    extents.append(Extent(start, inside, DATA | OFFSET_VALID | ALLOCATED, self.file, value))
                if inside < run * size:
                    if extents:  # an error is that of its place
                        return extents, start + inside
                    raise self._invalid("cluster", value)
        return extents, position + count * size

    def _next_table(self, index: int, stop: int) -> int:
        """The first L1 entry behind `index` that is not empty, or `stop`."""
        while index < stop:
            _offset, page, at = self.get_page(self.header.l1_table_offset, index)
            count = min(stop - index, len(page) // 8 - at)
            _first, run, value, step = kernels.table_runs(page, 8, False, at, count, 0, 1)[0]
            if value or step:
                return index
            index += run
        return stop

    # -- writing -------------------------------------------------------------------------------------------------

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        size = self.cluster_size
        allocs: list[Alloc] = []
        with self._lock:
            try:
                for start, index, count in self._parts(offset // size * size, -(-(offset + length) // size) * size):
                    _place, page, first = self.get_page(self._writable_l2(index), start % self.header.reach // size)
                    for number, run, value in self.runs(page, first, count):
                        position = start + (number - first) * size
                        if value > ZERO_CLUSTER:
                            if not self.holds(value, run * size):
                                raise self._invalid("cluster", value)
                            allocs.append(Alloc(position, run * size, self.file, value))
                            continue
                        left = run * size
                        while left:
                            place, taken = self._take(left)
                            allocs.append(Alloc(position, taken, self.file, place, True))
                            position += taken
                            left -= taken
            except BaseException:
                self._abort([alloc for alloc in allocs if alloc.fresh])
                raise
        return allocs

    def _take(self, length: int) -> tuple[int, int]:
        """Room for `length` bytes or the first part of them: (offset, length)."""
        if self.free:
            place, room = self.free.pop()
            if room > length:
                self.free.append((place + length, room - length))
            return place, min(room, length)
        if self.end + length > MAX_SIZE:
            raise Error("%s: the file cannot grow any more" % self.filename, filename=self.filename, errno=errno.EFBIG)
        self.end += length
        return self.end - length, length

    def _writable_l2(self, index: int) -> int:
        """The offset of the L2 table of L1 entry `index`, made if there is none."""
        found = self.l2_offset(index)
        if found:
            return found
        length = self.header.table_bytes
        offset = self.end
        if offset + length > MAX_SIZE:
            raise Error("%s: the file cannot grow any more" % self.filename, filename=self.filename, errno=errno.EFBIG)
        rest = min(length, self.file.size - offset)
        if rest > 0:  # what was not a whole cluster, or a device
            self.file.pwrite_zeroes(offset, rest)
        self.end += length
        for place in range(offset, offset + length, self.page):
            self.fresh.add(place)
        l1_page, page, at = self.get_page(self.header.l1_table_offset, index)
        page[at * 8 : at * 8 + 8] = offset.to_bytes(8, "little")
        self.cache.mark(l1_page)
        return offset

    def _set_entries(self, start: int, count: int, value: int, step: int) -> None:
        """Set the entries of `count` clusters from guest offset `start` on to value, value + step, ..."""
        size = self.cluster_size
        for position, index, number in self._parts(start, start + count * size):
            place, page, first = self.get_page(self._writable_l2(index), position % self.header.reach // size)
            low = value + (position - start) // size * step
            entries = array("Q", range(low, low + number * step, step) if step else [low]) * (1 if step else number)
            if sys.byteorder == "big":
                entries.byteswap()
            page[first * 8 : (first + number) * 8] = entries.tobytes()
            self.cache.mark(place)

    def _link(self, allocs: Sequence[Alloc]) -> None:
        with self._lock:
            for alloc in allocs:
                self._set_entries(alloc.offset, alloc.length // self.cluster_size, alloc.host_offset, self.cluster_size)

    def _abort(self, allocs: Sequence[Alloc]) -> None:
        with self._lock:
            self.free += [(alloc.host_offset, alloc.length) for alloc in allocs]

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        """Whole clusters become zero clusters; those that have room in the file keep it."""
        size = self.cluster_size
        end = offset + length
        start, stop = -(-offset // size) * size, (-(-end // size) if end == self.size else end // size) * size
        if start >= stop:
            return offset, 0
        kept: list[tuple[int, int]] = []
        with self._lock:
            for position, index, count in self._parts(start, stop):
                _place, page, first = self.get_page(self._writable_l2(index), position % self.header.reach // size)
                for number, run, value in list(self.runs(page, first, count)):
                    if value == UNALLOCATED:
                        self._set_entries(position + (number - first) * size, run, ZERO_CLUSTER, 0)
                    elif value != ZERO_CLUSTER:
                        if not self.holds(value, run * size):
                            raise self._invalid("cluster", value)
                        kept.append((value, run * size))
        for place, room in kept:
            self.file.pwrite_zeroes(place, room, unmap)
        return start, min(end, stop) - start

    # -- the whole image -----------------------------------------------------------------------------------------

    def _truncate(self, size: int, preallocation: str) -> None:
        if preallocation != "off":
            raise OptionError("Unsupported preallocation mode '%s'" % preallocation, errno=errno.ENOTSUP)
        if size % layout.SECTOR or size > layout.most(self.cluster_size, self.header.table_size):
            raise Error("Invalid image size specified", filename=self.filename, errno=errno.EINVAL)
        if size < self.size:
            raise Error("Shrinking images is currently not supported", filename=self.filename, errno=errno.ENOTSUP)
        if self.backing is not None and self.backing.size > self.size and size > self.size:
            self._hide_backing(self.size, min(size, self.backing.size))
        self.header.image_size = size
        self.update_header()
        self._size = size

    def _hide_backing(self, old: int, size: int) -> None:
        """What is added to the image reads as zeroes: see to it where the backing file has something there."""
        unit = self.cluster_size
        if old % unit:
            self._write(old - 1, memoryview(self.pread(old - 1, 1)))  # gets a cluster of its own, zero behind the end
        start, end = -(-old // unit) * unit, -(-size // unit) * unit
        if start < end:
            with self._lock:
                self._set_entries(start, (end - start) // unit, ZERO_CLUSTER, 0)
        self.flush()

    def _change_backing(self, name: Optional[str], format: Optional[str]) -> None:
        self.flush()
        before = self.header.pack()
        try:
            stored = set_backing(self.header, name, format)
        except Error:
            self.header = layout.Header.unpack(before)
            raise
        self.file.write_hosted(0, memoryview(self.header.pack() + stored))
        self.file.flush()
        self.backing_filename = name or None
        self.backing_format = "raw" if name and format == "raw" else None

    def update_header(self) -> None:
        """Write the header in one piece, after all that came before it."""
        self.write_back()
        self.file.flush()
        self.file.write_hosted(0, memoryview(self.header.pack()))
        self.file.flush()

    def write_back(self) -> None:
        """Bring cached tables into the file, in order; the last step still waits for a flush of the file."""
        with self._lock:
            if not self.cache.dirty:
                return
            if self.file.size < self.end and self.fresh:
                self.file.truncate(self.end)  # what of a new table has no entries was not written
            self.cache.write(self.fresh)
            self.file.flush()
            self.cache.write()
            self.fresh.clear()

    def _flush(self) -> None:
        self.write_back()

    def _check(self, repair: str) -> CheckResult:
        check = part(__package__, "check").check

        self.flush()
        found: CheckResult = check(self, repair)
        return found

    def references(self) -> list[Reference]:
        from ...hooks import Reference

        if self.backing_filename is None or "backing" in self.children:
            return []
        return [Reference("backing", self.backing_filename, self.backing_format)]

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head.startswith(layout.MAGIC_BYTES) else 0

    @classmethod
    def check_creation(cls, options: Any) -> None:
        plan_header(options)

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        header, name = plan_header(options)
        end = header.l1_table_offset + header.table_bytes
        if file.size >= end:  # a device: nobody knows what is there
            file.pwrite_zeroes(0, end)
        file.write_hosted(0, memoryview(header.pack() + name))
        if file.size < end:
            file.truncate(end)
