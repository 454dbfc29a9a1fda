# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""One file over SFTP (https://datatracker.ietf.org/doc/html/draft-ietf-secsh-filexfer-02) through asyncssh, whose event loop
runs in a thread of its own so that any thread can ask it for something.

asyncssh and not paramiko: it asks for many blocks at a time, reads all of the user's ssh configuration (ProxyJump, Match,
certificates), knows fsync and needs no library but cryptography.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import threading
from concurrent.futures import CancelledError, TimeoutError as Late  # not asyncio's, and not the built-in one before Python 3.11
from typing import Any, Coroutine, NamedTuple, Optional

from ...errors import Error, ProtocolError, Unsupported
from ...hooks import MAX_SIZE

try:
    import asyncssh
except ImportError:
    asyncssh = None  # Link says so

PATIENCE = 60.0  # seconds that the server may take for one request, or for all of logging in
BLOCK = 256 << 10  # bytes; no request asks for more
SMALL_BLOCK = 32 << 10  # bytes that every server takes
FAST_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"  # rather than the others: twice as fast, and as good
DEPTH = 64  # requests under way for one read or write
LIBSSH = "SFTP server: %s (libssh error code: 1, sftp error code: %d)"  # what QEMU makes of a server's answer
NO_AUTH = "failed to authenticate using publickey authentication and the identities held by your ssh-agent"
STATUS = {1: "End of file", 2: "No such file", 3: "Permission denied", 4: "Failure", 5: "Bad message", 8: "Operation unsupported"}


class Server(NamedTuple):
    """Where to log in, and how the host key is checked: `mode` is "none", "known_hosts" or "hash", with type and hash."""

    host: str
    port: Optional[int]
    user: Optional[str]
    mode: str
    type: str = ""
    hash: str = ""


class Judge(getattr(asyncssh, "SSHClient", object)):  # type: ignore[misc]
    """Judges the host key where asyncssh has nothing to compare it with; `key` is the one that was refused. `met` says that
    there was a connection."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.key: Any = None
        self.met = False

    def connection_made(self, conn: Any) -> None:
        self.met = True

    def validate_host_public_key(self, host: str, addr: str, port: int, key: Any) -> bool:
        self.key = key
        if self.server.mode != "hash":
            return False
        return hmac.compare_digest(self.fingerprint(), self.server.hash.replace(":", "").lower())

    def fingerprint(self) -> str:
        """The refused key's hash, in hexadecimal digits."""
        return hashlib.new(self.server.type, self.key.public_data, usedforsecurity=False).hexdigest()


