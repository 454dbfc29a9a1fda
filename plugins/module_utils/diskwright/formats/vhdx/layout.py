# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What is where in the file: headers, regions, metadata (https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-vhdx/, section 2)."""

from __future__ import annotations

import os
from bisect import bisect_left

from ... import errors
from ...errors import Corrupt
from ...kernels import crc32c
from ...ondisk import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...errors import Error
    from ...node import Node
    from ...ondisk import bytes4, bytes8, bytes16, u16, u32, u64

EINVAL, ENOTSUP = 22, 95

K = 1 << 10
M = 1 << 20
SECTOR = 512
MAGIC = b"vhdxfile"
HEADER_SIZE = 4 * K  # bytes that a header's checksum covers
HEADERS = (64 * K, 128 * K)
REGION_TABLES = (192 * K, 256 * K)
REGION_TABLE_SIZE = 64 * K
METADATA_TABLE_SIZE = 64 * K
START = M  # of regions, log and blocks: what lies before is fixed
MAX_ENTRIES = 2047  # of a region table and of a metadata table
MIN_BLOCK, MAX_BLOCK = M, 256 * M
MAX_SIZE = 64 << 40  # bytes of a disk
MAX_FILE = 1 << 48  # bytes; what no file of a disk of MAX_SIZE reaches
MAX_SEQUENCE = (1 << 64) - 1
CHUNK_SECTORS = 1 << 23  # sectors that one block of the sector bitmap describes

BAT = bytes.fromhex("6677c22d23f600429d64115e9bfd4a08")
METADATA = bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e")
FILE_PARAMETERS = bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b")
VIRTUAL_DISK_SIZE = bytes.fromhex("2442a52f1bcd7648b2115dbed83bf4b8")
VIRTUAL_DISK_ID = bytes.fromhex("ab12cabee6b2234593efc309e000c746")
LOGICAL_SECTOR_SIZE = bytes.fromhex("1dbf41816fa90947ba47f233a8faab5f")
PHYSICAL_SECTOR_SIZE = bytes.fromhex("c748a3cd5d4471449cc9e9885251c556")
PARENT_LOCATOR = bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")
ITEMS = (FILE_PARAMETERS, VIRTUAL_DISK_SIZE, VIRTUAL_DISK_ID, LOGICAL_SECTOR_SIZE, PHYSICAL_SECTOR_SIZE)  # each must be there

REQUIRED = 1  # flag of a region
ITEM_VIRTUAL_DISK, ITEM_REQUIRED = 2, 4  # flags of a metadata item
LEAVE_BLOCKS_ALLOCATED, HAS_PARENT = 1, 2  # flags of the file parameters

NO_GUID = bytes(16)


class Header(Struct):
    """One of the two headers; the valid one with the greater sequence number counts."""

    ORDER = "<"

    signature: bytes4 = b"head"
    checksum: u32 = 0
    sequence_number: u64
    file_write_guid: bytes16
    data_write_guid: bytes16
    log_guid: bytes16 = NO_GUID  # other than zero: the log may hold what is not where it belongs yet
    log_version: u16 = 0
    version: u16 = 1
    log_length: u32
    log_offset: u64


class RegionTable(Struct):
    """What a region table begins with."""

    ORDER = "<"

    signature: bytes4 = b"regi"
    checksum: u32 = 0
    entry_count: u32
    reserved: u32 = 0


class RegionEntry(Struct):
    """A region."""

    ORDER = "<"

    guid: bytes16
    file_offset: u64
    length: u32
    required: u32


class MetadataTable(Struct):
    """What the metadata region begins with."""

    ORDER = "<"

    signature: bytes8 = b"metadata"
    reserved: u16 = 0
    entry_count: u16
    reserved2: bytes4 = bytes(4)
    reserved3: bytes16 = NO_GUID


class MetadataEntry(Struct):
    """An item; its offset counts from the beginning of the region."""

    ORDER = "<"

    item_id: bytes16
    offset: u32
    length: u32
    flags: u32
    reserved: u32 = 0


class FileParameters(Struct):
    """The item of that name."""

    ORDER = "<"

    block_size: u32
    flags: u32


def refused(file: Node, why: str, number: int = EINVAL) -> Error:
    """The error for an image that is not as it should be; `why` is the hint."""
    return errors.refused(file.filename, "vhdx: " + why, number)


def new_guid() -> bytes:
    """A random GUID."""
    raw = bytearray(os.urandom(16))
    raw[7] = raw[7] & 0x0F | 0x40  # version 4, in Microsoft's byte order
    raw[8] = raw[8] & 0x3F | 0x80
    return bytes(raw)


def with_checksum(raw: bytes | bytearray) -> bytes:
    """A structure with its CRC-32C, which is counted as zero, at byte 4."""
    copy = bytearray(raw)
    copy[4:8] = bytes(4)
    copy[4:8] = crc32c(copy).to_bytes(4, "little")
    return bytes(copy)


