# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""ssh: a file on a server, by SFTP (https://www.qemu.org/docs/master/system/qemu-block-drivers.html).

QEMU's BlockdevOptionsSsh describes the options.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar, Iterable, Mapping, Optional
from urllib.parse import parse_qsl, unquote, urlsplit

from ...errors import Error, OptionError, ProtocolError
from ...extent import ALLOCATED, DATA, OFFSET_VALID, Extent
from ...node import MAX_SIZE, Alloc, OpenFlags, Protocol
from ...options import Options, Size, opt

if TYPE_CHECKING:
    from typing_extensions import Self

    from .link import Link, Server

STORED = DATA | OFFSET_VALID | ALLOCATED
HASHES = {"md5": "md5", "sha1": "sha1", "sha256": "sha256"}


class SshOptions(Options):
    """Runtime options of ssh."""

    server_host: Optional[str] = opt(None, key="server.host", help="host name or address")
    server_port: Optional[str] = opt(None, key="server.port", help="port, a number")
    path: Optional[str] = opt(None, help="path of the file on the server")
    user: Optional[str] = opt(None, help="who to log in as; what the ssh configuration says, or the local user's name, otherwise")
    mode: Optional[str] = opt(
        None,
        key="host-key-check.mode",
        choices=("none", "hash", "known_hosts"),
        refusal="Parameter 'mode' does not accept value '%s'",
        help="what the host key is compared with",
    )
    type: Optional[str] = opt(
        None, key="host-key-check.type", choices=tuple(HASHES), refusal="Parameter 'type' does not accept value '%s'", help="of mode hash: which one"
    )
    hash: Optional[str] = opt(None, key="host-key-check.hash", help="of mode hash: the host key's, in hexadecimal digits")
    host: Optional[str] = opt(None, help="the old name of server.host", hidden=True)
    port: Optional[int] = opt(None, help="the old name of server.port", hidden=True)
    host_key_check: Optional[str] = opt(None, key="host_key_check", help="host-key-check in one word: yes, no, md5:HASH, sha1:HASH, sha256:HASH", hidden=True)
    filename: str = opt("", help="nothing: a file is named by its path", hidden=True)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], unknown: str = "") -> Self:
        for key in ("server", "host-key-check"):
            if values.get(key) is not None:
                raise OptionError("Invalid parameter type for '%s', expected: object" % key)
        port = values.get("server.port")
        if isinstance(port, int) and not isinstance(port, bool):
            values = {**values, "server.port": str(port)}
        return super().from_mapping(values, "Parameter '%s' is unexpected")


class SshCreateOptions(Options):
    """Creation options of ssh."""

    DASHES = False

    size: Size = opt(0, help="Virtual disk size")


