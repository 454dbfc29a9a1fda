# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Pure twins of the kernels that read mapping tables (https://www.qemu.org/docs/master/interop/qcow2.html#cluster-mapping)."""

from __future__ import annotations

import sys
from array import array

from ..contract import COMPRESSED, COPIED, INVALID, NORMAL, UNALLOCATED, ZERO_ALLOC, ZERO_PLAIN
from .buffers import INT64_MAX, readable, within, within_limit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    Run = tuple[int, int, int, int]

_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_COPIED_BIT = 1 << 63
_COMPRESSED_BIT = 1 << 62
_DESCRIPTOR_MASK = _COMPRESSED_BIT - 1
_HAS_OFFSET = NORMAL & ZERO_ALLOC
_SUBCLUSTERS = 32
_LOW32 = 0xFFFFFFFF

_CLUSTER_MIN = 512
_CLUSTER_MAX = 2 << 20

_PIECE = 2048  # entries that are verified at a time: larger integers make malloc return memory and fetch it again
_SHORT = 24  # entries that are walked one by one before anything cleverer is tried

_LANES_MAX = 16
_lanes: dict[tuple[int, int], int] = {}
_PERIOD_BITS = 17  # bytes that repeat after at most so many entries, as a power of 2, are compared with a period
_periods: dict[tuple[int, int], tuple[int, bytes]] = {}


def _big_array(raw: bytes, width: int) -> array[int]:
    """Big-endian entries as native ones."""
    entries = array("Q" if width == 8 else "I", raw)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def _big_bytes(entries: array[int]) -> bytes:
    """Native entries as big-endian bytes."""
    if sys.byteorder == "little":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


def _steps(width: int, step: int) -> int:
    """An integer that reads as a big-endian table of _PIECE entries, each of which is `step`."""
    key = (width, step)
    if key not in _lanes:
        if len(_lanes) >= _LANES_MAX:
            _lanes.clear()
        _lanes[key] = int.from_bytes(step.to_bytes(width, "big") * _PIECE, "big")
    return _lanes[key]


