# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What is there: nodes, counters, jobs (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, query-named-block-nodes and others)."""

from __future__ import annotations

from ..filter import Filter
from ..graph import resolve_name
from ..root import KINDS, Root
from .filters import MirrorTop
from .recording import bitmaps, recording

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

    from ..hooks import Snapshot
    from ..node import Node
    from ..root import Counter
    from .live import Live

SECTOR = 512
MAX_DEPTH = 64  # nodes above one another that are shown within each other
_THROTTLE = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


def named_nodes(live: Live, flat: bool = False) -> list[dict[str, Any]]:
    """All nodes, newest first; with `flat` the backing nodes are not shown within their overlays. Raises Error, OSError."""
    with live.lock, live.graph.drained():
        return [node_info(live, node, flat) for node in reversed(list(live.graph.named.values()))]


def node_info(live: Live, node: Node, flat: bool = False) -> dict[str, Any]:
    """One of them (BlockDeviceInfo)."""
    recorded = recording(node)
    found: dict[str, Any] = {
        "file": node.filename,
        "node-name": node.name,
        "ro": node.read_only,
        "drv": node.driver,
        "backing_file_depth": 0,
        "active": True,
        "encrypted": node.encrypted,
        "detect_zeroes": getattr(node.flags, "detect_zeroes", None) or "off",
        "image": _image(node, flat, MAX_DEPTH),
        "cache": {"writeback": True, "direct": node.flags.direct, "no-flush": node.flags.no_flush},
        "write_threshold": recorded.threshold if recorded is not None else 0,
    }
    found.update((key, 0) for key in _THROTTLE)
    if node.backing is not None:
        found["backing_file"] = node.backing.filename
    depth, below = 0, _below(node)
    while below is not None and depth < MAX_DEPTH and not flat:
        depth, below = depth + 1, _below(below)
    found["backing_file_depth"] = depth
    dirty = [one.state(live.is_busy(one)) for one in bitmaps(node)]
    if isinstance(node, MirrorTop):
        count = node.remaining()
        dirty.insert(0, {"recording": False, "persistent": False, "busy": False, "granularity": node.unit, "count": count})
    if dirty:
        found["dirty-bitmaps"] = dirty
    return found


def _below(node: Node) -> Optional[Node]:
    """What is shown as the backing image of a node: of a filter, what it is a filter of."""
    return node.file if isinstance(node, Filter) else node.backing


