# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""nbd: an export of an NBD server (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, BlockdevOptionsNbd of
https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html)."""

from __future__ import annotations

import errno
from _thread import allocate_lock
from time import monotonic, sleep

from ...errors import Error, OptionError, ProtocolError
from ...extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from ...node import MAX_SIZE, Alloc, OpenFlags, Protocol
from ...options import ObjectRef, Options, opt
from ..existing import ExistingCreateOptions, take_existing
from . import codec as nbd
from .address import KEYS, Address, normalise, parse_name
from .connection import Channel, Connection, Lost, Negotiation, extents_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Iterable, Iterator, Mapping, Optional

    from typing_extensions import Self

    from .connection import Call

HANDSHAKE_TIMEOUT = 30  # seconds from connecting to the first request, where the option timeout does not say it
REPLY_TIMEOUT = 300  # seconds of silence while an answer is waited for, likewise
EXTRA_TIMEOUT = 2  # seconds for a further connection: a server that has enough of them lets it wait
MAX_TIMEOUT = 1 << 31  # seconds
MAX_CONNECTIONS = 4  # to a server that takes several
RETRY_PAUSE = 0.1  # seconds between the first attempts to connect again; it doubles up to
RETRY_PAUSE_MAX = 1.0

STATUS_GOAL = 4096  # extents that an answer about block status should have at most
MAX_32 = 0xFFFFFFFF  # bytes of a request without payload, where the server has no extended headers
DEFAULT_ALIGNMENT = 512  # where the server does not say it; as QEMU assumes

STORED = DATA | OFFSET_VALID | ALLOCATED
HOLE = ZERO | OFFSET_VALID | ALLOCATED


class NbdOptions(Options):
    """Runtime options of nbd. The keys of `server` are one type's each; see address.py."""

    server_type: str = opt("", key="server.type", help="inet, unix, vsock or fd")
    server_host: Optional[str] = opt(None, key="server.host", help="inet: name or address of the host")
    server_port: Optional[str] = opt(None, key="server.port", help="inet, vsock: the port")
    server_numeric: Optional[bool] = opt(None, key="server.numeric", help="inet: no difference to a client")
    server_to: Optional[int] = opt(None, key="server.to", help="inet: no difference to a client")
    server_ipv4: Optional[bool] = opt(None, key="server.ipv4", help="inet: whether to use IPv4")
    server_ipv6: Optional[bool] = opt(None, key="server.ipv6", help="inet: whether to use IPv6")
    server_keep_alive: Optional[bool] = opt(None, key="server.keep-alive", help="inet: whether to send keep-alive packets")
    server_mptcp: Optional[bool] = opt(None, key="server.mptcp", help="inet: no difference here")
    server_path: Optional[str] = opt(None, key="server.path", help="unix: path of the socket")
    server_abstract: Optional[bool] = opt(None, key="server.abstract", help="unix: the path is a name in the abstract namespace")
    server_tight: Optional[bool] = opt(None, key="server.tight", help="unix: an abstract name ends where its text ends")
    server_cid: Optional[str] = opt(None, key="server.cid", help="vsock: context identifier of the host")
    server_str: Optional[str] = opt(None, key="server.str", help="fd: number of a descriptor that is a connected socket")
    export: str = opt("", help="name of the export")
    tls_creds: Optional[ObjectRef] = opt(None, help="id of the TLS credentials")
    tls_hostname: Optional[str] = opt(None, help="name to check the certificate of the server with; default: the host")
    reconnect_delay: int = opt(0, help="seconds for which requests wait for a lost connection to come back")
    open_timeout: int = opt(0, help="seconds for which opening is tried again")
    x_dirty_bitmap: Optional[str] = opt(None, help="name of the metadata context that is shown instead of base:allocation")
    timeout: int = opt(0, help="seconds for which the server may be silent; 0: 30 until it is connected, 300 afterwards")
    filename: str = opt("", help="not used", hidden=True)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], unknown: str = "Invalid parameter '%s'") -> Self:
        """See Options.from_mapping; host, port and path become server.*."""
        return super().from_mapping(normalise(values), unknown)


