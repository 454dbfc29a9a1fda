# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""How large an image will be (https://www.qemu.org/docs/master/tools/qemu-img.html, measure)."""

from __future__ import annotations

from ...errors import OptionError
from ...extent import DATA
from ...node import Measure
from .create import check_combination, check_values
from .header import MAX_L1_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...node import Node
    from .options import Qcow2CreateOptions

WINDOW = 1 << 40  # bytes of the source that are looked at in one go
EXTENTS = 4096  # and the most extents


def measure(options: Qcow2CreateOptions, source: Optional[Node]) -> Measure:
    """The bytes of an image made with `options`, with the content of `source`. Raises OptionError in QEMU's words."""
    version = check_values(options, measuring=True)
    check_combination(options, version, measuring=True)
    cluster_size = options.cluster_size
    size = source.size if source is not None else options.size
    aligned = -(-size // cluster_size) * cluster_size
    entry_size = 16 if options.extended_l2 else 8
    if -(-size // (cluster_size * (cluster_size // entry_size))) * 8 > MAX_L1_SIZE:
        raise OptionError("The image size is too large (try using a larger cluster size)")
    metadata = metadata_size(aligned, cluster_size, options.refcount_bits, entry_size)
    if source is None:
        required = 0
    else:
        required = _data(source, cluster_size)
    if options.preallocation in ("full", "falloc") or source is not None and (options.backing_file is not None or source.opaque):
        required = aligned
    if options.encrypt_format == "luks":
        from .encryption import header_size

        metadata += -(-header_size(options) // cluster_size) * cluster_size
    bitmaps = None
    if source is not None and version >= 3 and source.stores_bitmaps:
        from .bitmaps import space

        bitmaps = space(source.bitmaps() or (), size, cluster_size)
    return Measure(metadata + required, metadata + aligned, bitmaps)


def metadata_size(aligned: int, cluster_size: int, refcount_bits: int, entry_size: int) -> int:
    """Bytes of header, tables and refcounts of an image whose `aligned` guest bytes are all stored."""
    entries = cluster_size // entry_size
    data = aligned // cluster_size
    l2 = -(-data // entries)
    l1 = -(-l2 * 8 // cluster_size)
    counted = 1 + l1 + l2 + data
    per_block = cluster_size * 8 // refcount_bits
    table = blocks = 0
    while True:
        more_blocks = -(-(counted + blocks + table) // per_block)
        more_table = -(-more_blocks * 8 // cluster_size)
        if (more_blocks, more_table) == (blocks, table):
            return (1 + l1 + l2 + blocks + table) * cluster_size
        blocks, table = more_blocks, more_table


def _data(source: Node, cluster_size: int) -> int:
    """Bytes of the clusters in which the source has data."""
    position, total, counted = 0, 0, 0
    while position < source.size:
        window = source.resolve(position, min(WINDOW, source.size - position), True, EXTENTS)
        for extent in window:
            if extent.status & DATA:
                first = max(extent.offset // cluster_size, counted)
                counted = -(-(extent.offset + extent.length) // cluster_size)
                total += max(0, counted - first)
        position = window[-1].offset + window[-1].length
    return total * cluster_size
