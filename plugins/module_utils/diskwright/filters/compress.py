# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""compress: whatever is written is stored compressed (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, BlockdevDriver).

The child writes whole clusters: a write of less reads the rest of the cluster first.
"""

from __future__ import annotations

import errno

from ..errors import Error
from ..filter import Witness
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ..node import OpenFlags
    from ..options import NodeRef


class CompressOptions(Options):
    """Runtime options of compress."""

    file: NodeRef = opt(help="the image that can hold compressed clusters")


class Compress(Witness):
    """A node whose writes become compressed clusters."""

    driver = "compress"
    options_class = CompressOptions

    def __init__(self, options: CompressOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if not self.file.supports_compression:
            raise Error("Compression is not supported for underlying format: %s" % self.file.driver, errno=errno.ENOTSUP)
        self.supports_compression = True
        self.allocation_unit = self.file.allocation_unit

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        unit, end = self.allocation_unit, host_offset + len(view)
        position = host_offset
        while position < end:
            first = position // unit * unit
            stop = min(first + unit, max(end, self.file.size))
            last = min(end, stop)
            part = view[position - host_offset : last - host_offset]
            if position > first or last < stop:
                whole = memoryview(bytearray(stop - first))
                super()._pread_into(first, whole)
                whole[position - first : last - first] = part
                part = whole
            self.file.write_compressed(first, part)
            position = last

    def _encode(self, view: memoryview) -> Optional[bytes]:
        return self.file.encode(view)

    def _pwrite_compressed(self, offset: int, view: memoryview) -> None:
        self.file.write_compressed(offset, view)

    def _pwrite_encoded(self, offset: int, view: memoryview, encoded: bytes) -> None:
        self.file.write_compressed(offset, view, encoded)
