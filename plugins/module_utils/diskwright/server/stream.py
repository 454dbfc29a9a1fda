# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""One client's socket, plain or under TLS: receiving with a deadline, sending without ever waiting for long
(https://man7.org/linux/man-pages/man7/socket.7.html)."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional, Union

    Buffer = Union[bytes, bytearray, memoryview]

STALL = 0.25  # seconds that a send waits in the kernel for a client that takes nothing; it is tried again then
MAX_SECONDS = 1e9  # that is for ever
LATE = "the handshake took too long"
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH)


class Disconnected(Exception):
    """The client has gone, or must go; its argument says why, where that is worth a word."""


def gone(exc: Exception) -> Disconnected:
    """What is raised for what a socket says; that a client went without a word is none worth one."""
    number = getattr(exc, "errno", None)
    return Disconnected("" if number in _GONE else getattr(exc, "strerror", None) or str(exc))


class Stream:
    """A client's socket. All methods raise Disconnected once it has gone; only one thread at a time may send, and one receive.

    It is a channel in the sense of crypto/tls.py.
    """

    plain = True  # what is sent is what is on the wire

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._until: Optional[float] = None
        self._closing = False

    def limit(self, seconds: float) -> None:
        """All that follows must be over in so many seconds; 0: no limit from now on."""
        self._until = monotonic() + seconds if seconds else None
        self.sock.settimeout(None)
        if not seconds:
            whole, part = divmod(STALL, 1)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(whole), int(part * 1e6)))

    def set_timeout(self, seconds: float) -> None:
        """For crypto/tls.py; `limit` has said it already."""

    def left(self) -> float:
        """Seconds until the limit. Raises Disconnected once it is over."""
        if self._until is None:
            return MAX_SECONDS
        left = self._until - monotonic()
        if left <= 0:
            raise Disconnected(LATE)
        return left

    def _within(self) -> None:
        if self._until is not None:
            self.sock.settimeout(self.left())

    def receive_into(self, view: memoryview, whole: bool = False) -> int:
        """Receive some bytes, with `whole` as many as there is room for where that is not much waiting; 0 at the end."""
        self._within()
        try:
            return self.sock.recv_into(view, 0, socket.MSG_WAITALL if whole else 0)
        except socket.timeout:
            raise Disconnected(LATE) from None
        except (OSError, ValueError) as exc:
            raise gone(exc) from None

    def fill(self, view: memoryview) -> None:
        """Receive as many bytes as `view` has."""
        while len(view):
            count = self.receive_into(view, True)
            if not count:
                raise Disconnected("the connection ended within a request")
            view = view[count:]

    def send(self, *data: Buffer) -> None:
        """Send all of `data`."""
        self._within()
        parts = [memoryview(part) for part in data if len(part)]
        try:
            while parts:
                try:
                    count = self.sock.sendmsg(parts)
                except (BlockingIOError, socket.timeout):
                    self.wait()
                    continue
                while parts and count >= len(parts[0]):
                    count -= len(parts.pop(0))
                if parts and count:
                    parts[0] = parts[0][count:]
        except (OSError, ValueError) as exc:
            raise gone(exc) from None

    def send_first(self, head: Buffer) -> int:
        """Send `head`, which more follows at once: how many bytes of it were sent, 0 while the client takes nothing."""
        try:
            return self.sock.send(head, socket.MSG_MORE)
        except BlockingIOError:
            return 0
        except (OSError, ValueError) as exc:
            raise gone(exc) from None

    def send_file(self, fd: int, offset: int, length: int) -> Optional[int]:
        """Send bytes of a file: how many were sent, 0 at its end, None while the client takes nothing. OSError is the file's."""
        try:
            return os.sendfile(self.sock.fileno(), fd, offset, length)
        except BlockingIOError:
            return None
        except OSError as exc:
            if exc.errno in _GONE:
                raise gone(exc) from None
            raise

    def wait(self) -> None:
        """Wait for a while until the client takes something."""
        self._within()
        if self._closing:
            raise Disconnected("")
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLOUT)
        poll.poll(STALL * 1000)

    def end_receiving(self) -> None:
        """Let whoever waits for the client's bytes see the end of them; from any thread."""
        self._shutdown(socket.SHUT_RD)

    def shut(self) -> None:
        """End both ways at once, whatever is under way; from any thread."""
        self._closing = True
        self._shutdown(socket.SHUT_RDWR)

    def _shutdown(self, how: int) -> None:
        try:
            self.sock.shutdown(how)
        except OSError:
            pass  # it has gone already

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


class TlsStream(Stream):
    """A client's socket after STARTTLS: `channel` is a TlsChannel over the plain stream, which keeps the limits."""

    plain = False

    def __init__(self, below: Stream, channel: Any) -> None:
        super().__init__(below.sock)
        self._below = below
        self._channel = channel

    def limit(self, seconds: float) -> None:
        self._below.limit(seconds)

    def receive_into(self, view: memoryview, whole: bool = False) -> int:
        count: int = self._guard(self._channel.receive_into, view)
        return count

    def send(self, *data: Buffer) -> None:
        self._guard(self._channel.send, *[part for part in data if len(part)])

    def _guard(self, method: Callable[..., Any], *args: Any) -> Any:
        try:
            return method(*args)
        except (OSError, ValueError) as exc:
            raise gone(exc) from None

    def shut(self) -> None:
        self._below.shut()

    def close(self) -> None:
        if not self._below._closing:
            try:
                self._below.limit(STALL)
                self._channel.close()
            except (Disconnected, OSError, ValueError):
                pass
        self._below.close()
