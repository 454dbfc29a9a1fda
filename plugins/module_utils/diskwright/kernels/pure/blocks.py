# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Pure twins of the kernels that move and compare plain bytes (https://docs.python.org/3/library/os.html#os.preadv)."""

from __future__ import annotations

import errno
import os

from .buffers import INT64_MAX, ZEROES, append_flag_runs, append_run, is_zero, readable, within, within_limit, writable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import ReadableBuffer

    Transfer = tuple[int, int, int, int]

_FD_MAX = 2**31 - 1
_PIECE = 65536  # compared at a time
_GALLOP = 1 << 20  # the longest stretch tested for zero in one go
_BIT_PIECE = 4096  # bytes of a bitmap that are expanded at a time

_CRC_POLYNOMIAL = 0x82F63B78
_CRC_PIECE = 2048  # bytes that are tested for zero at a time
_crc_table: list[int] = []


def _check_transfers(transfers: list[Transfer], size: int) -> None:
    len(transfers)  # a TypeError for an iterator, which the checks would use up
    for fd, offset, at, length in transfers:
        if not 0 <= fd <= _FD_MAX:
            raise ValueError("file descriptor is out of range")
        if length < 0 or offset < 0 or offset + length >= INT64_MAX:
            raise ValueError("file range is out of range")
        if at < 0 or at + length > size:
            raise ValueError("range is outside the buffer")


def _pread_into(fd: int, view: memoryview, offset: int) -> int:
    data = os.pread(fd, len(view), offset)
    view[: len(data)] = data
    return len(data)


def _preadv_into(fd: int, view: memoryview, offset: int) -> int:
    return os.preadv(fd, (view,), offset)


_read_into = _preadv_into if hasattr(os, "preadv") else _pread_into


def gather(reads: list[Transfer], buffer: ReadableBuffer) -> None:
    """Read ranges of files into ranges of a buffer; zeroes past the end of a file."""
    view = writable(buffer)
    _check_transfers(reads, len(view))
    for fd, offset, at, length in reads:
        end = at + length
        while at < end:
            done = _read_into(fd, view[at:end], offset)
            if not done:
                break
            at += done
            offset += done
        while at < end:
            piece = min(end - at, len(ZEROES))
            view[at : at + piece] = ZEROES[:piece]
            at += piece


def scatter(writes: list[Transfer], buffer: ReadableBuffer) -> None:
    """Write ranges of a buffer to ranges of files."""
    view = readable(buffer)
    _check_transfers(writes, len(view))
    for fd, offset, at, length in writes:
        end = at + length
        while at < end:
            done = os.pwrite(fd, view[at:end], offset)
            if not done:  # a device that takes nothing and says nothing would keep us here for ever
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            at += done
            offset += done


