# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Monitors: sockets on which QMP is spoken (https://www.qemu.org/docs/master/interop/qmp-spec.html).

Each client has a thread that reads and carries out its commands, one after the other, and one that writes. Events are put into a queue with an
end, so that a client that does not read is disconnected in time and keeps nobody waiting.
"""

from __future__ import annotations

import os
import socket
import stat
from collections import deque
from threading import Condition, Lock, Thread

from ..errors import Error, OptionError
from .codec import COMMAND_NOT_FOUND, Decoder, QmpError, Refused, Request, encode, failure
from .commands import execute, version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    from ..jobs.live import Live

MAX_CLIENTS = 16  # monitors at a time
MAX_QUEUE = 16 << 20  # bytes that wait for a client to read them
PIECE = 64 << 10  # bytes that are received at a time
SECONDS = 10  # that a client that is being disconnected has to take what is left

_NEGOTIATE = "Expecting capabilities negotiation with 'qmp_capabilities'"
_NEGOTIATED = "Capabilities negotiation is already complete, command ignored"


class Outbox:
    """What is to be sent to one client. `put` never waits: once too much waits, all that follows is lost, and the client with it."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self.full = False
        self.closed = False

    def put(self, data: bytes) -> bool:
        """Send it after all else; False where that is not possible any more."""
        with self._changed:
            if self.closed or self.full:
                return False
            if self._size + len(data) > MAX_QUEUE:
                self.full = True
            else:
                self._waiting.append(data)
                self._size += len(data)
            self._changed.notify_all()
            return not self.full

    def close(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def take(self) -> Optional[bytes]:
        """What to send next; None once there is nothing more, or the client is lost."""
        with self._changed:
            while not self._waiting and not self.closed and not self.full:
                self._changed.wait()
            if self.full or not self._waiting:
                return None
            data = b"".join(self._waiting)
            self._waiting.clear()
            self._size = 0
            return data


class Session:
    """One client."""

    def __init__(self, monitor: Monitor, connection: socket.socket) -> None:
        self.monitor = monitor
        self.live = monitor.live
        self.connection = connection
        self.outbox = Outbox()
        self._negotiated = False
        self._reader = Thread(target=self._read, name="qmp-reader", daemon=True)
        self._writer = Thread(target=self._write, name="qmp-writer", daemon=True)

    def start(self) -> None:
        """Greet the client, and listen to it."""
        self.send({"QMP": {"version": version(), "capabilities": []}})
        self._writer.start()
        self._reader.start()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; one that does not take its messages is disconnected."""
        if not self.outbox.put(encode(message)):
            self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        try:
            self.connection.shutdown(how)
        except OSError:
            pass  # the client has gone

    def stop(self) -> None:
        """Send what is left, and hear nothing more."""
        self._shut(socket.SHUT_RD)

    def join(self) -> None:
        """Wait for the end, but not for ever."""
        self._writer.join(SECONDS)
        if self._writer.is_alive():
            self.outbox.close()  # a command may be at it still
            self._shut(socket.SHUT_RDWR)
            self._writer.join(2 * SECONDS)

    def _read(self) -> None:
        decoder = Decoder()
        try:
            while True:
                data = self.connection.recv(PIECE)
                if not data:
                    break
                for found in decoder.feed(data):
                    if not self._handle(found):
                        return
        except OSError:
            pass  # the client has gone
        finally:
            self.live.events.forget(self.send)
            self.outbox.close()

    def _handle(self, found: Any) -> bool:
        """Answer one request; False where that was the last."""
        if isinstance(found, Refused):
            self.send(found.reply)
            return not found.fatal
        reply = self._reply(found)
        if found.has_id:
            reply["id"] = found.id
        self.send(reply)
        return True

    def _reply(self, request: Request) -> dict[str, Any]:
        try:
            if request.command == "qmp_capabilities":
                return self._negotiate(request.arguments)
            if not self._negotiated:
                raise QmpError(_NEGOTIATE, COMMAND_NOT_FOUND)
            return {"return": execute(self.live, request.command, request.arguments)}
        except (Error, OSError) as exc:
            return failure(exc)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as exc:
            return failure(QmpError("internal error: %s: %s" % (type(exc).__name__, exc)))  # a bug must not end the process

    def _negotiate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if self._negotiated:
            raise QmpError(_NEGOTIATED, COMMAND_NOT_FOUND)
        for key, value in arguments.items():
            if key != "enable":
                raise QmpError("Parameter '%s' is unexpected" % key)
            if not isinstance(value, list):
                raise QmpError("Invalid parameter type for 'enable', expected: array")
            for name in value:
                if name != "oob":
                    raise QmpError("Parameter 'enable[0]' does not accept value '%s'" % (name,))
                raise QmpError("capability oob not available")
        self._negotiated = True
        self.live.events.listen(self.send)
        return {"return": {}}

    def _write(self) -> None:
        try:
            while True:
                data = self.outbox.take()
                if data is None:
                    break
                self.connection.sendall(data)
        except OSError:
            pass  # the client has gone
        self.outbox.close()
        self._shut(socket.SHUT_RDWR)
        if self._reader.ident is not None:
            self._reader.join(SECONDS)
        self.connection.close()
        self.monitor.forget(self)


class Monitor:
    """Takes clients in on any number of sockets."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.addresses: list[dict[str, Any]] = []  # where it listens
        self._listeners: list[socket.socket] = []
        self._threads: list[Thread] = []
        self._sessions: set[Session] = set()
        self._lock = Lock()
        self._stopped = False

    def listen(self, address: Mapping[str, Any]) -> None:
        """Listen at {"type": "unix", "path"} or {"type": "inet", "host", "port"}; port "0" is any. Raises Error, OSError."""
        if address["type"] == "unix":
            path = str(address["path"])
            _remove_stale(path)
            listener = socket.socket(socket.AF_UNIX)
            try:
                os.fchmod(listener.fileno(), 0o600)  # who can connect can do what we can
                listener.bind(path)
            except OSError as exc:
                listener.close()
                raise Error("Failed to bind socket to %s: %s" % (path, exc.strerror or exc), errno=exc.errno) from exc
            found: dict[str, Any] = {"type": "unix", "path": path}
        else:
            host, port = str(address["host"]), str(address["port"])
            try:
                family, kind, protocol, _name, where = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
                listener = socket.socket(family, kind, protocol)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(where)
            except OSError as exc:
                raise Error("Failed to find an available port at %s:%s: %s" % (host, port, exc.strerror or exc), errno=exc.errno) from exc
            found = {"type": "inet", "host": host, "port": str(listener.getsockname()[1])}
        listener.listen(MAX_CLIENTS)
        self._listeners.append(listener)
        self.addresses.append(found)

    def start(self) -> None:
        """Take clients in from now on."""
        for listener in self._listeners:
            thread = Thread(target=self._accept, args=(listener,), name="qmp-listener", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _address = listener.accept()
            except OSError:
                return  # stopped
            with self._lock:
                if self._stopped or len(self._sessions) >= MAX_CLIENTS:
                    connection.close()
                    continue
                session = Session(self, connection)
                self._sessions.add(session)
            session.start()

    def forget(self, session: Session) -> None:
        """A client has gone."""
        with self._lock:
            self._sessions.discard(session)

    def stop(self) -> None:
        """Disconnect all clients, once they have got what they asked for, and close the sockets."""
        with self._lock:
            self._stopped = True
            sessions = list(self._sessions)
        for listener, address in zip(self._listeners, self.addresses):
            try:
                listener.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it wakes up by the close then
            listener.close()
            if address["type"] == "unix":
                try:
                    os.unlink(address["path"])
                except OSError:
                    pass  # somebody else removed it
        for session in sessions:
            session.stop()
        for session in sessions:
            session.join()


def _remove_stale(path: str) -> None:
    """Remove a socket on which nobody listens any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        return


def parse_address(text: str) -> dict[str, Any]:
    """The address that --qmp names: "unix:PATH" or a path with a slash, "HOST:PORT" or "tcp:HOST:PORT"; options of QEMU behind a comma are
    accepted where they are the case (server=on, wait=off). Raises OptionError."""
    place, _comma, rest = text.partition(",")
    for word in rest.split(",") if rest else ():
        if word not in ("server", "server=on", "wait=off", "nowait"):
            raise OptionError("Invalid parameter '%s'" % word.partition("=")[0])
    kind, colon, name = place.partition(":")
    if kind == "unix" and colon and name:
        return {"type": "unix", "path": name}
    if kind in ("tcp", "inet") and colon:
        place = name
    host, colon, port = place.rpartition(":")
    if colon and "/" not in place and port.isdecimal() and int(port) < 1 << 16:
        return {"type": "inet", "host": host.strip("[]"), "port": port}
    if "/" in place:
        return {"type": "unix", "path": place}
    raise OptionError("'%s' is no address: unix:PATH or HOST:PORT" % text)
