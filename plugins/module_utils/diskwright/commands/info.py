# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`info`: what an image is (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..errors import Error, OptionError
from ..graph import Graph, OpenPolicy, identity, parse_filename, resolve_name
from ..node import OpenFlags, Reference
from ..units import MAX_SIZE, format_size
from . import spec
from .spec import FLAG, Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..node import Node, Snapshot

SECTOR = 512  # QEMU counts sizes in these

COMMAND = Command(
    "info",
    "Show what an image is: its format, its sizes, its backing file and what its format stores besides.",
    ["[-f FMT | --image-opts] [-b] [-U] [--object OBJDEF]...", "[--output human|json] FILENAME"],
    [
        spec.HELP,
        spec.FORMAT,
        spec.OUTPUT,
        Option("-b --backing-chain", FLAG, help="show the backing files of the image too, down to the last"),
        spec.OBJECT,
        spec.IMAGE_OPTS,
        spec.FORCE_SHARE,
    ],
    [("FILENAME", "the image")],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `info` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    if len(given.operands) != 1:
        raise spec.UsageError("Expecting one image file name")
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    chain = info(
        given.operands[0],
        format=given.get("format"),
        image_opts="image_opts" in given,
        backing_chain="backing_chain" in given,
        force_share="force_share" in given,
        objects=given.objects,
        warn=ui.caution,
    )
    if given.get("output") == "json":
        from ..json_text import dumps

        records = [record.as_dict() for record in chain]
        ui.write(dumps(records if "backing_chain" in given else records[0], 0) + "\n")
    else:
        ui.write("\n".join([human(record) for record in chain]))
    return 0


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


def human(record: ImageInfo, indent: int = 0, path: str = "/") -> str:
    """The lines that qemu-img info prints about `record`, a child at `path` of the image or (path "/") the image itself."""
    name, kind, length = "image", "file format", "virtual size"
    if record.is_protocol and path != "/":
        name, kind, length = "filename", "protocol type", "file length"
    lines = [
        "%s: %s" % (name, record.filename),
        "%s: %s" % (kind, record.format),
        "%s: %s (%d bytes)" % (length, format_size(record.virtual_size), record.virtual_size),
        "disk size: %s" % ("unavailable" if record.actual_size is None else format_size(record.actual_size)),
    ]
    if record.encrypted:
        lines.append("encrypted: yes")
    if record.cluster_size:
        lines.append("cluster_size: %d" % record.cluster_size)
    if record.dirty:
        lines.append("cleanly shut down: no")
    if record.backing_filename is not None:
        lines.append("backing file: " + record.backing_filename)
        if record.full_backing_filename is None:
            lines[-1] += " (cannot determine actual path)"
        elif record.full_backing_filename != record.backing_filename:
            lines[-1] += " (actual path: %s)" % record.full_backing_filename
        if record.backing_format:
            lines.append("backing file format: " + record.backing_format)
    if record.snapshots:
        lines += ["Snapshot list:", *snapshot_lines(record.snapshots)]
    if record.format_specific:
        lines += ["Format specific information:", *specific_lines(record.format_specific, 1)]
    prefix = "    " * indent
    text = "".join([prefix + line + "\n" for line in lines])
    for role, child in record.children:
        place = path.rstrip("/") + "/" + role
        text += "%sChild node '%s':\n%s" % (prefix, place, human(child, indent + 1, place))
    return text


def specific_lines(value: Any, indent: int) -> list[str]:
    """The lines of a dict or list as `key: value`, deeper levels indented further."""
    prefix = "    " * indent
    if isinstance(value, dict):
        from ..json_text import in_order

        items = [(key.replace("-", " "), value[key]) for key in in_order(value)]
    else:
        items = [("[%d]" % index, item) for index, item in enumerate(value)]
    lines = []
    for key, item in items:
        if isinstance(item, (dict, list)):
            lines += ["%s%s:" % (prefix, key), *specific_lines(item, indent + 1)]
        else:
            text = "true" if item is True else "false" if item is False else str(item)
            lines.append("%s%s: %s" % (prefix, key, text))
    return lines


def snapshot_lines(snapshots: Sequence[Snapshot]) -> list[str]:
    """The table of internal snapshots, with the local time of day."""
    from time import localtime, strftime

    row = "%-7s %-16s %8s %19s %15s %10s"
    lines = [row % ("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")]
    for snapshot in snapshots:
        seconds, nanoseconds = divmod(snapshot.vm_clock_nsec, 1000000000)
        clock = "%04d:%02d:%02d.%03d" % (seconds // 3600, seconds // 60 % 60, seconds % 60, nanoseconds // 1000000)
        date = strftime("%Y-%m-%d %H:%M:%S", localtime(snapshot.date_sec))
        icount = "--" if snapshot.icount is None else str(snapshot.icount)
        lines.append(row % (snapshot.id, snapshot.name, format_size(snapshot.vm_state_size & MAX_SIZE), date, clock, icount))
    return lines
