# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The commands of `io` that read and write."""

from __future__ import annotations

from functools import partial

from .io_session import Failure, Request, shown
from .io_words import PATTERN, READ_PATTERN, Usage, check_sectors, length_of, lengths, number, pattern

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional

    from .io_session import Session


def verifier(flags: dict[str, str], start: int, length: int, offset: int) -> Callable[[memoryview], tuple[str, bool]]:
    """What is done with the bytes of a read at `offset`: they are compared if -P says so, and shown with -v."""
    expected = bytes([pattern(flags, 0)])

    def look(data: memoryview) -> tuple[str, bool]:
        text, well = "", True
        part = data[start : start + length]
        if "P" in flags and bytes(part).count(expected) != len(part):
            text, well = "Pattern verification failed at offset %d, %d bytes\n" % (offset + start, length), False
        if "v" in flags and "q" not in flags:
            text += shown(data, offset)[0]
        return text, well

    return look


def say(session: Session, request: Request) -> bool:
    """Make a request, and say what became of it."""
    text, well = request.run()
    session.ui.write(text)
    if request.hint:
        session.ui.hint(request.hint)
    return well


def read(session: Session, flags: dict[str, str], words: list[str]) -> bool:
    if len(words) != 2:
        raise Usage
    start = number(flags["s"]) if "s" in flags else 0
    count = number(flags["l"]) if "l" in flags else -1
    pattern(flags, READ_PATTERN)
    offset, length = number(words[0]), length_of(words[1])
    if "P" not in flags and ("l" in flags or "s" in flags):
        raise Usage
    count = length - start if count < 0 else count
    if count < 0 or start + count > length:
        raise Failure("pattern verification range exceeds end of read data")
    work = reader(session, flags, offset, length)
    return say(session, Request("read", "read", offset, length, flags, work, verifier(flags, start, count, offset)))


def reader(session: Session, flags: dict[str, str], offset: int, length: int) -> Callable[[], memoryview]:
    if "b" not in flags:
        return lambda: session.read(offset, length)
    check_sectors(offset, length)
    return lambda: session.read_state(offset, length)


def readv(session: Session, flags: dict[str, str], words: list[str]) -> bool:
    if len(words) < 2:
        raise Usage
    offset, length = number(words[0]), lengths(words[1:])
    return say(session, Request("readv", "read", offset, length, flags, lambda: session.read(offset, length), verifier(flags, 0, length, offset)))


def write(session: Session, flags: dict[str, str], words: list[str]) -> bool:
    if len(words) != 2:
        raise Usage
    pattern(flags, PATTERN)
    if "b" in flags and "z" in flags:
        raise Failure("-b and -z cannot be specified at the same time")
    if "f" in flags and ("b" in flags or "c" in flags):
        raise Failure("-f and -b or -c cannot be specified at the same time")
    for letter in "nu":
        if letter in flags and "z" not in flags:
            raise Failure("-%s requires -z to be specified" % letter)
    if sum(letter in flags for letter in "zPs") > 1:
        raise Failure("Only one of -z, -P, and -s can be specified at the same time")
    offset = number(words[0])
    length = number(words[1]) if "n" in flags else length_of(words[1], " without -n")
    if "b" in flags or "c" in flags:
        check_sectors(offset, length)
    if "z" in flags:
        fast = "n" in flags
        return say(session, Request("write", "wrote", offset, length, flags, lambda: session.write_zeroes(offset, length, "u" in flags, fast, "f" in flags)))
    data = content(session, flags, length)
    if data is None:
        return False
    if "b" in flags:
        return say(session, Request("write", "wrote", offset, length, flags, lambda: session.write_state(offset, data)))
    if "c" in flags:
        return say(session, Request("write", "wrote", offset, length, flags, lambda: session.write_compressed(offset, data)))
    return say(session, Request("write", "wrote", offset, length, flags, lambda: session.write(offset, data, "f" in flags)))


def content(session: Session, flags: dict[str, str], length: int) -> Optional[bytes]:
    """What is to be written: a byte again and again, or the bytes of a file; None, and a message, where that cannot be read."""
    if "s" not in flags:
        return bytes([pattern(flags, PATTERN)]) * length
    try:
        with open(flags["s"], "rb") as file:
            head = file.read(length)
    except OSError as exc:
        session.ui.hint("%s: %s" % (flags["s"], exc.strerror))
        return None
    if not head:
        session.ui.hint("%s: file is empty" % flags["s"])
        return None
    return (head * (length // len(head) + 1))[:length]


def writev(session: Session, flags: dict[str, str], words: list[str]) -> bool:
    if len(words) < 2:
        raise Usage
    data = bytes([pattern(flags, PATTERN)])
    offset, length = number(words[0]), lengths(words[1:])
    return say(session, Request("writev", "wrote", offset, length, flags, lambda: session.write(offset, data * length, "f" in flags)))


def aio_read(session: Session, flags: dict[str, str], words: list[str]) -> bool:
    pattern(flags, READ_PATTERN)
    if "i" in flags:
        session.ui.write("injecting invalid read request\n")
        return True
    if len(words) < 2:
        raise Usage
    offset, length = number(words[0]), lengths(words[1:])
    look = verifier(flags, 0, length, offset)
    session.start(Request("readv", "read", offset, length, flags, lambda: session.read(offset, length), look))
    return True


def aio_write(session: Session, flags: dict[str, str], words: list[str]) -> bool:
    pattern(flags, PATTERN)
    if "i" in flags:
        session.ui.write("injecting invalid write request\n")
        return True
    if len(words) < 2:
        raise Usage
    if "z" in flags and len(words) != 2:
        raise Failure("-z supports only a single length parameter")
    if "u" in flags and "z" not in flags:
        raise Failure("-u requires -z to be specified")
    offset, length = number(words[0]), lengths(words[1:])
    if "z" in flags:
        work: Callable[[], None] = partial(session.write_zeroes, offset, length, "u" in flags, fua="f" in flags)
    else:
        work = partial(session.write, offset, bytes([pattern(flags, PATTERN)]) * length, "f" in flags)
    session.start(Request("aio_write", "wrote", offset, length, flags, work))
    return True


def aio_flush(session: Session, _flags: dict[str, str], _words: list[str]) -> bool:
    session.drain()
    return True


def flush(session: Session, _flags: dict[str, str], _words: list[str]) -> bool:
    session.opened().flush()
    return True


def discard(session: Session, flags: dict[str, str], words: list[str]) -> bool:
    if len(words) != 2:
        raise Usage
    offset, length = number(words[0]), length_of(words[1])
    return say(session, Request("discard", "discard", offset, length, flags, lambda: session.discard(offset, length)))
