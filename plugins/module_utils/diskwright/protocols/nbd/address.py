# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Where an NBD server is: file names, legacy options and server.* options become one address, and that a socket.

The names are those of https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md and of QEMU's manual ("NBD access"), the
keys those of SocketAddress in https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html.
"""

from __future__ import annotations

import errno
import os
import socket
from time import monotonic
from urllib.parse import parse_qsl, unquote, urlsplit

from ...errors import Error, OptionError, Unsupported
from ...options import opt, parse_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

DEFAULT_PORT = "10809"
MAX_PATH = 107  # bytes of the path of a UNIX socket

# type of address -> {key: its kind}; "!" marks what must be given
TYPES = {
    "inet": {"host": "!str", "port": "!str", "numeric": "bool", "to": "int", "ipv4": "bool", "ipv6": "bool", "keep-alive": "bool", "mptcp": "bool"},
    "unix": {"path": "!str", "abstract": "bool", "tight": "bool"},
    "vsock": {"cid": "!str", "port": "!str"},
    "fd": {"str": "!str"},
}
KEYS = tuple(dict.fromkeys(["type", *(key for keys in TYPES.values() for key in keys)]))


def parse_name(filename: str) -> dict[str, Any]:
    """The options that a file name (nbd:..., nbd://..., nbd+unix://...) stands for, flat. Raises OptionError in QEMU's words."""
    if "://" in filename:
        return _parse_uri(filename)
    if not filename.startswith("nbd:"):
        raise OptionError("File name string for NBD must start with 'nbd:'")
    place, marked, export = filename[4:].partition(":exportname=")
    options = {"export": export} if marked else {}
    if not place or marked and not export:
        return {}  # and there will be no address
    if place.startswith("unix:"):
        return {"server.type": "unix", "server.path": place[5:], **options}
    host, port = _parse_inet(place)
    return {"server.type": "inet", "server.host": host, "server.port": port, **options}


def _parse_inet(text: str) -> tuple[str, str]:
    """Host and port of "host:port" or "[host]:port"; what follows a comma makes no difference to a client."""
    host, colon, port = text.partition(":")
    if text.startswith("["):
        host, colon, port = text[1:].partition("]:")
    port = port.partition(",")[0]
    if not colon or not port:
        raise OptionError("error parsing address '%s'" % text)
    return host, port


def _parse_uri(filename: str) -> dict[str, Any]:
    wrong = OptionError("No valid URL specified")
    try:
        parts = urlsplit(filename)
        port = parts.port
        query = dict(parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape"))
    except ValueError:
        raise wrong from None
    host = unquote(parts.netloc.rpartition("@")[2], errors="surrogateescape")
    export = unquote(parts.path[1:], errors="surrogateescape")
    options = {"export": export} if export else {}
    if parts.scheme == "nbd+unix":
        if host or list(query) != ["socket"]:
            raise wrong
        return {"server.type": "unix", "server.path": query["socket"], **options}
    if parts.scheme not in ("nbd", "nbd+tcp") or query:
        raise wrong
    host = unquote(parts.hostname or "", errors="surrogateescape")
    if not host:
        raise wrong
    return {"server.type": "inet", "server.host": host, "server.port": DEFAULT_PORT if port is None else str(port), **options}


def normalise(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` (flat options as a user wrote them) with host, port and path as server.*, checked. Raises OptionError in QEMU's words."""
    result = dict(values)
    given = {key: result.pop(key) for key in list(result) if key.startswith("server.")}
    host, port, path = (result.pop(key, None) for key in ("host", "port", "path"))
    if given and not (host is None and port is None and path is None):
        raise OptionError("Cannot use 'server' and path/host/port at the same time")
    if path is not None and host is not None:
        raise OptionError("path and host may not be used at the same time")
    if path is not None:
        if port is not None:
            raise OptionError("port may not be used without host")
        given = {"server.type": "unix", "server.path": path}
    elif host is not None:
        given = {"server.type": "inet", "server.host": host, "server.port": DEFAULT_PORT if port is None else str(port)}
    if not given:
        raise OptionError("NBD server address missing")
    return {**result, **_checked({key[7:]: value for key, value in given.items()})}


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of an address with their values parsed, as server.*."""
    kind = given.get("type")
    if kind is None:
        raise OptionError("Parameter 'type' is missing")
    if kind not in TYPES:
        raise OptionError("Parameter 'type' does not accept value '%s'" % kind)
    checked = {"server.type": kind}
    for key, what in TYPES[kind].items():
        if key in given:
            field = opt(None)
            field.kind = what.lstrip("!")
            value = given[key]
            if field.kind == "str" and isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            checked["server." + key] = parse_value(field, value, key)
        elif what.startswith("!"):
            raise OptionError("Parameter '%s' is missing" % key)
    for key in given:
        if key != "type" and key not in TYPES[kind]:
            raise OptionError("Parameter '%s' is unexpected" % key)
    return checked


class Address:
    """The address of a server, from server.* options. `shown` is how messages name it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.kind = str(values["type"])
        self.values = values
        if self.kind == "inet":
            self.shown = "%s:%s" % (values["host"], values["port"])
        elif self.kind == "vsock":
            self.shown = "%s:%s" % (values["cid"], values["port"])
        else:
            self.shown = str(values["path"] if self.kind == "unix" else values["str"])

    @property
    def host(self) -> Optional[str]:
        """The name of the host, to check a certificate with."""
        return str(self.values["host"]) if self.kind == "inet" else None

    def uri(self, export: str) -> str:
        """The name that says it all; "" where none does."""
        values = {key: value for key, value in self.values.items() if value is not None}
        if self.kind == "inet" and set(values) <= {"type", "host", "port", "numeric"}:
            return "nbd://%s%s" % (self.shown, "/" + export if export else "")
        if self.kind == "unix" and set(values) <= {"type", "path"}:
            return "nbd+unix://%s?socket=%s" % ("/" + export if export else "", self.shown)
        return ""

    def connect(self, deadline: float) -> socket.socket:
        """A connected socket. Raises Error in QEMU's words, also once it is `deadline` (by time.monotonic)."""
        if self.kind == "fd":
            return self._given()
        error: OSError = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        for family, target in self._targets():
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(max(deadline - monotonic(), 0.001))
                sock.connect(target)
                if self.kind == "inet":
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    if self.values.get("keep-alive"):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                return sock
            except socket.timeout:
                sock.close()
                error = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            except OSError as exc:
                sock.close()
                error = exc
        raise Error("Failed to connect to '%s': %s" % (self.shown, error.strerror or error), errno=error.errno)

    def _targets(self) -> list[tuple[int, Any]]:
        """(family, address) of all that it may be."""
        values = self.values
        if self.kind == "unix":
            try:
                path = os.fsencode(values["path"])
            except UnicodeError:
                path = b"\0"
            if b"\0" in path:
                raise OptionError("UNIX socket path is not a file name")
            if len(path) > MAX_PATH:
                hint = "Path must be less than %d bytes" % (MAX_PATH + 1)
                raise Error("UNIX socket path '%s' is too long" % values["path"], errno=errno.EINVAL, hint=hint)
            if values.get("abstract"):
                path = b"\0" + path if values.get("tight") in (None, True) else (b"\0" + path).ljust(MAX_PATH + 1, b"\0")
            return [(socket.AF_UNIX, path or b"\0\0")]
        if self.kind == "vsock":
            numbers = []
            for key in ("cid", "port"):
                if not str(values[key]).isdecimal() or int(values[key]) >= 1 << 32:
                    raise OptionError("Failed to parse %s '%s'" % (key, values[key]))
                numbers.append(int(values[key]))
            if not hasattr(socket, "AF_VSOCK"):
                raise Unsupported("socket family AF_VSOCK unsupported")
            return [(socket.AF_VSOCK, tuple(numbers))]
        family = socket.AF_UNSPEC
        if values.get("ipv4") and not values.get("ipv6") or values.get("ipv6") is False:
            family = socket.AF_INET
        elif values.get("ipv6") and not values.get("ipv4") or values.get("ipv4") is False:
            family = socket.AF_INET6
        try:
            found = socket.getaddrinfo(values["host"], values["port"], family, socket.SOCK_STREAM)
        except socket.gaierror as exc:
            raise Error("address resolution failed for %s: %s" % (self.shown, exc.strerror), errno=errno.EIO) from None
        except (UnicodeError, ValueError):
            raise Error("address resolution failed for %s: Name or service not known" % self.shown, errno=errno.EIO) from None
        return [(item[0], item[4]) for item in found]

    def _given(self) -> socket.socket:
        """The descriptor that is a connected socket already."""
        text = self.values["str"]
        if not text.isdecimal():
            raise OptionError("Unable to parse FD number %s" % text)
        try:
            return socket.socket(fileno=os.dup(int(text)))
        except (OSError, OverflowError):
            raise Error("File descriptor '%s' is not a socket" % text, errno=errno.EINVAL) from None
