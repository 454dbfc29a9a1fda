# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What else a qcow2 image refers to: L2 entries that are not plain, snapshots, bitmaps, the encryption header
(https://www.qemu.org/docs/master/interop/qcow2.html#snapshots)."""

from __future__ import annotations

import errno
import struct

from .check import GiveUp, big_array, is_zero
from .header import (
    BITMAPS,
    COMPRESSED,
    COPIED,
    EXT_BITMAPS,
    EXT_ENCRYPTION,
    L2_RESERVED,
    MAX_L1_SIZE,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE_SIZE,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
    ZERO,
    BitmapsExtension,
    EncryptionExtension,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from typing import Iterator

    from .check import Check

MAX_BITMAP_TABLE = 0x8000000  # entries
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_SNAPSHOT_EXTRA = 16  # bytes of extra data that version 3 demands
_BITMAP = struct.Struct(">QIIBBHI")
_CHUNK = 64 << 10


def walk_l2_entries(check: Check, table: int, entries: array[int], bitmaps: array[int], active: bool) -> None:
    """Count the entries of the L2 table at `table` one by one, and report what is wrong with them."""
    result = check.result
    unaligned = check.cluster_size - 1
    following = 0
    for index, entry in enumerate(entries):
        bitmap = bitmaps[index] if bitmaps else 0
        if entry & COMPRESSED:
            _compressed_entry(check, index, entry, bitmap, active)
            continue
        if entry & L2_RESERVED:
            check.corruption("ERROR found l2 entry with reserved bits set: %x" % entry)
        offset = entry & OFFSET_MASK
        if not offset and not (check.data_file and entry & COPIED):
            if bitmap & 0xFFFFFFFF:
                check.corruption("ERROR: Unallocated cluster has non-zero subcluster allocation map")
            continue
        if active:
            check.copied_certain = False
        if bitmap & bitmap >> 32 & 0xFFFFFFFF:
            check.corruption("ERROR offset=%x: Allocated cluster has corrupted subcluster allocation bitmap" % offset)
        if offset & unaligned and _unaligned_entry(check, table, index, entry, bitmap):
            continue
        if active and check.first:
            result.allocated_clusters += 1
            if following and following != offset:
                result.fragmented_clusters += 1
            following = offset + check.cluster_size
        if not check.data_file:
            check.count(offset, check.cluster_size)


def _compressed_entry(check: Check, index: int, entry: int, bitmap: int, active: bool) -> None:
    shift = 62 - (check.cluster_bits - 8)
    offset = entry & (1 << shift) - 1
    if entry & COPIED:
        check.corruption("ERROR: coffset=0x%x: copied flag must never be set for compressed clusters" % offset)
        entry &= ~COPIED
    if check.data_file:
        check.corruption("ERROR compressed cluster %d with data file, entry=0x%x" % (index, entry))
        return
    if bitmap:
        check.corruption("ERROR compressed cluster %d with non-zero subcluster allocation bitmap, entry=0x%x" % (index, entry))
        return
    sectors = (entry >> shift & (1 << check.cluster_bits - 8) - 1) + 1
    check.count(offset, sectors * 512 - (offset & 511))
    if active and check.first:
        check.result.allocated_clusters += 1
        check.result.fragmented_clusters += 1
        check.result.compressed_clusters += 1


def _unaligned_entry(check: Check, table: int, index: int, entry: int, bitmap: int) -> bool:
    """Report an unaligned cluster; True if the entry was mended, so that nothing is left to count."""
    zero = bool(entry & ZERO) and not check.extended or check.extended and not bitmap & 0xFFFFFFFF
    name = "Preallocated" if zero else "Data"
    text = "offset=%x: %s cluster is not properly aligned; L2 entry corrupted." % (entry & OFFSET_MASK, name)
    if zero and check.repair == "all":
        from .repair import zero_entry

        if check.first:
            check.result.say("Repairing " + text)
            zero_entry(check, table, index, bitmap)
            check.result.corruptions_fixed += 1
        return True
    check.corruption("ERROR " + text)
    return False


def walk_encryption(check: Check) -> None:
    """Count the clusters of the LUKS header."""
    data = check.header.extension(EXT_ENCRYPTION)
    if data is not None:
        extension = EncryptionExtension.unpack(data)
        check.count(extension.offset, extension.length)


# -- snapshots -----------------------------------------------------------------------------------------------------


class Snapshot:
    """An entry of the snapshot table: where it is, and what the check needs of it."""

    __slots__ = ("position", "size", "l1_table_offset", "l1_size", "fields", "extra_size", "id_size", "name_size")

    def __init__(self, position: int, fixed: bytes) -> None:
        self.position = position
        self.fields = fixed
        values = _SNAPSHOT.unpack(fixed)
        self.l1_table_offset, self.l1_size, self.id_size, self.name_size = values[:4]
        self.extra_size = values[8]
        self.size = _SNAPSHOT.size + self.extra_size + self.id_size + self.name_size


def read_snapshots(check: Check) -> list[Snapshot]:
    """Read and verify the snapshot table; the entries that the image keeps. Raises GiveUp in QEMU's words."""
    header, result = check.header, check.result
    count = header.nb_snapshots
    if count > MAX_SNAPSHOTS:
        if check.repair != "all":
            result.say("qemu-img: ERROR snapshot table too large")
            result.say("You can force-remove all %d overhanging snapshots with qemu-img check -r all" % (count - MAX_SNAPSHOTS))
            raise GiveUp("File too large", errno=errno.EFBIG)
        result.say("Discarding %d overhanging snapshots" % (count - MAX_SNAPSHOTS))
        check.snapshots_damaged += count - MAX_SNAPSHOTS
        count = MAX_SNAPSHOTS
    if count and (header.snapshots_offset % check.cluster_size or header.snapshots_offset >> 63):
        result.say("qemu-img: ERROR snapshot table offset invalid")
        raise GiveUp("Invalid argument", errno=errno.EINVAL)
    found: list[Snapshot] = []
    position = header.snapshots_offset
    for index in range(count):
        position = position + 7 & ~7
        snapshot = Snapshot(position, check.read(position, _SNAPSHOT.size))
        if snapshot.extra_size > MAX_SNAPSHOT_EXTRA:
            _long_extra(check, index, snapshot)
        elif header.version >= 3 and snapshot.extra_size < _SNAPSHOT_EXTRA:
            check.snapshots_damaged += 1
            result.say("%s snapshot table entry %d is incomplete" % ("Repairing" if check.repair == "all" else "ERROR", index))
        position += snapshot.size
        if position - header.snapshots_offset > MAX_SNAPSHOT_TABLE_SIZE:
            if check.repair != "all":
                result.say("qemu-img: ERROR failed to read the snapshot table: Snapshot table is too big")
                raise GiveUp("File too large", errno=errno.EFBIG)
            result.say("Discarding %d overhanging snapshots (snapshot table is too big)" % (count - index))
            check.snapshots_damaged += count - index
            break
        found.append(snapshot)
    check.snapshots_size = position - header.snapshots_offset if count else 0
    return found


def _long_extra(check: Check, index: int, snapshot: Snapshot) -> None:
    if check.repair != "all":
        check.result.say("qemu-img: ERROR failed to read the snapshot table: Too much extra metadata in snapshot table entry %d" % index)
        check.result.say("You can force-remove this extra metadata with qemu-img check -r all")
        raise GiveUp("File too large", errno=errno.EFBIG)
    check.result.say(
        "Discarding too much extra metadata in snapshot table entry %d (%d > %d)" % (index, snapshot.extra_size, MAX_SNAPSHOT_EXTRA)
    )
    check.snapshots_damaged += 1


def walk_snapshots(check: Check) -> None:
    """Count the snapshots' L1 tables with all below them, and the snapshot table."""
    for snapshot in check.snapshots:
        offset, size = snapshot.l1_table_offset, snapshot.l1_size
        if offset & (check.cluster_size - 1):
            check.corruption(
                "ERROR snapshot %s (%s) l1_offset=%#x: L1 table is not cluster aligned; snapshot table entry corrupted"
                % (*snapshot_names(check, snapshot), offset)
            )
        elif size > MAX_L1_SIZE // 8:
            check.corruption(
                "ERROR snapshot %s (%s) l1_size=%#x: L1 table is too large; snapshot table entry corrupted"
                % (*snapshot_names(check, snapshot), size)
            )
        else:
            check.walk_l1(offset, size, False)
    check.count(check.header.snapshots_offset, check.snapshots_size)


def snapshot_names(check: Check, snapshot: Snapshot) -> tuple[str, str]:
    """ID and name of a snapshot, as text that gives the same bytes back."""
    at = snapshot.position + _SNAPSHOT.size + snapshot.extra_size
    raw = check.read(at, snapshot.id_size + snapshot.name_size)
    parts = raw[: snapshot.id_size], raw[snapshot.id_size :]
    first, second = (part.split(b"\0")[0].decode("utf-8", "surrogateescape") for part in parts)
    return first, second


# -- bitmaps -------------------------------------------------------------------------------------------------------


def walk_bitmaps(check: Check) -> None:
    """Count the bitmap directory, the bitmap tables and the bitmaps' data."""
    data = check.header.extension(EXT_BITMAPS)
    if data is None or not check.header.autoclear_features & BITMAPS:
        return
    extension = BitmapsExtension.unpack(data)
    check.count(extension.bitmap_directory_offset, extension.bitmap_directory_size)
    for offset, entries in _bitmap_tables(check, extension):
        check.count(offset, entries * 8)
        for start in range(0, entries * 8, _CHUNK):
            raw = check.read(offset + start, min(_CHUNK, entries * 8 - start))
            if is_zero(raw):
                continue
            for entry in big_array(raw):
                if entry & OFFSET_MASK:
                    check.count(entry & OFFSET_MASK, check.cluster_size)


def _bitmap_tables(check: Check, extension: BitmapsExtension) -> Iterator[tuple[int, int]]:
    """(offset, entries) of the bitmap tables. Raises GiveUp for a directory that cannot be read."""
    position = extension.bitmap_directory_offset
    end = position + extension.bitmap_directory_size
    for _index in range(extension.nb_bitmaps):
        if position + _BITMAP.size > end:
            raise GiveUp("Broken bitmap directory", errno=errno.EINVAL)
        offset, entries, _flags, _kind, _granularity, name_size, extra_size = _BITMAP.unpack(check.read(position, _BITMAP.size))
        position += _BITMAP.size + extra_size + name_size + 7 & ~7
        if position > end:
            raise GiveUp("Broken bitmap directory", errno=errno.EINVAL)
        if entries > MAX_BITMAP_TABLE or offset & (check.cluster_size - 1) or offset >> 56:
            raise GiveUp("Broken bitmap directory", errno=errno.EINVAL)
        yield offset, entries
