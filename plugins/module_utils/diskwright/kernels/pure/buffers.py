# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Checked views of arguments, and runs of flags, which the pure kernels share (https://docs.python.org/3/c-api/buffer.html)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

INT64_MAX = 2**63 - 1

ZEROES = bytes(65536)  # small enough to stay in a core's cache

_TO_FLAG = b"\0" + b"\1" * 255


def readable(buffer: ReadableBuffer) -> memoryview:
    """The bytes of a buffer; ValueError unless they are contiguous."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError("buffer is not C-contiguous")
    return view.cast("B")


def writable(buffer: ReadableBuffer) -> memoryview:
    """The bytes of a buffer; ValueError unless they are contiguous and may be written."""
    view = readable(buffer)
    if view.readonly:
        raise ValueError("buffer is read-only")
    return view


def within(start: int, count: int, total: int) -> None:
    """ValueError unless start..start+count lies in 0..total."""
    if start < 0 or count < 0 or start + count > total:
        raise ValueError("range is outside the buffer")


def within_limit(limit: int) -> None:
    """ValueError for a negative number of results."""
    if limit < 0:
        raise ValueError("limit is negative")


def is_zero(view: memoryview, start: int, end: int) -> bool:
    """Whether view[start:end] holds zero bytes only."""
    # bytes.startswith compares with any buffer by memcmp and without a copy; == on a memoryview goes item by item.
    zeroes = ZEROES
    size = len(zeroes)
    while end - start > size:
        if not zeroes.startswith(view[start : start + size]):
            return False
        start += size
    return zeroes.startswith(view[start:end])


def flags(values: bytes) -> bytes:
    """One byte of 0 or 1 for each byte that is zero or not."""
    return values.translate(_TO_FLAG)


def append_flag_runs(runs: list[tuple[int, int]], flag_bytes: bytes, wanted: int, base: int, limit: int) -> bool:
    """Append the runs of `wanted` (0 or 1) in `flag_bytes`, the first of which has index `base`, joined to the last run; False once at the limit."""
    end = len(flag_bytes)
    at = flag_bytes.find(wanted)
    while at >= 0:
        stop = flag_bytes.find(1 - wanted, at)
        if stop < 0:
            stop = end
        if not append_run(runs, base + at, stop - at, limit):
            return False
        at = flag_bytes.find(wanted, stop)
    return True


def append_run(runs: list[tuple[int, int]], start: int, count: int, limit: int) -> bool:
    """Append a run, or join it to the last one; False, and nothing done, if that would exceed the limit."""
    if runs:
        last, length = runs[-1]
        if last + length == start:
            runs[-1] = (last, length + count)
            return True
    if len(runs) >= limit:
        return False
    runs.append((start, count))
    return True
