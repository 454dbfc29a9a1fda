# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The NBD server: accepts clients, each served by a thread of its own, and keeps them within limits
(https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md)."""

from __future__ import annotations

import errno
import selectors
import socket
from threading import BoundedSemaphore, Condition, Thread
from time import monotonic
from typing import Any, Callable, Mapping, Optional

from ..crypto.tls import Credentials
from ..errors import OptionError, ProtocolError
from .authorization import Authorization, distinguished_name
from .connection import Connection
from .exports import ExportSet
from .listeners import Listener, inherited, listen, peer_of
from .stream import Stream

MAX_CONNECTIONS = 100
MAX_THREADS = 128  # besides one for each client
HANDSHAKE_SECONDS = 10
SEND_BUFFER = 1 << 19  # bytes: two of the usual requests
DRAIN_SECONDS = 10  # that clients may take, when the server stops, to receive what they asked for


class NbdServer:
    """Serves `exports` on any number of sockets.

    max_connections    clients at a time, those in their handshake included; others wait to be accepted. 0: no limit
    handshake_seconds  for a client to get from connecting to its first request. 0: no limit
    tls, authz         objects: credentials that clients must use, and what decides by the client's identity
    objects            where they find others that they refer to
    said               told of what became of a client, a line for a person
    idle               called when the last client has gone
    """

    def __init__(
        self,
        exports: ExportSet,
        *,
        tls: Any = None,
        authz: Any = None,
        objects: Optional[Mapping[str, Any]] = None,
        max_connections: int = MAX_CONNECTIONS,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        said: Optional[Callable[[str], None]] = None,
        idle: Optional[Callable[[], None]] = None,
    ) -> None:
        """Raises OptionError, Error for objects that cannot be used."""
        if authz is not None and tls is None:
            raise OptionError("TLS authorization is not permitted without TLS credentials")
        self.exports = exports
        self.tls = Credentials({**(objects or {}), tls.id: tls}, tls.id, "server") if tls is not None else None
        if authz is not None and tls.type != "tls-creds-x509":
            raise OptionError("TLS authorization needs certificates: credentials of the type tls-creds-x509")
        self.authz = Authorization(authz) if authz is not None else None
        self.max_connections = max_connections
        self.handshake_seconds = handshake_seconds
        self.said = said
        self.idle = idle
        self.threads = BoundedSemaphore(MAX_THREADS)  # for clients whose storage is slow
        self._listeners: list[Listener] = []
        self._connections: set[Connection] = set()
        self._changed = Condition()
        self._stopping = False
        self._thread: Optional[Thread] = None
        self._wakes, self._wake = socket.socketpair()
        self._wakes.setblocking(False)

    @property
    def addresses(self) -> list[dict[str, Any]]:
        """Where it listens, as SocketAddress."""
        return [dict(listener.address) for listener in self._listeners]

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    def listen(self, address: Mapping[str, Any]) -> None:
        """Listen at a SocketAddress too; before `start`. Raises Error, OptionError."""
        self._listeners += listen(address)

    def take(self, fd: int) -> None:
        """Listen on a socket that the process was started with too. Raises Error."""
        self._listeners.append(inherited(fd))

    def start(self) -> None:
        """Accept clients from now on, in threads."""
        self._thread = Thread(target=self._accept, name="nbd accept", daemon=True)
        self._thread.start()

    def stop(self, seconds: Optional[float] = None) -> None:
        """Accept nobody any more, remove the sockets, and disconnect each client once what it has under way is done, or after so
        many seconds (None: DRAIN_SECONDS). A second call does nothing."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
        self._rouse()
        if self._thread is not None:
            self._thread.join()
        for listener in self._listeners:
            listener.close()
        until = monotonic() + (DRAIN_SECONDS if seconds is None else seconds)
        with self._changed:
            for connection in self._connections:
                connection.stop()
            while self._connections:
                if not self._changed.wait(max(0.0, until - monotonic())):
                    for connection in self._connections:
                        connection.shut()
                    until = monotonic() + DRAIN_SECONDS
        self._wakes.close()
        self._wake.close()

    def hurry(self) -> None:
        """Let a `stop` that waits for clients disconnect them at once."""
        with self._changed:
            for connection in self._connections:
                connection.shut()

    # -- for connections -----------------------------------------------------------------------------------------

    def admit(self, channel: Any) -> None:
        """Raise ProtocolError unless the client at the other end of this TlsChannel may use the server."""
        if self.authz is not None:
            name = distinguished_name(channel.session.getpeercert())
            if not self.authz.allows(name):
                raise ProtocolError("TLS x509 authz check for %s is denied" % name)

    def gone(self, connection: Connection, reason: str) -> None:
        """A client has been disconnected."""
        with self._changed:
            self._connections.discard(connection)
            left = len(self._connections)
            self._changed.notify_all()
        if reason and self.said is not None and not self._stopping:
            self.said("".join(character if character.isprintable() else "?" for character in "%s: %s" % (connection.peer, reason)))
        if left + 1 == self.max_connections:
            self._rouse()
        if not left and self.idle is not None and not self._stopping and connection.export is not None:
            self.idle()

    # -- accepting -----------------------------------------------------------------------------------------------

    def _rouse(self) -> None:
        """Let the accepting thread look around."""
        try:
            self._wake.send(b"x")
        except OSError:
            pass

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wakes, selectors.EVENT_READ)
            watched = False
            while not self._stopping:
                room = not self.max_connections or len(self._connections) < self.max_connections
                if room != watched:
                    for listener in self._listeners:
                        if room:
                            selector.register(listener.socket, selectors.EVENT_READ, listener)
                        else:
                            selector.unregister(listener.socket)
                    watched = room
                for key, _events in selector.select():
                    if key.data is None:
                        self._wakes.recv(4096)
                    elif not self._welcome(key.data):
                        selector.select(0.1)  # no descriptors or threads: somebody has to go first
                    if self.max_connections and len(self._connections) >= self.max_connections:
                        break

    def _welcome(self, listener: Listener) -> bool:
        """Accept one client; False if there is no room in this process for another one."""
        try:
            sock, place = listener.socket.accept()
        except OSError as exc:
            return exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
        sock.setblocking(True)
        try:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            elif sock.family == socket.AF_UNIX:  # which does not find out by itself, as TCP does
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        except OSError:
            sock.close()
            return True
        connection = Connection(self, Stream(sock), peer_of(sock, place))
        with self._changed:
            self._connections.add(connection)
        try:
            Thread(target=connection.run, name="nbd %s" % connection.peer, daemon=True).start()
        except RuntimeError:
            with self._changed:
                self._connections.discard(connection)
            sock.close()
            return False
        return True
