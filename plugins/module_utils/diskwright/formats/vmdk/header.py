# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The headers of sparse extents (VMware's "Virtual Disk Format 5.0": Hosted Sparse Extents, ESXi Host Sparse Extents, Stream-Optimized)."""

from __future__ import annotations

from ...cache import read_padded
from ...errors import Corrupt, ReadOnly, Unsupported, WrongFormat
from ...ondisk import Struct, bytes4, u8, u16, u32, u64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

    from ...node import Node

    bytes433 = bytes
    bytes496 = bytes

SECTOR = 512
MAGIC = b"KDMV"
COWD_MAGIC = b"COWD"

VALID_NEWLINES = 1
REDUNDANT = 2  # there is a second grain directory, with tables of its own
ZERO_GRAINS = 4  # a grain table entry of 1 is a grain of zeroes
COMPRESSED = 0x10000
MARKERS = 0x20000
DEFLATE = 1
GD_AT_END = 0xFFFFFFFFFFFFFFFF  # gdOffset of a stream: the footer has the real one

MARKER_EOS, MARKER_GT, MARKER_GD, MARKER_FOOTER = range(4)

MAX_GRAIN_SECTORS = 0x200000  # 1 GiB
MAX_COMPRESSED_GRAIN = 8 << 20  # bytes; of a compressed extent, whose grains are held in memory as a whole
MAX_DIRECTORY = 32 << 20  # entries
MAX_TABLE_ENTRIES = 512
COWD_TABLE_ENTRIES = 4096
FOOTER_SIZE = 3 * SECTOR  # marker, header again, end-of-stream marker

EINVAL, ENOTSUP, EFBIG, EACCES = 22, 95, 27, 13


class SparseHeader(Struct):
    """SparseExtentHeader of a hosted sparse extent; offsets and sizes in sectors."""

    ORDER = "<"
    magicNumber: bytes4 = MAGIC
    version: u32 = 1
    flags: u32
    capacity: u64
    grainSize: u64
    descriptorOffset: u64 = 0
    descriptorSize: u64 = 0
    numGTEsPerGT: u32 = MAX_TABLE_ENTRIES
    rgdOffset: u64 = 0
    gdOffset: u64
    overHead: u64
    uncleanShutdown: u8 = 0
    singleEndLineChar: u8 = 0x0A
    nonEndLineChar: u8 = 0x20
    doubleEndLineChar1: u8 = 0x0D
    doubleEndLineChar2: u8 = 0x0A
    compressAlgorithm: u16 = 0
    pad: bytes433 = bytes(433)


class CowdHeader(Struct):
    """COWDisk_Header, as far as it says where things are; in sectors."""

    ORDER = "<"
    magicNumber: bytes4
    version: u32
    flags: u32
    numSectors: u32
    grainSize: u32
    gdOffset: u32
    numGDEntries: u32
    freeSector: u32


class SeSparseHeader(Struct):
    """The constant header of a space-efficient sparse extent; in sectors."""

    ORDER = "<"
    magic: u64
    version: u64
    capacity: u64
    grain_size: u64
    grain_table_size: u64
    flags: u64
    reserved1: u64
    reserved2: u64
    reserved3: u64
    reserved4: u64
    volatile_header_offset: u64
    volatile_header_size: u64
    journal_header_offset: u64
    journal_header_size: u64
    journal_offset: u64
    journal_size: u64
    grain_dir_offset: u64
    grain_dir_size: u64
    grain_tables_offset: u64
    grain_tables_size: u64
    free_bitmap_offset: u64
    free_bitmap_size: u64
    backmap_offset: u64
    backmap_size: u64
    grains_offset: u64
    grains_size: u64


class SeSparseVolatile(Struct):
    """The volatile header: whether the journal must be replayed."""

    ORDER = "<"
    magic: u64
    free_gt_number: u64
    next_txn_seq_number: u64
    replay_journal: u64


class Marker(Struct):
    """What precedes a grain or a piece of metadata in a stream; `size` 0 is metadata of the kind `type`."""

    ORDER = "<"
    val: u64
    size: u32
    type: u32
    pad: bytes496 = bytes(496)


