# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Dmg, the node of an image (https://keramics.github.io/udif.html)."""

from __future__ import annotations

from _thread import allocate_lock

from ...errors import Corrupt, Error, ReadOnly
from ...extent import ALLOCATED, COMPRESSED, DATA, OFFSET_VALID, ZERO, Extent
from ...node import Format, OpenFlags, fill_zeroes
from ...options import Options, opt
from .codecs import Window, decompress, preload
from .layout import IGNORED, KOLY, RAW, SECTOR, Chunks, Koly, parts
from .layout import ZERO as ZERO_CHUNK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from typing import Iterator, Optional, Union

    from ...options import NodeRef

KEPT = 8 << 20  # bytes of chunks that are kept, to be read on from
PIECE = 1 << 20  # bytes of a chunk that are read at a time
EIO = 5
FOOTER_VERSION = 4


class DmgOptions(Options):
    """Runtime options of dmg."""

    file: NodeRef = opt(help="the node that holds the image")


class Dmg(Format):
    """A UDIF image."""

    driver = "dmg"
    options_class = DmgOptions
    dirty = None
    opaque = True
    unwritable = True
    decodes = True

    def __init__(self, options: DmgOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if flags.writable:
            raise ReadOnly("Image is read-only")
        self.chunks = Chunks(self.file)
        self._size = self.chunks.sectors * SECTOR
        for kind in sorted(self.chunks.unknown):
            self.warnings.append("Image contains chunks of unknown type %x, accessing them will result in I/O errors" % kind)
        self._kept: dict[int, bytearray] = {}  # index -> content, the oldest first
        self._held = 0  # bytes of them
        self._gates: dict[int, LockType] = {}
        self._large: tuple[int, Optional[Window]] = -1, None
        self._large_gate = allocate_lock()

    # -- where chunks are ----------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterator[Extent]:
        chunks = self.chunks
        end = offset + length
        index = max(chunks.at(offset // SECTOR), 0)
        while offset < end:
            if index == len(chunks.starts):
                yield Extent(offset, end - offset, DATA | ALLOCATED, self, offset)  # nothing there: _pread_into says so
                return
            start, stop = chunks.starts[index] * SECTOR, chunks.ends[index] * SECTOR
            if start > offset:
                yield Extent(offset, start - offset, DATA | ALLOCATED, self, offset)
            if stop > offset:
                yield from self._chunk_extents(index, start, stop)
                offset = stop
            index += 1

    def _chunk_extents(self, index: int, start: int, stop: int) -> Iterator[Extent]:
        chunks = self.chunks
        kind = chunks.kinds[index]
        if kind in (ZERO_CHUNK, IGNORED):
            yield Extent(start, stop - start, ZERO | ALLOCATED)
        elif kind != RAW:
            yield Extent(start, stop - start, DATA | ALLOCATED | COMPRESSED, self, start)
        elif chunks.offsets[index] + chunks.lengths[index] > self.file.size:
            yield Extent(start, stop - start, DATA | ALLOCATED, self, start)
        else:
            stored = min(chunks.lengths[index], stop - start)
            if stored:
                yield Extent(start, stored, DATA | OFFSET_VALID | ALLOCATED, self.file, chunks.offsets[index])
            if start + stored < stop:
                yield Extent(start + stored, stop - start - stored, ZERO | ALLOCATED)

    # -- reading -------------------------------------------------------------------------------------------------

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        chunks = self.chunks
        position, end = host_offset, host_offset + len(view)
        while position < end:
            index = chunks.at(position // SECTOR)
            if index < 0 or chunks.ends[index] * SECTOR <= position:
                raise self._damaged("no chunk holds byte %d" % position)
            start, stop = chunks.starts[index] * SECTOR, chunks.ends[index] * SECTOR
            count = min(stop, end) - position
            part = view[position - host_offset : position - host_offset + count]
            if chunks.kinds[index] in (ZERO_CHUNK, IGNORED):
                fill_zeroes(part)
            else:
                self._read_chunk(index, position - start, part)
            position += count

    def _read_chunk(self, index: int, at: int, view: memoryview) -> None:
        """Fill `view` from byte `at` of a chunk on; what is wrong with the chunk is raised with its place."""
        size = (self.chunks.ends[index] - self.chunks.starts[index]) * SECTOR
        try:
            if len(view) == size:
                Window(self._pieces(index, size), size).read(0, view)
            elif size > KEPT:
                self._read_large(index, size, at, view)
            else:
                view[:] = memoryview(self._content(index, size))[at : at + len(view)]
        except Error as exc:
            raise self._damaged("chunk at sector %d cannot be read: %s" % (self.chunks.starts[index], exc), type(exc)) from None

    def _content(self, index: int, size: int) -> bytearray:
        """The content of a chunk, which the next one to ask for it finds here."""
        with self._lock:
            gate = self._gates.setdefault(index, allocate_lock())
        with gate:  # whoever wants the same chunk waits for it
            content = self._kept.get(index)
            if content is None:
                content = bytearray(size)
                Window(self._pieces(index, size), size).read(0, memoryview(content))
                with self._lock:
                    while self._kept and self._held + size > KEPT:
                        old = next(iter(self._kept))
                        self._held -= len(self._kept.pop(old))
                        self._gates.pop(old, None)
                    self._kept[index] = content
                    self._held += size
        return content

    def _read_large(self, index: int, size: int, at: int, view: memoryview) -> None:
        """Part of a chunk that is too large to be kept: of one of them it is remembered how far it was read."""
        with self._large_gate:
            found, window = self._large
            if window is None or found != index or at < window.start:
                window = Window(self._pieces(index, size), size)
                self._large = index, window
            try:
                window.read(at, view)
            except Error:
                self._large = -1, None
                raise

    def _pieces(self, index: int, size: int) -> Iterator[Union[bytes, bytearray]]:
        """The content of a compressed chunk, decompressed piece by piece."""
        chunks = self.chunks
        if chunks.kinds[index] == RAW:
            raise Corrupt("it is behind the end of the file", errno=EIO)
        start = chunks.offsets[index]
        end = min(start + chunks.lengths[index], self.file.size)
        return decompress(chunks.kinds[index], (self.file.pread(at, min(PIECE, end - at)) for at in range(start, end, PIECE)), size)

    def _damaged(self, why: str, kind: type[Error] = Corrupt) -> Error:
        return kind("%s: %s" % (self.filename, why), filename=self.filename, errno=EIO)

    def preload(self) -> None:
        preload(set(self.chunks.kinds))
        super().preload()

    @classmethod
    def probe_tail(cls, tail: bytes, size: int) -> int:
        """Sure only of a trailer of which all that leads anywhere makes sense: any raw disk could end like that."""
        koly = Koly.unpack(tail.ljust(SECTOR, b"\0"))
        if koly.signature != KOLY or koly.version != FOOTER_VERSION or koly.header_size != SECTOR or not koly.sector_count:
            return 0
        inside = all(offset + length <= size - SECTOR for _name, offset, length in parts(koly))
        return 2 if inside and (koly.rsrc_fork_length or koly.xml_length) else 0
