# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What else a qcow2 image refers to: L2 entries that are not plain, snapshots, bitmaps, the encryption header
(https://www.qemu.org/docs/master/interop/qcow2.html#snapshots)."""

from __future__ import annotations

import errno

from ...errors import Corrupt
from .check import GiveUp, big_words, is_zero
from .header import (
    COMPRESSED,
    COPIED,
    EXT_ENCRYPTION,
    L2_RESERVED,
    MAX_L1_SIZE,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE_SIZE,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
    ZERO,
    EncryptionExtension,
)
from .snapshots import SnapshotHeader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Sequence

    from .check import Check

_SNAPSHOT_EXTRA = 16  # bytes of extra data that version 3 demands
_SNAPSHOT_EXTRA_KNOWN = 24  # bytes of extra data whose meaning is known
_CHUNK = 64 << 10


def walk_l2_entries(check: Check, table: int, entries: Sequence[int], bitmaps: Sequence[int], active: bool) -> None:
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
        from .mend import zero_entry

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


class Snapshot(SnapshotHeader):
    """An entry of the snapshot table: its fixed part, and its place in the file; the rest is read where it is needed."""

    if TYPE_CHECKING:  # not a field of the record
        position: int = 0

    @property
    def size(self) -> int:
        """Bytes of the whole entry."""
        return SnapshotHeader.SIZE + self.extra_data_size + self.id_str_size + self.name_size


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
    if header.snapshots_offset % check.cluster_size or header.snapshots_offset >> 63:
        result.say("qemu-img: ERROR snapshot table offset invalid")
        raise GiveUp("Invalid argument", errno=errno.EINVAL)
    found: list[Snapshot] = []
    incomplete: list[int] = []
    position = header.snapshots_offset
    length = 0  # of the table as it would be written
    for index in range(count):
        position = position + 7 & ~7
        snapshot = Snapshot.unpack(check.read(position, SnapshotHeader.SIZE))
        snapshot.position = position
        if snapshot.extra_data_size > MAX_SNAPSHOT_EXTRA:
            _long_extra(check, index, snapshot)
        elif header.version >= 3 and snapshot.extra_data_size < _SNAPSHOT_EXTRA:
            incomplete.append(index)
        position += snapshot.size
        length = (length + 7 & ~7) + snapshot.size
        if snapshot.extra_data_size > MAX_SNAPSHOT_EXTRA:
            length -= snapshot.extra_data_size - _SNAPSHOT_EXTRA_KNOWN
        if length > MAX_SNAPSHOT_TABLE_SIZE or position - header.snapshots_offset > 0x7FFFFFFF:
            if check.repair != "all":
                result.say("qemu-img: ERROR failed to read the snapshot table: Snapshot table is too big")
                raise GiveUp("File too large", errno=errno.EFBIG)
            result.say("Discarding %d overhanging snapshots (snapshot table is too big)" % (count - index))
            check.snapshots_damaged += count - index
            break
        found.append(snapshot)
    for index in incomplete:
        result.say("%s snapshot table entry %d is incomplete" % ("Repairing" if check.repair == "all" else "ERROR", index))
    check.snapshots_damaged += len(incomplete)
    check.snapshots_size = position - header.snapshots_offset if count else 0
    return found


def _long_extra(check: Check, index: int, snapshot: Snapshot) -> None:
    if check.repair != "all":
        check.result.say("qemu-img: ERROR failed to read the snapshot table: Too much extra metadata in snapshot table entry %d" % index)
        check.result.say("You can force-remove this extra metadata with qemu-img check -r all")
        raise GiveUp("File too large", errno=errno.EFBIG)
    check.result.say("Discarding too much extra metadata in snapshot table entry %d (%d > %d)" % (index, snapshot.extra_data_size, MAX_SNAPSHOT_EXTRA))
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
                "ERROR snapshot %s (%s) l1_size=%#x: L1 table is too large; snapshot table entry corrupted" % (*snapshot_names(check, snapshot), size)
            )
        else:
            check.walk_l1(offset, size, False)
    check.count(check.header.snapshots_offset, check.snapshots_size)


def snapshot_names(check: Check, snapshot: Snapshot) -> tuple[str, str]:
    """ID and name of a snapshot, as text that gives the same bytes back."""
    first, second = (part.decode("utf-8", "surrogateescape") for part in _names(check, snapshot))
    return first, second


