# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""One mount of an NFS export (RFC 1813, https://www.rfc-editor.org/rfc/rfc1813) with one open file, through libnfs."""

from __future__ import annotations

import errno
import os
import stat
from ctypes import POINTER, addressof, cast, memmove

from ...errors import Error, ProtocolError
from ..clibrary import readable, text, writable
from ..connections import Lost, serve
from . import library as lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

PATIENCE = 60.0  # seconds that an answer may take
CLOSE_TIME = 2.0  # seconds that a server has to close the file
MODE = 0o600  # of a new file, as QEMU makes it

# What the library gives for a connection that broke; it also gives some of them for errors of the server that it does not know,
# whose names (NFS3ERR_ISDIR) are in the message then.
_BROKEN = (errno.EINTR, errno.EFAULT, errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.EHOSTUNREACH)


class Place:
    """What to mount, which file to open, and how: `settings` are calls of the library, (function, number)."""

    def __init__(self, host: str, path: str, settings: list[tuple[str, int]]) -> None:
        self.host = host
        self.path = path
        self.settings = settings
        folder, _slash, name = path.rpartition("/")
        self.export = folder or "/"
        self.name = "/" + name


class Session:
    """An open file, for one thread at a time."""

    def __init__(self, api: Any, place: Place, flags: int, create: bool = False) -> None:
        """Mount, and open the file with `flags`, or `create` it empty. Raises Error in QEMU's words, Lost where nobody answers."""
        self._api = api
        self._place = place
        self._file: Any = None
        self.lost = False
        self._context = api.nfs_init_context()
        if not self._context:
            raise Error("Failed to init NFS context", errno=errno.ENOMEM)
        try:
            for function, value in place.settings:
                getattr(api, function)(self._context, value)
            api.nfs_set_autoreconnect(self._context, 0)
            host, export, name = (word.encode("utf-8", "surrogateescape") for word in (place.host, place.export, place.name))
            self._call("Failed to mount nfs share: ", api.nfs_mount_async, host, export)
            if create:
                self._file = self._call("Failed to create file: ", api.nfs_creat_async, name, MODE, take=_pointer)
            else:
                self._file = self._call("Failed to open file : ", api.nfs_open_async, name, flags, take=_pointer)
            if not self._file:
                raise ProtocolError("NFS: there is no file handle for %s" % place.path)
        except BaseException:
            self._destroy()
            raise

    def _call(self, what: str, function: Any, *arguments: Any, take: Optional[Callable[[int, Any], Any]] = None, patience: float = PATIENCE) -> Any:
        """Have the library do something: `take(result, data)` of what comes of it, or the result itself.

        Raises Error that begins with `what`, Lost if the connection broke. After an answer that does not come the session is over.
        """
        api, context, place = self._api, self._context, self._place
        if not context:
            raise Lost("NFS: the connection is closed", filename=place.path, errno=errno.EIO)
        answer: list[Any] = []

        def finished(result: int, _context: Any, data: Any, _private: Any) -> None:
            answer.append((result, take(result, data) if take and result >= 0 else result))

        callback = lib.CALLBACK(finished)
        try:
            if function(context, *arguments, callback, None):
                answer.append(None)
                reason = text(api.nfs_get_error(context))
                raise Error("%s%s" % (what, reason or os.strerror(errno.EIO)), filename=place.path, errno=errno.EIO)
            outcome = serve(context, api.nfs_get_fd, api.nfs_which_events, api.nfs_service, answer.__len__, patience)
            if outcome == "late":
                raise Error("%sno answer from %s within %g seconds" % (what, place.host, patience), filename=place.path, errno=errno.ETIMEDOUT)
            if outcome:
                raise Lost("%sthe connection to %s was lost" % (what, place.host), filename=place.path, errno=errno.EIO)
            result, value = answer[0]
            if result < 0:
                self._refused(what, -result)
            return value
        finally:
            if not answer:  # the library still knows the callback
                self._destroy()
            del callback

    def _refused(self, what: str, number: int) -> None:
        reason = text(self._api.nfs_get_error(self._context)) or os.strerror(number)
        if number in _BROKEN and "ERR_" not in reason and self._file:
            self._destroy()
            raise Lost("%sthe connection to %s was lost: %s" % (what, self._place.host, reason), filename=self._place.path, errno=errno.EIO)
        if what.startswith("Failed to open"):
            reason = 'open call failed with "%s"' % reason
        raise Error(what + reason, filename=self._place.path, errno=number)

    def status(self) -> tuple[int, int, bool]:
        """(size, bytes that it takes on the server, whether it is a regular file)."""

        def take(_result: int, data: Any) -> tuple[int, int, bool]:
            found = cast(data, POINTER(lib.Stat)).contents
            return found.nfs_size, found.nfs_blocks * 512, stat.S_ISREG(found.nfs_mode)

        size, used, regular = self._call("Failed to fstat file: ", self._api.nfs_fstat64_async, self._file, take=take)
        return size, used, regular

    def read(self, offset: int, view: memoryview) -> int:
        """Fill `view` as far as the file goes; returns the count of bytes."""
        memory = writable(view)

        def take(result: int, data: Any) -> int:
            if result > len(view):
                return -1
            memmove(addressof(memory), data, result)
            return result

        count = self._call("NFS: read failed: ", self._api.nfs_pread_async, self._file, offset, len(view), take=take)
        if count < 0:
            raise ProtocolError("NFS: a read gave more bytes than were asked for", filename=self._place.path)
        return int(count)

    def write(self, offset: int, view: memoryview) -> int:
        """Write `view`; returns how many of its bytes were taken, one at least."""
        memory = readable(view)
        count = int(self._call("NFS: write failed: ", self._api.nfs_pwrite_async, self._file, offset, len(view), addressof(memory)))
        if not 0 < count <= len(view):
            raise ProtocolError("NFS: a write of %d bytes took %d" % (len(view), count), filename=self._place.path)
        return count

    def sync(self) -> None:
        """Have the server bring everything to stable storage."""
        self._call("NFS: fsync failed: ", self._api.nfs_fsync_async, self._file)

    def truncate(self, size: int) -> None:
        """Change the size of the file."""
        self._call("NFS: truncate failed: ", self._api.nfs_ftruncate_async, self._file, size)

    def close(self) -> None:
        """Close the file, if there is still somebody to do it, and free all."""
        if self._context and not self.lost and self._file:
            file, self._file = self._file, None
            try:
                self._call("", self._api.nfs_close_async, file, patience=CLOSE_TIME)
            except Error:
                pass  # all was flushed, or the flush has failed
        self._destroy()

    def _destroy(self) -> None:
        """Free all. What is under way is called back, as cancelled, before it returns."""
        self.lost = True
        context, self._context = self._context, None
        if context:
            self._api.nfs_destroy_context(context)


def _pointer(_result: int, data: Any) -> Any:
    return data
