# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters (https://www.qemu.org/docs/master/interop/qcow2.html#compressed-clusters-descriptor)."""

from __future__ import annotations

from ...cache import read_padded
from ...compression import inflate, zstd_decompress
from ...errors import Corrupt
from ...kernels import contract as kinds
from ...node import fill_zeroes
from .header import ZSTD

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
        elif kind in (kinds.ZERO_PLAIN, kinds.ZERO_ALLOC):
            fill_zeroes(part)
        else:  # overwritten since it was mapped
            image.pread_into(position, part)
        position = stop


def _decompress(image: Qcow2, offset: int, value: int) -> bytes:
    """The guest cluster at `offset`, whose descriptor is `value`. Raises Corrupt."""
    place, length = stored_range(value, image.header.cluster_bits)
    stored = bytearray(length)
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
