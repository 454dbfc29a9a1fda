# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A source of which only what a dirty bitmap has marked counts as its own: an incremental backup copies no more than that
(https://www.qemu.org/docs/master/interop/bitmaps.html)."""

from __future__ import annotations

from ..errors import Error
from ..extent import Extent
from ..filter import Filter
from ..options import NodeRef, Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bitmaps import Bitmap
    from ..node import Node


class ChangedOptions(Options):
    file: NodeRef = opt()


class Changed(Filter):
    """`node`, of which `bitmap` says what its own layer holds. Reading gives all of it."""

    driver = "changed"
    options_class = ChangedOptions

    def __init__(self, node: Node, bitmap: Bitmap) -> None:
        """Raises Corrupt for an inconsistent bitmap, Error for one of another size than the node."""
        super().__init__(ChangedOptions(file=node), node.flags)
        bitmap.check_usable()
        if bitmap.size != node.size:
            raise Error("Bitmap '%s' is of a disk of %d bytes, not %d" % (bitmap.name, bitmap.size, node.size), filename=node.filename)
        self.filename = node.filename
        self._bitmap = bitmap

    def resolve(self, offset: int, length: int, want_zero: bool = False, limit: int = 0, own: bool = False) -> list[Extent]:
        if not own:
            return self.file.resolve(offset, length, want_zero, limit)
        found: list[Extent] = []
        position, end = offset, offset + length
        for start, count in self._bitmap.runs(offset):
            first, last = min(max(start, position), end), min(start + count, end)
            if first > position:
                found.append(Extent(position, first - position, 0))
                position = first
            if last > first:
                found += self.file.resolve(first, last - first, want_zero, limit)
                position = found[-1][0] + found[-1][1]
                if position < last:
                    return found  # the limit was reached within
            if position >= end or limit and len(found) >= limit:
                return found
        found.append(Extent(position, end - position, 0))
        return found
