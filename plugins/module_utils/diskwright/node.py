# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Node, a point of the block graph (protocol, format or filter), and all the policy that drivers share.

A driver says where bytes are; bounds, end of file, backing chains, zero fill, copy-on-write, alignment and the splitting
of requests are written here, once. Offsets and lengths are bytes everywhere.
"""

from __future__ import annotations

import errno
import os
from _thread import RLock, allocate_lock
from itertools import islice

from .edges import change_use, release
from .errors import Error, ReadOnly, Unsupported
from .extent import ALLOCATED, COMPRESSED, DATA, OFFSET_VALID, PASS, RECURSE, ZERO, Extent, clip, coalesce, pieces
from .hooks import (
    ALL,
    CHUNK,
    CONSISTENT_READ,
    MAX_SIZE,
    RESIZE,
    WRITE,
    WRITE_UNCHANGED,
    ZEROES,
    Alloc,
    Hooks,
    Measure,
    OpenFlags,
    Reference,
    Snapshot,
    aligned_buffer,
    cache_flags,
    fill_zeroes,
)

__all__ = [
    "ALL",
    "CHUNK",
    "CONSISTENT_READ",
    "MAX_SIZE",
    "RESIZE",
    "WRITE",
    "WRITE_UNCHANGED",
    "Alloc",
    "Format",
    "Measure",
    "Node",
    "OpenFlags",
    "Protocol",
    "Reference",
    "Snapshot",
    "aligned_buffer",
    "cache_flags",
    "fill_zeroes",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, ClassVar, Iterable, Iterator, Optional, Sequence, Union

    from typing_extensions import Self

    from diskwright.tally import CheckResult

    from .hooks import Edge
    from .options import Options

    Buffer = Union[bytes, bytearray, memoryview]


class Node(Hooks):
    """Base of all drivers: the public methods, and the hooks (leading underscore) that a driver overrides."""

    def __init__(self, options: Options, flags: OpenFlags) -> None:
        self.options = options
        self.flags = flags
        self.filename = ""  # what the user would call it; graph.py fills it in, and the next line
        self.full_options: dict[str, Any] = {}  # a specification that opens the same bytes, as its json: name has it
        self.children: dict[str, Node] = {}
        self.parents: list[Edge] = []
        self.kept = False  # its graph closes it, not the last of its users
        self.graph: Any = None  # the Graph that knows it by its name
        for field in options.fields.values():
            if field.kind == "NodeRef":
                child = getattr(options, field.name)
                if isinstance(child, Node):
                    self.children[field.key] = child
            elif field.kind == "NodeRefs":
                members = getattr(options, field.name)
                for index in range(len(members) - 1, -1, -1):
                    self.children["%s.%d" % (field.key, index)] = members[index]
        self.backing: Optional[Node] = self.children.get("backing")
        self._size = 0
        self._lock = RLock()  # guards metadata; never held across data I/O
        self._inflight: list[tuple[int, int, Any]] = []  # (start, end, lock) of writes under way
        self._closed = False
        self.warnings: list[str] = []  # what a person should know about it; graph.py passes it on
        self.tell = self.children["file"].listener() if "file" in self.children else None  # see Hooks.mention

    # -- what a node is ------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Virtual size in bytes."""
        return self._size

    @property
    def read_only(self) -> bool:
        return not self.flags.writable

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_rest: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    # -- reading -------------------------------------------------------------------------------------------------

    def pread(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`. Raises Error beyond the end of the node, OSError as the host does."""
        buffer = bytearray(length)
        self.pread_into(offset, buffer)
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: Union[bytearray, memoryview]) -> None:
        """Fill `buffer` with the bytes at `offset`; see pread."""
        view = memoryview(buffer).cast("B")
        if self.leaf:
            self.read_own(offset, view)
            return
        self._check_range(offset, len(view))
        self.mention_read(offset, len(view))
        for start, length, _status, host, host_offset in self.resolve(offset, len(view)):
            part = view[start - offset : start - offset + length]
            if host is None:
                fill_zeroes(part)
            else:
                host.read_own(host_offset, part)

    def read_own(self, host_offset: int, view: memoryview) -> None:
        """Read bytes that this node hosts, whatever its request alignment is; what lies beyond the end is zero."""
        align = self.request_alignment
        if align == 1:
            self._pread_into(host_offset, view)
            return
        for start, length in pieces(host_offset, len(view), CHUNK, align):
            first = start // align * align
            bounce = aligned_buffer(-(-(start + length - first) // align) * align)
            self._pread_into(first, bounce)
            view[start - host_offset : start - host_offset + length] = bounce[start - first : start - first + length]

    def block_status(self, offset: int, length: int, want_zero: bool = True, limit: int = 0) -> list[Extent]:
        """How this layer stores a range: contiguous, merged extents that cover it exactly.

        A status without ALLOCATED-bearing bits (0) means that the backing node has it. With `want_zero` hosts are asked for holes.
        With a `limit` the result may end early, after so many extents before merging: memory then does not depend on the range.
        """
        found = self._status(offset, length, want_zero)
        return coalesce(islice(found, limit) if limit else found)

    def _status(self, offset: int, length: int, want_zero: bool) -> Iterator[Extent]:
        if self.opaque:
            yield Extent(offset, length, DATA | ALLOCATED, self, offset)
            return
        for extent in self._extents(offset, length):
            start, count, status, host, host_offset = extent
            if host is None or host is self:
                yield extent
            elif status & PASS:
                for inner in host._status_or_leaf(host_offset, count, want_zero):
                    yield Extent(inner[0] - host_offset + start, inner[1], inner[2], inner[3], inner[4])
            elif status & RECURSE and want_zero:
                for inner in host._status_or_leaf(host_offset, count, True):
                    shift = inner[0] - host_offset
                    yield Extent(start + shift, inner[1], status & ~RECURSE | inner[2] & ZERO, host, host_offset + shift)
            else:
                yield Extent(start, count, status & ~RECURSE, host, host_offset)

    def _status_or_leaf(self, offset: int, length: int, want_zero: bool) -> Iterable[Extent]:
        """Like _status, but a leaf is not asked where nobody wants to know its holes."""
        if self.leaf and not want_zero:
            return (Extent(offset, length, DATA | OFFSET_VALID | ALLOCATED, self, offset),)
        return self._status(offset, length, want_zero)

    def _extents(self, offset: int, length: int) -> Iterator[Extent]:
        """`_map` of a range, clipped to it; a map with gaps or overlaps is the driver's bug and fails here."""
        position = offset
        end = offset + length
        for extent in self._map(offset, length) if length else ():
            start = extent[0]
            stop = start + extent[1]
            if stop <= position:
                continue
            if start > position or start >= end:
                break
            if start < position or stop > end:
                extent = clip(extent, position, end)
            yield extent
            position = min(stop, end)
            if position == end:
                return
        if position != end:
            raise RuntimeError("driver %s: _map(%#x, %#x) leaves a gap at %#x" % (self.driver, offset, length, position))

    def resolve(self, offset: int, length: int, want_zero: bool = False, limit: int = 0, own: bool = False) -> list[Extent]:
        """Who holds the bytes of a range, through filters and the whole backing chain.

        Each extent is either DATA, with a host whose `read_own(host_offset, ...)` gives the bytes, or ZERO without a
        host. With `want_zero` the hosts are asked for holes, where they may know of some. With a `limit` the result may
        end early, once about so many extents are found: memory and time then do not depend on the range. With `own` the
        backing chain is not asked: an extent of status 0 is what it would have to give.
        """
        found: list[Extent] = []
        for start, count, status, host, host_offset in self._extents(offset, length):
            if status & ZERO:
                found.append(Extent(start, count, ZERO))
            elif host is self:
                found.append(Extent(start, count, DATA | status & COMPRESSED, self, host_offset))
            elif host is not None:
                ask = want_zero and bool(status & (PASS | RECURSE))
                if host.leaf and not ask:
                    found.append(Extent(start, count, DATA, host, host_offset))
                else:
                    for inner in host.resolve(host_offset, count, ask, limit, own):
                        found.append(Extent(inner[0] - host_offset + start, inner[1], inner[2], inner[3], inner[4]))
            elif own and self.backing is not None:
                found.append(Extent(start, count, 0))
            else:
                self._resolve_backing(found, start, count, want_zero, limit)
            if limit and (len(found) >= limit or found[-1][0] + found[-1][1] < start + count):
                break
        return found if len(found) < 2 else coalesce(found)

    def _resolve_backing(self, found: list[Extent], start: int, count: int, want_zero: bool, limit: int) -> None:
        backing = self.backing
        inside = 0 if backing is None else max(0, min(count, backing.size - start))
        if inside and backing is not None:
            found.extend(backing.resolve(start, inside, want_zero, limit))
            if found[-1][0] + found[-1][1] < start + inside:
                return
        if inside < count:
            found.append(Extent(start + inside, count - inside, ZERO))

    # -- writing -------------------------------------------------------------------------------------------------

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write `data` at `offset`. Raises ReadOnly, Error beyond the end, OSError as the host does."""
        view = memoryview(data).cast("B")
        self._check_write(offset, len(view))
        self._write(offset, view)
        if self.flags.writethrough:
            self.flush()

    def _write(self, offset: int, view: memoryview) -> None:
        if not len(view):
            return
        if self.leaf:
            self.write_own(offset, view)
            return
        entry = self.serialise(offset, len(view))
        try:
            allocs = self._alloc(offset, len(view))
            fresh = [alloc for alloc in allocs if alloc.fresh]
            try:
                for alloc in allocs:
                    self._fill(alloc, offset, view)
            except BaseException:
                self._abort(fresh)
                raise
            if fresh:
                self._link(fresh)
        finally:
            if self.recorder is not None:
                self.recorder(offset, len(view))
            self.release(entry)

    def _fill(self, alloc: Alloc, offset: int, view: memoryview) -> None:
        """Write the part of `view` (data for guest `offset`) that falls into `alloc`; a fresh one is completed with
        the old content around it."""
        start = max(alloc.offset, offset)
        end = min(alloc.offset + alloc.length, offset + len(view))
        data = view[start - offset : end - offset]
        head = start - alloc.offset
        tail = alloc.offset + alloc.length - end
        self.mention_write(alloc, head, tail)
        if alloc.host is self and not alloc.fresh:
            self.write_own(alloc.host_offset + head, data)
        elif not alloc.fresh or not (head or tail):
            alloc.host.write_hosted(alloc.host_offset + head, data)
        elif alloc.length <= CHUNK:
            whole = memoryview(bytearray(alloc.length))
            self._read_old(alloc.offset, whole[:head])
            whole[head : head + len(data)] = data
            self._read_old(end, whole[head + len(data) :])
            alloc.host.write_hosted(alloc.host_offset, whole)
        else:
            self._copy_old(alloc, alloc.offset, head)
            alloc.host.write_hosted(alloc.host_offset + head, data)
            self._copy_old(alloc, end, tail)

    def _read_old(self, offset: int, view: memoryview) -> None:
        """Read present content for copy-on-write; what lies beyond the virtual size is zero."""
        inside = max(0, min(len(view), self.size - offset))
        if inside:
            self.pread_into(offset, view[:inside])

    def _copy_old(self, alloc: Alloc, offset: int, length: int) -> None:
        for start, count in pieces(offset, length, CHUNK, 1):
            piece = memoryview(bytearray(count))
            self._read_old(start, piece)
            alloc.host.write_hosted(alloc.host_offset + start - alloc.offset, piece)

    def write_hosted(self, host_offset: int, view: memoryview) -> None:
        """Write for a parent that got this place from an Alloc; the node may grow by it."""
        if host_offset + len(view) > MAX_SIZE:
            raise self._beyond_the_end(host_offset, len(view))
        if self.leaf:
            self.write_own(host_offset, view)
        else:
            self._write(host_offset, view)

    def write_own(self, host_offset: int, view: memoryview) -> None:
        """Write bytes that this node hosts, whatever its request alignment is."""
        try:
            self._write_own(host_offset, view)
        finally:
            if self.recorder is not None and self.leaf:
                self.recorder(host_offset, len(view))

    def _write_own(self, host_offset: int, view: memoryview) -> None:
        align = self.request_alignment
        if align == 1:
            self._pwrite(host_offset, view)
            return
        end = host_offset + len(view)
        entry = self.serialise(host_offset, len(view), align)
        try:
            for start, length in pieces(host_offset, len(view), CHUNK, align):
                first = start // align * align
                last = -(-(start + length) // align) * align
                bounce = aligned_buffer(last - first)
                if first < start:
                    self._pread_into(first, bounce[:align])
                if start + length < last and (last - first > align or first == start):
                    self._pread_into(last - align, bounce[-align:])
                bounce[start - first : start - first + length] = view[start - host_offset : start - host_offset + length]
                self._pwrite(first, bounce)
            self._trim(end)
        finally:
            self.release(entry)

    def pwrite_zeroes(self, offset: int, length: int, unmap: bool = False, fallback: bool = True) -> None:
        """Make a range read as zeroes, cheaply where the driver can, or else, with `fallback`, by writing them; `unmap` lets it give the space back."""
        self._check_write(offset, length)
        if not length:
            return
        entry = self.serialise(offset, length)
        try:
            start, count = self._zero(offset, length, unmap)
        finally:
            if self.recorder is not None:
                self.recorder(offset, length)
            self.release(entry)
        if count < length and not fallback:
            raise Unsupported(os.strerror(errno.ENOTSUP), filename=self.filename, errno=errno.ENOTSUP)
        if not count:
            start = offset + length
        for low, high in ((offset, start), (start + count, offset + length)):
            for position, size in pieces(low, high - low, CHUNK, 1):
                self._write(position, memoryview(ZEROES)[:size])
        if self.flags.writethrough:
            self.flush()

    def pdiscard(self, offset: int, length: int) -> None:
        """Say that the content of a range does not matter any more; what it reads as afterwards is the driver's affair."""
        self._check_write(offset, length)
        if length:
            entry = self.serialise(offset, length)
            try:
                self._discard(offset, length)
            finally:
                if self.recorder is not None:
                    self.recorder(offset, length)
                self.release(entry)

    def reserve(self, offset: int, length: int) -> list[Alloc]:
        """For copy.py: room for data of whole allocation units, to be published or given back."""
        return self._alloc(offset, length)

    def publish(self, allocs: Sequence[Alloc]) -> None:
        """For copy.py: make reserved room visible, its data being written."""
        fresh = [alloc for alloc in allocs if alloc.fresh]
        if fresh:
            self._link(fresh)
        for alloc in allocs:
            if self.recorder is not None:
                self.recorder(alloc.offset, alloc.length)
            if alloc.host.recorder is not None and alloc.host is not self and alloc.host.leaf:  # it was written by its descriptor
                alloc.host.recorder(alloc.host_offset, alloc.length)

    def withdraw(self, allocs: Sequence[Alloc]) -> None:
        """For copy.py: give reserved room back."""
        self._abort([alloc for alloc in allocs if alloc.fresh])

    def encode(self, data: Buffer) -> Optional[bytes]:
        """For copy.py: what write_compressed will store for `data`, so that many threads can compress and one can place the
        results in order; None where the driver does both at once."""
        return self._encode(memoryview(data).cast("B"))

    def write_compressed(self, offset: int, data: Buffer, encoded: Optional[bytes] = None) -> None:
        """Store one allocation unit (the last may be short) compressed; `encoded` is what `encode` made of it. Raises
        Unsupported where the format cannot."""
        view = memoryview(data).cast("B")
        self._check_write(offset, len(view))
        if not self.supports_compression:
            raise Unsupported("Compression not supported for this file format")
        try:
            if encoded is None:
                self._pwrite_compressed(offset, view)
            else:
                self._pwrite_encoded(offset, view, encoded)
        finally:
            if self.recorder is not None:
                self.recorder(offset, len(view))

    def serialise(self, offset: int, length: int, unit: int = 0) -> Any:
        """Wait for writes under way in the same allocation units, then register this one; `release` takes the result."""
        unit = unit or self.allocation_unit
        if not unit:
            return None
        start = offset // unit * unit
        end = -(-(offset + length) // unit) * unit
        while True:
            with self._lock:
                for low, high, busy in self._inflight:
                    if low < end and start < high:
                        break
                else:
                    own = allocate_lock()
                    own.acquire()
                    entry = (start, end, own)
                    self._inflight.append(entry)
                    return entry
            with busy:
                pass

    def release(self, entry: Any) -> None:
        """End what `serialise` began."""
        if entry is not None:
            with self._lock:
                self._inflight.remove(entry)
            entry[2].release()

    # -- the whole node ------------------------------------------------------------------------------------------

    def truncate(self, size: int, preallocation: str = "off", exact: bool = True) -> None:
        """Change the virtual size to `size` bytes; `preallocation` says how a growing part is allocated. Unless `exact`, storage
        whose size is fixed may be larger.

        Raises ReadOnly, Unsupported where the format cannot, OptionError for a preallocation mode it does not know.
        """
        if self.read_only:
            raise ReadOnly("Image is read-only", filename=self.filename, errno=errno.EACCES)
        if not 0 <= size <= MAX_SIZE:
            raise Error("Required too big image size, it must be not greater than %d" % MAX_SIZE, filename=self.filename, errno=errno.EFBIG)
        if exact or size > self.size or not self.unfiltered().fixed:
            self._truncate(size, preallocation)

    def flush(self) -> None:
        """Bring all written data and metadata to stable storage (but for cache.no-flush)."""
        if self.flags.writable and not self._closed:
            self.mention("flush_to_os")
            self._flush()
            self.mention("flush_to_disk")
            for child in self.children.values():
                child.flush()

    def close(self) -> None:
        """Flush, give everything back, close the children. A second call does nothing. Raises what the flush raises, after all is closed."""
        if self._closed:
            return
        try:
            self.flush()
            self._close()
        finally:
            self._closed = True
            self._close_children(Node.close)

    def abandon(self) -> None:
        """Close after a failure: as a crash would, without writing what is cached."""
        if not self._closed:
            self._closed = True
            self._close_children(Node.abandon)

    def _close_children(self, how: Any) -> None:
        failure: Optional[BaseException] = None
        for child in self.children.values():
            try:
                release(child, [edge for edge in child.parents if edge.user is self], how)
            except (Error, OSError) as exc:
                failure = failure or exc
        self._release_host()
        if self.graph is not None:
            self.graph.forget(self)
        if failure is not None:
            raise failure

    def change_flags(self, flags: OpenFlags) -> None:
        """Go on under other flags, the node's own children (but for the backing node) too. Raises Locked or Error where that
        cannot be; nothing is changed then."""
        old = self.flags
        changed: list[str] = []
        try:
            for role in self.children:
                if role != "backing":
                    self.change_child(role, self.child_flags(role, flags))
                    changed.append(role)
            self.flags = flags
            self._changed_flags(old)
        except BaseException:
            self.flags = old
            for role in changed:
                self.change_child(role, self.child_flags(role, old))
            raise

    def change_child(self, role: str, flags: OpenFlags) -> None:
        """Let a child go on under other flags; see change_use."""
        child = self.children[role]
        for edge in reversed(child.parents):
            if edge.role == role and (edge.user is self or isinstance(edge.user, str)):
                change_use(edge, flags)
                return
        child.change_flags(flags)

    def check(self, repair: str = "") -> CheckResult:
        """Check the metadata; `repair` is "", "leaks" or "all". Raises Unsupported where the format has no check."""
        return self._check(repair)

    def create_snapshot(self, name: str, like: Optional[Snapshot] = None) -> Snapshot:
        """Keep the present content as the internal snapshot `name`. Raises ReadOnly, Unsupported, Error in QEMU's words."""
        self._check_write(0, 0)
        return self._create_snapshot(name, like)

    def apply_snapshot(self, name: str) -> None:
        """Make the internal snapshot with the ID `name`, or else of that name, the present content; the size may change."""
        self._check_write(0, 0)
        self._apply_snapshot(name)

    def delete_snapshot(self, name: str, id: Optional[str] = None) -> None:
        """Remove the first internal snapshot of the name `name`, or the one that has this ID too; see create_snapshot."""
        self._check_write(0, 0)
        self._delete_snapshot(name, id)

    def load_snapshot(self, id: Optional[str] = None, name: Optional[str] = None) -> None:
        """Show the internal snapshot with this ID and this name (None: any) from now on. The node must be open for reading."""
        if not self.read_only:
            raise Error("Device is not readonly", filename=self.filename, errno=errno.EINVAL)
        self._load_snapshot(id, name)

    def amend(self, options: Any, force: bool = False, progress: Optional[Callable[[int, int], None]] = None) -> None:
        """Change options of the image, as an `amend_options` record says; `force` allows what loses data.

        Raises ReadOnly, Unsupported where the format cannot, OptionError, Error.
        """
        if self.read_only:
            raise ReadOnly("Image is read-only", filename=self.filename, errno=errno.EACCES)
        self._amend(options, force, progress)

    def unfiltered(self) -> Node:
        """This node, or the first below it that is no filter."""
        return self

    def _check_range(self, offset: int, length: int, may_grow: bool = False) -> None:
        end = offset + length
        if offset < 0 or length < 0 or end > self.size and (end > MAX_SIZE or not may_grow):
            raise self._beyond_the_end(offset, length)

    def _beyond_the_end(self, offset: int, length: int) -> Error:
        text = "%s: request for %d bytes at %#x is beyond the end (%d bytes)" % (self.filename or self.driver, length, offset, self.size)
        return Error(text, filename=self.filename, offset=offset, errno=errno.EIO)

    def _check_write(self, offset: int, length: int) -> None:
        if self.read_only:
            raise ReadOnly("%s: opened read-only" % (self.filename or self.driver), filename=self.filename, errno=errno.EACCES)
        self._check_range(offset, length, self.growable)


class Format(Node):
    """A format: guest bytes are kept in the child `file` by metadata of its own."""

    create_options: ClassVar[type[Options]]
    keeps_children = True

    @property
    def file(self) -> Node:
        return self.children["file"]

    def change_backing(self, name: Optional[str], format: Optional[str] = None) -> None:
        """Name `name` as the backing file, of the format `format`, without looking at either file's content; None names none.

        The name is stored as it is. Raises ReadOnly, OptionError for a name that does not fit, Unsupported.
        """
        if self.read_only:
            raise ReadOnly("Image is read-only", filename=self.filename, errno=errno.EACCES)
        self._change_backing(name, format)

    def make_empty(self) -> None:
        """Give up all that this layer holds: it reads as its backing node then. Raises ReadOnly, Unsupported."""
        if self.read_only:
            raise ReadOnly("Image is read-only", filename=self.filename, errno=errno.EACCES)
        self._make_empty()

    @classmethod
    def child_flags(cls, role: str, flags: OpenFlags) -> OpenFlags:
        wanted = flags.permissions()[1]
        exclusive = ALL & ~(WRITE | RESIZE)
        if role == "backing":  # it may be written by others if whoever uses the overlay has no objections
            shared = ALL if flags.force_share or wanted & WRITE else exclusive
            return flags.but(writable=False, resize=False, check=False, perm=CONSISTENT_READ, shared=shared)
        perm = (0 if flags.no_io else CONSISTENT_READ) | (WRITE | RESIZE if flags.writable else 0)
        return flags.but(writethrough=False, perm=perm, shared=ALL if flags.force_share else wanted & exclusive)


class Protocol(Node):
    """A protocol: access to storage. It hosts its own bytes."""

    leaf = True
    strong_options: ClassVar[tuple[str, ...]] = ("filename",)
    create_options: ClassVar[type[Options]]

    def disk_size(self) -> Optional[int]:
        fd = self.fileno()
        return os.fstat(fd).st_blocks * 512 if fd >= 0 else None

    def options_name(self) -> str:
        return str(getattr(self.options, "filename", ""))

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        """Create or empty the storage that `filename` (as parse_filename gives it) names, `options.size` bytes long."""
        raise Unsupported("Protocol driver '%s' does not support image creation" % cls.driver)
