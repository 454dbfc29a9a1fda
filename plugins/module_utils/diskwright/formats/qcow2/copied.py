# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""COPIED flags of the active tables against the stored refcounts (https://www.qemu.org/docs/master/interop/qcow2.html#l1-table)."""

from __future__ import annotations

from array import array

from ... import kernels
from ...kernels.contract import COPIED as COPIED_KIND
from .check import Check, big_words, is_zero
from .header import COMPRESSED, COPIED, OFFSET_MASK
from .mend import guard_write
from .overlap import ACTIVE_L1, ACTIVE_L2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Union

_HAS_OFFSET = 2


def check_copied(state: Check, mend: bool) -> None:
    """An entry has COPIED if and only if the refcount of its cluster is 1; with `mend` make it so.

    Raises GiveUp where a table that would have to be written lies on other metadata.
    """
    header = state.header
    for index, entry in state.l1_entries(header.l1_table_offset, header.l1_size):
        offset = entry & OFFSET_MASK
        if not offset:
            continue
        refcount = _refcount(state, offset >> state.cluster_bits)
        if refcount is not None and (refcount == 1) != bool(entry & COPIED):
            _report(state, mend, "OFLAG_COPIED L2 cluster: l1_index=%d l1_entry=%x refcount=%d" % (index, entry, refcount))
            if mend:
                at = header.l1_table_offset + 8 * index
                guard_write(state, at, 8, ACTIVE_L1)
                state.write(at, (entry ^ COPIED).to_bytes(8, "big"))
        if not state.data_file:  # clusters of a data file are not counted
            _check_l2(state, offset, mend)
    if mend:
        state.file.flush()


def _report(state: Check, mend: bool, text: str) -> None:
    if mend:
        state.result.say("Repairing " + text)
        state.result.corruptions_fixed += 1
    else:
        state.result.say("ERROR " + text)
        state.result.corruptions += 1


def _refcount(state: Check, cluster: int) -> Optional[int]:
    """The stored refcount; None if it cannot be read."""
    try:
        return state.refcounts(cluster, 1)[0]
    except OSError:
        return None


def _check_l2(state: Check, offset: int, mend: bool) -> None:
    raw = state.read_cluster(offset)
    if is_zero(raw):
        return
    entries = state.split(raw)[0]
    if _runs_agree(state, entries):
        return
    words = big_words(entries)
    changed = []
    for index, entry in enumerate(words):
        if entry & COMPRESSED or not entry & OFFSET_MASK:
            continue
        refcount = _refcount(state, (entry & OFFSET_MASK) >> state.cluster_bits)
        if refcount is not None and (refcount == 1) != bool(entry & COPIED):
            _report(state, mend, "OFLAG_COPIED data cluster: l2_entry=%x refcount=%d" % (entry, refcount))
            changed.append((index, entry ^ COPIED))
    if not mend or not changed:
        return
    width = 16 if state.extended else 8
    first, last = changed[0][0], changed[-1][0]
    part = bytearray(raw[first * width : last * width + 8])
    for index, entry in changed:
        at = (index - first) * width
        part[at : at + 8] = entry.to_bytes(8, "big")
    complaint = "ERROR: Could not write L2 table; metadata overlap check failed: Input/output error"
    guard_write(state, offset, state.cluster_size, ACTIVE_L2, complaint)
    state.write(offset + first * width, bytes(part))


def _runs_agree(state: Check, entries: Union[bytes, bytearray]) -> bool:
    """Whether the flags of all runs of a table are right; False also if that cannot be told by runs."""
    total = len(entries) // 8
    for _index, count, kind, value in kernels.l2_runs(entries, 0, total, state.cluster_size, False, total):
        if not kind & _HAS_OFFSET:
            continue
        if value & state.cluster_size - 1:
            return False
        try:
            stored = state.refcounts(value >> state.cluster_bits, count)
        except OSError:
            return False
        if kind & COPIED_KIND:
            if stored.tobytes() != array("Q", [1]).tobytes() * count:
                return False
        elif 1 in stored:
            return False
    return True
