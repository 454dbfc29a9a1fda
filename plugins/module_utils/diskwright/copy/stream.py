# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Images that come from a pipe or go into one: raw, from the beginning to the end (https://man7.org/linux/man-pages/man7/pipe.7.html)."""

from __future__ import annotations

import os

from ..errors import Error, Unsupported
from ..extent import ALLOCATED, DATA, Extent
from ..node import Alloc, OpenFlags, Protocol
from ..options import Options
from .pieces import clear, failure
from .transfer import SECTOR, SPARSE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterable, Iterator, Optional, Union

    from ..node import Node

BUFFER = 8 << 20  # bytes that are taken from a pipe before the target grows; a multiple of every usual allocation unit


class Outlet(Protocol):
    """A descriptor that takes bytes in order; a target for `copy` with one thread and sparse_size 0."""

    driver = "pipe"
    options_class = Options
    growable = True

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(Options(), OpenFlags(writable=True))
        self.filename = name
        self._descriptor = descriptor
        self._position = 0

    @property
    def size(self) -> int:
        return self._position

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, DATA | ALLOCATED, self, offset),)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        raise Unsupported("%s: a pipe cannot be read back" % self.filename, filename=self.filename)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        if host_offset != self._position:
            raise Unsupported("%s: a pipe is written in order" % self.filename, filename=self.filename)
        done = 0
        while done < len(view):
            done += os.write(self._descriptor, view[done:])
        self._position += done

    def _truncate(self, size: int, preallocation: str) -> None:
        """The size shows at the end."""


def receive(
    source: Union[int, Iterator[bytes]],
    target: Node,
    *,
    sparse_size: int = SPARSE_SIZE,
    compress: bool = False,
    progress: Optional[Callable[[int, int], None]] = None,
) -> int:
    """Write all that comes out of `source` (a descriptor, or pieces) to the new image `target`, which grows with it; the bytes that came.

    The size is rounded up to 512. `progress` is called with (bytes done, bytes done): nobody knows what is still to come.
    Raises Error as `copy` does.
    """
    if compress and not target.supports_compression:
        raise Unsupported("Compression not supported for this file format")
    from ..kernels import nonzero_runs

    unit = max(target.allocation_unit, target.cluster_size if compress else 1)
    grain = -(-max(sparse_size, 1) // unit) * unit
    buffer = memoryview(bytearray(max(BUFFER // unit, 1) * unit))
    rest = bytearray()  # what did not fit into the last buffer
    offset = 0
    while True:
        count = _fill(source, buffer, offset) if isinstance(source, int) else _fill_from(source, rest, buffer, offset)
        if not count:
            return offset
        length = -(-count // SECTOR) * SECTOR
        clear(buffer, count, length)
        try:
            target.truncate(offset + length)
            for start, size in nonzero_runs(buffer, 0, length, grain) if sparse_size else [(0, length)]:
                if not compress:
                    target.pwrite(offset + start, buffer[start : start + size])
                    continue
                for at in range(start, start + size, unit):
                    target.write_compressed(offset + at, buffer[at : min(at + unit, start + size)])
        except (Error, OSError) as exc:
            raise failure("error while writing at byte", offset, exc) from exc
        offset += count
        if progress is not None:
            progress(offset, offset)


def _fill(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill the buffer from a descriptor; fewer bytes than it holds only at the end."""
    count = 0
    while count < len(buffer):
        try:
            done = os.readv(descriptor, [buffer[count:]])
        except OSError as exc:
            raise failure("error while reading at byte", offset + count, exc) from exc
        if not done:
            break
        count += done
    return count


def _fill_from(pieces: Iterator[bytes], rest: bytearray, buffer: memoryview, offset: int) -> int:
    """The same from pieces; what is left of the last one is kept in `rest`."""
    while len(rest) < len(buffer):
        try:
            piece = next(pieces, b"")
        except (Error, OSError) as exc:
            raise failure("error while reading at byte", offset + len(rest), exc) from exc
        if not piece:
            break
        rest += piece
    count = min(len(rest), len(buffer))
    buffer[:count] = rest[:count]
    del rest[:count]
    return count
