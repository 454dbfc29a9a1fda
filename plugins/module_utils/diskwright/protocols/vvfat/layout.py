# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A FAT file system made of a directory: geometry, boot sector, tables, and where each file lies
(Microsoft's FAT32 File System Specification, version 1.03)."""

from __future__ import annotations

import os
import stat
import struct
import sys
from array import array

from ...errors import Error
from .names import ARCHIVE, DIRECTORY, ENTRY, VOLUME, DirectoryEntry, long_name, pack_long, short_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

SECTOR = 512
SERIAL = 0xFABE1AFD  # of the volume, as QEMU's
DISK_ID = 0xBE1AFDFA
FATS = 2
ROOT_ENTRIES = 512  # but for FAT32, whose root is a directory like any other
MAX_FILE = 0x7FFFFFFF  # bytes, as QEMU
MAX_ITEMS = 1 << 18  # files and directories: no file system made here has more clusters
MAX_DEPTH = 64  # directories inside one another
MAX_DIRECTORY = 65536  # entries


class Item:
    """A file or a directory: `path` on the host, `name` as the volume has it; `clusters` are its own, in order."""

    __slots__ = ("name", "path", "size", "modified", "children", "first", "count")

    def __init__(self, name: str, path: str, size: int, modified: float, children: Optional[list[Item]]) -> None:
        self.name = name
        self.path = path
        self.size = size
        self.modified = modified
        self.children = children  # None: a file
        self.first = self.count = 0  # clusters


class Geometry:
    """Sizes in sectors. `bits` is 12, 16 or 32; `clusters` how many there are, numbered from 2 on."""

    def __init__(self, bits: int, floppy: bool) -> None:
        """`bits` 0 leaves the choice to us: 16 for a hard disk, and 12 for a floppy of 2.88 MB."""
        if floppy:
            self.cylinders, self.heads, self.track = 80, 2, 18 if bits == 12 else 36
            cluster = 1 if bits else 2
        else:
            self.cylinders, self.heads, self.track = 64 if bits == 12 else 1024, 16, 63
            cluster = 8 if bits == 32 else 16
        self.floppy = floppy
        self.bits = bits or (12 if floppy else 16)
        self.total = self.cylinders * self.heads * self.track
        self.hidden = 0 if floppy else self.track  # what is before the volume
        self.volume = self.total - self.hidden
        self.cluster = cluster
        self.reserved = 32 if self.bits == 32 else 1
        self.root = 0 if self.bits == 32 else ROOT_ENTRIES * ENTRY // SECTOR
        self.fat = 1
        while True:
            self.clusters = (self.volume - self.reserved - self.root - FATS * self.fat) // cluster
            needed = -(-(self.clusters + 2) * self.bits // (8 * SECTOR))
            if needed <= self.fat:
                break
            self.fat = needed
        self.fat_start = self.hidden + self.reserved
        self.root_start = self.fat_start + FATS * self.fat
        self.data_start = self.root_start + self.root

    @property
    def cluster_size(self) -> int:
        return self.cluster * SECTOR

    @property
    def end_mark(self) -> int:
        return (1 << min(self.bits, 28)) - 1

    def place(self, cluster: int) -> int:
        """Where a cluster begins on the disk, in bytes."""
        return (self.data_start + (cluster - 2) * self.cluster) * SECTOR

    # -- sectors -------------------------------------------------------------------------------------------------

    def partition_table(self) -> bytes:
        """The first sector of a hard disk: one active partition."""
        kind = {12: 0x01, 16: 0x0E, 32: 0x0C}[self.bits]
        entry = struct.pack("<B3sB3sII", 0x80, self._chs(self.hidden), kind, self._chs(self.total - 1), self.hidden, self.volume)
        return (bytes(440) + struct.pack("<IH", DISK_ID, 0) + entry).ljust(510, b"\0") + b"\x55\xaa"

    def _chs(self, sector: int) -> bytes:
        track, rest = divmod(sector, self.track)
        cylinder, head = divmod(track, self.heads)
        cylinder = min(cylinder, 1023)
        return bytes((head, rest + 1 | cylinder >> 2 & 0xC0, cylinder & 0xFF))

    def boot_sector(self, label: bytes) -> bytes:
        """The first sector of the volume."""
        small = self.volume if self.volume < 1 << 16 and self.bits != 32 else 0
        data = struct.pack(
            "<3s8sHBHBHHBHHHII",
            b"\xeb\x3c\x90" if self.bits != 32 else b"\xeb\x58\x90",
            b"MSWIN4.1",
            SECTOR,
            self.cluster,
            self.reserved,
            FATS,
            ROOT_ENTRIES if self.root else 0,
            small,
            self.media,
            self.fat if self.bits != 32 else 0,
            self.track,
            self.heads,
            self.hidden,
            0 if small else self.volume,
        )
        if self.bits == 32:
            data += struct.pack("<IHHIHH12x", self.fat, 0, 0, 2, 1, 6)
        data += struct.pack("<BBBI11s8s", 0 if self.floppy else 0x80, 0, 0x29, SERIAL, label, b"FAT%-5d" % self.bits)
        return data.ljust(510, b"\0") + b"\x55\xaa"

    def information(self, free: int, following: int) -> bytes:
        """FAT32's sector of hints."""
        return (b"RRaA".ljust(484, b"\0") + struct.pack("<4sII", b"rrAa", free, following)).ljust(508, b"\0") + b"\0\0\x55\xaa"

    @property
    def media(self) -> int:
        return 0xF0 if self.floppy else 0xF8

    # -- tables --------------------------------------------------------------------------------------------------

    def pack_fat(self, entries: list[int]) -> bytes:
        """The bytes of a table of `entries` from the first one on."""
        if self.bits == 12:
            padded = [*entries, 0] if len(entries) % 2 else entries
            packed = b"".join([(low | high << 12).to_bytes(3, "little") for low, high in zip(padded[::2], padded[1::2])])
        else:
            table = array("H" if self.bits == 16 else "I", entries)
            if sys.byteorder == "big":
                table.byteswap()
            packed = table.tobytes()
        return packed.ljust(self.fat * SECTOR, b"\0")

    def unpack_fat(self, data: bytes) -> list[int]:
        """The inverse of pack_fat, for all clusters."""
        count = self.clusters + 2
        if self.bits == 12:
            found = []
            for at in range(0, -(-count // 2) * 3, 3):
                both = int.from_bytes(data[at : at + 3], "little")
                found += [both & 0xFFF, both >> 12]
            return found[:count]
        table = array("H" if self.bits == 16 else "I", data[: count * self.bits // 8])
        if sys.byteorder == "big":
            table.byteswap()
        return [entry & 0x0FFFFFFF for entry in table] if self.bits == 32 else table.tolist()


def scan(directory: str) -> Item:
    """The tree below a directory of the host: regular files and directories, links followed, others left out.

    Raises Error in QEMU's words, OSError.
    """
    counted = 0

    def look(path: str, name: str, above: tuple[tuple[int, int], ...]) -> Item:
        nonlocal counted
        status = os.stat(path)
        own = (status.st_dev, status.st_ino)
        if own in above or len(above) > MAX_DEPTH:
            raise Error("vvfat: directories are nested too deep, or in a circle: %s" % path)
        children = []
        for entry in sorted(os.listdir(path)):
            inner = os.path.join(path, entry)
            try:
                found = os.stat(inner)
            except OSError:
                continue  # a link that leads nowhere
            counted += 1
            if counted > MAX_ITEMS:
                raise Error("vvfat: there are more than %d files in %s" % (MAX_ITEMS, directory))
            if stat.S_ISDIR(found.st_mode):
                children.append(look(inner, long_name(entry), (*above, own)))
            elif stat.S_ISREG(found.st_mode):
                if found.st_size > MAX_FILE:
                    raise Error("File %s is larger than 2GB" % inner)
                children.append(Item(long_name(entry), inner, found.st_size, found.st_mtime, None))
        return Item(name, path, 0, status.st_mtime, children)

    try:
        return look(directory, "", ())
    except NotADirectoryError:
        raise Error("Could not read directory %s" % directory) from None
    except FileNotFoundError:
        raise Error("Could not read directory %s" % directory) from None


class Layout:
    """Where everything lies: `regions` are (start, length, bytes or the Item of a file, where in it), ascending; the rest of the disk is zero."""

    def __init__(self, geometry: Geometry, tree: Item, label: str) -> None:
        """Raises Error in QEMU's words where the tree does not fit."""
        self.geometry = geometry
        self.tree = tree
        self.label = label.encode("ascii", "replace").ljust(11)
        self._fat = [geometry.end_mark & ~0xFF | geometry.media, geometry.end_mark]
        self.regions: list[tuple[int, int, bytes | Item, int]] = []
        directories: list[tuple[Item, Item, list[tuple[Item, bytes, bytes]]]] = []
        self._place(tree, tree, directories)
        self._write(directories)
        self.regions.sort(key=lambda region: region[0])

    def _place(self, item: Item, parent: Item, directories: list[tuple[Item, Item, list[tuple[Item, bytes, bytes]]]]) -> None:
        """Give clusters to an item and all below it."""
        geometry = self.geometry
        if item.children is None:
            self._take(item, item.size)
            return
        taken: set[bytes] = set()
        entries = []
        length = ENTRY if item is parent else 2 * ENTRY
        for child in item.children:
            short, whole = short_name(child.name, taken)
            named = b"" if whole else pack_long(child.name, short)
            length += len(named) + ENTRY
            entries.append((child, short, named))
        if item is parent and geometry.root:
            if length > ROOT_ENTRIES * ENTRY:
                raise Error("Too many entries in root directory")
        else:
            if length > MAX_DIRECTORY * ENTRY:
                raise Error("vvfat: too many entries in directory %s" % item.path)
            self._take(item, max(length, 1))
        directories.append((item, parent, entries))
        for child in item.children:
            self._place(child, item, directories)

    def _take(self, item: Item, length: int) -> None:
        geometry = self.geometry
        item.count = -(-length // geometry.cluster_size)
        item.first = len(self._fat) if item.count else 0
        if len(self._fat) + item.count > geometry.clusters + 2:
            raise Error("Directory does not fit in FAT%d (capacity %.2f MB)" % (geometry.bits, geometry.volume / 2000.0))
        if item.count:
            self._fat.extend(range(item.first + 1, item.first + item.count))
            self._fat.append(geometry.end_mark)
            if item.children is None:
                self.regions.append((geometry.place(item.first), item.count * geometry.cluster_size, item, 0))

    def _write(self, directories: list[tuple[Item, Item, list[tuple[Item, bytes, bytes]]]]) -> None:
        """The bytes of all that is not a file."""
        geometry = self.geometry
        for item, parent, entries in directories:
            parts = []
            if item is parent:
                parts.append(DirectoryEntry(self.label, VOLUME, modified=item.modified).pack())
            else:
                above = 0 if parent is self.tree else parent.first
                parts.append(DirectoryEntry(b".".ljust(11), DIRECTORY, item.first, modified=item.modified).pack())
                parts.append(DirectoryEntry(b"..".ljust(11), DIRECTORY, above, modified=parent.modified).pack())
            for child, short, named in entries:
                kind = ARCHIVE if child.children is None else DIRECTORY
                parts.append(named + DirectoryEntry(short, kind, child.first, child.size, child.modified).pack())
            in_root = item is parent and geometry.root
            place = geometry.root_start * SECTOR if in_root else geometry.place(item.first)
            room = geometry.root * SECTOR if in_root else item.count * geometry.cluster_size
            self.regions.append((place, room, b"".join(parts).ljust(room, b"\0"), 0))
        fat = geometry.pack_fat(self._fat)
        boot = geometry.boot_sector(self.label)
        if geometry.hidden:
            self.regions.append((0, SECTOR, geometry.partition_table(), 0))
        self.regions.append((geometry.hidden * SECTOR, SECTOR, boot, 0))
        if geometry.bits == 32:
            free = geometry.clusters + 2 - len(self._fat)
            hints = geometry.information(free, len(self._fat) if free else 2)
            for at, data in ((1, hints), (6, boot), (7, hints)):
                self.regions.append(((geometry.hidden + at) * SECTOR, SECTOR, data, 0))
        for number in range(FATS):
            self.regions.append(((geometry.fat_start + number * geometry.fat) * SECTOR, len(fat), fat, 0))
