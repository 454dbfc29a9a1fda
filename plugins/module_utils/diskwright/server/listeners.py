# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The sockets that a server listens on, described as QEMU describes them (SocketAddress).

https://www.qemu.org/docs/master/interop/qemu-storage-daemon-qmp-ref.html
"""

from __future__ import annotations

import os
import socket
import stat
from typing import Any, Mapping, Optional

from ..errors import Error, OptionError

BACKLOG = 128
DEFAULT_PORT = "10809"

_KEYS = {
    "inet": ({"host", "port"}, {"numeric", "to", "ipv4", "ipv6", "keep-alive", "mptcp"}),
    "unix": ({"path"}, {"abstract", "tight"}),
    "vsock": ({"cid", "port"}, set()),
    "fd": ({"str"}, set()),
}


class Listener:
    """One listening socket. `address` is where it listens; a unix socket's file is removed when it is closed, if we made it."""

    def __init__(self, sock: socket.socket, address: dict[str, Any], path: Optional[str] = None) -> None:
        self.socket = sock
        self.address = address
        self._path = path
        self._file = os.stat(path) if path is not None else None
        sock.setblocking(False)

    def close(self) -> None:
        """Close it and remove its file, unless somebody put another one there."""
        self.socket.close()
        if self._path is None or self._file is None:
            return
        try:
            there = os.stat(self._path)
            if (there.st_dev, there.st_ino) == (self._file.st_dev, self._file.st_ino):
                os.unlink(self._path)
        except OSError:
            pass
        self._path = None


def checked_address(address: Mapping[str, Any]) -> dict[str, Any]:
    """A SocketAddress, flat ({"type": "unix", "path": ...}) or with its members in "data". Raises OptionError."""
    flat = dict(address)
    kind = flat.pop("type", None)
    inner = flat.pop("data", None)
    if isinstance(inner, Mapping):
        flat.update(inner)
    if kind is None:
        raise OptionError("Parameter 'addr.type' is missing")
    if kind not in _KEYS:
        raise OptionError("Parameter 'addr.type' does not accept value '%s'" % kind)
    needed, known = _KEYS[kind]
    for key in sorted(needed):
        if key not in flat:
            raise OptionError("Parameter 'addr.%s' is missing" % key)
    for key in flat:
        if key not in needed | known:
            raise OptionError("Parameter 'addr.%s' is unexpected" % key)
    return {"type": kind, **flat}


def listen(address: Mapping[str, Any]) -> list[Listener]:
    """Listen at a SocketAddress: one socket, or one for each of a host's addresses. Raises Error, OptionError."""
    checked = checked_address(address)
    kind = checked["type"]
    if kind == "unix":
        return [_listen_unix(str(checked["path"]))]
    if kind == "inet":
        return _listen_inet(str(checked["host"]), str(checked["port"]))
    if kind == "vsock":
        return [_listen_vsock(str(checked["cid"]), str(checked["port"]))]
    return [inherited(_number(str(checked["str"]), "file descriptor"))]


def inherited(fd: int) -> Listener:
    """A socket that we were started with. Raises Error for what is none that listens."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise Error("File descriptor %d is not a socket" % fd)
        sock = socket.socket(fileno=os.dup(fd))
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as exc:
        raise Error("File descriptor %d cannot be used: %s" % (fd, exc.strerror), errno=exc.errno) from exc
    if not listening:
        sock.close()
        raise Error("Socket %d does not listen" % fd)
    return Listener(sock, _address_of(sock) or {"type": "fd", "str": str(fd)})


def _listen_unix(path: str) -> Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.lstat(path).st_mode) and not _answers(path):
            os.unlink(path)  # left behind by a server that was killed
        sock.bind(path)
        sock.listen(BACKLOG)
    except (OSError, ValueError) as exc:
        sock.close()
        reason = getattr(exc, "strerror", None) or str(exc)
        if reason == "AF_UNIX path too long":
            raise Error("UNIX socket path '%s' is too long" % path, hint="Path must be less than 108 bytes") from None
        raise Error("Failed to bind socket to %s: %s" % (path, reason), filename=path, errno=getattr(exc, "errno", None)) from exc
    return Listener(sock, {"type": "unix", "path": path}, path)


def _answers(path: str) -> bool:
    """Whether a server listens at this unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True


def _listen_inet(host: str, port: str) -> list[Listener]:
    try:
        places = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        raise Error("address resolution failed for %s:%s: %s" % (host, port, getattr(exc, "strerror", None) or exc)) from exc
    listeners: list[Listener] = []
    failure: Optional[OSError] = None
    for family, kind, proto, _name, place in dict.fromkeys(places):
        chosen = listeners[0].address["port"] if listeners and place[1] == 0 else place[1]
        sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((place[0], int(chosen), *place[2:]))
            sock.listen(BACKLOG)
        except OSError as exc:
            sock.close()
            failure = exc
            continue
        listeners.append(Listener(sock, _address_of(sock) or {}))
    if not listeners:
        reason = failure.strerror if failure is not None else "no address"
        raise Error("Failed to find an available port: %s" % reason, errno=failure.errno if failure is not None else None)
    return listeners


def _listen_vsock(cid: str, port: str) -> Listener:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind((_number(cid, "cid"), _number(port, "port")))
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as exc:
        sock.close()
        raise Error("Failed to bind socket to vsock:%s:%s: %s" % (cid, port, getattr(exc, "strerror", None) or exc)) from exc
    return Listener(sock, {"type": "vsock", "cid": cid, "port": port})


def _address_of(sock: socket.socket) -> Optional[dict[str, Any]]:
    place = sock.getsockname()
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return {"type": "inet", "host": place[0], "port": str(place[1])}
    if sock.family == socket.AF_UNIX:
        return {"type": "unix", "path": os.fsdecode(place)}
    return {"type": "vsock", "cid": str(place[0]), "port": str(place[1])} if sock.family == socket.AF_VSOCK else None


def _number(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 32:
        raise OptionError("Failed to parse %s '%s'" % (what, text))
    return int(text)


def peer_of(sock: socket.socket, place: Any) -> str:
    """What a client is called in messages."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return "%s:%d" % (place[0], place[1])
    return "vsock:%s:%s" % place if sock.family == socket.AF_VSOCK else "unix client"
