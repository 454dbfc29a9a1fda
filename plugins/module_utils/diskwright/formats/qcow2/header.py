# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The qcow2 header: records, feature bits, extensions, limits (https://www.qemu.org/docs/master/interop/qcow2.html#header).

The layout of an image, in clusters (1 << cluster_bits bytes), and the bits of its tables:

    header      cluster 0: the record, the extensions, the backing file's name
    refcounts   table of u64 block offsets (bits 9..63), contiguous; a block is one cluster of 1 << refcount_order bits each
    L1          table of u64: L2 table offset in bits 9..55, COPIED in bit 63; contiguous
    L2          one cluster of u64 (or pairs of u64 with extended L2 entries): OFFSET_MASK, ZERO bit 0, COMPRESSED bit 62, COPIED bit 63
    snapshots   a contiguous table of records of variable length, each naming an L1 table
"""

from __future__ import annotations

import os

from ...errors import Corrupt, Error, Unsupported, WrongFormat
from ...ondisk import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...node import Node
    from ...ondisk import u32, u64

MAGIC = 0x514649FB
MAGIC_BYTES = b"QFI\xfb"

# Limits that every stored number passes before it is used.
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_REFCOUNT_ORDER = 6
MAX_L1_SIZE = 32 << 20  # bytes
MAX_REFCOUNT_TABLE_SIZE = 8 << 20  # bytes
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_SIZE = 64 << 20  # bytes
MAX_SNAPSHOT_EXTRA = 1024  # bytes
MAX_BACKING_NAME = 1023  # bytes
MAX_BACKING_FORMAT = 15  # bytes
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_SIZE = 1024 * MAX_BITMAPS  # bytes
MAX_HOST_OFFSET = 1 << 56  # bytes; table entries hold no larger offset
MAX_OFFSET = (1 << 63) - 1

# Incompatible features.
DIRTY = 1 << 0
CORRUPT = 1 << 1
DATA_FILE = 1 << 2
COMPRESSION_TYPE = 1 << 3
EXTENDED_L2 = 1 << 4
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2
# Compatible features.
LAZY_REFCOUNTS = 1 << 0
# Autoclear features.
BITMAPS = 1 << 0
RAW_DATA_FILE = 1 << 1
KNOWN_AUTOCLEAR = BITMAPS | RAW_DATA_FILE

# (type of feature, bit, name): what the feature name table of a new image says.
FEATURE_NAMES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)
_FEATURE_ENTRY = 48  # bytes

# Header extensions.
EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_ENCRYPTION = 0x0537BE77
EXT_DATA_FILE = 0x44415441
EXT_ORDER = (EXT_BACKING_FORMAT, EXT_DATA_FILE, EXT_ENCRYPTION, EXT_FEATURE_NAMES, EXT_BITMAPS)

# Encryption methods.
CRYPT_NONE = 0
CRYPT_AES = 1
CRYPT_LUKS = 2

# Compression types.
ZLIB = 0
ZSTD = 1
COMPRESSION_NAMES = ("zlib", "zstd")

# Bits of L1 and L2 entries.
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FFFFFFFFFFFE00
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
REFCOUNT_TABLE_MASK = 0xFFFFFFFFFFFFFE00
REFCOUNT_TABLE_RESERVED = 0x1FF

SUBCLUSTERS = 32  # of a cluster, with extended L2 entries


class HeaderV2(Struct):
    """The header of version 2: 72 bytes at offset 0."""

    magic: u32 = MAGIC
    version: u32 = 2
    backing_file_offset: u64 = 0
    backing_file_size: u32 = 0
    cluster_bits: u32 = 16
    size: u64
    crypt_method: u32 = CRYPT_NONE
    l1_size: u32 = 0
    l1_table_offset: u64 = 0
    refcount_table_offset: u64 = 0
    refcount_table_clusters: u32 = 0
    nb_snapshots: u32 = 0
    snapshots_offset: u64 = 0


class HeaderV3(HeaderV2):
    """The first 104 bytes of a header of version 3; for version 2 the added fields have the values it implies."""

    incompatible_features: u64 = 0
    compatible_features: u64 = 0
    autoclear_features: u64 = 0
    refcount_order: u32 = 4
    header_length: u32 = 112


class ExtensionHeader(Struct):
    """What is in front of an extension's data."""

    type: u32
    length: u32


class BitmapsExtension(Struct):
    """Data of the extension EXT_BITMAPS."""

    nb_bitmaps: u32
    reserved32: u32 = 0
    bitmap_directory_size: u64
    bitmap_directory_offset: u64


