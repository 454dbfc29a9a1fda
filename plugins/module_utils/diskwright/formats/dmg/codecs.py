# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Decompressing a chunk: zlib, bzip2, LZMA, ADC (https://en.wikipedia.org/wiki/Apple_Data_Compression) and LZFSE (https://github.com/lzfse/lzfse).

A decoder takes the chunk's bytes piece by piece, and yields just as many bytes as the chunk has, piece by piece where it can: never more,
whatever the input claims.
"""

from __future__ import annotations

import zlib

from ...errors import Corrupt, Unsupported
from .layout import ADC, BZIP2, LZFSE, LZMA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterator, Union

    Buffer = Union[bytes, bytearray]
    Pieces = Iterator[Buffer]

PIECE = 1 << 20  # bytes that come out of a codec at a time
MAX_ADC = 4 << 20  # bytes of a chunk that Python itself decompresses; those that hdiutil makes have 256 KiB
MAX_LZFSE = 16 << 20  # bytes of a chunk; those that hdiutil makes have 1 MiB
WINDOW = 8 << 20  # bytes that a Window keeps
MAX_LZMA_MEMORY = 128 << 20  # bytes that a stream may ask for as its window
MAX_LZFSE_BLOCKS = 1 << 16  # of a chunk; an encoder makes one of some 10 KiB and more
LZFSE_PACKAGES = "LZFSE compression needs the Python package pyliblzfse or lzfse"

EIO = 5


def decompress(kind: int, stored: Pieces, size: int) -> Pieces:
    """The `size` bytes of a chunk of the given kind, in pieces. Raises Corrupt without a file name, Unsupported where a library is missing."""
    if kind == ADC:
        yield adc(_whole(stored, size, MAX_ADC), size)
    elif kind == LZFSE:
        yield lzfse(_whole(stored, size, MAX_LZFSE), size)
    else:
        yield from _stream(kind, stored, size)


def _whole(stored: Pieces, size: int, most: int) -> bytes:
    """All of the input, which can hardly be longer than the `size` bytes that come out of it; `most` are allowed."""
    if size > most:
        raise Corrupt("it is larger than %d bytes" % most, errno=EIO)
    whole = b""
    for piece in stored:
        whole += piece
        if len(whole) > 2 * size + PIECE:
            raise Corrupt("it is far longer than what it holds", errno=EIO)
    return whole


def preload(kinds: set[int]) -> None:
    """Import what chunks of these kinds need; a library that is missing is missed when it is wanted."""
    for kind in kinds & {BZIP2, LZMA}:
        _decoder(kind)
    if LZFSE in kinds:
        try:
            _lzfse_library()
        except Unsupported:
            pass


def _decoder(kind: int) -> tuple[Callable[[Buffer], bytes], Callable[[], bool], type[Exception]]:
    """(a function that takes input and gives at most PIECE bytes, whether it is at its end, what it raises)."""
    if kind == BZIP2:
        import bz2

        bzip = bz2.BZ2Decompressor()
        return (lambda data: bzip.decompress(data, PIECE)), (lambda: bzip.eof), OSError
    if kind == LZMA:
        import lzma

        xz = lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=MAX_LZMA_MEMORY)
        return (lambda data: xz.decompress(data, PIECE)), (lambda: xz.eof), lzma.LZMAError
    inflater = zlib.decompressobj()
    return (lambda data: inflater.decompress(inflater.unconsumed_tail + data, PIECE)), (lambda: inflater.eof), zlib.error


def _stream(kind: int, stored: Pieces, size: int) -> Pieces:
    """The codecs of the standard library. All of them keep input that they have not looked at yet."""
    feed, at_end, error = _decoder(kind)
    rest = size
    try:
        piece = next(stored, b"")
        while not at_end():
            done = feed(piece)
            rest -= len(done)
            if rest < 0:
                break
            if done:
                yield done
            piece = b"" if len(done) == PIECE else next(stored, b"")
            if not piece and not done:
                raise Corrupt("it ends too early", errno=EIO)
    except error as exc:
        raise Corrupt(str(exc), errno=EIO) from None
    if rest:
        raise Corrupt("it is not as long as it should be", errno=EIO)


class Window:
    """Reads a chunk in ascending order, with the last few MiB of it in memory; `start` is where that begins."""

    __slots__ = ("start", "end", "_pieces", "_size", "_kept")

    def __init__(self, pieces: Pieces, size: int) -> None:
        self._pieces = pieces
        self._size = size
        self._kept: list[Buffer] = []
        self.start = self.end = 0

    def read(self, at: int, view: memoryview) -> None:
        """Fill `view` from byte `at` of the chunk on, which must not be before `start`."""
        stop = at + len(view)
        place = self.start
        for piece in self._kept:
            _overlay(view, at, piece, place)
            place += len(piece)
        while self.end < stop:
            piece = next(self._pieces, b"")
            if not piece:
                raise Corrupt("it ends too early", errno=EIO)
            _overlay(view, at, piece, self.end)
            self._kept.append(piece)
            self.end += len(piece)
            while self.end - self.start > WINDOW:
                self.start += len(self._kept.pop(0))
            if self.end == self._size:
                next(self._pieces, b"")  # it raises where more would come


def _overlay(view: memoryview, at: int, piece: Buffer, place: int) -> None:
    """Copy the part of `piece`, which begins at `place`, that falls into `view`, which begins at `at`."""
    low, high = max(at, place), min(at + len(view), place + len(piece))
    if low < high:
        view[low - at : high - at] = memoryview(piece)[low - place : high - place]


def exactly(content: Buffer, size: int) -> bytearray:
    """`content`, if it has `size` bytes. Raises Corrupt."""
    if len(content) != size:
        raise Corrupt("it is not as long as it should be", errno=EIO)
    return content if isinstance(content, bytearray) else bytearray(content)


def adc(stored: bytes, size: int) -> bytearray:
    """Apple Data Compression: literals, and copies of what came before with a short or a long distance."""
    content = bytearray()
    at, end = 0, len(stored)
    while at < end and len(content) < size:
        code = stored[at]
        if code & 0x80:
            count = (code & 0x7F) + 1
            content += stored[at + 1 : at + 1 + count]
            at += 1 + count
            continue
        taken = 3 if code & 0x40 else 2
        operand = stored[at + 1 : at + taken]
        if len(operand) < taken - 1:
            break
        if code & 0x40:
            count, distance = (code & 0x3F) + 4, int.from_bytes(operand, "big") + 1
        else:
            count, distance = (code >> 2) + 3, (code & 3) << 8 | operand[0]
            distance += 1
        at += taken
        start = len(content) - distance
        if start < 0:
            raise Corrupt("it copies from before its beginning", errno=EIO)
        copied = content[start : start + count]
        content += copied if distance >= count else (copied * (count // distance + 1))[:count]
    return exactly(content, size)


def lzfse(stored: bytes, size: int) -> bytearray:
    """LZFSE, by a library; not before the headers of its blocks have said that no more than `size` bytes come out."""
    plain = bytearray()
    total = at = 0
    compressed = False
    for _block in range(MAX_LZFSE_BLOCKS):
        magic, length = stored[at : at + 4], int.from_bytes(stored[at + 4 : at + 8], "little")
        if magic == b"bvx$":
            break
        total += length
        step = _lzfse_block(magic, length, stored, at)
        if not step or at + step > len(stored) or total > size:
            raise Corrupt("its blocks are damaged", errno=EIO)
        compressed = compressed or magic != b"bvx-"
        if not compressed:
            plain += stored[at + 8 : at + step]
        at += step
    else:
        raise Corrupt("it has too many blocks", errno=EIO)
    if total != size:
        raise Corrupt("it is not as long as it should be", errno=EIO)
    return exactly(_lzfse_library()(stored[: at + 4]) if compressed else plain, size)


def _lzfse_block(magic: bytes, length: int, stored: bytes, at: int) -> int:
    """How many bytes a block takes, 0 for an unknown one: plain, LZVN, or LZFSE with its header as it is or packed."""
    if magic == b"bvx-":
        return 8 + length
    if magic == b"bvxn":
        return 12 + int.from_bytes(stored[at + 8 : at + 12], "little")
    if magic == b"bvx1":
        literals, matches = (int.from_bytes(stored[at + place : at + place + 4], "little") for place in (20, 24))
        return 772 + literals + matches
    if magic == b"bvx2":
        first, second, third = (int.from_bytes(stored[at + place : at + place + 8], "little") for place in (8, 16, 24))
        return (third & 0xFFFFFFFF) + (first >> 20 & 0xFFFFF) + (second >> 40 & 0xFFFFF)
    return 0


def _lzfse_library() -> Callable[[bytes], bytes]:
    """The function of whichever library is there; it raises Corrupt."""
    try:
        import liblzfse as library
    except ImportError:
        try:
            import lzfse as library
        except ImportError:
            raise Unsupported(LZFSE_PACKAGES, errno=EIO) from None
    decode, error = library.decompress, library.error

    def checked(stored: bytes) -> bytes:
        try:
            return bytes(decode(stored))
        except error as exc:
            raise Corrupt(str(exc) or "it is damaged", errno=EIO) from None

    return checked
