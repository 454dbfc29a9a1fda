# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The commands of `io`, under the names and with the arguments of qemu-io's."""

from __future__ import annotations

import errno
import os

from ..errors import Error, OptionError
from ..options import parse_value, split_pairs
from .io_report import amount
from .io_requests import aio_flush, aio_read, aio_write, discard, flush, read, readv, write, writev
from .io_session import SECTOR, Failure, reason
from .io_words import Usage, Verb, number, read_words, whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

    from ..node import Node
    from .io_session import Session

WAITING = ("flush", "read", "readv", "sleep", "truncate", "wait_break", "write", "writev", "discard")  # what finished meanwhile is said after these
NO_FILE = "no file open, try 'help open'"


def run(session: Session, line: str) -> bool:
    """Run one command line; whether all went well. What there is to say is said."""
    words = line.split(" ")
    words = [word for word in words if word]
    if not words:
        return True
    verb = find(words[0])
    if verb is None:
        session.ui.flush()
        session.ui.hint('command "%s" not found' % words[0])
        return False
    try:
        return _run(session, verb, words[0], words[1:])
    finally:
        if verb.name in WAITING:
            session.settle()
        session.ui.flush()


def find(name: str) -> Optional[Verb]:
    """The command of that name."""
    for verb in VERBS:
        if name in (verb.name, verb.short):
            return verb
    return None


def _run(session: Session, verb: Verb, name: str, words: list[str]) -> bool:
    ui = session.ui
    ui.flush()
    if session.node is None and not verb.closed:
        ui.hint(NO_FILE)
        return False
    if len(words) < verb.least or 0 <= verb.most < len(words):
        if verb.most < 0:
            expected = "at least %d arguments" % verb.least
        elif verb.least == verb.most:
            expected = "%d arguments" % verb.least
        else:
            expected = "between %d and %d arguments" % (verb.least, verb.most)
        ui.hint("bad argument count %d to %s, expected %s" % (len(words), name, expected))
        return False
    if verb.writes and session.opened().read_only:
        ui.error("Block node is read-only")
        return False
    try:
        flags, operands = read_words(verb, words)
        return verb.action(session, flags, operands)
    except Usage as exc:
        if exc.args:
            ui.hint("%s: %s" % (name, exc))
        ui.write(verb.line())
    except Failure as exc:
        ui.write("%s\n" % exc)
    except OSError as exc:
        ui.error(exc.strerror or str(exc))
    except Error as exc:
        ui.error(str(exc))
    return False


# -- the image -----------------------------------------------------------------------------------------------------


def truncate(session: Session, flags: dict[str, str], words: list[str]) -> bool:
    modes = ("off", "metadata", "falloc", "full")
    mode = flags.get("m", "off")
    if mode not in modes:
        raise OptionError("Invalid preallocation mode '%s'" % mode)
    if not words:
        raise Usage
    session.opened().truncate(number(words[0]), mode)
    return True


def length(session: Session, _flags: dict[str, str], _words: list[str]) -> bool:
    session.ui.write(amount(session.limit) + "\n")
    return True


NO_INFO = (  # QEMU's drivers that tell nothing of this
    "bochs cloop dmg ftp ftps gluster http https nbd nfs null-aio null-co nvme parallels quorum snapshot-access ssh vvfat"
).split()


def info(session: Session, _flags: dict[str, str], _words: list[str]) -> bool:
    from .info import specific_lines

    node = session.opened()
    lines = ["format name: " + node.driver] * (2 if node.leaf or node.driver in ("blkdebug", "blkverify") else 1)
    inner = node.unfiltered()
    while inner.driver == "raw":
        inner = inner.children["file"].unfiltered()
    told = inner.driver not in NO_INFO
    if told:
        lines.append("cluster size: " + amount(inner.cluster_size))
        lines.append("vm state offset: " + amount(inner.state_offset() or 0))
        specific = None if node.leaf else node.format_specific()
        if specific:
            lines += ["Format specific information:", *specific_lines(specific, 1)]
    session.ui.write("\n".join(lines) + "\n")
    return told


def map_image(session: Session, _flags: dict[str, str], _words: list[str]) -> bool:
    offset, end = 0, session.limit
    while offset < end:
        try:
            held, count = _held(_holder(session), offset, end - offset)
        except (Error, OSError) as exc:
            raise Error("Failed to get allocation status: %s" % reason(exc), errno=exc.errno) from exc
        state = "    allocated" if held else "not allocated"
        session.ui.write("%s (%#x) bytes %s at offset %s (%#x)\n" % (amount(count), count, state, amount(offset), offset))
        offset += count
    return True


def _holder(session: Session) -> Node:
    """The node that holds what the image holds: a filter holds nothing."""
    node = session.opened()
    return node if session.debugger() is node else node.unfiltered()


def _held(node: Node, offset: int, length: int) -> tuple[bool, int]:
    """Whether the image itself decides what is at `offset`, and for how many bytes that goes on."""
    held: Optional[bool] = None
    end = offset + length
    at = offset
    while at < node.size:
        for extent in node.block_status(at, min(end, node.size) - at, want_zero=False, limit=4096):
            one = bool(extent.status & HELD)
            if held is not None and one != held:
                return held, at - offset
            held = one
            at = extent.offset + extent.length
        if at >= min(end, node.size):
            break
    return (True, length) if held is None else (held, length if at >= node.size else at - offset)


