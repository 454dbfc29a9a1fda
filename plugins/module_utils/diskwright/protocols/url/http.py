# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Ranges of a resource by HTTP/1.1, over connections that are kept (https://www.rfc-editor.org/rfc/rfc9110)."""

from __future__ import annotations

import base64
import ssl
import threading
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Callable, NamedTuple, Optional, Union
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from ...errors import ProtocolError
from ...hooks import MAX_SIZE
from .proxy import Proxy
from .wire import STEP, Patience, Socket, connect, encrypt, reason, tls_context

CONNECTIONS = 8  # at a time
MAX_REDIRECTS = 30
MAX_DRAIN = 64 << 10  # bytes of an unwanted body that are read so that a connection can be kept
MAX_DIGITS = 20  # of a number in a header
PORTS = {"http": 80, "https": 443}
MOVED = (301, 302, 303, 307, 308)
NO_HEAD = (400, 403, 405, 501)  # said by servers that would answer a GET
EXPIRED = (401, 403, 404, 410)  # said where a redirection led to a place that lasts for a while only

RANGES = "Server does not support 'range' (byte ranges)."
CHANGED = "The file on the server has changed while it was read"


class Credentials(NamedTuple):
    """What a server wants to see before it answers; a proxy's are in its Proxy."""

    username: Optional[str]
    password: str
    cookie: str
    verify: bool


class Place(NamedTuple):
    """Where a request goes: `origin` is scheme, host and port, `target` the rest; `login` is the user and password in the URL."""

    origin: tuple[str, str, int]
    target: str
    login: Optional[tuple[str, str]]
    url: str


def place(url: str) -> Place:
    """The parts of a URL. Raises ProtocolError for one that is not well-formed or not of HTTP."""
    try:
        parts: SplitResult = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or any(ord(letter) <= 32 or ord(letter) == 127 for letter in host):
        raise ProtocolError("URL using bad/illegal format or missing URL")
    if parts.scheme not in PORTS:
        raise ProtocolError('Protocol "%s" not supported' % parts.scheme)
    login = (unquote(parts.username), unquote(parts.password or "")) if parts.username is not None else None
    target = quote(parts.path or "/", safe="/%!$&'()*+,;=:@~-._") + ("?" + quote(parts.query, safe="/%!$&'()*+,;=:@~-._?[]{}|^") if parts.query else "")
    return Place((parts.scheme, host, port or PORTS[parts.scheme]), target, login, url)


class Connection(HTTPConnection):
    """A connection to an origin, directly or through a proxy; `used` says that it has answered before, and was kept."""

    sock: Socket
    used = False

    def __init__(self, origin: tuple[str, str, int], proxy: Optional[Proxy], seconds: float, context: Optional[ssl.SSLContext]) -> None:
        scheme, host, port = origin
        super().__init__(host, port)
        if port == PORTS[scheme]:
            self.default_port = port  # so that the header Host is without it
        self.origin = origin
        self.proxy = proxy
        self.patience = Patience(seconds)
        self._context = context

    def connect(self) -> None:
        scheme, host, port = self.origin
        if self.proxy is None:
            connection = connect(host, port, self.patience)
        else:
            connection = connect(self.proxy.host, self.proxy.port, self.patience)
            if scheme == "https":
                self._ask_for_tunnel(connection)
        self.sock = encrypt(connection, self._context, host) if self._context is not None else connection

    def _ask_for_tunnel(self, connection: Socket) -> None:
        """Have the proxy connect to the origin."""
        name = "%s:%d" % (("[%s]" if ":" in self.host else "%s") % self.host, self.origin[2])
        lines = ["CONNECT %s HTTP/1.1" % name, "Host: " + name]
        lines += ["%s: %s" % item for item in self.proxy_headers().items()]
        try:
            connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
            answer = HTTPResponse(connection, method="CONNECT")
            answer.begin()
            answer.close()
            if not 200 <= answer.status < 300:
                raise ProtocolError("CONNECT tunnel failed, response %d" % answer.status)
        except BaseException:
            connection.close()
            raise

    def proxy_headers(self) -> dict[str, str]:
        if self.proxy is None or self.proxy.username is None:
            return {}
        return {"Proxy-Authorization": basic(self.proxy.username, self.proxy.password)}


def basic(username: str, password: str) -> str:
    return "Basic " + base64.b64encode(("%s:%s" % (username, password)).encode("utf-8", "surrogateescape")).decode("ascii")


