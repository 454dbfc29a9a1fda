# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Names and directory entries of FAT, long names included (Microsoft's FAT32 File System Specification, version 1.03,
https://learn.microsoft.com/en-us/windows/win32/fileio/exfat-specification points to it)."""

from __future__ import annotations

import struct
import time

from ...errors import Error

READ_ONLY, HIDDEN, SYSTEM, VOLUME, DIRECTORY, ARCHIVE = 1, 2, 4, 8, 16, 32
LONG = READ_ONLY | HIDDEN | SYSTEM | VOLUME  # the attributes of a piece of a long name
LONG_MASK = 0x3F
LAST = 0x40  # of the number of the piece that comes first in the directory, and last in the name
PIECE = 13  # UTF-16 units of a long name in one entry
MAX_NAME = 255  # UTF-16 units
ENTRY = 32  # bytes
DELETED, E5 = 0xE5, 0x05  # the first byte of an entry that is free again, and what stands for 0xE5 in a name
LOWER_BASE, LOWER_EXTENSION = 8, 16  # how Windows NT keeps names of small letters without a long name

_PLAIN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~"
_FORBIDDEN = '"*/:<>?\\|'  # in long names
_LAYOUT = struct.Struct("<11sBBBHHHHHHHI")


class DirectoryEntry:
    """What an entry says: the 11 bytes of the short name, attributes, first cluster, size in bytes, time in seconds since 1970."""

    __slots__ = ("short", "attributes", "cluster", "size", "modified", "case")

    def __init__(self, short: bytes, attributes: int, cluster: int = 0, size: int = 0, modified: float = 0, case: int = 0) -> None:
        self.short = short
        self.attributes = attributes
        self.cluster = cluster
        self.size = size
        self.modified = modified
        self.case = case

    def pack(self) -> bytes:
        date, clock = dos_time(self.modified)
        name = bytes((E5,)) + self.short[1:] if self.short[0] == DELETED else self.short
        return _LAYOUT.pack(name, self.attributes, self.case, 0, clock, date, date, self.cluster >> 16, clock, date, self.cluster & 0xFFFF, self.size)

    @classmethod
    def unpack(cls, data: bytes) -> DirectoryEntry:
        short, attributes, case, _tenth, _clock, _date, _access, high, _changed, _day, low, size = _LAYOUT.unpack(data)
        if short[0] == E5:
            short = bytes((DELETED,)) + short[1:]
        return cls(short, attributes, high << 16 | low, size, 0, case)

    def name(self) -> str:
        """The short name as it is shown."""
        base, extension = self.short[:8].rstrip(b" ").decode("cp437"), self.short[8:].rstrip(b" ").decode("cp437")
        base = base.lower() if self.case & LOWER_BASE else base
        extension = extension.lower() if self.case & LOWER_EXTENSION else extension
        return base + "." + extension if extension else base


def dos_time(seconds: float) -> tuple[int, int]:
    """(date, time) as FAT has them, of the local time zone; years outside of 1980 to 2107 become the nearest."""
    moment = time.localtime(seconds)
    if moment.tm_year < 1980:
        return 1 << 5 | 1, 0
    if moment.tm_year > 2107:
        return 127 << 9 | 12 << 5 | 31, 23 << 11 | 59 << 5 | 29
    date = moment.tm_year - 1980 << 9 | moment.tm_mon << 5 | moment.tm_mday
    return date, moment.tm_hour << 11 | moment.tm_min << 5 | min(moment.tm_sec, 59) // 2


def long_name(name: str) -> str:
    """`name` without what a long name cannot have. Raises Error for one that is too long, or not text."""
    try:
        units = len(name.encode("utf-16-le")) // 2
    except UnicodeEncodeError:
        raise Error("vvfat: invalid UTF-8 name: %s" % name.encode("utf-8", "backslashreplace").decode()) from None
    if units > MAX_NAME:
        raise Error("vvfat: the name is longer than %d characters: %s" % (MAX_NAME, name))
    cleaned = "".join("_" if char in _FORBIDDEN or char < " " else char for char in name)
    return cleaned[:-1] + "_" if cleaned[-1] in ". " else cleaned


def short_name(name: str, taken: set[bytes]) -> tuple[bytes, bool]:
    """A short name for `name` that is not among `taken`, and whether it says it all; it is added to them."""
    base, dot, extension = name.rpartition(".")
    if not base:
        base, extension = name, ""
    upper = base.upper(), extension.upper()
    parts = [bytes(byte for byte in part.encode("ascii", "ignore") if byte in _PLAIN) for part in upper]
    whole = len(parts[0]) == len(base) <= 8 and len(parts[1]) == len(extension) <= 3 and parts[0] != b"" and bool(dot) == bool(extension)
    if whole:
        short = parts[0].ljust(8) + parts[1].ljust(3)
        if short not in taken:
            taken.add(short)
            return short, (base, extension) == upper
    number = 1
    while True:
        tail = b"~%d" % number
        short = (parts[0][: 8 - len(tail)] + tail).ljust(8) + parts[1][:3].ljust(3)
        if short not in taken:
            taken.add(short)
            return short, False
        number += 1


def checksum(short: bytes) -> int:
    """What ties the pieces of a long name to the short one."""
    found = 0
    for byte in short:
        found = ((found >> 1 | found << 7) + byte) & 0xFF
    return found


def pack_long(name: str, short: bytes) -> bytes:
    """The entries of a long name, which come before that of the short one."""
    units = name.encode("utf-16-le")
    count = -(-len(units) // (PIECE * 2))
    if len(units) < count * PIECE * 2:
        units = (units + b"\0\0").ljust(count * PIECE * 2, b"\xff")
    entries = []
    for number in range(count, 0, -1):
        piece = units[(number - 1) * PIECE * 2 : number * PIECE * 2]
        head = bytes((number | (LAST if number == count else 0),))
        entries.append(head + piece[:10] + bytes((LONG, 0, checksum(short))) + piece[10:22] + b"\0\0" + piece[22:])
    return b"".join(entries)


def unpack_long(entries: list[bytes], short: bytes) -> str:
    """The long name that `entries`, in the order of the directory, hold for the short one; "" if they do not belong to it."""
    count = len(entries)
    units = b""
    for index, entry in enumerate(entries):
        number = count - index
        if entry[0] != (number | (LAST if not index else 0)) or entry[13] != checksum(short):
            return ""
        units = entry[1:11] + entry[14:26] + entry[28:32] + units
    text = units.decode("utf-16-le", "surrogatepass").partition("\0")[0]
    try:
        text.encode()
    except UnicodeEncodeError:
        return ""
    return text
