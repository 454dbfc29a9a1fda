# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Trace events: what the library does inside, a line for each event (https://www.qemu.org/docs/master/devel/tracing.html).

Nothing is built in: a method whose event is enabled is wrapped, so that tracing costs nothing where it is off.
An event that QEMU has too has its name and the layout of its line; addresses tell objects apart, and mean nothing else.
"""

from __future__ import annotations

import os
from _thread import get_ident

from .errors import Error, OptionError
from .options import split_pairs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

    from .commands.ui import UI

MAX_EVENTS_FILE = 1 << 20  # bytes


def _graph() -> Any:
    from .graph import Graph

    return Graph


def _node() -> Any:
    from .node import Node

    return Node


def _file() -> Any:
    from .protocols.file import File

    return File


def _qcow2() -> Any:
    from .formats.qcow2 import Qcow2

    return Qcow2


def _cache() -> Any:
    from .cache import TableCache

    return TableCache


def _os() -> Any:
    return os


def _kernels() -> Any:
    from . import kernels

    return kernels


def _transfer() -> Any:
    from .copy.transfer import Transfer

    return Transfer


def _pieces(pieces: Any) -> tuple[int, int]:
    return len(pieces), sum(piece[-1] for piece in pieces)


# name: (what has the method, the method, the line after the name, what stands in it by the method's result and arguments)
EVENTS: dict[str, tuple[Callable[[], Any], str, str, Callable[..., tuple[Any, ...]]]] = {
    "bdrv_open_common": (
        _graph,
        "_build",
        'bs %#x filename "%s" flags %#x format_name "%s"',
        lambda node, *_rest: (id(node), node.filename, 2 if node.flags.writable else 0, node.driver),
    ),
    "bdrv_close": (_node, "close", "bs %#x", lambda _result, bs: (id(bs),)),
    "bdrv_co_preadv_part": (
        _node,
        "pread_into",
        "bs %#x offset %d bytes %d flags 0x0",
        lambda _result, bs, offset, view: (id(bs), offset, len(view)),
    ),
    "bdrv_co_pwritev_part": (
        _node,
        "pwrite",
        "bs %#x offset %d bytes %d flags 0x0",
        lambda _result, bs, offset, data: (id(bs), offset, len(data)),
    ),
    "bdrv_co_pwrite_zeroes": (
        _node,
        "pwrite_zeroes",
        "bs %#x offset %d bytes %d flags %#x",
        lambda _result, bs, offset, length, unmap=False: (id(bs), offset, length, 4 if unmap else 0),
    ),
    "bdrv_co_pwrite_compressed": (
        _node,
        "write_compressed",
        "bs %#x offset %d bytes %d",
        lambda _result, bs, offset, data, *_rest: (id(bs), offset, len(data)),
    ),
    "bdrv_co_pdiscard": (
        _node,
        "pdiscard",
        "bs %#x offset %d bytes %d",
        lambda _result, bs, offset, length: (id(bs), offset, length),
    ),
    "bdrv_co_block_status": (
        _node,
        "block_status",
        "bs %#x offset %d bytes %d",
        lambda _result, bs, offset, length, *_rest, **_more: (id(bs), offset, length),
    ),
    "bdrv_co_flush": (_node, "flush", "bs %#x", lambda _result, bs: (id(bs),)),
    "bdrv_co_truncate": (
        _node,
        "truncate",
        "bs %#x offset %d prealloc %s",
        lambda _result, bs, size, preallocation="off": (id(bs), size, preallocation),
    ),
    "copy_start": (_transfer, "run", "bs %#x bytes %d", lambda _result, transfer, *_rest: (id(transfer.target), transfer.size)),
    "file_pread": (
        _file,
        "_pread_into",
        "bs %#x offset %d bytes %d",
        lambda _result, bs, offset, view: (id(bs), offset, len(view)),
    ),
    "file_pwrite": (
        _file,
        "_pwrite",
        "bs %#x offset %d bytes %d",
        lambda _result, bs, offset, view: (id(bs), offset, len(view)),
    ),
    "file_gather": (_kernels, "gather", "pieces %d bytes %d", lambda _result, reads, *_rest: _pieces(reads)),
    "file_scatter": (_kernels, "scatter", "pieces %d bytes %d", lambda _result, writes, *_rest: _pieces(writes)),
    "file_copy_file_range": (
        _os,
        "copy_file_range",
        "src_fd %d offset %d dst_fd %d offset %d bytes %d ret %d",
        lambda result, source, target, count, from_offset, to_offset: (source, from_offset, target, to_offset, count, result),
    ),
    "file_pwrite_zeroes": (
        _file,
        "_zero",
        "bs %#x offset %d bytes %d unmap %d",
        lambda _result, bs, offset, length, unmap: (id(bs), offset, length, unmap),
    ),
    "file_discard": (_file, "_discard", "bs %#x offset %d bytes %d", lambda _result, bs, offset, length: (id(bs), offset, length)),
    "file_truncate": (
        _file,
        "_truncate",
        "bs %#x offset %d prealloc %s",
        lambda _result, bs, size, preallocation: (id(bs), size, preallocation),
    ),
    "file_flush": (_file, "_flush", "bs %#x", lambda _result, bs: (id(bs),)),
    "qcow2_map": (_qcow2, "_map", "bs %#x offset %#x bytes %d", lambda _result, bs, offset, length: (id(bs), offset, length)),
    "qcow2_alloc_clusters_offset": (
        _qcow2,
        "_alloc",
        "co %#x offset %#x bytes %d",
        lambda _result, bs, offset, length: (get_ident(), offset, length),
    ),
    "qcow2_cluster_link_l2": (
        _qcow2,
        "_link",
        "co %#x nb_clusters %d",
        lambda _result, bs, allocs: (get_ident(), sum(-(-alloc.length // bs.cluster_size) for alloc in allocs)),
    ),
    "qcow2_abort": (_qcow2, "_abort", "bs %#x allocations %d", lambda _result, bs, allocs: (id(bs), len(allocs))),
    "qcow2_pwrite_zeroes": (
        _qcow2,
        "_zero",
        "co %#x offset %#x count %d",
        lambda _result, bs, offset, length, unmap: (get_ident(), offset, length),
    ),
    "qcow2_discard": (_qcow2, "_discard", "bs %#x offset %#x bytes %d", lambda _result, bs, offset, length: (id(bs), offset, length)),
    "qcow2_snapshot_create": (_qcow2, "_create_snapshot", 'bs %#x name "%s"', lambda _result, bs, name, *_rest: (id(bs), name)),
    "qcow2_snapshot_apply": (_qcow2, "_apply_snapshot", 'bs %#x name "%s"', lambda _result, bs, name, *_rest: (id(bs), name)),
    "qcow2_snapshot_delete": (_qcow2, "_delete_snapshot", 'bs %#x name "%s"', lambda _result, bs, name, *_rest: (id(bs), name)),
    "qcow2_amend": (_qcow2, "_amend", "bs %#x", lambda _result, bs, *_rest: (id(bs),)),
    "qcow2_check": (_qcow2, "_check", 'bs %#x repair "%s"', lambda _result, bs, repair: (id(bs), repair)),
    "table_cache_get": (_cache, "get", "cache %#x offset %#x", lambda _result, cache, offset: (id(cache), offset)),
    "table_cache_flush": (_cache, "write", "cache %#x dirty %d", lambda _result, cache, *_rest: (id(cache), len(cache.dirty))),
}

_AFTERWARDS = ("bdrv_open_common", "file_copy_file_range")  # their lines need the result; all others are written at the start


class Tracer:
    """The events that -T enables; `begin` starts the trace, `end` stops it."""

    def __init__(self, ui: UI) -> None:
        self._ui = ui
        self._enabled: set[str] = set()
        self._path: Optional[str] = None
        self._fd = -1
        self._wrapped: list[tuple[Any, str, Any]] = []

    def option(self, text: str) -> str:
        """Read one argument of -T, "[enable=]PATTERN,events=FILE,file=FILE"; a text to print in place of doing anything, or "".

        Raises OptionError for an unknown key, Error for a file of events that cannot be read.
        """
        values: dict[str, str] = {}
        for key, value in split_pairs(text, implied_key="enable") if text else ():
            if key not in ("enable", "events", "file"):
                raise OptionError("Invalid parameter '%s'" % key)
            values[key] = value
        if "file" in values:
            self._path = values["file"]
        if "enable" in values:
            if values["enable"] in ("help", "?"):
                return names()
            self._enable(values["enable"], "")
        if "events" in values:
            return self._read(values["events"])
        return ""

    def _read(self, path: str) -> str:
        """Enable what the lines of a file say: a pattern each, "-" in front of it disables, "#" begins a remark."""
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_EVENTS_FILE)
        except IsADirectoryError:
            return ""
        except (OSError, ValueError) as exc:
            error = Error(getattr(exc, "strerror", None) or "No such file or directory", filename=path)
            error.__dict__["prefix"] = "%s:%s" % (self._ui.name, path)  # the place of an error in a file stands before its text
            raise error from exc
        for number, line in enumerate(data.decode(errors="surrogateescape").split("\n"), 1):
            if line == "help":
                return names()
            if line and not line.startswith("#"):
                self._enable(line, "%s:%d: " % (path, number))
        return ""

    def _enable(self, pattern: str, place: str) -> None:
        wanted = not pattern.startswith("-")
        pattern = pattern[0 if wanted else 1 :]
        found = [name for name in EVENTS if _matches(pattern, name)]
        if not found and "*" not in pattern and "?" not in pattern:
            self._ui.error("warning: trace event '%s' does not exist" % pattern, self._ui.name + ":" + place[:-2] if place else None)
        if wanted:
            self._enabled.update(found)
        else:
            self._enabled.difference_update(found)

    def begin(self) -> None:
        """Open the file that the trace goes to, and trace. Raises Error."""
        if self._path is not None:
            try:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            except (OSError, ValueError) as exc:
                reason = getattr(exc, "strerror", None) or "No such file or directory"
                raise Error("Error opening logfile %s: %s" % (self._path, reason), filename=self._path) from exc
        for name in EVENTS:
            if name in self._enabled:
                self._wrap(name)

    def end(self) -> None:
        """Put everything back."""
        for owner, attribute, original in reversed(self._wrapped):
            setattr(owner, attribute, original)
        self._wrapped.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _wrap(self, name: str) -> None:
        find, attribute, layout, values = EVENTS[name]
        owner = find()
        original = getattr(owner, attribute, None)
        if original is None:
            return  # not on this platform
        afterwards = name in _AFTERWARDS

        def traced(*args: Any, **more: Any) -> Any:
            if not afterwards:
                self._write(name, layout % values(None, *args, **more))
                return original(*args, **more)
            result = original(*args, **more)
            self._write(name, layout % values(result, *args, **more))
            return result

        setattr(owner, attribute, traced)
        self._wrapped.append((owner, attribute, original))

    def _write(self, name: str, text: str) -> None:
        line = "%s %s" % (name, text)
        if self._fd < 0:
            self._ui.hint(line)
            return
        try:
            os.write(self._fd, (line + "\n").encode(errors="surrogateescape"))
        except OSError:
            pass  # a full disk is no reason to fail


def names() -> str:
    """The names of all events, one a line."""
    return "".join(name + "\n" for name in EVENTS)


def _matches(pattern: str, name: str) -> bool:
    """Whether `pattern`, in which "*" stands for any text and "?" for any character, is `name`."""
    first, *others = pattern.split("*")
    if not _is_at(first, name, 0) or not others and len(name) != len(first):
        return False
    position = len(first)
    for number, part in enumerate(others, 1):
        if number == len(others):
            return len(name) - len(part) >= position and _is_at(part, name, len(name) - len(part))
        while not _is_at(part, name, position):
            position += 1
            if position > len(name):
                return False
        position += len(part)
    return True


def _is_at(part: str, name: str, position: int) -> bool:
    found = name[position : position + len(part)]
    return len(found) == len(part) and all(left in ("?", right) for left, right in zip(part, found))
