# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Qcow2, the node of an image: opening it, and the driver's hooks (https://www.qemu.org/docs/master/interop/qcow2.html).

What a hook does is in the module that it imports, so that looking at an image does not load the writing of one.
"""

from __future__ import annotations

from ...errors import Corrupt, Error, OptionError, ReadOnly
from ...node import Format, OpenFlags, Reference
from ...parts import part
from . import header as layout
from .header import name_text, read_header
from .options import Qcow2AmendOptions, Qcow2CreateOptions, Qcow2Options, check_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Mapping, Optional, Sequence, Union

    from diskwright.formats.qcow2.encryption import Encryption
    from diskwright.formats.qcow2.refcount import Refcounts
    from diskwright.tally import CheckResult

    from ...bitmaps import BitmapSet
    from ...extent import Extent
    from ...hooks import Alloc, Measure, Snapshot
    from ...node import Node
    from ...options import SecretRef
    from .overlap import Overlap
    from .tables import Tables

EACCES, EIO = 13, 5


class Qcow2(Format):
    """A qcow2 image. `header` is the one record of what the file's header says; `update_header` writes it."""

    driver = "qcow2"
    changeable = ("lazy-refcounts",)
    options_class = Qcow2Options
    create_options = Qcow2CreateOptions
    amend_options = Qcow2AmendOptions
    supports_backing = True
    supports_compression = True
    creatable = True
    zero_initialized = True
    keeps_children = False
    strong_options = ("encrypt.key-secret",)

    options: Qcow2Options

    def __init__(self, options: Qcow2Options, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        try:
            header = self.header = read_header(self.file, flags.check)
        except OSError as exc:
            raise Error("Could not read qcow2 header: %s" % exc.strerror, errno=exc.errno) from exc
        check_options(options, header)
        self._size = header.size // 512 * 512  # as QEMU, which counts sectors
        self.cluster_size = header.cluster_size
        self.table_span = header.cluster_size * header.l2_entries
        self.allocation_unit = header.cluster_size // (layout.SUBCLUSTERS if header.extended_l2 else 1)
        self.dirty = bool(header.incompatible_features & layout.DIRTY)
        self.encrypted = bool(header.crypt_method)
        self.backing_filename = name_text(header.backing_file)
        self.backing_format = name_text(header.extension(layout.EXT_BACKING_FORMAT)) or None if header.backing_file else None
        self.data_file: Node = self.children.get("data-file", self.file)
        self.ordered = True  # see barrier
        lazy = options.lazy_refcounts
        self.lazy = bool(header.compatible_features & layout.LAZY_REFCOUNTS if lazy is None else lazy) and not flags.check
        self.deferring = False  # refcounts are in memory only, and the image is marked as dirty
        self.reads = 0  # under way, while the image is writable: what they were told stays where it is
        self._tables: Optional[Tables] = None
        self._refcounts: Optional[Refcounts] = None
        self._overlap: Optional[Overlap] = None
        self._bitmaps: Optional[BitmapSet] = None  # None: it has none
        self._found_bitmaps: Optional[BitmapSet] = None  # as they were when the image was opened for writing
        self._told_corrupt = False
        self._written = False  # so bitmaps that are in use cannot be what they were
        self.encryption: Optional[Encryption] = None
        self.stores_bitmaps = header.version >= 3
        if "data-file" in self.children and not header.incompatible_features & layout.DATA_FILE:
            raise Error("'data-file' can only be set for images with an external data file", errno=22)
        if header.crypt_method:
            self._open_encryption()
        if header.nb_snapshots and not flags.check:
            self.snapshots()  # an image whose snapshots are damaged is refused
        if not flags.no_io:
            self._refuse_unreadable()
        if flags.writable:
            self._open_for_writing()
        self._open_bitmaps()

    def _refuse_unreadable(self) -> None:
        header = self.header
        if header.autoclear_features & layout.RAW_DATA_FILE and not header.incompatible_features & layout.DATA_FILE:
            raise Corrupt("data-file-raw requires a data file", errno=22)
        if header.incompatible_features & layout.DATA_FILE and not self.references() and "data-file" not in self.children:
            raise Error("'data-file' is required for this image", errno=22)

    def change_flags(self, flags: OpenFlags) -> None:
        if self.deferring and not flags.writable:
            self.mark_clean()
        super().change_flags(flags)

    def _changed_flags(self, old: OpenFlags) -> None:
        if self.flags.writable and not old.writable:
            self.forget_metadata()
            self._open_for_writing()

    def _open_for_writing(self) -> None:
        """The header's say in whether and how the image may be written."""
        header, flags = self.header, self.flags
        incompatible = header.incompatible_features
        if not flags.check:
            if incompatible & layout.CORRUPT:
                raise ReadOnly("qcow2: Image is corrupt; cannot be opened read/write", errno=EACCES)
        if header.autoclear_features & ~layout.KNOWN_AUTOCLEAR:
            header.autoclear_features &= layout.KNOWN_AUTOCLEAR
            self.update_record()
        if self.dirty and not flags.check:
            repair_dirty = part(__package__, "repair").repair_dirty

            repair_dirty(self)
            self.dirty = bool(header.incompatible_features & layout.DIRTY)

    def _open_encryption(self) -> None:
        self.encryption = part(__package__, "encryption").open_encryption(self, self.options, self.flags)
        if self.flags.writable and self.header.l1_size:
            from ...cache import read_padded

            first = bytearray(8)
            read_padded(self.file, self.header.l1_table_offset, memoryview(first))
            self.zero_initialized = not any(first)  # room that was taken in advance holds bytes that nobody encrypted

    def _open_bitmaps(self) -> None:
        """Look at the persistent bitmaps: an image with broken ones is refused, and while it is written they are in use."""
        header, flags = self.header, self.flags
        if flags.check or header.version < 3 or header.extension(layout.EXT_BITMAPS) is None:
            return
        from . import bitmaps

        if bitmaps.are_lost(header):
            self.warnings.append(bitmaps.LOST)
            if flags.writable:
                header.set_extension(layout.EXT_BITMAPS, None)
                self.update_header()
            return
        self._bitmaps = bitmaps.open_bitmaps(self)
        if flags.writable:
            self._found_bitmaps = self._bitmaps.copy()
            bitmaps.mark_in_use(self, self._bitmaps)

    # -- the parts -----------------------------------------------------------------------------------------------

    @property
    def tables(self) -> Tables:
        """L1 and L2 tables."""
        if self._tables is None:
            with self._lock:
                if self._tables is None:
                    from .tables import Tables

                    self._tables = Tables(self)
        return self._tables

    @property
    def refcounts(self) -> Refcounts:
        """Refcount table and blocks, and the allocation of clusters."""
        if self._refcounts is None:
            with self._lock:
                if self._refcounts is None:
                    Refcounts = part(__package__, "refcount").Refcounts

                    self._refcounts = Refcounts(self)
        return self._refcounts

    @property
    def overlap(self) -> Overlap:
        """The guard of metadata against writes that do not mean it."""
        if self._overlap is None:
            with self._lock:
                if self._overlap is None:
                    from .overlap import Overlap

                    self._overlap = Overlap(self)
        return self._overlap

    @property
    def is_raw_external(self) -> bool:
        """Whether the data file is to stay valid as a raw image."""
        return bool(self.header.autoclear_features & layout.RAW_DATA_FILE and self.header.incompatible_features & layout.DATA_FILE)

    def forget_metadata(self) -> None:
        """Drop whatever was cached of the tables, unwritten changes included; for a repair that rewrote the file."""
        self._tables = self._refcounts = self._overlap = None

    def write_clusters(self, host_offset: int, guest_offset: int, view: memoryview) -> None:
        """Write data of the guest (whole sectors) to a place in the data file that is known, encrypted if the image is."""
        if self.encryption is None:
            self.data_file.write_hosted(host_offset, view)
        else:
            self.encryption.write(host_offset, guest_offset, view)

    def update_record(self) -> None:
        """Write the numbers of the header in one piece and bring them to the disk."""
        self.file.write_hosted(0, memoryview(self.header.pack_record()))
        self.barrier()

    def change_record(self, **values: int) -> None:
        """Change numbers of the header, in the file and here; if the file cannot be written they stay as they were."""
        old = {name: getattr(self.header, name) for name in values}
        self.header.__dict__.update(values)
        try:
            self.update_record()
        except BaseException:
            self.header.__dict__.update(old)
            raise

    def mark_clean(self) -> None:
        """Bring all refcounts into the file, also those that were deferred, and say so in the header."""
        lazy = self.lazy
        self.lazy = self.deferring = False
        try:
            self.flush()
        finally:
            self.lazy = lazy
        if self.header.incompatible_features & layout.DIRTY:
            self.change_record(incompatible_features=self.header.incompatible_features & ~layout.DIRTY)
        self.dirty = False

    def mark_dirty(self) -> None:
        """From now on refcounts stay in memory; whoever opens the image after a crash counts anew."""
        if not self.header.incompatible_features & layout.DIRTY:
            self.change_record(incompatible_features=self.header.incompatible_features | layout.DIRTY)
        self.deferring = True

    def barrier(self) -> None:
        """What was written up to now reaches the disk before what follows; of no use while an image is being made."""
        if self.ordered:
            self.file.flush()
            if self.data_file is not self.file:
                self.data_file.flush()

    def update_header(self) -> None:
        """Write the whole header, with extensions and backing file name, in one piece and bring it to the disk."""
        self.file.write_hosted(0, memoryview(self.header.pack()))
        self.barrier()

    def corrupt(self, what: str, fatal: bool = True) -> Corrupt:
        """The error for a broken image, in QEMU's words; marks a writable image as corrupt unless not `fatal`."""
        fatal = fatal and not self.read_only
        if not self._told_corrupt and not (fatal and self.header.incompatible_features & layout.CORRUPT):
            self._told_corrupt = True
            self.report("BLOCK_IMAGE_CORRUPTED", device="", node_name=self.name, msg=what, fatal=fatal)
        if not fatal:
            return Corrupt(
                "qcow2: Image is corrupt: %s; further non-fatal corruption events will be suppressed" % what, filename=self.filename, errno=EIO
            )
        if self.header.version >= 3 and not self.header.incompatible_features & layout.CORRUPT:
            self.header.incompatible_features |= layout.CORRUPT
            self.update_record()
        return Corrupt(
            "qcow2: Marking image as corrupt: %s; further corruption events will be suppressed" % what, filename=self.filename, errno=EIO
        )

    # -- hooks ---------------------------------------------------------------------------------------------------

    def pread_into(self, offset: int, buffer: Union[bytearray, memoryview]) -> None:
        if self.read_only:
            super().pread_into(offset, buffer)
            return
        with self._lock:
            self.reads += 1
        try:
            super().pread_into(offset, buffer)
        finally:
            with self._lock:
                self.reads -= 1

    def preload(self) -> None:
        reading = ("bitmaps", "compressed", "overlap", "snapshots", "tables")
        writing = () if self.read_only else ("discard", "refcount", "write")
        for name in (*reading, *writing, *(("subclusters",) if self.header.extended_l2 else ())):
            part(__package__, name)
        super().preload()

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        extents = self.tables.map(offset, length)
        return extents if self.encryption is None else self.encryption.extents(extents)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        read_compressed = part(__package__, "compressed").read_compressed

        read_compressed(self, host_offset, view)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        self._note(offset, length)
        if self.header.extended_l2:
            reserve = part(__package__, "subclusters").reserve
        else:
            reserve = part(__package__, "write").reserve
        allocs = reserve(self, offset, length)
        return allocs if self.encryption is None else self.encryption.cover(allocs)

    def _link(self, allocs: Sequence[Alloc]) -> None:
        if self.encryption is not None:
            allocs = self.encryption.uncover(allocs)
        if self.header.extended_l2:
            part(__package__, "subclusters").publish(self, allocs)
            return
        publish = part(__package__, "write").publish

        publish(self, allocs)

    def _abort(self, allocs: Sequence[Alloc]) -> None:
        if self.encryption is not None:
            allocs = self.encryption.uncover(allocs)
        if self.header.extended_l2:
            part(__package__, "subclusters").withdraw(self, allocs)
            return
        withdraw = part(__package__, "write").withdraw

        withdraw(self, allocs)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        zero = part(__package__, "discard").zero

        self._note(offset, length)
        found: tuple[int, int] = zero(self, offset, length, unmap)
        return found

    def _discard(self, offset: int, length: int) -> None:
        discard = part(__package__, "discard").discard

        self._note(offset, length)
        discard(self, offset, length)

    def _pwrite_compressed(self, offset: int, view: memoryview) -> None:
        write_compressed = part(__package__, "compressed").write_compressed

        self._note(offset, len(view))
        write_compressed(self, offset, view)

    def _encode(self, view: memoryview) -> Optional[bytes]:
        encode = part(__package__, "compressed").encode

        found: Optional[bytes] = encode(self, view)
        return found

    def _pwrite_encoded(self, offset: int, view: memoryview, encoded: bytes) -> None:
        write_encoded = part(__package__, "compressed").write_encoded

        self._note(offset, len(view))
        write_encoded(self, offset, view, encoded)

    def _truncate(self, size: int, preallocation: str) -> None:
        resize = part(__package__, "resize").resize

        bitmaps, self._bitmaps = self._bitmaps, None  # what resizing zeroes was not there before
        try:
            if bitmaps is not None:
                bitmaps.check_resize(size)
            resize(self, size, preallocation)
        finally:
            self._bitmaps = bitmaps
            if bitmaps is not None and bitmaps.size != self.size:
                self._written = True
                bitmaps.resize(self.size)

    def _change_backing(self, name: Optional[str], format: Optional[str]) -> None:
        change_backing = part(__package__, "backing").change_backing

        change_backing(self, name, format)

    def _amend(self, options: Any, force: bool, progress: Optional[Callable[[int, int], None]] = None) -> None:
        amend = part(__package__, "amend").amend

        amend(self, options, force, progress)

    def _make_empty(self) -> None:
        make_empty = part(__package__, "resize").make_empty

        make_empty(self)

    def _flush(self) -> None:
        self.write_back()

    def _note(self, offset: int, length: int) -> None:
        """Tell the bitmaps of a write."""
        if self._bitmaps is not None:
            self._written = True
            with self._lock:
                self._bitmaps.mark(offset, length)

    def _close(self) -> None:
        if self.flags.writable and self._bitmaps is not None:
            from .bitmaps import store

            self._written = True
            store(self, self._bitmaps)
        if self.deferring:
            self.mark_clean()

    def abandon(self) -> None:
        if self._found_bitmaps is not None and not self._closed and not self._written:
            from .bitmaps import mark_in_use

            try:  # nothing was done to the image: its bitmaps are what they were
                mark_in_use(self, self._found_bitmaps, 0)
            except (Error, OSError):
                pass
        super().abandon()

    def key_slots(self, secret: SecretRef) -> Optional[list[int]]:
        return None if self.encryption is None else self.encryption.key_slots(secret)

    def bitmaps(self) -> BitmapSet:
        if self._bitmaps is None:
            from .bitmaps import open_bitmaps

            self._bitmaps = open_bitmaps(self)
        return self._bitmaps

    def change_option(self, key: str, value: Any) -> None:
        """lazy-refcounts: from the next allocation on; what was postponed before stays so until the image is clean."""
        if value and self.header.version < 3:
            raise OptionError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
        self.lazy = bool(self.header.compatible_features & layout.LAZY_REFCOUNTS if value is None else value) and not self.flags.check

    def forget_bitmaps(self) -> None:
        """The image cannot have any now: what the file has of them stays there, but is not stored again."""
        self._bitmaps = self._found_bitmaps = None

    def write_back(self) -> None:
        """Bring cached metadata into the file, in order; a flush of the file must follow."""
        if self._refcounts is not None or self._tables is not None:
            write_back = part(__package__, "write").write_back

            write_back(self)

    def _check(self, repair: str) -> CheckResult:
        check = part(__package__, "repair").check

        if self.deferring:
            self.mark_clean()
        self.flush()
        found: CheckResult = check(self, repair)
        return found

    def references(self) -> list[Reference]:
        found = []
        header = self.header
        data_name = header.extension(layout.EXT_DATA_FILE)
        if header.incompatible_features & layout.DATA_FILE and data_name and not self.flags.no_io and "data-file" not in self.children:
            found.append(Reference("data-file", _plain_path(name_text(data_name) or ""), "raw"))
        if self.backing_filename is not None and "backing" not in self.children:
            found.append(Reference("backing", self.backing_filename, self.backing_format))
        return found

    def attach(self, role: str, child: Node) -> None:
        if role == "file":
            if self.data_file is self.file:
                self.data_file = child
            for holder in (self._tables, self._refcounts):
                if holder is not None:
                    holder.cache.file = child
        super().attach(role, child)
        if role == "data-file":
            self.data_file = child

    def state_offset(self) -> int:
        offset: int = part(__package__, "vmstate").state_offset(self)
        return offset

    def read_state(self, offset: int, view: memoryview) -> None:
        part(__package__, "vmstate").read_state(self, offset, view)

    def write_state(self, offset: int, view: memoryview) -> None:
        part(__package__, "vmstate").write_state(self, offset, view)

    def snapshots(self) -> list[Snapshot]:
        if not self.header.nb_snapshots:
            return []
        from .snapshots import list_snapshots

        return list_snapshots(self)

    def _create_snapshot(self, name: str, like: Optional[Snapshot]) -> Snapshot:
        create_snapshot = part(__package__, "snapshot_changes").create_snapshot

        made: Snapshot = create_snapshot(self, name, like)
        return made

    def _apply_snapshot(self, name: str) -> None:
        apply_snapshot = part(__package__, "snapshot_changes").apply_snapshot

        apply_snapshot(self, name)

    def _delete_snapshot(self, name: str, id: Optional[str]) -> None:
        delete_snapshot = part(__package__, "snapshot_changes").delete_snapshot

        delete_snapshot(self, name, id)

    def holds_snapshot(self, id: str) -> bool:
        from .snapshots import is_current

        return is_current(self, id)

    def _load_snapshot(self, id: Optional[str], name: Optional[str]) -> None:
        from .snapshots import load_snapshot

        load_snapshot(self, id, name)

    def format_specific(self) -> dict[str, Any]:
        data = self._describe()
        if self.encryption is not None:
            data["encrypt"] = self.encryption.describe()
        return data

    def _describe(self) -> dict[str, Any]:
        header = self.header
        if header.version < 3:
            return {"compat": "0.10", "compression-type": "zlib", "refcount-bits": header.refcount_bits}
        data: dict[str, Any] = {"compat": "1.1", "compression-type": layout.COMPRESSION_NAMES[header.compression_type]}
        data["lazy-refcounts"] = bool(header.compatible_features & layout.LAZY_REFCOUNTS)
        if self._bitmaps is not None and self._bitmaps.all:
            data["bitmaps"] = [{"flags": bitmap.flags(), "name": bitmap.name, "granularity": bitmap.granularity} for bitmap in self._bitmaps]
        data["refcount-bits"] = header.refcount_bits
        data["corrupt"] = bool(header.incompatible_features & layout.CORRUPT)
        data["extended-l2"] = header.extended_l2
        if header.incompatible_features & layout.DATA_FILE:
            name = name_text(header.extension(layout.EXT_DATA_FILE))
            if name:
                data["data-file"] = name
            data["data-file-raw"] = bool(header.autoclear_features & layout.RAW_DATA_FILE)
        return data

    @classmethod
    def child_flags(cls, role: str, flags: OpenFlags) -> OpenFlags:
        own = super().child_flags(role, flags)
        return own if role == "backing" else own.but(unmap=True)  # what is discarded there is decided here

    @classmethod
    def check_creation(cls, options: Any) -> None:
        plan_header = part(__package__, "create").plan_header

        plan_header(options)

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        cls.create_over({"file": file}, options)

    @classmethod
    def creation_files(cls, options: Any, filename: str) -> dict[str, str]:
        return {"data-file": _plain_path(options.data_file)} if options.data_file else {}

    @classmethod
    def create_over(cls, children: Mapping[str, Node], options: Any) -> None:
        create = part(__package__, "create").create

        create(cls, children, options)

    @classmethod
    def measure(cls, options: Any, source: Optional[Node]) -> Measure:
        measure = part(__package__, "measure").measure

        found: Measure = measure(options, source)
        return found

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head[:4] == layout.MAGIC_BYTES and int.from_bytes(head[4:8], "big") >= 2 else 0


def _plain_path(name: str) -> str:
    """A name that is a path even where it looks like `protocol:...`: only plain files hold an image's data."""
    colon, slash = name.find(":"), name.find("/")
    return "./" + name if 0 <= colon and not 0 <= slash < colon else name