def is_sound(raw: bytes | bytearray) -> bool:
    """Whether a structure's CRC-32C, at byte 4, is right."""
    copy = bytearray(raw)
    copy[4:8] = bytes(4)
    return crc32c(copy) == int.from_bytes(raw[4:8], "little")


def read_inside(file: Node, offset: int, length: int) -> bytes:
    """What is there of `length` bytes at `offset`; what lies behind the end of the file is zero."""
    inside = max(0, min(length, file.size - offset))
    return (file.pread(offset, inside) if inside else b"").ljust(length, b"\0")


# -- headers ---------------------------------------------------------------------------------------------------------


class Headers:
    """Both headers; `current` is the one that counts, and `update` writes the other one."""

    __slots__ = ("file", "current", "_slot")

    def __init__(self, file: Node) -> None:
        """Raises Corrupt where there is no valid one, or where both claim to be the newer one."""
        self.file = file
        found: list[tuple[int, bytes, int, Header]] = []
        for slot, offset in enumerate(HEADERS):
            raw = read_inside(file, offset, HEADER_SIZE)
            header = Header.unpack(raw)
            if header.signature == b"head" and header.version == 1 and is_sound(raw):
                found.append((header.sequence_number, raw, slot, header))
        if not found or len(found) == 2 and found[0][0] == found[1][0] and found[0][1] != found[1][1]:
            raise Corrupt("No valid VHDX header found", errno=EINVAL)
        _number, _raw, self._slot, self.current = max(found, key=_sequence)
        header = self.current
        if header.log_version:
            raise refused(file, "the log has version %d" % header.log_version)
        if header.log_offset < START or header.log_offset % M:
            raise refused(file, "the log is at %#x" % header.log_offset)

    def update(self, **values: object) -> None:
        """Write a header with some fields changed over the older one; it waits for a flush. The sequence number goes up."""
        if self.current.sequence_number == MAX_SEQUENCE:
            raise Corrupt("%s: no header can be newer than number %d" % (self.file.filename, MAX_SEQUENCE), filename=self.file.filename, errno=EINVAL)
        fields = {name: getattr(self.current, name) for name in Header.FIELDS}
        fields.update(values, sequence_number=self.current.sequence_number + 1)
        header = Header(**fields)
        self.file.write_hosted(HEADERS[1 - self._slot], memoryview(pack_header(header)))
        self.current, self._slot = header, 1 - self._slot


def pack_header(header: Header) -> bytes:
    """A header as it is in the file."""
    return with_checksum(header.pack().ljust(HEADER_SIZE, b"\0"))


def _sequence(found: tuple[int, bytes, int, Header]) -> int:
    return found[0]


# -- regions ---------------------------------------------------------------------------------------------------------


class Regions:
    """Parts of the file that no block may lie in: [start, end), ascending. None overlaps another."""

    __slots__ = ("_starts", "_ends")

    def __init__(self) -> None:
        self._starts = [0]
        self._ends = [START]

    @property
    def end(self) -> int:
        """The end of the last one."""
        return self._ends[-1]

    def conflict(self, start: int, end: int) -> str:
        """In QEMU's words what a range overlaps; empty where it overlaps nothing."""
        at = bisect_left(self._starts, end) - 1  # the last that begins before the end; those before it end earlier
        if start >= end or at < 0 or self._ends[at] <= start:
            return ""
        return "VHDX region %d-%d overlaps with region %d-%d" % (start, end, self._starts[at], self._ends[at])

    def add(self, file: Node, start: int, length: int) -> None:
        """Raises Corrupt where it overlaps another one."""
        words = self.conflict(start, start + length)
        if words:
            raise refused(file, words)
        if length:
            at = bisect_left(self._starts, start)
            self._starts.insert(at, start)
            self._ends.insert(at, start + length)


