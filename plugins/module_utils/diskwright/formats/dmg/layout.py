# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The trailer, and the block tables that it leads to: in a property list or in a resource fork (https://keramics.github.io/udif.html)."""

from __future__ import annotations

import binascii
from array import array
from bisect import bisect_right
from itertools import islice
from operator import le

from ...errors import Error, refused
from ...ondisk import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...node import Node
    from ...ondisk import bytes4, bytes16, bytes32, bytes64, bytes128, u32, u64

SECTOR = 512
KOLY = b"koly"
MISH = b"mish"
MAX_TABLES = 16 << 20  # bytes of the property list or resource fork
MAX_CHUNK_SECTORS = (64 << 20) // SECTOR  # of a chunk that is not just zero
MAX_CHUNK = 64 << 20  # bytes that it may take in the file
MAX_SECTORS = (1 << 54) - 1  # of the disk
MAX_UNKNOWN = 16  # kinds of chunks that are told of
MAX_HOST = 1 << 62  # bytes; no chunk is behind it

ZERO, RAW, IGNORED = 0, 1, 2
ADC, ZLIB, BZIP2, LZFSE, LZMA = range(0x80000004, 0x80000009)
COMMENT, TERMINATOR = 0x7FFFFFFE, 0xFFFFFFFF
KINDS = (ZERO, RAW, IGNORED, ADC, ZLIB, BZIP2, LZFSE, LZMA)


class Koly(Struct):
    """The trailer."""

    signature: bytes4
    version: u32
    header_size: u32
    flags: u32
    running_data_fork_offset: u64
    data_fork_offset: u64
    data_fork_length: u64
    rsrc_fork_offset: u64
    rsrc_fork_length: u64
    segment_number: u32
    segment_count: u32
    segment_id: bytes16
    data_checksum_type: u32
    data_checksum_size: u32
    data_checksum: bytes128
    xml_offset: u64
    xml_length: u64
    reserved: bytes64
    reserved2: bytes32
    reserved3: bytes16
    reserved4: u64
    checksum_type: u32
    checksum_size: u32
    checksum: bytes128
    image_variant: u32
    sector_count: u64


class BlockTable(Struct):
    """What a block table begins with; entries follow."""

    signature: bytes4
    version: u32
    sector_number: u64
    sector_count: u64
    data_offset: u64
    buffers_needed: u32
    block_descriptors: u32
    reserved: bytes16
    reserved2: u64
    checksum_type: u32
    checksum_size: u32
    checksum: bytes128
    number_of_block_chunks: u32


class BlockEntry(Struct):
    """A chunk of the disk."""

    entry_type: u32
    comment: u32
    sector_number: u64
    sector_count: u64
    compressed_offset: u64
    compressed_length: u64


