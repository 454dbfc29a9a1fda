# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The course of a check and of a repair of a qcow2 image (https://www.qemu.org/docs/master/interop/qcow2.html).

At every moment of a repair the image is at most as damaged as it was: refcounts go straight to what was counted, new refcount
structures are complete and flushed before the header names them, and what they replace is freed after that.
"""

from __future__ import annotations

import errno

from ...tally import CheckResult
from ...errors import Corrupt, Error, Finding
from .check import Check, GiveUp, failed
from .header import BITMAPS, CORRUPT, DIRTY, EXT_BITMAPS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .image import Qcow2


def check(image: Qcow2, repair: str = "") -> CheckResult:
    """Check `image`; with `repair` "leaks" or "all" mend what it finds, in QEMU's steps and words.

    Whatever `image` has cached must have been written; after a repair it is dropped. Damage ends up in the result, which has
    a `failure` where the check had to be given up. Raises OSError as the host does.
    """
    result = CheckResult()
    try:
        _check(Check(image, repair, result))
    except GiveUp as exc:
        result.failure = exc
    finally:
        if repair:
            image.forget_metadata()
    return result


def repair_dirty(image: Qcow2) -> CheckResult:
    """Repair an image whose dirty bit is set, before it is written to. Raises Error if it cannot be made consistent."""
    result = check(image, "all")
    image.warnings += [Finding(line) for line in result.messages]
    if result.failure is not None or result.check_errors or result.corruptions:
        raise Error("Could not repair dirty image: Input/output error", filename=image.filename, errno=errno.EIO)
    return result


def _check(state: Check) -> None:
    result, repair = state.result, state.repair
    header = state.header
    if header.autoclear_features & BITMAPS and header.extension(EXT_BITMAPS) is not None:
        from .references import read_bitmaps

        state.bitmaps = read_bitmaps(state)
    if header.nb_snapshots or header.snapshots_offset:
        from .references import read_snapshots

        state.snapshots = read_snapshots(state)
    _count_and_compare(state)
    if repair:
        if state.rebuild and repair == "all":
            _rebuild(state)
        elif state.rebuild:
            result.say("ERROR need to rebuild refcount structures")
            raise failed(state)
        elif state.corruptions or state.leaks or result.corruptions or result.leaks:
            _compare_again(state)
    result.leaks += state.leaks
    result.corruptions += state.corruptions
    result.image_end_offset = (state.highest + 1) << state.cluster_bits
    if state.mismatches or state.tally.shared or result.check_errors or not state.copied_certain:
        from .copied import check_copied

        check_copied(state, repair == "all" or repair == "leaks" and result.clean)
    _finish_snapshots(state)
    if repair and not result.check_errors and not result.corruptions:
        _clear_bits(state)


def _count_and_compare(state: Check) -> None:
    """Count all references and compare, window by window, without mending."""
    state.first = True
    _restart(state)
    while True:
        state.walk()
        state.compare()
        state.first = False
        if not state.tally.advance():
            return


def _restart(state: Check) -> None:
    """Forget what earlier comparisons found."""
    state.highest = state.result.check_errors = 0
    state.corruptions = state.leaks = state.mismatches = 0


def _compare_again(state: Check) -> None:
    """Compare once more, and mend."""
    from .mend import BlockEditor

    _restart(state)
    state.quiet = True
    if state.tally.low:
        state.tally = state.new_tally()
        state.walk()
    edit = BlockEditor(state, state.repair == "all")
    while True:
        state.compare(edit)
        if not state.tally.advance():
            break
        state.walk()
    state.quiet = False
    edit.close()


# -- rebuilding ----------------------------------------------------------------------------------------------------


def _rebuild(state: Check) -> None:
    """Write new refcount structures, then check again and free what they replaced."""
    from .mend import BlockEditor
    from .rebuild import rebuild_structures

    result = state.result
    before = (result.corruptions + state.corruptions, result.leaks + state.leaks)
    result.say("Rebuilding refcount structure")
    rebuild_structures(state)
    state.rebuild = False
    result.corruptions = result.leaks = result.check_errors = 0
    fixed = result.leaks_fixed, result.corruptions_fixed
    state.guard = None
    state.measure_file()
    state.read_refcount_table()
    state.tally = state.new_tally()
    state.first = True
    _restart(state)
    edit = BlockEditor(state, False)
    while True:
        state.walk()
        state.compare(edit)
        state.first = False
        if not state.tally.advance():
            break
    edit.close()
    if state.rebuild:
        result.say("ERROR rebuilt refcount structure is still broken")
    result.leaks_fixed, result.corruptions_fixed = fixed
    result.corruptions_fixed += max(0, before[0] - result.corruptions)
    result.leaks_fixed += max(0, before[1] - result.leaks - state.leaks)


# -- the end of a repair -------------------------------------------------------------------------------------------


def _finish_snapshots(state: Check) -> None:
    """Write a mended snapshot table, and count what was or is wrong with the old one."""
    result = state.result
    if not state.snapshots_damaged:
        return
    if state.repair == "all" and not result.check_errors:
        from .references import write_snapshots

        try:
            write_snapshots(state)
        except Corrupt as exc:
            result.say(str(exc))
            result.say("ERROR failed to update snapshot table: Input/output error")
            raise failed(state) from exc
        result.corruptions_fixed += state.snapshots_damaged
    else:
        result.corruptions += state.snapshots_damaged


def _clear_bits(state: Check) -> None:
    """The image is consistent: it is neither dirty nor corrupt any more."""
    header = state.header
    if header.version >= 3 and header.incompatible_features & (DIRTY | CORRUPT):
        state.file.flush()
        header.incompatible_features &= ~(DIRTY | CORRUPT)
        state.image.update_record()