class Layout:
    """All that is said about the disk outside of its BAT. Offsets in bytes of the file."""

    __slots__ = (
        "regions",
        "bat_offset",
        "bat_length",
        "metadata_offset",
        "metadata_length",
        "block_size",
        "has_parent",
        "size",
        "parent_locator",
        "ratio",
        "blocks",
        "entries",
    )

    def __init__(self, file: Node, header: Header) -> None:
        """Read it. Raises Corrupt or Unsupported."""
        self.regions = Regions()
        self.regions.add(file, header.log_offset, header.log_length)
        self._read_regions(file)
        self._read_metadata(file)
        self.ratio = CHUNK_SECTORS * SECTOR // self.block_size
        self.blocks = -(-self.size // self.block_size)
        self.entries = bat_entries(self.blocks, self.ratio, self.has_parent)
        if self.entries * 8 > self.bat_length:
            raise refused(file, "the BAT of %d bytes is too short for %d entries" % (self.bat_length, self.entries))

    def _read_regions(self, file: Node) -> None:
        table, raw = _region_table(file)
        if table.entry_count > MAX_ENTRIES:
            raise refused(file, "the region table claims %d entries" % table.entry_count)
        found: dict[bytes, tuple[int, int]] = {}
        for index in range(table.entry_count):
            entry = RegionEntry.unpack(raw, RegionTable.SIZE + index * RegionEntry.SIZE)
            if entry.file_offset > MAX_FILE:
                raise refused(file, "a region is at %#x" % entry.file_offset)
            self.regions.add(file, entry.file_offset, entry.length)
            if entry.guid in found:
                raise refused(file, "a region is there twice")
            if entry.guid in (BAT, METADATA):
                found[entry.guid] = entry.file_offset, entry.length
            elif entry.required & REQUIRED:
                raise refused(file, "a region that is required is unknown", ENOTSUP)
        for guid, name in ((BAT, "BAT"), (METADATA, "metadata")):
            offset, length = found.get(guid, (0, 0))
            if not length or offset % HEADER_SIZE:
                raise refused(file, "there is no %s region" % name)
            if offset + length > file.size:
                raise refused(file, "the %s region ends at %#x, behind the end of the file" % (name, offset + length))
        self.bat_offset, self.bat_length = found[BAT]
        self.metadata_offset, self.metadata_length = found[METADATA]

    def _read_metadata(self, file: Node) -> None:
        raw = read_inside(file, self.metadata_offset, METADATA_TABLE_SIZE)
        table = MetadataTable.unpack(raw)
        if table.signature != b"metadata" or table.entry_count > MAX_ENTRIES:
            raise refused(file, "the metadata table is damaged")
        items: dict[bytes, MetadataEntry] = {}
        for index in range(table.entry_count):
            entry = MetadataEntry.unpack(raw, MetadataTable.SIZE + index * MetadataEntry.SIZE)
            if entry.item_id in ITEMS or entry.item_id == PARENT_LOCATOR:
                items[entry.item_id] = entry
            elif entry.flags & ITEM_REQUIRED:
                raise refused(file, "a metadata item that is required is unknown", ENOTSUP)
        if not all(item in items for item in ITEMS):
            raise refused(file, "a metadata item is missing", ENOTSUP)
        parameters = FileParameters.unpack(self._item(file, items[FILE_PARAMETERS], FileParameters.SIZE))
        size = parameters.block_size
        if not MIN_BLOCK <= size <= MAX_BLOCK or size & (size - 1):
            raise refused(file, "a block size of %d" % size)
        self.block_size = size
        self.has_parent = bool(parameters.flags & HAS_PARENT)
        length = int.from_bytes(self._item(file, items[VIRTUAL_DISK_SIZE], 8), "little")
        if length > MAX_SIZE:
            raise refused(file, "a disk of %d bytes" % length)
        self.size = length
        sector = int.from_bytes(self._item(file, items[LOGICAL_SECTOR_SIZE], 4, ENOTSUP), "little")
        if sector != SECTOR:
            raise refused(file, "sectors of %d bytes" % sector, ENOTSUP)
        self.parent_locator: Optional[bytes] = None
        if self.has_parent:
            self.parent_locator = self._parent_locator(file, items.get(PARENT_LOCATOR))

    def _parent_locator(self, file: Node, entry: Optional[MetadataEntry]) -> bytes:
        if entry is None:
            raise refused(file, "it has a parent, but does not say where")
        if entry.length > METADATA_TABLE_SIZE:
            raise refused(file, "a parent locator of %d bytes" % entry.length)
        return self._item(file, entry, entry.length)

    def _item(self, file: Node, entry: MetadataEntry, length: int, number: int = EINVAL) -> bytes:
        """The first `length` bytes of an item."""
        if entry.offset < METADATA_TABLE_SIZE or entry.offset + length > self.metadata_length:
            raise refused(file, "a metadata item is at %#x" % entry.offset, number)
        return read_inside(file, self.metadata_offset + entry.offset, length)


def bat_entries(blocks: int, ratio: int, has_parent: bool = False) -> int:
    """How many entries a BAT needs: those of the blocks, and after every `ratio` of them that of a block of the sector bitmap.

    For a disk of no bytes as many as QEMU asks for, whose count of sector bitmaps wraps around.
    """
    if has_parent:
        return -(-blocks // ratio) * (ratio + 1)
    return blocks + ((blocks - 1) & 0xFFFFFFFF) // ratio


def _region_table(file: Node) -> tuple[RegionTable, bytes]:
    """The first of the two region tables that is sound."""
    for offset in REGION_TABLES:
        raw = read_inside(file, offset, REGION_TABLE_SIZE)
        table = RegionTable.unpack(raw)
        if table.signature == b"regi" and is_sound(raw):
            return table, raw
    raise refused(file, "both region tables are damaged")
