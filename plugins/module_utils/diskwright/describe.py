# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What an image is, as a record (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, ImageInfo)."""

from __future__ import annotations

from .errors import Error, OptionError
from .graph import Graph, OpenPolicy, identity, parse_filename, resolve_name
from .node import OpenFlags, Reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional

    from .node import Node, Snapshot

SECTOR = 512  # QEMU counts sizes in these


class ImageInfo:
    """What info tells of one node; sizes in bytes, None for what the driver cannot say.

    `filename` is the name that opens the node, a json: name where no plain one does. `backing_filename` is as stored,
    `full_backing_filename` as seen from the working directory. `format_specific` is what only this format stores, in
    QEMU's keys, with its kind in `format_specific_type`. `children` are (name, ImageInfo) pairs.
    """

    __slots__ = (
        "filename",
        "format",
        "is_protocol",
        "virtual_size",
        "actual_size",
        "dirty",
        "cluster_size",
        "encrypted",
        "compressed",
        "backing_filename",
        "full_backing_filename",
        "backing_format",
        "snapshots",
        "format_specific_type",
        "format_specific",
        "children",
    )

    def __init__(self, node: Node, nested: bool = False) -> None:
        """Describe `node` as it is now, and its children; the backing file is one of them where the node itself is (`nested`)."""
        self.filename = node.filename
        self.format = node.driver
        self.is_protocol = node.leaf
        self.virtual_size = -(-node.size // SECTOR) * SECTOR  # of a file too
        self.actual_size = node.disk_size()
        self.dirty = node.dirty
        self.cluster_size = node.cluster_size
        self.encrypted = node.encrypted
        self.compressed = node.compressed
        self.backing_filename = node.backing_filename
        self.full_backing_filename: Optional[str] = None
        self.backing_format = node.backing_format
        if node.backing_filename is not None:
            try:
                self.full_backing_filename = resolve_name(node, node.backing_filename)
            except OptionError:
                pass  # relative to nothing
        self.snapshots = node.snapshots()
        self.format_specific = node.format_specific()
        # a host device is a file in this respect
        self.format_specific_type = "file" if node.leaf and node.driver.startswith("host_") else node.driver
        shown = sorted(node.children.items(), key=lambda child: child[0] != "backing") if nested else node.children.items()
        self.children = [(role, ImageInfo(child, True)) for role, child in shown if nested or role != "backing"]

    def as_dict(self) -> dict[str, Any]:
        """The record as qemu-img info --output=json has it (QAPI's BlockGraphInfo)."""
        values: dict[str, Any] = {"filename": self.filename, "format": self.format, "virtual-size": self.virtual_size}
        if self.dirty is not None:
            values["dirty-flag"] = self.dirty
        if self.actual_size is not None:
            values["actual-size"] = self.actual_size
        for key, value in (
            ("cluster-size", self.cluster_size),
            ("encrypted", self.encrypted),
            ("compressed", self.compressed),
        ):
            if value:
                values[key] = value
        if self.backing_filename is not None:
            values["backing-filename"] = self.backing_filename
            if self.full_backing_filename is not None:
                values["full-backing-filename"] = self.full_backing_filename
            if self.backing_format:
                values["backing-filename-format"] = self.backing_format
        if self.snapshots:
            values["snapshots"] = [_snapshot(snapshot) for snapshot in self.snapshots]
        if self.format_specific is not None:
            values["format-specific"] = {"type": self.format_specific_type, "data": self.format_specific}
        values["children"] = [{"name": name, "info": child.as_dict()} for name, child in self.children]
        return values


def info(
    filename: str,
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    backing_chain: bool = False,
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> list[ImageInfo]:
    """Describe the image `filename` (image options if `image_opts`): one record, or with `backing_chain` one for each
    image from the top to the last backing file.

    Opens read-only, without backing files unless `backing_chain`, and then as far as `policy` admits them. `objects` are
    secrets and throttle groups by id. Raises Error or OSError.
    """
    policy = policy or OpenPolicy()
    flags = OpenFlags(force_share=force_share, no_backing=True, no_io=True)
    records: list[ImageInfo] = []
    seen: set[Any] = set()
    while True:
        graph = Graph(policy, objects, warn)
        with graph.open(filename, format, flags, image_opts) as node:
            own = identity(node)
            if own is not None and own in seen:
                raise Error("Backing file '%s' creates an infinite loop." % filename, filename=filename)
            seen.add(own)
            record = ImageInfo(node)
            records.append(record)
            if backing_chain and record.full_backing_filename is None and record.backing_filename:
                raise Error("Could not determine absolute backing filename, but backing filename '%s' present" % record.backing_filename)
            if not backing_chain or not record.full_backing_filename:
                return records
            filename, format, image_opts = record.full_backing_filename, record.backing_format or None, False
            policy.admit(node, Reference("backing", node.backing_filename or "", format), _described(filename))
            if len(records) >= policy.max_chain:
                raise Error("The backing chain is deeper than %d images" % policy.max_chain, filename=filename)


def _described(filename: str) -> dict[str, Any]:
    try:
        return parse_filename(filename)
    except Error:
        return {}  # the attempt to open it will say what is wrong


def _snapshot(snapshot: Snapshot) -> dict[str, Any]:
    values = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec // 1000000000,
        "vm-clock-nsec": snapshot.vm_clock_nsec % 1000000000,
    }
    if snapshot.icount is not None:
        values["icount"] = snapshot.icount
    return values
