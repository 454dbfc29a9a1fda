# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Compressed grains (VMware's "Virtual Disk Format 5.0", Stream-Optimized Compressed Sparse Extents).

Grains are appended, each once, in whole sectors. They are gathered into large writes; several that lie together are read at once.
"""

from __future__ import annotations

import struct
import zlib

from ...cache import read_padded
from ...errors import Corrupt, Error
from ...node import fill_zeroes
from .extents import DATA, HOLE, SparseExtent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .image import Vmdk

SECTOR = 512
GRAIN_MARKER = struct.Struct("<QI")  # sector of the disk, bytes that follow
BATCH = 1 << 20  # bytes that are gathered before they are written
READ_MAX = 2 << 20  # bytes that are read at once
EIO, EINVAL, EFBIG = 5, 22, 27


def read_compressed(image: Vmdk, offset: int, view: memoryview) -> None:
    """Fill `view` with bytes of the disk from `offset` on that are in compressed grains. Raises Corrupt, Error."""
    for extent, at, count in image.parts(offset, len(view)):
        start = extent.start + at - offset
        if isinstance(extent, SparseExtent) and extent.compressed:
            _read_grains(image, extent, at, view[start : start + count])
        elif image.has_stale_parent():
            raise _stale(image)
        else:
            image.pread_into(offset + start, view[start : start + count])


def _stale(image: Vmdk) -> Error:
    text = "%s: the backing file is not what it was when this image was laid over it (parentCID)" % image.filename
    return Error(text, filename=image.filename, errno=EINVAL)


def _read_grains(image: Vmdk, extent: SparseExtent, offset: int, view: memoryview) -> None:
    grain = extent.grain
    first, last = offset // grain, (offset + len(view) - 1) // grain
    with image._lock:
        places = [extent.find(number * grain) for number in range(first, last + 1)]
        if extent.pending:
            write_pending(extent)
    window = _Window(extent)
    for number, (kind, place) in enumerate(places, first):
        low = max(offset, number * grain)
        part = view[low - offset : min(offset + len(view), (number + 1) * grain) - offset]
        if kind == DATA:
            following = [where for kind, where in places[number - first + 1 :] if kind == DATA]
            inflated = _inflated(image, extent, number, window.stored(place, following))
            low -= number * grain
            if len(inflated) < low + len(part):
                raise _damaged(image, extent, number, "it holds %d bytes" % len(inflated))
            part[:] = memoryview(inflated)[low : low + len(part)]
        elif kind == HOLE and image.backing is not None:
            if image.has_stale_parent():
                raise _stale(image)
            image.pread_into(extent.start + low, part)
        else:
            fill_zeroes(part)


class _Window:
    """A stretch of the file that was read ahead, since grains lie one after the other."""

    def __init__(self, extent: SparseExtent) -> None:
        self.extent = extent
        self.start = 0
        self.data = memoryview(b"")

    def stored(self, place: int, following: list[int]) -> memoryview:
        """What is stored of the grain at `place` of the file; `following` are the places of those that are wanted next.

        Empty if its size is nonsense.
        """
        extent = self.extent
        most = 2 * extent.grain
        if not extent.layout.markers:
            return self._bytes(place, most, place + most)
        end = place + SECTOR
        for where in following:
            if not end <= where <= place + READ_MAX or where - end > most:
                break
            end = where + SECTOR
        # the last one is about as long as those before it
        guess = end + max(min((end - place) // (len(following) or 1), most), 8 * SECTOR)
        _sector, size = GRAIN_MARKER.unpack(self._bytes(place, GRAIN_MARKER.size, guess))
        if not 0 < size <= most:
            return memoryview(b"")
        return self._bytes(place + GRAIN_MARKER.size, size, place + size + SECTOR)

    def _bytes(self, place: int, length: int, ahead: int) -> memoryview:
        """`length` bytes at `place` of the file; if they must be read, then everything up to `ahead`."""
        at = place - self.start
        if at < 0 or at + length > len(self.data):
            buffer = memoryview(bytearray(max(length, min(ahead - place, READ_MAX))))
            read_padded(self.extent.file, place, buffer)
            self.start, self.data, at = place, buffer, 0
        return self.data[at : at + length]


def _inflated(image: Vmdk, extent: SparseExtent, number: int, stored: memoryview) -> bytes:
    """The content of a grain; never longer than a grain."""
    try:
        if not len(stored):
            raise _damaged(image, extent, number, "its size is not that of a grain")
        codec = zlib.decompressobj()
        data = codec.decompress(stored, extent.grain)
        if not codec.eof and codec.decompress(codec.unconsumed_tail, 1) or not codec.eof:
            raise _damaged(image, extent, number, "it is longer than a grain, or it is cut off")
        return data
    except zlib.error as exc:
        raise _damaged(image, extent, number, str(exc)) from exc


def _damaged(image: Vmdk, extent: SparseExtent, number: int, why: str) -> Corrupt:
    place = extent.start + number * extent.grain
    text = "%s: the compressed grain at %#x cannot be read: %s" % (image.filename, place, why)
    return Corrupt(text, filename=image.filename, offset=place, errno=EINVAL)


def encode_grain(view: memoryview) -> bytes:
    """A grain compressed; a short one is the last of the disk."""
    return zlib.compress(view)


def write_whole(image: Vmdk, offset: int, view: memoryview) -> None:
    """Write whole grains (the last of an extent may be short), compressing them. Raises Error (EINVAL) for parts of grains."""
    for extent, at, count in image.parts(offset, len(view)):
        if not isinstance(extent, SparseExtent) or not extent.compressed:
            raise Error("no compressed grains here", filename=image.filename, offset=offset, errno=EINVAL)
        start = extent.start + at - offset
        for position in range(at, at + count, extent.grain):
            part = view[start + position - at : start + min(position - at + extent.grain, count)]
            write_encoded(image, extent.start + position, part, encode_grain(part))


def write_encoded(image: Vmdk, offset: int, view: memoryview, stored: bytes) -> None:
    """Append the grain at `offset` of the disk, of which `stored` is what encode made.

    Raises Error: EINVAL for anything but a whole grain, EIO where the disk has the grain already.
    """
    extent = image.at(offset)
    at = offset - extent.start
    if not isinstance(extent, SparseExtent) or not extent.compressed:
        raise Error("Compression not supported for this file format", filename=image.filename, errno=95)
    if at % extent.grain or len(view) != min(extent.grain, extent.size - at):
        raise Error("a streamOptimized image takes whole grains", filename=image.filename, offset=offset, errno=EINVAL)
    from .write import change_cid, first_free, set_entries

    with image._lock:
        change_cid(image)
        if extent.find(at)[0] == DATA:
            raise Error("Could not write to allocated cluster for streamOptimized", filename=image.filename, offset=offset, errno=EIO)
        place = first_free(extent)
        if not extent.pending:
            extent.pending_at = place
        record = GRAIN_MARKER.pack((extent.start + at) // SECTOR, len(stored)) + stored if extent.layout.markers else stored
        extent.pending += record + bytes(-len(record) % SECTOR)
        extent.next = extent.pending_at + len(extent.pending)
        if extent.next > 0xFFFFFFFF * SECTOR:
            raise Error("The file is as large as the format allows", filename=image.filename, errno=EFBIG)
        set_entries(extent, at, 1, place // SECTOR)
        if len(extent.pending) >= BATCH:
            write_pending(extent)


def write_pending(extent: SparseExtent) -> None:
    """Write the grains that were gathered. The caller holds the lock."""
    if extent.pending:
        extent.file.write_hosted(extent.pending_at, memoryview(extent.pending))
        extent.pending = bytearray()
