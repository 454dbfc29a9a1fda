# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""New refcount structures from what a check counted (https://www.qemu.org/docs/master/interop/qcow2.html#host-cluster-management)."""

from __future__ import annotations

import errno
from array import array

from ... import kernels
from .check import Check, GiveUp, is_zero
from .header import MAX_REFCOUNT_TABLE_SIZE
from .mend import Metadata
from .overlap import REFCOUNT_BLOCK, REFCOUNT_TABLE

_RESERVE = 64  # refcount blocks for which a table behind the end of the file has room beyond what is needed now


def rebuild_structures(state: Check) -> None:
    """Write refcount blocks and a table for what the tally counted, where nothing is; then make the header name them."""
    state.quiet = True
    if state.tally.low:
        state.tally = state.new_tally()
        state.walk()
    single = state.tally.low == 0 and state.tally.high is None
    places: dict[int, int] = {}  # block index -> cluster
    if single:
        start, count = _place_first_fit(state, places)
    else:
        start, count = _place_at_end(state, places)
    table = array("Q", bytes((count << state.cluster_bits)))
    for index, cluster in places.items():
        table[index] = cluster << state.cluster_bits
    state.file.truncate(max(state.file.size, start + count << state.cluster_bits), exact=False)
    while True:
        for index, cluster in places.items():
            _write_block(state, index, cluster)
        if single or not state.tally.advance():
            break
        state.walk()
        _add_structures(state, places, start, count)
    state.write(start << state.cluster_bits, kernels.refcounts_pack(table, 6), True)  # of 64 bits: as the entries of the table
    state.file.flush()
    header = state.header
    header.refcount_table_offset = start << state.cluster_bits
    header.refcount_table_clusters = count
    state.image.update_record()
    state.quiet = False


def _table_clusters(state: Check, clusters: int) -> int:
    """Clusters of a refcount table for an image of `clusters` clusters."""
    blocks = -(-clusters // state.per_block)
    count = -(-blocks * 8 // state.cluster_size)
    if count * state.cluster_size > MAX_REFCOUNT_TABLE_SIZE:
        state.result.say("qemu-img: ERROR allocating reftable: File too large")
        raise GiveUp("File too large", filename=state.image.filename, errno=errno.EFBIG)
    return count


def _blocks_in_use(state: Check) -> list[int]:
    """The numbers of the blocks that the tally's window needs."""
    found: list[int] = []
    high = state.tally.total if state.tally.high is None else min(state.tally.high, state.tally.total)
    for start, count in state.tally.touched():
        for low in range(start, min(start + count, high), min(state.per_block, count)):
            end = min(low + state.per_block, start + count, high)
            index = low // state.per_block
            if found and found[-1] == index:
                continue
            if not all(is_zero(part.cast("B")) for _start, part in state.tally.counters(low, end - low)):
                found.append(index)
    return found


def _place_first_fit(state: Check, places: dict[int, int]) -> tuple[int, int]:
    """Put blocks and then the table into the first free clusters; (first cluster, clusters) of the table."""
    tally = state.tally
    queue = _blocks_in_use(state)
    cursor = 0
    metadata = Metadata(state)
    while True:
        while queue:
            index = queue.pop(0)
            if index not in places:
                cursor = _place(state, metadata, cursor, 1)
                places[index] = cursor
                tally.add(cursor, 1)
                queue.append(cursor // state.per_block)
        count = _table_clusters(state, (max(places) + 1) * state.per_block)
        start = _place(state, metadata, cursor, count)
        own = range(start // state.per_block, (start + count - 1) // state.per_block + 1)
        queue = [index for index in own if index not in places]
        if not queue:
            tally.add(start, count)
            return start, count


def _place(state: Check, metadata: Metadata, start: int, count: int) -> int:
    """Where `count` clusters from `start` on are free, and where nothing lies that could not be counted because the file was cut."""
    while True:
        start = _first_free(state, start, count)
        kind, end = metadata.obstacle(start << state.cluster_bits, count << state.cluster_bits, REFCOUNT_TABLE | REFCOUNT_BLOCK)
        if not kind:
            return start
        start = -(-end // state.cluster_size)


def _first_free(state: Check, start: int, wanted: int) -> int:
    """Where the first run of `wanted` clusters from `start` on begins that nothing refers to; all behind the end is free."""
    order = 4 if state.order < 5 else 5  # of the counters, whose zeroes are what is looked for
    free = reached = start  # the run at hand
    for base, counters in state.tally.counters(start, max(0, state.tally.total - start)):
        for low, count in kernels.refcount_free_runs(counters, order, 0, len(counters), len(counters)):
            if base + low != reached:
                free = base + low
            reached = base + low + count
            if reached - free >= wanted:
                return free
    return free if reached == state.tally.total else max(start, state.tally.total)


def _place_at_end(state: Check, places: dict[int, int]) -> tuple[int, int]:
    """For images that are counted in several windows: everything goes behind the end of the file."""
    needed: set[int] = set()
    while True:
        needed.update(_blocks_in_use(state))
        if not state.tally.advance():
            break
        state.walk()
    start = state.tally.total
    count = _table_clusters(state, start + 2 * len(needed) + _RESERVE)
    while True:  # blocks for the new structures themselves
        own = set(range(start // state.per_block, (start + count + len(needed)) // state.per_block + 1))
        if own <= needed:
            break
        needed |= own
    for position, index in enumerate(sorted(needed)):
        places[index] = start + count + position
    state.tally = state.new_tally()
    state.walk()
    _add_structures(state, places, start, count)
    return start, count


def _add_structures(state: Check, places: dict[int, int], start: int, count: int) -> None:
    state.tally.add(start, count)
    for cluster in places.values():
        state.tally.add(cluster, 1)


def _write_block(state: Check, index: int, cluster: int) -> None:
    """Write the part of a block that the tally's window knows."""
    tally = state.tally
    base = index * state.per_block
    low = max(base, tally.low)
    end = base + state.per_block if tally.high is None else min(base + state.per_block, tally.high)
    if low >= end:
        return
    values = array("Q")
    for _start, counters in tally.counters(low, end - low):
        values.extend(array("Q", counters.tolist()))
    at = (cluster << state.cluster_bits) + (low - base << state.order >> 3)
    state.write(at, kernels.refcounts_pack(values, state.order), True)
