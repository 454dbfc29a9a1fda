# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What `io` prints of a request: sizes, times, rates, hex dumps, in the layout of qemu-io 10.0 (its output, not its documentation, is the source)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Union

_UNITS = ("EiB", "PiB", "TiB", "GiB", "MiB", "KiB")
_PER_LINE = 16  # bytes of a hex dump


def amount(value: Union[int, float]) -> str:
    """`value` bytes as "1.500 MiB", "64 KiB", "40 bytes"; a fraction of a byte has six digits."""
    for power, unit in zip(range(60, 0, -10), _UNITS):
        if value >= 1 << power:
            return ("%.3f" % (value / (1 << power))).replace(".000", "") + " " + unit
    return ("%f" % value).replace(".000000", "") + " bytes"


def clock(seconds: float, full: bool = False) -> str:
    """A time as "00.12 sec", and from one second on, or in `full`, as "0:00:01.12"."""
    whole = int(seconds)
    hundredths = int((seconds - whole) * 100)
    if full or whole:
        return "%d:%02d:%02d.%02d" % (whole // 3600, whole // 60 % 60, whole % 60, hundredths)
    return "%02d.%02d sec" % (whole, hundredths)


def report(what: str, offset: int, length: int, seconds: float, terse: bool) -> str:
    """The lines about a request for `length` bytes that took so long; `terse` is the form for programs."""
    seconds = max(seconds, 1e-9)
    if terse:
        return "%d,1,%s,%.3f,%.3f\n" % (length, clock(seconds, True), length / seconds, 1 / seconds)
    rate = "%s/sec and %.4f ops/sec" % (amount(length / seconds), 1 / seconds)
    return "%s %d/%d bytes at offset %d\n%s, 1 ops; %s (%s)\n" % (what, length, length, offset, amount(length), clock(seconds), rate)


def dump(data: memoryview, offset: int) -> str:
    """Lines of sixteen bytes, in hex and as text; only letters and digits are shown as such."""
    lines = []
    for at in range(0, len(data), _PER_LINE):
        row = bytes(data[at : at + _PER_LINE])
        text = "".join(chr(byte) if byte < 128 and chr(byte).isalnum() else "." for byte in row)
        lines.append("%08x:  %s  %s\n" % (offset + at, " ".join("%02x" % byte for byte in row), text))
    return "".join(lines)
