# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Persistent dirty bitmaps: their directory, tables and data (https://www.qemu.org/docs/master/interop/qcow2.html#bitmaps).

While an image is open for writing all its bitmaps are marked as in use in the file, and whoever finds them so knows that
their content is not what it should be. So they are stored in place, by a close that goes well, which then takes the marks away.
"""

from __future__ import annotations

from array import array

from ...bitmaps import Bitmap, BitmapSet
from ...cache import read_padded
from ...errors import Corrupt, Error
from ...ondisk import Struct
from .header import BITMAPS, EXT_BITMAPS, MAX_BITMAP_DIRECTORY_SIZE, MAX_BITMAPS, OFFSET_MASK, BitmapsExtension
from .overlap import BITMAP_DIRECTORY
from .tables import big_bytes, read_entries

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Optional

    from ...ondisk import u8, u16, u32, u64
    from .header import Header
    from .image import Qcow2

EINVAL, EFBIG, ENOTSUP = 22, 27, 95
IN_USE = 1
AUTO = 2
KNOWN_FLAGS = IN_USE | AUTO
MAX_NAME = 1023  # bytes
MAX_TABLE = 0x8000000  # entries
MAX_DATA = 0x20000000  # bytes of a bitmap
MAX_TABLES = 1 << 23  # entries of all tables together, which are kept in memory
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31
RESERVED = 0xFF000000000001FE  # bits of a table entry
ALL_ONES = 1  # an entry without an offset: all bits are set
LOST = (
    "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent\n"
    "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."
)


class BitmapEntry(Struct):
    """The fixed part of a bitmap directory entry."""

    bitmap_table_offset: u64
    bitmap_table_size: u32
    flags: u32
    type: u8 = 1
    granularity_bits: u8
    name_size: u16
    extra_data_size: u32 = 0


class Stored:
    """Where a bitmap is: the place of its table, its length in entries and, unless the bitmap is in use, the entries."""

    __slots__ = ("offset", "entries", "table")

    def __init__(self, offset: int, entries: int, table: array[int]) -> None:
        self.offset = offset
        self.entries = entries
        self.table = table


def extension(header: Header) -> Optional[BitmapsExtension]:
    """The bitmaps extension; None where the image has none that counts."""
    data = header.extension(EXT_BITMAPS)
    return None if data is None or not header.autoclear_features & BITMAPS else BitmapsExtension.unpack(data)


def are_lost(header: Header) -> bool:
    """Whether the image has bitmaps that do not count any more."""
    return header.version >= 3 and header.extension(EXT_BITMAPS) is not None and not header.autoclear_features & BITMAPS


def open_bitmaps(image: Qcow2) -> BitmapSet:
    """The bitmaps that the image has, which may be none. Raises Corrupt in QEMU's words."""
    bitmaps = BitmapSet(image.size, image.cluster_size, image.cluster_size, lambda name, granularity, size: _limit(image, name, granularity, size))
    found = extension(image.header)
    if found is None:
        return bitmaps
    names: set[str] = set()
    entries = 0
    for entry, name in read_directory(image, found):
        bitmap = _open_bitmap(image, entry, name)
        if name in names:
            raise _broken(image, "Bitmap already exists: %s" % name)
        names.add(name)
        entries += len(bitmap.stored.table)
        if entries > MAX_TABLES:
            raise _broken(image, "The bitmap tables are too large")
        bitmaps.all.append(bitmap)
    return bitmaps


