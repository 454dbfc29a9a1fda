# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""nfs: a file on an NFS server, without mounting it, through libnfs (https://www.rfc-editor.org/rfc/rfc1813, BlockdevOptionsNfs of
https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html)."""

from __future__ import annotations

import errno
import os

from ...errors import Error, OptionError
from ...extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from ...node import MAX_SIZE, Alloc, OpenFlags, Protocol, fill_zeroes
from ...options import Options, Size, opt
from . import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Iterable, Mapping, Optional

    from typing_extensions import Self

    from .session import Place, Session

MAX_SESSIONS = 4  # of one node
MAX_TRANSFER = 1 << 20  # bytes of one request of ours; the library makes as many of it as the server wants
MAX_READAHEAD = 1 << 20  # bytes
PAGE = 4096
MAX_PAGES = 2048  # pages that the library may cache
MAX_DEBUG = 2
MAX_NUMBER = (1 << 31) - 1

STORED = DATA | OFFSET_VALID | ALLOCATED
HOLE = ZERO | OFFSET_VALID | ALLOCATED


class NfsOptions(Options):
    """Runtime options of nfs. Numbers that are not given are the library's."""

    server_type: str = opt(key="server.type", choices=("inet",), refusal="Parameter 'type' does not accept value '%s'", help="inet")
    server_host: str = opt(key="server.host", help="name or address of the server")
    path: str = opt(help="path of the file, with that of the export in front")
    user: Optional[int] = opt(None, help="number of the user that we are")
    group: Optional[int] = opt(None, help="number of the group that we are in")
    tcp_syn_count: Optional[int] = opt(None, help="how many SYN packets a connection may take")
    readahead_size: Optional[int] = opt(None, help="bytes to read ahead, at most 1 MiB")
    page_cache_size: Optional[int] = opt(None, help="pages to cache, at most 2048")
    debug: Optional[int] = opt(None, help="how much the library tells on standard error, at most 2")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], unknown: str = "") -> Self:
        """See Options.from_mapping; this driver has words of its own for what is unknown or missing."""
        if "server" in values:
            raise OptionError("Invalid parameter type for 'server', expected: object")
        if not any(key.startswith("server.") for key in values):
            raise OptionError("Parameter 'server' is missing")
        return super().from_mapping(values, unknown="Parameter '%s' is unexpected")


class NfsCreateOptions(Options):
    """Creation options of nfs."""

    DASHES = False

    size: Size = opt(0, help="Virtual disk size")


