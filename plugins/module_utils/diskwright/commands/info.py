# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`info`: what an image is (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..describe import ImageInfo, info
from ..units import MAX_SIZE, format_size
from . import spec
from .spec import FLAG, Command, Option

__all__ = ["COMMAND", "ImageInfo", "human", "info", "main", "snapshot_lines", "specific_lines"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Sequence

    from diskwright.commands.ui import UI

    from ..node import Snapshot

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