class Http:
    """A resource of known length whose ranges can be asked for, by several threads at once."""

    def __init__(self, url: str, seconds: float, credentials: Credentials, proxy_for: Callable[[str, str], Optional[Proxy]]) -> None:
        """`proxy_for(scheme, host)` says through what a server is reached. Raises ProtocolError."""
        self._first = place(url)
        self._current = self._first  # where redirections led to
        self._seconds = seconds
        self._credentials = credentials
        self._proxy_for = proxy_for
        self._slots = threading.Semaphore(CONNECTIONS)
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._context = tls_context(credentials.verify) if self._first.origin[0] == "https" else None
        self._validator = ""  # a strong one, for If-Range
        self._seen: dict[str, str] = {}  # the headers that change with the content
        try:
            self.size = self._length()
        except BaseException:
            self.close()
            raise

    # -- opening -------------------------------------------------------------------------------------------------

    def _length(self) -> int:
        """The length of the resource, of which single ranges must be there for the asking. Raises ProtocolError."""
        answer = self._exchange("HEAD", {}, None)
        length = number(answer.headers.get("Content-Length")) if answer.status == 200 else None
        ranges = (answer.headers.get("Accept-Ranges") or "").lower().replace(",", " ").split()
        if answer.status >= 400 and answer.status not in NO_HEAD:
            raise ProtocolError("The requested URL returned error: %d" % answer.status)
        if length is None or "bytes" not in ranges and "none" not in ranges:
            # Some that do not say so can do it all the same.
            found = self._length_by_range(length)
            if found is None and answer.status >= 400:
                raise ProtocolError("The requested URL returned error: %d" % answer.status)
            if found is None and length is None:
                raise ProtocolError("Server didn't report file size.")
            ranges = ["bytes"] if found is not None else []
            length = found if found is not None else length
        else:
            self._remember(answer)
        if "bytes" not in ranges:
            raise ProtocolError(RANGES)
        if length is None or length > MAX_SIZE:
            raise ProtocolError("Server reported a file size that is too large")
        return length

    def _length_by_range(self, length: Optional[int]) -> Optional[int]:
        """The length that comes with the first byte; None where the server does not serve it alone."""
        answer = self._exchange("GET", {"Range": "bytes=0-0"}, None)
        if answer.status == 416 and not length:
            return _total(answer)
        if answer.status != 206:
            return None
        self._remember(answer)
        return _total(answer)

    def _remember(self, answer: HTTPResponse) -> None:
        for name in ("ETag", "Last-Modified"):
            value = answer.headers.get(name)
            if value:
                self._seen[name] = value
        tag = self._seen.get("ETag", "")
        self._validator = tag if tag.startswith('"') else ""

    # -- reading -------------------------------------------------------------------------------------------------

    def fetch(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`, all of them inside. Raises ProtocolError."""
        while len(view):
            headers = {"Range": "bytes=%d-%d" % (offset, offset + len(view) - 1)}
            if self._validator:
                headers["If-Range"] = self._validator
            before = self._current
            answer = self._exchange("GET", headers, (offset, view))
            if answer.status in EXPIRED and before is not self._first:
                with self._lock:
                    self._current = self._first
                answer = self._exchange("GET", headers, (offset, view))
            if answer.status != 206:
                raise ProtocolError(self._refusal(answer))
            count = answer.taken  # type: ignore[attr-defined]
            offset += count
            view = view[count:]

    def _refusal(self, answer: HTTPResponse) -> str:
        if answer.status in (412, 416) or answer.status == 200 and self._is_other(answer):
            return CHANGED
        return RANGES if answer.status == 200 else "The requested URL returned error: %d" % answer.status

    def _is_other(self, answer: HTTPResponse) -> bool:
        """Whether the headers speak of other content than the first ones did."""
        for name, value in self._seen.items():
            now = answer.headers.get(name)
            if now and now != value:
                return True
        length = number(answer.headers.get("Content-Length"))
        return answer.status == 200 and length is not None and length != self.size

    def _take(self, answer: HTTPResponse, patience: Patience, offset: int, view: memoryview) -> int:
        """Read the body of a 206 into `view`; how many bytes it had. Raises ProtocolError for one that is not what was asked for."""
        start, end, total = _content_range(answer)
        if self._is_other(answer) or total is not None and total != self.size:
            raise ProtocolError(CHANGED)
        if start != offset or end is None or not start <= end < offset + len(view):
            raise ProtocolError("Server sent another range than the one it was asked for")
        if (answer.headers.get("Content-Encoding") or "identity").lower() != "identity":
            raise ProtocolError("Server sent compressed data that nobody asked for")
        count = end + 1 - start
        if answer.length is not None and answer.length != count:
            raise ProtocolError("Server reported %d bytes where it announced %d" % (answer.length, count))
        done = 0
        while done < count:
            patience.renew()
            got = answer.readinto(view[done : min(count, done + STEP)])
            if not got:
                raise ProtocolError("transfer closed with %d bytes remaining to read" % (count - done))
            done += got
        return count

    # -- requests ------------------------------------------------------------------------------------------------

    def _exchange(self, method: str, headers: dict[str, str], into: Optional[tuple[int, memoryview]]) -> HTTPResponse:
        """The answer to a request, redirections followed; the body of a 206 is in `into` (`taken` bytes), any other is dropped."""
        with self._lock:
            where = self._current
        for _round in range(MAX_REDIRECTS + 1):
            answer = self._request(where, method, headers, into)
            location = answer.headers.get("Location")
            if answer.status not in MOVED or not location:
                with self._lock:
                    self._current = where
                return answer
            try:
                where = place(urljoin(where.url, location))
            except ValueError as exc:
                raise ProtocolError("URL using bad/illegal format or missing URL") from exc
        raise ProtocolError("Maximum (%d) redirects followed" % MAX_REDIRECTS)

    def _request(self, where: Place, method: str, headers: dict[str, str], into: Optional[tuple[int, memoryview]]) -> HTTPResponse:
        """One request and its answer. A kept connection that the server has given up meanwhile is replaced, once."""
        with self._slots:
            again = True
            while True:
                connection = self._connection(where.origin)
                try:
                    answer = self._send(connection, where, method, headers)
                    answer.taken = 0  # type: ignore[attr-defined]
                    if into is not None and answer.status == 206:
                        answer.taken = self._take(answer, connection.patience, *into)  # type: ignore[attr-defined]
                    self._release(connection, answer)
                    return answer
                except BaseException as exc:
                    connection.close()
                    if again and connection.used and isinstance(exc, ConnectionError):
                        again = False
                        self._drop_idle()
                        continue
                    if isinstance(exc, ValueError):  # no details: it may be a password
                        raise ProtocolError("A header cannot be sent: it has a line break, or characters beyond Latin-1") from None
                    if isinstance(exc, (OSError, HTTPException)):
                        raise ProtocolError(reason(exc)) from exc
                    raise

    def _send(self, connection: Connection, where: Place, method: str, headers: dict[str, str]) -> HTTPResponse:
        connection.patience.renew()
        target = where.target
        if connection.proxy is not None and where.origin[0] == "http":
            host = ("[%s]" if ":" in where.origin[1] else "%s") % where.origin[1]
            target = "http://%s:%d%s" % (host, where.origin[2], target)
            headers = {**headers, **connection.proxy_headers()}
        login = where.login
        if where.origin == self._first.origin:  # nobody else is to see these
            if self._credentials.username is not None:
                login = (self._credentials.username, self._credentials.password)
            elif login is None:
                login = self._first.login
            if self._credentials.cookie:
                headers = {**headers, "Cookie": self._credentials.cookie}
        if login is not None:
            headers = {**headers, "Authorization": basic(*login)}
        connection.request(method, target, headers={"User-Agent": "diskwright", "Accept": "*/*", **headers})
        return connection.getresponse()

    def _connection(self, origin: tuple[str, str, int]) -> Connection:
        with self._lock:
            for connection in reversed(self._idle):
                if connection.origin == origin:
                    self._idle.remove(connection)
                    return connection
        if origin[0] == "https" and self._context is None:
            self._context = tls_context(self._credentials.verify)
        return Connection(origin, self._proxy_for(*origin[:2]), self._seconds, self._context if origin[0] == "https" else None)

    def _release(self, connection: Connection, answer: HTTPResponse) -> None:
        """Keep the connection if nothing of this answer is left on it."""
        if not answer.isclosed() and (answer.length is None or answer.length <= MAX_DRAIN):
            connection.patience.renew()
            answer.read(MAX_DRAIN + 1)
        if answer.isclosed() and not answer.will_close:
            connection.used = True
            with self._lock:
                self._idle.append(connection)
                while len(self._idle) > CONNECTIONS:
                    self._idle.pop(0).close()
            return
        answer.close()
        connection.close()

    def _drop_idle(self) -> None:
        """Others that waited as long will have been given up too."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        self._drop_idle()


def number(text: Union[str, None]) -> Optional[int]:
    """A header's number of bytes, None for what is none."""
    text = (text or "").strip()
    if not text.isascii() or not text.isdigit() or len(text) > MAX_DIGITS:
        return None
    return int(text)


def _content_range(answer: HTTPResponse) -> tuple[Optional[int], Optional[int], Optional[int]]:
    """First and last byte and the length of the whole, as the header Content-Range says; None for what it does not say."""
    unit, _space, rest = (answer.headers.get("Content-Range") or "").strip().partition(" ")
    span, _slash, total = rest.partition("/")
    first, _dash, last = span.partition("-")
    if unit.lower() != "bytes":
        return None, None, None
    return number(first), number(last), number(total)


def _total(answer: HTTPResponse) -> Optional[int]:
    return _content_range(answer)[2]
