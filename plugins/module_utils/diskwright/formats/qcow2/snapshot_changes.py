# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Making, applying and removing snapshots (https://www.qemu.org/docs/master/interop/qcow2.html#snapshots)."""

from __future__ import annotations

from ...errors import Error, Unsupported
from ...hooks import Snapshot as ListedSnapshot
from .header import BITMAPS, DATA_FILE, EXT_BITMAPS, MAX_SNAPSHOT_TABLE_SIZE, MAX_SNAPSHOTS, l1_entries
from .refcount import RefcountOverflow
from .snapshots import NO_ICOUNT, Snapshot, disk_size, find, find_either, listed_as, read_snapshots
from .switch import Switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from typing import Optional

    from .image import Qcow2


EINVAL, EFBIG, EBUSY, ENOENT, ENOTSUP = 22, 27, 16, 2, 95
MAX_NAME = 255  # bytes; what is longer is cut, as in QEMU


def create_snapshot(image: Qcow2, name: str, listed: Optional[ListedSnapshot]) -> ListedSnapshot:
    """Keep the present content as a snapshot; what it gets beside `name` is as in `listed`, or now and no VM state."""
    from time import time_ns

    header = image.header
    if header.incompatible_features & DATA_FILE:
        raise Unsupported("Operation not supported", filename=image.filename, errno=ENOTSUP)
    snapshots = read_snapshots(image)[0]
    if len(snapshots) >= MAX_SNAPSHOTS:
        raise Error("File too large", filename=image.filename, errno=EFBIG)
    seconds, nanoseconds = divmod(time_ns(), 1000000000)
    if listed is None:
        listed = ListedSnapshot("", name, 0, seconds, nanoseconds // 1000 * 1000, 0, 0)
    state = listed.vm_state_size
    entry = Snapshot(
        l1_table_offset=header.l1_table_offset,  # it takes over the present tables, and the disk gets new ones
        l1_size=header.l1_size,
        id_str_size=0,
        name_size=0,
        date_sec=listed.date_sec & 0xFFFFFFFF,
        date_nsec=listed.date_nsec,
        vm_clock_nsec=listed.vm_clock_nsec,
        vm_state_size=state if state <= 0xFFFFFFFF else 0,
        extra_data_size=0,
    )
    icount = NO_ICOUNT if listed.icount is None else listed.icount
    entry.extra = b"".join(number.to_bytes(8, "big") for number in (state, image.size, icount))
    entry.id = b"%d" % (max([_number(snapshot.id) for snapshot in snapshots], default=0) + 1)
    entry.name = name.encode("utf-8", "surrogateescape")[:MAX_NAME]
    with Switch(image) as switch:
        l1 = _adopt(image, switch, header.l1_table_offset, header.l1_size, "Invalid argument")
        _change_table(image, switch, [*snapshots, entry], l1_table_offset=switch.store_l1(l1) or header.l1_table_offset)
    return listed_as(entry)


def apply_snapshot(image: Qcow2, name: str) -> None:
    """Make the content of a snapshot, its size and its VM state the present one."""
    header = image.header
    if header.autoclear_features & BITMAPS and header.extension(EXT_BITMAPS) is not None:
        raise Error("Device has active dirty bitmaps", filename=image.filename, errno=EBUSY)
    if header.incompatible_features & DATA_FILE:
        raise Unsupported("Failed to load snapshot: Operation not supported", filename=image.filename, errno=ENOTSUP)
    snapshots = read_snapshots(image)[0]
    index = find_either(image, name)
    if index < 0:
        raise Error("Failed to load snapshot: No such file or directory", filename=image.filename, errno=ENOENT)
    entry = snapshots[index]
    size = disk_size(image, entry)
    entries = max(entry.l1_size, l1_entries(header, size))
    with Switch(image) as switch:
        adopted = _adopt(image, switch, entry.l1_table_offset, entry.l1_size, "Failed to load snapshot: Invalid argument")
        adopted.frombytes(bytes((entries - len(adopted)) * 8))
        switch.release(switch.l1_table(header.l1_table_offset, header.l1_size), header.l1_table_offset)
        switch.commit(l1_table_offset=switch.store_l1(adopted) or header.l1_table_offset, l1_size=entries, size=size)
    image._size = size


def _adopt(image: Qcow2, switch: Switch, l1_offset: int, l1_size: int, refusal: str) -> array[int]:
    """Switch.adopt, where a cluster that has too many users is `refusal`."""
    try:
        return switch.adopt(switch.l1_table(l1_offset, l1_size))
    except RefcountOverflow as exc:
        raise Error(refusal, filename=image.filename, errno=EINVAL) from exc


def delete_snapshot(image: Qcow2, name: str, id: Optional[str] = None) -> None:
    """Remove the first snapshot of that name, or the one that has this ID too."""
    header = image.header
    snapshots = read_snapshots(image)[0]
    index = find(image, id, name)
    if index < 0:
        raise Error("snapshot not found", filename=image.filename, errno=ENOENT)
    if header.incompatible_features & DATA_FILE:
        raise Unsupported("Operation not supported", filename=image.filename, errno=ENOTSUP)
    entry = snapshots.pop(index)
    with Switch(image) as switch:
        switch.release(switch.l1_table(entry.l1_table_offset, entry.l1_size), entry.l1_table_offset)
        l1 = switch.flag(switch.l1_table(header.l1_table_offset, header.l1_size))
        switch.give_up(header.l1_table_offset // image.cluster_size, -(-header.l1_size * 8 // image.cluster_size))
        _change_table(image, switch, snapshots, l1_table_offset=switch.store_l1(l1) or header.l1_table_offset)


def pack_table(image: Qcow2, snapshots: list[Snapshot]) -> bytes:
    """The snapshot table as stored. Raises Error where it would be too long."""
    table = b"".join([_packed(image, entry) for entry in snapshots])
    if len(table) > MAX_SNAPSHOT_TABLE_SIZE:
        raise Error("File too large", filename=image.filename, errno=EFBIG)
    return table


def _change_table(image: Qcow2, switch: Switch, snapshots: list[Snapshot], **values: int) -> None:
    """Commit with another snapshot table."""
    offset = switch.store(pack_table(image, snapshots))
    switch.give_up(image.header.snapshots_offset // image.cluster_size, -(-read_snapshots(image)[1] // image.cluster_size))
    switch.commit(nb_snapshots=len(snapshots), snapshots_offset=offset, **values)


def _packed(image: Qcow2, entry: Snapshot) -> bytes:
    """An entry as stored, with all extra data that version 3 knows."""
    implied = b"".join(number.to_bytes(8, "big") for number in (entry.vm_state_size, image.size, NO_ICOUNT))
    known = min(len(entry.extra) // 8 * 8, len(implied))
    extra = entry.extra if known == len(implied) else entry.extra[:known] + implied[known:]
    entry.extra_data_size, entry.id_str_size, entry.name_size = len(extra), len(entry.id), len(entry.name)
    data = entry.pack() + extra + entry.id + entry.name
    return data + bytes(-len(data) % 8)


def _number(id: bytes) -> int:
    """The number that an ID begins with, as C reads it; 0 for none."""
    digits = id.lstrip(b" \t\n\v\f\r+")
    end = 0
    while end < min(len(digits), 19) and digits[end : end + 1].isdigit():
        end += 1
    return int(digits[:end] or 0)
