# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Extent, a run of bytes stored the same way, and the status flags of such runs.

The flags have QEMU's meaning; see the block-status truth table in the design.
"""

from __future__ import annotations

from operator import itemgetter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Iterator, NamedTuple, Optional

    from .node import Node

DATA = 0x01  # the bytes are stored, at host_offset of host
ZERO = 0x02  # the bytes read as zeroes
OFFSET_VALID = 0x04  # host_offset is a plain offset in host: what is there is what is read
PASS = 0x08  # host's own status at host_offset holds (raw, filters); implies OFFSET_VALID
ALLOCATED = 0x10  # this layer decides the content; the backing node is not asked
RECURSE = 0x40  # DATA, but host may know better that some of it are zeroes (preallocated metadata)
COMPRESSED = 0x80  # stored compressed: only host can produce the bytes

if TYPE_CHECKING:

    class Extent(NamedTuple):
        """`length` bytes at `offset` (bytes, in the node that was asked), all stored the same way.

        `host` is the node that holds the bytes and `host_offset` where; None where status has neither DATA nor PASS. There
        OFFSET_VALID says that room is kept, at host_offset of the file, for what is not in this layer.
        A node that names itself as host sets host_offset = offset.
        """

        offset: int
        length: int
        status: int
        host: Optional[Node] = None
        host_offset: int = 0

else:

    class Extent(tuple):
        """`length` bytes at `offset`, all stored the same way (written by hand: typing costs 8 ms at start-up)."""

        __slots__ = ()

        def __new__(cls, offset, length, status, host=None, host_offset=0):
            return tuple.__new__(cls, (offset, length, status, host, host_offset))

        offset = property(itemgetter(0))
        length = property(itemgetter(1))
        status = property(itemgetter(2))
        host = property(itemgetter(3))
        host_offset = property(itemgetter(4))

        def __repr__(self):
            host = self[3] if self[3] is None else type(self[3]).__name__
            return "Extent(offset=%#x, length=%#x, status=%#x, host=%s, host_offset=%#x)" % (*self[:3], host, self[4])


def clip(extent: Extent, start: int, end: int) -> Extent:
    """The part of `extent` inside [start, end); the two must overlap."""
    offset, length, status, host, host_offset = extent
    if offset >= start and offset + length <= end:
        return extent
    low = max(offset, start)
    placed = host is not None or status & OFFSET_VALID
    return Extent(low, min(offset + length, end) - low, status, host, host_offset + low - offset if placed else 0)


def coalesce(extents: Iterable[Extent]) -> list[Extent]:
    """Join neighbours of one status whose bytes follow one another in the same host."""
    joined: list[Extent] = []
    for extent in extents:
        if joined:
            last = joined[-1]
            if (
                last[2] == extent[2]
                and last[3] is extent[3]
                and last[0] + last[1] == extent[0]
                and (last[4] + last[1] == extent[4] or extent[3] is None and not extent[2] & OFFSET_VALID)
            ):
                joined[-1] = Extent(last[0], last[1] + extent[1], last[2], last[3], last[4])
                continue
        joined.append(extent)
    return joined


def pieces(offset: int, length: int, most: int, align: int) -> Iterator[tuple[int, int]]:
    """Cut a range into (offset, length) pieces of at most `most` bytes; inner cuts fall on multiples of `align`."""
    end = offset + length
    while offset < end:
        stop = min(end, (offset + most) // align * align)
        if stop <= offset:
            stop = end
        yield offset, stop - offset
        offset = stop
