# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Parts of a file by FTP's REST and RETR, over sessions that go on where they are (https://www.rfc-editor.org/rfc/rfc3659)."""

from __future__ import annotations

import ftplib
import ssl
import threading
from typing import Any, Optional
from urllib.parse import unquote, urlsplit

from ...errors import ProtocolError
from ...hooks import MAX_SIZE
from .wire import STEP, Patience, PlainSocket, Socket, connect, encrypt, reason, tls_context

SESSIONS = 8  # at a time
MAX_SKIP = 64 << 10  # bytes of a transfer that are rather read and dropped than asked for anew
MAX_REPLY = 64 << 10  # letters of one reply
PORTS = {"ftp": 21, "ftps": 990}
ANONYMOUS = ("anonymous", "ftp@example.com")  # libcurl's


class Session(ftplib.FTP):
    """A control connection, encrypted from its first byte on where there is a context, and at most one transfer under way:
    `data` is its connection, of which the byte at `position` comes next."""

    def __init__(self, host: str, port: int, seconds: float, context: Optional[ssl.SSLContext]) -> None:
        super().__init__()
        self.patience = Patience(seconds)
        self.data: Optional[Socket] = None
        self.position = -1
        self._context = context
        self._name = host
        self._heard = 0  # letters of the present reply
        connection: Socket = connect(host, port, self.patience)
        if context is not None:
            connection = encrypt(connection, context, host)  # type: ignore[arg-type]
        self.sock = connection
        self.af = connection.family
        self.file = connection.makefile("r", encoding="utf-8", errors="surrogateescape")
        self.encoding = "utf-8"

    def getmultiline(self) -> str:
        self._heard = 0
        return super().getmultiline()

    def getline(self) -> str:
        line: str = super().getline()
        self._heard += len(line)
        if self._heard > MAX_REPLY:
            raise ftplib.error_proto("a reply without end")
        return line

    def greet(self, username: str, password: str) -> None:
        """Log in, and settle on bytes as they are."""
        self.welcome = self.getresp()
        self.login(username, password)
        if self._context is not None:
            self.voidcmd("PBSZ 0")
            self.voidcmd("PROT P")
        self.voidcmd("TYPE I")

    def start(self, path: str, offset: int) -> None:
        """Begin a transfer at `offset`."""
        self.stop()
        self.patience.renew()
        host, port = self._passive()
        self.data = connect(host, port, self.patience)
        if offset:
            answer = self.sendcmd("REST %d" % offset)
            if not answer.startswith("350"):
                raise ftplib.error_reply(answer)
        answer = self.sendcmd("RETR " + path)
        if not answer.startswith("1"):
            raise ftplib.error_reply(answer)
        if self._context is not None and isinstance(self.data, PlainSocket):
            control: Any = self.sock
            self.data = encrypt(self.data, self._context, self._name, control.session)
        self.position = offset

    def _passive(self) -> tuple[str, int]:
        """Where the server waits for the data connection; always at its own address, whatever it says."""
        peer = self.sock.getpeername()  # type: ignore[union-attr]
        try:
            return peer[0], ftplib.parse229(self.sendcmd("EPSV"), peer)[1]
        except ftplib.error_perm:
            return peer[0], ftplib.parse227(self.sendcmd("PASV"))[1]

    def stop(self) -> None:
        """End the transfer that is under way; the server may say that it was not complete."""
        if self.data is None:
            return
        data, self.data = self.data, None
        self.position = -1
        data.close()
        self.patience.renew()
        try:
            self.voidresp()
        except ftplib.Error as exc:
            if not str(exc).startswith("4"):
                raise

    def take(self, view: memoryview) -> None:
        """Fill `view` with what comes next."""
        done = 0
        while done < len(view):
            self.patience.renew()
            upto = min(len(view), done + STEP)
            while done < upto:
                got = self.data.recv_into(view[done:upto])  # type: ignore[union-attr]
                if not got:
                    raise ProtocolError("transfer closed with %d bytes remaining to read" % (len(view) - done))
                done += got
        self.position += done

    def give_up(self) -> None:
        """Close both connections, whatever state they are in."""
        if self.data is not None:
            self.data.close()
        self.close()


