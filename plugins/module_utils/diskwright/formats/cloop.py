# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""cloop: the compressed loop images of Knoppix, version 2.0, read-only (https://wiki.debian.org/cloop).

A preamble that makes the file a shell script, the block size and the number of blocks, a table of where they begin and
end, and the blocks, each a zlib stream. Numbers are big-endian.
"""

from __future__ import annotations

import sys
import zlib
from _thread import allocate_lock
from array import array
from operator import le

from ..errors import Corrupt, ReadOnly
from ..extent import ALLOCATED, COMPRESSED, DATA, Extent
from ..node import Format, OpenFlags
from ..ondisk import Struct
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from typing import Iterable, Optional

    from ..ondisk import u32
    from ..options import NodeRef

MAGIC = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
PREAMBLE = 128  # bytes before the header
SECTOR = 512
MAX_BLOCK = 64 << 20  # bytes
MAX_BLOCKS = ((1 << 32) - 8) // 8
MAX_TABLE = 512 << 20  # bytes of the table
CHECKED_TABLE = 8 << 20  # bytes of a table that is looked at as a whole when the image is opened
PAGE = 8192  # entries of the table that are read at a time
PAGES = 16  # that are kept
KEPT = 8 << 20  # bytes of blocks that are kept, to be read on from; one block is always kept
PIECE = 1 << 20  # bytes that go through the codec at a time
EIO = 5


class Header(Struct):
    """What follows the preamble."""

    block_size: u32  # bytes
    n_blocks: u32


class CloopOptions(Options):
    """Runtime options of cloop."""

    file: NodeRef = opt(help="the node that holds the image")


class Cloop(Format):
    """A compressed loop image."""

    driver = "cloop"
    options_class = CloopOptions
    dirty = None
    opaque = True
    unwritable = True
    decodes = True

    def __init__(self, options: CloopOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if flags.writable:
            raise ReadOnly("Image is read-only")
        header = Header.unpack(self.file.pread(0, min(PREAMBLE + Header.SIZE, self.file.size)), PREAMBLE)
        self.block_size, self.blocks = header.block_size, header.n_blocks
        if not self.block_size:
            raise Corrupt("block_size cannot be zero")
        if self.block_size % SECTOR:
            raise Corrupt("block_size %d must be a multiple of 512" % self.block_size)
        if self.block_size > MAX_BLOCK:
            raise Corrupt("block_size %d must be %d MB or less" % (self.block_size, MAX_BLOCK >> 20))
        if self.blocks > MAX_BLOCKS:
            raise Corrupt("n_blocks %d must be %d or less" % (self.blocks, MAX_BLOCKS))
        if (self.blocks + 1) * 8 > MAX_TABLE:
            raise Corrupt("image requires too many offsets, try increasing block size")
        self._size = self.block_size * self.blocks
        self._pages: dict[int, array[int]] = {}
        self._kept: dict[int, bytes | bytearray] = {}
        self._gates: dict[int, LockType] = {}
        end = PREAMBLE + Header.SIZE + (self.blocks + 1) * 8
        if end > self.file.size:
            raise Corrupt("the table of offsets ends at %#x, but the file at %#x" % (end, self.file.size))
        if (self.blocks + 1) * 8 <= CHECKED_TABLE:
            for number in range(-(-self.blocks // PAGE)):
                self._read_page(number)

    def _changed_flags(self, old: OpenFlags) -> None:
        if self.flags.writable:
            text = "Block format '%s' used by node '%s' does not support reopening files" % (self.driver, self.filename)
            raise ReadOnly(text, filename=self.filename)

    # -- where blocks are ----------------------------------------------------------------------------------------

    def _read_page(self, number: int) -> array[int]:
        """Where the blocks of one page begin, and after them where the last one ends. Raises Corrupt."""
        first = number * PAGE
        count = min(PAGE, self.blocks - first) + 1
        page = array("Q", self.file.pread(PREAMBLE + Header.SIZE + first * 8, count * 8))
        if sys.byteorder == "little":
            page.byteswap()
        begins, ends = page[:-1], page[1:]
        if all(map(le, begins, ends)) and page[-1] - page[0] <= 2 * MAX_BLOCK:
            return page
        for index, (begin, end) in enumerate(zip(begins, ends), first + 1):
            if begin > end:
                raise Corrupt("offsets not monotonically increasing at index %d, image file is corrupt" % index)
            if end - begin > 2 * MAX_BLOCK:
                raise Corrupt("invalid compressed block size at index %d, image file is corrupt" % index)
        return page

    def _stored(self, block: int) -> tuple[int, int]:
        """Where the block begins and ends in the file."""
        number, index = divmod(block, PAGE)
        with self._lock:
            page = self._pages.pop(number, None)
            if page is None:
                page = self._read_page(number)
                while len(self._pages) >= PAGES:
                    del self._pages[next(iter(self._pages))]
            self._pages[number] = page
        return page[index], page[index + 1]

    # -- reading -------------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, DATA | ALLOCATED | COMPRESSED, self, offset),)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        position, end = host_offset, host_offset + len(view)
        while position < end:
            block, at = divmod(position, self.block_size)
            count = min(self.block_size - at, end - position)
            content = self._block(block, keep=count < self.block_size)
            view[position - host_offset : position - host_offset + count] = memoryview(content)[at : at + count]
            position += count

    def _block(self, block: int, keep: bool) -> bytes | bytearray:
        """The content of a block; with `keep` the next one to ask for it finds it here."""
        if not keep:
            return self._inflate(block)
        with self._lock:
            # whoever wants the same block waits for it; large ones are decompressed one at a time, for the memory they take
            gate = self._gates.setdefault(block if self.block_size <= KEPT else 0, allocate_lock())
        with gate:
            content = self._kept.get(block)
            if content is None:
                content = self._inflate(block)
                with self._lock:
                    while self._kept and (len(self._kept) + 1) * self.block_size > KEPT:
                        old = next(iter(self._kept))
                        del self._kept[old]
                        self._gates.pop(old, None)
                    self._kept[block] = content
        return content

    def _inflate(self, block: int) -> bytes | bytearray:
        """Decompress a block. Raises Corrupt unless it is a zlib stream of just the right length."""
        position, end = self._stored(block)
        end = min(end, self.file.size)
        if max(self.block_size, end - position) <= PIECE:
            whole = self._inflate_whole(self.file.pread(position, max(0, end - position)))
            if whole is not None:
                return whole
        content = bytearray()
        codec = zlib.decompressobj()
        rest = b""
        try:
            while not codec.eof:
                if not rest:
                    if position >= end:
                        raise self._damaged(block, "it ends too early")
                    rest = self.file.pread(position, min(PIECE, end - position))
                    position += len(rest)
                content += codec.decompress(rest, PIECE)
                rest = codec.unconsumed_tail
                if len(content) > self.block_size:
                    break
        except zlib.error as exc:
            raise self._damaged(block, str(exc)) from None
        if len(content) != self.block_size:
            raise self._damaged(block, "it is not as long as it should be")
        return content

    def _inflate_whole(self, stored: bytes) -> Optional[bytes]:
        """The block that is stored as `stored`, by the fastest codec there is; None if anything about it is unusual."""
        from ..compression import inflate

        if len(stored) < 6 or stored[0] & 15 != zlib.DEFLATED or stored[1] & 32 or (stored[0] << 8 | stored[1]) % 31:
            return None
        try:
            content = inflate(memoryview(stored)[2:], self.block_size)
        except Corrupt:
            return None
        return content if zlib.adler32(content).to_bytes(4, "big") == stored[-4:] else None

    def preload(self) -> None:
        from .. import compression

        del compression
        super().preload()

    def _damaged(self, block: int, why: str) -> Corrupt:
        return Corrupt("%s: block %d cannot be decompressed: %s" % (self.filename, block, why), filename=self.filename, errno=EIO)

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 2 if head.startswith(MAGIC) else 0
