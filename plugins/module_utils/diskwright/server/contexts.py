# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Metadata contexts: what NBD clients can learn about the blocks of an export.

base:allocation is https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md; the others are
https://www.qemu.org/docs/master/interop/nbd.html. All give (length, flags) pairs that begin at `offset` and cover `length` bytes, or
fewer: the result is never longer than `limit` pairs, and its neighbours differ.
"""

from __future__ import annotations

from ..extent import DATA, ZERO
from ..protocols.nbd.codec import BASE_ALLOCATION, STATE_HOLE, STATE_ZERO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator

    from ..bitmaps import Bitmap
    from ..node import Node

    Pair = tuple[int, int]


QEMU_PREFIX = "qemu:"
DEPTH_NAME = "qemu:allocation-depth"
BITMAP_PREFIX = "qemu:dirty-bitmap:"
STATE_DIRTY = 1


class Context:
    """One kind of what can be asked; `name` is the protocol's."""

    name = ""

    def extents(self, node: Node, offset: int, length: int, limit: int) -> list[Pair]:
        """(length, flags) of a range of `node`."""
        raise NotImplementedError(self.name)


class BaseAllocation(Context):
    """Whether a block is allocated anywhere in the chain, and whether it is known to read as zeroes."""

    name = BASE_ALLOCATION

    def extents(self, node: Node, offset: int, length: int, limit: int) -> list[Pair]:
        found = layered(node, offset, length, limit)
        return joined(((count, (0 if status & DATA else STATE_HOLE) | (STATE_ZERO if status & ZERO else 0)) for count, status, depth in found), limit)


class AllocationDepth(Context):
    """Which layer of the backing chain decides a block: 1 is the node itself, 0 none of them."""

    name = DEPTH_NAME

    def extents(self, node: Node, offset: int, length: int, limit: int) -> list[Pair]:
        return joined(((count, depth) for count, status, depth in layered(node, offset, length, limit)), limit)


class DirtyBitmap(Context):
    """Which blocks were written since the bitmap began."""

    def __init__(self, bitmap: Bitmap) -> None:
        self.bitmap = bitmap
        self.name = BITMAP_PREFIX + bitmap.name

    def extents(self, node: Node, offset: int, length: int, limit: int) -> list[Pair]:
        return joined(self._pairs(offset, offset + length), limit)

    def _pairs(self, at: int, end: int) -> Iterator[Pair]:
        for start, count in self.bitmap.runs(at):
            if start >= end:
                break
            stop = min(start + count, end)
            if stop <= at:
                continue
            if start > at:
                yield start - at, 0
                at = start
            yield stop - at, STATE_DIRTY
            at = stop
        if at < end:
            yield end - at, 0


def matches(query: str, name: str, listing: bool) -> bool:
    """Whether a client's query means the context `name`. A namespace alone, or QEMU's bitmaps as such, means all in it when they are
    to be listed."""
    if query == name:
        return True
    return listing and query in ("base:", QEMU_PREFIX, BITMAP_PREFIX) and name.startswith(query)


def joined(pairs: Iterator[Pair], limit: int) -> list[Pair]:
    """Up to `limit` pairs, neighbours with the same flags being one."""
    result: list[Pair] = []
    for length, flags in pairs:
        if result and result[-1][1] == flags:
            result[-1] = (result[-1][0] + length, flags)
        elif len(result) == limit:
            break
        else:
            result.append((length, flags))
    return result


def layered(node: Node, offset: int, length: int, limit: int, depth: int = 1) -> Iterator[tuple[int, int, int]]:
    """(length, status, depth) of a range through the backing chain, in order; status 0 and depth 0 are where no layer has anything.

    The extents of a layer are asked for `limit` at a time.
    """
    layer = node.unfiltered()
    end = offset + length
    while offset < end:
        for start, count, status, _host, _host_offset in layer.block_status(offset, end - offset, True, limit + 1):
            backing = layer.backing
            if status & (DATA | ZERO):
                yield count, status, depth
            elif not layer.supports_backing or backing is None:
                yield count, ZERO if layer.supports_backing else 0, 0
            else:
                inside = max(0, min(count, backing.size - start))
                if inside:
                    yield from layered(backing, start, inside, limit, depth + 1)
                if inside < count:
                    yield count - inside, ZERO, depth + 1
            offset = start + count
