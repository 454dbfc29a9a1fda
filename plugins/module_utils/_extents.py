# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much of a disk is data."""

from __future__ import annotations

from .diskwright.extent import ALLOCATED, DATA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .diskwright.node import Node

AT_ONCE = 1024  # extents that are asked for at a time


def own_bytes(node: Node) -> int:
    """How many bytes of the disk the image holds itself as data."""
    position = total = 0
    while position < node.size:
        for extent in node.block_status(position, node.size - position, False, AT_ONCE):
            if extent.status & ALLOCATED and extent.status & DATA:
                total += extent.length
            position = extent.offset + extent.length
    return total


def data_bytes(node: Node, own: bool = False) -> int:
    """How many bytes of the disk are data, of whichever image of the chain, or with `own` of this one."""
    position = total = 0
    while position < node.size:
        for extent in node.resolve(position, node.size - position, limit=AT_ONCE, own=own):
            total += extent[1] if extent[2] & DATA else 0
            position = extent[0] + extent[1]
    return total
