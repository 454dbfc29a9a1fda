# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Open an image from Python: as a node, or as a binary file that any library can read.

The file-like view follows Python's `io.RawIOBase` (https://docs.python.org/3/library/io.html).
"""

from __future__ import annotations

import io
import os

from .errors import OptionError
from .graph import Graph, OpenPolicy
from .node import OpenFlags, cache_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, Union

    from _typeshed import ReadableBuffer, WriteableBuffer

    from .node import Node


def open_node(
    filename: Union[str, os.PathLike[str]],
    mode: str = "r",
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    backing: bool = True,
    cache: str = "writeback",
    force_share: bool = False,
    policy: Union[OpenPolicy, str] = "any",
    objects: Optional[Mapping[str, Any]] = None,
    snapshot: bool = False,
    directory: Optional[str] = None,
) -> Node:
    """Open an image and its backing chain; exported as `diskwright.open`. Use the result in a `with` statement.

    `mode` is "r" or "r+" (read and write). `format` names the driver, None tells it from the content. `cache` is one of
    qemu-img's cache modes. `force_share` reads an image that another process writes. `backing=False` leaves the backing
    file closed: what the image does not hold itself reads as zeroes. `policy` says which files the image may make us open:
    "any", "none", "same_directory", or an OpenPolicy. With `snapshot` and mode "r+" what is written goes to a temporary file in `directory`
    (None: /var/tmp), and is gone when the node is closed, unless `diskwright.commit_snapshot` puts it back.

    Raises OptionError for a bad argument, Error and its leaves where the image cannot be opened.
    """
    if mode not in ("r", "r+"):
        raise OptionError("mode must be 'r' or 'r+', not %r" % mode)
    settings = cache_flags(cache)
    if settings is None:
        raise OptionError("Invalid cache option: %s" % cache)
    if isinstance(policy, str):
        policy = OpenPolicy(policy)
    writable = mode == "r+"
    flags = OpenFlags(writable=writable, resize=writable, force_share=force_share, no_backing=not backing, **settings)
    graph = Graph(policy, objects)
    if not snapshot or not writable:
        return graph.open(os.fspath(filename), format, flags, image_opts)
    from .temporary import PLACE, overlay

    node = graph.open(os.fspath(filename), format, flags.but(writable=False, resize=False), image_opts)
    try:
        return overlay(node, directory=directory or PLACE)
    except BaseException:
        node.abandon()
        raise


class ImageFile(io.RawIOBase):
    """The guest-visible content of a node as a seekable binary file; its length is the virtual size.

    Writing needs a node that is opened for it; writes end at the virtual size. With `owns` closing the file closes the node.
    """

    def __init__(self, node: Node, owns: bool = False) -> None:
        super().__init__()
        self.node = node
        self.name = node.filename
        self.mode = "rb" if node.read_only else "rb+"
        self._owns = owns
        self._position = 0

    def readable(self) -> bool:
        self._check_open()
        return True

    def writable(self) -> bool:
        self._check_open()
        return not self.node.read_only

    def seekable(self) -> bool:
        self._check_open()
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; whence may also be os.SEEK_DATA or os.SEEK_HOLE, as for a sparse file (OSError ENXIO past the last data)."""
        self._check_open()
        if whence in (getattr(os, "SEEK_DATA", 3), getattr(os, "SEEK_HOLE", 4)):
            position = self._seek_status(offset, whence == getattr(os, "SEEK_HOLE", 4))
        elif whence in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            position = offset + (0, self._position, self.node.size)[whence]
        else:
            raise ValueError("invalid whence (%r)" % whence)
        if position < 0:
            raise ValueError("negative seek position %d" % position)
        self._position = position
        return position

    def _seek_status(self, offset: int, hole: bool) -> int:
        import errno

        size = self.node.size
        window = 1 << 30
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        while offset < size:
            length = min(window, size - offset)
            for extent in self.node.resolve(offset, length, want_zero=True):
                if (extent.host is None) == hole:
                    return extent.offset
            offset += length
        if hole:
            return size
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._check_open()
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.node.size - self._position))
        if count:
            self.node.pread_into(self._position, view[:count])
            self._position += count
        return count

    def write(self, data: ReadableBuffer) -> int:
        self._check_open()
        if self.node.read_only:
            raise io.UnsupportedOperation("not writable")
        view = memoryview(data).cast("B")
        count = max(0, min(len(view), self.node.size - self._position))
        if count < len(view) and not count:
            import errno

            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.node.pwrite(self._position, view[:count])
        self._position += count
        return count

    def truncate(self, size: Optional[int] = None) -> int:
        """Resize the image; the position stays."""
        self._check_open()
        size = self._position if size is None else size
        self.node.truncate(size)
        return self.node.size

    def flush(self) -> None:
        if not self.closed:
            self.node.flush()

    def close(self) -> None:
        if not self.closed:
            try:
                super().close()
            finally:
                if self._owns:
                    self.node.close()

    def _check_open(self) -> None:
        if self.closed:  # pylint: disable=using-constant-test
            raise ValueError("I/O operation on closed file")


def open_file(filename: Union[str, os.PathLike[str]], mode: str = "r", **options: Any) -> ImageFile:
    """Open an image as a binary file; the arguments are those of `diskwright.open`."""
    return ImageFile(open_node(filename, mode, **options), owns=True)
