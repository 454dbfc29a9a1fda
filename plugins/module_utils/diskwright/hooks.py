# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What a driver writes, and the records that it does it with: hooks, flags, allocations.

node.py calls the hooks and holds all policy. Offsets and lengths are bytes everywhere.
"""

from __future__ import annotations

import errno
import os

from .errors import Error, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, ClassVar, Iterable, Iterator, Mapping, Optional, Sequence

    from diskwright.tally import CheckResult

    from .bitmaps import BitmapSet
    from .extent import Extent
    from .node import Node
    from .options import Options, SecretRef

# Permissions: what a user of a node does (perm) and what it tolerates from others (shared). The numbers are QEMU's and
# are the lock byte offsets of protocols/file.py.
CONSISTENT_READ = 1
WRITE = 2
WRITE_UNCHANGED = 4
RESIZE = 8
ALL = 15

MAX_SIZE = (1 << 63) - 512  # bytes; no node is larger

ENVIRONMENT: dict[str, str] = {}  # of the process, for drivers that heed it (proxies); empty unless cli.py fills it in
CHUNK = 1 << 20  # bytes of zeroes written at a time, and the largest copy-on-write buffer
ZEROES = bytes(CHUNK)


class OpenFlags:
    """How a node is opened. Immutable by convention; `but()` gives a changed copy.

    writable, resize     the user will write, or change the size
    direct, no_flush     cache.direct and cache.no-flush: O_DIRECT, and flushes that do nothing
    writethrough         every write is followed by a flush
    force_share          read-only, and whatever others do is tolerated (-U)
    no_backing, no_io    do not open the backing file; guest data will not be read (info, create -b)
    check                opened for check: a corrupt bit is no obstacle, and nothing is repaired on open
    unmap                discard requests reach the host (discard=unmap)
    detect_zeroes        "on" or "unmap": writes of zeroes through a Root become requests to zero; "": they do not
    perm, shared         permissions; None derives them from the above
    """

    __slots__ = (
        "writable",
        "resize",
        "direct",
        "no_flush",
        "writethrough",
        "force_share",
        "no_backing",
        "no_io",
        "check",
        "unmap",
        "detect_zeroes",
        "perm",
        "shared",
    )

    writable: bool
    resize: bool
    direct: bool
    no_flush: bool
    writethrough: bool
    force_share: bool
    no_backing: bool
    no_io: bool
    check: bool
    unmap: bool
    detect_zeroes: str
    perm: Optional[int]
    shared: Optional[int]

    def __init__(self, **values: Any) -> None:
        for name in self.__slots__:
            setattr(self, name, values.pop(name, None if name in ("perm", "shared") else "" if name == "detect_zeroes" else False))
        if values:
            raise TypeError("OpenFlags has no %s" % ", ".join(sorted(values)))

    def but(self, **values: Any) -> OpenFlags:
        """A copy with some values changed."""
        return OpenFlags(**{**{name: getattr(self, name) for name in self.__slots__}, **values})

    def permissions(self) -> tuple[int, int]:
        """(perm, shared) with the defaults filled in."""
        perm = self.perm
        if perm is None:
            perm = (0 if self.no_io else CONSISTENT_READ) | (WRITE if self.writable else 0) | (RESIZE if self.resize else 0)
        return perm, ALL if self.shared is None else self.shared


def cache_flags(mode: str) -> Optional[dict[str, bool]]:
    """The OpenFlags fields of a cache mode (`-t`, `-T`); None for an unknown mode."""
    modes = {
        "none": {"direct": True},
        "off": {"direct": True},
        "writeback": {},
        "writethrough": {"writethrough": True},
        "directsync": {"direct": True, "writethrough": True},
        "unsafe": {"no_flush": True},
    }
    return modes.get(mode)


class Alloc:
    """Where `length` bytes at guest `offset` are to be written: `host_offset` of `host`.

    A fresh one covers whole allocation units (and so more than was asked for), is not yet visible to `_map` and must be
    linked or aborted. `token` is the driver's own. `zeroed` says that the host has never been written there and reads as
    zeroes, so that zeroes need not be written: behind the end of a file.
    """

    __slots__ = ("offset", "length", "host", "host_offset", "fresh", "token", "zeroed")

    def __init__(
        self, offset: int, length: int, host: Node, host_offset: int, fresh: bool = False, token: Any = None, zeroed: bool = False
    ) -> None:
        self.offset = offset
        self.length = length
        self.host = host
        self.host_offset = host_offset
        self.fresh = fresh
        self.token = token
        self.zeroed = zeroed

    def __repr__(self) -> str:
        return "Alloc(%#x, %#x, host_offset=%#x, fresh=%s)" % (self.offset, self.length, self.host_offset, self.fresh)


class Reference:
    """A file that an image names: `role` is the child's name ("backing", "data-file", "extents.0").

    With `protocol` the name is a path, whatever it looks like, and the child the file itself: its content is not looked at.
    With `spec` that is opened, over nodes that are there already, and it may not name any file.
    """

    __slots__ = ("role", "name", "format", "protocol", "spec")

    def __init__(
        self, role: str, name: str, format: Optional[str] = None, protocol: bool = False, spec: Optional[Mapping[str, Any]] = None
    ) -> None:
        self.role = role
        self.name = name
        self.format = format
        self.protocol = protocol
        self.spec = spec


class Edge:
    """One use of a node: `user` (a Node or a Root; the node-name of a Node that is just being opened) uses `node` as its child
    `role`. `perm` is what it does there, `shared` what it lets other users do; see edges.py."""

    __slots__ = ("user", "role", "node", "perm", "shared")

    def __init__(self, user: Any, role: str, node: Node, perm: int, shared: int) -> None:
        self.user = user
        self.role = role
        self.node = node
        self.perm = perm
        self.shared = shared

    def __repr__(self) -> str:
        return "Edge(%r, %r, perm=%d, shared=%d)" % (getattr(self.user, "name", self.user), self.role, self.perm, self.shared)


class Snapshot:
    """An internal snapshot. Sizes in bytes; `date_sec` and `date_nsec` since 1970 in UTC, `vm_clock_nsec` since the guest
    was started; `icount` is its count of instructions, None where the image has none."""

    __slots__ = ("id", "name", "vm_state_size", "date_sec", "date_nsec", "vm_clock_nsec", "icount", "disk_size")

    def __init__(
        self,
        id: str,
        name: str,
        vm_state_size: int = 0,
        date_sec: int = 0,
        date_nsec: int = 0,
        vm_clock_nsec: int = 0,
        icount: Optional[int] = None,
        disk_size: Optional[int] = None,
    ) -> None:
        self.id = id
        self.name = name
        self.vm_state_size = vm_state_size
        self.date_sec = date_sec
        self.date_nsec = date_nsec
        self.vm_clock_nsec = vm_clock_nsec
        self.icount = icount
        self.disk_size = disk_size


class Measure:
    """Bytes that a new image needs: `required` now, `fully_allocated` once every guest byte was written; `bitmaps`
    bytes more to hold the source's dirty bitmaps, None where either side has none to offer."""

    __slots__ = ("required", "fully_allocated", "bitmaps")

    def __init__(self, required: int, fully_allocated: int, bitmaps: Optional[int] = None) -> None:
        self.required = required
        self.fully_allocated = fully_allocated
        self.bitmaps = bitmaps


