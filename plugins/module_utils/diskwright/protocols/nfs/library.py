# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""All that is used of libnfs (https://github.com/sahlberg/libnfs), declared."""

from __future__ import annotations

from ctypes import CFUNCTYPE, Structure, c_char_p, c_int, c_uint32, c_uint64, c_void_p

from .. import clibrary

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SONAMES = tuple("libnfs.so.%d" % number for number in (13, 14, 15))
PACKAGES = "libnfs13 (Debian, Ubuntu) or libnfs (Fedora, openSUSE)"


class Stat(Structure):
    """struct nfs_stat_64."""

    _fields_ = tuple(
        ("nfs_" + name, c_uint64)
        for name in "dev ino mode nlink uid gid rdev size blksize blocks atime mtime ctime atime_nsec mtime_nsec ctime_nsec used".split()
    )


CALLBACK = CFUNCTYPE(None, c_int, c_void_p, c_void_p, c_void_p)  # result or -errno, context, what came of it or a message, the caller's own

_END = (CALLBACK, c_void_p)
_PROTOTYPES = {
    "nfs_init_context": (c_void_p, ()),
    "nfs_destroy_context": (None, (c_void_p,)),
    "nfs_get_error": (c_char_p, (c_void_p,)),
    "nfs_get_fd": (c_int, (c_void_p,)),
    "nfs_which_events": (c_int, (c_void_p,)),
    "nfs_service": (c_int, (c_void_p, c_int)),
    "nfs_set_uid": (None, (c_void_p, c_int)),
    "nfs_set_gid": (None, (c_void_p, c_int)),
    "nfs_set_tcp_syncnt": (None, (c_void_p, c_int)),
    "nfs_set_readahead": (None, (c_void_p, c_uint32)),
    "nfs_set_pagecache": (None, (c_void_p, c_uint32)),
    "nfs_set_debug": (None, (c_void_p, c_int)),
    "nfs_set_autoreconnect": (None, (c_void_p, c_int)),
    "nfs_mount_async": (c_int, (c_void_p, c_char_p, c_char_p, *_END)),
    "nfs_open_async": (c_int, (c_void_p, c_char_p, c_int, *_END)),
    "nfs_creat_async": (c_int, (c_void_p, c_char_p, c_int, *_END)),
    "nfs_close_async": (c_int, (c_void_p, c_void_p, *_END)),
    "nfs_fstat64_async": (c_int, (c_void_p, c_void_p, *_END)),
    "nfs_pread_async": (c_int, (c_void_p, c_void_p, c_uint64, c_uint64, *_END)),
    "nfs_pwrite_async": (c_int, (c_void_p, c_void_p, c_uint64, c_uint64, c_void_p, *_END)),
    "nfs_fsync_async": (c_int, (c_void_p, c_void_p, *_END)),
    "nfs_ftruncate_async": (c_int, (c_void_p, c_void_p, c_uint64, *_END)),
}


def libnfs() -> Any:
    """The library. Raises Unsupported where there is none."""
    return clibrary.load("nfs", SONAMES, PACKAGES, _PROTOTYPES)
