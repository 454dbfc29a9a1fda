# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""All that is used of libgfapi (https://github.com/gluster/glusterfs/blob/devel/api/src/glfs.h), declared. Its calls set errno."""

from __future__ import annotations

from ctypes import Structure, c_char_p, c_int, c_int64, c_long, c_size_t, c_ssize_t, c_uint, c_ulong, c_void_p

from .. import clibrary

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SONAMES = ("libgfapi.so.0",)
PACKAGES = "libgfapi0 (Debian, Ubuntu) or glusterfs-api (Fedora)"


class Stat(Structure):
    """struct stat of a 64-bit Linux, as far as st_blocks; which of its first fields are where differs between processors."""

    _fields_ = (
        ("first", c_ulong * 6),
        ("st_size", c_int64),
        ("st_blksize", c_long),
        ("st_blocks", c_int64),
        ("rest", c_ulong * 16),
    )


_PROTOTYPES = {
    "glfs_new": (c_void_p, (c_char_p,)),
    "glfs_set_volfile_server": (c_int, (c_void_p, c_char_p, c_char_p, c_int)),
    "glfs_set_logging": (c_int, (c_void_p, c_char_p, c_int)),
    "glfs_init": (c_int, (c_void_p,)),
    "glfs_fini": (c_int, (c_void_p,)),
    "glfs_open": (c_void_p, (c_void_p, c_char_p, c_int)),
    "glfs_creat": (c_void_p, (c_void_p, c_char_p, c_int, c_uint)),
    "glfs_close": (c_int, (c_void_p,)),
    "glfs_pread": (c_ssize_t, (c_void_p, c_void_p, c_size_t, c_int64, c_int, c_void_p)),
    "glfs_pwrite": (c_ssize_t, (c_void_p, c_void_p, c_size_t, c_int64, c_int, c_void_p, c_void_p)),
    "glfs_fsync": (c_int, (c_void_p, c_void_p, c_void_p)),
    "glfs_ftruncate": (c_int, (c_void_p, c_int64, c_void_p, c_void_p)),
    "glfs_fallocate": (c_int, (c_void_p, c_int, c_int64, c_size_t)),
    "glfs_zerofill": (c_int, (c_void_p, c_int64, c_int64)),
    "glfs_discard": (c_int, (c_void_p, c_int64, c_size_t)),
    "glfs_lseek": (c_int64, (c_void_p, c_int64, c_int)),
    "glfs_fstat": (c_int, (c_void_p, c_void_p)),
}


def libgfapi() -> Any:
    """The library. Raises Unsupported where there is none."""
    return clibrary.load("gluster", SONAMES, PACKAGES, _PROTOTYPES)