class Hooks:
    """What a driver overrides, each only as it needs it; class attributes say what it can."""

    driver: ClassVar[str] = ""  # QEMU's name of it
    options_class: ClassVar[type[Options]]
    primary: ClassVar[str] = "file"  # the child whose content it shows, or keeps its own in
    leaf: ClassVar[bool] = False  # a protocol: it hosts its own bytes, and reading needs no look-up
    supports_backing: bool = False  # a class says it for all of its images, where they are not of two kinds
    supports_compression: bool = False
    needs_compression: bool = False  # it takes whole units, compressed, and nothing else
    streamed: bool = False  # `unpack` gives its content from the beginning to the end, and that is how it is read best
    creatable: ClassVar[bool] = False
    plain: ClassVar[bool] = False  # of a format: creating the file is all there is to creating an image
    amend_options: ClassVar[Optional[type[Options]]] = None  # what amend takes; None: nothing can be amended
    strong_options: ClassVar[tuple[str, ...]] = ()  # they decide which bytes the node shows, so its json: name has them
    numbered_references: ClassVar[tuple[str, ...]] = ()  # KEY.N in the options adds to how the image's own reference of this role is opened

    allocation_unit: int = 0  # bytes; 0: writes never allocate in units, so they need not be serialised
    changeable: ClassVar[tuple[str, ...]] = ()  # options that can change while it is open; see change_option
    request_alignment: int = 1  # bytes; what _pread_into and _pwrite of this node insist on
    zero_initialized: bool = False  # a new, never written image of this driver reads as zeroes
    growable: bool = False  # a write beyond the end makes the node larger
    fixed: bool = False  # storage of a size that is given; a format that needs less of it leaves the rest alone
    unwritable: bool = False  # its driver opens no image for writing
    refusal: str = "Image is read-only"  # what QEMU says then
    opaque: bool = False  # block_status says that all of it is data that only this node gives, since QEMU's driver tells no more

    keeps_children: bool = False  # it holds on to them in its own way: while it is open none but the backing node can be replaced

    cluster_size: int = 0  # bytes, 0 where the format has none; for info
    table_span: int = 0  # guest bytes of one mapping table, if QEMU's driver tells their status in one go; see copy/difference.py
    dirty: Optional[bool] = False  # not cleanly shut down; None where the driver cannot say
    stores_bitmaps: bool = False  # dirty bitmaps are kept when it is closed
    probed: Optional[Callable[[bytes, str], str]] = None  # what told its format from the content, where nobody named it
    encrypted: bool = False
    compressed: bool = False
    baseless: str = ""  # of a protocol: why names in an image cannot be relative to it, as the end of QEMU's sentence
    decodes: bool = False  # reading it is work for a processor
    backing_filename: Optional[str] = None  # as stored in the image
    backing_format: Optional[str] = None

    # set by graph.py: opens one more file that the image names, in the image's directory or below it; the caller closes it
    open_beside: Optional[Callable[[Reference], Node]] = None

    # What node.py keeps for every node.
    filename: str
    flags: OpenFlags
    children: dict[str, Node]
    backing: Optional[Node]
    name: str = ""  # its node-name, given or made up; "" outside of a graph
    parents: list[Edge]  # who uses it, oldest first
    own_flags: Mapping[str, Any] = {}  # fields of its flags that its description says, so that they are no affair of who uses it
    tell: Optional[Callable[[str], None]]
    resolve: Callable[..., list[Extent]]
    recorder: Optional[Callable[[int, int], None]] = None  # told (offset, length) of all that was written here; see jobs/recording.py

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        """Extents that cover the range, ascending, without gaps; they may begin before and end after it. Only reads metadata."""
        raise NotImplementedError(self.driver)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        """RESERVE room for the range and say where; see Alloc."""
        raise Unsupported("%s: the %s driver cannot write" % (self.filename, self.driver), filename=self.filename)

    def _link(self, allocs: Sequence[Alloc]) -> None:
        """PUBLISH fresh allocations whose data is written."""

    def _abort(self, allocs: Sequence[Alloc]) -> None:
        """Give back fresh allocations that will not be linked."""

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        """Zero what is cheap inside the range and return (offset, length) of that part; length 0 for none."""
        return offset, 0

    def _discard(self, offset: int, length: int) -> None:
        """Discard what can be discarded inside the range."""

    def _truncate(self, size: int, preallocation: str) -> None:
        raise Unsupported("Image format driver does not support resize", filename=self.filename, errno=errno.ENOTSUP)

    def _change_backing(self, name: Optional[str], format: Optional[str]) -> None:
        """Make the image name another backing file, in one step that a crash does not tear apart."""
        raise Unsupported("Could not change the backing file to '%s': Operation not supported" % (name or ""), filename=self.filename, errno=errno.ENOTSUP)

    def _make_empty(self) -> None:
        """Give up all that this layer holds, in steps that a crash does not tear apart."""
        raise Unsupported("%s: the %s format cannot be emptied" % (self.filename, self.driver), filename=self.filename, errno=errno.ENOTSUP)

    def _changed_flags(self, old: OpenFlags) -> None:
        """The node and its own children have other flags than `old` now."""

    def _trim(self, end: int) -> None:
        """After a padded write that should have ended at `end`: cut what the padding added to the node."""

    def _flush(self) -> None:
        """Write cached metadata, pointers after what they point at."""

    def listener(self) -> Optional[Callable[[str], None]]:
        """What wants to be told how far the node above has come, by the name of an event; see `mention`."""
        return None

    def mention(self, *events: str) -> None:
        """Say how far a request has come, in QEMU's names, to what listens below (blkdebug)."""
        if self.tell is not None:
            for event in events:
                self.tell(event)

    def mention_read(self, offset: int, length: int) -> None:
        """A read of this range begins."""
        backing = self.backing
        if self.tell is None or backing is None:
            return
        if any(extent[2] == 0 and extent[0] < backing.size for extent in self._map(offset, length)):
            self.mention("read_backing_aio")

    def mention_write(self, alloc: Alloc, head: int, tail: int) -> None:
        """A write begins, into a place with so many bytes of old content before and behind what is written."""
        if self.tell is None:
            return
        if alloc.fresh and (head or tail):
            old = (self.resolve(alloc.offset, head), self.resolve(alloc.offset + alloc.length - tail, tail))
            found = any(extent[3] is not None for extents in old for extent in extents)
            self.mention(*(("cow_read", "cow_write") if found else ("cluster_alloc_space",)))
        self.mention("write_aio")

    def preload(self) -> None:
        """Import what reading and writing need, here and below; called before several threads use the node.

        Threads that import one module at a time do not wait for each other where it comes out of a zip file (an Ansible
        payload) under Python 3.9.
        """
        for child in self.children.values():
            child.preload()

    def _close(self) -> None:
        """Last metadata updates of a clean shut-down; called after a flush."""

    def _release_host(self) -> None:
        """Close descriptors and connections; called last, also after a failure."""

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        """Fill `view` with bytes that this node hosts; zeroes beyond the end."""
        raise NotImplementedError(self.driver)

    def unpack(self) -> Iterator[bytes]:
        """Of what is `streamed`: all bytes, in order and in pieces."""
        raise NotImplementedError(self.driver)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        """Write bytes that this node hosts."""
        raise NotImplementedError(self.driver)

    def _pwrite_compressed(self, offset: int, view: memoryview) -> None:
        """Store one unit compressed; the codec runs outside the lock, the reservation inside it."""
        raise NotImplementedError(self.driver)

    def _encode(self, view: memoryview) -> Optional[bytes]:
        """The first half of _pwrite_compressed, if it can be done apart: what will be stored for one unit."""
        return None

    def _pwrite_encoded(self, offset: int, view: memoryview, encoded: bytes) -> None:
        """The second half: store `encoded`, or `view` as plain data where that is not smaller."""
        raise NotImplementedError(self.driver)

    def _check(self, repair: str) -> CheckResult:
        raise Unsupported("This image format does not support checks", filename=self.filename, errno=errno.ENOTSUP)

    def _amend(self, options: Any, force: bool, progress: Optional[Callable[[int, int], None]] = None) -> None:
        """Change what `options`, an `amend_options` record, says; with `force` even if data gets lost by it. `progress` is told
        (steps done, in all)."""
        raise Unsupported("Format driver '%s' does not support option amendment" % self.driver, filename=self.filename, errno=errno.ENOTSUP)

    def references(self) -> list[Reference]:
        """The files that this image names and needs; graph.py opens them and calls attach."""
        return []

    def change_option(self, key: str, value: Any) -> None:
        """Take another value of one of `changeable`, by key; the option record is the caller's. Raises OptionError."""

    def report(self, event: str, **data: Any) -> None:
        """Tell whoever watches the graph of something that happened to the node; see jobs/events.py."""
        notify = getattr(getattr(self, "graph", None), "notify", None)
        if notify is not None:
            notify(event, data)

    def attach(self, role: str, child: Node) -> None:
        """Take a child that a Reference named, or another one in place of a child; for graph.py."""
        self.children[role] = child
        if role == "file":
            self.tell = child.listener()
        if role == "backing":
            self.backing = child

    def detach(self, role: str) -> None:
        """Be without a child from now on, the backing node say; for graph.py."""
        del self.children[role]
        if role == "backing":
            self.backing = None

    def layers(self) -> Iterator[Node]:
        """This node and its backing chain, top first."""
        node: Any = self
        while node is not None:
            yield node
            node = node.backing

    def fileno(self) -> int:
        """A descriptor through which plain bytes of this node can be read and written at host_offset, or -1."""
        return -1

    def format_specific(self) -> Optional[dict[str, Any]]:
        """The `data` of info's format-specific object, in QEMU's keys; None where there is none."""
        return None

    def disk_size(self) -> Optional[int]:
        """Bytes that the files of this image take on their host, backing files apart; None where that is not known."""
        sizes = [child.disk_size() for role, child in self.children.items() if role != "backing"]
        return None if not sizes or None in sizes else sum(size or 0 for size in sizes)

    def snapshots(self) -> list[Snapshot]:
        """The internal snapshots that the image holds."""
        return []

    def _create_snapshot(self, name: str, like: Optional[Snapshot]) -> Snapshot:
        """Keep the present content as an internal snapshot, with date, VM clock and the like as in `like`, or of now."""
        raise Unsupported(os.strerror(errno.ENOTSUP), filename=self.filename, errno=errno.ENOTSUP)

    def _apply_snapshot(self, name: str) -> None:
        """Make the content of the internal snapshot with this ID, or else this name, the present one."""
        raise Unsupported("Block driver does not support snapshots", filename=self.filename, errno=errno.ENOTSUP)

    def _delete_snapshot(self, name: str, id: Optional[str]) -> None:
        """Remove the first internal snapshot of this name, or the one that has this ID too."""
        raise Error("snapshot not found", filename=self.filename, errno=errno.ENOENT)

    def _load_snapshot(self, id: Optional[str], name: Optional[str]) -> None:
        """Show the internal snapshot with this ID and this name (None: any) from now on; only of a node open for reading."""
        text = "Block format '%s' used by device '' does not support temporarily loading internal snapshots" % self.driver
        raise Unsupported(text, filename=self.filename, errno=errno.ENOTSUP)

    def state_offset(self) -> Optional[int]:
        """Where in the guest's address space the VM state is kept; None where there is no room for one."""
        return None

    def read_state(self, offset: int, view: memoryview) -> None:
        """Fill `view` with bytes of the VM state; what was never written is zero."""
        raise Unsupported(os.strerror(errno.ENOTSUP), filename=self.filename, errno=errno.ENOTSUP)

    def write_state(self, offset: int, view: memoryview) -> None:
        """Write bytes of the VM state."""
        raise Unsupported(os.strerror(errno.ENOTSUP), filename=self.filename, errno=errno.ENOTSUP)

    def holds_snapshot(self, id: str) -> bool:
        """Whether nothing was written, and the size is the same, since the internal snapshot with this ID was made or applied."""
        return False

    def key_slots(self, secret: SecretRef) -> Optional[list[int]]:
        """The numbers of the key slots that the passphrase `secret` opens; None where there are no key slots. Takes as long as
        the key derivation was made to take, for every slot."""
        return None

    def bitmaps(self) -> Optional[BitmapSet]:
        """The dirty bitmaps; None where there cannot be any. What is changed of them is stored when the node is closed."""
        return None

    @classmethod
    def child_flags(cls, role: str, flags: OpenFlags) -> OpenFlags:
        """How the child `role` is to be opened for a parent that is opened with `flags`."""
        return flags

    def options_name(self) -> str:
        """The plain name by which a user would open this very node; "" where there is none."""
        return ""

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        """The options that a name of the form `driver:...` stands for. Raises OptionError."""
        return {}

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """How sure the driver is that an image that begins with `head` is its own: 0 (not) .. 100."""
        return 0

    @classmethod
    def can_compress(cls, options: Mapping[str, Any]) -> bool:
        """Whether an image made with these creation options, by key, can hold compressed data."""
        return bool(cls.supports_compression)

    @classmethod
    def probe_tail(cls, tail: bytes, size: int) -> int:
        """The same of a file of `size` bytes that ends with `tail`; asked only where its beginning says nothing."""
        return 0

    @classmethod
    def created_size(cls, options: Any) -> int:
        """The virtual size of an image that is made with `options`: the one that they have, as the format rounds it."""
        return -(-int(options.size) // 512) * 512

    @classmethod
    def check_creation(cls, options: Any) -> None:
        """Raise whatever `create` would raise for these options alone: it is called before anything is touched."""

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        """Write a new, empty image into `file` (opened for writing, of length 0); `options` is a `create_options` record."""
        raise Unsupported("Format driver '%s' does not support image creation" % cls.driver)

    @classmethod
    def creation_files(cls, options: Any, filename: str) -> dict[str, str]:
        """Paths of the further files that the image `filename` made with `options` consists of, by the role of the child."""
        return {}

    @classmethod
    def creation_needs_backing(cls, options: Any) -> bool:
        """Whether `create_over` looks into the backing file: it is the child "backing" then."""
        return False

    @classmethod
    def create_over(cls, children: Mapping[str, Node], options: Any) -> None:
        """`create` for an image of several files: `children` are open for writing, and empty."""
        cls.create(children["file"], options)

    @classmethod
    def stream(cls, outlet: Node, options: Any) -> Node:
        """A new image that is written from its beginning to its end into `outlet`, and is whole once it is closed; it takes
        its units compressed, in order. Raises Unsupported."""
        raise Unsupported("%s: a pipe takes a raw image, or one that is made to be streamed" % outlet.filename, filename=outlet.filename)

    @classmethod
    def measure(cls, options: Any, source: Optional[Node]) -> Measure:
        """Bytes needed for an image made with `options` that takes the content of `source` (None: empty)."""
        raise Unsupported("Block driver '%s' does not support size measurement" % cls.driver)


def fill_zeroes(view: memoryview) -> None:
    """Set every byte of `view` to zero."""
    for position in range(0, len(view), CHUNK):
        part = view[position : position + CHUNK]
        part[:] = memoryview(ZEROES)[: len(part)]


def is_zero(view: memoryview) -> bool:
    """Whether all bytes of `view` are zero."""
    return all(view[start : start + CHUNK] == ZEROES[: min(CHUNK, len(view) - start)] for start in range(0, len(view), CHUNK))


def aligned_buffer(length: int) -> memoryview:
    """A zeroed, page-aligned buffer of `length` bytes, as O_DIRECT needs it."""
    import mmap

    return memoryview(mmap.mmap(-1, max(length, 1)))[:length]