def _period(shift: int, step_bits: int) -> tuple[int, bytes]:
    """The bits from `shift` on of 0, 1 << step_bits, 2 << step_bits, ...: the length of a period, and periods for a table of 8192 entries."""
    key = (shift, step_bits)
    if key not in _periods:
        if len(_periods) >= _LANES_MAX:
            _periods.clear()
        if shift < step_bits:
            period = bytes(value << step_bits - shift & 0xFF for value in range(1 << shift + 8 - step_bits))
        else:
            period = b"".join(bytes((value,)) * (1 << shift - step_bits) for value in range(256))
        _periods[key] = len(period), period * (-(-8192 // len(period)) + 1)
    return _periods[key]


def _is_ascending_by_bytes(raw: bytes, first: int, width: int, start: int, end: int, step_bits: int) -> bool:
    """Whether entries start..end are first, first + (1 << step_bits), ...: looks at one byte of all entries at a time."""
    count = end - start
    if first + (count - 1 << step_bits) >> width * 8:
        return False
    low = first & (1 << step_bits) - 1
    for byte in range(width):
        column = raw[start * width + byte : end * width : width]
        shift = (width - 1 - byte) * 8
        if shift + 8 <= step_bits:
            if column != bytes((low >> shift & 0xFF,)) * count:
                return False
        elif shift + 8 - step_bits <= _PERIOD_BITS and not low >> shift:
            length, periods = _period(shift, step_bits)
            phase = first >> step_bits & length - 1
            if phase + count > len(periods):
                periods = periods[:length] * -(-(phase + count) // length)
            if column != periods[phase : phase + count]:
                return False
        else:
            at = 0
            while at < count:  # as long as the byte stays the same
                value = first + (at << step_bits) >> shift
                stop = min(count, max(at + 1, ((value + 1 << shift) - first + (1 << step_bits) - 1) >> step_bits))
                if column[at:stop] != bytes((value & 0xFF,)) * (stop - at):
                    return False
                at = stop
    return True


def _is_ascending(raw: bytes, entries: array[int], width: int, start: int, end: int, step: int) -> bool:
    """Whether each of entries start..end exceeds the one before it by `step`."""
    if not step:
        return raw.startswith(memoryview(raw)[(start + 1) * width : end * width], start * width)
    if not step & step - 1:
        return _is_ascending_by_bytes(raw, entries[start], width, start, end, step.bit_length() - 1)
    first = entries[start]
    bits = width * 8
    steps = _steps(width, step)
    while start < end:
        count = min(end - start, _PIECE)
        if entries[start] != first or entries[start + count - 1] != first + (count - 1) * step:
            return False
        # All differences at once: the table less itself moved on by one entry. No two tables that end alike give the same result.
        table = int.from_bytes(raw[start * width : (start + count) * width], "big")
        if table - (table >> bits) != (first << bits * (count - 1)) + (steps >> bits * (_PIECE - count + 1)):
            return False
        start += count
        first += count * step
    return True


def _run_length(raw: bytes, entries: array[int], width: int, start: int, end: int, step: int) -> int:
    """How many entries from `start` on, and before `end`, ascend by `step`."""
    first = expected = entries[start]
    at = start + 1
    stop = min(start + _SHORT, end)
    while at < stop:
        expected += step
        if entries[at] != expected:
            return at - start
        at += 1
    if at >= end:
        return end - start
    # Find the likely end by looking at a few entries, then verify all of them in bulk.
    good, bad, stride = at - 1, end, _SHORT
    while good + stride < bad:
        if entries[good + stride] != first + (good + stride - start) * step:
            bad = good + stride
            break
        good += stride
        stride *= 2
    while bad - good > 1:
        middle = (good + bad) // 2
        if entries[middle] == first + (middle - start) * step:
            good = middle
        else:
            bad = middle
    if _is_ascending(raw, entries, width, start, bad, step):
        return bad - start
    while at < bad and entries[at] == first + (at - start) * step:
        at += 1
    return at - start


def table_runs(
    table: ReadableBuffer, width: int, big_endian: bool, start: int, count: int, step: int, limit: int
) -> list[tuple[int, int, int, int]]:
    """Runs of entries that are equal or ascend by `step`."""
    view = readable(table)
    if width not in (4, 8):
        raise ValueError("width is neither 4 nor 8")
    within(start, count, len(view) // width)
    if not 0 <= step < INT64_MAX:
        raise ValueError("step is out of range")
    within_limit(limit)
    raw = bytes(view[start * width : (start + count) * width])
    if not big_endian:
        swapped = array("Q" if width == 8 else "I", raw)
        swapped.byteswap()
        raw = swapped.tobytes()
    entries = _big_array(raw, width)
    runs: list[Run] = []
    at = 0
    while at < count and len(runs) < limit:
        value = entries[at]
        length, used = 1, 0
        if at + 1 < count:
            following = entries[at + 1]
            if following == value:
                length = _run_length(raw, entries, width, at, count, 0)
            elif following == value + step:
                length, used = _run_length(raw, entries, width, at, count, step), step
        runs.append((start + at, length, value, used))
        at += length
    return runs


def _append_run(runs: list[Run], index: int, count: int, kind: int, value: int, pitch: int, limit: int) -> bool:
    """Append a run, or join it to the last one if it goes on where that ends; False, and nothing done, if that would exceed the limit."""
    if runs:
        last_index, last_count, last_kind, last_value = runs[-1]
        if last_kind == kind and value == (last_value + last_count * pitch if kind & _HAS_OFFSET else 0):
            runs[-1] = (last_index, last_count + count, kind, last_value)
            return True
    if len(runs) >= limit:
        return False
    runs.append((index, count, kind, value))
    return True


def _check_l2(view: memoryview, entry_size: int, start: int, count: int, cluster_size: int, limit: int) -> None:
    within(start, count, len(view) // entry_size)
    if not _CLUSTER_MIN <= cluster_size <= _CLUSTER_MAX or cluster_size & (cluster_size - 1):
        raise ValueError("cluster size is out of range")
    within_limit(limit)


def l2_runs(table: ReadableBuffer, start: int, count: int, cluster_size: int, data_file: bool, limit: int) -> list[tuple[int, int, int, int]]:
    """Runs of standard L2 entries."""
    view = readable(table)
    _check_l2(view, 8, start, count, cluster_size, limit)
    raw = bytes(view[start * 8 : (start + count) * 8])
    entries = _big_array(raw, 8)
    runs: list[Run] = []
    at = 0
    next_kind = next_value = -1  # what would go on where the last run ends
    while at < count:
        entry = entries[at]
        value = step = 0
        if entry & _COMPRESSED_BIT:
            kind, value = COMPRESSED, entry & _DESCRIPTOR_MASK
        elif entry & _OFFSET_MASK or (data_file and entry & _COPIED_BIT and not entry & 1):
            kind, value, step = (ZERO_ALLOC if entry & 1 else NORMAL), entry & _OFFSET_MASK, cluster_size
            if entry & _COPIED_BIT:
                kind += COPIED
        else:
            kind = ZERO_PLAIN if entry & 1 else UNALLOCATED
        length = 1
        if at + 1 < count and entries[at + 1] == entry + step and kind != COMPRESSED:
            end = count
            if step:  # beyond, the offset would carry into a reserved bit
                end = min(end, at + (_OFFSET_MASK - value) // step + 1)
            length = _run_length(raw, entries, 8, at, end, step)
        if kind == next_kind and value == next_value:  # only reserved bits differ
            index, run_length, kind, run_value = runs[-1]
            runs[-1] = (index, run_length + length, kind, run_value)
        elif len(runs) >= limit:
            break
        else:
            runs.append((start + at, length, kind, value))
        next_kind, next_value = (kind, value + length * step) if kind != COMPRESSED else (-1, -1)
        at += length
    return runs


def _append_subclusters(runs: list[Run], index: int, entry: int, bitmap: int, hosted: bool, cluster_size: int, limit: int) -> bool:
    """Append the runs of the 32 subclusters of one entry."""
    pitch = cluster_size // _SUBCLUSTERS
    copied = COPIED if entry & _COPIED_BIT else 0
    data, zero = bitmap & _LOW32, bitmap >> 32
    if data & (zero if hosted else data):
        return _append_run(runs, index, _SUBCLUSTERS, INVALID, 0, pitch, limit)
    at = 0
    while at < _SUBCLUSTERS:
        kind = UNALLOCATED
        same = ~(data | zero) >> at
        if data >> at & 1:
            kind, same = NORMAL + copied, data >> at
        elif zero >> at & 1:
            kind, same = ZERO_ALLOC + copied if hosted else ZERO_PLAIN, zero >> at
        length = min((~same & (same + 1)).bit_length() - 1, _SUBCLUSTERS - at) if same != -1 else _SUBCLUSTERS - at
        value = (entry & _OFFSET_MASK) + at * pitch if kind & _HAS_OFFSET else 0
        if not _append_run(runs, index + at, length, kind, value, pitch, limit):
            return False
        at += length
    return True


def l2_runs_extended(
    table: ReadableBuffer, start: int, count: int, cluster_size: int, data_file: bool, limit: int
) -> list[tuple[int, int, int, int]]:
    """Runs of the subclusters of extended L2 entries."""
    view = readable(table)
    _check_l2(view, 16, start, count, cluster_size, limit)
    words = _big_array(bytes(view[start * 16 : (start + count) * 16]), 8)
    entries, bitmaps = words[0::2], words[1::2]
    raw_entries, raw_bitmaps = _big_bytes(entries), _big_bytes(bitmaps)
    runs: list[Run] = []
    at = 0
    while at < count:
        entry, bitmap = entries[at], bitmaps[at]
        index = (start + at) * _SUBCLUSTERS
        if entry & _COMPRESSED_BIT:
            if len(runs) >= limit:
                break
            runs.append((index, _SUBCLUSTERS, COMPRESSED, entry & _DESCRIPTOR_MASK))
            at += 1
            continue
        value = entry & _OFFSET_MASK
        hosted = bool(value or (data_file and entry & _COPIED_BIT))
        length = 1
        if bitmap == (_LOW32 if hosted else 0):  # whole clusters of data, or of nothing
            step = cluster_size if hosted else 0
            end = min(count, at + (_OFFSET_MASK - value) // step + 1) if hosted else count
            if at + 1 < end and entries[at + 1] == entry + step and bitmaps[at + 1] == bitmap:
                length = _run_length(raw_bitmaps, bitmaps, 8, at, end, 0)
                length = _run_length(raw_entries, entries, 8, at, at + length, step)
            kind = (COPIED if entry & _COPIED_BIT else 0) + NORMAL if hosted else UNALLOCATED
            more = _append_run(runs, index, length * _SUBCLUSTERS, kind, value if hosted else 0, cluster_size // _SUBCLUSTERS, limit)
        else:
            more = _append_subclusters(runs, index, entry, bitmap, hosted, cluster_size, limit)
        if not more:
            break
        at += length
    return runs
