# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Vmdk, the node of an image: opening it, and the driver's hooks (VMware's "Virtual Disk Format 5.0").

Offsets of hooks are those of the disk; `at` finds the extent that has one.
"""

from __future__ import annotations

from bisect import bisect_right

from ...errors import Corrupt, Error, Unsupported
from ...extent import ALLOCATED, COMPRESSED, OFFSET_VALID, RECURSE, ZERO, Extent
from ...extent import DATA as STORED
from ...node import Format, OpenFlags, Reference
from ...parts import part
from . import descriptor as text
from .descriptor import Descriptor, ExtentLine, local_name
from .extents import DATA, HOLE, FlatExtent, SparseExtent, ZeroExtent, open_extent
from .header import COWD_MAGIC, MAGIC, SparseHeader, embedded_descriptor, read_layout, read_record
from .options import FLAT, VmdkCreateOptions, VmdkOptions, check_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Mapping, Optional, Sequence

    from diskwright.tally import CheckResult

    from ...hooks import Alloc
    from ...node import Node
    from .extents import AnyExtent

SECTOR = 512
EINVAL = 22
IRREGULAR = 1 << 62  # the allocation unit of a disk whose grains do not lie on a grid: writes follow one another


class Vmdk(Format):
    """A disk of VMware's: `extents` in the order of the disk."""

    driver = "vmdk"
    options_class = VmdkOptions
    create_options = VmdkCreateOptions
    supports_backing = True
    supports_compression = True
    creatable = True
    zero_initialized = True
    numbered_references = ("extents",)

    options: VmdkOptions

    def __init__(self, options: VmdkOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self.extents: list[AnyExtent] = []
        self._starts: list[int] = []
        self._named: list[ExtentLine] = []  # extents in files of their own
        self.barriers = True  # see barrier
        self._new_cid = False
        self.descriptor_offset = 0
        self._parent_cid_checked: Optional[bool] = None
        self.filename = self.file.filename  # for messages, until graph.py knows better
        magic = read_record(self.file, 0, 4)
        if magic in (MAGIC, COWD_MAGIC) and not self._is_wrapped_descriptor(magic):
            self._open_embedded()
        else:
            self._open_descriptor()
        if self.descriptor.parent is not None:
            self.backing_filename = self.descriptor.parent
            self.backing_format = "vmdk"

    def _is_wrapped_descriptor(self, magic: bytes) -> bool:
        """Whether the file only wraps a descriptor of extents elsewhere: a sparse extent without any room."""
        if magic != MAGIC:
            return False
        header = SparseHeader.unpack(read_record(self.file, 0, SparseHeader.SIZE))
        return not header.capacity and bool(header.descriptorOffset)

    def _open_embedded(self) -> None:
        layout = read_layout(self.file, self.flags.writable)
        self._read_descriptor()
        self._add(SparseExtent(self, self.file, 0, "", layout))
        self._settle()

    def _open_descriptor(self) -> None:
        self._read_descriptor()
        if self.descriptor.create_type in text.EMBEDDED_TYPES and not self._named and embedded_descriptor(self.file, SECTOR):
            self._settle()  # a disk of no size
            return
        if self.descriptor.create_type not in text.SPLIT_TYPES:
            raise Error("Unsupported image type '%s'" % self.descriptor.create_type, errno=95)
        self._named = self.descriptor.extents()
        self._add_zeroes()

    def _read_descriptor(self) -> None:
        """Read the descriptor, wherever it is. Raises Corrupt."""
        raw = read_record(self.file, 0, SparseHeader.SIZE)
        if raw[:4] == MAGIC:
            found = embedded_descriptor(self.file, text.MAX_DESCRIPTOR)
            self.descriptor_offset = SparseHeader.unpack(raw).descriptorOffset * SECTOR
        elif raw[:4] == COWD_MAGIC:
            found = None
        else:
            found = read_record(self.file, 0, min(self.file.size, text.MAX_DESCRIPTOR))
        if found is None or b"CID" not in found.upper():
            embedded = raw[:4] in (MAGIC, COWD_MAGIC)
            lacks_type = found is not None and b"createtype" not in found.lower()
            raise Corrupt("invalid VMDK image descriptor" if lacks_type and not embedded else self._no_cid(), errno=EINVAL)
        self.descriptor = Descriptor(found)

    def _no_cid(self) -> str:
        return "Could not open '%s': Invalid argument" % self.file.filename

    # -- extents -------------------------------------------------------------------------------------------------

    def references(self) -> list[Reference]:
        found = []
        for number, line in enumerate(line for line in self._named if line.kind != text.ZERO_KIND):
            role = "extents.%d" % number
            if role not in self.children:
                found.append(Reference(role, local_name(line.name, self.file.filename), protocol=True))
        if self.descriptor.parent:
            found.append(Reference("backing", local_name(self.descriptor.parent, self.file.filename), "vmdk"))
        return found

    def attach(self, role: str, child: Node) -> None:
        if role == "backing":
            super().attach(role, child)
            return
        self.children = {role: child, **self.children}  # the order in which QEMU lists them
        start = self.extents[-1].end if self.extents else 0
        self._add(open_extent(self, child, start, self._named[len(self.extents)], self.flags))
        self._add_zeroes()

    def _add_zeroes(self) -> None:
        """Add the extents that have no file, up to the next one that has; after the last one the image is whole."""
        while len(self.extents) < len(self._named) and self._named[len(self.extents)].kind == text.ZERO_KIND:
            self._add(ZeroExtent(self.extents[-1].end if self.extents else 0, self._named[len(self.extents)]))
        if len(self.extents) == len(self._named):
            self._settle()

    def _add(self, extent: AnyExtent) -> None:
        self.extents.append(extent)
        self._starts.append(extent.start)
        if extent.end >= 1 << 63:
            raise Corrupt("Could not refresh total sector count: File too large", errno=27)

    def _settle(self) -> None:
        """All extents are there: what they have in common."""
        self._size = self.extents[-1].end if self.extents else 0
        grains = {extent.grain for extent in self.extents}
        self.cluster_size = grains.pop() if len(grains) == 1 else 0
        sparse = [extent for extent in self.extents if isinstance(extent, SparseExtent)]
        units = {extent.grain for extent in sparse}
        if units:
            unit = min(units)
            even = len(units) == 1 and all(not extent.start % unit for extent in sparse) and all(not e.end % unit for e in self.extents[:-1])
            self.allocation_unit = unit if even else IRREGULAR
        self.decodes = any(extent.compressed for extent in sparse)
        self.supports_compression = self.needs_compression = bool(sparse) and all(extent.compressed for extent in self.extents)

    def at(self, offset: int) -> AnyExtent:
        """The extent that has the byte at `offset`."""
        return self.extents[bisect_right(self._starts, offset) - 1]

    def parts(self, offset: int, length: int) -> Iterable[tuple[AnyExtent, int, int]]:
        """A range cut at the borders of extents: (extent, offset in it, length)."""
        end = offset + length
        while offset < end:
            extent = self.at(offset)
            stop = min(end, extent.end)
            yield extent, offset - extent.start, stop - offset
            offset = stop

    @property
    def sparse(self) -> list[SparseExtent]:
        """The extents that have tables."""
        return [extent for extent in self.extents if isinstance(extent, SparseExtent)]

    def has_stale_parent(self) -> bool:
        """Whether the backing image is not what it was when this one was laid over it."""
        if self._parent_cid_checked is None:
            self._parent_cid_checked = self.backing is not None and not (
                isinstance(self.backing, Vmdk) and self.backing.descriptor.cid == self.descriptor.parent_cid
            )
        return self._parent_cid_checked

    # -- hooks ---------------------------------------------------------------------------------------------------

    def preload(self) -> None:
        from . import compressed, write

        del compressed, write
        super().preload()

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        for extent, at, count in self.parts(offset, length):
            if isinstance(extent, FlatExtent):
                yield Extent(extent.start + at, count, STORED | OFFSET_VALID | ALLOCATED | RECURSE, extent.file, extent.first + at)
                continue
            if isinstance(extent, ZeroExtent):
                yield Extent(extent.start + at, count, ZERO | ALLOCATED)
                continue
            for start, number, kind, place in extent.runs(at, count):
                start += extent.start
                number = min(number, extent.end - start)
                if kind == HOLE:
                    if self.backing is not None and self.has_stale_parent():
                        yield Extent(start, number, STORED | ALLOCATED, self, start)
                    else:
                        yield Extent(start, number, 0)
                elif kind != DATA:
                    yield Extent(start, number, ZERO | ALLOCATED)
                elif extent.compressed:
                    yield Extent(start, number, STORED | COMPRESSED | ALLOCATED, self, start)
                else:
                    yield Extent(start, number, STORED | OFFSET_VALID | ALLOCATED, extent.file, place)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        read_compressed = part(__package__, "compressed").read_compressed

        read_compressed(self, host_offset, view)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        write_whole = part(__package__, "compressed").write_whole

        write_whole(self, host_offset, view)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        reserve = part(__package__, "write").reserve

        found: list[Alloc] = reserve(self, offset, length)
        return found

    def _link(self, allocs: Sequence[Alloc]) -> None:
        publish = part(__package__, "write").publish

        publish(self, allocs)

    def _abort(self, allocs: Sequence[Alloc]) -> None:
        withdraw = part(__package__, "write").withdraw

        withdraw(self, allocs)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        zero = part(__package__, "write").zero

        found: tuple[int, int] = zero(self, offset, length, unmap)
        return found

    def _pwrite_compressed(self, offset: int, view: memoryview) -> None:
        encode_grain = part(__package__, "compressed").encode_grain
        write_encoded = part(__package__, "compressed").write_encoded

        write_encoded(self, offset, view, encode_grain(view))

    def _encode(self, view: memoryview) -> Optional[bytes]:
        encode_grain = part(__package__, "compressed").encode_grain

        found: Optional[bytes] = encode_grain(view)
        return found

    def _pwrite_encoded(self, offset: int, view: memoryview, encoded: bytes) -> None:
        write_encoded = part(__package__, "compressed").write_encoded

        write_encoded(self, offset, view, encoded)

    def _change_backing(self, name: Optional[str], format: Optional[str]) -> None:
        raise Unsupported("Could not change the backing file to '%s': Operation not supported" % (name or ""), filename=self.filename, errno=95)

    def _flush(self) -> None:
        write_back = part(__package__, "write").write_back

        write_back(self)

    def _changed_flags(self, old: OpenFlags) -> None:
        if self.flags.writable and not old.writable:
            for extent in self.sparse:  # what refuses to be written says so now
                layout = read_layout(extent.file, True) if not extent.layout.read_only else extent.layout
                if layout.read_only:
                    raise Error(layout.read_only, filename=self.filename, errno=95)

    def barrier(self) -> None:
        """What was written up to now reaches the disk before what follows; of no use while an image is being made."""
        write_pending = part(__package__, "compressed").write_pending

        for extent in self.sparse:
            write_pending(extent)
        if self.barriers:
            for role, child in self.children.items():
                if role != "backing":
                    child.flush()

    def _check(self, repair: str) -> CheckResult:
        check = part(__package__, "check").check

        self.flush()
        found: CheckResult = check(self, repair)
        return found

    def format_specific(self) -> dict[str, Any]:
        extents = []
        for extent in self.extents:
            name = "" if isinstance(extent, ZeroExtent) else extent.file.filename
            entry: dict[str, Any] = {"virtual-size": extent.size, "filename": name, "format": extent.kind}
            if extent.grain:
                entry["cluster-size"] = extent.grain
            if extent.compressed:
                entry["compressed"] = True
            extents.append(entry)
        stored = self.descriptor
        return {"cid": stored.cid, "parent-cid": stored.parent_cid, "create-type": stored.create_type, "extents": extents}

    # -- the class -----------------------------------------------------------------------------------------------

    @classmethod
    def child_flags(cls, role: str, flags: OpenFlags) -> OpenFlags:
        own = super().child_flags(role, flags)
        return own if role == "backing" else own.but(unmap=True)

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        if head[:4] == COWD_MAGIC or head[:4] == MAGIC:
            return 100
        return 100 if _is_descriptor(head) else 0

    @classmethod
    def can_compress(cls, options: Mapping[str, Any]) -> bool:
        return bool(options.get("subformat") == "streamOptimized")

    @classmethod
    def stream(cls, outlet: Node, options: Any) -> Node:
        if options.subformat != "streamOptimized" or options.backing_file is not None:
            return super().stream(outlet, options)
        check_options(options)
        Stream = part(__package__, "stream").Stream

        found: Node = Stream(outlet, options)
        return found

    @classmethod
    def check_creation(cls, options: Any) -> None:
        check_options(options)

    @classmethod
    def creation_files(cls, options: Any, filename: str) -> dict[str, str]:
        extent_files = part(__package__, "create").extent_files

        found: dict[str, str] = extent_files(options, filename)
        return found

    @classmethod
    def creation_needs_backing(cls, options: Any) -> bool:
        return options.backing_file is not None

    @classmethod
    def create_over(cls, children: Mapping[str, Node], options: Any) -> None:
        create = part(__package__, "create").create

        create(children, options)

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        cls.create_over({"file": file}, options)


def _is_descriptor(head: bytes) -> bool:
    """Whether a file begins like a descriptor: comments and empty lines, then its version."""
    head = head.removeprefix(b"\xef\xbb\xbf")
    marked = head.startswith(text.MARK)
    for line in head.split(b"\n")[:-1]:
        line = line[:-1] if line.endswith(b"\r") else line
        word = line.strip()
        if word.startswith(b"#") or not word and (marked or line):
            continue
        key, equals, value = word.partition(b"=")
        if not equals or value.strip() not in (b"1", b"2", b"3"):
            return False
        return line[:-1] == b"version=" or marked and key.strip() == b"version"
    return False


__all__ = ["FLAT", "Vmdk"]
