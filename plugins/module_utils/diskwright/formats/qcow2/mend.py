# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What the repair of a qcow2 image writes in place (https://www.qemu.org/docs/master/interop/qcow2.html)."""

from __future__ import annotations

from array import array
from bisect import bisect_left

from ... import kernels
from .check import MAX_CLUSTERS, MAX_FILE_OFFSET, Check, failed
from .header import OFFSET_MASK, REFCOUNT_TABLE_MASK, ZERO
from .overlap import (
    ACTIVE_L1,
    ACTIVE_L2,
    HEADER,
    INACTIVE_L1,
    INACTIVE_L2,
    NAMES,
    REFCOUNT_BLOCK,
    REFCOUNT_TABLE,
    SNAPSHOT_TABLE,
)

_GROWTH_MAX = 1 << 30  # bytes by which a file grows to take in a refcount block that lies behind its end
_FREED_MAX = 4096  # runs of freed clusters that are given back to the host


class Metadata:
    """Where the metadata of an image lies, as far as it can be told of a damaged one; the names are overlap.py's."""

    def __init__(self, state: Check) -> None:
        header, size = state.header, state.cluster_size
        self.cluster_size = size
        self.ranges = [
            (HEADER, 0, size),
            (ACTIVE_L1, header.l1_table_offset, header.l1_size * 8),
            (REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters * size),
            (SNAPSHOT_TABLE, header.snapshots_offset, state.snapshots_size),
        ]
        self.ranges.extend(sorted({(INACTIVE_L1, snapshot.l1_table_offset, snapshot.l1_size * 8) for snapshot in state.snapshots if snapshot.l1_size}))
        l2 = array("Q", (entry & OFFSET_MASK for _index, entry in state.l1_entries(header.l1_table_offset, header.l1_size)))
        blocks = array("Q", (entry & REFCOUNT_TABLE_MASK for entry in state.reftable if entry & REFCOUNT_TABLE_MASK))
        self.tables = [(ACTIVE_L2, array("Q", sorted(l2))), (REFCOUNT_BLOCK, array("Q", sorted(blocks)))]

    def find(self, offset: int, length: int, ignore: int) -> int:
        """The structure, not in the mask `ignore`, that a write would hit; 0 for none."""
        return self.obstacle(offset, length, ignore)[0]

    def obstacle(self, offset: int, length: int, ignore: int) -> tuple[int, int]:
        """The structure that `find` finds, and where it ends."""
        end = offset + length
        for kind, start, size in self.ranges:
            if not kind & ignore and start < end and offset < start + size:
                return kind, start + size
        for kind, places in self.tables:
            at = bisect_left(places, max(0, offset - self.cluster_size + 1))
            if not kind & ignore and at < len(places) and places[at] < end:
                return kind, places[at] + self.cluster_size
        return 0, 0


def guard_write(state: Check, offset: int, length: int, ignore: int, complaint: str = "") -> None:
    """Raise GiveUp, having said why, where a write into a mapping table hits metadata that is not in the mask `ignore`."""
    if state.guard is None:
        state.guard = Metadata(state)
    kind = state.guard.find(offset, length, ignore)
    if kind:
        state.signal("Preventing invalid write on metadata (overlaps with %s)" % NAMES[kind])
        if complaint:
            state.result.say(complaint)
        raise failed(state)


def zero_entry(state: Check, table: int, index: int, bitmap: int) -> None:
    """Make an L2 entry read as zeroes without a cluster."""
    if state.extended:
        at, data = table + index * 16, bytes(8) + (bitmap & 0xFFFFFFFF00000000).to_bytes(8, "big")
    else:
        at, data = table + index * 8, ZERO.to_bytes(8, "big")
    guard_write(state, at, len(data), ACTIVE_L2 | INACTIVE_L2, "ERROR: Overlap check failed")
    state.write(at, data)


class BlockEditor:
    """Writes mended refcounts, a block at a time, and gives freed clusters back to the host.

    Leaks are mended, and refcounts that are too low if `all` says so.
    """

    def __init__(self, state: Check, all: bool) -> None:
        self.state = state
        self.all = all
        self._edits: dict[int, int] = {}
        self._freed: list[tuple[int, int]] = []

    def set(self, cluster: int, refcount: int) -> None:
        """Give a cluster of the block at hand another refcount."""
        self._edits[cluster] = refcount
        if not refcount:
            if self._freed and sum(self._freed[-1]) == cluster:
                self._freed[-1] = (self._freed[-1][0], self._freed[-1][1] + 1)
            elif len(self._freed) < _FREED_MAX:
                self._freed.append((cluster, 1))

    def finish(self, index: int) -> None:
        """Write block number `index`."""
        if not self._edits:
            return
        state = self.state
        offset = state.reftable[index] & REFCOUNT_TABLE_MASK
        values = kernels.refcounts_unpack(state.read(offset, state.cluster_size), state.order, 0, state.per_block)
        for cluster, refcount in self._edits.items():
            values[cluster - index * state.per_block] = refcount
        self._edits = {}
        state.write(offset, kernels.refcounts_pack(values, state.order))
        state.forget_blocks()

    def close(self) -> None:
        """Bring the refcounts to the disk, then let the host have the freed clusters."""
        state = self.state
        state.file.flush()
        if state.corruptions or state.result.corruptions:
            return  # what is free by the tables as they are may still be of use to somebody
        size = state.file.size
        for start, count in self._freed:
            offset = start << state.cluster_bits
            length = min(count << state.cluster_bits, size - offset)
            if length > 0:
                state.file.pdiscard(offset, length)


def grow_to_block(state: Check, index: int, offset: int) -> None:
    """A refcount block lies behind the end of the file: let the file reach it, or have the refcounts rebuilt without it."""
    result = state.result
    result.say("Repairing refcount block %d is outside image" % index)
    end = offset + state.cluster_size
    reason = ""
    if end > MAX_FILE_OFFSET:
        reason = "Invalid argument"
        if not offset >> 63:
            result.say("qemu-img: offset(%d) exceeds maximum(%d)" % (end, MAX_FILE_OFFSET))
            reason = "Input/output error"
    elif end >> state.cluster_bits > MAX_CLUSTERS:
        reason = "Invalid argument"
    elif end - state.length > _GROWTH_MAX:
        reason = "File too large"
    else:
        state.file.truncate(end, exact=False)
        state.measure_file()
        state.tally.total = max(state.tally.total, state.clusters)
        result.corruptions_fixed += 1
        state.count_block(index, offset)
        return
    result.say("ERROR could not resize image: %s" % reason)
    result.corruptions += 1
    state.rebuild = True
