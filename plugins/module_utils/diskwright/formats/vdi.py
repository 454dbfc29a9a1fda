# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""vdi: VirtualBox's disk images, version 1.1 (https://forums.virtualbox.org/viewtopic.php?t=8046, https://formats.kaitai.io/vdi/).

A header, a table with the place of each block of 1 MiB, and the blocks. The header says how many blocks are in use, and it is
on the disk before an entry of the table that points to a new one.
"""

from __future__ import annotations

import os
from array import array

from ..blockmap import STORED, BlockFormat, BlockMap, little_endian
from ..cache import read_padded
from ..errors import Corrupt, Unsupported, WrongFormat
from ..extent import RECURSE
from ..node import CHUNK, OpenFlags
from ..ondisk import Struct
from ..options import Options, Size, opt
from ..parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator, Optional

    from diskwright.tally import CheckResult

    from ..node import Node
    from ..ondisk import bytes16, bytes64, bytes256, u32, u64
    from ..options import NodeRef

SECTOR = 512
BLOCK = 1 << 20  # bytes; QEMU reads no other size
VERSION = 0x00010001
MAGIC = b"\x7f\x10\xda\xbe"
MAGIC_AT = 64
TEXT = b"<<< QEMU VM Virtual Disk Image >>>\n"
DYNAMIC, STATIC = 1, 2
FREE = 0xFFFFFFFF  # an entry: there is no block, and there never was one
ZEROED = 0xFFFFFFFE  # an entry: there is no block any more, it reads as zeroes
MAX_BLOCKS = ((1 << 31) - SECTOR) // 4
MAX_SIZE = MAX_BLOCKS * BLOCK
NULL = bytes(16)


class Header(Struct):
    """The header, with the names of VirtualBox's source; before `signature` is a text for people."""

    ORDER = "<"

    text: bytes64 = b""
    signature: u32 = int.from_bytes(MAGIC, "little")
    version: u32 = VERSION
    header_size: u32 = 0x180
    image_type: u32
    image_flags: u32 = 0
    description: bytes256 = b""
    offset_bmap: u32 = SECTOR
    offset_data: u32
    cylinders: u32 = 0
    heads: u32 = 0
    sectors: u32 = 0
    sector_size: u32 = SECTOR
    unused1: u32 = 0
    disk_size: u64
    block_size: u32 = BLOCK
    block_extra: u32 = 0
    blocks_in_image: u32
    blocks_allocated: u32
    uuid_image: bytes16
    uuid_last_snap: bytes16
    uuid_link: bytes16 = NULL
    uuid_parent: bytes16 = NULL


class VdiOptions(Options):
    """Runtime options of vdi."""

    file: NodeRef = opt(help="the node that holds the image")


class VdiCreateOptions(Options):
    """Creation options of vdi."""

    DASHES = False
    SHOWN = ("static",)

    size: Size = opt(0, help="size of the disk")
    static: bool = opt(False, help="give every block its place in the file at once")


