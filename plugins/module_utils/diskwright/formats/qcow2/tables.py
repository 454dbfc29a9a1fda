# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""L1 and L2 tables: where guest clusters are (https://www.qemu.org/docs/master/interop/qcow2.html#cluster-mapping)."""

from __future__ import annotations

import sys
from array import array

from ... import kernels
from ...cache import TableCache, read_padded
from ...extent import ALLOCATED, COMPRESSED, DATA, OFFSET_VALID, RECURSE, ZERO, Extent
from ...kernels import contract as kinds
from ...parts import part
from .header import L2_RESERVED, OFFSET_MASK
from .options import cache_sizes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from typing import Iterator, Optional

    from diskwright.formats.qcow2.subclusters import Pending

    from ...node import Node
    from .image import Qcow2

    Run = tuple[int, int, int, int]

RUNS = 4096  # asked from a kernel at a time
_KIND = 7  # mask of a run's kind, without COPIED

__all__ = ["Tables", "big_array", "big_bytes", "L2_RESERVED"]


class Tables:
    """The active L1 table, whole and in native form, and a cache of L2 tables."""

    def __init__(self, image: Qcow2, l1_offset: Optional[int] = None, l1_size: int = 0) -> None:
        """The tables below the image's L1 table, or (of a snapshot) below one of `l1_size` entries at `l1_offset`."""
        header = image.header
        if l1_offset is None:
            l1_offset, l1_size = header.l1_table_offset, header.l1_size
        self.image = image
        self.cluster_size = header.cluster_size
        self.entry_size = header.l2_entry_size
        self.entries = header.l2_entries
        self.reach = self.cluster_size * self.entries  # guest bytes of an L2 table
        self.extended = header.extended_l2
        self.external = image.data_file is not image.file
        self.l1 = read_entries(image.file, l1_offset, l1_size)
        self.l1_dirty: set[int] = set()  # indexes
        self.cache = TableCache(image.file, self.cluster_size, self._capacity(), image.write_back)
        if image.tell is not None:
            self.cache.events = (image.tell, "l2_load", "l2_update")
        self.fresh: set[int] = set()  # offsets of tables that no L1 entry in the file points at yet
        self.verified: set[int] = set()  # offsets of tables that are known to overlap nothing
        self._recurse: Optional[int] = None
        self.pending: dict[int, Pending] = {}  # of clusters with subclusters, by guest offset
        self.moves: dict[int, LockType] = {}

    def _capacity(self) -> int:
        """How many L2 tables the options let us keep."""
        size = cache_sizes(self.image.options, self.image.header)[0]
        return max(2, min(size, len(self.l1) * self.cluster_size) // self.cluster_size)

    # -- looking up ----------------------------------------------------------------------------------------------

    def l2_offset(self, index: int) -> int:
        """The offset of the L2 table of L1 entry `index`, 0 for none. Raises Corrupt."""
        offset = self.l1[index] & OFFSET_MASK
        if offset & (self.cluster_size - 1):
            raise self.image.corrupt("L2 table offset %#x unaligned (L1 index: %s)" % (offset, c_hex(index)))
        return offset

    def map(self, offset: int, length: int) -> Iterator[Extent]:
        """The extents that cover a range of guest bytes, a table's worth at a time."""
        end = offset + length
        while offset < end:
            with self.image._lock:
                extents, offset = self._map_table(offset, end)
            yield from extents

    def _map_table(self, offset: int, end: int) -> tuple[list[Extent], int]:
        """Extents from `offset` on, as far as one L2 table reaches or one run of absent ones, and where they end."""
        index = offset // self.reach
        l2_offset = self.l2_offset(index)
        if not l2_offset:
            stop = index + 1
            last = -(-end // self.reach)
            while stop < last and not self.l1[stop] & OFFSET_MASK:
                stop += 1
            return [Extent(index * self.reach, (stop - index) * self.reach, 0)], stop * self.reach
        base = index * self.reach
        first = (offset - base) // self.cluster_size
        count = -(-(min(end - base, self.reach)) // self.cluster_size) - first
        table = self.cache.get(l2_offset)
        if self.extended:
            unit = self.cluster_size // 32
            runs = kernels.l2_runs_extended(table, first, count, self.cluster_size, self.external, RUNS)
        else:
            unit = self.cluster_size
            runs = kernels.l2_runs(table, first, count, self.cluster_size, self.external, RUNS)
        self.verify(runs, l2_offset)
        extents = self._extents(runs, base, unit)
        if self.extended:
            with_room = part(__package__, "subclusters").with_room

            extents = with_room(self, extents, base, table)
        return extents, base + (runs[-1][0] + runs[-1][1]) * unit

    def verify(self, runs: list[Run], l2_offset: int) -> None:
        """Raise Corrupt where a run contradicts the specification."""
        below = self.cluster_size - 1
        scale = 32 if self.extended else 1
        old = self.image.header.version < 3
        for index, _count, kind, value in runs:
            kind &= _KIND
            if kind == kinds.NORMAL or kind == kinds.ZERO_ALLOC:
                place = value - index % scale * (self.cluster_size // scale)
                if place & below:
                    raise self.image.corrupt(
                        "Cluster allocation offset %#x unaligned (L2 offset: %#x, L2 index: %s)" % (place, l2_offset, c_hex(index // scale))
                    )
            elif kind == kinds.INVALID:
                raise self.image.corrupt("Invalid cluster entry found  (L2 offset: %#x, L2 index: %s)" % (l2_offset, c_hex(index // scale)))
            if old and (kind == kinds.ZERO_PLAIN or kind == kinds.ZERO_ALLOC):
                raise self.image.corrupt(
                    "Zero cluster entry found in pre-v3 image (L2 offset: %#x, L2 index: %s)" % (l2_offset, c_hex(index))
                )

    def _extents(self, runs: list[Run], base: int, unit: int) -> list[Extent]:
        image = self.image
        host = image.data_file
        extents = []
        for index, count, kind, value in runs:
            kind &= _KIND
            offset = base + index * unit
            if kind == kinds.NORMAL:
                status = DATA | OFFSET_VALID | ALLOCATED | (self._recurse if self._recurse is not None else self._preallocated())
                extents.append(Extent(offset, count * unit, status, host, value))
            elif kind == kinds.UNALLOCATED:
                extents.append(Extent(offset, count * unit, 0))
            elif kind == kinds.ZERO_PLAIN:
                extents.append(Extent(offset, count * unit, ZERO | ALLOCATED))
            elif kind == kinds.ZERO_ALLOC:
                extents.append(Extent(offset, count * unit, ZERO | OFFSET_VALID | ALLOCATED, host, value))
            else:
                extents.append(Extent(offset, count * unit, DATA | ALLOCATED | COMPRESSED, image, offset))
        return extents

    def _preallocated(self) -> int:
        """RECURSE if the image has many more clusters than its file has room on the disk, else 0; found out once."""
        looks_preallocated = part(__package__, "refcount").looks_preallocated

        self._recurse = RECURSE if looks_preallocated(self.image) else 0
        return self._recurse

    def forget_preallocation(self) -> None:
        """Find out again; the image was resized."""
        self._recurse = None

    def find(self, offset: int) -> tuple[int, int]:
        """(kind without COPIED, value) of the (sub)cluster at guest `offset`; see kernels.l2_runs."""
        index, rest = divmod(offset, self.reach)
        l2_offset = self.l2_offset(index)
        if not l2_offset:
            return kinds.UNALLOCATED, 0
        entry, inside = divmod(rest, self.cluster_size)
        if not self.extended:
            run = kernels.l2_runs(self.cache.get(l2_offset), entry, 1, self.cluster_size, self.external, 1)[0]
            return run[2] & _KIND, run[3]
        number = entry * 32 + inside // (self.cluster_size // 32)
        for index, count, kind, value in kernels.l2_runs_extended(self.cache.get(l2_offset), entry, 1, self.cluster_size, self.external, 32):
            if number < index + count:
                kind &= _KIND
                return kind, value + (number - index) * (self.cluster_size // 32) if kind in (kinds.NORMAL, kinds.ZERO_ALLOC) else value
        raise RuntimeError("l2_runs_extended does not cover an entry")


def big_array(raw: bytes | bytearray | memoryview) -> array[int]:
    """Big-endian u64 entries as a native array."""
    entries = array("Q")
    entries.frombytes(raw)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def read_entries(file: Node, offset: int, count: int) -> array[int]:
    """`count` big-endian u64 entries of `file` as a native array, without a second copy of them in memory."""
    entries = array("Q", (0,)) * count
    with memoryview(entries) as view:
        read_padded(file, offset, view.cast("B"))
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def big_bytes(entries: array[int]) -> bytes:
    """A native array as big-endian u64 entries."""
    if sys.byteorder == "little":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


_steps: dict[int, tuple[int, int, int]] = {}  # step -> (count, the entries 0, step, ... as one number, and as many entries of 1)


def ascending(first: int, step: int, count: int) -> bytes:
    """`count` big-endian u64 entries first, first + step, ..., none of which may exceed 64 bits."""
    if count <= 256:
        return big_bytes(array("Q", range(first, first + count * step, step)))
    if step not in _steps or _steps[step][0] < count:
        _steps.clear()
        multiples = int.from_bytes(big_bytes(array("Q", range(0, count * step, step))), "big")
        _steps[step] = (count, multiples, int.from_bytes((bytes(7) + b"\1") * count, "big"))
    most, multiples, ones = _steps[step]
    surplus = 64 * (most - count)  # the first entry is the most significant one
    return ((multiples >> surplus) + (ones >> surplus) * first).to_bytes(count * 8, "big")


def c_hex(value: int) -> str:
    """A number as C's %#x prints it: 0 has no prefix."""
    return "%#x" % value if value else "0"