class EncryptionExtension(Struct):
    """Data of the extension EXT_ENCRYPTION."""

    offset: u64
    length: u64


class Header(HeaderV3):
    """A whole header: the record, `additional` (the fields from byte 104 to header_length, as stored), `extensions`
    (type, data) in their order and without the end mark, and `backing_file` as stored, None for none."""

    if TYPE_CHECKING:  # not fields of the record
        additional: bytes = b""
        extensions: list[tuple[int, bytes]] = []
        backing_file: Optional[bytes] = None

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible_features & EXTENDED_L2)

    @property
    def l2_entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.incompatible_features & EXTENDED_L2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // self.l2_entry_size

    @property
    def compression_type(self) -> int:
        return self.additional[0] if self.additional else ZLIB

    def extension(self, type: int) -> Optional[bytes]:
        """The data of an extension; None where the image has none of that type."""
        for found, data in self.extensions:
            if found == type:
                return data
        return None

    def set_extension(self, type: int, data: Optional[bytes]) -> None:
        """Replace an extension in its place, add it where QEMU would have it, or (None) remove it."""
        for index, (found, _old) in enumerate(self.extensions):
            if found == type:
                self.extensions[index : index + 1] = [] if data is None else [(type, data)]
                return
        if data is not None:
            first = EXT_ORDER[: EXT_ORDER.index(type)]
            at = max([index + 1 for index, (found, _old) in enumerate(self.extensions) if found in first], default=0)
            self.extensions.insert(at, (type, data))

    def pack_record(self) -> bytes:
        """The record alone, header_length bytes (72 for version 2): what an update of numbers rewrites."""
        record = self._layout.pack(*[getattr(self, name) for name in self.FIELDS])
        return record[: HeaderV2.SIZE] if self.version == 2 else record + self.additional

    def pack(self) -> bytes:
        """Record, extensions and backing file name; sets backing_file_offset and backing_file_size.

        Raises Error where all that does not fit into the first cluster.
        """
        area = b"".join(pack_extension(type, data) for type, data in self.extensions) + bytes(ExtensionHeader.SIZE)
        self.backing_file_offset = self.backing_file_size = 0
        if self.backing_file is not None:
            self.backing_file_offset = len(self.pack_record()) + len(area)
            self.backing_file_size = len(self.backing_file)
        data = self.pack_record() + area + (self.backing_file or b"")
        if len(data) > self.cluster_size:
            raise Error("Backing file name too long" if self.backing_file else "qcow2 header exceeds cluster size", errno=28)
        return data


def new_header(size: int, cluster_bits: int, version: int = 3) -> Header:
    """The header of an image to be made, without tables and extensions."""
    header = Header(size=size, cluster_bits=cluster_bits, version=version, header_length=112 if version >= 3 else HeaderV2.SIZE)
    header.additional = bytes(8) if version >= 3 else b""
    header.extensions = []
    header.backing_file = None
    return header


def pack_extension(type: int, data: bytes) -> bytes:
    """An extension with its header, padded to a multiple of 8 bytes."""
    return ExtensionHeader(type=type, length=len(data)).pack() + data + bytes(-len(data) % 8)


def feature_name_table() -> bytes:
    """The data of the extension EXT_FEATURE_NAMES of a new image."""
    return b"".join(bytes((kind, bit)) + name.ljust(_FEATURE_ENTRY - 2, b"\0") for kind, bit, name in FEATURE_NAMES)


def unknown_feature_names(features: int, table: bytes) -> str:
    """The incompatible features in the mask `features` as QEMU lists them: by name where `table` has one."""
    names = []
    for start in range(0, len(table) - _FEATURE_ENTRY + 1, _FEATURE_ENTRY):
        kind, bit = table[start], table[start + 1]
        if kind == 0 and bit < 64 and features >> bit & 1:
            names.append(table[start + 2 : start + _FEATURE_ENTRY].split(b"\0")[0].decode("utf-8", "surrogateescape"))
            features &= ~(1 << bit)
    if features:
        names.append("Unknown incompatible feature: %x" % features)
    return ", ".join(names)


