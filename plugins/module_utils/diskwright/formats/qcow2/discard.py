# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Zeroing and discarding of whole clusters (https://www.qemu.org/docs/master/interop/qcow2.html#cluster-mapping)."""

from __future__ import annotations

from ... import kernels
from ...extent import ZERO as STATUS_ZERO
from ...kernels import contract as kinds
from .header import COPIED, ZERO
from .write import free_entries, set_entries, table_parts, trim_freed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .image import Qcow2

ZERO_ENTRY = ZERO.to_bytes(8, "big")
EMPTY_ENTRY = bytes(8)


def zero(image: Qcow2, offset: int, length: int, unmap: bool) -> tuple[int, int]:
    """Make the whole clusters of a range read as zeroes; returns the range that was done, length 0 for none.

    Without `unmap` clusters keep their room. Version 2 has no zero flag: there only clusters of an image without a
    backing file can be given up.
    """
    start, end = _covered(image, offset, length)
    if start >= end or image.header.version < 3 and image.backing_filename is not None:
        return offset, 0
    if image.is_raw_external:
        if start < offset or end > offset + length:
            return offset, 0
        _zero_data_file(image, start, end, unmap)
    passes = unmap and passes_request(image) and not image.is_raw_external
    unmap = unmap and not (image.options.discard_no_unref or image.is_raw_external)  # otherwise clusters keep their place
    with image._lock:
        if image.header.version < 3:
            _change(image, start, end, EMPTY_ENTRY, False)
        elif image.header.extended_l2:
            from .subclusters import zero_range

            start, end = zero_range(image, start, end, unmap)
        else:
            _zero_parts(image, start, end, unmap)
        trim_freed(image)
        if passes and image.options.discard_no_unref and not image.tables.external:
            _punch_kept(image, start, end)
    if start >= end:
        return offset, 0
    if passes and image.tables.external:
        _punch_external(image, start, end)
    start = max(start, offset)
    return start, min(end, offset + length) - start


def _covered(image: Qcow2, offset: int, length: int) -> tuple[int, int]:
    """The whole (sub)clusters of a range, and those at its ends that it does not cover but that are zero already."""
    size = image.allocation_unit
    start, end = whole_units(image, offset, length, size)
    if start > end:  # inside one cluster
        return (end, start) if _is_zero(image, end) else (start, end)
    if offset < start and _is_zero(image, start - size):
        start -= size
    if end < min(offset + length, image.size) and _is_zero(image, end):
        end += size
    return start, end


def _is_zero(image: Qcow2, offset: int) -> bool:
    """Whether the (sub)cluster at `offset` reads as zeroes without having data of its own."""
    if image.tables.find(offset)[0] in (kinds.NORMAL, kinds.COMPRESSED):
        return False
    length = min(image.allocation_unit, image.size - offset)
    return all(extent.status & STATUS_ZERO for extent in image.resolve(offset, length))


def discard(image: Qcow2, offset: int, length: int) -> None:
    """Give up the whole clusters of a range. They read as zeroes afterwards; version 2 with a backing file keeps them."""
    start, end = whole_units(image, offset, length, image.cluster_size)
    backed = image.backing_filename is not None
    if start >= end or image.header.version < 3 and backed:
        return
    if image.is_raw_external:
        _zero_data_file(image, start, end, True)
    with image._lock:
        if image.options.discard_no_unref or image.is_raw_external:
            _zero_parts(image, start, end, False, absent=backed)
            if passes_request(image) and not image.tables.external:
                _punch_kept(image, start, end)
        else:
            entry = ZERO_ENTRY if image.header.version >= 3 else EMPTY_ENTRY
            if image.header.extended_l2:
                from .subclusters import ZERO_CLUSTER as entry
            _change(image, start, end, entry, backed)
        trim_freed(image)
    if image.tables.external and not image.is_raw_external and passes_request(image):
        _punch_external(image, start, end)


