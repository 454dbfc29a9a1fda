# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""copy-on-read: what a read finds in the backing chain is written into the image (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html)."""

from __future__ import annotations

import errno

from ..errors import Error
from ..extent import DATA, Extent
from ..filter import Witness
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator

    from ..node import OpenFlags
    from ..options import NodeRef


class CopyOnReadOptions(Options):
    """Runtime options of copy-on-read."""

    file: NodeRef = opt(help="the image that is to hold what was read")


class CopyOnRead(Witness):
    """A node that is read but once from its backing chain."""

    driver = "copy-on-read"
    options_class = CopyOnReadOptions

    def __init__(self, options: CopyOnReadOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if not flags.writable:
            raise Error("Block node is read-only", errno=errno.EACCES)

    def _missing(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what the image itself does not hold of a range."""
        top = self.file.unfiltered()
        if top.backing is not None:
            for start, count, status, _host, _host_offset in top.block_status(offset, length, False):
                if not status:
                    yield start, count

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

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        super()._pread_into(host_offset, view)
        inside = max(0, min(len(view), self.size - host_offset))
        entry = self.serialise(host_offset, max(inside, 1), max(self.file.allocation_unit, 1))
        try:
            for start, count in list(self._missing(host_offset, inside)) if inside else ():
                part = view[start - host_offset : start - host_offset + count]
                if any(part):
                    self.file.pwrite(start, part)
                else:
                    self.file.pwrite_zeroes(start, count)
        finally:
            self.release(entry)
