# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""preallocate: a growing file grows by much at a time, and is cut to what was written when it is closed.

See https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html (BlockdevOptionsPreallocate). It belongs between an image and its file.
"""

from __future__ import annotations

from ..errors import Error, OptionError
from ..filter import Witness
from ..options import Options, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..node import OpenFlags
    from ..options import NodeRef

SECTOR = 512
MAX_SIZE = 1 << 62  # bytes of either option


class PreallocateOptions(Options):
    """Runtime options of preallocate."""

    prealloc_align: Size = opt(1 << 20, help="the file's length becomes a multiple of so many bytes")
    prealloc_size: Size = opt(128 << 20, help="so many bytes are allocated behind a write that lets the file grow")
    file: NodeRef = opt(help="the node that grows")


class Preallocate(Witness):
    """A node that is as long as what was written to it, over a longer one."""

    driver = "preallocate"
    options_class = PreallocateOptions

    def __init__(self, options: PreallocateOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self._align, self._room = options.prealloc_align, options.prealloc_size
        if self._align % SECTOR or self._align > MAX_SIZE:
            raise OptionError("prealloc-align parameter of preallocate filter is not aligned to %d" % SECTOR)
        if self._room > MAX_SIZE:
            raise OptionError("prealloc-size is too large")
        self._end = self.file.size  # of what was written; the file may be longer
        self._grown = False

    @property
    def size(self) -> int:
        return self._end

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        end = host_offset + len(view)
        if end > self.file.size:
            self._grow(end)
        super()._pwrite(host_offset, view)
        with self._lock:
            self._end = max(self._end, end)

    def _grow(self, end: int) -> None:
        """Make room for a write up to `end` and for what comes behind it; whoever cannot, goes without."""
        with self._lock:
            if end <= self.file.size:
                return
            align = self._align or 1
            length = -(-(end + self._room) // align) * align
            try:
                self.file.truncate(length, "falloc")
                self._grown = True
            except (Error, OSError):
                self._room = 0  # the write itself will tell what is wrong

    def _truncate(self, size: int, preallocation: str) -> None:
        if self._grown and preallocation == "off" and size <= self.file.size and size > self._end:
            self.file.pwrite_zeroes(self._end, size - self._end)
        else:
            self.file.truncate(size, preallocation)
        self._end = size

    def _close(self) -> None:
        if self._grown and not self.read_only and self.file.size > self._end:
            self.file.truncate(self._end)