def read_directory(image: Qcow2, found: BitmapsExtension) -> list[tuple[BitmapEntry, str]]:
    """The entries of the bitmap directory, and the names. Raises Corrupt in QEMU's words."""
    size = found.bitmap_directory_size
    if not size:
        raise _broken(image, "Requested bitmap directory size is zero")
    if size > MAX_BITMAP_DIRECTORY_SIZE:
        raise _broken(image, "Requested bitmap directory size is too big")
    raw = bytearray(size)
    read_padded(image.file, found.bitmap_directory_offset, memoryview(raw))
    entries: list[tuple[BitmapEntry, str]] = []
    position = 0
    while position < size:
        if position + BitmapEntry.SIZE > size:
            raise _broken(image, "Broken bitmap directory")
        entry = BitmapEntry.unpack(raw, position)
        names = position + BitmapEntry.SIZE + entry.extra_data_size
        stop = names + entry.name_size + 7 & ~7
        if stop > size:
            raise _broken(image, "Broken bitmap directory")
        if len(entries) >= found.nb_bitmaps:
            raise _broken(image, "More bitmaps found than specified in header extension")
        if entry.extra_data_size:
            raise _broken(image, "Bitmap extra data is not supported")
        name = bytes(raw[names : names + entry.name_size]).split(b"\0")[0].decode("utf-8", "surrogateescape")
        if not _is_sound(image, entry):
            raise _broken(image, "Bitmap '%s' doesn't satisfy the constraints" % name)
        entries.append((entry, name))
        position = stop
    if len(entries) < found.nb_bitmaps:
        raise _broken(image, "Less bitmaps found than specified in header extension")
    return entries


def _is_sound(image: Qcow2, entry: BitmapEntry) -> bool:
    offset, count = entry.bitmap_table_offset, entry.bitmap_table_size
    if not offset or offset & image.cluster_size - 1 or offset >> 63 or not 0 < count <= MAX_TABLE:
        return False
    if entry.flags & ~KNOWN_FLAGS or entry.type != 1 or not MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS:
        return False
    size = count * image.cluster_size
    if entry.name_size > MAX_NAME or size > MAX_DATA:
        return False
    return bool(entry.flags & IN_USE) or image.header.size <= size * 8 << entry.granularity_bits


def _open_bitmap(image: Qcow2, entry: BitmapEntry, name: str) -> Bitmap:
    stored = Stored(entry.bitmap_table_offset, entry.bitmap_table_size, array("Q"))

    def fetch(index: int) -> Optional[bytearray]:
        value = stored.table[index] if index < len(stored.table) else 0
        if not value & OFFSET_MASK:
            return bytearray(b"\xff" * image.cluster_size) if value & ALL_ONES else None
        piece = bytearray(image.cluster_size)
        read_padded(image.file, value & OFFSET_MASK, memoryview(piece))
        return piece

    bitmap = Bitmap(name, 1 << entry.granularity_bits, image.size, bool(entry.flags & AUTO), image.cluster_size, fetch, stored)
    bitmap.inconsistent = bool(entry.flags & IN_USE)
    if bitmap.inconsistent:
        return bitmap
    stored.table = read_entries(image.file, entry.bitmap_table_offset, entry.bitmap_table_size)
    wrong = RESERVED | image.cluster_size - 1 & OFFSET_MASK
    for value in filter(None, stored.table):
        if value & wrong or value & OFFSET_MASK and value & ALL_ONES:
            reason = "Could not read bitmap_table table from image for bitmap '%s': Invalid argument" % name
            raise _broken(image, reason)
    if len(stored.table) != bitmap.count:
        raise _broken(image, "Could not read bitmap '%s' from image: Invalid argument" % name)
    return bitmap


def _broken(image: Qcow2, text: str) -> Corrupt:
    return Corrupt(text, filename=image.filename, errno=EINVAL)


