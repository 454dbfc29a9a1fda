# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Snapshots of nodes that are in use: an overlay that takes over from here on, or one inside of the image
(https://www.qemu.org/docs/master/interop/live-block-operations.html)."""

from __future__ import annotations

import os
from time import time_ns

from ..errors import Error, OptionError
from ..hooks import ALL, OpenFlags, Snapshot
from ..node import Node
from ..options import Options, opt
from .creation import make_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

    from .live import Live

    Undo = Callable[[], None]


class OverlaySnapshot(Options):
    """Options of blockdev-snapshot."""

    node: str = opt(help="the node that is to stay as it is")
    overlay: str = opt(help="the node that its users go over to")


class FileSnapshot(Options):
    """Options of blockdev-snapshot-sync."""

    device: Optional[str] = opt(None, help="the node that is to stay as it is")
    node_name: Optional[str] = opt(None, help="the same")
    snapshot_file: str = opt(help="file of the overlay")
    snapshot_node_name: Optional[str] = opt(None, help="name of the overlay's node")
    format: str = opt("qcow2", help="format of the overlay")
    mode: str = opt("absolute-paths", choices=("existing", "absolute-paths"), help="whether the file is there already")


class InternalSnapshot(Options):
    """Options of blockdev-snapshot-internal-sync."""

    device: str = opt(help="the node whose image keeps it")
    name: str = opt(help="name of the snapshot")


def snapshot(live: Live, options: OverlaySnapshot) -> Undo:
    """Let the users of a node use another one, of which it becomes the backing node. Returns what takes it back. Raises Error."""
    with live.lock:
        node = live.node(options.node)
        live.check_free(node)
        overlay = live.node(options.overlay)
        _check_overlay(live, overlay)
        return _put_over(live, node, overlay)


def _check_overlay(live: Live, overlay: Node) -> None:
    if any(not isinstance(edge.user, Node) for edge in overlay.parents):
        raise OptionError("The overlay is already in use")
    if not overlay.supports_backing:
        raise OptionError("The overlay does not support backing images")
    if overlay.backing is not None:
        raise OptionError("The overlay already has a backing image")
    live.check_free(overlay)


def _put_over(live: Live, node: Node, overlay: Node) -> Undo:
    """Under the lock."""
    graph = live.graph
    with graph.drained(), graph.lock:
        node.flush()
        kept, node.kept = node.kept, True  # it has no users for a moment
        try:
            graph.replace(node, overlay)
            try:
                graph.set_child(overlay, "backing", node)
            except BaseException:
                graph.replace(overlay, node)
                raise
        finally:
            node.kept = kept

    def undo() -> None:
        if graph.named.get(overlay.name) is not overlay:
            return  # it had no users, and was closed
        with graph.drained(), graph.lock:
            before, node.kept, overlay.kept = (node.kept, overlay.kept), True, True
            try:
                graph.set_child(overlay, "backing", None)
                graph.replace(overlay, node)
            finally:
                node.kept, overlay.kept = before
            if not overlay.kept and not overlay.parents:
                overlay.close()

    return undo


def snapshot_sync(live: Live, options: FileSnapshot) -> Undo:
    """Let the users of a node use an image over it, which is made. Returns what takes it back. Raises Error."""
    with live.lock:
        node = live.node_of(options.device, options.node_name)
        live.check_free(node)
        name = options.snapshot_node_name
        if options.node_name is not None and name is None:
            raise OptionError("New overlay node-name missing")
        if name is not None and name in live.graph.named:
            raise OptionError("New overlay node-name already in use")
        made = options.mode == "absolute-paths" and not os.path.lexists(options.snapshot_file)
        if options.mode == "absolute-paths":
            make_image(live, options.snapshot_file, options.format, node.size, node)
        spec: dict[str, Any] = {"driver": options.format, "file": {"filename": options.snapshot_file}, "backing": None}
        if name is not None:
            spec["node-name"] = name
        try:
            overlay = live.graph.open_spec(spec, OpenFlags(writable=True, perm=0, shared=ALL))
        except OSError as exc:
            text = "Could not open '%s': %s" % (options.snapshot_file, exc.strerror or exc)
            raise Error(text, filename=options.snapshot_file, errno=exc.errno) from exc
        try:
            if not overlay.supports_backing:
                raise OptionError("The overlay does not support backing images")
            undo = _put_over(live, node, overlay)
        except BaseException:
            overlay.close()
            raise
        if not overlay.parents:
            overlay.close()  # as in QEMU: nobody asked for it to stay open

    def undo_all() -> None:
        undo()
        if made:
            os.unlink(options.snapshot_file)

    return undo_all


def internal_snapshot(live: Live, options: InternalSnapshot) -> Undo:
    """Keep the present content of a node inside of its image. Returns what takes it back. Raises Error."""
    with live.lock:
        node = live.root_node(options.device)
        live.check_free(node)
        if node.read_only:
            raise Error("Device '%s' is read only" % options.device)
        if not options.name:
            raise OptionError("Name is empty")
        with live.graph.drained():
            if any(found.name == options.name for found in node.snapshots()):
                raise Error("Snapshot with name '%s' already exists on device '%s'" % (options.name, options.device))
            now = time_ns()
            like = Snapshot("", options.name, 0, now // 10**9, now % 10**9, now, None)
            made = node.create_snapshot(options.name, like)
            node.flush()

    def undo() -> None:
        with live.graph.drained():
            node.delete_snapshot(options.name, made.id)

    return undo


def delete_internal(live: Live, device: str, id: Optional[str] = None, name: Optional[str] = None) -> Snapshot:
    """Remove a snapshot inside of the image of a node; what it was. Raises Error."""
    with live.lock:
        node = live.root_node(device)
        live.check_free(node)
        if id is None and name is None:
            raise OptionError("Name or id must be provided")
        with live.graph.drained():
            for found in node.snapshots():
                if (id is None or found.id == id) and (name is None or found.name == name):
                    node.delete_snapshot(found.name, found.id)
                    node.flush()
                    return found
        raise Error("Snapshot with id '%s' and name '%s' does not exist on device '%s'" % (id or "null", name or "null", device))


__all__ = ["FileSnapshot", "InternalSnapshot", "OverlaySnapshot", "delete_internal", "internal_snapshot", "snapshot", "snapshot_sync"]
