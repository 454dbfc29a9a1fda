# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Direct I/O: which alignment an open file insists on (https://man7.org/linux/man-pages/man2/statx.2.html)."""

from __future__ import annotations

import os

from ...node import aligned_buffer

SMALLEST = 512  # bytes; no storage has smaller blocks
LARGEST = 4096  # bytes; also the alignment of the buffers, which are whole pages

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256  # bytes of struct statx
_DIO_OFFSET_ALIGN = 156  # where stx_dio_offset_align is
_BLKSSZGET = 0x1268


def request_alignment(fd: int) -> int:
    """Bytes of which offsets and lengths of direct requests on `fd` must be multiples: what the kernel says, else the
    logical block size of the device, else the first one that a trial read accepts."""
    return _told_by_statx(fd) or _told_by_device(fd) or _told_by_trial(fd)


def _told_by_statx(fd: int) -> int:
    try:
        import ctypes

        statx = ctypes.CDLL(None, use_errno=True).statx
    except (ImportError, OSError, AttributeError):
        return 0
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return 0
    import sys

    if not int.from_bytes(buffer.raw[:4], sys.byteorder) & _STATX_DIOALIGN:
        return 0
    told = int.from_bytes(buffer.raw[_DIO_OFFSET_ALIGN : _DIO_OFFSET_ALIGN + 4], sys.byteorder)
    return max(told, SMALLEST) if 0 < told <= 1 << 20 and told & told - 1 == 0 else 0


def _told_by_device(fd: int) -> int:
    from fcntl import ioctl
    from struct import unpack

    try:
        return max(int(unpack("i", ioctl(fd, _BLKSSZGET, bytes(4)))[0]), SMALLEST)
    except OSError:
        return 0


def _told_by_trial(fd: int) -> int:
    align = SMALLEST
    buffer = aligned_buffer(LARGEST)
    while align < LARGEST:
        try:
            os.preadv(fd, [buffer[:align]], 0)
            return align
        except OSError:
            align *= 2
    return LARGEST
