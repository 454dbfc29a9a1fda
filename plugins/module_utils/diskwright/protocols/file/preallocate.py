# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Space in host files: fallocate(2) and preallocation.

https://man7.org/linux/man-pages/man2/fallocate.2.html
"""

from __future__ import annotations

import errno
import os

from ...errors import Error, OptionError
from ...node import CHUNK, aligned_buffer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

# What a kernel or file system answers that lacks a mode of fallocate; seccomp filters like EPERM.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EPERM, errno.EINVAL, errno.ENODEV)

_fallocate: Any = None  # libc's function, once looked up; False where there is none


def _libc_fallocate() -> Any:
    global _fallocate
    if _fallocate is None:
        try:
            import ctypes

            libc = ctypes.CDLL(None, use_errno=True)
            call = getattr(libc, "fallocate64", None) or libc.fallocate
            call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

            def allocate(*args: int) -> int:
                return 0 if call(*args) == 0 else ctypes.get_errno()

            _fallocate = allocate
        except (ImportError, OSError, AttributeError):  # a Python without ctypes, a libc without fallocate
            _fallocate = False
    return _fallocate


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2); False where this file system cannot do that. Raises OSError for all other failures (no space left)."""
    call = _libc_fallocate()
    if not call:
        return False
    while True:
        code = call(fd, mode, offset, length)
        if code == 0:
            return True
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give the space of a range back, which reads as zeroes afterwards; the file keeps its size. False where impossible."""
    return fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> bool:
    """Make a range read as zeroes, with its space allocated; the file grows if need be. False where impossible."""
    if fallocate(fd, ZERO_RANGE, offset, length):
        return True
    return punch_hole(fd, offset, length) and fallocate(fd, 0, offset, length)


def resize(fd: int, current: int, size: int, mode: str, write: Optional[Callable[[int, memoryview], None]] = None) -> None:
    """Change a regular file from `current` to `size` bytes and allocate what is new as `mode` (off, falloc, full) says.

    `write` writes for mode "full" (default: to `fd`). Raises Error in QEMU's words, the file having its old size again.
    """
    if mode not in ("off", "falloc", "full"):
        raise OptionError("Unsupported preallocation mode: %s" % mode, errno=errno.ENOTSUP)
    if mode != "off" and size < current:
        raise Error("Preallocation can't be used for shrinking files", errno=errno.ENOTSUP)
    what = "Could not resize file"
    try:
        if mode == "falloc":
            what = "Could not preallocate new data"
            if size > current:
                os.posix_fallocate(fd, current, size - current)
            return
        os.ftruncate(fd, size)
        if mode == "full":
            what = "Could not write zeros for preallocation"
            _write_zeroes(current, size, write or (lambda offset, view: write_all(fd, view, offset)))
            what = "Could not flush file to disk"
            os.fsync(fd)
        elif not current and size:
            # as QEMU: later probes of the alignment of direct I/O then meet a data block
            write_all(fd, memoryview(bytes(min(size, 4096))), 0)
    except (OSError, OverflowError) as exc:
        if mode != "off":
            os.ftruncate(fd, current)
        code = getattr(exc, "errno", errno.EFBIG)
        raise Error("%s: %s" % (what, os.strerror(code)), errno=code) from exc


def _write_zeroes(start: int, end: int, write: Callable[[int, memoryview], None]) -> None:
    zeroes = aligned_buffer(CHUNK)
    while start < end:
        stop = min(end, (start // CHUNK + 1) * CHUNK)
        write(start, zeroes[: stop - start])
        start = stop


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write the whole of `view` at `offset`. Raises OSError."""
    done = os.pwrite(fd, view, offset)
    while done < len(view):
        count = os.pwrite(fd, view[done:], offset + done)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += count