class Link:
    """A file on a server that we are logged in to; `user`, `host` and `port` are what the user's configuration made of them."""

    def __init__(self, server: Server) -> None:
        """Raises Error in QEMU's words, and Unsupported without asyncssh."""
        if asyncssh is None:
            raise Unsupported("The ssh driver needs the Python library asyncssh (Debian: python3-asyncssh; PyPI: asyncssh, or diskwright[ssh])")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._connection: Any = None
        self._sftp: Any = None
        self._file: Any = None
        self._judge = Judge(server)
        self._block = SMALL_BLOCK
        self.user, self.host, self.port = server.user or "", server.host, 22 if server.port is None else server.port
        try:
            self._ask(self._connect(server))
        except BaseException:
            self.close()
            raise

    def _ask(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The result of `coroutine`, which runs in the loop. Raises Error."""
        if self._loop.is_closed():
            coroutine.close()
            raise ProtocolError("The connection is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(PATIENCE)
        except Late:
            future.cancel()
            raise ProtocolError("%s:%d did not answer in %d seconds" % (self.host, self.port, PATIENCE)) from None
        except (asyncssh.Error, EOFError, ValueError) as exc:
            raise ProtocolError(told(exc)) from exc
        except CancelledError:
            raise ProtocolError("Connection lost") from None
        except BaseException:
            future.cancel()
            raise

    # -- logging in ----------------------------------------------------------------------------------------------

    async def _connect(self, server: Server) -> None:
        place = {"host": server.host, "port": () if server.port is None else server.port}
        arguments: dict[str, Any] = {**place, "config": (), "password_auth": False, "kbdint_auth": False, "client_factory": self._same_judge}
        if server.user is not None:
            arguments["username"] = server.user
        if server.mode != "known_hosts":
            arguments["known_hosts"] = None if server.mode == "none" else ([], [], [])
        try:
            options = asyncssh.SSHClientConnectionOptions(**arguments)
            if not options.config.get("Ciphers"):
                arguments["encryption_algs"] = FAST_CIPHERS
                options = asyncssh.SSHClientConnectionOptions(**arguments)
            if server.mode == "known_hosts" and options.known_hosts is None:
                # A configuration without such files is no reason to trust anybody.
                options = asyncssh.SSHClientConnectionOptions(**arguments, known_hosts=([], [], []))
        except (asyncssh.Error, OSError, ValueError) as exc:
            raise Error("failed to parse ~/.ssh/config: %s" % exc) from exc
        self.user, self.host, self.port = options.username, options.host, options.port
        try:
            self._connection = await asyncssh.connect(**place, options=options)
        except asyncssh.HostKeyNotVerifiable as exc:
            raise Error(self._verdict(server, options)) from exc
        except asyncssh.KeyExchangeFailed as exc:
            raise Error("failed to establish SSH session: %s" % told(exc)) from exc
        except asyncssh.PermissionDenied as exc:
            raise Error(NO_AUTH) from exc
        except (asyncssh.Error, EOFError, ValueError) as exc:
            raise Error("failed to establish SSH session: %s" % told(exc)) from exc
        except asyncio.TimeoutError as exc:  # the configuration's ConnectTimeout
            raise Error("Failed to connect to '%s:%d': Connection timed out" % (self.host, self.port)) from exc
        except OSError as exc:
            raise Error("failed to establish SSH session: %s" % told(exc) if self._judge.met else self._unreachable(exc)) from exc
        try:
            self._sftp = await self._connection.start_sftp_client()
        except (asyncssh.Error, EOFError, ValueError) as exc:
            raise Error("failed to initialize sftp handle: %s" % told(exc)) from exc

    def _same_judge(self) -> Judge:
        return self._judge

    def _unreachable(self, exc: OSError) -> str:
        import socket

        if isinstance(exc, socket.gaierror):
            return "address resolution failed for %s:%d: %s" % (self.host, self.port, exc.strerror)
        text = exc.strerror or str(exc)
        if exc.errno is not None:
            import os

            text = os.strerror(exc.errno)  # asyncio's own text names the address once more
        return "Failed to connect to '%s:%d': %s" % (self.host, self.port, text)

    def _verdict(self, server: Server, options: Any) -> str:
        """Why the host key was refused."""
        key = self._judge.key
        if key is None:
            return "error while checking the host"
        name = key.algorithm.decode("ascii", "replace")
        if server.mode == "hash":
            text = "remote host %s key fingerprint '%s:%s' does not match host_key_check '%s:%s'"
            return text % (name, server.type, self._judge.fingerprint(), server.type, server.hash)
        known = options.known_hosts
        if not known:
            from pathlib import Path

            path = Path("~", ".ssh", "known_hosts").expanduser()
            known = str(path) if path.is_file() else ([], [], [])
        host = options.host_key_alias or options.host
        try:
            keys = asyncssh.match_known_hosts(known, host, "", options.port if options.port != 22 else None)[0]
        except (OSError, ValueError) as exc:
            return "error while checking for known server: %s" % exc
        if any(other.algorithm == key.algorithm for other in keys):
            text = "host key (%s key with fingerprint %s) does not match the one in known_hosts; this may be a possible attack"
            return text % (name, key.get_fingerprint("sha256"))
        return "host key for this server not found, another type exists" if keys else "no host key was found in known_hosts"

    # -- the file ------------------------------------------------------------------------------------------------

    def open(self, path: str, writable: bool, create: bool = False) -> int:
        """Open a file in place of the one that is open, and return its size. Raises Error in QEMU's words."""
        return int(self._ask(self._open(path, writable, create)))

    async def _open(self, path: str, writable: bool, create: bool) -> int:
        mode = asyncssh.FXF_READ
        if writable:
            mode |= asyncssh.FXF_WRITE
        if create:
            mode |= asyncssh.FXF_CREAT | asyncssh.FXF_TRUNC
        attributes = asyncssh.SFTPAttrs(permissions=0o644) if create else asyncssh.SFTPAttrs()
        try:
            # A block size of 0 makes each call one request; how many there are at a time is decided here.
            opened = await self._sftp.open(path, mode, attributes, encoding=None, block_size=0)
        except (asyncssh.Error, ValueError) as exc:
            number = {2: 2, 3: 13}.get(getattr(exc, "code", 0), 22)
            raise Error("failed to open remote file '%s': %s" % (path, told(exc)), filename=path, errno=number) from exc
        if self._file is not None:
            old, self._file = self._file, None
            await old.close()
        self._file = opened
        try:
            size = (await opened.stat()).size
        except asyncssh.Error as exc:
            raise Error("failed to read file attributes: %s" % told(exc), filename=path) from exc
        if size is None or not 0 <= size <= MAX_SIZE:
            raise Error("failed to read file attributes: the server tells no size", filename=path)
        limits = getattr(self._sftp, "limits", None)  # new in asyncssh 2.15
        blocks = [value for value in (getattr(limits, "max_read_len", 0), getattr(limits, "max_write_len", 0)) if value]
        self._block = max(512, min([BLOCK, *blocks])) if len(blocks) == 2 else SMALL_BLOCK
        return int(size)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`, zeroes beyond the end."""
        self._in_blocks(self._read_block, offset, view)

    def write(self, offset: int, view: memoryview) -> None:
        """Write `view` at `offset`."""
        self._in_blocks(self._write_block, offset, view)

    def _in_blocks(self, action: Any, offset: int, view: memoryview) -> None:
        for start in range(0, len(view), self._block * DEPTH):
            self._ask(self._side_by_side(action, offset + start, view[start : start + self._block * DEPTH]))

    async def _side_by_side(self, action: Any, offset: int, view: memoryview) -> None:
        if len(view) <= self._block:
            await action(offset, view)
            return
        block = self._block
        tasks = [asyncio.ensure_future(action(offset + start, view[start : start + block])) for start in range(0, len(view), block)]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # nobody writes to the view once we are gone
            raise

    async def _read_block(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            data = await self._file.read(len(view) - done, offset + done)
            if len(data) > len(view) - done:
                raise ProtocolError("The server sent more than it was asked for")
            if not data:
                view[done:] = bytes(len(view) - done)
                return
            view[done : done + len(data)] = data
            done += len(data)

    async def _write_block(self, offset: int, view: memoryview) -> None:
        await self._file.write(bytes(view), offset)

    def truncate(self, size: int) -> None:
        """Make the file `size` bytes long."""
        self._ask(self._file.truncate(size))

    def fsync(self) -> bool:
        """Have the server bring the file to its disk; False where it cannot do that."""
        try:
            self._ask(self._file.fsync())
        except ProtocolError as exc:
            if isinstance(exc.__cause__, asyncssh.SFTPOpUnsupported):
                return False
            raise
        return True

    def close(self) -> None:
        """Log out and end the thread. Never raises."""
        if self._loop.is_closed():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result(10)
        except (Late, CancelledError):
            pass  # a task that does not let itself be cancelled
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _leave(self) -> None:
        """Close what is open, and end whatever is still being waited for."""
        if self._file is not None:
            await _for_a_while(self._file.close())
        if self._sftp is not None:
            self._sftp.exit()
        if self._connection is not None:
            self._connection.close()
            await _for_a_while(self._connection.wait_closed())
            self._connection.abort()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def _for_a_while(farewell: Coroutine[Any, Any, Any]) -> None:
    """Wait for the answer to a farewell, which need not come."""
    try:
        await asyncio.wait_for(farewell, min(2.0, PATIENCE))
    except (asyncio.TimeoutError, asyncssh.Error, OSError, EOFError, ValueError):
        pass  # the server has nothing more to say


def told(exc: BaseException) -> str:
    """What the server or asyncssh says is wrong, in QEMU's words for the former."""
    if isinstance(exc, asyncssh.SFTPError):
        text = STATUS.get(exc.code) or str(exc.reason).splitlines()[0][:200] if exc.reason or exc.code in STATUS else "Unknown error"
        return LIBSSH % (text, exc.code)
    text = str(getattr(exc, "strerror", "") or getattr(exc, "reason", "") or exc) or type(exc).__name__
    return text.splitlines()[0][:200]