def _names(check: Check, snapshot: Snapshot) -> tuple[bytes, bytes]:
    """ID and name of a snapshot up to their first NUL bytes."""
    at = snapshot.position + SnapshotHeader.SIZE + snapshot.extra_data_size
    raw = check.read(at, snapshot.id_str_size + snapshot.name_size)
    return raw[: snapshot.id_str_size].split(b"\0")[0], raw[snapshot.id_str_size :].split(b"\0")[0]


def write_snapshots(check: Check) -> None:
    """Write the snapshot table anew, at another place, with whole and not too long entries; then free the old one."""
    from .overlap import INACTIVE_L1, INACTIVE_L2, SNAPSHOT_TABLE

    image, header = check.image, check.header
    table = b"".join(_mended(check, snapshot) for snapshot in check.snapshots)
    old = header.snapshots_offset >> check.cluster_bits, -(-check.snapshots_size // check.cluster_size)
    image.forget_metadata()
    image.overlap.mask &= ~(SNAPSHOT_TABLE | INACTIVE_L1 | INACTIVE_L2)  # it would look for them in the table that is being mended
    counted = 0 not in image.refcounts.values(*old)  # otherwise others may use it, or will
    offset = 0
    if table:
        offset = image.refcounts.allocate_whole(-(-len(table) // check.cluster_size)) << check.cluster_bits
        image.refcounts.write_back()
        image.file.write_hosted(offset, memoryview(table))
    image.file.flush()
    header.nb_snapshots, header.snapshots_offset = len(check.snapshots), offset
    image.update_record()
    if counted:
        image.refcounts.give_back(*old)
    image.refcounts.write_back()
    image.file.flush()


def _mended(check: Check, snapshot: Snapshot) -> bytes:
    """A snapshot table entry with extra data of a size that is allowed."""
    size = snapshot.extra_data_size if snapshot.extra_data_size <= MAX_SNAPSHOT_EXTRA else _SNAPSHOT_EXTRA_KNOWN
    extra = check.read(snapshot.position + SnapshotHeader.SIZE, size)
    if len(extra) < _SNAPSHOT_EXTRA:
        extra = (extra[:8] if len(extra) >= 8 else snapshot.vm_state_size.to_bytes(8, "big")) + check.header.size.to_bytes(8, "big")
    id, name = _names(check, snapshot)
    mended = SnapshotHeader.unpack(snapshot.pack())
    mended.extra_data_size, mended.id_str_size, mended.name_size = len(extra), len(id), len(name)
    data = mended.pack() + extra + id + name
    return data + bytes(-len(data) % 8)


# -- bitmaps -------------------------------------------------------------------------------------------------------


class Bitmap:
    """An entry of the bitmap directory, as far as a check needs it."""

    __slots__ = ("name", "table_offset", "table_size", "in_use")

    def __init__(self, name: str, table_offset: int, table_size: int, in_use: bool) -> None:
        self.name = name
        self.table_offset = table_offset
        self.table_size = table_size
        self.in_use = in_use


def read_bitmaps(check: Check) -> list[Bitmap]:
    """The bitmaps. Raises Corrupt in QEMU's words: no image with broken bitmaps is opened."""
    from .bitmaps import open_bitmaps

    try:
        found = open_bitmaps(check.image)
    except Corrupt as exc:
        raise _broken(check, str(exc)) from exc
    return [Bitmap(bitmap.name, bitmap.stored.offset, bitmap.stored.entries, bitmap.inconsistent) for bitmap in found]


def _broken(check: Check, text: str) -> Corrupt:
    name = check.image.filename
    return Corrupt("Could not open '%s': %s" % (name, text), filename=name, errno=errno.EINVAL)


def _table_entries(check: Check, bitmap: Bitmap) -> Iterator[int]:
    """The entries of a bitmap table that are not zero."""
    length = bitmap.table_size * 8
    for start in range(0, length, _CHUNK):
        raw = check.read(bitmap.table_offset + start, min(_CHUNK, length - start))
        if not is_zero(raw):
            yield from filter(None, big_words(raw))


def walk_bitmaps(check: Check) -> None:
    """Count the bitmap directory, the bitmap tables and the bitmaps' data."""
    from .bitmaps import extension

    found = extension(check.header)
    if found is None:
        return
    check.count(found.bitmap_directory_offset, found.bitmap_directory_size)
    for bitmap in check.bitmaps:
        check.count(bitmap.table_offset, bitmap.table_size * 8)
        for entry in _table_entries(check, bitmap):
            if entry & OFFSET_MASK:
                check.count(entry & OFFSET_MASK, check.cluster_size)
