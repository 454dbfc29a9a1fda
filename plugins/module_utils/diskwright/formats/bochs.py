# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""bochs: the growing disk images of the Bochs emulator, read-only (https://bochs.sourceforge.io/doc/docbook/development/harddisk-redologs.html).

docs/adding-a-format.md explains this file line by line.
"""

from __future__ import annotations

import sys
from array import array

from ..cache import read_padded
from ..errors import Corrupt, ReadOnly, WrongFormat
from ..extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from ..node import Format, OpenFlags
from ..ondisk import Struct
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Iterator

    from ..ondisk import bytes16, bytes32, u32, u64
    from ..options import NodeRef

MAGIC = b"Bochs Virtual HD Image"
TYPE = b"Redolog"
SUBTYPE = b"Growing"
VERSION_1 = 0x00010000
VERSION_2 = 0x00020000
SECTOR = 512
FREE = 0xFFFFFFFF  # catalog entry of an extent that is not there
MAX_CATALOG = 1 << 20  # entries; what the largest image needs that bximage makes
MAX_EXTENT = 8 << 20  # bytes


class Header(Struct):
    """What all of Bochs' images begin with."""

    ORDER = "<"

    magic: bytes32
    type: bytes16
    subtype: bytes16
    version: u32
    header: u32  # where the catalog begins, in bytes
    catalog: u32  # its entries
    bitmap: u32  # bytes that say which sectors of an extent are there
    extent: u32  # bytes


class SizeV1(Struct):
    """Version 1: what follows the header."""

    ORDER = "<"

    disk: u64  # bytes


class SizeV2(Struct):
    """Version 2: what follows the header."""

    ORDER = "<"

    timestamp: u32
    disk: u64  # bytes


class BochsOptions(Options):
    """Runtime options of bochs."""

    file: NodeRef = opt(help="the node that holds the image")


class Bochs(Format):
    """A growing image of Bochs."""

    driver = "bochs"
    options_class = BochsOptions
    dirty = None
    opaque = True
    unwritable = True

    def __init__(self, options: BochsOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if flags.writable:
            raise ReadOnly("Image is read-only")
        head = self.file.pread(0, min(SECTOR, self.file.size))
        if not _is_bochs(head):
            raise WrongFormat("Image not in Bochs format")
        header = Header.unpack(head)
        kind = SizeV1 if header.version == VERSION_1 else SizeV2
        sectors = kind.unpack(head, Header.SIZE).disk // SECTOR
        if header.catalog > MAX_CATALOG:
            raise Corrupt("Catalog size is too large")
        if header.extent < SECTOR:
            raise Corrupt("Extent size must be at least 512")
        if header.extent & (header.extent - 1):
            raise Corrupt("Extent size %d is not a power of two" % header.extent)
        if header.extent > MAX_EXTENT:
            raise Corrupt("Extent size %d is too large" % header.extent)
        if header.catalog < -(-sectors * SECTOR // header.extent):
            raise Corrupt("Catalog size is too small for this disk size")
        if header.bitmap * 8 < header.extent // SECTOR:
            raise Corrupt("Bitmap size %d is too small for this extent size" % header.bitmap)
        self._size = sectors * SECTOR
        self.extent = header.extent
        self.bitmap = -(-header.bitmap // SECTOR) * SECTOR
        self.data = header.header + header.catalog * 4
        if self.data > self.file.size:
            raise Corrupt("The catalog ends at %#x, but the file at %#x" % (self.data, self.file.size), offset=header.header)
        self.catalog = array("I", self.file.pread(header.header, header.catalog * 4))
        if sys.byteorder == "big":
            self.catalog.byteswap()

    def _changed_flags(self, old: OpenFlags) -> None:
        if self.flags.writable:
            text = "Block format '%s' used by node '%s' does not support reopening files" % (self.driver, self.filename)
            raise ReadOnly(text, filename=self.filename)

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        end = offset + length
        index = offset // self.extent
        while index * self.extent < end:
            stop = index + 1
            if self.catalog[index] != FREE:
                yield from self._map_extent(index)
            else:
                while stop * self.extent < end and self.catalog[stop] == FREE:
                    stop += 1
                yield Extent(index * self.extent, (stop - index) * self.extent, ZERO | ALLOCATED)
            index = stop

    def _map_extent(self, index: int) -> Iterator[Extent]:
        """The sectors of one extent: those whose bit is set are there, the others are zero."""
        from ..kernels import bit_runs

        place = self.data + self.catalog[index] * (self.bitmap + self.extent)
        count = self.extent // SECTOR
        bits = bytearray(-(-count // 8))
        read_padded(self.file, place, memoryview(bits))
        start = index * self.extent
        done = 0
        for first, run in bit_runs(bits, 0, count, count):
            if first > done:
                yield Extent(start + done * SECTOR, (first - done) * SECTOR, ZERO | ALLOCATED)
            done = first + run
            status = DATA | OFFSET_VALID | ALLOCATED
            yield Extent(start + first * SECTOR, run * SECTOR, status, self.file, place + self.bitmap + first * SECTOR)
        if done < count:
            yield Extent(start + done * SECTOR, (count - done) * SECTOR, ZERO | ALLOCATED)

    def preload(self) -> None:
        from ..kernels import bit_runs

        del bit_runs
        super().preload()

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if _is_bochs(head) else 0


def _is_bochs(head: bytes) -> bool:
    """Whether an image that begins with `head` is one, of a kind and a version that can be read."""
    if len(head) < SECTOR:
        return False
    header = Header.unpack(head)
    texts = [text.partition(b"\0")[0] for text in (header.magic, header.type, header.subtype)]
    return texts == [MAGIC, TYPE, SUBTYPE] and header.version in (VERSION_1, VERSION_2)
