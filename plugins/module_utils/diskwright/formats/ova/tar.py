# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Where the members of a tar file are (https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html, ustar and pax; and GNU's long names)."""

from __future__ import annotations

from ...errors import Corrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...node import Node

BLOCK = 512
MAX_MEMBERS = 1000
MAX_HEADER = 64 << 10  # bytes of a pax header or a long name
MAGIC = b"ustar"
MAGIC_OFFSET = 257
EINVAL = 22


class Member:
    """A file in the package: `size` bytes at `offset`."""

    __slots__ = ("name", "offset", "size")

    def __init__(self, name: str, offset: int, size: int) -> None:
        self.name = name
        self.offset = offset
        self.size = size


def read_members(file: Node) -> list[Member]:
    """The regular files in a tar file, in their order. Raises Corrupt."""
    found: list[Member] = []
    position, length = 0, file.size
    long_name: Optional[str] = None
    long_size: Optional[int] = None
    for _turn in range(3 * MAX_MEMBERS):
        if position + BLOCK > length:
            return found
        header = file.pread(position, BLOCK)
        if not any(header):
            return found
        name, size, kind = parse_header(header)
        data = position + BLOCK
        if long_size is not None and kind not in "xgLK":
            size = long_size
        if data + size > length:
            raise _wrong("its member '%s' goes on behind the end" % name)
        position = data + -(-size // BLOCK) * BLOCK
        if kind in "xL":
            if size > MAX_HEADER:
                raise _wrong("a name of %d bytes" % size)
            raw = file.pread(data, size)
            if kind == "L":
                long_name = _text(raw)
            else:
                long_name, long_size = _pax(raw, long_name, long_size)
            continue
        if kind in "gK":
            continue
        if kind in "0\0" and len(found) < MAX_MEMBERS:
            found.append(Member(long_name if long_name is not None else name, data, size))
        long_name = long_size = None
        if len(found) == MAX_MEMBERS:
            break
    raise _wrong("it has more than %d members" % MAX_MEMBERS)


def parse_header(header: bytes) -> tuple[str, int, str]:
    """(name, size, type) of the member that a header announces. Raises Corrupt."""
    if sum(header[:148]) + 8 * 32 + sum(header[156:BLOCK]) != _number(header[148:156]):
        raise _wrong("a header's checksum is wrong")
    name = _text(header[:100])
    if header[MAGIC_OFFSET : MAGIC_OFFSET + 6] == b"ustar\0" and header[345]:
        name = _text(header[345:500]) + "/" + name
    return name, _number(header[124:136]), chr(header[156])


def _number(field: bytes) -> int:
    """An octal number, or a binary one as GNU writes it where that is too short."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big")
    else:
        try:
            value = int(field.rstrip(b" \0").lstrip() or b"0", 8)
        except ValueError:
            raise _wrong("a number is none") from None
    if value >> 63:
        raise _wrong("a number is too large")
    return value


def _pax(raw: bytes, name: Optional[str], size: Optional[int]) -> tuple[Optional[str], Optional[int]]:
    """The name and the size that a pax header gives to the member that follows."""
    while raw:
        digits, blank, _rest = raw.partition(b" ")
        length = int(digits) if blank and digits.isdigit() and len(digits) < 8 else 0
        if not len(digits) + 1 < length <= len(raw):
            raise _wrong("a pax header is damaged")
        key, _equals, value = raw[len(digits) + 1 : length].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise _wrong("a number is none")
            size = int(value)
        raw = raw[length:]
    return name, size


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _wrong(why: str) -> Corrupt:
    return Corrupt("The tar file is damaged: %s" % why, errno=EINVAL)
