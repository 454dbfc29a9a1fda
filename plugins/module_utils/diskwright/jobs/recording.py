# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps of nodes that live, whatever their format (https://www.qemu.org/docs/master/interop/bitmaps.html).

Those that a format stores it keeps itself (Node.bitmaps); all others are kept here, in memory, and end with the node.
"""

from __future__ import annotations

import hashlib
from threading import Lock

from ..bitmaps import Bitmap, BitmapSet, missing
from ..errors import Error, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import Any, Callable, Iterator, Optional

    from ..node import Node

PIECE = 4096  # bytes of a bitmap in memory that are kept together
MAX_NAME = 1023  # bytes
MAX_BITMAPS = 1024  # of one node, in memory
MAX_BITS = 1 << 32  # of one bitmap, in memory: half a gigabyte if all is written


class Recording:
    """What is noted of the writes to one node: bitmaps in memory, and a threshold. Any thread may write meanwhile."""

    def __init__(self, node: Node, crossed: Callable[[Node, int, int], None]) -> None:
        self.node = node
        self.lock = Lock()
        self.bitmaps = BitmapSet(node.size, PIECE, node.cluster_size, _limit)
        self.threshold = 0  # bytes; a write beyond it is told once: crossed(node, bytes beyond, threshold)
        self._crossed = crossed

    def __call__(self, offset: int, length: int) -> None:
        with self.lock:
            if offset + length > self.bitmaps.size:
                self.bitmaps.resize(max(self.node.size, offset + length))
            self.bitmaps.mark(offset, length)
            threshold = self.threshold
            if threshold and offset + length > threshold:
                self.threshold = 0
            else:
                threshold = 0
        if threshold:
            self._crossed(self.node, offset + length - threshold, threshold)


def _limit(name: str, granularity: int, size: int) -> None:
    if len(name.encode("utf-8", "replace")) > MAX_NAME:
        raise OptionError("Bitmap name too long: %s" % name)
    if -(-size // granularity) > MAX_BITS:
        raise OptionError("Bitmap '%s' would have more than %d bits" % (name, MAX_BITS))


def recording(node: Node) -> Optional[Recording]:
    """What is recorded of a node in memory; None where nothing is."""
    found = node.recorder
    return found if isinstance(found, Recording) else None


class Found:
    """A bitmap, the set that it is in, and the lock under which writes change it."""

    __slots__ = ("node", "bitmap", "owner", "lock", "persistent")

    def __init__(self, node: Node, bitmap: Bitmap, owner: BitmapSet, lock: AbstractContextManager[Any], persistent: bool) -> None:
        self.node = node
        self.bitmap = bitmap
        self.owner = owner
        self.lock = lock
        self.persistent = persistent

    def runs(self) -> list[tuple[int, int]]:
        """What is dirty now."""
        with self.lock:
            return list(self.bitmap.runs())

    def state(self, busy: bool) -> dict[str, Any]:
        """Its element of query-named-block-nodes."""
        with self.lock:
            granularity = self.bitmap.granularity
            count = sum(-(-length // granularity) for _offset, length in self.bitmap.runs()) * granularity
        found = {
            "name": self.bitmap.name,
            "count": count,
            "granularity": granularity,
            "recording": self.bitmap.enabled and not self.bitmap.inconsistent,
            "busy": busy,
            "persistent": self.persistent,
        }
        if self.bitmap.inconsistent:
            found["inconsistent"] = True
        return found

    def sha256(self) -> str:
        """The hash of its bits, in words of 64."""
        with self.lock:
            if -(-self.bitmap.bits // 8) > 1 << 30:
                raise Error("Bitmap '%s' is too large for a checksum" % self.bitmap.name)
            left = -(-self.bitmap.bits // 64) * 8
            whole = hashlib.sha256()
            for index in range(self.bitmap.count):
                piece = bytes(self.bitmap.get(index) or bytes(self.bitmap.piece))[:left]
                whole.update(piece)
                left -= len(piece)
            whole.update(bytes(left))
            return whole.hexdigest()


def bitmaps(node: Node) -> Iterator[Found]:
    """All bitmaps of a node: first those in memory, the newest first."""
    recorded = recording(node)
    if recorded is not None:
        for bitmap in reversed(recorded.bitmaps.all):
            yield Found(node, bitmap, recorded.bitmaps, recorded.lock, False)
    stored = node.bitmaps()
    if stored is not None:
        for bitmap in reversed(stored.all):
            yield Found(node, bitmap, stored, node._lock, True)


def find(node: Node, name: str) -> Found:
    """The bitmap of that name. Raises Error."""
    for found in bitmaps(node):
        if found.bitmap.name == name:
            return found
    raise missing(name)


def duplicate(bitmap: Bitmap, runs: list[tuple[int, int]]) -> Bitmap:
    """A bitmap like this one, in memory and of nobody, with these bits."""
    same = Bitmap(bitmap.name, bitmap.granularity, bitmap.size, False, PIECE)
    for offset, length in runs:
        same.set(offset, length)
    return same
