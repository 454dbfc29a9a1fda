# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Snapshot mode: what is written goes to a temporary overlay that has no name any more, and can be put back
(https://www.qemu.org/docs/master/system/images.html, "Snapshot mode").
"""

from __future__ import annotations

import os

from .errors import Error
from .node import ALL, CONSISTENT_READ, RESIZE, WRITE, Format, OpenFlags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .node import Node

PLACE = "/var/tmp"  # not /tmp, which may be memory
PREFIX = "vl."


def overlay(node: Node, *, directory: str = PLACE) -> Node:
    """A writable image over `node`, which a Graph opened read-only and the image closes. Its file is in `directory`, unlinked.

    Raises Error where the file cannot be made.
    """
    from tempfile import mkstemp

    from .formats.qcow2 import Qcow2

    if node.graph is None or not node.read_only:
        raise Error("%s: snapshot mode needs a node of a graph, opened read-only" % node.filename, filename=node.filename)
    flags = OpenFlags(writable=True, resize=True, unmap=True, no_flush=True, direct=node.flags.direct)
    try:
        descriptor, path = mkstemp(prefix=PREFIX, dir=directory)
    except OSError as exc:
        text = "Could not open temporary file '%s/%sXXXXXX': %s" % (directory, PREFIX, exc.strerror)
        raise Error(text, filename=directory, errno=exc.errno) from exc
    try:
        os.close(descriptor)
        file = {"driver": "file", "filename": path}
        with node.graph.open_spec(file, flags) as place:
            Qcow2.create(place, Qcow2.create_options.from_mapping({"size": node.size}))
        top: Node = node.graph.open_spec({"driver": "qcow2", "file": file, "backing": node.name}, flags)
        return top
    finally:
        os.unlink(path)


def commit(top: Node) -> None:
    """Write what `top`, which `overlay` made, holds into the node below it, and empty it. Nothing else may use either of them now.

    Raises Error where the node below cannot be written, or has other users; nothing is lost then.
    """
    from .copy.overlay import commit as bring_down

    base = top.backing
    if base is None or not isinstance(top, Format):
        raise Error("%s: not in snapshot mode" % top.filename, filename=top.filename)
    if any(edge.user is not top for edge in base.parents):
        raise Error("Node '%s' is in use by others" % base.name, filename=base.filename)
    before = base.flags
    base.change_flags(before.but(writable=True, resize=True, unmap=True, perm=CONSISTENT_READ | WRITE | RESIZE, shared=ALL & ~(WRITE | RESIZE)))
    try:
        if base.size < top.size:
            base.truncate(top.size)
        bring_down(top, base)
        base.flush()
        top.make_empty()
    finally:
        base.change_flags(before)