def alloc(session: Session, _flags: dict[str, str], words: list[str]) -> bool:
    start = number(words[0])
    count = number(words[1]) if len(words) > 1 else SECTOR
    count = max(0, min(count, session.limit - start))
    total, at = 0, start
    while at < start + count:
        try:
            held, run_length = _held(_holder(session), at, start + count - at)
        except (Error, OSError) as exc:
            raise Failure("is_allocated failed: %s" % reason(exc)) from exc
        total += run_length if held else 0
        at += run_length
    session.ui.write("%d/%d bytes allocated at offset %s\n" % (total, count, amount(start)))
    return True


def open_image(session: Session, flags: dict[str, str], words: list[str]) -> bool:
    from .io import check

    given: dict[str, Any] = {}
    for letter, key in (("r", "read_only"), ("s", "snapshot"), ("C", "copy_on_read"), ("U", "force_share"), ("t", "cache"), ("d", "discard"), ("i", "aio")):
        if letter in flags:
            given[key] = flags[letter]
    if "n" in flags:
        given["cache"] = "none"
    if "k" in flags:
        given["aio"] = "native"
    for key in ("cache", "discard", "aio"):
        if key in given:
            check(key, given[key])
    if len(words) > 1 or not words and "o" not in flags:
        raise Usage
    if session.node is not None:
        raise OptionError("file open already, try 'help close'")
    return session.open_image(words[0] if words else None, given, options=flags.get("o"))


def close_image(session: Session, _flags: dict[str, str], _words: list[str]) -> bool:
    session.close()
    return True


def commit(session: Session, _flags: dict[str, str], _words: list[str]) -> bool:
    if not session.snapshot:
        raise OptionError("What is written goes to the image itself: it was not opened with -s")
    from ..temporary import commit as put_back

    session.drain()
    put_back(session.opened())
    return True


def reopen(session: Session, flags: dict[str, str], words: list[str]) -> bool:
    from ..node import cache_flags

    cache = flags.get("c")
    if cache is not None and cache_flags(cache) is None:
        raise OptionError("Invalid cache option: %s" % cache)
    if "r" in flags and "w" in flags:
        raise OptionError("Only one -r/-w option may be given")
    if words:
        raise Usage
    options: dict[str, Any] = dict(split_pairs(flags["o"])) if "o" in flags else {}
    writable = True if "w" in flags else False if "r" in flags else None
    if cache is not None and any(key.startswith("cache.") for key in options):
        raise OptionError("Cannot set both -c and the cache options")
    if "read-only" in options:
        if writable is not None:
            raise OptionError("Cannot set both -r/-w and 'read-only'")
        from ..options import opt

        field = opt(False)
        field.kind = "bool"
        writable = not parse_value(field, options.pop("read-only"), "read-only")
    session.reopen(writable, cache, options)
    session.cache = cache or session.cache
    return True


# -- blkdebug, and the process --------------------------------------------------------------------------------------


def _debugger(session: Session, what: str) -> Any:
    debugger = session.debugger()
    if debugger is None:
        raise Failure("%s: %s" % (what, os.strerror(errno.ENOTSUP)))
    debugger.say = lambda text: session.ui.write(text + "\n")
    return debugger


def set_break(session: Session, _flags: dict[str, str], words: list[str]) -> bool:
    what = "Could not set breakpoint"
    try:
        _debugger(session, what).breakpoint(words[0], words[1])
    except (Error, OSError) as exc:
        raise Failure("%s: %s" % (what, reason(exc))) from None
    return True


def remove_break(session: Session, _flags: dict[str, str], words: list[str]) -> bool:
    what = "Could not remove breakpoint %s" % words[0]
    try:
        _debugger(session, what).remove_breakpoint(words[0])
    except (Error, OSError) as exc:
        raise Failure("%s: %s" % (what, reason(exc))) from None
    return True


def resume(session: Session, _flags: dict[str, str], words: list[str]) -> bool:
    what = "Could not resume request"
    try:
        _debugger(session, what).resume(words[0])
    except (Error, OSError) as exc:
        raise Failure("%s: %s" % (what, reason(exc))) from None
    return True


def wait_break(session: Session, _flags: dict[str, str], words: list[str]) -> bool:
    what = "Could not wait for '%s'" % words[0]
    debugger = _debugger(session, what)
    while not debugger.wait_suspended(words[0], 0.01):
        if session.busy <= debugger.suspended_count():
            raise Failure("%s: no request is under way that could stop there" % what)
    return True


def sleep(_session: Session, _flags: dict[str, str], words: list[str]) -> bool:
    from time import sleep as wait

    milliseconds = whole(words[0])
    if not 0 <= milliseconds < 1 << 63:
        raise Failure("%s is not a valid number" % words[0])
    wait(milliseconds / 1000)
    return True