class Layout:
    """Where a sparse extent has what; everything in bytes but for the numbers of entries.

    `width` is that of a table entry, `gtes` the number of entries of a table, `entries` that of the directory.
    `backup` is the offset of the redundant directory, 0 for none.
    """

    def __init__(self, **values: Any) -> None:
        self.capacity: int = values["capacity"]
        self.grain: int = values["grain"]
        self.gtes: int = values["gtes"]
        self.directory: int = values["directory"]
        self.backup: int = values.get("backup", 0)
        self.width: int = values.get("width", 4)
        self.zero_grains: bool = values.get("zero_grains", False)
        self.compressed: bool = values.get("compressed", False)
        self.markers: bool = values.get("markers", False)
        self.descriptor: tuple[int, int] = values.get("descriptor", (0, 0))
        self.tables: int = values.get("tables", 0)  # seSparse: where table 0 is
        self.grains: int = values.get("grains", 0)  # seSparse: where grain 0 is
        self.read_only: str = values.get("read_only", "")  # why it cannot be written
        self.entries = -(-self.capacity // (self.grain * self.gtes)) if self.grain * self.gtes else 0
        if self.entries > MAX_DIRECTORY:
            raise Corrupt("L1 size too big", errno=EFBIG)

    @property
    def table_size(self) -> int:
        """Bytes of a grain table."""
        return self.gtes * self.width


def read_record(file: Node, offset: int, size: int) -> bytes:
    """`size` bytes of metadata; what is beyond the end of the file is zero."""
    buffer = bytearray(size)
    read_padded(file, offset, memoryview(buffer))
    return bytes(buffer)


def read_layout(file: Node, writable: bool) -> Layout:
    """The layout of the sparse extent in `file`. Raises WrongFormat, Corrupt, Unsupported, ReadOnly in QEMU's words."""
    magic = read_record(file, 0, 4)
    if magic == MAGIC:
        return _hosted(file, writable)
    if magic == COWD_MAGIC:
        return _cowd(file)
    raise WrongFormat("Image not in VMDK format", errno=EINVAL)


def _hosted(file: Node, writable: bool) -> Layout:
    raw = read_record(file, 0, SparseHeader.SIZE)
    if file.size < SparseHeader.SIZE - len(SparseHeader.pad):
        raise Corrupt("Could not read header from file '%s'" % file.filename, errno=EINVAL)
    header = SparseHeader.unpack(raw)
    if header.gdOffset == GD_AT_END:
        header = _footer(file)
    compressed = header.compressAlgorithm == DEFLATE
    if header.version > 3:
        raise Unsupported("Unsupported VMDK version %d" % header.version, errno=ENOTSUP)
    if header.version == 3 and writable and not compressed:
        raise ReadOnly("VMDK version 3 must be read only", errno=EINVAL)
    if header.numGTEsPerGT > MAX_TABLE_ENTRIES:
        raise Corrupt("L2 table size too big", errno=EINVAL)
    if not header.numGTEsPerGT or not header.grainSize:
        raise Corrupt("L1 entry size is invalid", errno=EINVAL)
    if file.size < header.overHead * SECTOR:
        raise Corrupt("File truncated, expecting at least %d bytes" % signed(header.overHead * SECTOR), errno=EINVAL)
    limit = MAX_COMPRESSED_GRAIN // SECTOR if compressed else MAX_GRAIN_SECTORS
    _check_grain(header.grainSize, limit)
    redundant = bool(header.flags & REDUNDANT)
    layout = Layout(
        capacity=_capacity(header.capacity),
        grain=header.grainSize * SECTOR,
        gtes=header.numGTEsPerGT,
        directory=header.gdOffset * SECTOR,
        backup=header.rgdOffset * SECTOR if redundant else 0,
        zero_grains=bool(header.flags & ZERO_GRAINS),
        compressed=compressed,
        markers=bool(header.flags & MARKERS),
        descriptor=(header.descriptorOffset * SECTOR, header.descriptorSize * SECTOR),
    )
    if writable:
        for place in (layout.directory, layout.backup) if redundant else (layout.directory,):
            if place < SECTOR or place + layout.entries * 4 > file.size:
                raise Corrupt("The grain directory is not inside the file", errno=EINVAL)
    return layout


def signed(value: int) -> int:
    """A number of 64 bits as QEMU prints it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _check_grain(sectors: int, limit: int) -> None:
    if sectors > limit:
        raise Corrupt("Invalid granularity, image may be corrupt", errno=EFBIG)


def _capacity(sectors: int) -> int:
    """A disk size in bytes. Raises Corrupt for one that no disk has."""
    if sectors > ((1 << 63) - SECTOR) // SECTOR:
        raise Corrupt("Could not refresh total sector count: File too large", errno=EFBIG)
    return sectors * SECTOR


def _footer(file: Node) -> SparseHeader:
    """The header at the end of a stream, the only one that knows where the grain directory is."""
    start = file.size // SECTOR * SECTOR - FOOTER_SIZE
    wrong = Corrupt("Invalid footer", errno=EINVAL)
    if start < 0:
        raise wrong
    raw = read_record(file, start, FOOTER_SIZE)
    marker, end = Marker.unpack(raw), Marker.unpack(raw, 2 * SECTOR)
    if marker.size or marker.type != MARKER_FOOTER or end.val or end.size or end.type != MARKER_EOS:
        raise wrong
    header = SparseHeader.unpack(raw, SECTOR)
    if header.magicNumber != MAGIC or header.gdOffset == GD_AT_END:
        raise wrong
    return header


def _cowd(file: Node) -> Layout:
    header = CowdHeader.unpack(read_record(file, 0, CowdHeader.SIZE))
    if not header.grainSize:
        raise Corrupt("L1 entry size is invalid", errno=EINVAL)
    _check_grain(header.grainSize, MAX_GRAIN_SECTORS)
    return Layout(
        capacity=header.numSectors * SECTOR,
        grain=header.grainSize * SECTOR,
        gtes=COWD_TABLE_ENTRIES,
        directory=header.gdOffset * SECTOR,
        read_only="COWD extents are read only",
    )


SESPARSE_MAGIC, SESPARSE_VOLATILE_MAGIC = 0xCAFEBABE, 0xCAFECAFE
SESPARSE_VERSION = 0x0000000200000001
SESPARSE_GRAIN, SESPARSE_TABLE = 8, 64  # sectors; no others exist


def read_sesparse(file: Node) -> Layout:
    """The layout of the space-efficient sparse extent in `file`, which is read-only."""
    header = SeSparseHeader.unpack(read_record(file, 0, SeSparseHeader.SIZE))
    if header.magic != SESPARSE_MAGIC:
        raise Corrupt("Bad const header magic: 0x%016x" % header.magic, errno=ENOTSUP)
    if header.version != SESPARSE_VERSION:
        raise Unsupported("Unsupported version: 0x%016x" % header.version, errno=ENOTSUP)
    if header.grain_size != SESPARSE_GRAIN:
        raise Unsupported("Unsupported grain size: %d" % header.grain_size, errno=ENOTSUP)
    if header.grain_table_size != SESPARSE_TABLE:
        raise Unsupported("Unsupported grain table size: %d" % header.grain_table_size, errno=ENOTSUP)
    if header.flags:
        raise Unsupported("Unsupported flags: 0x%016x" % header.flags, errno=ENOTSUP)
    if any((header.reserved1, header.reserved2, header.reserved3, header.reserved4)):
        raise Unsupported("Unsupported reserved bits: 0x%016x" % header.reserved1, errno=ENOTSUP)
    changing = SeSparseVolatile.unpack(read_record(file, _place(header.volatile_header_offset), SeSparseVolatile.SIZE))
    if changing.magic != SESPARSE_VOLATILE_MAGIC:
        raise Corrupt("Bad volatile header magic: 0x%016x" % changing.magic, errno=ENOTSUP)
    if changing.replay_journal:
        raise Unsupported("Image is marked dirty, Replaying journal not supported", errno=ENOTSUP)
    layout = Layout(
        capacity=_capacity(header.capacity),
        grain=SESPARSE_GRAIN * SECTOR,
        gtes=SESPARSE_TABLE * SECTOR // 8,
        width=8,
        directory=_place(header.grain_dir_offset),
        tables=_place(header.grain_tables_offset),
        grains=_place(header.grains_offset),
        read_only="No write support for seSparse images available",
    )
    if _place(header.grain_dir_size) < layout.entries * 8:
        raise Corrupt("The grain directory is too small for the disk", errno=EINVAL)
    return layout


def _place(sectors: int) -> int:
    """A number of sectors of a header, in bytes. Raises Corrupt where no file is so long."""
    if sectors >> 54:
        raise Corrupt("%#x sectors are more than any file has" % sectors, errno=EINVAL)
    return sectors * SECTOR


def embedded_descriptor(file: Node, limit: int) -> Optional[bytes]:
    """The descriptor inside a hosted sparse extent, at most `limit` bytes; None where there is none."""
    raw = read_record(file, 0, SparseHeader.SIZE)
    if raw[:4] != MAGIC:
        return None
    header = SparseHeader.unpack(raw)
    if not header.descriptorOffset or header.descriptorOffset >> 54:
        return None
    return read_record(file, header.descriptorOffset * SECTOR, min(max(header.descriptorSize, 1) * SECTOR, limit))