def _alike_end(at: int, end: int, unit: int, alike: Callable[[int, int], bool]) -> int:
    """The end of the units from `at` on that are alike: stretches twice as long until one fails, then half as long."""
    size = unit
    grow = True
    while at < end:
        stop = min(at + size, end)
        if alike(at, stop):
            at = stop
        elif size == unit:
            break
        else:
            grow = False
        if grow:
            size = max(unit, min(size * 2, _GALLOP // unit * unit))
        else:
            size = max(unit, size // 2 // unit * unit)
    return at


def _unlike_runs(samples: bytes, offset: int, end: int, unit: int, alike: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Runs of units that are not alike; `samples` has a byte for each unit, and one other than zero proves that the unit is not."""
    runs = []
    start = offset
    at = samples.find(0)
    while at >= 0:
        position = offset + at * unit
        stop = _alike_end(position, end, unit, alike)
        if stop == position:
            at = samples.find(0, at + 1)
            continue
        if position > start:
            runs.append((start, position - start))
        start = stop
        if stop >= end:
            break
        at = samples.find(0, (stop - offset) // unit)
    if start < end:
        runs.append((start, end - start))
    return runs


def nonzero_runs(buffer: ReadableBuffer, offset: int, length: int, unit: int) -> list[tuple[int, int]]:
    """Runs of units that hold a byte other than zero."""
    view = readable(buffer)
    if unit <= 0:
        raise ValueError("unit is not positive")
    within(offset, length, len(view))
    end = offset + length
    if unit >= length:  # a slice's step must fit a machine word
        return [] if is_zero(view, offset, end) else [(offset, length)]
    return _unlike_runs(bytes(view[offset:end:unit]), offset, end, unit, lambda start, stop: is_zero(view, start, stop))


def _equality(a: ReadableBuffer, b: ReadableBuffer, left: memoryview, right: memoryview) -> Callable[[int, int], bool]:
    """A function that tells whether the bytes of a range are equal, by memcmp."""
    for whole, other in ((a, right), (b, left)):
        if isinstance(whole, (bytes, bytearray)):
            starts_with = whole.startswith  # no copy: it compares with the buffer of a slice of the other
            return lambda start, stop: starts_with(other[start:stop], start)

    def equal(start: int, stop: int) -> bool:
        while stop - start > _PIECE:
            if not bytes(left[start : start + _PIECE]).startswith(right[start : start + _PIECE]):
                return False
            start += _PIECE
        return bytes(left[start:stop]).startswith(right[start:stop])

    return equal


def _same_length(left: memoryview, right: memoryview) -> int:
    if len(left) != len(right):
        raise ValueError("buffers differ in length")
    return len(left)


def first_difference(a: ReadableBuffer, b: ReadableBuffer) -> int:
    """The index of the first byte that differs, or -1."""
    left, right = readable(a), readable(b)
    end = _same_length(left, right)
    equal = _equality(a, b, left, right)
    start = 0
    while start < end and equal(start, min(start + _PIECE, end)):
        start += _PIECE
    if start >= end:
        return -1
    stop = min(start + _PIECE, end)
    while stop - start > 256:
        middle = (start + stop) // 2
        if equal(start, middle):
            start = middle
        else:
            stop = middle
    difference = int.from_bytes(left[start:stop], "little") ^ int.from_bytes(right[start:stop], "little")
    return start + ((difference & -difference).bit_length() - 1) // 8


def difference_runs(a: ReadableBuffer, b: ReadableBuffer, unit: int) -> list[tuple[int, int]]:
    """Runs of units in which two buffers differ."""
    left, right = readable(a), readable(b)
    if unit <= 0:
        raise ValueError("unit is not positive")
    end = _same_length(left, right)
    equal = _equality(a, b, left, right)
    if unit >= end:
        return [] if equal(0, end) else [(0, end)]
    samples = int.from_bytes(bytes(left[::unit]), "little") ^ int.from_bytes(bytes(right[::unit]), "little")
    return _unlike_runs(samples.to_bytes((end + unit - 1) // unit, "little"), 0, end, unit, equal)


def _bit_flags(data: bytes) -> bytes:
    """One byte of 0 or 1 for each bit."""
    expanded = bytearray(len(data) * 8)
    for bit in range(8):
        expanded[bit::8] = data.translate(bytes((value >> bit) & 1 for value in range(256)))
    return bytes(expanded)


def bit_runs(bitmap: ReadableBuffer, start: int, count: int, limit: int) -> list[tuple[int, int]]:
    """Runs of set bits."""
    view = readable(bitmap)
    within(start, count, len(view) * 8)
    within_limit(limit)
    runs: list[tuple[int, int]] = []
    end = start + count
    ones = b""
    for first in range(start // 8, (end + 7) // 8 if count else 0, _BIT_PIECE):
        piece = bytes(view[first : min(first + _BIT_PIECE, (end + 7) // 8)])
        if ZEROES.startswith(piece):
            continue
        low, high = max(start, first * 8), min(end, (first + len(piece)) * 8)
        ones = ones or b"\xff" * _BIT_PIECE
        if ones.startswith(piece):
            more = append_run(runs, low, high - low, limit)
        else:
            more = append_flag_runs(runs, _bit_flags(piece)[low - first * 8 : high - first * 8], 1, low, limit)
        if not more:
            break
    return runs


def _crc_times(left: int, right: int) -> int:
    """The product of two polynomials modulo that of CRC-32C, the coefficient of x**0 in the highest bit."""
    product = 0
    for bit in range(31, -1, -1):
        if left >> bit & 1:
            product ^= right
        right = right >> 1 ^ (_CRC_POLYNOMIAL if right & 1 else 0)
    return product


def _crc_zeroes(crc: int, count: int) -> int:
    """What a CRC register becomes by `count` zero bytes: its product with x**(8 * count)."""
    power = 1 << 23  # x**8
    while count:
        if count & 1:
            crc = _crc_times(power, crc)
        power = _crc_times(power, power)
        count >>= 1
    return crc


def crc32c(buffer: ReadableBuffer, crc: int = 0) -> int:
    """CRC-32C of a buffer; long runs of zeroes, of which metadata mostly consists, cost nothing."""
    view = readable(buffer)
    if not 0 <= crc <= 0xFFFFFFFF:
        raise ValueError("crc is out of range")
    if not _crc_table:
        entries = []
        for value in range(256):
            for bit in range(8):
                value = value >> 1 ^ (_CRC_POLYNOMIAL if value & 1 else 0)
            entries.append(value)
        _crc_table[:] = entries  # at once: another thread may be here too
    table = _crc_table
    crc ^= 0xFFFFFFFF
    at, end = 0, len(view)
    while at < end:
        stop = _alike_end(at, end, _CRC_PIECE, lambda start, stop: is_zero(view, start, stop))
        if stop > at:
            crc = _crc_zeroes(crc, stop - at)
            at = stop
        for byte in view[at : at + _CRC_PIECE]:
            crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
        at += _CRC_PIECE
    return crc ^ 0xFFFFFFFF