def forget_zeroes(image: Qcow2, start: int, end: int) -> None:
    """Make the zero clusters of a range, of an image without a backing file, unallocated ones."""
    with image._lock:
        for _position, l2_offset, first, count in table_parts(image, start, end, create=False):
            if l2_offset:
                set_entries(image, l2_offset, first, EMPTY_ENTRY * count)
        trim_freed(image)


def _zero_data_file(image: Qcow2, start: int, end: int, unmap: bool) -> None:
    """A raw data file has zeroes where the tables say so."""
    end = min(end, image.size)
    if end > start:
        image.data_file.pwrite_zeroes(start, end - start, unmap)


def passes_request(image: Qcow2) -> bool:
    """Whether discarded clusters are discarded in the file too."""
    chosen = image.options.pass_discard_request
    return image.flags.unmap if chosen is None else chosen


def whole_units(image: Qcow2, offset: int, length: int, size: int) -> tuple[int, int]:
    """The range cut to whole clusters, or subclusters, of `size` bytes; the last one of the image counts as whole."""
    end = offset + length
    if end == image.size:
        end = -(-end // size) * size
    return -(-offset // size) * size, end // size * size


def _change(image: Qcow2, start: int, end: int, entry: bytes, absent: bool) -> None:
    """Write `entry` over all allocated clusters of a range, and with `absent` over the others, and free what they had."""
    width = len(entry)
    for _position, l2_offset, first, count in table_parts(image, start, end, create=absent):
        if not l2_offset:
            continue
        table = image.tables.cache.get(l2_offset)
        old = table[first * width : (first + count) * width]
        if absent:
            new = entry * count
        elif not old.count(0) == len(old):
            new = b"".join(old[at : at + width] if old[at : at + 8] == EMPTY_ENTRY else entry for at in range(0, len(old), width))
        else:
            continue
        if new == old:
            continue
        table[first * width : (first + count) * width] = new
        image.tables.cache.mark(l2_offset)
        free_entries(image, old, passes_request(image))


def _zero_parts(image: Qcow2, start: int, end: int, unmap: bool, absent: bool = True) -> None:
    """Set the zero flag of clusters (of unallocated ones too if `absent`); compressed ones, and with `unmap` all, lose their room."""
    size = image.cluster_size
    if image.header.extended_l2:
        from .subclusters import zero_clusters

        zero_clusters(image, start, end, unmap, absent)
        return
    for _position, l2_offset, first, count in table_parts(image, start, end, create=absent):
        if not l2_offset:
            continue
        table = image.tables.cache.get(l2_offset)
        old = table[first * 8 : (first + count) * 8]
        for index, run, kind, value in kernels.l2_runs(old, 0, count, size, image.tables.external, count):
            place = (first + index) * 8
            plain = kind & 7
            if plain == kinds.UNALLOCATED and not absent or plain == kinds.ZERO_PLAIN:
                continue
            if plain in (kinds.NORMAL, kinds.ZERO_ALLOC) and not unmap:
                flags = (COPIED if kind & kinds.COPIED else 0) | ZERO
                table[place : place + run * 8] = b"".join(
                    (value + number * size | flags).to_bytes(8, "big") for number in range(run)
                )
            else:
                table[place : place + run * 8] = ZERO_ENTRY * run
                free_entries(image, old[index * 8 : (index + run) * 8], passes_request(image))
        if table[first * 8 : (first + count) * 8] != old:
            image.tables.cache.mark(l2_offset)


def _punch_external(image: Qcow2, start: int, end: int) -> None:
    """Discard a range in the data file, once the tables that do without it are in the image."""
    image.flush()
    end = min(end, image.size)
    if end > start:
        image.data_file.pdiscard(start, end - start)


def _punch_kept(image: Qcow2, start: int, end: int) -> None:
    """Discard, in the file, clusters that keep their place."""
    from .write import write_back

    write_back(image)
    image.file.flush()
    for extent in list(image.tables.map(start, end - start)):
        if extent.host is image.data_file and extent.status & STATUS_ZERO:
            low, high = max(extent.offset, start), min(extent.offset + extent.length, end)
            image.data_file.pdiscard(extent.host_offset + low - extent.offset, high - low)