class Vdi(BlockFormat):
    """A VDI image."""

    driver = "vdi"
    options_class = VdiOptions
    create_options = VdiCreateOptions
    creatable = True

    def __init__(self, options: VdiOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        head = bytearray(SECTOR)
        read_padded(self.file, 0, memoryview(head))
        header = self.header = Header.unpack(head)
        self._size = check_header(header)
        self.cluster_size = self.block_size = BLOCK
        if header.image_type == STATIC:
            self.stored = STORED | RECURSE
            self.zero_initialized = self.file.zero_initialized
        self.blocks = BlockMap(self.file, header.offset_bmap, header.blocks_in_image, "little", self._lock, self._announce)
        self._limit = header.offset_data + header.blocks_in_image * BLOCK  # no block is behind it
        self._untouched = self.file.size  # what follows was not written by anyone
        self._next = -1  # number of the first block behind all others; -1 until it is wanted
        self._gaps: Optional[Iterator[int]] = None  # numbers of blocks before it that are not in use
        table_end = header.offset_bmap + 4 * header.blocks_in_image
        if flags.writable and (header.offset_bmap < SECTOR or header.offset_data < table_end):
            text = "unsupported VDI image (block map at %#x and data at %#x overlap)" % (header.offset_bmap, header.offset_data)
            raise Corrupt(text, filename=self.filename)

    # -- where blocks are ----------------------------------------------------------------------------------------

    def _runs(self, first: int, count: int) -> Iterable[tuple[int, int, Optional[int]]]:
        start = self.header.offset_data
        for index, length, value, step in self.blocks.runs(first, count, 1):
            if value >= ZEROED and not step:
                yield index, length, None
            elif step and value + length <= ZEROED:
                yield index, length, start + value * BLOCK
            else:  # many entries for one block, or an ascending run that goes on into the markers
                for at in range(length):
                    entry = value + at * step
                    yield index + at, 1, start + entry * BLOCK if entry < ZEROED else None

    def _locate(self, index: int) -> Optional[int]:
        value = self.blocks.get(index)
        if value >= ZEROED:
            return None
        place = self.header.offset_data + value * BLOCK
        if place >= self._limit:
            raise self._outside(index, place)
        return place

    def _take(self, index: int) -> int:
        if self._next < 0:
            self._survey()
        value = next(self._gaps, -1) if self._gaps is not None else -1
        if value < 0:
            value = self._next
            if value >= self.header.blocks_in_image:
                raise Corrupt("%s: no room for block %d, too many blocks are in use" % (self.filename, index), filename=self.filename)
            self._next += 1
        place = self._prepare(self.header.offset_data + value * BLOCK, self._untouched)
        self.blocks.set(index, value)
        return place

    def _survey(self) -> None:
        """Find out which blocks are in use; what the header says need not be true after a crash."""
        most, used = -1, 0
        room = self.header.blocks_in_image
        for _index, length, value, step in self.blocks.runs(0, room, 1):
            if value < room:
                most = max(most, min(value + (length - 1) * step, room - 1))
                used += length
        self._next = most + 1
        if used != self._next:
            self._gaps = self._unused(self._next)

    def _unused(self, end: int, window: int = 1 << 20) -> Iterator[int]:
        """Numbers below `end` of blocks that no entry names."""
        for low in range(0, end, window):
            free = self.blocks.unused(0, 1, low, min(window, end - low))
            at = free.find(1)
            while at >= 0:
                yield low + at
                at = free.find(1, at + 1)

    # -- writing -------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Bring the data, and the number of blocks in the header, to the disk: all that comes before the table."""
        end = self.header.offset_data + self._next * BLOCK
        if self._next > 0 and self.file.size < end:
            self.file.truncate(end, exact=False)
        if 0 <= self._next != self.header.blocks_allocated:
            self.header.blocks_allocated = self._next
            head = bytearray(SECTOR)
            read_padded(self.file, 0, memoryview(head))
            at = Header.OFFSETS["blocks_allocated"]
            head[at : at + 4] = self._next.to_bytes(4, "little")
            self.file.write_hosted(0, memoryview(head))
        self.file.flush()

    def _flush(self) -> None:
        with self._lock:
            if self.blocks.changed:
                self._announce()
                self.blocks.write()

    # -- the image -----------------------------------------------------------------------------------------------

    def _check(self, repair: str) -> CheckResult:
        if repair:
            raise Unsupported("This image format does not support checks", filename=self.filename)
        result: CheckResult = part(__package__, ".tally").CheckResult()
        check_map(self.blocks, self.header, result)
        return result

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head[MAGIC_AT : MAGIC_AT + 4] == MAGIC else 0

    @classmethod
    def check_creation(cls, options: Any) -> None:
        if options.size > MAX_SIZE:
            raise Unsupported(_too_large(options.size))

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        cls.check_creation(options)
        size = -(-options.size // SECTOR) * SECTOR
        count = -(-size // BLOCK)
        table = -(-4 * count // SECTOR) * SECTOR
        header = Header(
            text=TEXT,
            image_type=STATIC if options.static else DYNAMIC,
            offset_data=SECTOR + table,
            disk_size=size,
            blocks_in_image=count,
            blocks_allocated=count if options.static else 0,
            uuid_image=_new_uuid(),
            uuid_last_snap=_new_uuid(),
        )
        file.write_hosted(0, memoryview(header.pack().ljust(SECTOR, b"\0")))
        file.truncate(header.offset_data + (count * BLOCK if options.static else 0), exact=False)
        most = CHUNK // 4
        for first in range(0, count, most):
            length = min(most, count - first)
            entries = array("I", range(first, first + length)) if options.static else array("I", (FREE,)) * length
            file.write_hosted(SECTOR + 4 * first, memoryview(little_endian(entries)))


def check_header(header: Header) -> int:
    """The size of the disk in bytes. Raises WrongFormat or Unsupported for a header that is not right."""
    size = -(-header.disk_size // SECTOR) * SECTOR
    if header.disk_size > MAX_SIZE:
        raise Unsupported(_too_large(header.disk_size))
    if header.signature != Header.signature:
        raise WrongFormat("Image not in VDI format (bad signature %08x)" % header.signature)
    room = header.blocks_in_image * BLOCK
    for wrong, text, values in (
        (header.version != VERSION, "version %d.%d", (header.version >> 16, header.version & 0xFFFF)),
        (header.offset_bmap % SECTOR, "unaligned block map offset 0x%x", (header.offset_bmap,)),
        (header.offset_data % SECTOR, "unaligned data offset 0x%x", (header.offset_data,)),
        (header.sector_size != SECTOR, "sector size %d is not 512", (header.sector_size,)),
        (header.block_size != BLOCK, "block size %d is not 1048576", (header.block_size,)),
        (size > room, "disk size %d, image bitmap has room for %d", (size, room)),
        (header.uuid_link != NULL, "non-NULL link UUID", ()),
        (header.uuid_parent != NULL, "non-NULL parent UUID", ()),
        (header.blocks_in_image > MAX_BLOCKS, "too many blocks %d, max is %d", (header.blocks_in_image, MAX_BLOCKS)),
    ):
        if wrong:
            raise Unsupported("unsupported VDI image (%s)" % (text % values))
    return size


def check_map(blocks: BlockMap, header: Header, result: CheckResult) -> None:
    """Look for entries that point outside the image, or to a block that another one has, and count all."""
    Tally = part(__package__, ".tally").Tally

    room, used = header.blocks_in_image, 0
    tally = Tally(room, 1)
    first_time = True
    while True:
        for index, length, value, step in blocks.runs(0, room, 1):
            valid = max(0, min(length, ZEROED - value if step else length if value < ZEROED else 0))
            inside = max(0, min(valid, room - value if step else valid if value < room else 0))
            used += inside if first_time else 0
            if inside and step:
                for lost in tally.add(value, inside):
                    result.say("ERROR: block index %d also used by %d" % (lost, lost))
                    result.corruptions += 1
            elif inside and tally.inside(value):
                again = inside - 1 + len(tally.add(value, 1))
                result.say("ERROR: block index %d also used by %d" % (value, value), again)
                result.corruptions += again
            for at in range(inside, valid) if first_time else ():
                result.say("ERROR: block index %d too large, is %d" % (index + at, value + at * step))
                result.corruptions += 1
        first_time = False
        if not tally.advance():
            break
    if used != header.blocks_allocated:
        result.say("ERROR: allocated blocks mismatch, is %d, should be %d" % (used, header.blocks_allocated))
        result.corruptions += 1


def _too_large(size: int) -> str:
    return "Unsupported VDI image size (size is %#x, max supported is %#x)" % (size, MAX_SIZE)


def _new_uuid() -> bytes:
    """A random UUID as the format stores it, with its first three fields little-endian."""
    uuid = bytearray(os.urandom(16))
    uuid[7] = uuid[7] & 0x0F | 0x40
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)