def find_koly(file: Node) -> tuple[Koly, int]:
    """The trailer and its offset; up to about a sector may follow it. Raises Error where there is none."""
    size = file.size
    if size < SECTOR:
        raise Error("dmg file must be at least 512 bytes long", errno=22)
    start = max(0, -(-size // SECTOR) * SECTOR - 2 * SECTOR + 1)
    raw = file.pread(start, size - start)
    at = raw.find(KOLY, 0, SECTOR + len(KOLY) - 1)
    if at < 0:
        raise Error("Could not locate UDIF trailer in dmg file", errno=22)
    return Koly.unpack(raw[at:].ljust(SECTOR, b"\0")), start + at


def parts(koly: Koly) -> tuple[tuple[str, int, int], ...]:
    """What lies before the trailer: names, offsets and lengths."""
    return (
        ("data fork", koly.data_fork_offset, 0),  # QEMU does not mind its length
        ("resource fork", koly.rsrc_fork_offset, koly.rsrc_fork_length),
        ("property list", koly.xml_offset, koly.xml_length),
    )


class Chunks:
    """The chunks of a disk, ascending: sectors and bytes of the file. None overlaps another.

    `unknown` are the kinds of chunks that were left out, since nobody knows what they are.
    """

    def __init__(self, file: Node) -> None:
        """Read the block tables. Raises Corrupt or Error."""
        koly, end = find_koly(file)
        self._name = file.filename
        self.sectors = koly.sector_count
        if self.sectors >> 63:
            raise self._refused("a disk of %d sectors" % self.sectors)
        if self.sectors > MAX_SECTORS:
            raise Error("Could not refresh total sector count: File too large", errno=27)
        for name, offset, length in parts(koly):
            if offset + length > end:
                raise self._refused("the %s ends at %#x, and the trailer is at %#x" % (name, offset + length, end))
        self.unknown: set[int] = set()
        self._data_fork = koly.data_fork_offset
        self.starts, self.ends, self.kinds, self.offsets, self.lengths = (array("Q") for _part in range(5))
        if koly.rsrc_fork_length:
            self._read_fork(self._read(file, koly.rsrc_fork_offset, koly.rsrc_fork_length))
        elif koly.xml_length:
            self._read_plist(self._read(file, koly.xml_offset, koly.xml_length))
        else:
            raise self._refused("it has neither a property list nor a resource fork")
        self._sort()

    def _sort(self) -> None:
        """Put the chunks in order. Raises Corrupt where two overlap."""
        starts = self.starts
        if not all(map(le, starts, islice(starts, 1, None))):
            order = sorted(range(len(starts)), key=starts.__getitem__)
            for name in ("starts", "ends", "kinds", "offsets", "lengths"):
                values = getattr(self, name)
                setattr(self, name, array("Q", [values[index] for index in order]))
        if not all(map(le, self.ends, islice(self.starts, 1, None))):
            index = next(i for i, (end, start) in enumerate(zip(self.ends, islice(self.starts, 1, None)), 1) if end > start)
            raise self._refused("two chunks hold sector %d" % self.starts[index])

    def _refused(self, why: str) -> Error:
        return refused(self._name, "dmg: " + why)

    def _read(self, file: Node, offset: int, length: int) -> bytearray:
        if length > MAX_TABLES:
            raise self._refused("%d bytes of block tables at %#x" % (length, offset))
        text = bytearray(length)
        file.pread_into(offset, text)
        return text

    def _read_fork(self, text: bytearray) -> None:
        """Resources are a length and as many bytes; those that are block tables say so. Types and names are not needed."""
        fork = memoryview(text)
        start, length = (int.from_bytes(fork[at : at + 4], "big") for at in (0, 8))
        if not start or not length or start + length > len(fork) or start < 4:
            raise self._refused("the resource fork is damaged")
        at, end = start, start + length
        while at < end:
            count = int.from_bytes(fork[at : at + 4], "big")
            if not count or count > end - at - 4:
                raise self._refused("the resource at %#x of the fork is damaged" % at)
            self._add(fork[at + 4 : at + 4 + count])
            at += 4 + count

    def _read_plist(self, text: bytearray) -> None:
        """What is base64 in the property list: those of it that are block tables say so."""
        view = memoryview(text)
        at = text.find(b"<data>")
        while at >= 0:
            stop = text.find(b"</data>", at)
            if stop < 0:
                raise self._refused("the property list is damaged")
            try:
                self._add(memoryview(binascii.a2b_base64(view[at + 6 : stop])))
            except binascii.Error:
                pass  # as in QEMU, for which it is no table then
            at = text.find(b"<data>", stop)

    def _add(self, table: memoryview) -> None:
        """Take the chunks of a block table, if it is one."""
        if table[: len(MISH)] != MISH or len(table) < BlockTable.SIZE:
            return
        header = BlockTable.unpack(table)
        data = self._data_fork + header.data_offset
        # as many entries as there is room for, as in QEMU
        for index, (kind, _comment, number, count, offset, length) in enumerate(BlockEntry.each(table[BlockTable.SIZE :])):
            if kind not in KINDS:
                if kind not in (COMMENT, TERMINATOR) and len(self.unknown) < MAX_UNKNOWN:
                    self.unknown.add(kind)
                continue
            start = header.sector_number + number
            end = start + count
            if kind == ZERO or kind == IGNORED:
                end = min(end, self.sectors)
            elif count > MAX_CHUNK_SECTORS:
                raise self._refused("sector count %d for chunk %d is larger than max (%d)" % (count, index, MAX_CHUNK_SECTORS))
            elif length > MAX_CHUNK:
                raise self._refused("length %d for chunk %d is larger than max (%d)" % (length, index, MAX_CHUNK))
            if start < min(end, self.sectors):
                self.starts.append(start)
                self.ends.append(end)
                self.kinds.append(kind)
                self.offsets.append(min(data + offset, MAX_HOST))
                self.lengths.append(length)

    def at(self, sector: int) -> int:
        """The index of the last chunk that begins at or before `sector`, -1 for none."""
        return bisect_right(self.starts, sector) - 1
