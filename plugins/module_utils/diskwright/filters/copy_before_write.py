# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""copy-before-write: what a write is going to replace is copied to another node first (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html).

See BlockdevOptionsCbw there.
"""

from __future__ import annotations

import errno

from ..errors import Error, OptionError
from ..filter import Filter
from ..moment import Moment
from ..node import CONSISTENT_READ, RESIZE, WRITE, Alloc, Node
from ..options import Options, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    from typing_extensions import Self

    from ..bitmaps import Bitmap
    from ..node import OpenFlags
    from ..options import NodeRef

MAX_TIMEOUT = (1 << 32) - 1  # seconds


class CopyBeforeWriteOptions(Options):
    """Runtime options of copy-before-write."""

    target: Optional[NodeRef] = opt(None, help="the node that takes what is going to be replaced")
    bitmap_node: Optional[str] = opt(None, key="bitmap.node", help="name of the node that has the bitmap")
    bitmap_name: Optional[str] = opt(None, key="bitmap.name", help="only what is dirty in this bitmap is copied")
    on_cbw_error: str = opt("break-guest-write", choices=("break-guest-write", "break-snapshot"), help="what a copy that fails ends: the write, or the moment")
    cbw_timeout: int = opt(0, help="seconds after which a copy has failed; 0: never")
    min_cluster_size: Size = opt(0, help="so many bytes are copied at a time at least: a power of two")
    file: Optional[NodeRef] = opt(None, help="the node that is written")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], unknown: str = "") -> Self:
        """QEMU reads these options in another way than those of most drivers, and has other words for what is wrong."""
        return super().from_mapping(values, "Parameter '%s' is unexpected")


class CopyBeforeWrite(Filter):
    """A node whose content at the time when it was opened is kept."""

    driver = "copy-before-write"
    options_class = CopyBeforeWriteOptions

    def __init__(self, options: CopyBeforeWriteOptions, flags: OpenFlags) -> None:
        for key, child in (("target", options.target), ("file", options.file)):
            if child is None:
                raise OptionError("Parameter '%s' is missing" % key)
        super().__init__(options, flags)
        if not flags.writable:
            raise Error("Block node is read-only", errno=errno.EACCES)
        if not 0 <= options.cbw_timeout <= MAX_TIMEOUT:
            raise OptionError("Parameter 'cbw-timeout' expects uint32_t")
        self.moment = Moment(
            self.file,
            self.children["target"],
            min_unit=options.min_cluster_size,
            bitmap=self._bitmap(options.bitmap_node, options.bitmap_name),
            timeout=options.cbw_timeout,
            breaks=options.on_cbw_error == "break-snapshot",
        )

    def attach(self, role: str, child: Node) -> None:
        super().attach(role, child)
        self.moment.source, self.moment.target = self.file, self.children["target"]

    @classmethod
    def child_flags(cls, role: str, flags: OpenFlags) -> OpenFlags:
        """While it is in use, nobody else may write the node: what is not written through the filter would not be kept."""
        perm, shared = flags.permissions()
        return flags.but(perm=perm | CONSISTENT_READ, shared=shared & ~(WRITE | RESIZE)) if role == "file" and perm else flags

    def _bitmap(self, node_name: Optional[str], name: Optional[str]) -> Optional[Bitmap]:
        if node_name is None and name is None:
            return None
        for key, value in (("node", node_name), ("name", name)):
            if value is None:
                raise OptionError("Parameter 'bitmap.%s' is missing" % key)
        from ..bitmaps import all_bitmaps, missing

        graph = self.file.graph
        node: Optional[Node] = None if graph is None else graph.named.get(str(node_name))
        if node is None:
            raise OptionError("Node '%s' not found" % node_name)
        for bitmap in all_bitmaps(node):
            if bitmap.name == name:
                bitmap.check_usable()
                return bitmap
        raise missing(str(name))

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self.moment.before_write(host_offset, len(view))
        self.file.write_hosted(host_offset, view)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self.moment.before_write(offset, length)
        return super()._zero(offset, length, unmap)

    def _discard(self, offset: int, length: int) -> None:
        self.moment.before_write(offset, length)
        super()._discard(offset, length)

    def _truncate(self, size: int, preallocation: str) -> None:
        self.moment.before_write(size, max(0, self.size - size))
        super()._truncate(size, preallocation)

    def _apply_snapshot(self, name: str) -> None:
        self.moment.before_write(0, self.size)
        super()._apply_snapshot(name)

    def _close(self) -> None:
        self.moment.wait()
