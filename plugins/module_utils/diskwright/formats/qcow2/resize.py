# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Resizing and preallocation (https://www.qemu.org/docs/master/tools/qemu-img.html, resize)."""

from __future__ import annotations

import errno

from array import array

from ... import kernels
from ...errors import Error, OptionError, Unsupported
from ...extent import ZERO
from ...kernels import contract as kinds
from .header import COPIED, MAX_L1_SIZE, l1_entries
from .tables import ascending, big_bytes
from .write import entry_column, free_entries, set_entries, table_parts, write_back

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .image import Qcow2

PREALLOCATION = ("off", "metadata", "falloc", "full")
SECTOR = 512
SLICE = 512  # clusters that are allocated at a time; as QEMU, so that refcount blocks end up in the same places


def resize(image: Qcow2, size: int, preallocation: str) -> None:
    """Change the virtual size; see Node.truncate. Raises Error in QEMU's words."""
    header = image.header
    if preallocation not in PREALLOCATION:
        raise OptionError("Invalid preallocation mode '%s'" % preallocation)
    if size % SECTOR:
        raise OptionError("The new size must be a multiple of %d" % SECTOR, filename=image.filename, errno=errno.EINVAL)
    if header.nb_snapshots and header.version < 3:
        raise Unsupported("Can't resize a v2 image which has snapshots", filename=image.filename, errno=errno.ENOTSUP)
    with image._lock:
        if size < image.size:
            if preallocation != "off":
                raise OptionError("Preallocation can't be used for shrinking an image", filename=image.filename, errno=errno.EINVAL)
            _shrink(image, size)
        elif size > image.size:
            # what is written into a raw data file by others is to be seen through the image
            grow(image, size, "metadata" if image.is_raw_external and preallocation == "off" else preallocation)
        if image.tables.external:
            image.data_file.truncate(size, exact=False)
        image.tables.forget_preallocation()


def grow(image: Qcow2, size: int, preallocation: str) -> None:
    """Make the image larger. What is new reads as zeroes, whatever the last cluster or a longer backing file has there."""
    old = image.size
    entries = l1_entries(image.header, size)
    if entries * 8 > MAX_L1_SIZE:
        raise Error("Failed to grow the L1 table: File too large", filename=image.filename, errno=errno.EFBIG)
    if entries > image.header.l1_size:
        grow_l1(image, entries)
    if preallocation != "off":
        preallocate(image, old, size, preallocation)
    image._size = size
    try:
        _zero_new(image, old, size)  # before anybody can see it, also after a crash
        write_back(image)
        image.barrier()
        image.change_record(size=size)
    except BaseException:
        image._size = old
        raise


