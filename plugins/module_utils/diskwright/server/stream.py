# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""One client's socket, plain or under TLS: receiving with a deadline, sending without ever waiting for long (https://man7.org/linux/man-pages/man7/socket.7.html)."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional, Union

    Buffer = Union[bytes, bytearray, memoryview]

STALL = 0.25  # seconds that a send waits in the kernel for a client that takes nothing; it is tried again then
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH)


class Disconnected(Exception):
    """The client has gone, or must go; its argument says why, where that is worth a word."""


class Stream:
    """A client's socket. All methods raise Disconnected once it has gone; only one thread at a time may send, and one receive."""

    tls = False

    def __init__(self, sock: socket.socket) -> None:
        self.socket: Any = sock
        self.until: Optional[float] = None  # when what it does must be over; see limit
        self._closing = False

    def limit(self, seconds: Optional[float]) -> None:
        """All that follows must be over in so many seconds; None: no limit from now on."""
        self.until = monotonic() + seconds if seconds else None
        self.socket.settimeout(None)
        if not seconds and not self.tls:
            whole, part = divmod(STALL, 1)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(whole), int(part * 1e6)))

    def _within(self) -> None:
        if self.until is not None:
            left = self.until - monotonic()
            if left <= 0:
                raise Disconnected("the handshake took too long")
            self.socket.settimeout(left)

    def receive(self, most: int) -> bytes:
        """Up to `most` bytes, as many as there are; b"" at the end."""
        self._within()
        try:
            data: bytes = self.socket.recv(most)
        except socket.timeout:
            raise Disconnected("the handshake took too long") from None
        except (OSError, ValueError) as exc:
            raise Disconnected(str(exc)) from None
        return data

    def fill(self, view: memoryview) -> None:
        """Receive as many bytes as `view` has."""
        try:
            while len(view):
                count = self._fill_some(view)
                if not count:
                    raise Disconnected("the connection ended within a request")
                view = view[count:]
        except (OSError, ValueError) as exc:
            raise Disconnected(str(exc)) from None

    def _fill_some(self, view: memoryview) -> int:
        count: int = self.socket.recv_into(view, len(view), socket.MSG_WAITALL)
        return count

    def send(self, head: Buffer, data: Buffer = b"") -> None:
        """Send all of `head` and `data`."""
        self._within()
        try:
            parts = [memoryview(head), memoryview(data)] if len(data) else [memoryview(head)]
            while parts:
                try:
                    count = self.socket.sendmsg(parts)
                except (BlockingIOError, socket.timeout):
                    self.wait()
                    continue
                while parts and count >= len(parts[0]):
                    count -= len(parts.pop(0))
                if parts and count:
                    parts[0] = parts[0][count:]
        except (OSError, ValueError) as exc:
            raise Disconnected(str(exc)) from None

    def send_first(self, head: Buffer) -> None:
        """Send `head`; more follows at once."""
        try:
            if self.socket.send(head, socket.MSG_MORE) == len(head):
                return
        except BlockingIOError:
            self.send(head)
            return
        except (OSError, ValueError) as exc:
            raise Disconnected(str(exc)) from None
        raise Disconnected("a header was cut")

    def send_file(self, fd: int, offset: int, length: int) -> Optional[int]:
        """Send bytes of a file: how many were sent, 0 at its end, None while the client takes nothing. OSError is the file's."""
        try:
            return os.sendfile(self.socket.fileno(), fd, offset, length)
        except BlockingIOError:
            return None
        except OSError as exc:
            if exc.errno in _GONE:
                raise Disconnected(str(exc)) from None
            raise

    def wait(self) -> None:
        """Wait for a while until the client takes something."""
        self._within()
        if self._closing:
            raise Disconnected("")
        poll = select.poll()
        poll.register(self.socket.fileno(), select.POLLOUT)
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
            socket.socket.shutdown(self.socket, how)
        except (OSError, ValueError):
            pass  # it has gone already

    def close(self) -> None:
        """Close the socket."""
        try:
            self.socket.close()
        except OSError:
            pass


class TlsStream(Stream):
    """A client's socket after STARTTLS: one thread does all, since a TLS session is one state for both ways."""

    tls = True

    def __init__(self, plain: Stream, session: Any) -> None:
        super().__init__(session)
        self.until = plain.until

    def _fill_some(self, view: memoryview) -> int:
        count: int = self.socket.recv_into(view, len(view))
        return count

    def send(self, head: Buffer, data: Buffer = b"") -> None:
        self._within()
        try:
            if len(data) <= 16384:
                self.socket.sendall(bytes(head) + bytes(data))
            else:
                self.socket.sendall(head)
                self.socket.sendall(data)
        except (OSError, ValueError) as exc:
            raise Disconnected(str(exc)) from None

    def send_first(self, head: Buffer) -> None:
        self.send(head)
