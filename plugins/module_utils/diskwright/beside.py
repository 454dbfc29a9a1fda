# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A new file is written beside its final name, flushed and renamed; on failure nothing of it is left."""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import contextmanager
from errno import EACCES, EAGAIN
from struct import pack

from .errors import Error, Locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator

_SET_LOCK = getattr(fcntl, "F_OFD_SETLK", 37)  # a lock of the open file: the library closing the file does not drop it
_FIRST_BYTE = pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)  # images are locked from byte 100 on


@contextmanager
def beside(path: str, private: bool = False) -> Iterator[str]:
    """A name in the directory of `path` to write to; when the block ends well it becomes `path`, else it is removed.

    A symbolic link stays one: what it points at is replaced. A device is written in place. A file that is replaced must not be in
    use (Locked), and hands its owner, permissions and security label on; otherwise the permissions are those that a plain
    creation would give, or, if `private`, only the owner's. The name is always the same, so that what a killed run
    left is taken over by the next one; while that still runs, Locked is raised.
    """
    final = os.path.realpath(path)
    old = os.stat(final) if os.path.lexists(final) else None
    if old is not None and not stat.S_ISREG(old.st_mode):
        yield path
        return
    folder, name = os.path.split(final)
    temporary = os.path.join(folder, ".%s.new" % name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore"))
    claim = _claim(temporary, path)
    try:
        try:
            yield temporary
            os.fsync(claim)
            if old is None:
                os.fchmod(claim, 0o600 if private else 0o644 & ~_umask())
                os.rename(temporary, final)
            else:
                with alone(final):
                    _resemble(claim, final, old)
                    os.rename(temporary, final)
        except BaseException as exc:
            _discard(temporary)
            _rename_in(exc, temporary, path)
            raise
    finally:
        os.close(claim)
    _sync(folder)


@contextmanager
def alone(path: str) -> Iterator[None]:
    """Nobody else uses the image at `path` while the block runs; Locked is raised if someone does."""
    from .graph import open_image
    from .node import OpenFlags

    flags = OpenFlags(writable=True, resize=True, no_backing=True)
    try:
        node = open_image(path, "raw", flags)
    except Error as exc:
        if exc.errno != EACCES:
            raise
        node = open_image(path, "raw", flags.but(writable=False, resize=False))
    try:
        yield
    finally:
        node.abandon()


def _claim(temporary: str, path: str) -> int:
    """A descriptor of the empty, locked file `temporary`."""
    while True:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(handle).st_uid != os.geteuid():
                raise Error("%s is in the way and belongs to somebody else" % temporary, filename=path)
            _lock(handle, path)
            if _is_at(handle, temporary):
                os.ftruncate(handle, 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner renamed or removed it meanwhile


def _lock(handle: int, path: str) -> None:
    try:
        fcntl.fcntl(handle, _SET_LOCK, _FIRST_BYTE)
    except OSError as exc:
        if exc.errno in (EACCES, EAGAIN):
            raise Locked("%s: another process is making it at this moment" % path, filename=path, errno=exc.errno) from exc
        # else a file system without locks: nothing to be done about it


def _is_at(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _resemble(handle: int, path: str, old: os.stat_result) -> None:
    """Give an open file the owner, permissions and security label of the one at `path`, as far as the process may."""
    try:
        os.fchown(handle, old.st_uid, old.st_gid)
    except PermissionError:
        pass
    os.fchmod(handle, stat.S_IMODE(old.st_mode))
    try:
        os.setxattr(handle, "security.selinux", os.getxattr(path, "security.selinux"))
    except OSError:
        pass  # the host has no such labels


def _rename_in(exc: BaseException, temporary: str, path: str) -> None:
    """Make an error name the file that the user knows."""
    if isinstance(exc, Error):
        exc.args = tuple(word.replace(temporary, path) if isinstance(word, str) else word for word in exc.args)
    if isinstance(exc, (Error, OSError)) and exc.filename == temporary:
        exc.filename = path


def _discard(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return  # whoever wrote it took it away


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
