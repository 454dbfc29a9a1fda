# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""blkverify: an image and a raw copy of it are written alike, and must read alike (https://www.qemu.org/docs/master/devel/testing/blkverify.html)."""

from __future__ import annotations

import errno

from ..errors import Error, OptionError
from ..extent import DATA, Extent
from ..node import Alloc, Node
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator

    from ..node import OpenFlags
    from ..options import NodeRef


class BlkverifyOptions(Options):
    """Runtime options of blkverify."""

    test: NodeRef = opt(help="the image that is tested")
    raw: NodeRef = opt(help="the copy that is right")


class Blkverify(Node):
    """Reads come from `test`, if `raw` has the same."""

    driver = "blkverify"
    options_class = BlkverifyOptions

    def __init__(self, options: BlkverifyOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self.test, self.raw = self.children["test"], self.children["raw"]

    def attach(self, role: str, child: Node) -> None:
        super().attach(role, child)
        self.test, self.raw = self.children["test"], self.children["raw"]

    @property
    def size(self) -> int:
        return self.test.size

    def options_name(self) -> str:
        """`blkverify:RAW:TEST` where both are plain file names."""
        names = [node.filename for node in (self.raw, self.test)]
        return "" if any(name.startswith("json:") or ":" in name for name in names) else "blkverify:%s:%s" % tuple(names)

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        raw, colon, test = filename[len("blkverify:") :].partition(":")
        if not colon:
            raise OptionError("blkverify requires raw copy and original image path")
        return {"raw": {"filename": raw}, "test": {"file": {"driver": "file", "filename": test}}}

    def disk_size(self) -> None:
        return None

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, DATA, self, offset),)

    def _status(self, offset: int, length: int, want_zero: bool) -> Iterator[Extent]:
        return self.test._status(offset, length, want_zero)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        self.test.pread_into(host_offset, view)
        expected = self.raw.pread(host_offset, len(view))
        if expected != bytes(view):
            from ..kernels import first_difference

            at = first_difference(view, expected)
            text = "blkverify: read offset=%d bytes=%d contents mismatch at offset %d" % (host_offset, len(view), host_offset + max(at, 0))
            raise Error(text, filename=self.filename, offset=host_offset + max(at, 0), errno=errno.EIO)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self.raw.pwrite(host_offset, view)
        self.test.pwrite(host_offset, view)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self.raw.pwrite_zeroes(offset, length, unmap)
        self.test.pwrite_zeroes(offset, length, unmap)
        return offset, length