def _zero_new(image: Qcow2, old: int, size: int) -> None:
    """Make the range from `old` to `size`, which is new, read as zeroes."""
    tail = min(-(-old // image.cluster_size) * image.cluster_size, size)
    if tail > old and image.tables.extended:
        for extent in image.resolve(old, tail - old):
            if not extent.status & ZERO:
                image.pwrite_zeroes(extent.offset, extent.length)
    elif tail > old and image.tables.find(old)[0] in (kinds.NORMAL, kinds.COMPRESSED, kinds.UNALLOCATED):
        if image.tables.find(old)[0] != kinds.UNALLOCATED or image.backing_filename is not None:
            image.pwrite_zeroes(old, tail - old)
    if image.backing_filename is None or tail >= size:
        return
    covered = size if image.backing is None else min(size, image.backing.size)
    covered = min(size, -(-covered // image.cluster_size) * image.cluster_size)
    if covered > tail:
        image.pwrite_zeroes(tail, covered - tail)


def grow_l1(image: Qcow2, entries: int) -> None:
    """Make the L1 table `entries` long: in its place where that has room, else in a new one."""
    tables, header, size = image.tables, image.header, image.cluster_size
    old_offset, old_clusters = header.l1_table_offset, -(-header.l1_size * 8 // size)
    clusters = -(-entries * 8 // size)
    write_back(image)
    image.mention("l1_grow_alloc_table")
    tables.l1.frombytes(bytes(max(0, entries - len(tables.l1)) * 8))
    offset = old_offset if clusters == old_clusters else image.refcounts.allocate_whole(clusters) * size
    image.refcounts.write_back()
    image.mention("l1_grow_write_table")
    image.file.write_hosted(offset, memoryview(big_bytes(tables.l1[:entries])))
    image.barrier()
    image.mention("l1_grow_activate_table")
    image.change_record(l1_size=entries, l1_table_offset=offset)
    image.overlap.forget()
    if offset != old_offset and old_clusters:
        image.refcounts.give_back(old_offset // size, old_clusters)


def preallocate(image: Qcow2, start: int, end: int, mode: str) -> None:
    """Give all clusters of a range a place behind the end of the file, where nothing was ever stored, and with "falloc" and
    "full" real blocks. A file that cannot grow gets zeroes instead."""
    size, file = image.cluster_size, image.file
    refcounts, tables = image.refcounts, image.tables
    if tables.external:
        _preallocate_external(image, start, end, mode)
        return
    first_cluster, end_cluster = start // size, -(-end // size)
    if file.growable:
        # the file grows first: no pointer in it may lead behind its end, and metadata must not take the place of blocks
        refcounts.skip_to(file.size)
        data = end_cluster - first_cluster
        other = data // tables.entries + 2
        other += (data + other) // refcounts.per_block + 2
        try:
            file.truncate(refcounts.end_of_use() + (data + other) * size, "off" if mode == "metadata" else mode, exact=False)
        except Error as exc:
            raise Error("Failed to resize underlying file: %s" % exc, filename=image.filename, errno=exc.errno) from exc
    cluster = wanted = -1
    for _position, l2_offset, first, count in table_parts(image, first_cluster * size, end_cluster * size, create=True):
        for index, run, kind, _value in _cluster_runs(image, l2_offset, first, count):
            while kind == kinds.UNALLOCATED and run:
                room = refcounts.room_in_block()
                wanted = min(run, max((index + room) // SLICE, index // SLICE + 1) * SLICE - index)
                cluster = refcounts.take_tail(wanted)
                if not file.growable:
                    file.pwrite_zeroes(cluster * size, wanted * size)
                set_entries(image, l2_offset, index, _room(image, l2_offset, index, cluster * size | COPIED, wanted))
                index += wanted
                run -= wanted
    if file.growable:
        surplus = 0  # as QEMU, which does not count the last subclusters
        if end % size and cluster >= 0 and (cluster + wanted) * size == refcounts.end_of_use():
            surplus = size - -(-(end % size) // image.allocation_unit) * image.allocation_unit
        file.truncate(refcounts.end_of_use() - surplus, exact=False)


def _cluster_runs(image: Qcow2, l2_offset: int, first: int, count: int) -> list[tuple[int, int, int, int]]:
    """The runs of whole clusters of an L2 table."""
    tables = image.tables
    table = tables.cache.get(l2_offset)
    if not tables.extended:
        return kernels.l2_runs(table, first, count, image.cluster_size, tables.external, count)
    runs = kernels.l2_runs(entry_column(table, first, count), 0, count, image.cluster_size, tables.external, count)
    return [(first + index, run, kind, value) for index, run, kind, value in runs]


def _preallocate_external(image: Qcow2, start: int, end: int, mode: str) -> None:
    """Map all clusters of a range to their places in the data file, which becomes as long."""
    size = image.cluster_size
    if image.data_file.size < end:
        image.data_file.truncate(end, "off" if mode == "metadata" else mode, exact=False)
    for position, l2_offset, first, count in table_parts(image, start // size * size, -(-end // size) * size, create=True):
        for index, run, kind, _value in _cluster_runs(image, l2_offset, first, count):
            if kind == kinds.UNALLOCATED:
                set_entries(image, l2_offset, index, _room(image, l2_offset, index, position + (index - first) * size | COPIED, run))


def _room(image: Qcow2, l2_offset: int, first: int, entry: int, count: int) -> bytes:
    """L2 entries for clusters that follow one another, the first of which is `entry`; the bitmaps of extended ones stay."""
    entries = ascending(entry, image.cluster_size, count)
    if not image.tables.extended:
        return entries
    words = array("Q", image.tables.cache.get(l2_offset)[first * 16 : (first + count) * 16])
    words[0::2] = array("Q", entries)
    return words.tobytes()


def _shrink(image: Qcow2, size: int) -> None:
    start = -(-size // image.cluster_size) * image.cluster_size
    image.mention("l1_shrink_write_table", "l1_shrink_free_l2_clusters")
    _drop(image, start, l1_entries(image.header, size), True)
    write_back(image)
    image.barrier()
    image.change_record(size=size)
    image._size = size
    _cut_file(image)


def make_empty(image: Qcow2) -> None:
    """Drop all clusters and L2 tables: pointers first, then refcounts, then the end of the file."""
    with image._lock:
        image.mention("empty_image_prepare")
        _drop(image, 0, 0, image.options.pass_discard_snapshot is not False)
        write_back(image)
        image.barrier()
        _cut_file(image)


def _drop(image: Qcow2, start: int, keep: int, discard: bool) -> None:
    """Drop the clusters from guest offset `start` on, and whole L2 tables where `keep` L1 entries are to stay; `discard` as for free_entries."""
    cluster_size, tables, refcounts = image.cluster_size, image.tables, image.refcounts
    end = -(-image.size // cluster_size) * cluster_size
    for position, l2_offset, first, count in _present_parts(image, start, end):
        index = position // tables.reach
        if index < keep:
            set_entries(image, l2_offset, first, bytes(tables.entry_size * count), discard=discard)
            continue
        free_entries(image, tables.cache.get(l2_offset), discard)
        tables.cache.forget(l2_offset)
        tables.fresh.discard(l2_offset)
        tables.l1[index] = 0
        tables.l1_dirty.add(index)
        image.overlap.remove_table(l2_offset)
        refcounts.free(l2_offset // cluster_size, 1, discard)


def _cut_file(image: Qcow2) -> None:
    """Give back refcount blocks that count nothing, and make the file end with what is in use."""
    image.refcounts.drop_empty_blocks()
    image.barrier()
    reach = image.refcounts.cut_tail()
    if reach < image.file.size:
        image.file.truncate(reach, exact=False)


def _present_parts(image: Qcow2, start: int, end: int) -> list[tuple[int, int, int, int]]:
    """table_parts of a range without those that have no table; only a table that stays is made ours alone."""
    tables, size = image.tables, image.cluster_size
    parts: list[tuple[int, int, int, int]] = []
    first_whole = -(-start // tables.reach) * tables.reach
    if start < min(first_whole, end):
        parts.extend(part for part in table_parts(image, start, min(first_whole, end), create=False) if part[1])
    for position in range(first_whole, end, tables.reach):
        l2_offset = tables.l2_offset(position // tables.reach)
        if l2_offset:
            parts.append((position, l2_offset, 0, min(tables.entries, (end - position) // size)))
    return parts
