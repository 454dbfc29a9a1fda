# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The words of a command of `io`: options as getopt(3) reads them, offsets, lengths and patterns, with what qemu-io says of wrong ones."""

from __future__ import annotations

from ..errors import OptionError
from ..getopt import FLAG, VALUE, Option, Parser
from ..units import OutOfRange, parse_size
from .io_session import MAX_LENGTH, SECTOR, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional, Sequence

    from .io_session import Session

    Action = Callable[[Session, dict[str, str], list[str]], bool]

PATTERN = 0xCD  # what is written where nothing is said
READ_PATTERN = 0xAB


class Usage(Exception):
    """The arguments do not fit: the command's synopsis is shown."""


class Verb:
    """One command. `least` and `most` (-1: any number) are its words after the name; `letters` its options as for getopt(3)."""

    __slots__ = ("name", "short", "least", "most", "letters", "synopsis", "summary", "action", "closed", "writes")

    def __init__(
        self,
        name: str,
        short: str,
        least: int,
        most: int,
        letters: str,
        synopsis: Optional[str],
        summary: str,
        action: Action,
        closed: bool = False,
        writes: bool = False,
    ) -> None:
        """`closed`: it needs no image that is open; `writes`: the image must not be read-only."""
        self.name = name
        self.short = short
        self.least = least
        self.most = most
        self.letters = letters
        self.synopsis = synopsis
        self.summary = summary
        self.action = action
        self.closed = closed
        self.writes = writes

    def line(self) -> str:
        """What `help` and a wrong use show."""
        return "%s -- %s\n" % (self.name if self.synopsis is None else "%s %s" % (self.name, self.synopsis), self.summary)


def read_words(verb: Verb, words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options by letter, and the operands. Raises Usage."""
    if not verb.letters:
        return {}, list(words)
    options = []
    for index, letter in enumerate(verb.letters):
        if letter != ":":
            options.append(Option("-" + letter, VALUE if verb.letters[index + 1 : index + 2] == ":" else FLAG, key=letter))
    flags: dict[str, str] = {}
    operands: list[str] = []
    try:
        for option, value in Parser(options, words):
            if option is None:
                operands.append(value or "")
            else:
                flags[option.key] = value or ""
    except OptionError as exc:
        raise Usage(str(exc)) from None
    return flags, operands


# -- arguments ----------------------------------------------------------------------------------------------------


def number(text: str) -> int:
    """A size or an offset in bytes. Raises Failure."""
    try:
        return parse_size(text, (1 << 63) - 1)
    except OutOfRange:
        raise Failure("Parsing error: argument too large -- %s" % text) from None
    except OptionError:
        raise Failure("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- %s" % text) from None


def length_of(text: str, besides: str = "") -> int:
    """The length of one request. Raises Failure."""
    length = number(text)
    if length > MAX_LENGTH:
        raise Failure("length cannot exceed %d%s, given %s" % (MAX_LENGTH, besides, text))
    return length


def lengths(words: Sequence[str]) -> int:
    """The sum of several lengths."""
    total = 0
    for word in words:
        length = number(word)
        if length > MAX_LENGTH:
            raise Failure("Argument '%s' exceeds maximum size %d" % (word, MAX_LENGTH))
        if total > MAX_LENGTH - length:
            raise Failure("The total number of bytes exceed the maximum size %d" % MAX_LENGTH)
        total += length
    return total


def whole(text: str) -> int:
    """A whole number as C reads it, in decimal, octal (01) or hexadecimal (0x1); -1 for anything else."""
    digits = text.lstrip(" ")
    digits = digits[1:] if digits[:1] in ("+", "-") else digits
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[:1] == "0" else 10
    digits = digits[2:] if base == 16 else digits
    if not digits or digits.strip("0123456789abcdefABCDEF"):
        return -1
    try:
        value = int(digits, base)
    except ValueError:
        return -1
    return -value if text.lstrip(" ")[:1] == "-" else value


def pattern(flags: dict[str, str], otherwise: int) -> int:
    """The byte that -P gives. Raises Failure."""
    text = flags.get("P")
    if text is None:
        return otherwise
    value = whole(text)
    if not 0 <= value <= 255:
        raise Failure("%s is not a valid pattern byte" % text)
    return value


def check_sectors(offset: int, length: int) -> None:
    """Raise Failure unless both are whole sectors."""
    for name, value in (("offset", offset), ("count", length)):
        if value % SECTOR:
            raise Failure("%d is not a sector-aligned value for '%s'" % (value, name))
