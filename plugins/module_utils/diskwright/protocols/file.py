# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""file: a regular file of the host. (First cut: to be replaced by the full driver.)"""

from __future__ import annotations

import errno
import os

from ..errors import Error
from ..extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from ..node import Alloc, OpenFlags, Protocol, fill_zeroes
from ..options import Options, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable


class FileOptions(Options):
    """Runtime options of file."""

    filename: str = opt(help="path of the file")


class FileCreateOptions(Options):
    """Creation options of file."""

    DASHES = False

    size: Size = opt(0, help="Virtual disk size")
    preallocation: str = opt("off", help="Preallocation mode (allowed values: off, falloc, full)", choices=("off", "falloc", "full"))


class File(Protocol):
    """A regular file."""

    driver = "file"
    options_class = FileOptions
    create_options = FileCreateOptions
    creatable = True
    growable = True
    zero_initialized = True

    def __init__(self, options: FileOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        try:
            self._fd = os.open(options.filename, os.O_RDWR if flags.writable else os.O_RDONLY)
        except OSError as exc:
            raise Error("Could not open '%s': %s" % (options.filename, exc.strerror), filename=options.filename, errno=exc.errno) from exc

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def fileno(self) -> int:
        return self._fd

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        end = offset + length
        while offset < end:
            try:
                data = os.lseek(self._fd, offset, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno != errno.ENXIO:
                    raise
                yield Extent(offset, end - offset, ZERO | OFFSET_VALID | ALLOCATED, self, offset)
                return
            if data > offset:
                yield Extent(offset, data - offset, ZERO | OFFSET_VALID | ALLOCATED, self, offset)
                offset = data
                continue
            hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
            yield Extent(offset, hole - offset, DATA | OFFSET_VALID | ALLOCATED, self, offset)
            offset = hole

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], host_offset + done)
            if not count:
                fill_zeroes(view[done:])
                return
            done += count

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], host_offset + done)

    def _truncate(self, size: int, preallocation: str) -> None:
        os.ftruncate(self._fd, size)

    def _flush(self) -> None:
        if not self.flags.no_flush:
            os.fdatasync(self._fd)

    def _release_host(self) -> None:
        os.close(self._fd)

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        return {"filename": filename[len("file:") :]}

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        fd = os.open(filename, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.ftruncate(fd, options.size)
        finally:
            os.close(fd)
