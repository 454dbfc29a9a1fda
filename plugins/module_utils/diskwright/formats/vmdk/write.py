# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Writing: room for grains, the tables that point at them, and the CID that says that something changed
(VMware's "Virtual Disk Format 5.0", Hosted Sparse Extents).

Grains are taken at the end of the file. Tables stay in memory until a flush, which writes them after what they point at:
the redundant ones first, then those that count, then the directories if tables are new.
"""

from __future__ import annotations

import sys
from array import array

from ...errors import Corrupt, Error, ReadOnly, Unsupported
from ...hooks import Alloc
from .descriptor import new_cid, with_cid
from .extents import DATA, HOLE, ZERO_ENTRY, FlatExtent, SparseExtent, ZeroExtent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Sequence

    from .image import Vmdk

SECTOR = 512
EFBIG, EACCES, EINVAL = 27, 13, 22


def reserve(image: Vmdk, offset: int, length: int) -> list[Alloc]:
    """Where a range is to be written: grains that the disk has not get room at the end of their extent's file."""
    found: list[Alloc] = []
    with image._lock:
        change_cid(image)
        for extent, at, count in image.parts(offset, length):
            if isinstance(extent, FlatExtent):
                found.append(Alloc(extent.start + at, count, extent.file, extent.first + at))
            elif isinstance(extent, ZeroExtent):
                raise ReadOnly("This part of the disk has no file, and reads as zeroes", filename=image.filename, offset=offset, errno=EACCES)
            elif extent.compressed:
                found.append(Alloc(extent.start + at, count, image, extent.start + at))
            else:
                _reserve_grains(image, extent, at, count, found)
    return found


def _reserve_grains(image: Vmdk, extent: SparseExtent, offset: int, length: int, found: list[Alloc]) -> None:
    end = offset + length
    for start, count, kind, place in extent.runs(offset, length):
        if kind == DATA:
            low, high = max(offset, start), min(end, start + count)
            found.append(Alloc(extent.start + low, high - low, extent.file, place + low - start))
            continue
        low = max(start, offset // extent.grain * extent.grain)  # a hole may be as large as a table
        high = min(start + count, -(-end // extent.grain) * extent.grain)
        where = first_free(extent)
        if where + high - low > 0xFFFFFFFF * SECTOR:
            raise Error("The file is as large as the format allows", filename=image.filename, errno=EFBIG)
        zeroed = where >= extent.untouched
        extent.next = where + high - low
        extent.untouched = max(extent.untouched, extent.next)
        last = image.extents[-1] is extent
        size = high - low if last else min(high, extent.size) - low  # what is behind is another extent's
        found.append(Alloc(extent.start + low, size, extent.file, where, True, extent, zeroed))


def first_free(extent: SparseExtent) -> int:
    """Where the next grain goes in the file. Raises Unsupported for a stream that has its end already."""
    if extent.next < 0:
        if extent.layout.compressed and not extent.layout.backup and _has_footer(extent):
            raise Unsupported("A stream that ends with a footer cannot be written any more", filename=extent.image.filename, errno=95)
        unit = SECTOR if extent.compressed else extent.grain
        extent.next = extent.untouched = -(-extent.file.size // unit) * unit
    return extent.next


def _has_footer(extent: SparseExtent) -> bool:
    from .header import GD_AT_END, SparseHeader, read_record

    return SparseHeader.unpack(read_record(extent.file, 0, SparseHeader.SIZE)).gdOffset == GD_AT_END


def publish(image: Vmdk, allocs: Sequence[Alloc]) -> None:
    """Make the tables point at grains that are written."""
    with image._lock:
        for alloc in allocs:
            extent: SparseExtent = alloc.token
            count = -(-alloc.length // extent.grain)
            set_entries(extent, alloc.offset - extent.start, count, alloc.host_offset // SECTOR)


def withdraw(image: Vmdk, allocs: Sequence[Alloc]) -> None:
    """Give back what is still at the end of the file; what is not stays unused."""
    with image._lock:
        for alloc in reversed(allocs):
            extent: SparseExtent = alloc.token
            if alloc.host_offset + -(-alloc.length // extent.grain) * extent.grain == extent.next:
                extent.next = alloc.host_offset


def set_entries(extent: SparseExtent, offset: int, count: int, sector: int, step: int = -1) -> None:
    """Let `count` table entries, from the grain at `offset` on, name grains from `sector` on, one after the other.

    `step` is what they ascend by, in sectors. The caller holds the lock.
    """
    if step < 0:
        step = extent.grain // SECTOR
    gtes = extent.layout.gtes
    first = offset // extent.grain
    while count:
        index, entry = divmod(first, gtes)
        number = min(count, gtes - entry)
        values = array("I", range(sector, sector + number * step, step)) if step else array("I", [sector]) * number
        if sys.byteorder == "big":
            values.byteswap()
        for backup in (False, True) if extent.layout.backup else (False,):
            place = extent.table_offset(index, backup) or _new_table(extent, index, backup)
            if place + extent.layout.table_size > max(extent.file.size, extent.untouched):
                raise Corrupt("A grain table is not inside the file", filename=extent.image.filename, offset=place, errno=EINVAL)
            cache = extent.copies if backup else extent.tables
            if backup:
                primary = extent.tables.get(extent.table_offset(index))
                cache.put(place, primary)
            else:
                table = cache.get(place)
                table[entry * 4 : (entry + number) * 4] = values.tobytes()
                cache.mark(place)
        first += number
        sector += number * step
        count -= number


def _new_table(extent: SparseExtent, index: int, backup: bool) -> int:
    """Room for a table that other products leave out while it would be empty; the directory names it with the next flush."""
    layout = extent.layout
    from .compressed import write_pending

    write_pending(extent)
    place = first_free(extent)
    unit = SECTOR if extent.compressed else extent.grain
    extent.next = place + -(-layout.table_size // unit) * unit
    extent.untouched = max(extent.untouched, extent.next)
    if place > 0xFFFFFFFF * SECTOR:
        raise Error("The file is as large as the format allows", filename=extent.image.filename, errno=EFBIG)
    (extent.copies if backup else extent.tables).put(place, bytearray(layout.table_size))
    extent.new_tables[(layout.backup if backup else layout.directory) + index * 4] = place
    return place


def zero(image: Vmdk, offset: int, length: int, unmap: bool) -> tuple[int, int]:
    """Zero what is cheap from `offset` on: entries for zero grains where the extent knows them, holes of the files elsewhere."""
    end = offset + length
    position = offset
    with image._lock:
        change_cid(image)
    for extent, at, count in image.parts(offset, length):
        if isinstance(extent, FlatExtent):
            extent.file.pwrite_zeroes(extent.first + at, count, unmap)
        if not isinstance(extent, SparseExtent):
            position = extent.start + at + count
            continue
        if extent.compressed:
            break
        done = _zero_grains(image, extent, at, count, unmap)
        position = extent.start + done
        if done < at + count:
            break
    return offset, min(position, end) - offset


def _zero_grains(image: Vmdk, extent: SparseExtent, offset: int, length: int, unmap: bool) -> int:
    """Zero a part of an extent; where in the extent it had to stop."""
    end = offset + length
    grain = extent.grain
    for start, count, kind, place in list(extent.runs(offset, length)):
        low, high = max(offset, start), min(end, start + count)
        if kind == DATA:
            first, last = -(-low // grain) * grain, high // grain * grain if high < extent.size else high
            if extent.layout.zero_grains and first < last:
                _zero_data(extent, low, min(first, high), place + low - start, unmap)
                with image._lock:
                    set_entries(extent, first, -(-(last - first) // grain), ZERO_ENTRY, 0)
                _zero_data(extent, last, high, place + last - start, unmap)
            else:
                _zero_data(extent, low, high, place + low - start, unmap)
        elif kind == HOLE and (image.backing is not None or extent.layout.zero_grains):
            first, last = -(-low // grain) * grain, high // grain * grain if high < extent.size else high
            if not extent.layout.zero_grains or first > low or first >= last:
                if image.backing is not None:
                    return low
                continue  # a part of a grain that is not there
            with image._lock:
                set_entries(extent, first, -(-(last - first) // grain), ZERO_ENTRY, 0)
            if last < high and image.backing is not None:
                return last
    return end


def _zero_data(extent: SparseExtent, low: int, high: int, place: int, unmap: bool) -> None:
    """Zero a part of what is stored, where it is."""
    if low < high:
        inside = max(0, min(high - low, extent.file.size - place))
        extent.file.pwrite_zeroes(place, inside, unmap)


def change_cid(image: Vmdk) -> None:
    """Before the first change: give the image a new content ID, so that overlays notice. The caller holds the lock."""
    if image._new_cid:
        return
    image._new_cid = True
    stored = image.descriptor
    cid = new_cid()
    while cid == stored.cid:
        cid = new_cid()
    changed = with_cid(stored.text, cid)
    image.file.write_hosted(image.descriptor_offset, memoryview(changed))
    stored.text = changed
    stored.cid = cid


def write_back(image: Vmdk) -> None:
    """Bring tables into the files, after the grains that they name; a flush of the files must follow."""
    with image._lock:
        changed = [extent for extent in image.sparse if extent.pending or extent.tables.dirty or extent.copies.dirty]
        if not changed:
            return
        image.barrier()
        for extent in changed:
            _pad(extent)
            extent.copies.write()
            extent.copies.clear()
            extent.tables.write()
        if any(extent.new_tables for extent in changed):
            image.barrier()
            for extent in changed:
                for place, table in extent.new_tables.items():
                    extent.file.write_hosted(place, memoryview((table // SECTOR).to_bytes(4, "little")))
                extent.directory.clear()
                extent.new_tables.clear()


def _pad(extent: SparseExtent) -> None:
    """Make the file end with a whole grain, as readers expect of it."""
    if extent.next > extent.file.size:
        extent.file.truncate(extent.next, exact=False)
