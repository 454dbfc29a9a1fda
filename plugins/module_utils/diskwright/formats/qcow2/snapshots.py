# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The snapshot table (https://www.qemu.org/docs/master/interop/qcow2.html#snapshots)."""

from __future__ import annotations

from ...cache import read_padded
from ...errors import Corrupt
from ...hooks import Snapshot as ListedSnapshot
from ...ondisk import Struct
from .header import MAX_L1_SIZE, MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_SIZE, OFFSET_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...ondisk import u16, u32, u64
    from .image import Qcow2


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
    return [_listed(entry) for entry in read_snapshots(image)[0]]


def _listed(entry: Snapshot) -> ListedSnapshot:
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


def snapshot_l2_offsets(image: Qcow2, snapshots: list[Snapshot]) -> set[int]:
    """Where the L2 tables of the snapshots are."""
    from .tables import read_entries

    offsets: set[int] = set()
    for snapshot in snapshots:
        if snapshot.l1_size > MAX_L1_SIZE // 8:
            raise Corrupt("Snapshot L1 table too large", filename=image.filename, errno=27)
        entries = read_entries(image.file, snapshot.l1_table_offset, snapshot.l1_size)
        offsets.update(entry & OFFSET_MASK for entry in entries)
    offsets.discard(0)
    return offsets
