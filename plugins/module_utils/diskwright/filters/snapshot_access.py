# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""snapshot-access: reads what a copy-before-write node keeps (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, BlockdevDriver).

Over any other node it opens, and can do nothing, as in QEMU.
"""

from __future__ import annotations

import errno
import os

from ..errors import Unsupported
from ..extent import ALLOCATED, DATA, ZERO, Extent
from ..moment import Moment
from ..node import Alloc, Node
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Optional

    from ..node import OpenFlags
    from ..options import NodeRef


class SnapshotAccessOptions(Options):
    """Runtime options of snapshot-access."""

    file: NodeRef = opt(help="the copy-before-write node")


class SnapshotAccess(Node):
    """The disk as it was when the node below was opened."""

    driver = "snapshot-access"
    dirty = None
    options_class = SnapshotAccessOptions
    keeps_children = True

    def __init__(self, options: SnapshotAccessOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        below = self.children["file"]
        moment = getattr(below, "moment", None)
        self._moment: Optional[Moment] = moment if isinstance(moment, Moment) else None
        self._size = below.size if self._moment is None else self._moment.size

    @property
    def moment(self) -> Moment:
        """What is read. Raises Unsupported where the node below keeps nothing."""
        if self._moment is None:
            raise self._unsupported()
        return self._moment

    def _unsupported(self) -> Unsupported:
        return Unsupported(os.strerror(errno.ENOTSUP), filename=self.filename, errno=errno.ENOTSUP)

    def options_name(self) -> str:
        name = self.children["file"].filename
        return "" if name.startswith("json:") else name

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        found: list[Extent] = []

        def look(node: Node, start: int, count: int) -> None:
            for at, size, status, _host, _host_offset in node.resolve(start, count, want_zero=True):
                # data may be elsewhere by the time it is read, so it is always this node that reads it
                found.append(Extent(at, size, ZERO | ALLOCATED) if status & ZERO else Extent(at, size, DATA | ALLOCATED, self, at))

        self.moment.visit(offset, length, look)
        return found

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        def read(node: Node, start: int, count: int) -> None:
            node.pread_into(start, view[start - host_offset : start - host_offset + count])

        inside = max(0, min(len(view), self.size - host_offset))
        self.moment.visit(host_offset, inside, read)
        view[inside:] = bytes(len(view) - inside)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        raise self._unsupported()

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        raise self._unsupported()

    def _discard(self, offset: int, length: int) -> None:
        if self._moment is not None:
            self._moment.discard(offset, length)
