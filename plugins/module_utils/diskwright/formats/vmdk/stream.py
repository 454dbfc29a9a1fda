# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A streamOptimized image that goes into a pipe (VMware's "Virtual Disk Format 5.0", Stream-Optimized Compressed Sparse Extents).

Nothing can be changed afterwards, so each grain table follows its grains, the directory follows them all, and a footer at
the very end says where that is.
"""

from __future__ import annotations

from array import array

from ...errors import Error
from ...extent import ALLOCATED, Extent
from ...extent import DATA as STORED
from ...node import Node, OpenFlags
from ...options import Options
from .compressed import BATCH, EFBIG, EINVAL, GRAIN_MARKER, encode_grain
from .create import DESCRIPTOR_SECTOR, DESCRIPTOR_SECTORS, GRAIN, SECTOR, describe, little_endian
from .descriptor import ExtentLine
from .header import (
    COMPRESSED,
    DEFLATE,
    GD_AT_END,
    MARKER_EOS,
    MARKER_FOOTER,
    MARKER_GD,
    MARKER_GT,
    MARKERS,
    MAX_DIRECTORY,
    MAX_TABLE_ENTRIES,
    VALID_NEWLINES,
    Marker,
    SparseHeader,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable

    from .options import VmdkCreateOptions

OVERHEAD = 128  # sectors before the first grain
NAME = "disk.vmdk"  # what the descriptor calls the file, whose name nobody knows


class Stream(Node):
    """An image of `options.size` bytes that takes its grains compressed and in order, and ends when it is closed."""

    driver = "vmdk"
    supports_compression = needs_compression = True
    zero_initialized = True

    def __init__(self, outlet: Node, options: VmdkCreateOptions) -> None:
        super().__init__(Options(), OpenFlags(writable=True))
        self.filename = outlet.filename
        self.children["file"] = outlet
        self._size = -(-options.size // SECTOR) * SECTOR
        self.cluster_size = self.allocation_unit = GRAIN
        span = GRAIN * MAX_TABLE_ENTRIES
        count = -(-self._size // span)
        if count > MAX_DIRECTORY:
            raise Error("L1 size too big", errno=EFBIG)
        self._directory = array("I", [0]) * count
        self._table = array("I", [0]) * MAX_TABLE_ENTRIES
        self._index = -1  # of the table in hand; -1: none
        self._next = 0  # bytes of the stream so far
        self._last = -1  # the last grain written
        self._pending = bytearray()
        self._header = SparseHeader(
            version=3,
            flags=VALID_NEWLINES | COMPRESSED | MARKERS,
            capacity=self._size // SECTOR,
            grainSize=GRAIN // SECTOR,
            descriptorOffset=DESCRIPTOR_SECTOR,
            descriptorSize=DESCRIPTOR_SECTORS,
            gdOffset=GD_AT_END,
            overHead=OVERHEAD,
            compressAlgorithm=DEFLATE,
        )
        text = describe(options, [ExtentLine(self._size // SECTOR, "SPARSE", NAME)])
        if len(text) > DESCRIPTOR_SECTORS * SECTOR:
            raise Error("The descriptor does not fit into %d bytes" % (DESCRIPTOR_SECTORS * SECTOR), errno=EINVAL)
        self._put((self._header.pack() + text).ljust(OVERHEAD * SECTOR, b"\0"))

    def _put(self, data: bytes) -> int:
        """Append `data` in whole sectors; the sector where it begins."""
        sector = self._next // SECTOR
        self._pending += data + bytes(-len(data) % SECTOR)
        self._next = sector * SECTOR + -(-len(data) // SECTOR) * SECTOR
        if self._next > 0xFFFFFFFF * SECTOR:
            raise Error("The file is as large as the format allows", filename=self.filename, errno=EFBIG)
        if len(self._pending) >= BATCH:
            self._write_pending()
        return sector

    def _write_pending(self) -> None:
        data, self._pending = self._pending, bytearray()
        self.children["file"].write_hosted(self._next - len(data), memoryview(data))

    def _put_metadata(self, kind: int, data: bytes) -> int:
        """Append metadata with the marker that announces it; the sector where it begins."""
        self._put(Marker(val=-(-len(data) // SECTOR), size=0, type=kind).pack())
        return self._put(data)

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, STORED | ALLOCATED, self, offset),)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        raise Error("%s: a pipe cannot be read back" % self.filename, filename=self.filename, errno=EINVAL)

    def _encode(self, view: memoryview) -> bytes:
        return encode_grain(view)

    def _pwrite_compressed(self, offset: int, view: memoryview) -> None:
        self._pwrite_encoded(offset, view, self._encode(view))

    def _pwrite_encoded(self, offset: int, view: memoryview, encoded: bytes) -> None:
        """Append a grain. Raises Error (EINVAL) for one that is not whole, or does not come after the one before."""
        number = offset // GRAIN
        if offset % GRAIN or len(view) != min(GRAIN, self._size - offset) or number <= self._last:
            raise Error("a stream takes whole grains, in order", filename=self.filename, offset=offset, errno=EINVAL)
        index, entry = divmod(number, MAX_TABLE_ENTRIES)
        if index != self._index:
            self._end_table()
            self._index = index
        self._last = number
        self._table[entry] = self._put(GRAIN_MARKER.pack(offset // SECTOR, len(encoded)) + encoded)

    def _end_table(self) -> None:
        if self._index >= 0:
            self._directory[self._index] = self._put_metadata(MARKER_GT, little_endian(self._table))
            self._table = array("I", [0]) * MAX_TABLE_ENTRIES

    def _close(self) -> None:
        self._end_table()
        self._header.gdOffset = self._put_metadata(MARKER_GD, little_endian(self._directory) or bytes(SECTOR))
        self._put_metadata(MARKER_FOOTER, self._header.pack())
        self._put(Marker(val=0, size=0, type=MARKER_EOS).pack())
        self._write_pending()
