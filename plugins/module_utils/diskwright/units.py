# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Sizes as QEMU parses and prints them (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from .errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)  # the line after "expects a non-negative number below 2^64"

MAX_SIZE = (1 << 64) - 1  # of anything counted in bytes
MAX_IMAGE_SIZE = (1 << 63) - 1  # of an image, and of what the command line takes: 2**63 - 1 bytes

_SHIFTS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_BLANKS = " \t\n\v\f\r"
_DIGITS = "0123456789"
_HEX_DIGITS = "0123456789abcdefABCDEF"


class OutOfRange(OptionError):
    """A number that is well written but negative or too large."""


def parse_size(text: str, limit: int = MAX_SIZE) -> int:
    """The bytes that `text` means in QEMU's size grammar.

    Digits with an optional fraction and one optional suffix b, k, M, G, T, P or E in either case, counting in 1024s; or
    0x and hexadecimal digits alone. A fraction needs a suffix larger than b and is rounded to the nearest byte.

    Raises OptionError for what is no size, OutOfRange for one that is negative or above `limit` (2**64 - 1).
    """
    size = _read_size(text)
    if size is None:
        raise OptionError("Invalid size '%s'" % text)
    if size < 0 or size > limit:
        raise OutOfRange("Size '%s' is not between 0 and %d" % (text, limit))
    return size


def parse_size_option(text: str, key: str) -> int:
    """The bytes that `text`, the value of the option `key`, means; 0 .. 2**64 - 1. Raises OptionError in QEMU's words."""
    try:
        return parse_size(text)
    except OutOfRange:
        raise OptionError("Value '%s' is out of range for parameter '%s'" % (text, key)) from None
    except OptionError:
        raise OptionError("Parameter '%s' expects a non-negative number below 2^64" % key, hint=SIZE_HINT) from None


def parse_number(text: str, limit: int = MAX_IMAGE_SIZE, least: int = 0) -> int:
    """The plain number that `text` is: decimal, or hexadecimal after 0x, or octal after 0, without a suffix.

    Raises OptionError for what is no number, OutOfRange for one that is not in `least` .. `limit`.
    """
    digits = text.lstrip(_BLANKS)
    sign = -1 if digits[:1] == "-" else 1
    if digits[:1] in ("+", "-") and digits:
        digits = digits[1:]
    if digits[:2] in ("0x", "0X"):
        base, allowed, digits = 16, _HEX_DIGITS, digits[2:]
    elif digits[:1] == "0":
        base, allowed = 8, "01234567"
    else:
        base, allowed = 10, _DIGITS
    if not digits or digits.strip(allowed):
        raise OptionError("Invalid number '%s'" % text)
    if len(digits) > 64:
        digits = digits.lstrip("0") or "0"
    if len(digits) > 64 or not least <= sign * int(digits, base) <= limit:
        raise OutOfRange("Number '%s' is not between %d and %d" % (text, least, limit))
    return sign * int(digits, base)


def _read_size(text: str) -> Optional[int]:
    """The size that `text` means, possibly too large, -1 for a negative one, or None if it is none."""
    body = text.lstrip(_BLANKS)
    if body[:1] == "-":
        return -1 if body[1:] and not body[1:].strip(_DIGITS) else None
    if body[:1] == "+":
        body = body[1:]
    if body[:2] in ("0x", "0X"):
        digits = body[2:]
        if not digits or digits.strip(_HEX_DIGITS):
            return None
        return _bounded(digits, 16)
    whole, rest = _take_digits(body)
    fraction = ""
    dotted = rest[:1] == "."
    if dotted:
        fraction, rest = _take_digits(rest[1:])
    if not whole and not fraction:
        return None
    if len(rest) > 1 or (rest and rest.lower() not in _SHIFTS):
        return None
    shift = _SHIFTS[rest.lower()] if rest else 0
    if fraction.strip("0") and not shift:
        return None
    size = _bounded(whole or "0", 10) << shift
    if fraction:
        # In double precision, as QEMU does it: 0.31715E is 14 bytes less than the nearest byte.
        size += int(float("0." + fraction) * (1 << shift) + 0.5)
    return size


def _take_digits(text: str) -> tuple[str, str]:
    rest = text.lstrip(_DIGITS)
    return text[: len(text) - len(rest)], rest


def _bounded(digits: str, base: int) -> int:
    """int(digits), or 2**64 for anything longer than a number of 64 bits can be."""
    digits = digits.lstrip("0") or "0"
    return int(digits, base) if len(digits) <= 20 else 1 << 64


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def format_size(size: int) -> str:
    """`size` bytes as qemu-img info prints it for people: "0 B", "200 KiB", "1.05 GiB", three significant digits.

    The unit is the largest of which there is at least 1000/1024.
    """
    unit = 0
    value = float(size)
    while value >= 1000 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return "%.3g %s" % (value, _UNITS[unit])