class Nbd(Protocol):
    """An export of a server, over one connection or several."""

    driver = "nbd"
    options_class = NbdOptions
    strong_options = (*("server." + key for key in KEYS), "host", "port", "path", "export", "tls-creds", "tls-hostname")
    create_options: ClassVar[type[Options]] = ExistingCreateOptions
    creatable = True
    fixed = True
    dirty = None

    def __init__(self, options: NbdOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self._given = options
        self._export = options.export
        self._address = Address({key: getattr(options, "server_" + key.replace("-", "_")) for key in KEYS})
        for key, value in (("reconnect-delay", options.reconnect_delay), ("open-timeout", options.open_timeout), ("timeout", options.timeout)):
            if value > MAX_TIMEOUT:
                raise OptionError("%s: more than %d seconds" % (key, MAX_TIMEOUT))
        self._context = nbd.BASE_ALLOCATION if options.x_dirty_bitmap is None else options.x_dirty_bitmap
        if len(self._context.encode("utf-8", "surrogatepass")) > nbd.MAX_STRING:
            raise OptionError("x-dirty-bitmap query too long to send to server")
        self._credentials = None
        if options.tls_creds is not None:
            from ...crypto.tls import Credentials

            self._credentials = Credentials(getattr(options.tls_creds, "objects", {}), options.tls_creds, "client")
        self._guard = allocate_lock()  # of the list
        self._opening = allocate_lock()  # held by whoever makes a connection
        self._connections: list[Connection] = []
        self._may_grow = False
        self._lost_at: Optional[float] = None  # since when there is no connection
        self._connections.append(self._open())
        terms = self._connections[0].terms
        self._size = terms.size
        self._flags = terms.flags
        self._terms = terms
        self._may_grow = bool(terms.flags & nbd.CAN_MULTI_CONN) and self._address.kind != "fd"
        self.request_alignment = terms.minimum or (DEFAULT_ALIGNMENT if terms.size % DEFAULT_ALIGNMENT == 0 else 1)
        self._tells_status = terms.context is not None
        self._span = 1 << 63  # bytes that are asked for at a time; a multiple of the alignment
        try:
            if not self._tells_status and options.x_dirty_bitmap is not None:
                raise Error("Could not open image: Invalid argument", errno=errno.EINVAL, hint="requested x-dirty-bitmap %s not found" % self._context)
            self._check_writable()
        except BaseException:
            self._release_host()
            raise

    def _check_writable(self) -> None:
        if self.flags.writable and self._flags & nbd.READ_ONLY:
            raise Error("Could not open image: Permission denied", errno=errno.EACCES)

    def _changed_flags(self, old: OpenFlags) -> None:
        self._check_writable()

    # -- connections ---------------------------------------------------------------------------------------------

    def _open(self) -> Connection:
        """The first connection, tried again for open-timeout."""
        until = monotonic() + self._given.open_timeout
        pause = RETRY_PAUSE
        while True:
            try:
                return self._connect(self._given.timeout or HANDSHAKE_TIMEOUT)
            except OptionError:
                raise
            except Error:
                if monotonic() + pause > until:
                    raise
            sleep(pause)
            pause = min(2 * pause, RETRY_PAUSE_MAX)

    def _connect(self, timeout: float) -> Connection:
        """A new connection, agreed upon with the server within so many seconds. Raises Error."""
        deadline = monotonic() + timeout
        channel: Any = Channel(self._address.connect(deadline))
        negotiation = Negotiation(channel, deadline)
        try:
            if negotiation.greet():
                if self._credentials is not None:
                    negotiation.start_tls(self._secure)
                negotiation.settle(self._export, self._context)
            elif self._credentials is not None:
                raise ProtocolError("Server does not support STARTTLS", errno=errno.EINVAL)
            elif self._export:
                raise ProtocolError("Server does not support non-empty export names", errno=errno.EINVAL)
            negotiation.check()
            return Connection(negotiation.channel, negotiation.codec, negotiation.terms, self._given.timeout or REPLY_TIMEOUT)
        except BaseException:
            negotiation.give_up()
            raise

    def _secure(self, channel: Any, deadline: float) -> Any:
        hostname = self._given.tls_hostname or self._address.host
        return self._credentials.wrap(channel, deadline, hostname) if self._credentials is not None else channel

    def _pick(self) -> Connection:
        """The connection with the least to do; another one where all are at work and the server takes several."""
        with self._guard:
            connections = [connection for connection in self._connections if connection.broken is None]
        best = min(connections, key=_load) if connections else None
        if best is not None and (not best.busy or not self._may_grow or len(connections) >= MAX_CONNECTIONS):
            return best
        if best is not None:
            if not self._opening.acquire(False):
                return best
            try:
                return self._add(EXTRA_TIMEOUT)
            except Error:
                self._may_grow = False
                return best
            finally:
                self._opening.release()
        with self._opening:
            with self._guard:
                connections = [connection for connection in self._connections if connection.broken is None]
            return connections[0] if connections else self._add(self._given.timeout or HANDSHAKE_TIMEOUT)

    def _add(self, timeout: float) -> Connection:
        if self._closed:
            raise Lost("The node is closed", errno=errno.EIO)
        connection = self._connect(timeout)
        terms = connection.terms
        if (terms.size, terms.minimum) != (self._size, self._terms.minimum) or terms.flags & nbd.READ_ONLY and not self._flags & nbd.READ_ONLY:
            connection.close()
            raise ProtocolError("The export is another one than before", errno=errno.EIO)
        with self._guard:
            for old in [old for old in self._connections if old.broken is not None and old.idle]:
                self._connections.remove(old)
                old.close()
            self._connections.append(connection)
            self._lost_at = None
        return connection

    def _request(self, command: int, offset: int, length: int, flags: int = 0, payload: Optional[memoryview] = None, into: Optional[memoryview] = None) -> Call:
        """One request, made again over another connection as long as reconnect-delay lets it. Raises Error, OSError as the server says."""
        pause = RETRY_PAUSE
        while True:
            try:
                call = self._pick().call(command, offset, length, flags, payload, into)
                break
            except ProtocolError:
                raise
            except Error:
                with self._guard:
                    self._lost_at = self._lost_at or monotonic()
                    left = self._lost_at + self._given.reconnect_delay - monotonic()
                if left <= 0 or self._closed:
                    raise
            sleep(min(pause, left))
            pause = min(2 * pause, RETRY_PAUSE_MAX)
        if self._lost_at is not None:
            self._lost_at = None
        if call.error:
            raise _refusal(call)
        return call

    def _release_host(self) -> None:
        with self._guard:
            connections, self._connections = self._connections, []
        for connection in connections:
            connection.close()

    # -- what is where -------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        end = min(offset + length, self._size)
        while offset < end:
            for count, status in self._statuses(offset, end):
                yield Extent(offset, count, status, self, offset)
                offset += count
        if offset + length > self._size:
            yield Extent(self._size, MAX_SIZE - self._size, HOLE, self, self._size)

    def _statuses(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """(length, status) of extents from `offset` on, one at least."""
        if not self._tells_status:
            yield end - offset, STORED
            return
        align = self.request_alignment
        start = offset // align * align
        length = -(-end // align) * align - start
        length = min(length, self._size - start, self._span, length if self._terms.extended else MAX_32 // align * align)
        call = self._request(nbd.CMD_BLOCK_STATUS, start, length)
        count = sum(status.count for status in call.statuses)
        if count > STATUS_GOAL:  # whoever asks may need no more than the beginning, and ask again
            self._span = max(align, length * STATUS_GOAL // count // align * align)
        elif count < STATUS_GOAL // 4 and length == self._span:
            self._span *= 2
        skip = offset - start
        for count, flags in extents_of(call.statuses, length):
            count, skip = max(count - skip, 0), max(skip - count, 0)
            if count:
                status = OFFSET_VALID | (0 if flags & nbd.STATE_HOLE else DATA) | (ZERO if flags & nbd.STATE_ZERO else 0)
                yield count, status | ALLOCATED if status & (DATA | ZERO) else status

    # -- data ----------------------------------------------------------------------------------------------------

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def read_own(self, host_offset: int, view: memoryview) -> None:
        """See Node.read_own; memory need not be aligned."""
        if (host_offset | len(view)) % self.request_alignment:
            super().read_own(host_offset, view)
        else:
            self._pread_into(host_offset, view)

    def write_own(self, host_offset: int, view: memoryview) -> None:
        """See Node.write_own; memory need not be aligned."""
        if host_offset + len(view) > self._size:
            raise Error("%s: write at %#x is beyond the end of the export" % (self.filename, host_offset), filename=self.filename, errno=errno.ENOSPC)
        if (host_offset | len(view)) % self.request_alignment:
            super().write_own(host_offset, view)
        else:
            self._pwrite(host_offset, view)

    def pwrite(self, offset: int, data: Any) -> None:
        """See Node.pwrite. Where the server can write through, no flush is needed for that."""
        if not self.flags.writethrough or not self._flags & nbd.SEND_FUA:
            super().pwrite(offset, data)
            return
        view = memoryview(data).cast("B")
        self._check_write(offset, len(view))
        self._write(offset, view)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        inside = max(0, min(len(view), self._size - host_offset))
        for start, count in _cut(0, inside, self._terms.maximum):
            self._request(nbd.CMD_READ, host_offset + start, count, into=view[start : start + count])
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        flags = nbd.FLAG_FUA if self.flags.writethrough and self._flags & nbd.SEND_FUA else 0
        for start, count in _cut(0, len(view), self._terms.maximum):
            self._request(nbd.CMD_WRITE, host_offset + start, count, flags, payload=view[start : start + count])

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        return self.zero_range(offset, length, unmap) if self._flags & nbd.SEND_WRITE_ZEROES else (offset, 0)

    def zero_range(self, offset: int, length: int, unmap: bool, fast: bool = False) -> tuple[int, int]:
        """See _zero. With `fast` nothing is zeroed that the server cannot zero faster than by writing, if it knows."""
        start, count = self._inside(offset, length)
        flags = 0 if unmap else nbd.FLAG_NO_HOLE
        if fast and self._flags & nbd.SEND_FAST_ZERO:
            flags |= nbd.FLAG_FAST_ZERO
        if self.flags.writethrough and self._flags & nbd.SEND_FUA:
            flags |= nbd.FLAG_FUA
        most = count if self._terms.extended else self._terms.maximum
        for at, piece in _cut(start, count, most):
            try:
                self._request(nbd.CMD_WRITE_ZEROES, at, piece, flags)
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                return start, at - start
        return start, count

    def _discard(self, offset: int, length: int) -> None:
        if not self.flags.unmap or not self._flags & nbd.SEND_TRIM:
            return
        start, count = self._inside(offset, length)
        for at, piece in _cut(start, count, count if self._terms.extended else MAX_32 // self.request_alignment * self.request_alignment):
            self._request(nbd.CMD_TRIM, at, piece)

    def _inside(self, offset: int, length: int) -> tuple[int, int]:
        """The part of a range that consists of whole blocks, as (offset, length)."""
        align = self.request_alignment
        start = -(-offset // align) * align
        return start, max(0, (offset + length) // align * align - start)

    def _flush(self) -> None:
        if self._flags & nbd.SEND_FLUSH and not self.flags.no_flush:
            self._request(nbd.CMD_FLUSH, 0, 0)

    def _truncate(self, size: int, preallocation: str) -> None:
        if preallocation != "off":
            raise OptionError("Unsupported preallocation mode '%s'" % preallocation, errno=errno.ENOTSUP)
        if size != self._size:
            raise Error("Cannot resize NBD nodes", filename=self.filename, errno=errno.ENOTSUP)

    # -- names and creation --------------------------------------------------------------------------------------

    def disk_size(self) -> None:
        """Nobody says."""
        return None

    def options_name(self) -> str:
        return self._address.uri(self._export)

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        return parse_name(filename)

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        """Nothing is created: the export must be there and be large enough."""

        def open_it(wanted: OpenFlags) -> Protocol:
            return cls(cls.options_class.from_mapping(parse_name(filename)), wanted)

        take_existing(cls.driver, filename, options, open_it, "Cannot grow NBD nodes")


def _load(connection: Connection) -> int:
    return connection.busy


def _cut(offset: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a range into (offset, length) pieces of at most `most` bytes."""
    end = offset + length
    while offset < end:
        count = min(most, end - offset)
        yield offset, count
        offset += count


def _refusal(call: Call) -> OSError:
    """What the server says to a request that it did not do."""
    number = {nbd.ESHUTDOWN: errno.ESHUTDOWN, nbd.EOVERFLOW: errno.EOVERFLOW, nbd.ENOTSUP: errno.EOPNOTSUPP}.get(call.error, call.error)
    if number not in errno.errorcode:
        number = errno.EINVAL
    import os

    return OSError(number, "%s (server says: %s)" % (os.strerror(number), call.text) if call.text else os.strerror(number))
