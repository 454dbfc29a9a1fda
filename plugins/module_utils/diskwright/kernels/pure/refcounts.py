# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Pure twins of the kernels that read, write and count refcounts (https://www.qemu.org/docs/master/interop/qcow2.html#host-cluster-management)."""

from __future__ import annotations

import sys
from array import array

from .buffers import INT64_MAX, ZEROES, append_flag_runs, flags, readable, within, within_limit, writable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import ReadableBuffer, WriteableBuffer

_ORDER_MAX = 6
_PIECE = 4096  # entries that are looked at in one go
_FREE_PIECE = 32768
_LITTLE = sys.byteorder == "little"

_ones: dict[str, bytes] = {}


def _check_order(order: int) -> None:
    if not 0 <= order <= _ORDER_MAX:
        raise ValueError("refcount order is out of range")


def _check_block(view: memoryview, order: int, start: int, count: int) -> None:
    _check_order(order)
    within(start, count, (len(view) * 8) >> order)


def _lane(byte: int) -> int:
    """Where byte number `byte` of a native 64-bit item lies, 0 being the least significant."""
    return byte if _LITTLE else 7 - byte


def _field(order: int, index: int) -> bytes:
    """A translation of a byte to the field number `index` of 2**order bits in it."""
    mask = (1 << (1 << order)) - 1
    return bytes(value >> (index << order) & mask for value in range(256))


def _unpack(view: memoryview, order: int, start: int, count: int) -> array[int]:
    values = array("Q")
    if order == _ORDER_MAX:
        values.frombytes(view[start * 8 : (start + count) * 8])
        if _LITTLE:
            values.byteswap()
        return values
    if order < 3:
        per_byte = 8 >> order
        first, end = start // per_byte, -(-(start + count) // per_byte)
        raw = bytes(view[first:end])
        widened = bytearray(len(raw) * per_byte * 8)
        for index in range(per_byte):
            widened[index * 8 + _lane(0) :: per_byte * 8] = raw.translate(_field(order, index))
        skip = start - first * per_byte
        values.frombytes(memoryview(widened)[skip * 8 : (skip + count) * 8])
        return values
    width = 1 << (order - 3)
    raw = bytes(view[start * width : (start + count) * width])
    widened = bytearray(count * 8)
    for byte in range(width):
        widened[_lane(byte) :: 8] = raw[width - 1 - byte :: width]
    values.frombytes(widened)
    return values


def refcounts_unpack(block: ReadableBuffer, order: int, start: int, count: int) -> array[int]:
    """Refcounts as native 64-bit integers."""
    view = readable(block)
    _check_block(view, order, start, count)
    return _unpack(view, order, start, count)


