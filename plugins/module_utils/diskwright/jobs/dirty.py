# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""block-dirty-bitmap-*: what is done with the dirty bitmaps of nodes (https://www.qemu.org/docs/master/interop/bitmaps.html).

Each action returns what takes it back, for transactions.
"""

from __future__ import annotations

from ..bitmaps import Bitmap, BitmapSet
from ..errors import Error, OptionError, Unsupported
from ..options import opt
from ..options import Options
from .recording import MAX_NAME, Found, bitmaps, duplicate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence, Union

    from ..node import Node
    from .live import Live

    Undo = Callable[[], None]

MAX_SOURCES = 1024  # bitmaps that are merged in one go


class BitmapName(Options):
    """Which bitmap of which node."""

    node: str = opt(help="name of the node")
    name: str = opt(help="name of the bitmap")


class NewBitmap(BitmapName):
    """Options of block-dirty-bitmap-add."""

    granularity: Optional[int] = opt(None, help="bytes for each bit: a power of two")
    persistent: bool = opt(False, help="whether the image is to keep it")
    disabled: bool = opt(False, help="whether it is not to record")


def add(live: Live, options: NewBitmap) -> Undo:
    """Make a bitmap without a bit. Raises Error."""
    with live.lock:
        node = live.node(options.node)
        if not options.name:
            raise OptionError("Bitmap name cannot be empty")
        granularity = options.granularity or 0
        if not 0 <= granularity < 1 << 32:
            raise OptionError("Parameter 'granularity' expects uint32_t")
        if options.granularity is not None and (granularity < 512 or granularity & granularity - 1):
            raise OptionError("Granularity must be power of 2 and at least 512")
        if any(found.bitmap.name == options.name for found in bitmaps(node)):
            raise Error("Bitmap already exists: %s" % options.name)
        with live.graph.drained():
            owner = _store(node, options.name) if options.persistent else live.record(node).bitmaps
            made = owner.add(options.name, granularity, not options.disabled)
    return lambda: _drop(live, node, made)


def _store(node: Node, name: str) -> BitmapSet:
    """The bitmaps that the image of a node keeps. Raises Error where it cannot keep one of that name."""
    stored = node.bitmaps()
    if stored is None:
        raise Unsupported("Can't store persistent bitmaps to %s: Operation not supported" % node.name)
    refusal = "Can't make bitmap '%s' persistent in '%s': " % (name, node.name)
    if not node.stores_bitmaps:
        raise OptionError(refusal + "Cannot store dirty bitmaps in qcow2 v2 files")
    if node.read_only:
        raise OptionError(refusal + "the image is read-only")
    if len(name.encode("utf-8", "replace")) > MAX_NAME:
        raise OptionError(refusal + "Name length exceeds maximum (%d characters)" % MAX_NAME)
    return stored


def _drop(live: Live, node: Node, bitmap: Bitmap) -> None:
    with live.graph.drained():
        for found in bitmaps(node):
            if found.bitmap is bitmap:
                found.owner.all.remove(bitmap)
                return


def remove(live: Live, options: BitmapName) -> Undo:
    """Remove a bitmap, also an inconsistent one. Raises Error."""
    with live.lock:
        found = live.bitmap(live.node(options.node), options.name, idle=False)
        if live.is_busy(found):
            live.bitmap(found.node, options.name)
        with live.graph.drained(), found.lock:
            place = found.owner.all.index(found.bitmap)
            found.owner.all.remove(found.bitmap)
    return lambda: found.owner.all.insert(place, found.bitmap)


def clear(live: Live, options: BitmapName) -> Undo:
    """Forget all that was written. Raises Error."""
    with live.lock:
        found = live.bitmap(live.node(options.node), options.name)
        _check_writable(found)
        runs = found.runs()
        with found.lock:
            found.bitmap.clear()
    return lambda: _mark(found, runs)


def _mark(found: Found, runs: Sequence[tuple[int, int]]) -> None:
    with found.lock:
        for offset, length in runs:
            found.bitmap.set(offset, length)


def _check_writable(found: Found) -> None:
    if found.persistent and found.node.read_only:
        raise Error("Bitmap '%s' is readonly and cannot be modified" % found.bitmap.name)


def enable(live: Live, options: BitmapName) -> Undo:
    """Let a bitmap record from now on. Raises Error."""
    return _set_enabled(live, options, True)


def disable(live: Live, options: BitmapName) -> Undo:
    """Let a bitmap stay as it is. Raises Error."""
    return _set_enabled(live, options, False)


def _set_enabled(live: Live, options: BitmapName, enabled: bool) -> Undo:
    with live.lock:
        found = live.bitmap(live.node(options.node), options.name)
        _check_writable(found)
        before = found.bitmap.enabled

        def set_to(value: bool) -> None:
            with live.graph.drained():
                found.bitmap.enabled = value

        set_to(enabled)
    return lambda: set_to(before)


def merge(live: Live, node_name: str, target: str, sources: Sequence[Union[str, Mapping[str, Any]]]) -> Undo:
    """Set in the bitmap `target` whatever is set in `sources`: names of bitmaps of the same node, or {"node", "name"}. Raises Error; nothing is
    changed then."""
    with live.lock:
        node = live.node(node_name)
        found = live.bitmap(node, target)
        _check_writable(found)
        if len(sources) > MAX_SOURCES:
            raise OptionError("More than %d bitmaps to merge" % MAX_SOURCES)
        whole = duplicate(found.bitmap, [])
        for source in sources:
            other = _source(live, node, source)
            if other.bitmap.size != found.bitmap.size:
                text = "Bitmaps are of different sizes (destination size is %d, source size is %d) and can't be merged"
                raise OptionError(text % (found.bitmap.size, other.bitmap.size))
            for offset, length in other.runs():
                whole.set(offset, length)
        before = found.runs()
        _mark(found, list(whole.runs()))

    def undo() -> None:
        with found.lock:
            found.bitmap.clear()
        _mark(found, before)

    return undo


def _source(live: Live, node: Node, source: Union[str, Mapping[str, Any]]) -> Found:
    if isinstance(source, str):
        return live.bitmap(node, source)
    if not isinstance(source, dict):
        raise OptionError("Invalid parameter type for 'bitmaps', expected: alternate")
    for key in ("node", "name"):
        if not isinstance(source.get(key), str):
            raise OptionError("Parameter 'bitmaps.%s' is missing" % key)
    if source["node"] not in live.graph.named:
        raise OptionError("Node '%s' not found" % source["node"])
    return live.bitmap(live.graph.named[source["node"]], source["name"])


def sha256(live: Live, options: BitmapName) -> str:
    """The hash of a bitmap's bits. Raises Error."""
    with live.lock:
        return live.bitmap(live.node(options.node), options.name, idle=False).sha256()
