# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""copy-on-read: what a read finds in the backing chain is written into the image (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html)."""

from __future__ import annotations

import errno

from ..errors import Error, OptionError
from ..extent import DATA, Extent
from ..filter import Witness
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterator, Optional

    from ..node import Node, OpenFlags
    from ..options import NodeRef


class CopyOnReadOptions(Options):
    """Runtime options of copy-on-read."""

    file: NodeRef = opt(help="the image that is to hold what was read")
    bottom: Optional[str] = opt(None, help="name of the lowest node of the backing chain from which something is copied")


class CopyOnRead(Witness):
    """A node that is read but once from its backing chain."""

    driver = "copy-on-read"
    options_class = CopyOnReadOptions

    def __init__(self, options: CopyOnReadOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if not flags.writable:
            raise Error("Block node is read-only", errno=errno.EACCES)
        self._bottom = None if options.bottom is None else self._find_bottom(options.bottom)

    def _find_bottom(self, name: str) -> Optional[Node]:
        """The node of that name, None where it is the image itself, and so no limit. Raises OptionError."""
        graph = self.file.graph
        node: Optional[Node] = None if graph is None else graph.named.get(name)
        if node is None:
            raise OptionError("Bottom node '%s' not found" % name)
        if node.unfiltered() is not node:
            raise OptionError("Bottom node '%s' is a filter" % name)
        top = self.file.unfiltered()
        if node not in list(top.layers()):
            raise OptionError("Bottom node '%s' is not in the backing chain of '%s'" % (name, top.filename))
        return None if node is top else node

    def _missing(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what the image itself does not hold of a range, and is to."""
        top = self.file.unfiltered()
        backing = top.backing
        for start, count, status, _host, _host_offset in top.block_status(offset, length, False) if backing is not None else ():
            if status:
                continue
            if self._bottom is None or backing is None:
                yield start, count
            else:
                yield from self._held(backing, start, count)

    def _held(self, node: Node, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """What the layers from `node` down to the lowest one that counts hold of a range."""
        inside = max(0, min(length, node.size - offset))
        below = node.backing if node.unfiltered() is not self._bottom else None
        for start, count, status, _host, _host_offset in node.block_status(offset, inside, False) if inside else ():
            if status:
                yield start, count
            elif below is not None:
                yield from self._held(below, start, count)

    def resolve(self, offset: int, length: int, want_zero: bool = False, limit: int = 0, own: bool = False) -> list[Extent]:
        found = []
        position, end = offset, offset + length
        for start, count in self._missing(offset, length):
            if position < start:
                found += super().resolve(position, start - position, want_zero, limit, own)
            found.append(Extent(start, count, DATA, self, start))
            position = start + count
        if position < end:
            found += super().resolve(position, end - position, want_zero, limit, own)
        return found

    def _alone(self, offset: int, length: int) -> Any:
        """Keep other requests away from a range: what is copied must not be older than what is there."""
        return self.serialise(offset, max(length, 1), max(self.file.allocation_unit, 1))

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        inside = max(0, min(len(view), self.size - host_offset))
        if not inside or next(self._missing(host_offset, inside), None) is None:
            super()._pread_into(host_offset, view)
            return
        entry = self._alone(host_offset, inside)
        try:
            super()._pread_into(host_offset, view)
            for start, count in list(self._missing(host_offset, inside)):
                part = view[start - host_offset : start - host_offset + count]
                if any(part):
                    self.file.pwrite(start, part)
                else:
                    self.file.pwrite_zeroes(start, count)
        finally:
            self.release(entry)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        entry = self._alone(host_offset, len(view))
        try:
            super()._pwrite(host_offset, view)
        finally:
            self.release(entry)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        entry = self._alone(offset, length)
        try:
            return super()._zero(offset, length, unmap)
        finally:
            self.release(entry)

    def _discard(self, offset: int, length: int) -> None:
        entry = self._alone(offset, length)
        try:
            super()._discard(offset, length)
        finally:
            self.release(entry)