def refcounts_pack(values: Sequence[int], order: int) -> bytes:
    """Refcounts as they are stored."""
    _check_order(order)
    try:
        # An array made from bytes would take them for items in native form.
        items = array("Q", list(values) if isinstance(values, (bytes, bytearray)) else values)
    except OverflowError:
        raise OverflowError("refcount does not fit") from None
    if order < _ORDER_MAX and items and max(items) >> (1 << order):
        raise OverflowError("refcount does not fit")
    if (len(items) << order) % 8:
        raise ValueError("refcounts do not fill whole bytes")
    if order == _ORDER_MAX:
        if _LITTLE:
            items = items[:]
            items.byteswap()
        return items.tobytes()
    raw = items.tobytes()
    if order < 3:
        per_byte = 8 >> order
        packed = 0
        for index in range(per_byte):
            packed |= int.from_bytes(raw[index * 8 + _lane(0) :: per_byte * 8], "little") << (index << order)
        return packed.to_bytes(len(items) // per_byte, "little")
    width = 1 << (order - 3)
    stored = bytearray(len(items) * width)
    for byte in range(width):
        stored[width - 1 - byte :: width] = raw[_lane(byte) :: 8]
    return bytes(stored)


def _used(view: memoryview, order: int, start: int, count: int) -> bytes:
    """One byte of 0 or 1 for each refcount that is zero or not."""
    if order < 3:
        per_byte = 8 >> order
        first, end = start // per_byte, -(-(start + count) // per_byte)
        raw = bytes(view[first:end])
        expanded = bytearray(len(raw) * per_byte)
        for index in range(per_byte):
            expanded[index::per_byte] = raw.translate(flags(_field(order, index)))
        skip = start - first * per_byte
        return bytes(expanded[skip : skip + count])
    width = 1 << (order - 3)
    raw = bytes(view[start * width : (start + count) * width])
    if width == 1:
        return flags(raw)
    merged = 0
    for byte in range(width):
        merged |= int.from_bytes(raw[byte::width], "little")
    return flags(merged.to_bytes(count, "little"))


def refcount_free_runs(block: ReadableBuffer, order: int, start: int, count: int, limit: int) -> list[tuple[int, int]]:
    """Runs of refcounts that are zero."""
    view = readable(block)
    _check_block(view, order, start, count)
    within_limit(limit)
    runs: list[tuple[int, int]] = []
    end = start + count
    while start < end:
        piece = min(end - start, _FREE_PIECE)
        if not append_flag_runs(runs, _used(view, order, start, piece), 0, start, limit):
            break
        start += piece
    return runs


def _items(counts: ReadableBuffer, view: memoryview) -> memoryview:
    """A buffer of native H, I or Q items as such; `view` are its bytes."""
    code = memoryview(counts).format.lstrip("@")
    if code not in ("H", "I", "Q"):
        raise ValueError("counts are not native H, I or Q items")
    return view.cast(code)  # type: ignore[call-overload, no-any-return]


def _add_one(items: memoryview, raw: memoryview, start: int, end: int) -> int:
    """Add one to items start..end, which are at most _PIECE; returns how many were at their largest value."""
    code, width = items.format, items.itemsize
    if code not in _ones:
        _ones[code] = (array(code, [1]) * _PIECE).tobytes()
    low, high = start * width, end * width
    if ZEROES.startswith(raw[low:high]):
        raw[low:high] = _ones[code][: high - low]
        return 0
    most = (1 << (8 * width)) - 1
    value = items[start]
    if bytes(raw[low : high - width]).startswith(raw[low + width : high]):  # all are equal
        if value == most:
            return end - start
        raw[low:high] = (array(code, [value + 1]) * (end - start)).tobytes()
        return 0
    lost = 0
    for index in range(start, end):
        value = items[index]
        if value == most:
            lost += 1
        else:
            items[index] = value + 1
    return lost


def tally(counts: WriteableBuffer, ranges: list[tuple[int, int]]) -> int:
    """Add one to each item of each range; returns how many stayed at their largest value."""
    raw = writable(counts)
    items = _items(counts, raw)
    total = len(items)
    len(ranges)  # a TypeError for an iterator, which the checks would use up
    for start, count in ranges:
        if not (-INT64_MAX < start < INT64_MAX and 0 <= count < INT64_MAX):
            raise ValueError("range is out of range")
    most = (1 << (8 * items.itemsize)) - 1
    lost = 0
    for start, count in ranges:
        if count == 1:
            if 0 <= start < total:
                value = items[start]
                if value == most:
                    lost += 1
                else:
                    items[start] = value + 1
            continue
        end = min(start + count, total)
        start = max(start, 0)
        while start < end:
            stop = min(start + _PIECE, end)
            lost += _add_one(items, raw, start, stop)
            start = stop
    return lost


def refcount_mismatches(
    block: ReadableBuffer, order: int, counts: ReadableBuffer, start: int, count: int, limit: int
) -> list[tuple[int, int, int]]:
    """Refcounts that differ from what was counted."""
    view = readable(block)
    _check_order(order)
    raw = readable(counts)
    items = _items(counts, raw)
    within(0, count, (len(view) * 8) >> order)
    within(start, count, len(items))
    within_limit(limit)
    found: list[tuple[int, int, int]] = []
    width = items.itemsize
    for first in range(0, count, _PIECE):
        piece = min(count - first, _PIECE)
        low = start + first
        counted_raw = raw[low * width : (low + piece) * width]
        if 8 * width == 1 << order:
            stored_items = array(items.format, bytes(view[first * width : (first + piece) * width]))
            if _LITTLE:
                stored_items.byteswap()
            if stored_items.tobytes().startswith(counted_raw):
                continue
        elif ZEROES.startswith(counted_raw) and not any(_used(view, order, first, piece)):
            continue
        stored, counted = _unpack(view, order, first, piece).tolist(), items[low : low + piece].tolist()
        if stored == counted:
            continue
        for index in range(piece):
            if stored[index] != counted[index]:
                if len(found) >= limit:
                    return found
                found.append((first + index, stored[index], counted[index]))
    return found
