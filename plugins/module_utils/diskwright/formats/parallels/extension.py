# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The format extension of a Parallels image: dirty bitmaps, which are read (https://www.qemu.org/docs/master/interop/parallels.html)."""

from __future__ import annotations

from array import array

from ...bitmaps import MAX_GRANULARITY, Bitmap, BitmapSet
from ...cache import read_padded
from ...errors import Corrupt, Error, Unsupported
from ...ondisk import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...ondisk import bytes16, u32, u64
    from .image import Parallels

SECTOR = 512
MAGIC = 0xAB234CEF23DCEA87
END, DIRTY_BITMAP = 0, 0x20385FAE252CB34A
MAX_EXTENSION = 16 << 20  # bytes; all of it is read and summed
MAX_OFFSET = (1 << 63) - 1
ALL_CLEAR, ALL_SET = 0, 1  # entries of a bitmap's table that are no places


class ExtensionHeader(Struct):
    """What the extension begins with; the checksum is that of all that follows."""

    ORDER = "<"

    magic: u64
    m_checksum: bytes16


class Feature(Struct):
    """What each feature begins with."""

    ORDER = "<"

    magic: u64
    flags: u64
    data_size: u32
    unused: u32


class DirtyBitmap(Struct):
    """What the data of a dirty bitmap begins with; its table follows."""

    ORDER = "<"

    size: u64
    id: bytes16
    granularity: u32
    l1_size: u32


def read_extension(image: Parallels) -> BitmapSet:
    """The bitmaps that the extension holds. Raises Corrupt or Unsupported in QEMU's words."""
    size = image.block_size
    if size > MAX_EXTENSION:
        raise Unsupported("the format extension is larger than %d bytes" % MAX_EXTENSION)
    raw = bytearray(size)
    read_padded(image.file, image.header.ext_off * SECTOR, memoryview(raw))
    if size < ExtensionHeader.SIZE + Feature.SIZE:
        raise Corrupt("the format extension needs more than a cluster of %d bytes" % size)
    header = ExtensionHeader.unpack(raw)
    if header.magic != MAGIC:
        raise Corrupt("Wrong parallels Format Extension magic: %#x, expected: %#x" % (header.magic, MAGIC))
    from hashlib import md5

    if md5(memoryview(raw)[ExtensionHeader.SIZE :], usedforsecurity=False).digest() != header.m_checksum:
        raise Corrupt("Wrong checksum in Format Extension header. Format extension is corrupted.")
    bitmaps = BitmapSet(image.size, size, size, _refuse)
    position = ExtensionHeader.SIZE
    while True:
        left = size - position
        if left < Feature.SIZE:
            text = "Can not read feature header, as remaining bytes (%d) in Format Extension is less than Feature header size (%d)"
            raise Corrupt(text % (left, Feature.SIZE))
        feature = Feature.unpack(raw, position)
        position += Feature.SIZE
        left -= Feature.SIZE
        if feature.flags:
            raise Unsupported("Flags for extension feature are unsupported")
        if feature.data_size > left:
            raise Corrupt("Feature data_size exceedes Format Extension cluster")
        if feature.magic == END:
            return bitmaps
        if feature.magic != DIRTY_BITMAP:
            raise Unsupported("Unknown feature: %#x" % feature.magic)
        bitmap = _read_bitmap(image, memoryview(raw)[position : position + feature.data_size])
        if any(other.name == bitmap.name for other in bitmaps):
            raise Corrupt("Bitmap already exists: %s" % bitmap.name)
        bitmaps.all.append(bitmap)
        position += -(-feature.data_size // 8) * 8


def _refuse(name: str, granularity: int, size: int) -> None:
    raise Error("Can't store persistent bitmaps")


def _read_bitmap(image: Parallels, data: memoryview) -> Bitmap:
    if len(data) < DirtyBitmap.SIZE:
        text = "Too small Bitmap Feature area in Parallels Format Extension: %d bytes, expected at least %d bytes"
        raise Corrupt(text % (len(data), DirtyBitmap.SIZE))
    header = DirtyBitmap.unpack(data)
    sectors = image.size // SECTOR
    if header.size != sectors:
        raise Corrupt("Bitmap size (in sectors) %d differs from disk size in sectors %d" % (header.size, sectors))
    if header.l1_size * 8 > len(data) - DirtyBitmap.SIZE:
        raise Corrupt("Bitmaps feature corrupted: l1 table exceeds extension data_size")
    granularity = header.granularity * SECTOR
    if not granularity or granularity & granularity - 1 or granularity > MAX_GRANULARITY:
        raise Corrupt("Invalid granularity of a bitmap: %d sectors" % header.granularity)
    expected = -(-image.size // (image.block_size * 8 * granularity))
    if header.l1_size != expected:
        text = "Bitmap table size %d does not correspond to bitmap size and cluster size. Expected %d"
        raise Corrupt(text % (header.l1_size, expected))
    table = array("Q", bytes(data[DirtyBitmap.SIZE : DirtyBitmap.SIZE + 8 * header.l1_size]))
    from sys import byteorder

    if byteorder == "big":
        table.byteswap()
    digits = header.id.hex()
    name = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    def fetch(index: int) -> Optional[bytearray]:
        """The piece `index` of the bitmap, which is a cluster of the file."""
        entry = table[index]
        if entry == ALL_CLEAR:
            return None
        if entry == ALL_SET:
            return bytearray(b"\xff") * image.block_size
        if entry > MAX_OFFSET // SECTOR:
            raise Corrupt("%s: bitmap '%s' has data at sector %#x" % (image.filename, name, entry), filename=image.filename)
        piece = bytearray(image.block_size)
        read_padded(image.file, entry * SECTOR, memoryview(piece))
        return piece

    return Bitmap(name, granularity, image.size, True, image.block_size, fetch)