def read_header(file: Node, check: bool = False) -> Header:
    """Read and verify the header of the image in `file`; a `check` looks for refcounts and snapshots itself.

    Raises WrongFormat, Corrupt or Unsupported in QEMU's words.
    """
    head = file.pread(0, min(4096, file.size))
    header = _read_record(head)
    cluster_size = header.cluster_size
    if len(head) < cluster_size and header.backing_file_offset or header.header_length + 8 > len(head):
        head += file.pread(len(head), max(0, min(cluster_size, file.size) - len(head)))
    end = header.backing_file_offset or cluster_size
    header.additional = head[HeaderV3.SIZE : header.header_length].ljust(max(0, header.header_length - HeaderV3.SIZE), b"\0")
    _check_compression(header)
    unknown = header.incompatible_features & ~KNOWN_INCOMPATIBLE
    if unknown:
        try:
            _read_extensions(file, header, head, end)
        except Error:
            pass  # what counts is the feature that we do not know
        names = unknown_feature_names(unknown, header.extension(EXT_FEATURE_NAMES) or b"")
        raise Unsupported("Unsupported qcow2 feature(s): %s" % names, errno=95)
    _check_numbers(header, check)
    head = _read_extensions(file, header, head, end)
    if header.crypt_method == CRYPT_LUKS and header.extension(EXT_ENCRYPTION) is None:
        raise Corrupt("Missing CRYPTO header for crypt method 2", errno=22)
    if header.backing_file_offset:
        if header.backing_file_size > min(MAX_BACKING_NAME, cluster_size - header.backing_file_offset):
            raise Corrupt("Backing file name too long", errno=22)
        name = head[header.backing_file_offset : header.backing_file_offset + header.backing_file_size]
        header.backing_file = name.split(b"\0")[0] or None
    return header


def _read_record(head: bytes) -> Header:
    """The fixed fields, with the checks that what follows depends on."""
    if head[:4] != MAGIC_BYTES:
        raise WrongFormat("Image is not in qcow2 format", errno=22)
    head = head.ljust(HeaderV3.SIZE, b"\0")  # as for QEMU, what lies beyond the end of the file is zero
    version = int.from_bytes(head[4:8], "big")
    if version not in (2, 3):
        raise Unsupported("Unsupported qcow2 version %d" % version, errno=95)
    cluster_bits = int.from_bytes(head[20:24], "big")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise Unsupported("Unsupported cluster size: 2^%d" % cluster_bits, errno=22)
    if version == 2:
        implied = (0).to_bytes(24, "big") + (4).to_bytes(4, "big") + HeaderV2.SIZE.to_bytes(4, "big")
        header = Header.unpack(head[: HeaderV2.SIZE] + implied)
    else:
        if int.from_bytes(head[100:104], "big") < HeaderV3.SIZE:
            raise Corrupt("qcow2 header too short", errno=22)
        header = Header.unpack(head)
        if header.header_length > header.cluster_size:
            raise Corrupt("qcow2 header exceeds cluster size", errno=22)
    if header.backing_file_offset > header.cluster_size:
        raise Corrupt("Invalid backing file offset", errno=22)
    header.extensions = []
    header.backing_file = None
    return header


def _read_extensions(file: Node, header: Header, head: bytes, end: int) -> bytes:
    """Fill header.extensions from the area that ends at `end`; returns `head`, grown by what had to be read."""
    position = header.header_length
    while position < end:
        if len(head) < position + ExtensionHeader.SIZE:
            head += _read_on(file, head, position + ExtensionHeader.SIZE)
        extension = ExtensionHeader.unpack(head.ljust(position + ExtensionHeader.SIZE, b"\0"), position)
        position += ExtensionHeader.SIZE
        if extension.length > end - position:
            raise Corrupt("Header extension too large", errno=22)
        if extension.type == EXT_END:
            break
        if len(head) < position + extension.length:
            head += _read_on(file, head, position + extension.length)
        data = head[position : position + extension.length].ljust(extension.length, b"\0")
        _check_extension(header, extension.type, data)
        header.extensions.append((extension.type, data))
        position += extension.length + 7 & ~7
    return head


def _read_on(file: Node, head: bytes, end: int) -> bytes:
    end = max(end, len(head) + (64 << 10))  # an area of many small extensions must not take many small reads
    return file.pread(len(head), max(0, min(end, file.size) - len(head)))


def _check_extension(header: Header, type: int, data: bytes) -> None:
    if type == EXT_BACKING_FORMAT and len(data) > MAX_BACKING_FORMAT:
        raise Corrupt("ERROR: ext_backing_format: len=%d too large (>=%d)" % (len(data), MAX_BACKING_FORMAT + 1), errno=22)
    if type == EXT_ENCRYPTION:
        if header.crypt_method != CRYPT_LUKS:
            raise Corrupt("CRYPTO header extension only expected with LUKS encryption method", errno=22)
        if len(data) != EncryptionExtension.SIZE:
            raise Corrupt("CRYPTO header extension size %d, but expected size %d" % (len(data), EncryptionExtension.SIZE), errno=22)
        offset = EncryptionExtension.unpack(data).offset
        if offset % header.cluster_size:
            text = "Encryption header offset '%d' is not a multiple of cluster size '%d'"
            raise Corrupt(text % (offset, header.cluster_size), errno=22)
    if type == EXT_BITMAPS and header.autoclear_features & BITMAPS:
        _check_bitmaps(header, data)


