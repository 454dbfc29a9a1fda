# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Check and repair of a qcow2 image: `check` is what the driver calls (https://www.qemu.org/docs/master/interop/qcow2.html).

At every moment of a repair the image is at most as damaged as it was: refcounts go straight to what was counted, new refcount
structures are complete and flushed before the header names them, and what they replace is freed after that.
"""

from __future__ import annotations

import errno
from array import array

from ... import kernels
from ...check import CheckResult
from ...errors import Error
from .check import MAX_CLUSTERS, MAX_FILE_OFFSET, Check, GiveUp, big_array
from .header import CORRUPT, DIRTY, MAX_REFCOUNT_TABLE_SIZE, REFCOUNT_TABLE_MASK, ZERO, Header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...node import Node

_INCOMPATIBLE = 72  # offset of incompatible_features in the header
_REFCOUNT_TABLE = 48  # offset of refcount_table_offset and refcount_table_clusters
_GROWTH_MAX = 1 << 30  # bytes by which a file grows to take in a refcount block that lies behind its end
_FREED_MAX = 4096  # runs of freed clusters that are given back to the host


def check(file: Node, header: Header, repair: str = "") -> CheckResult:
    """Check the qcow2 image in `file`; with `repair` "leaks" or "all" mend what it finds.

    Works on the file, without anybody's caches: the caller writes its tables before, and reads them anew after a repair, as it
    does `header`, whose fields this changes. Raises OSError as the host does; every damage ends up in the result.
    """
    result = CheckResult()
    try:
        state = Check(file, header, repair, result)
        _check(state)
    except GiveUp as exc:
        result.failure = exc
    return result


def repair_dirty(file: Node, header: Header) -> CheckResult:
    """Repair an image whose dirty bit is set, before it is written to. Raises Error if it cannot be made consistent."""
    result = check(file, header, "all")
    if result.failure is not None or result.check_errors or result.corruptions:
        raise Error("Could not repair dirty image: Input/output error", filename=file.filename, errno=errno.EIO)
    return result


def _check(state: Check) -> None:
    from .copied import check_copied
    from .references import read_snapshots

    result, repair = state.result, state.repair
    state.snapshots = read_snapshots(state)
    _count_and_compare(state)
    if repair:
        if state.rebuild and repair == "all":
            _rebuild(state)
        elif state.rebuild:
            result.say("ERROR need to rebuild refcount structures")
            raise GiveUp("Input/output error", filename=state.file.filename, errno=errno.EIO)
        elif state.mismatches:
            _compare_again(state)
    check_copied(state, repair == "all" or repair == "leaks" and result.clean)
    result.image_end_offset = (state.highest + 1) << state.cluster_bits
    _finish_snapshots(state)
    if repair and result.clean_but_leaks:
        _clear_bits(state)


def _count_and_compare(state: Check) -> None:
    """Count all references and compare, window by window, without mending."""
    state.first, state.highest, state.mismatches = True, -1, False
    while True:
        state.walk()
        if state.first:
            state.before = (state.result.corruptions, state.result.leaks)
        state.compare()
        state.first = False
        if not state.tally.advance():
            return


def _compare_again(state: Check) -> None:
    """Compare once more, and mend."""
