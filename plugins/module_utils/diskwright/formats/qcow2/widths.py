# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Structures rewritten in another form: refcounts of another width, snapshots without zero clusters
(https://www.qemu.org/docs/master/interop/qcow2.html#host-cluster-management)."""

from __future__ import annotations

import errno
from array import array
from bisect import bisect_left

from ... import kernels
from ...cache import read_padded
from ...errors import Error
from ...kernels import contract as kinds
from .header import COPIED, MAX_REFCOUNT_TABLE_SIZE, REFCOUNT_TABLE_MASK
from .tables import big_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

    from .image import Qcow2
    from .refcount import Refcounts


def change_refcount_order(image: Qcow2, order: int, tell: Callable[[int, int], None]) -> None:
    """Give all refcounts the width 2**order bits. Raises OptionError where one does not fit.

    New blocks and a new table are written behind the end of what is in use, where the old refcounts know of nothing, and
    one write of the header turns to them; the old ones are counted as free in them.
    """
    with image._lock:
        image.mark_clean()
        old = image.refcounts
        size, per_block = image.cluster_size, image.cluster_size * 8 >> order
        gone = _own_clusters(image, old)
        tail = -(-max(old.end_of_use(), image.file.size) // size)
        needed: set[int] = set()
        steps = -(-tail // per_block)
        for index in range(steps):
            values = _values(old, gone, index * per_block, per_block)
            largest = max(values)
            if largest > (1 << (1 << order)) - 1:
                cluster = index * per_block + next(at for at, value in enumerate(values) if value == largest)
                raise Error(
                    "Cannot decrease refcount entry width to %d bits: Cluster at offset %#x has a refcount of %d" % (1 << order, cluster * size, largest),
                    filename=image.filename,
                    errno=errno.EINVAL,
                )
            if largest:
                needed.add(index)
            tell(index, 2 * steps)
        indexes, table_clusters = _place(needed, tail, per_block, size)
        last = tail + len(indexes) + table_clusters
        table = array("Q", bytes(table_clusters * size))
        for number, index in enumerate(indexes):
            values = _values(old, gone, index * per_block, per_block)
            for cluster in range(max(tail, index * per_block), min(last, (index + 1) * per_block)):
                values[cluster - index * per_block] = 1
            image.file.write_hosted((tail + number) * size, memoryview(kernels.refcounts_pack(values, order)))
            table[index] = (tail + number) * size
            tell(steps + number, 2 * steps)
        offset = (tail + len(indexes)) * size
        image.file.write_hosted(offset, memoryview(big_bytes(table)))
        image.barrier()
        image.change_record(refcount_order=order, refcount_table_offset=offset, refcount_table_clusters=table_clusters)
        image.forget_metadata()


def _own_clusters(image: Qcow2, refcounts: Refcounts) -> list[int]:
    """The clusters of the refcount table and its blocks, ascending."""
    header = image.header
    first = header.refcount_table_offset // image.cluster_size
    found = set(range(first, first + header.refcount_table_clusters))
    found.update((entry & REFCOUNT_TABLE_MASK) // image.cluster_size for entry in refcounts.table if entry)
    return sorted(found)


def _values(refcounts: Refcounts, gone: list[int], first: int, count: int) -> array[int]:
    """The refcounts of `count` clusters from `first` on; those of `gone` are one less."""
    values = array("Q")
    position = first
    while position < first + count:
        index, entry = divmod(position, refcounts.per_block)
        part = min(first + count - position, refcounts.per_block - entry)
        offset = refcounts.block_offset(index)
        if not offset:
            values.frombytes(bytes(part * 8))
        else:
            per_byte = max(1, 8 >> refcounts.order)
            low = entry // per_byte * per_byte
            high = -(-(entry + part) // per_byte) * per_byte
            unpacked = kernels.refcounts_unpack(refcounts.cache.get(offset), refcounts.order, low, high - low)
            values.extend(unpacked[entry - low : entry - low + part])
        position += part
    at = bisect_left(gone, first)
    while at < len(gone) and gone[at] < first + count:
        if values[gone[at] - first]:
            values[gone[at] - first] -= 1
        at += 1
    return values


def _place(needed: set[int], tail: int, per_block: int, size: int) -> tuple[list[int], int]:
    """Which new blocks there must be, and how many clusters their table takes, if they are placed from cluster `tail` on."""
    indexes = set(needed)
    clusters = 1
    while True:
        last = tail + len(indexes) + clusters
        wider = indexes | set(range(tail // per_block, (last - 1) // per_block + 1))
        wanted = max(clusters, -(-(max(wider) + 1) * 8 // size))
        if wider == indexes and wanted == clusters:
            break
        indexes, clusters = wider, wanted
    if clusters * size > MAX_REFCOUNT_TABLE_SIZE:
        raise Error("The refcount table cannot grow any further: File too large", errno=errno.EFBIG)
    return sorted(indexes), clusters


def expand_snapshots(image: Qcow2) -> None:
    """Take the zero flags out of the L2 tables of all snapshots: their clusters become unallocated, or full of zeroes."""
    from .snapshots import read_snapshots, snapshot_l2_offsets

    size = image.cluster_size
    image.flush()
    with image._lock:
        backed = image.backing_filename is not None
        for l2_offset, l1_index in sorted(snapshot_l2_offsets(image, read_snapshots(image)[0]).items()):
            table = bytearray(size)
            read_padded(image.file, l2_offset, memoryview(table))
            users = image.refcounts.get(l2_offset // size)
            changed = False
            for index, count, kind, value in kernels.l2_runs(table, 0, size // 8, size, False, size // 8):
                kind &= 7
                if kind == kinds.ZERO_PLAIN and not backed:
                    table[index * 8 : (index + count) * 8] = bytes(count * 8)
                    changed = True
                elif kind in (kinds.ZERO_PLAIN, kinds.ZERO_ALLOC):
                    changed = True
                    for number in range(index, index + count):
                        guest_offset = l1_index * image.tables.reach + number * size
                        _fill_entry(image, table, number, value + (number - index) * size if kind == kinds.ZERO_ALLOC else 0, users, guest_offset)
            if changed:
                image.refcounts.write_back()
                image.barrier()
                image.file.write_hosted(l2_offset, memoryview(table))
                image.tables.cache.forget(l2_offset)
        image.barrier()


def _fill_entry(image: Qcow2, table: bytearray, index: int, place: int, users: int, guest_offset: int) -> None:
    """Make an entry of a table that `users` L1 tables share point at a cluster of zeroes, at `place` if it has one."""
    size = image.cluster_size
    if not place:
        cluster = image.refcounts.allocate(1)[0]
        if users > 1:
            for _number in range(users - 1):
                image.refcounts.add(cluster, 1, 1)
        place = cluster * size
    image.write_clusters(place, guest_offset, memoryview(bytes(size)))
    table[index * 8 : index * 8 + 8] = (place | (COPIED if users == 1 else 0)).to_bytes(8, "big")