def _check_bitmaps(header: Header, data: bytes) -> None:
    if len(data) != BitmapsExtension.SIZE:
        raise Corrupt("bitmaps_ext: Invalid extension length", errno=22)
    bitmaps = BitmapsExtension.unpack(data)
    if bitmaps.reserved32:
        raise Corrupt("bitmaps_ext: Reserved field is not zero", errno=22)
    if bitmaps.nb_bitmaps > MAX_BITMAPS:
        raise Corrupt(
            "bitmaps_ext: Image has %d bitmaps, exceeding the QEMU supported maximum of %d" % (bitmaps.nb_bitmaps, MAX_BITMAPS), errno=22
        )
    if not bitmaps.nb_bitmaps:
        raise Corrupt("found bitmaps extension with zero bitmaps", errno=22)
    if bitmaps.bitmap_directory_offset % header.cluster_size:
        raise Corrupt("bitmaps_ext: invalid bitmap directory offset", errno=22)
    if bitmaps.bitmap_directory_size > MAX_BITMAP_DIRECTORY_SIZE:
        raise Corrupt(
            "bitmaps_ext: bitmap directory size (%d) exceeds the maximum supported size (%d)"
            % (bitmaps.bitmap_directory_size, MAX_BITMAP_DIRECTORY_SIZE),
            errno=22,
        )


def _check_numbers(header: Header, check: bool) -> None:
    """Refuse numbers that are out of their limits, in QEMU's order and words."""
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        raise Corrupt("Reference count entry width too large; may not exceed 64 bits", errno=22)
    if header.extended_l2 and header.cluster_bits < 14:
        raise Corrupt("Unsupported subcluster size: %d" % (header.cluster_size // SUBCLUSTERS), errno=22)
    cluster_size = header.cluster_size
    _check_table(header, header.refcount_table_offset, header.refcount_table_clusters * cluster_size, MAX_REFCOUNT_TABLE_SIZE, "Reference count table")
    if not check:
        if not header.refcount_table_clusters:
            raise Corrupt("Image does not contain a reference count table", errno=22)
        least = 40  # bytes of an entry
        _check_table(header, header.snapshots_offset, header.nb_snapshots * least, MAX_SNAPSHOTS * least, "Snapshot table")
    _check_table(header, header.l1_table_offset, header.l1_size * 8, MAX_L1_SIZE, "Active L1 table")
    needed = l1_entries(header, header.size)
    if header.size >> 63 and needed * header.cluster_size * header.l2_entries >> 64:
        raise Corrupt("Could not refresh total sector count: File too large", errno=27)
    if needed > 0x7FFFFFFF:
        raise Corrupt("Image is too big", errno=27)
    if header.l1_size < needed:
        raise Corrupt("L1 table is too small", errno=22)
    if header.crypt_method > CRYPT_LUKS:
        raise Unsupported("Unsupported encryption method %d" % ((header.crypt_method ^ 1 << 31) - (1 << 31)), errno=22)


def _check_table(header: Header, offset: int, size: int, limit: int, name: str) -> None:
    if size > limit:
        raise Corrupt("%s too large" % name, errno=27)
    if offset % header.cluster_size or offset > MAX_OFFSET - size:
        raise Corrupt("%s offset invalid" % name, errno=22)


def _check_compression(header: Header) -> None:
    kind = header.compression_type
    if kind >= len(COMPRESSION_NAMES):
        raise Unsupported("qcow2: unknown compression type: %d" % kind, errno=95)
    if header.incompatible_features & COMPRESSION_TYPE:
        if kind == ZLIB:
            raise Corrupt("qcow2: Compression type incompatible feature bit must not be set", errno=22)
    elif kind != ZLIB:
        raise Corrupt("qcow2: Compression type incompatible feature bit must be set", errno=22)


def l1_entries(header: Header, size: int) -> int:
    """How many L1 entries `size` bytes of guest data need."""
    reach = header.cluster_size * header.l2_entries
    return -(-size // reach)


def name_text(name: Optional[bytes]) -> Optional[str]:
    """A stored name, up to its first NUL byte, as text that gives the same bytes back."""
    return None if name is None else os.fsdecode(name.split(b"\0")[0])
