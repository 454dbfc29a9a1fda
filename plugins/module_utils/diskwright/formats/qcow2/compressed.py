# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters (https://www.qemu.org/docs/master/interop/qcow2.html#compressed-clusters-descriptor)."""

from __future__ import annotations

from ...cache import read_padded
from ...compression import deflate, inflate, zstd_compress, zstd_decompress
from ...errors import Corrupt, Error, Unsupported
from ...kernels import contract as kinds
from .header import COMPRESSED, ZSTD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .image import Qcow2

SECTOR = 512
EIO = 5


def descriptor_bits(cluster_bits: int) -> int:
    """The width of the host offset in a descriptor; the count of additional sectors is above it."""
    return 62 - (cluster_bits - 8)


def stored_range(value: int, cluster_bits: int) -> tuple[int, int]:
    """(host offset, length in bytes) of the sectors that a descriptor names."""
    bits = descriptor_bits(cluster_bits)
    offset = value & ((1 << bits) - 1)
    return offset, ((value >> bits) + 1) * SECTOR - offset % SECTOR


def read_compressed(image: Qcow2, offset: int, view: memoryview) -> None:
    """Fill `view` with guest bytes from `offset` on, all of them in compressed clusters."""
    cluster_size = image.cluster_size
    position, end = offset, offset + len(view)
    while position < end:
        start = position // cluster_size * cluster_size
        stop = min(start + cluster_size, end)
        part = view[position - offset : stop - offset]
        with image._lock:
            kind, value = image.tables.find(start)
        if kind == kinds.COMPRESSED:
            part[:] = memoryview(_decompress(image, start, value))[position - start : stop - start]
        else:  # overwritten since it was mapped
            image.pread_into(position, part)
        position = stop


def _decompress(image: Qcow2, offset: int, value: int) -> bytes:
    """The guest cluster at `offset`, whose descriptor is `value`. Raises Corrupt."""
    place, length = stored_range(value, image.header.cluster_bits)
    stored = bytearray(length)
    image.mention("read_compressed")
    read_padded(image.file, place, memoryview(stored))
    codec = zstd_decompress if image.header.compression_type == ZSTD else inflate
    try:
        return codec(stored, image.cluster_size)
    except Corrupt as exc:
        raise Corrupt(
            "%s: the compressed cluster of guest offset %#x cannot be read: %s" % (image.filename, offset, exc),
            filename=image.filename,
            offset=place,
            errno=EIO,
        ) from exc


def write_compressed(image: Qcow2, offset: int, view: memoryview) -> None:
    """Store the cluster at guest `offset` compressed, or plain where that would not make it smaller.

    Only the last cluster of the image may be short. Raises Error (EINVAL) for anything but one cluster.
    """
    write_encoded(image, offset, view, encode(image, view))


def encode(image: Qcow2, view: memoryview) -> bytes:
    """A cluster compressed; a short one is filled up with zeroes."""
    missing = image.cluster_size - len(view)
    whole = memoryview(bytes(view) + bytes(missing)) if missing > 0 else view
    return (zstd_compress if image.header.compression_type == ZSTD else deflate)(whole)


def write_encoded(image: Qcow2, offset: int, view: memoryview, stored: bytes) -> None:
    """The second half of write_compressed, when `stored` is what encode made of `view`."""
    size = image.cluster_size
    if offset % size or len(view) != size and (len(view) > size or offset + len(view) != image.size):
        raise Error("compressed writes need whole clusters", filename=image.filename, offset=offset, errno=22)
    if image.tables.external:
        raise Unsupported("compressed clusters cannot be in an external data file", filename=image.filename, errno=95)
    if len(stored) >= size:
        image.pwrite(offset, view)
        return
    entry = image.serialise(offset, size)
    try:
        _store(image, offset, stored)
    finally:
        image.release(entry)


def _store(image: Qcow2, offset: int, stored: bytes) -> None:
    from .write import set_entries, table_parts, trim_freed

    size, bits = image.cluster_size, descriptor_bits(image.header.cluster_bits)
    with image._lock:
        place = image.refcounts.allocate_bytes(len(stored))
        if place >> bits:
            raise Error("compressed clusters cannot be stored beyond %#x" % (1 << bits), filename=image.filename, errno=27)
        image.overlap.check(place, len(stored))
    try:
        image.mention("l2_update_compressed", "write_compressed")
        image.file.write_hosted(place, memoryview(stored))
    except BaseException:
        with image._lock:
            image.refcounts.give_back(place // size, (place + len(stored) - 1) // size - place // size + 1)
        raise
    sectors = (place + len(stored) - 1) // SECTOR - place // SECTOR
    value = COMPRESSED | sectors << bits | place
    with image._lock:
        for _position, l2_offset, first, _count in table_parts(image, offset, offset + size, create=True):
            set_entries(image, l2_offset, first, value.to_bytes(8, "big").ljust(image.tables.entry_size, b"\0"))
        trim_freed(image)