class Ftp:
    """A file of known length that can be read from any place on, by several threads at once."""

    def __init__(self, url: str, seconds: float, username: Optional[str], password: Optional[str], verify: bool) -> None:
        """Raises ProtocolError."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or PORTS[parts.scheme]
        except ValueError:
            host, port = None, 0
        if not host:
            raise ProtocolError("URL using bad/illegal format or missing URL")
        path = unquote(parts.path[1:], errors="surrogateescape")
        self._path = path[: path.rfind(";type=")] if path[-7:-1].lower() == ";type=" else path
        if not self._path or any(letter in self._path for letter in "\r\n\0"):
            raise ProtocolError("URL using bad/illegal format or missing URL")
        if username is not None:
            self._login = (username, password or "")
        elif parts.username is not None:
            self._login = (unquote(parts.username), unquote(parts.password or ""))
        else:
            self._login = ANONYMOUS
        if any(letter in text for text in self._login for letter in "\r\n\0"):
            raise ProtocolError("A user name or password for FTP holds a line break")
        self._server = (host, port)
        self._seconds = seconds
        self._context = tls_context(verify) if parts.scheme == "ftps" else None
        self._slots = threading.Semaphore(SESSIONS)
        self._lock = threading.Lock()
        self._idle: list[Session] = []
        try:
            self.size = self._length()
        except BaseException:
            self.close()
            raise

    def _length(self) -> int:
        session = self._open()
        try:
            size = session.size(self._path)
        except BaseException as exc:
            session.give_up()
            if isinstance(exc, ftplib.error_perm) and str(exc).startswith("550"):
                raise ProtocolError("The file does not exist") from exc
            if isinstance(exc, (ftplib.Error, OSError, EOFError, ValueError)):
                raise ProtocolError(told(exc)) from exc
            raise
        self._idle.append(session)
        if size is None or size < 0:
            raise ProtocolError("Server didn't report file size.")
        if size > MAX_SIZE:
            raise ProtocolError("Server reported a file size that is too large")
        return size

    def _open(self) -> Session:
        """A new session, logged in. Raises ProtocolError."""
        session = Session(*self._server, self._seconds, self._context)
        try:
            session.greet(*self._login)
        except BaseException as exc:
            session.give_up()
            if isinstance(exc, ftplib.error_perm) and str(exc)[:3] in ("530", "331", "332"):
                raise ProtocolError("Access denied: %s" % str(exc)[:3]) from exc
            if isinstance(exc, (ftplib.Error, OSError, EOFError, ValueError)):
                raise ProtocolError(told(exc)) from exc
            raise
        return session

    def fetch(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`, all of them inside. Raises ProtocolError."""
        if not len(view):
            return
        with self._slots:
            while True:
                session, kept = self._session(offset)
                try:
                    if session.position < 0 or not 0 <= offset - session.position <= MAX_SKIP:
                        session.start(self._path, offset)
                    kept = False  # from here on nothing is said for the second time
                    if offset > session.position:
                        session.take(memoryview(bytearray(offset - session.position)))
                    session.take(view)
                    break
                except BaseException as exc:
                    session.give_up()
                    if kept and isinstance(exc, (ftplib.error_temp, EOFError, ConnectionError)):
                        self._drop_idle()  # sent away for its silence
                        continue
                    if isinstance(exc, (ftplib.Error, OSError, EOFError, ValueError)):
                        raise ProtocolError(told(exc)) from exc
                    raise
            with self._lock:
                self._idle.append(session)

    def _session(self, offset: int) -> tuple[Session, bool]:
        """A session, best of all one whose transfer is about to come to `offset`; and whether it was used before."""
        with self._lock:
            best = None
            for session in self._idle:
                if session.position >= 0 and 0 <= offset - session.position <= MAX_SKIP:
                    best = session
            if best is None and self._idle:
                best = self._idle[0]  # the one that was used the longest ago
            if best is not None:
                self._idle.remove(best)
                return best, True
        return self._open(), False

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for session in idle:
            session.give_up()

    def close(self) -> None:
        self._drop_idle()


def told(exc: BaseException) -> str:
    """What went wrong, with what the server said."""
    if isinstance(exc, ftplib.Error):
        text = str(exc).splitlines()[0][:200] if str(exc) else ""
        return "Weird server reply: %s" % text if isinstance(exc, ftplib.error_proto) else "The server refused: %s" % text
    if isinstance(exc, ValueError):
        return "Weird server reply: not a number"
    if isinstance(exc, EOFError):
        return "Connection closed by the server"
    return reason(exc)