def _limit(image: Qcow2, name: str, granularity: int, size: int) -> None:
    """Raise Error where the image cannot store such a bitmap."""
    reason = ""
    known = [bitmap for bitmap in image.bitmaps() if bitmap.name != name]
    if image.header.version < 3:
        reason = "Cannot store dirty bitmaps in qcow2 v2 files"
    elif len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
        reason = "Name length exceeds maximum (%d characters)" % MAX_NAME
    elif len(known) >= MAX_BITMAPS:
        reason = "Maximum number of persistent bitmaps is already reached"
    elif -(-size // granularity) > MAX_DATA * 8:
        reason = "Too much space will be occupied by the bitmap. Use larger granularity"
    elif sum(_entry_size(bitmap.name) for bitmap in known) + _entry_size(name) > MAX_BITMAP_DIRECTORY_SIZE:
        reason = "Not enough space in the bitmap directory"
    if reason:
        raise Error("Can't make bitmap '%s' persistent in '%s': %s" % (name, image.filename, reason), filename=image.filename, errno=EINVAL)


def _entry_size(name: str) -> int:
    return BitmapEntry.SIZE + len(name.encode("utf-8", "surrogateescape")) + 7 & ~7


def space(bitmaps: Iterable[Bitmap], size: int, cluster_size: int) -> int:
    """Bytes that the bitmaps need in a new image of `size` bytes."""
    total = 0
    bitmaps = list(bitmaps)
    for bitmap in bitmaps:
        clusters = -(-(-(-(-(-size // bitmap.granularity)) // 8)) // cluster_size)
        total += clusters + -(-clusters * 8 // cluster_size)
    return (total + -(-sum(_entry_size(bitmap.name) for bitmap in bitmaps) // cluster_size)) * cluster_size


# -- writing -------------------------------------------------------------------------------------------------------


def mark_in_use(image: Qcow2, bitmaps: BitmapSet, mark: int = IN_USE) -> None:
    """Note in the file that the bitmaps are not to be trusted until they are stored again; or, with the mark 0, that they
    are what they were."""
    found = extension(image.header)
    if found is not None and not all(bitmap.inconsistent for bitmap in bitmaps):
        directory = _directory(bitmaps, mark)
        if len(directory) != found.bitmap_directory_size:  # a name has a NUL byte, and what follows it is nobody's
            raise _broken(image, "Can't update bitmap directory: Invalid argument")
        _write(image, found.bitmap_directory_offset, directory)
        image.barrier()


def _write(image: Qcow2, offset: int, data: bytes) -> None:
    """Write what belongs to bitmaps at a place that the image may have named. Raises Corrupt where something else is."""
    image.overlap.check(offset, len(data), BITMAP_DIRECTORY, "bitmap")
    image.file.write_hosted(offset, memoryview(data))


def store(image: Qcow2, bitmaps: BitmapSet) -> None:
    """Write all bitmaps, and then take the marks away that mark_in_use made. Raises Error, OSError."""
    found = extension(image.header)
    if found is None and not bitmaps.all:
        return
    size, refcounts = image.cluster_size, image.refcounts
    before = [] if found is None else read_directory(image, found)
    freed: list[tuple[int, int]] = []
    pieces: list[tuple[int, bytes]] = []
    tables: list[tuple[int, bytes]] = []
    with image._lock:
        places = {bitmap.stored.offset for bitmap in bitmaps if bitmap.stored is not None}
        for bitmap in bitmaps:
            if not bitmap.inconsistent:
                _place(image, bitmap, pieces, tables, freed)
        for entry, _title in before:
            if entry.bitmap_table_offset not in places:
                freed += _table_clusters(image, entry)
        same = [(entry.bitmap_table_offset, entry.bitmap_table_size, name) for entry, name in before] == [
            (bitmap.stored.offset, bitmap.stored.entries, bitmap.name) for bitmap in bitmaps
        ]
        directory = _directory(bitmaps, 0)
        offset = 0
        if found is not None and same:
            offset = found.bitmap_directory_offset
        elif directory:
            offset = refcounts.allocate_whole(-(-len(directory) // size)) * size
        if found is not None and not same:
            freed.append((found.bitmap_directory_offset // size, -(-found.bitmap_directory_size // size)))
        refcounts.write_back()
        image.barrier()
        for writes in (pieces, tables):  # no table may name what lies behind the end of the file
            for place, data in writes:
                _write(image, place, data)
            if writes:
                image.barrier()
        if directory:
            _write(image, offset, directory)
            image.barrier()
        if not same:
            _name(image, BitmapsExtension(nb_bitmaps=len(bitmaps.all), bitmap_directory_size=len(directory), bitmap_directory_offset=offset))
        for first, count in freed:
            refcounts.give_back(first, count)
        refcounts.write_back()
        image.file.flush()


def _place(
    image: Qcow2, bitmap: Bitmap, pieces: list[tuple[int, bytes]], tables: list[tuple[int, bytes]], freed: list[tuple[int, int]]
) -> None:
    """Find room for what changed of a bitmap; what is to be written and what is no longer needed is added to the lists.

    The table of a bitmap that is in the file already stays where it is if it keeps its length.
    """
    size, refcounts = image.cluster_size, image.refcounts
    old: Stored = bitmap.stored or Stored(0, 0, array("Q"))
    kept = -(-bitmap.kept // (size * 8))
    table = old.table[: min(kept, bitmap.count)]
    table.frombytes(bytes((bitmap.count - len(table)) * 8))
    for index, piece in bitmap.pieces.items():
        place = old.table[index] & OFFSET_MASK if index < len(old.table) else 0
        if piece.count(0) == len(piece):
            table[index] = 0
            continue
        if not place:
            place = refcounts.allocate(1)[0] * size
        table[index] = place
        pieces.append((place, bytes(piece)))
    used = {value & OFFSET_MASK for value in table}
    freed += [(value // size, 1) for value in (entry & OFFSET_MASK for entry in old.table) if value and value not in used]
    offset = old.offset
    if not offset or -(-len(old.table) * 8 // size) != -(-len(table) * 8 // size):
        if offset:
            freed.append((offset // size, -(-len(old.table) * 8 // size)))
        offset = refcounts.allocate_whole(max(1, -(-len(table) * 8 // size))) * size
    if offset != old.offset or table != old.table:
        tables.append((offset, big_bytes(table).ljust(-(-len(table) * 8 // size) * size, b"\0")))
    bitmap.stored = Stored(offset, len(table), table)


def _table_clusters(image: Qcow2, entry: BitmapEntry) -> list[tuple[int, int]]:
    """(first, count) of the clusters of a bitmap's table and data."""
    size = image.cluster_size
    places = [value & OFFSET_MASK for value in filter(None, read_entries(image.file, entry.bitmap_table_offset, entry.bitmap_table_size))]
    return [(place // size, 1) for place in places if place] + [(entry.bitmap_table_offset // size, -(-entry.bitmap_table_size * 8 // size))]


def _directory(bitmaps: BitmapSet, mark: int) -> bytes:
    """The directory as stored, with the flag `mark` on all that are consistent."""
    data = b""
    for bitmap in bitmaps:
        name = bitmap.name.encode("utf-8", "surrogateescape")
        entry = BitmapEntry(
            bitmap_table_offset=bitmap.stored.offset,
            bitmap_table_size=bitmap.stored.entries,
            flags=(AUTO if bitmap.enabled else 0) | (IN_USE if bitmap.inconsistent else mark),
            granularity_bits=bitmap.granularity.bit_length() - 1,
            name_size=len(name),
        )
        data += entry.pack() + name
        data += bytes(-len(data) % 8)
    return data


def _name(image: Qcow2, found: BitmapsExtension) -> None:
    """Have the header name the directory, or none."""
    header = image.header
    old, features = header.extension(EXT_BITMAPS), header.autoclear_features
    header.set_extension(EXT_BITMAPS, found.pack() if found.nb_bitmaps else None)
    header.autoclear_features = features | BITMAPS if found.nb_bitmaps else features & ~BITMAPS
    try:
        image.update_header()
    except BaseException:
        header.set_extension(EXT_BITMAPS, old)
        header.autoclear_features = features
        raise
    image.overlap.forget()


__all__ = ["LOST", "BitmapEntry", "are_lost", "extension", "mark_in_use", "open_bitmaps", "read_directory", "space", "store"]
