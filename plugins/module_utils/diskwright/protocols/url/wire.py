# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""TCP and TLS connections on which no call outlasts a deadline (https://www.rfc-editor.org/rfc/rfc8446), and reasons in words."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from http.client import BadStatusLine, HTTPException, IncompleteRead, RemoteDisconnected
from typing import Any, Optional, Union

from ...errors import ProtocolError

STEP = 256 << 10  # bytes of an answer; the timeout runs anew for each


class Patience:
    """Until when the present step of a conversation may last: `seconds` from its beginning, 0 for as long as it takes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = 0.0
        self.renew()

    def renew(self) -> None:
        self.end = time.monotonic() + self.seconds

    def left(self) -> Optional[float]:
        """Seconds, None for no limit. Raises ProtocolError where there are none left."""
        if not self.seconds:
            return None
        left = self.end - time.monotonic()
        if left <= 0:
            raise self.over()
        return left

    def over(self) -> ProtocolError:
        return ProtocolError("Operation timed out after %d milliseconds" % (self.seconds * 1000))


class _Patient:
    """What both kinds of sockets do before they wait."""

    patience: Patience

    def recv_into(self, *args: Any) -> int:
        self.settimeout(self.patience.left())  # type: ignore[attr-defined]
        try:
            return super().recv_into(*args)  # type: ignore[misc, no-any-return]
        except (socket.timeout, ssl.SSLWantReadError):
            raise self.patience.over() from None

    def sendall(self, *args: Any) -> None:
        self.settimeout(self.patience.left())  # type: ignore[attr-defined]
        try:
            super().sendall(*args)  # type: ignore[misc]
        except (socket.timeout, ssl.SSLWantWriteError):
            raise self.patience.over() from None


class PlainSocket(_Patient, socket.socket):
    """A TCP connection."""


class TlsSocket(_Patient, ssl.SSLSocket):
    """A TLS connection over one."""


Socket = Union[PlainSocket, TlsSocket]


def connect(host: str, port: int, patience: Patience) -> PlainSocket:
    """A connection to `host`. Raises ProtocolError."""
    started = time.monotonic()
    for family, kind, number, _name, address in _resolve(host, port, patience):
        connection = PlainSocket(family, kind, number)
        connection.patience = patience
        try:
            connection.settimeout(patience.left())
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as exc:
            connection.close()
            if isinstance(exc, socket.timeout):
                raise patience.over() from None
        except BaseException:
            connection.close()
            raise
    spent = (time.monotonic() - started) * 1000
    raise ProtocolError("Failed to connect to %s port %d after %d ms: Couldn't connect to server" % (host, port, spent))


def _resolve(host: str, port: int, patience: Patience) -> list[Any]:
    """Addresses of `host`. The resolver of the C library knows no deadline, so it gets a thread that may be left behind."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            pass  # no such host: nothing found

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience.left())
    if thread.is_alive():
        raise patience.over()
    if not found:
        raise ProtocolError("Could not resolve host: %s" % host)
    return found


def tls_context(verify: bool) -> ssl.SSLContext:
    """The host's authorities, or, without `verify`, whoever answers."""
    context = ssl.create_default_context()
    context.sslsocket_class = TlsSocket
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def encrypt(connection: PlainSocket, context: ssl.SSLContext, host: str, session: Optional[ssl.SSLSession] = None) -> TlsSocket:
    """TLS over `connection`, which it takes the place of; closed if that fails. Raises ProtocolError."""
    patience = connection.patience
    try:
        connection.settimeout(patience.left())
        wrapped = context.wrap_socket(connection, server_hostname=host, session=session, do_handshake_on_connect=False)
        wrapped.patience = patience  # type: ignore[attr-defined]
        try:
            wrapped.do_handshake()
        except BaseException:
            wrapped.close()
            raise
    except socket.timeout:
        raise patience.over() from None
    except (OSError, ValueError) as exc:  # ValueError: a name that cannot be in a certificate
        connection.close()
        raise ProtocolError(reason(exc)) from exc
    return wrapped  # type: ignore[return-value]


def reason(exc: BaseException) -> str:
    """What went wrong, in libcurl's words where it has some."""
    if isinstance(exc, ProtocolError):
        return str(exc)
    if isinstance(exc, ssl.SSLCertVerificationError):
        return "server certificate verification failed: %s" % exc.verify_message
    if isinstance(exc, ssl.SSLError):
        return "TLS connection failed: %s" % (exc.reason or exc.strerror or exc)
    if isinstance(exc, IncompleteRead):
        return "transfer closed with %s bytes remaining to read" % (exc.expected if exc.expected is not None else "outstanding")
    if isinstance(exc, RemoteDisconnected):
        return "Empty reply from server"
    if isinstance(exc, BadStatusLine):
        return "Received HTTP/0.9 when not allowed"
    if isinstance(exc, HTTPException):
        return "Weird server reply: %s" % (str(exc) or type(exc).__name__)
    if isinstance(exc, OSError):
        return exc.strerror or str(exc)
    return str(exc)
