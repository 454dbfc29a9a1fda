# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""raw: the bytes of the file are the bytes of the disk, or a window of them (`offset`, `size`).

QEMU's block driver reference describes the options.
"""

from __future__ import annotations

import errno

from ..errors import Error, OptionError, WrongFormat
from ..extent import PASS, Extent
from ..node import RESIZE, Alloc, Format, Measure, OpenFlags
from ..options import Options, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Optional

    from ..hooks import Snapshot
    from ..node import Node
    from ..options import NodeRef

SECTOR = 512


class RawOptions(Options):
    """Runtime options of raw."""

    file: NodeRef = opt(help="the node that holds the bytes")
    offset: Optional[Size] = opt(None, help="where the disk begins in the file, in bytes")
    # named apart from Node.size; users write "size"
    window: Optional[Size] = opt(None, key="size", help="the length of the disk in bytes, a multiple of 512")


class RawCreateOptions(Options):
    """Creation options of raw; the protocol has more of its own."""

    DASHES = False

    size: Size = opt(0, help="Virtual disk size")


class Raw(Format):
    """A raw image."""

    driver = "raw"
    options_class = RawOptions
    create_options = RawCreateOptions
    creatable = True
    plain = True
    strong_options = ("offset", "size")
    zero_initialized = True
    keeps_children = False

    def __init__(self, options: RawOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self.start = options.offset or 0
        self.window = options.window
        length = self.file.size
        if self.start > length:
            raise OptionError("Offset (%d) cannot be greater than size of the containing file (%d)" % (self.start, length))
        if self.window is not None:
            if self.window % SECTOR:
                raise OptionError("Specified size is not multiple of %d" % SECTOR)
            if self.window > length - self.start:
                raise OptionError(
                    "The sum of offset (%d) and size (%d) has to be smaller or equal to the  actual size of the containing file (%d)"
                    % (self.start, self.window, length)
                )
        if self.start or self.window is not None:
            perm, shared = self.child_flags("file", flags).permissions()
            self.change_child("file", self.file.flags.but(perm=perm, shared=shared & ~RESIZE))  # what is around the window is to stay
        self.growable = self.window is None and self.file.growable
        self.zero_initialized = self.file.zero_initialized
        self.cluster_size = self.file.cluster_size
        self.dirty = self.file.dirty
        self.opaque = self.file.opaque
        self.unwritable = self.file.unwritable

    @property
    def size(self) -> int:
        if self.window is not None:
            return self.window
        return -(-(self.file.size - self.start) // SECTOR) * SECTOR

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, PASS, self.file, self.start + offset),)

    def snapshots(self) -> list[Snapshot]:
        """Those of the storage, where it has such a thing."""
        return self.file.snapshots()

    def _create_snapshot(self, name: str, like: Optional[Snapshot]) -> Snapshot:
        return self.file.create_snapshot(name, like)

    def _apply_snapshot(self, name: str) -> None:
        self.file.apply_snapshot(name)

    def _delete_snapshot(self, name: str, id: Optional[str]) -> None:
        self.file.delete_snapshot(name, id)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        if self.probed is not None and offset < SECTOR:
            head = min(length, SECTOR - offset)
            rest = [Alloc(SECTOR, length - head, self.file, self.start + SECTOR)] if length > head else []
            return [Alloc(offset, head, self, offset), *rest]
        return [Alloc(offset, length, self.file, self.start + offset)]

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        """The first sector of an image that nobody said is raw: were a guest to make it look like another format, the next to
        open it would read what the guest's metadata names."""
        head = bytearray(self.file.pread(0, min(SECTOR, self.file.size)).ljust(SECTOR, b"\0"))
        head[host_offset : host_offset + len(view)] = view
        if self._has_become(bytes(head)):
            raise Error("%s: Operation not permitted" % self.filename, filename=self.filename, errno=errno.EPERM)
        self.file.write_hosted(host_offset, view)

    def _has_become(self, head: bytes) -> bool:
        """Whether an image that begins with `head` would be taken for one of another format."""
        try:
            return self.probed is not None and self.probed(head, "") != self.driver
        except WrongFormat:
            return True

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self.file.pwrite_zeroes(self.start + offset, length, unmap)
        return offset, length

    def _discard(self, offset: int, length: int) -> None:
        self.file.pdiscard(self.start + offset, length)

    def _truncate(self, size: int, preallocation: str) -> None:
        if self.window is not None:
            raise Error("Cannot resize fixed-size raw disks", filename=self.filename)
        self.file.truncate(self.start + size, preallocation)

    @classmethod
    def child_flags(cls, role: str, flags: OpenFlags) -> OpenFlags:
        return flags.but(writethrough=False)

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 1

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        """The protocol has made the file and gave it its size; a raw image needs no more."""

    @classmethod
    def measure(cls, options: Any, source: Optional[Node]) -> Measure:
        size = source.size if source is not None else -(-options.size // SECTOR) * SECTOR
        return Measure(size, size)
