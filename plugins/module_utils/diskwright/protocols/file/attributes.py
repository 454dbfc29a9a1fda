# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The attributes of host files that a new image gets (https://man7.org/linux/man-pages/man2/ioctl_fsgetxattr.2.html)."""

from __future__ import annotations

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_FS_XFLAG_EXTSIZE = 0x800
_FSXATTR = "5I8x"  # struct fsxattr: xflags, extsize, nextents, projid, cowextsize


def set_nocow(fd: int) -> None:
    """Ask for no copy-on-write in this empty file (btrfs); other file systems ignore it, and so do we their errors."""
    from fcntl import ioctl
    from struct import pack, unpack

    try:
        flags = unpack("l", ioctl(fd, _FS_IOC_GETFLAGS, pack("l", 0)))[0]
        ioctl(fd, _FS_IOC_SETFLAGS, pack("l", flags | _FS_NOCOW_FL))
    except OSError:
        pass


def set_extent_size_hint(fd: int, hint: int) -> None:
    """Ask for extents of `hint` bytes in this empty file (XFS); other file systems ignore it, and so do we their errors."""
    from fcntl import ioctl
    from struct import pack, unpack

    if not 0 < hint < 1 << 32:
        return
    try:
        xflags, _extsize, nextents, projid, cowextsize = unpack(_FSXATTR, ioctl(fd, _FS_IOC_FSGETXATTR, bytes(28)))
        ioctl(fd, _FS_IOC_FSSETXATTR, pack(_FSXATTR, xflags | _FS_XFLAG_EXTSIZE, hint, nextents, projid, cowextsize))
    except OSError:
        pass


def extent_size_hint(fd: int) -> int:
    """The extent size hint of an open file in bytes, 0 for none."""
    from fcntl import ioctl
    from struct import unpack

    try:
        return int(unpack(_FSXATTR, ioctl(fd, _FS_IOC_FSGETXATTR, bytes(28)))[1])
    except OSError:
        return 0
