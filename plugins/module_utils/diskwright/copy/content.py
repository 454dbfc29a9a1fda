# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The content checksum: of what a disk reads as, whatever format holds it and however sparse that is.

It is SHA-256 (https://csrc.nist.gov/pubs/fips/180-4/upd1/final) over the SHA-256 digests of the disk's blocks of 64 KiB in their order, of which the
last may be short. Blocks of zeroes have a digest that is known beforehand, so that holes cost nothing, and blocks can be read in any order.
"""

from __future__ import annotations

from _thread import allocate_lock
from hashlib import sha256

from ..extent import DATA, ZERO, Extent
from ..filter import Witness
from ..options import NodeRef, Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional

    from ..node import Node

BLOCK = 1 << 16  # bytes
AHEAD = 1 << 15  # digests that wait for those of earlier blocks, at most: some 6 MiB
EXTENTS = 1024  # that are asked for at a time
ZEROES = sha256(bytes(BLOCK)).digest()


class ContentOptions(Options):
    file: NodeRef = opt()


class Content(Witness):
    """`node`, all of which is read through here by a copy; `checksum` says what it was."""

    driver = "content"
    options_class = ContentOptions

    def __init__(self, node: Node) -> None:
        super().__init__(ContentOptions(file=node), node.flags)
        self.filename = node.filename
        self._order = allocate_lock()
        self._digests: dict[int, bytes] = {}  # of blocks that were read, by number
        self._total = sha256()
        self._next = 0  # the first block that is not in _total

    def resolve(self, offset: int, length: int, want_zero: bool = False, limit: int = 0, own: bool = False) -> list[Extent]:
        found = super().resolve(offset, length, want_zero, limit, own)
        if own:
            return found  # an overlay copies a part: what it does not read is read at the end
        return _whole_blocks(found, offset, found[-1][0] + found[-1][1] if found else offset, self)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        super()._pread_into(host_offset, view)
        size = self.size
        start = -host_offset % BLOCK
        while start < len(view) and host_offset + start < size:
            stop = min(start + BLOCK, size - host_offset)
            if stop > len(view):
                break
            self._digests[(host_offset + start) // BLOCK] = sha256(view[start:stop]).digest()
            start = stop
        if len(self._digests) > AHEAD:
            with self._order:
                self._advance((self._next + AHEAD) * BLOCK, None)
                for late in [number for number in list(self._digests) if number < self._next]:
                    self._digests.pop(late, None)  # it was read again meanwhile

    def checksum(self, progress: Optional[Callable[[int, int], None]] = None) -> str:
        """The checksum of the whole disk, in hexadecimal digits; what was not read yet is read now. Raises Error, OSError."""
        with self._order:
            self._advance(self.size, progress)
        return self._total.hexdigest()

    def _advance(self, end: int, progress: Optional[Callable[[int, int], None]]) -> None:
        """Take the digests of all blocks before `end` into the total."""
        size = self.size
        end = min(end, size)
        while self._next * BLOCK < end:
            before, reached = self._next, 0
            for start, length, status, _host, _host_offset in super().resolve(before * BLOCK, end - before * BLOCK, limit=EXTENTS):
                reached = start + length
                if status & DATA:
                    self._take_zeroes(start // BLOCK)
                    self._take_data(-(-reached // BLOCK))
            self._take_zeroes(reached // BLOCK if reached < size else -(-size // BLOCK))
            if self._next == before:
                self._take_data(before + 1)
            if progress is not None:
                progress(min(self._next * BLOCK, size), size)

    def _take_data(self, last: int) -> None:
        """Blocks up to number `last`, which were read or have to be."""
        buffer = memoryview(bytearray(BLOCK))
        while self._next < last:
            digest = self._digests.pop(self._next, None)
            if digest is None:
                view = buffer[: min(BLOCK, self.size - self._next * BLOCK)]
                self.file.pread_into(self._next * BLOCK, view)
                digest = sha256(view).digest()
            self._total.update(digest)
            self._next += 1

    def _take_zeroes(self, last: int) -> None:
        """Blocks up to number `last`, in which there is no data."""
        whole = min(last, self.size // BLOCK)
        while self._next < whole:
            count = min(whole - self._next, 1 << 14)
            self._total.update(ZEROES * count)
            self._next += count
        if self._next < last:  # the last one of the disk, which is short
            self._total.update(sha256(bytes(self.size % BLOCK)).digest())
            self._next += 1


def _whole_blocks(extents: list[Extent], offset: int, end: int, host: Node) -> list[Extent]:
    """The extents of a range of which `host` is to read whole blocks, wherever there is data in one."""
    ranges: list[list[int]] = []
    for start, length, status, _host, _host_offset in extents:
        if status & DATA:
            first, last = max(offset, start // BLOCK * BLOCK), min(end, -(-(start + length) // BLOCK) * BLOCK)
            if ranges and first <= ranges[-1][1]:
                ranges[-1][1] = last
            else:
                ranges.append([first, last])
    grown = []
    for first, last in ranges:
        if first > offset:
            grown.append(Extent(offset, first - offset, ZERO))
        grown.append(Extent(first, last - first, DATA, host, first))
        offset = last
    if offset < end:
        grown.append(Extent(offset, end - offset, ZERO))
    return grown


def content_checksum(node: Node, progress: Optional[Callable[[int, int], None]] = None) -> str:
    """The content checksum of `node`, which is read for it. Raises Error, OSError."""
    content = Content(node)
    found = content.checksum(progress)
    content.children.clear()
    return found