class Nfs(Protocol):
    """A file on an NFS server."""

    driver = "nfs"
    options_class = NfsOptions
    strong_options = tuple(NfsOptions.fields)
    create_options: ClassVar[type[Options]] = NfsCreateOptions
    creatable = True
    growable = True
    dirty = None

    def __init__(self, options: NfsOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        from .library import libnfs

        self._place, caches = _place(options, flags, self.warnings)
        self._api = libnfs()
        self._sessions = 1 if caches else MAX_SESSIONS  # each of them would have a cache of its own
        self._written = False  # since the last flush
        self._losses = 0  # of connections, before anything was written that is not flushed
        self._pool = self._connect()
        try:
            self._size, _used, self.zero_initialized = self._pool.run(_status)
            if self._size > MAX_SIZE:
                raise Error("%s: a file of %d bytes is too large" % (self._place.path, self._size), errno=errno.EFBIG)
        except BaseException:
            self._pool.close()
            raise

    def _connect(self) -> Any:
        from ..connections import Pool
        from .session import Session

        mode = os.O_RDWR if self.flags.writable else os.O_RDONLY

        def connect() -> Session:
            return Session(self._api, self._place, mode)

        return Pool(connect, self._sessions)

    def _changed_flags(self, old: OpenFlags) -> None:
        if self.flags.writable != old.writable:
            previous, self._pool = self._pool, self._connect()
            previous.close()

    def _release_host(self) -> None:
        self._pool.close()

    def disk_size(self) -> int:
        used: int = self._pool.run(_status)[1]
        return used

    def options_name(self) -> str:
        options: Any = self.options
        return names.compose(options.server_host, options.path, options.user or 0, options.group or 0)

    # -- data ----------------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        if offset < self._size:
            yield Extent(0, self._size, STORED, self, 0)
        if offset + length > self._size:
            yield Extent(self._size, MAX_SIZE - self._size, HOLE, self, self._size)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            part = view[done : done + MAX_TRANSFER]
            count = self._pool.run(_read, host_offset + done, part)
            if not count:
                fill_zeroes(view[done:])
                return
            done += count

    def _will_write(self) -> None:
        if not self._written:
            self._losses = self._pool.losses
            self._written = True

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self._will_write()
        done = 0
        while done < len(view):
            part = view[done : done + MAX_TRANSFER]
            done += self._pool.run(_write, host_offset + done, part)
        with self._lock:
            self._size = max(self._size, host_offset + len(view))

    def _flush(self) -> None:
        if self.flags.no_flush or not self._written:
            return
        losses, self._written = self._losses, False
        try:
            self._pool.run(_sync)
        except BaseException:
            self._losses, self._written = losses, True
            raise
        if losses != self._pool.losses:  # the server may have been restarted, and never have brought it to its disk
            text = "%s: the connection was lost before all that had been written was flushed; the server may not have it" % self.filename
            raise Error(text, filename=self.filename, errno=errno.EIO)

    def _truncate(self, size: int, preallocation: str) -> None:
        if preallocation != "off":
            raise OptionError("Unsupported preallocation mode '%s'" % preallocation, errno=errno.ENOTSUP)
        self._will_write()
        self._pool.run(_truncate, size)
        self._size = size

    # -- names and creation --------------------------------------------------------------------------------------

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        return names.parse(filename)

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        """Create or empty the file, and give it its size. Raises Error in QEMU's words."""
        from .library import libnfs
        from .session import Session

        record = cls.options_class.from_mapping(_flat(cls.parse_name(filename)))
        session = Session(libnfs(), _place(record, flags, [])[0], 0, create=True)
        try:
            session.truncate(options.size)
        finally:
            session.close()


def _status(session: Session) -> tuple[int, int, bool]:
    return session.status()


def _read(session: Session, offset: int, view: memoryview) -> int:
    return session.read(offset, view)


def _write(session: Session, offset: int, view: memoryview) -> int:
    return session.write(offset, view)


def _truncate(session: Session, size: int) -> None:
    session.truncate(size)


def _sync(session: Session) -> None:
    session.sync()


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    from ...options import flatten

    return flatten(values)


def _place(options: Any, flags: OpenFlags, warnings: list[str]) -> tuple[Place, bool]:
    """What to open, and whether the library caches. Raises OptionError in QEMU's words; what is only too much gets a warning."""
    from .session import Place

    if not options.path.startswith("/") or "\0" in options.path or "\0" in options.server_host:
        raise OptionError("Invalid URL specified")
    for field in options.fields.values():
        value = getattr(options, field.name)
        if field.kind == "int" and value is not None and value > MAX_NUMBER and field.key not in ("readahead-size", "page-cache-size"):
            raise OptionError("Parameter '%s' expects a number up to %d" % (field.key, MAX_NUMBER))
    readahead, pages, debug = options.readahead_size or 0, options.page_cache_size or 0, options.debug or 0
    for value, what in ((readahead, "readahead"), (pages, "pagecache")):
        if value and flags.direct:
            raise OptionError("Cannot enable NFS %s if cache.direct = on" % what)
    if readahead > MAX_READAHEAD:
        warnings.append("Truncating NFS readahead size to %d" % MAX_READAHEAD)
    if pages > MAX_PAGES:
        warnings.append("Truncating NFS pagecache size to %d pages" % MAX_PAGES)
    if debug > MAX_DEBUG:
        warnings.append("Limiting NFS debug level to %d" % MAX_DEBUG)
    settings = (
        ("nfs_set_uid", options.user),
        ("nfs_set_gid", options.group),
        ("nfs_set_tcp_syncnt", options.tcp_syn_count),
        ("nfs_set_readahead", min(readahead, MAX_READAHEAD) or None),
        ("nfs_set_pagecache", min(pages, MAX_PAGES) or None),
        ("nfs_set_debug", min(debug, MAX_DEBUG) or None),
    )
    calls = [(function, value) for function, value in settings if value is not None]
    return Place(options.server_host, options.path, calls), bool(readahead or pages)
