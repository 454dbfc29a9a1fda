# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The descriptor, a text that names the extents of a disk (VMware's "Virtual Disk Format 5.0", The Descriptor File).

Other products write it with spaces around the equals signs, with carriage returns and in the code page that its line
`encoding` names; all of that is read. Numbers of sectors are as the descriptor has them.
"""

from __future__ import annotations

import os

from ...errors import Corrupt, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Sequence

SECTOR = 512
MAX_DESCRIPTOR = 1 << 20  # bytes; no descriptor is read further
MAX_EXTENTS = 4096  # lines; VMware splits a disk of 8 TiB at most every 2 GiB
MAX_SECTORS = ((1 << 63) - SECTOR) // SECTOR
NO_PARENT = 0xFFFFFFFF
MARK = b"# Disk DescriptorFile"

EINVAL, ENOTSUP, EFBIG = 22, 95, 27

# createType of a descriptor that names its extents; the others are embedded in their only extent
SPLIT_TYPES = ("monolithicFlat", "vmfs", "vmfsSparse", "seSparse", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat")
EMBEDDED_TYPES = ("monolithicSparse", "streamOptimized")
FLAT_KINDS = ("FLAT", "VMFS")
ZERO_KIND = "ZERO"  # an extent without a file
SPARSE_KINDS = ("SPARSE", "VMFSSPARSE", "SESPARSE")


class ExtentLine:
    """One extent as the descriptor names it: its size in sectors, its kind, its file and where in that it begins."""

    __slots__ = ("sectors", "kind", "name", "start_sector", "read_only")

    def __init__(self, sectors: int, kind: str, name: str, start_sector: int = 0, read_only: bool = False) -> None:
        self.read_only = read_only
        self.sectors = sectors
        self.kind = kind
        self.name = name
        self.start_sector = start_sector

    def __str__(self) -> str:
        start = " %d" % self.start_sector if self.kind == "FLAT" else ""
        return 'RW %d %s "%s"%s' % (self.sectors, self.kind, self.name, start)


class Descriptor:
    """What a descriptor says. `values` are its `key=value` lines; `text` the bytes that it was read from, without padding."""

    def __init__(self, text: bytes) -> None:
        """Read `text`. Raises Corrupt for one that is no descriptor."""
        self.text = text.split(b"\0", 1)[0]
        self.values: dict[str, str] = {}
        self._lines: list[str] = []
        self.encoding = _encoding(self.text)
        for line in _decoded(self.text, self.encoding).splitlines():
            line = line.strip()
            key, equals, value = line.partition("=")
            key = key.strip()
            if equals and key and not line.startswith("#") and '"' not in key:
                self.values.setdefault(key.lower(), _unquoted(value.strip()))
            elif line and not line.startswith("#"):
                self._lines.append(line)
        self.create_type = self._required("createtype")
        self.cid = self._hexadecimal("cid")
        self.parent_cid = self._hexadecimal("parentcid", NO_PARENT)
        self.parent = self.values.get("parentfilenamehint")

    def _required(self, key: str) -> str:
        value = self.values.get(key)
        if value is None:
            raise Corrupt("invalid VMDK image descriptor", errno=EINVAL)
        return value

    def _hexadecimal(self, key: str, absent: Optional[int] = None) -> int:
        try:
            return int(self.values[key], 16) & 0xFFFFFFFF
        except (KeyError, ValueError):
            if absent is None or key in self.values:
                raise Corrupt("invalid VMDK image descriptor", errno=EINVAL) from None
            return absent

    def extents(self) -> list[ExtentLine]:
        """The extents, in their order on the disk. Raises Corrupt for a line that cannot be one, Unsupported."""
        found: list[ExtentLine] = []
        total = 0
        for line in self._lines:
            extent = _extent(line)
            if extent is None:
                continue
            found.append(extent)
            total += extent.sectors
            if total > MAX_SECTORS:
                raise Corrupt("Could not refresh total sector count: %s" % os.strerror(EFBIG), errno=EFBIG)
            if len(found) > MAX_EXTENTS:
                raise Corrupt("The image has more than %d extents" % MAX_EXTENTS, errno=EFBIG)
        return found


def _encoding(text: bytes) -> str:
    """The name of the code page that the descriptor says it is in; "" if it does not say."""
    for line in text.split(b"\n"):
        key, equals, value = line.partition(b"=")
        if equals and key.strip().lower() == b"encoding":
            return _unquoted(value.decode("ascii", "replace").strip())
    return ""


def _decoded(text: bytes, encoding: str) -> str:
    """The text of the descriptor: UTF-8 if it can be, then what it says it is; bytes that fit nothing stay what they are."""
    text = text.removeprefix(b"\xef\xbb\xbf")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        pass
    try:
        return text.decode(encoding or "utf-8", "strict")
    except (LookupError, UnicodeError, ValueError):
        return text.decode("utf-8", "surrogateescape")


def _unquoted(value: str) -> str:
    """A value without its quotes; what follows the closing one is no part of it."""
    return value[1:].split('"', 1)[0] if value.startswith('"') else value


def _extent(line: str) -> Optional[ExtentLine]:
    """One extent line; None for what is another line, or an extent that QEMU passes over. Raises Corrupt, Unsupported."""
    words = line.split(None, 3)
    if len(words) < 3 or words[0] not in ("RW", "RDONLY", "NOACCESS"):
        return None
    sectors, kind = _number(words[1]), words[2]
    if words[0] == "NOACCESS" and sectors is not None:
        raise Unsupported("An extent may not be accessed: %s" % line[:128], errno=ENOTSUP)
    if kind == ZERO_KIND and sectors is not None and sectors > 0:
        return ExtentLine(min(sectors, MAX_SECTORS + 1), kind, "", 0, True)
    if len(words) < 4 or sectors is None or not words[3].startswith('"') or words[3].count('"') < 2:
        return None
    name, rest = words[3][1:].split('"', 1)
    start = rest.split()
    wrong = Corrupt("Invalid extent line: %s" % line[:128], errno=EINVAL)
    first = 0
    if kind == "FLAT":
        number = _number(start[0]) if start else None
        if number is None or number < 0:
            raise wrong
        first = number
    elif start and kind in (*FLAT_KINDS, *SPARSE_KINDS):
        raise wrong
    if sectors <= 0 or kind not in (*FLAT_KINDS, *SPARSE_KINDS) or not name:
        return None
    if first > MAX_SECTORS:
        raise wrong
    return ExtentLine(min(sectors, MAX_SECTORS + 1), kind, name, first, words[0] == "RDONLY")


def _number(text: str) -> Optional[int]:
    digits = text[1:] if text[:1] in ("-", "+") else text
    return int(text) if digits.isdecimal() and digits.isascii() and len(digits) <= 20 else None


def local_name(name: str, place: str) -> str:
    """The name of a file as this host has it: a path of Windows is taken for a file beside the image at `place`."""
    if "\\" in name and (name[1:3] == ":\\" or name.startswith("\\\\")) and not os.path.lexists(os.path.join(os.path.dirname(place), name)):
        return name.replace("\\", "/").rsplit("/", 1)[1]
    return name


def new_cid() -> int:
    """A content ID as good as any; never one that stands for "none"."""
    return int.from_bytes(os.urandom(4), "little") & 0xFFFFFFFD


def compose(
    create_type: str,
    cid: int,
    extents: Sequence[ExtentLine],
    size: int,
    adapter: str,
    hardware: str,
    tools: str,
    parent: Optional[str] = None,
    parent_cid: int = NO_PARENT,
) -> bytes:
    """The descriptor of a disk of `size` bytes, byte for byte as qemu-img writes it."""
    heads = 16 if adapter == "ide" else 255
    lines = [
        MARK.decode(),
        "version=1",
        "CID=%x" % cid,
        "parentCID=%x" % parent_cid,
        'createType="%s"' % create_type,
        'parentFileNameHint="%s"' % parent if parent is not None else "",
        "# Extent description",
        *[str(extent) for extent in extents],
        "",
        "# The Disk Data Base",
        "#DDB",
        "",
        'ddb.virtualHWVersion = "%s"' % hardware,
        'ddb.geometry.cylinders = "%d"' % (size // (63 * heads * SECTOR)),
        'ddb.geometry.heads = "%d"' % heads,
        'ddb.geometry.sectors = "63"',
        'ddb.adapterType = "%s"' % adapter,
        'ddb.toolsVersion = "%s"' % tools,
    ]
    return os.fsencode("\n".join(lines) + "\n")


def with_cid(text: bytes, cid: int) -> bytes:
    """The descriptor `text` with another CID; everything else stays as it is. Raises Unsupported where it has none."""
    position = 0
    for line in text.splitlines(keepends=True):
        key, equals, value = line.partition(b"=")
        if equals and key.strip().lower() == b"cid":
            old = value.strip()
            at = position + len(key) + 1 + value.index(old) if old else position + len(key) + 1
            return text[:at] + b"%08x" % cid + text[at + len(old) :]
        position += len(line)
    raise Unsupported("The descriptor has no CID that could be changed", errno=ENOTSUP)
