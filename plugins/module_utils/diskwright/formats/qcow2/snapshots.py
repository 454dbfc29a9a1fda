# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The snapshot table (https://www.qemu.org/docs/master/interop/qcow2.html#snapshots)."""

from __future__ import annotations


from ...cache import read_padded
from ...errors import Corrupt, Error
from ...hooks import MAX_SIZE
from ...hooks import Snapshot as ListedSnapshot
from ...ondisk import Struct
from .header import (
    EXTENDED_L2,
    MAX_L1_SIZE,
    MAX_SNAPSHOT_EXTRA,
    MAX_SNAPSHOT_TABLE_SIZE,
    OFFSET_MASK,
    l1_entries,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...ondisk import u16, u32, u64
    from .image import Qcow2


EINVAL, EFBIG, EBUSY, ENOENT, ENOTSUP = 22, 27, 16, 2, 95
MAX_NAME = 255  # bytes; what is longer is cut, as in QEMU
MAX_COMPARED = 1 << 16  # L2 tables
NO_ICOUNT = (1 << 64) - 1  # stored where instructions were not counted


class SnapshotHeader(Struct):
    """The fixed part of a snapshot table entry."""

    l1_table_offset: u64
    l1_size: u32
    id_str_size: u16
    name_size: u16
    date_sec: u32
    date_nsec: u32
    vm_clock_nsec: u64
    vm_state_size: u32
    extra_data_size: u32


class Snapshot(SnapshotHeader):
    """An entry of the snapshot table: `extra` as stored, `id` and `name` without their lengths."""

    if TYPE_CHECKING:
        extra: bytes = b""
        id: bytes = b""
        name: bytes = b""


def read_snapshots(image: Qcow2) -> tuple[list[Snapshot], int]:
    """The snapshots of an image, and the length of their table in bytes. Raises Corrupt in QEMU's words."""
    header = image.header
    offset = header.snapshots_offset
    found: list[Snapshot] = []
    for _number in range(header.nb_snapshots):
        fixed = bytearray(SnapshotHeader.SIZE)
        read_padded(image.file, offset, memoryview(fixed))
        entry = Snapshot.unpack(fixed)
        if entry.extra_data_size > MAX_SNAPSHOT_EXTRA:
            raise Corrupt(
                "Too much extra metadata in snapshot table entry %d" % len(found),
                filename=image.filename,
                errno=22,
                hint="You can force-remove this extra metadata with qemu-img check -r all",
            )
        rest = bytearray(entry.extra_data_size + entry.id_str_size + entry.name_size)
        read_padded(image.file, offset + SnapshotHeader.SIZE, memoryview(rest))
        entry.extra = bytes(rest[: entry.extra_data_size])
        entry.id = bytes(rest[entry.extra_data_size : entry.extra_data_size + entry.id_str_size])
        entry.name = bytes(rest[entry.extra_data_size + entry.id_str_size :])
        found.append(entry)
        offset += SnapshotHeader.SIZE + len(rest) + 7 & ~7
        if offset - header.snapshots_offset > MAX_SNAPSHOT_TABLE_SIZE:
            raise Corrupt(
                "Snapshot table is too big",
                filename=image.filename,
                errno=27,
                hint="You can force-remove all %d overhanging snapshots with qemu-img check -r all" % (header.nb_snapshots - len(found) + 1),
            )
    return found, offset - header.snapshots_offset


def list_snapshots(image: Qcow2) -> list[ListedSnapshot]:
    """The snapshots as info shows them."""
    return [listed_as(entry) for entry in read_snapshots(image)[0]]


def listed_as(entry: Snapshot) -> ListedSnapshot:
    extra = [int.from_bytes(entry.extra[start : start + 8], "big") for start in range(0, len(entry.extra) - 7, 8)]
    return ListedSnapshot(
        _text(entry.id, 127),
        _text(entry.name, 255),
        (extra[0] ^ 1 << 63) - (1 << 63) if extra else entry.vm_state_size,  # signed for QEMU
        entry.date_sec,
        entry.date_nsec,
        entry.vm_clock_nsec,
        extra[2] if len(extra) > 2 and extra[2] != NO_ICOUNT else None,
        extra[1] if len(extra) > 1 else None,
    )


def _text(name: bytes, most: int) -> str:
    """A stored name up to its first NUL byte, and no longer than QEMU has it."""
    return name.split(b"\0")[0][:most].decode("utf-8", "surrogateescape")


def snapshot_l2_offsets(image: Qcow2, snapshots: list[Snapshot]) -> dict[int, int]:
    """Where the L2 tables of the snapshots are, and the L1 index of each."""
    from .tables import read_entries

    offsets: dict[int, int] = {}
    for snapshot in snapshots:
        if snapshot.l1_size > MAX_L1_SIZE // 8:
            raise Corrupt("Snapshot L1 table too large", filename=image.filename, errno=27)
        entries = read_entries(image.file, snapshot.l1_table_offset, snapshot.l1_size)
        offsets.update((entry & OFFSET_MASK, index) for index, entry in enumerate(entries))
    offsets.pop(0, None)
    return offsets


# -- changing ------------------------------------------------------------------------------------------------------


def find(image: Qcow2, id: Optional[str], name: Optional[str]) -> int:
    """The index of the first snapshot with this ID and this name, of which None is any; -1 if there is none."""
    for index, entry in enumerate(read_snapshots(image)[0]):
        if id in (None, _text(entry.id, 127)) and name in (None, _text(entry.name, 255)):
            return index
    return -1


def find_either(image: Qcow2, name: str) -> int:
    """The index of the first snapshot whose ID is `name`, else of the first so named; -1 if there is none."""
    index = find(image, name, None)
    return index if index >= 0 else find(image, None, name)


def is_current(image: Qcow2, id: str) -> bool:
    """Whether the disk still has the clusters of the snapshot with this ID: whatever changes the disk gives it others."""
    from .tables import read_entries

    index = find(image, id, None)
    if index < 0:
        return False
    image.flush()
    entry = read_snapshots(image)[0][index]
    if entry.l1_size > MAX_L1_SIZE // 8 or disk_size(image, entry) != image.size:
        return False
    theirs = [offset & OFFSET_MASK for offset in read_entries(image.file, entry.l1_table_offset, entry.l1_size)]
    own = [offset & OFFSET_MASK for offset in read_entries(image.file, image.header.l1_table_offset, image.header.l1_size)]
    length = max(len(theirs), len(own))
    pairs = zip(theirs + [0] * (length - len(theirs)), own + [0] * (length - len(own)))
    different = [pair for pair in pairs if pair[0] != pair[1]]
    return len(different) <= MAX_COMPARED and all(first and second and _same_entries(image, first, second) for first, second in different)


def _same_entries(image: Qcow2, first: int, second: int) -> bool:
    """Whether the L2 tables at two offsets lead to the same clusters; the COPIED flags may differ."""
    size, word = image.cluster_size, 16 if image.header.incompatible_features & EXTENDED_L2 else 8
    copied = (b"\x80" + bytes(word - 1)) * (size // word)
    tables = [bytearray(size), bytearray(size)]
    for table, offset in zip(tables, (first, second)):
        read_padded(image.file, offset, memoryview(table))
    return not (int.from_bytes(tables[0], "big") ^ int.from_bytes(tables[1], "big")) & ~int.from_bytes(copied, "big")


def load_snapshot(image: Qcow2, id: Optional[str], name: Optional[str]) -> None:
    """Have an image that is open for reading show a snapshot; both None: whatever is there must be named."""
    from .tables import Tables

    index = find(image, id, name)
    if index < 0:
        raise Error("Can't find snapshot", filename=image.filename, errno=ENOENT)
    entry = read_snapshots(image)[0][index]
    if entry.l1_size > MAX_L1_SIZE // 8:
        raise Corrupt("Snapshot L1 table too large", filename=image.filename, errno=EFBIG)
    if entry.l1_table_offset % image.cluster_size:
        raise Corrupt("Snapshot L1 table offset invalid", filename=image.filename, errno=EINVAL)
    size = disk_size(image, entry)
    used = l1_entries(image.header, size)
    if entry.l1_size < used:
        raise Corrupt("Snapshot L1 table is too small", filename=image.filename, errno=EINVAL)
    size = max(size, image.size)  # as QEMU, which shows as much as the disk has now; but what was longer then is not cut
    tables = Tables(image, entry.l1_table_offset, entry.l1_size)
    del tables.l1[used:]  # the VM state follows
    tables.l1.frombytes(bytes((l1_entries(image.header, size) - used) * 8))
    image._tables = tables
    image._size = size


def disk_size(image: Qcow2, entry: Snapshot) -> int:
    """The virtual size in bytes that the snapshot was made of. Raises Corrupt."""
    size = int.from_bytes(entry.extra[8:16], "big") if len(entry.extra) >= 16 else image.size
    if size > MAX_SIZE:
        raise Corrupt("Snapshot of a disk of %d bytes" % size, filename=image.filename, errno=EFBIG)
    return size // 512 * 512
