# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Backing chains: who is in which, and what a layer adds (https://www.qemu.org/docs/master/interop/live-block-operations.html)."""

from __future__ import annotations

from ..copy.overlay import allocated_above
from ..errors import Error, OptionError
from ..extent import ALLOCATED
from ..graph import identity, identity_of_path, parse_filename, resolve_name
from ..node import Format, Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Optional

LOOK = 1024  # extents that are asked for at a time


def layers(node: Node) -> Iterator[Node]:
    """A node and those of its backing chain, without the filters between them."""
    found: Optional[Node] = node.unfiltered()
    while found is not None:
        yield found
        found = found.backing.unfiltered() if found.backing is not None else None


def overlay_of(top: Node, node: Node) -> Node:
    """The node of the chain of `top` whose backing node is `node`. Raises Error."""
    for layer in layers(top):
        if layer.backing is not None and layer.backing.unfiltered() is node:
            return layer
    raise Error("'%s' is not in this backing file chain" % node.name)


def named_in_chain(top: Node, filename: str) -> Optional[Node]:
    """The backing node of the chain of `top` that this file name means; None where there is none."""
    for layer in layers(top):
        below = layer.backing
        if below is None:
            continue
        below = below.unfiltered()
        if filename in (below.filename, layer.backing_filename) or _is_file(below, resolve_name(layer, filename)):
            return below
    return None


def _is_file(node: Node, name: str) -> bool:
    try:
        inner = parse_filename(name).get("file")
    except Error:
        return False
    found = identity_of_path(str(inner.get("filename", ""))) if isinstance(inner, dict) else None
    return found is not None and found == identity(node)


def added(top: Node, base: Optional[Node], offset: int, length: int) -> list[tuple[int, int]]:
    """(offset, length) of what the layers from `top` down to, but without, `base` decide in a range."""
    return [(start, count) for start, count, above in allocated_above(top, base, offset, offset + length) if above]


def missing(top: Node, base: Optional[Node], offset: int, length: int) -> list[tuple[int, int]]:
    """(offset, length) of what `top` itself does not hold in a range, and the layers between it and `base` do."""
    found: list[tuple[int, int]] = []
    below = top.backing
    end = offset + length
    while offset < end and below is not None:
        for start, count, status, _host, _host_offset in top.block_status(offset, end - offset, False, LOOK):
            offset = start + count
            if status & ALLOCATED:
                continue
            inside = max(0, min(count, below.size - start))
            found += added(below, base, start, inside) if inside else []
            if inside < count and base is not None and base.size > start + inside:
                found.append((start + inside, count - inside))  # zeroes, which the base would not give
    return found


def name_for_header(node: Node) -> tuple[str, str]:
    """The name and the format by which an overlay can refer to a node."""
    return node.filename, node.unfiltered().driver


def change_header(overlay: Node, name: Optional[str], format: Optional[str]) -> None:
    """Let an image name another backing file, even one that is open for reading only."""
    overlay = overlay.unfiltered()
    if not isinstance(overlay, Format):
        raise OptionError("'%s' cannot have a backing file" % overlay.name)
    old = overlay.flags
    if not old.writable:
        overlay.change_flags(old.but(writable=True))
    try:
        overlay.change_backing(name, format)
        overlay.flush()
    finally:
        if not old.writable:
            overlay.change_flags(old)


__all__ = ["added", "change_header", "layers", "missing", "name_for_header", "named_in_chain", "overlay_of"]
