# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Making a new image: log, BAT and metadata one after the other, then the blocks, where QEMU has them
(https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-vhdx/, section 2)."""

from __future__ import annotations

from array import array

from ...blockmap import little_endian
from ...errors import Error, OptionError
from . import layout
from .bat import FULLY_PRESENT, ZERO
from .layout import FileParameters, Header, K, M, MetadataEntry, MetadataTable, RegionEntry, RegionTable, bat_entries, new_guid, pack_header, with_checksum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...node import Node
    from .image import VhdxCreateOptions

CREATOR = "diskwright"
BLOCKS_BEHIND = 4 * M  # bytes between the metadata region and the first block
AUTOMATIC = ((32 << 40, 64 * M), (100 << 30, 32 * M), (1 << 30, 16 * M), (-1, 8 * M))  # disks larger than so many bytes -> block size


class Plan:
    """Sizes and places of a new image, in bytes."""

    __slots__ = ("size", "log_size", "block_size", "ratio", "blocks", "bat_offset", "bat_length", "metadata_offset", "data_offset")

    def __init__(self, size: int, log_size: int, block_size: int) -> None:
        self.size = size
        self.log_size = log_size
        self.block_size = block_size
        self.ratio = layout.CHUNK_SECTORS * layout.SECTOR // block_size
        self.blocks = -(-size // block_size)
        self.bat_offset = layout.START + log_size
        self.bat_length = max(1, -(-bat_entries(self.blocks, self.ratio) * 8 // M)) * M
        self.metadata_offset = self.bat_offset + self.bat_length
        self.data_offset = self.metadata_offset + M + BLOCKS_BEHIND


def plan(options: VhdxCreateOptions) -> Plan:
    """What the options ask for. Raises OptionError in QEMU's words."""
    if options.size > layout.MAX_SIZE:
        raise OptionError("Image size too large; max of 64TB")
    log_size = -(-options.log_size // M) * M
    if log_size >= 1 << 32:
        raise OptionError("Log size must be smaller than 4 GB")
    if not log_size:
        raise OptionError("Log size must be a multiple of 1 MB")
    block_size = options.block_size
    if not block_size:
        block_size = next(block for above, block in AUTOMATIC if options.size > above)
    block_size = min(-(-block_size // M) * M, layout.MAX_BLOCK)
    if block_size & (block_size - 1):
        raise OptionError("Block size must be a power of two")
    return Plan(options.size, log_size, block_size)


def create(file: Node, options: VhdxCreateOptions) -> None:
    """Write an empty image into the empty `file`."""
    found = plan(options)
    fixed = options.subformat == "fixed"
    zero = options.block_state_zero if options.block_state_zero is not None else not fixed
    length = found.data_offset + (found.size if fixed else 0)
    if file.growable:
        file.truncate(length, exact=False)
    elif length > file.size:
        raise Error("%s: no room for an image of %d bytes" % (file.filename, length), filename=file.filename, errno=28)
    else:
        file.pwrite_zeroes(0, length)  # a device, on which anything may be
    creator = CREATOR.encode("utf-16-le")
    file.write_hosted(0, memoryview((layout.MAGIC + creator).ljust(64 * K, b"\0")))
    file_guid, data_guid = new_guid(), new_guid()
    for number, offset in enumerate(layout.HEADERS):
        header = Header(
            sequence_number=number + 1,
            file_write_guid=file_guid,
            data_write_guid=data_guid,
            log_length=found.log_size,
            log_offset=layout.START,
        )
        file.write_hosted(offset, memoryview(pack_header(header)))
    table = memoryview(_region_table(found))
    for offset in layout.REGION_TABLES:
        file.write_hosted(offset, table)
    if zero:
        _write_bat(file, found, ZERO, 0)
    elif fixed:
        _write_bat(file, found, found.data_offset | FULLY_PRESENT, found.block_size)
    file.write_hosted(found.metadata_offset, memoryview(_metadata(found, fixed)))


def _region_table(found: Plan) -> bytes:
    entries = (
        RegionEntry(guid=layout.BAT, file_offset=found.bat_offset, length=found.bat_length, required=layout.REQUIRED),
        RegionEntry(guid=layout.METADATA, file_offset=found.metadata_offset, length=M, required=layout.REQUIRED),
    )
    raw = RegionTable(entry_count=len(entries)).pack() + b"".join(entry.pack() for entry in entries)
    return with_checksum(raw.ljust(layout.REGION_TABLE_SIZE, b"\0"))


def _metadata(found: Plan, fixed: bool) -> bytes:
    """The metadata region as far as anything is in it."""
    parameters = FileParameters(block_size=found.block_size, flags=layout.LEAVE_BLOCKS_ALLOCATED if fixed else 0)
    sector = layout.SECTOR.to_bytes(4, "little")
    disk = layout.ITEM_VIRTUAL_DISK | layout.ITEM_REQUIRED
    items = (
        (layout.FILE_PARAMETERS, layout.ITEM_REQUIRED, parameters.pack()),
        (layout.VIRTUAL_DISK_SIZE, disk, found.size.to_bytes(8, "little")),
        (layout.VIRTUAL_DISK_ID, disk, new_guid()),
        (layout.LOGICAL_SECTOR_SIZE, disk, sector),
        (layout.PHYSICAL_SECTOR_SIZE, disk, sector),
    )
    table = MetadataTable(entry_count=len(items)).pack()
    content = b""
    for item, flags, value in items:
        entry = MetadataEntry(item_id=item, offset=layout.METADATA_TABLE_SIZE + len(content), length=len(value), flags=flags)
        table += entry.pack()
        content += value
    return table.ljust(layout.METADATA_TABLE_SIZE, b"\0") + content


def _write_bat(file: Node, found: Plan, first: int, step: int) -> None:
    """Write entries `first`, `first` + `step`, ... for all blocks, a chunk at a time; there are no sector bitmaps."""
    ratio = found.ratio
    for index in range(0, found.blocks, ratio):
        count = min(ratio, found.blocks - index)
        start = first + index * step
        entries = array("Q", range(start, start + count * step, step)) if step else array("Q", (first,)) * count
        file.write_hosted(found.bat_offset + 8 * (index + index // ratio), memoryview(little_endian(entries)))
