# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Writing: room is reserved, data is written by the core, then L2 entries are linked; and the order in which all that reaches the file.

At any moment the file is either clean or has clusters with a refcount that nothing uses: refcounts go up before a pointer is
written and go down after it is gone (https://www.qemu.org/docs/master/interop/qcow2.html#host-cluster-management).
"""

from __future__ import annotations

from array import array

from ... import kernels
from ...kernels import contract as kinds
from ...node import Alloc
from .compressed import stored_range
from .header import COPIED, OFFSET_MASK
from .overlap import ACTIVE_L2
from .refcount import dirty_sectors
from .tables import RUNS, ascending, big_bytes, c_hex

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Sequence

    from .image import Qcow2

REUSED = "reused"  # token of a fresh Alloc whose clusters the image had already, as room for zeroes
MAX_FREED = 4096  # runs that wait to be given back before they are flushed out


def reserve(image: Qcow2, offset: int, length: int) -> list[Alloc]:
    """Where to write a range: in place where a cluster is ours alone, else in new clusters."""
    size = image.cluster_size
    position, end = offset // size * size, -(-(offset + length) // size) * size
    allocs: list[Alloc] = []
    with image._lock:
        try:
            for position, l2_offset, first, count in table_parts(image, position, end, create=True):
                _reserve_part(image, allocs, position, l2_offset, first, count)
        except BaseException:
            withdraw(image, [alloc for alloc in allocs if alloc.fresh])
            raise
    return allocs


def table_parts(image: Qcow2, position: int, end: int, create: bool) -> Iterator[tuple[int, int, int, int]]:
    """(guest offset, L2 table offset, first entry, count) of a cluster-aligned range, table by table.

    The table is one that may be changed; without `create`, parts that have no table have offset 0.
    """
    tables = image.tables
    while position < end:
        index, rest = divmod(position, tables.reach)
        stop = min(end, (index + 1) * tables.reach)
        l2_offset = writable_l2(image, index) if create or tables.l2_offset(index) else 0
        yield position, l2_offset, rest // image.cluster_size, (stop - position) // image.cluster_size
        position = stop


def writable_l2(image: Qcow2, index: int) -> int:
    """The offset of the L2 table of L1 entry `index`, made or copied if there is none that is ours alone."""
    tables, size = image.tables, image.cluster_size
    entry = tables.l1[index]
    old = tables.l2_offset(index)
    if old and entry & COPIED:
        if old not in tables.verified:
            image.overlap.check(old, size, ACTIVE_L2, "active L2 table")
            tables.verified.add(old)
        return old
    copy = bytearray(tables.cache.get(old)) if old else bytearray(size)
    offset = image.refcounts.allocate(1)[0] * size
    if not offset:
        raise image.corrupt("Preventing invalid allocation of L2 table at offset 0")
    image.mention(*(("l2_alloc_cow_read",) if old else ()), "refblock_update_part", "l2_alloc_write", "l2_update", "l1_update")
    tables.cache.put(offset, copy)
    tables.fresh.add(offset)
    tables.verified.add(offset)
    tables.l1[index] = offset | COPIED
    tables.l1_dirty.add(index)
    image.overlap.add_table(offset)
    if old:
        image.overlap.remove_table(old)
        image.refcounts.free(old // size, 1, bool(image.options.pass_discard_other))
    return offset


def _reserve_part(image: Qcow2, allocs: list[Alloc], position: int, l2_offset: int, first: int, count: int) -> None:
    tables, size, host = image.tables, image.cluster_size, image.data_file
    table = tables.cache.get(l2_offset)
    for index, run, kind, value in kernels.l2_runs(table, first, count, size, tables.external, count):
        offset = position + (index - first) * size
        if kind & kinds.NORMAL & kinds.ZERO_ALLOC and value & (size - 1):
            what = "Data cluster" if kind & kinds.COMPRESSED - 1 == kinds.NORMAL else "Preallocated zero cluster"
            raise image.corrupt("%s offset %#x unaligned (guest offset: %s)" % (what, value, c_hex(offset)))
        if tables.external:  # guest and host offsets are the same there, and nothing is counted
            fresh = kind != kinds.NORMAL | kinds.COPIED
            allocs.append(Alloc(offset, run * size, host, offset if fresh else value, fresh))
        elif kind == kinds.NORMAL | kinds.COPIED:
            image.overlap.check(value, run * size)
            allocs.append(Alloc(offset, run * size, host, value))
        elif kind == kinds.ZERO_ALLOC | kinds.COPIED:
            image.overlap.check(value, run * size)
            allocs.append(Alloc(offset, run * size, host, value, True, REUSED))
        else:
            while run:
                untouched = image.refcounts.untouched
                cluster, taken = image.refcounts.allocate(run)
                allocs.append(Alloc(offset, taken * size, host, cluster * size, True, None, host is image.file and cluster >= untouched))
                offset += taken * size
                run -= taken


def publish(image: Qcow2, allocs: Sequence[Alloc]) -> None:
    """Enter allocations, whose data is written, into the L2 tables, and note what they replace as free."""
    size = image.cluster_size
    image.mention("l2_update")
    with image._lock:
        for alloc in allocs:
            host = alloc.host_offset
            for position, l2_offset, first, count in table_parts(image, alloc.offset, alloc.offset + alloc.length, create=True):
                start = host + position - alloc.offset | COPIED
                set_entries(image, l2_offset, first, ascending(start, size, count), alloc.token != REUSED)
        trim_freed(image)


def withdraw(image: Qcow2, allocs: Sequence[Alloc]) -> None:
    """Give back allocations that will not be linked."""
    with image._lock:
        for alloc in allocs:
            if alloc.token != REUSED and not image.tables.external:
                image.refcounts.give_back(alloc.host_offset // image.cluster_size, alloc.length // image.cluster_size)


def set_entries(image: Qcow2, l2_offset: int, first: int, entries: bytes, free: bool = True, discard: bool = False) -> None:
    """Write L2 entries (as stored) over those from `first` on; what the old ones point at is noted as free if `free`, see free_entries."""
    cache, width = image.tables.cache, image.tables.entry_size
    table = cache.get(l2_offset)
    low, high = first * width, first * width + len(entries)
    old = table[low:high]
    table[low:high] = entries
    cache.mark(l2_offset)
    if free and old.count(0) != len(old):
        free_entries(image, old, discard)


def free_entries(image: Qcow2, entries: bytes | bytearray, discard: bool = False) -> None:
    """Note the clusters that L2 entries (as stored) point at as free; those of an external data file are not counted. With
    `discard` the file loses them; what is overwritten elsewhere is not discarded, since its place will soon be taken."""
    if image.tables.external:
        return
    size, bits = image.cluster_size, image.header.cluster_bits
    if image.tables.extended:
        entries = entry_column(entries, 0, len(entries) // 16)
    count = len(entries) // 8
    at = 0
    while at < count:
        runs = kernels.l2_runs(entries, at, count - at, size, False, RUNS)
        for _index, run, kind, value in runs:
            kind &= 7
            if kind == kinds.COMPRESSED:
                start, length = stored_range(value, bits)
                image.refcounts.free(start // size, (start + length - 1) // size - start // size + 1, discard)
            elif kind in (kinds.NORMAL, kinds.ZERO_ALLOC):
                if not value & (size - 1):  # nothing sensible can be freed otherwise
                    image.refcounts.free(value // size, run, discard)
        at = runs[-1][0] + runs[-1][1]


def entry_column(table: bytes | bytearray, first: int, count: int) -> bytes:
    """`count` extended L2 entries from `first` on without their bitmaps: what kernels.l2_runs takes."""
    return array("Q", table[first * 16 : (first + count) * 16])[0::2].tobytes()


def trim_freed(image: Qcow2) -> None:
    """Flush metadata where too much waits to be given back."""
    if len(image.refcounts.freed) > MAX_FREED:
        write_back(image)


def write_back(image: Qcow2) -> None:
    """Bring all metadata into the file, each thing after what it needs; the last step still waits for a flush of the file."""
    file = image.file
    with image._lock:
        tables, refcounts = image._tables, image._refcounts
        if refcounts is not None and refcounts.is_dirty() and not image.deferring:
            if image.lazy and image.ordered and tables is not None and (tables.cache.dirty or tables.l1_dirty):
                image.mark_dirty()
            else:
                refcounts.write_back()
        if tables is not None:
            tables.cache.write(tables.fresh)
            if tables.cache.dirty or tables.l1_dirty:
                image.barrier()
                tables.cache.write()
                base = image.header.l1_table_offset
                for low, high in dirty_sectors(tables.l1_dirty, len(tables.l1)):
                    image.mention("l1_update")
                    file.write_hosted(base + low * 8, memoryview(big_bytes(tables.l1[low:high])))
                tables.l1_dirty.clear()
                tables.fresh.clear()
        if refcounts is not None and refcounts.freed and not image.reads:  # nobody may read what takes the place
            image.barrier()
            refcounts.apply_freed()
            if not image.deferring:
                refcounts.cache.write()


__all__ = ["OFFSET_MASK", "publish", "reserve", "set_entries", "table_parts", "withdraw", "writable_l2", "write_back"]