class Ssh(Protocol):
    """A file on an SSH server."""

    driver = "ssh"
    options_class = SshOptions
    create_options: ClassVar[type[Options]] = SshCreateOptions
    creatable = True
    growable = True
    zero_initialized = True
    dirty = None
    strong_options = ("server.host", "server.port", "host", "port", "path", "user", "host_key_check")

    def __init__(self, options: SshOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        server, self._path = _server(options)
        if options.host_key_check is not None:
            self.baseless = "with host_key_check set"
        self._query = "?host_key_check=" + options.host_key_check if options.host_key_check is not None else ""
        from .link import Link

        self._remote = Link(server)
        try:
            self._size = self._remote.open(self._path, flags.writable)
            self._syncs = not flags.writable or self._remote.fsync()
            if not self._syncs:
                self.warnings.append("ssh server %s does not support fsync" % server.host)
        except BaseException:
            self._remote.close()
            raise

    def options_name(self) -> str:
        link = self._remote
        host = "[%s]" % link.host if ":" in link.host else link.host
        return "ssh://%s@%s:%d%s%s" % (link.user, host, link.port, self._path, self._query)

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        """Of `ssh://[user@]host[:port]/path[?host_key_check=CHECK]`. Raises OptionError."""
        try:
            parts = urlsplit(filename)
            host, port = parts.hostname, parts.port
        except ValueError:
            return {}  # QEMU finds out later that something is missing
        if not host:
            raise OptionError("missing hostname in URI")
        if not parts.path:
            raise OptionError("missing remote path in URI")
        found: dict[str, Any] = {"host": host, "path": unquote(parts.path, errors="surrogateescape")}
        if port is not None:
            found["port"] = str(port)
        user = parts.netloc.rpartition("@")[0]
        if user:
            found["user"] = unquote(user)
        for key, value in parse_qsl(parts.query, keep_blank_values=True):
            if key == "host_key_check":
                found[key] = value
        return found

    # -- data ----------------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, STORED, self, offset),)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        self._try("read", self._remote.read, host_offset, view)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self._try("write", self._remote.write, host_offset, view)
        with self._lock:
            self._size = max(self._size, host_offset + len(view))

    def _try(self, what: str, action: Any, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except (ProtocolError, OSError) as exc:
            raise ProtocolError("%s: %s failed: %s" % (self.filename, what, exc), filename=self.filename, errno=errno.EIO) from exc

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        """What is behind the end reads as zeroes once the file is longer."""
        end = offset + length
        with self._lock:
            start = max(offset, self._size)
        if start >= end:
            return offset, 0
        self._pwrite(end - 1, memoryview(b"\0"))
        return start, end - start

    def _truncate(self, size: int, preallocation: str) -> None:
        if preallocation != "off":
            raise OptionError("Unsupported preallocation mode '%s'" % preallocation)
        self._try("truncate", self._remote.truncate, size)
        with self._lock:
            self._size = size

    def _flush(self) -> None:
        if self._syncs and not self.flags.no_flush:
            self._try("fsync", self._remote.fsync)

    def _changed_flags(self, old: OpenFlags) -> None:
        if self.flags.writable != old.writable:
            self._remote.open(self._path, self.flags.writable)

    def _release_host(self) -> None:
        link: Optional[Link] = self.__dict__.get("_remote")
        if link is not None:
            link.close()

    # -- creation ------------------------------------------------------------------------------------------------

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        """Create or empty the file. Raises Error in QEMU's words."""
        server, path = _server(SshOptions.from_mapping(cls.parse_name(filename)))
        if options.size > MAX_SIZE:
            raise Error("Failed to grow file: File too large", errno=errno.EFBIG)
        from .link import Link

        link = Link(server)
        try:
            link.open(path, writable=True, create=True)
            if options.size:
                try:
                    link.truncate(options.size)
                except ProtocolError as exc:
                    raise Error("Failed to grow file: %s" % exc, errno=errno.EIO) from exc
        finally:
            link.close()


def _server(options: SshOptions) -> tuple[Server, str]:
    """Where the options lead, and the path there. Raises OptionError in QEMU's words and order."""
    host, port, mode, kind, hash = options.server_host, options.server_port, options.mode, options.type, options.hash
    if options.port is not None and options.host is None:
        raise OptionError("port may not be used without host")
    if options.host is not None:
        host, port = options.host, str(options.port) if options.port is not None else ""
    if options.host_key_check is not None:
        mode, kind, hash = _check(options.host_key_check)
    if host is None or port is None:
        raise OptionError("Parameter '%s' is missing" % ("server" if host is port else "server.host" if host is None else "server.port"))
    if options.path is None:
        raise OptionError("Parameter 'path' is missing")
    if mode is None and (kind is not None or hash is not None):
        raise OptionError("Parameter 'host-key-check.mode' is missing")
    for name, value in (("type", kind), ("hash", hash)):
        if (mode == "hash") != (value is not None):
            raise OptionError("Parameter 'host-key-check.%s' is %s" % (name, "missing" if mode == "hash" else "unexpected"))
    if options.filename:
        raise OptionError("Parameter 'filename' is unexpected")
    if port and not (port.isascii() and port.isdigit()):
        raise OptionError("Use only numeric port value")
    if host.startswith("-") or any(not (letter.isalnum() or letter in "._-:" or letter == "%" and ":" in host) for letter in host):
        # The user's configuration may hand it to a command (ProxyCommand), and an image may have named it.
        raise OptionError("'%s' is no host name" % host)
    number = int(port[:6]) if port else None
    if number is not None and not 0 < number < 1 << 16:
        raise OptionError("Failed to connect to '%s:%s': Connection refused" % (host, port))
    from .link import Server

    return Server(host, number, options.user, mode or "known_hosts", kind or "", hash or ""), options.path


def _check(text: str) -> tuple[str, Optional[str], Optional[str]]:
    """Mode, type and hash of a host_key_check in its short form. Raises OptionError."""
    if text == "no":
        return "none", None, None
    if text == "yes":
        return "known_hosts", None, None
    kind, colon, hash = text.partition(":")
    if not colon or kind not in HASHES:
        raise OptionError("unknown host_key_check setting (%s)" % text)
    return "hash", kind, hash