def _image(node: Node, flat: bool, depth: int) -> dict[str, Any]:
    """What is known of an image (ImageInfo)."""
    found: dict[str, Any] = {"filename": node.filename, "format": node.driver, "virtual-size": -(-node.size // SECTOR) * SECTOR}
    size = node.disk_size()
    if size is not None:
        found["actual-size"] = size
    if node.dirty is not None:
        found["dirty-flag"] = node.dirty
    for key, value in (("cluster-size", node.cluster_size), ("encrypted", node.encrypted), ("compressed", node.compressed)):
        if value:
            found[key] = value
    if node.backing_filename is not None:
        found["backing-filename"] = node.backing_filename
        found["full-backing-filename"] = resolve_name(node, node.backing_filename)
        if node.backing_format:
            found["backing-filename-format"] = node.backing_format
    kept = node.snapshots()
    if kept:
        found["snapshots"] = [snapshot_json(one) for one in kept]
    specific = node.format_specific()
    if specific is not None:
        found["format-specific"] = {"type": node.driver, "data": specific}
    below = _below(node)
    if below is not None and not flat and depth:
        found["backing-image"] = _image(below, flat, depth - 1)
    return found


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """An internal snapshot (SnapshotInfo)."""
    found = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // 10**9,
        "vm-clock-nsec": snapshot.vm_clock_nsec % 10**9,
    }
    if snapshot.icount is not None:
        found["icount"] = snapshot.icount
    return found


def block_graph(live: Live) -> dict[str, Any]:
    """Nodes, their users, and the edges between them (XDbgBlockGraph)."""
    with live.lock, live.graph.lock:
        numbers: dict[int, int] = {}
        nodes: list[dict[str, Any]] = []
        edges: list[dict[str, Any]] = []

        def number(one: Any) -> int:
            if id(one) not in numbers:
                numbers[id(one)] = len(numbers) + 1
                job = isinstance(one, Root) and one.description.startswith("block job")
                kind = ("block-job" if job else "block-backend") if isinstance(one, Root) else "block-driver"
                nodes.append({"id": numbers[id(one)], "type": kind, "name": one.description if isinstance(one, Root) else one.name})
            return numbers[id(one)]

        names = ("consistent-read", "write", "write-unchanged", "resize")
        for node in live.graph.named.values():
            for edge in node.parents:
                perm, shared = ([name for bit, name in enumerate(names) if value >> bit & 1] for value in (edge.perm, edge.shared))
                edges.append({"parent": number(edge.user), "child": number(node), "name": edge.role, "perm": perm, "shared-perm": shared})
            number(node)
        return {"nodes": nodes, "edges": edges}


# -- counters --------------------------------------------------------------------------------------------------------


def block_stats(live: Live, query_nodes: bool = False) -> list[dict[str, Any]]:
    """Counters of the users of nodes, by their exports; with `query_nodes` of all nodes, by what their users counted."""
    with live.lock:
        if not query_nodes:
            return [_export_stats(export) for export in live.exports or ()]
        return [_node_stats(node, MAX_DEPTH) for node in live.graph.named.values()]


def _export_stats(export: Any) -> dict[str, Any]:
    node = export.root.node
    return {"device": "", "qdev": export.id, "node-name": node.name, "stats": stats([export.root]), **_inner(node, MAX_DEPTH)}


def _node_stats(node: Node, depth: int) -> dict[str, Any]:
    roots = [edge.user for edge in node.parents if isinstance(edge.user, Root)]
    return {"node-name": node.name, "stats": stats(roots), **_inner(node, depth)}


def _inner(node: Node, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    file = node.children.get("file")
    if depth and file is not None:
        found["parent"] = _node_stats(file, depth - 1)
    if depth and node.backing is not None:
        found["backing"] = _node_stats(node.backing, depth - 1)
    return found


def stats(roots: list[Root]) -> dict[str, Any]:
    """The counters of some users together (BlockDeviceStats)."""
    found: dict[str, Any] = {"account_failed": False, "account_invalid": False, "timed_stats": []}
    found["wr_highest_offset"] = max((root.highest_write for root in roots), default=0)
    shown = {"rd": "rd", "wr": "wr", "flush": "flush", "unmap": "unmap"}
    for kind, name in shown.items():
        counters: list[Counter] = [root.counters[one] for root in roots for one in KINDS if one == kind or kind == "wr" and one == "zero"]
        found[name + "_operations"] = sum(counter.operations for counter in counters)
        found[name + "_total_time_ns"] = sum(counter.nanoseconds for counter in counters)
        found["failed_%s_operations" % name] = sum(counter.failed for counter in counters)
        found["invalid_%s_operations" % name] = 0
        if kind != "flush":
            found[name + "_bytes"] = sum(counter.bytes for counter in counters)
            found[name + "_merged"] = 0
    for name in ("bytes", "operations", "merged", "total_time_ns"):
        found["zone_append_" + name] = 0
    found["failed_zone_append_operations"] = found["invalid_zone_append_operations"] = 0
    return found


def jobs(live: Live) -> list[dict[str, Any]]:
    """All jobs (JobInfo)."""
    with live.lock:
        return [job.as_json() for job in reversed(list(live.jobs))]


def block_jobs(live: Live) -> list[dict[str, Any]]:
    """The block jobs (BlockJobInfo)."""
    from .block import BlockJob

    with live.lock:
        return [job.block_json() for job in reversed(list(live.jobs)) if isinstance(job, BlockJob)]
