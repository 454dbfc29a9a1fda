# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The VM state: guest clusters behind the end of the disk (https://www.qemu.org/docs/master/interop/qcow2.html#snapshots).

It begins where the first L2 table begins that maps nothing of the disk.
"""

from __future__ import annotations

import errno

from ...errors import Error, Unsupported
from ...node import fill_zeroes
from .header import MAX_L1_SIZE, l1_entries

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .image import Qcow2


def state_offset(image: Qcow2) -> int:
    """Where the VM state begins, in guest bytes."""
    return l1_entries(image.header, image.size) * image.table_span


def read_state(image: Qcow2, offset: int, view: memoryview) -> None:
    """Fill `view` with bytes of the VM state; the backing file has none of it."""
    image.mention("vmstate_load")
    start = state_offset(image) + offset
    inside = max(0, min(len(view), len(image.tables.l1) * image.table_span - start))
    fill_zeroes(view[inside:])
    for at, length, _status, host, host_offset in image.resolve(start, inside, own=True) if inside else ():
        part = view[at - start : at - start + length]
        if host is None:
            fill_zeroes(part)
        else:
            host.read_own(host_offset, part)


def write_state(image: Qcow2, offset: int, view: memoryview) -> None:
    """Write bytes of the VM state, in whole clusters: what is around them is kept. Raises Error where there is no room for them."""
    from .resize import grow_l1

    if image.data_file is not image.file:
        raise Unsupported("The VM state of an image with an external data file cannot be stored", filename=image.filename, errno=errno.ENOTSUP)
    start, size = state_offset(image), image.cluster_size
    first, end = offset // size * size, -(-(offset + len(view)) // size) * size
    entries = -(-(start + end) // image.table_span)
    if entries * 8 > MAX_L1_SIZE:
        raise Error("Failed to grow the L1 table: File too large", filename=image.filename, errno=errno.EFBIG)
    with image._lock:
        if entries > image.header.l1_size:
            grow_l1(image, entries)
    image.mention("vmstate_save")
    for at in range(first, end, size):
        whole = memoryview(bytearray(size))
        low, high = max(at, offset), min(at + size, offset + len(view))
        if high - low < size:
            read_state(image, at, whole)
        whole[low - at : high - at] = view[low - offset : high - offset]
        image._write(start + at, whole)
