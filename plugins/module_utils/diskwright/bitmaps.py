# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps: which parts of a node were written since some moment (https://www.qemu.org/docs/master/interop/bitmaps.html).

A format that stores them fills a BitmapSet when it is opened and writes it back when it is closed.
"""

from __future__ import annotations

from .errors import Corrupt, Error, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Iterator, Optional

    from .node import Node

EEXIST, EINVAL, ENOENT = 17, 22, 2
MIN_GRANULARITY = 512  # bytes
MAX_GRANULARITY = 1 << 31
DEFAULT_GRANULARITY = (4096, 65536)  # bytes, at least and at most; a cluster in between
RUNS = 4096  # asked from a kernel at a time
_INCONSISTENT = "Try block-dirty-bitmap-remove to delete this bitmap from disk"


class Bitmap:
    """One bitmap: a bit for each `granularity` bytes of a disk of `size` bytes, set where they were written.

    `enabled` ones are to be told of every write. The content of an `inconsistent` one means nothing: it was not stored when
    the image was last closed. Bits are kept in pieces of `piece` bytes; `fetch` gives those that are stored, by index, None
    for one without a bit. `pieces` are those that differ from what is stored; `stored` is the format's own.
    """

    __slots__ = ("name", "granularity", "size", "enabled", "inconsistent", "piece", "pieces", "fetch", "kept", "stored")

    def __init__(
        self,
        name: str,
        granularity: int,
        size: int,
        enabled: bool,
        piece: int,
        fetch: Optional[Callable[[int], Optional[bytearray]]] = None,
        stored: Any = None,
    ) -> None:
        self.name = name
        self.granularity = granularity
        self.size = size
        self.enabled = enabled
        self.inconsistent = False
        self.piece = piece
        self.pieces: dict[int, bytearray] = {}
        self.fetch = fetch
        self.kept = self.bits if fetch is not None else 0  # so many bits of what is stored still count
        self.stored = stored

    @property
    def bits(self) -> int:
        """How many bits it has."""
        return -(-self.size // self.granularity)

    @property
    def count(self) -> int:
        """How many pieces it has."""
        return max(1, -(-self.bits // (self.piece * 8)))

    def get(self, index: int) -> Optional[bytearray]:
        """A piece; None where no bit of it is set. To be changed only by `change`."""
        found = self.pieces.get(index)
        if found is not None:
            return found
        first = index * self.piece * 8
        if self.fetch is None or first >= self.kept:
            return None
        piece = self.fetch(index)
        if piece is not None and first + self.piece * 8 > self.kept:
            _fill(piece, self.kept - first, self.piece * 8, False)
        return piece

    def change(self, index: int) -> bytearray:
        """A piece that may be changed, and will be stored."""
        piece = self.pieces.get(index)
        if piece is None:
            piece = self.get(index)
            if piece is None:
                piece = bytearray(self.piece)
            self.pieces[index] = piece
        return piece

    def set(self, offset: int, length: int) -> None:
        """Note that bytes of the disk were written."""
        first = offset // self.granularity
        end = min(-(-(offset + length) // self.granularity), self.bits)
        per_piece = self.piece * 8
        while first < end:
            index, low = divmod(first, per_piece)
            high = min(per_piece, end - index * per_piece)
            _fill(self.change(index), low, high, True)
            first = index * per_piece + high

    def clear(self) -> None:
        """Clear all bits."""
        self.pieces = {}
        self.kept = 0

    def runs(self, offset: int = 0, end: Optional[int] = None, most: int = RUNS) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of what was written, ascending; neighbours may be separate runs.

        Only those in the units between `offset` and `end`, cut off there; `most` are looked for at a time.
        """
        from . import kernels

        per_piece = self.piece * 8
        first = offset // self.granularity
        last = self.bits if end is None else min(-(-end // self.granularity), self.bits)
        while first < last:
            index, at = divmod(first, per_piece)
            base = index * per_piece
            stop = min(per_piece, last - base)
            first = base + stop
            piece = self.get(index)
            while piece is not None and at < stop:
                found = kernels.bit_runs(piece, at, stop - at, most)
                for start, count in found:
                    low = (base + start) * self.granularity
                    yield low, min((base + start + count) * self.granularity, self.size) - low
                at = sum(found[-1]) if len(found) == most else stop

    def resize(self, size: int) -> None:
        """The disk has another size now; what is new was not written."""
        self.size = size
        per_piece = self.piece * 8
        self.kept = min(self.kept, self.bits)
        for index in [index for index in self.pieces if (index + 1) * per_piece > self.bits]:
            if index >= self.count:
                del self.pieces[index]
            else:
                _fill(self.pieces[index], self.bits - index * per_piece, per_piece, False)
        if self.kept == self.bits and self.bits % per_piece and self.fetch is not None:
            self.change(self.count - 1)  # what is stored has bits beyond the end

    def flags(self) -> list[str]:
        """Its state in the words of info."""
        return (["in-use"] if self.inconsistent else []) + (["auto"] if self.enabled else [])

    def check_usable(self) -> None:
        """Raise Corrupt if it is inconsistent."""
        if self.inconsistent:
            raise Corrupt("Bitmap '%s' is inconsistent and cannot be used" % self.name, errno=EINVAL, hint=_INCONSISTENT)


class BitmapSet:
    """The bitmaps of one node, in the order in which they were made. `limit` refuses what the format cannot store: it is
    called with a bitmap that is to be added, or is to have another size, and raises."""

    def __init__(self, size: int, piece: int, cluster_size: int, limit: Callable[[str, int, int], None]) -> None:
        self.size = size
        self.piece = piece
        self.cluster_size = cluster_size
        self.limit = limit
        self.all: list[Bitmap] = []

    def __iter__(self) -> Iterator[Bitmap]:
        return iter(self.all)

    def copy(self) -> BitmapSet:
        """A set of the same bitmaps as far as they are stored: their states, and not what changes afterwards."""
        copied = BitmapSet(self.size, self.piece, self.cluster_size, self.limit)
        for bitmap in self.all:
            same = Bitmap(bitmap.name, bitmap.granularity, bitmap.size, bitmap.enabled, bitmap.piece, bitmap.fetch, bitmap.stored)
            same.inconsistent = bitmap.inconsistent
            copied.all.append(same)
        return copied

    def find(self, name: str) -> Bitmap:
        """The bitmap of that name. Raises Error."""
        for bitmap in self.all:
            if bitmap.name == name:
                return bitmap
        raise missing(name)

    def usable(self, name: str) -> Bitmap:
        """The bitmap of that name, which must be consistent. Raises Error."""
        bitmap = self.find(name)
        bitmap.check_usable()
        return bitmap

    def add(self, name: str, granularity: int = 0, enabled: bool = True) -> Bitmap:
        """A new bitmap without a bit; granularity 0 is the default. Raises OptionError, Error."""
        if not name:
            raise OptionError("Bitmap name cannot be empty", errno=EINVAL)
        if not granularity:
            low, high = DEFAULT_GRANULARITY
            granularity = max(low, min(self.cluster_size or high, high))
        elif not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY or granularity & granularity - 1:
            raise OptionError("Granularity must be power of 2 and at least 512", errno=EINVAL)
        if any(bitmap.name == name for bitmap in self.all):
            raise Error("Bitmap already exists: %s" % name, errno=EEXIST)
        self.limit(name, granularity, self.size)
        bitmap = Bitmap(name, granularity, self.size, enabled, self.piece)
        self.all.append(bitmap)
        return bitmap

    def remove(self, name: str) -> None:
        """Remove a bitmap, also an inconsistent one. Raises Error."""
        self.all.remove(self.find(name))

    def merge(self, name: str, source: Bitmap) -> None:
        """Set in the bitmap `name` whatever is set in `source`. Raises Error."""
        target = self.usable(name)
        source.check_usable()
        if source.size != target.size:
            text = "Bitmaps are of different sizes (destination size is %d, source size is %d) and can't be merged"
            raise OptionError(text % (target.size, source.size), errno=EINVAL)
        if source is not target:
            for offset, length in source.runs():
                target.set(offset, length)

    def mark(self, offset: int, length: int) -> None:
        """Tell all that are enabled of a write."""
        for bitmap in self.all:
            if bitmap.enabled and not bitmap.inconsistent:
                bitmap.set(offset, length)

    def check_resize(self, size: int) -> None:
        """Raise Error unless all can be resized."""
        for bitmap in self.all:
            bitmap.check_usable()
            if size > self.size:
                self.limit(bitmap.name, bitmap.granularity, size)

    def resize(self, size: int) -> None:
        """The disk has another size now."""
        self.size = size
        for bitmap in self.all:
            bitmap.resize(size)


def all_bitmaps(node: Node) -> list[Bitmap]:
    """The dirty bitmaps of a node: those that its format stores, and those that are kept in memory while it is in use."""
    kept: Iterable[Bitmap] = getattr(node.recorder, "bitmaps", ())
    return [*(node.bitmaps() or ()), *kept]


def missing(name: str) -> Error:
    """The error for a bitmap that is not there."""
    return Error("Dirty bitmap '%s' not found" % name, errno=ENOENT)


def _fill(piece: bytearray, low: int, high: int, value: bool) -> None:
    """Set or clear bits low..high of a piece; bit 0 is the least significant one of byte 0."""
    first, last = low >> 3, high >> 3
    head, tail = 0xFF << (low & 7) & 0xFF, (1 << (high & 7)) - 1
    if first == last:
        _mask(piece, first, head & tail, value)
        return
    _mask(piece, first, head, value)
    piece[first + 1 : last] = (b"\xff" if value else b"\0") * (last - first - 1)
    if tail:
        _mask(piece, last, tail, value)


def _mask(piece: bytearray, at: int, mask: int, value: bool) -> None:
    if mask:
        piece[at] = piece[at] | mask if value else piece[at] & ~mask
