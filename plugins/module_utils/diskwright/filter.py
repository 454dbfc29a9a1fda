# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Filter, a node that shows what its child `file` has; and Witness, one that sees every read and write of it.

Filters in QEMU's sense: https://www.qemu.org/docs/master/interop/qemu-storage-daemon-qmp-ref.html (BlockdevDriver).
"""

from __future__ import annotations

from .extent import DATA, PASS, ZERO, Extent
from .node import Alloc, Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Iterator, Optional

    from .hooks import Snapshot
    from .node import OpenFlags
    from .options import Options


class Filter(Node):
    """Extents pass through, and so does all else; a subclass overrides what it changes."""

    def __init__(self, options: Options, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self.growable = self.file.growable
        self.zero_initialized = self.file.zero_initialized
        self.cluster_size = self.file.cluster_size
        self.dirty = self.file.dirty

    @property
    def file(self) -> Node:
        return self.children["file"]

    @property
    def size(self) -> int:
        return self.file.size

    def unfiltered(self) -> Node:
        return self.file.unfiltered()

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, PASS, self.file, offset),)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self.file, offset)]

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self.file.pwrite_zeroes(offset, length, unmap)
        return offset, length

    def _discard(self, offset: int, length: int) -> None:
        self.file.pdiscard(offset, length)

    def _truncate(self, size: int, preallocation: str) -> None:
        self.file.truncate(size, preallocation)

    def snapshots(self) -> list[Snapshot]:
        return self.file.snapshots()

    def _create_snapshot(self, name: str, like: Optional[Snapshot]) -> Snapshot:
        return self.file.create_snapshot(name, like)

    def _apply_snapshot(self, name: str) -> None:
        self.file.apply_snapshot(name)

    def _delete_snapshot(self, name: str, id: Optional[str]) -> None:
        self.file.delete_snapshot(name, id)

    def _load_snapshot(self, id: Optional[str], name: Optional[str]) -> None:
        self.file.load_snapshot(id, name)


class Witness(Filter):
    """Every read and write of the child goes through `_pread_into` and `_pwrite`; what is where, the child says."""

    def _status(self, offset: int, length: int, want_zero: bool) -> Iterator[Extent]:
        below = self.file.backing
        for extent in self.file._status_or_leaf(offset, length, want_zero):
            # What the child would ask its backing node for is not ours to pass on: we have none.
            yield extent if extent[2] or below is not None else Extent(extent[0], extent[1], ZERO)

    def resolve(self, offset: int, length: int, want_zero: bool = False, limit: int = 0, own: bool = False) -> list[Extent]:
        if self.file.leaf and not want_zero:
            return [Extent(offset, length, DATA, self, offset)]
        found = []
        for extent in self.file.resolve(offset, length, want_zero, limit, own):
            start, count, status, _host, _host_offset = extent
            found.append(Extent(start, count, DATA, self, start) if status & DATA else extent)
        return found

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        inside = max(0, min(len(view), self.file.size - host_offset))
        if inside:
            self.file.pread_into(host_offset, view[:inside])
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self.file.write_hosted(host_offset, view)