def sigraise(session: Session, _flags: dict[str, str], words: list[str]) -> bool:
    from signal import NSIG, raise_signal

    signal = number(words[0])
    if signal >= NSIG:
        raise Failure("signal argument '%s' is too large to be a valid signal" % words[0])
    session.ui.flush()
    raise_signal(signal) if signal else None
    return True


def abort(session: Session, _flags: dict[str, str], _words: list[str]) -> bool:
    session.ui.flush()
    os.abort()


def quit_io(session: Session, _flags: dict[str, str], _words: list[str]) -> bool:
    session.done = True
    return True


def help_text(session: Session, _flags: dict[str, str], words: list[str]) -> bool:
    if not words:
        session.ui.write("".join(verb.line() for verb in VERBS) + "\nUse 'help commandname' for extended help.\n")
        return True
    verb = find(words[0])
    if verb is None:
        session.ui.write("command %s not found\n" % words[0])
        return False
    session.ui.write(verb.line())
    for letter, text in LETTERS.items():
        if letter in verb.letters and not (letter == "r" and verb.name in ("open", "reopen")):
            session.ui.write(" -%s, -- %s\n" % (letter, text))
    return True


HELD = 0x01 | 0x02 | 0x10  # extent.py's DATA, ZERO and ALLOCATED

LETTERS = {
    "b": "the VM state and not the disk",
    "c": "compressed; of reopen: another cache mode",
    "C": "statistics for programs",
    "f": "and flush",
    "i": "an invalid request, for statistics",
    "l": "so many bytes must have the pattern",
    "m": "preallocation mode",
    "n": "with -z: only if that is cheap; of open: no cache",
    "o": "options of the driver",
    "P": "a byte that is written, or that must be there",
    "q": "no statistics",
    "s": "of write: bytes of this file; of read: the pattern begins here",
    "u": "with -z: the space may be given back",
    "v": "show the bytes",
    "z": "zeroes",
}

VERBS = (
    Verb("abort", "", 0, 0, "", None, "end at once, as a crash would", abort, closed=True),
    Verb("aio_flush", "", 0, 0, "", None, "wait for all requests in the background", aio_flush),
    Verb("aio_read", "", 2, -1, "CP:iqrv", "[-Ciqrv] [-P pattern] off len [len..]", "read in the background", aio_read),
    Verb("aio_write", "", 2, -1, "CfiP:qruz", "[-Cfiqruz] [-P pattern] off len [len..]", "write in the background", aio_write, writes=True),
    Verb("alloc", "a", 1, 2, "", "offset [count]", "how much of a range the image itself holds", alloc),
    Verb("break", "", 2, 2, "", "event tag", "stop the next request at an event, under the name of tag", set_break),
    Verb("close", "c", 0, 0, "", None, "close the image", close_image),
    Verb("commit", "", 0, 0, "", None, "of an image opened with -s: put back what was written (not in qemu-io)", commit, writes=True),
    Verb("discard", "d", 2, -1, "Cq", "[-Cq] off len", "say that a range does not matter any more", discard, writes=True),
    Verb("flush", "f", 0, 0, "", None, "bring everything to stable storage", flush),
    Verb("help", "?", 0, 1, "", "[command]", "what commands there are", help_text, closed=True),
    Verb("info", "i", 0, 0, "", None, "what the image is", info),
    Verb("length", "l", 0, 0, "", None, "how long the image is", length),
    Verb("map", "", 0, 0, "", "", "what the image itself holds", map_image),
    Verb("open", "o", 1, -1, "snCro:ki:t:d:U", "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]", "open an image", open_image, closed=True),
    Verb("quit", "q", 0, -1, "", None, "end", quit_io, closed=True),
    Verb("read", "r", 2, -1, "bCl:pP:qrs:v", "[-abCqrv] [-P pattern [-s off] [-l len]] off len", "read", read),
    Verb("readv", "", 2, -1, "CP:qrv", "[-Cqrv] [-P pattern] off len [len..]", "read into several buffers", readv),
    Verb("remove_break", "", 1, 1, "", "tag", "forget a breakpoint", remove_break),
    Verb("reopen", "", 0, -1, "rwc:o:", "[(-r|-w)] [-c cache] [-o options]", "go on with other options", reopen),
    Verb("resume", "", 1, 1, "", "tag", "let a stopped request go on", resume),
    Verb("sigraise", "", 1, 1, "", "signal", "send this process a signal", sigraise, closed=True),
    Verb("sleep", "", 1, 1, "", None, "wait so many milliseconds", sleep, closed=True),
    Verb("truncate", "t", 1, 3, "m:", "[-m prealloc_mode] off", "make the image so long", truncate, writes=True),
    Verb("wait_break", "", 1, 1, "", "tag", "wait until a request has stopped", wait_break),
    Verb("write", "w", 2, -1, "bcCfnpP:qrs:uz", "[-bcCfnqruz] [-P pattern | -s source_file] off len", "write", write, writes=True),
    Verb("writev", "", 2, -1, "CfP:qr", "[-Cfqr] [-P pattern] off len [len..]", "write from several buffers", writev, writes=True),
)
