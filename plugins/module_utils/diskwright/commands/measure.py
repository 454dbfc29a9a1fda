# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`measure`: how large an image file would be (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..graph import Graph
from ..node import OpenFlags
from . import spec
from .creation import CreationOptions, creatable
from .snapshot import load
from .spec import VALUE, Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..graph import OpenPolicy
    from ..node import Measure, Node

COMMAND = Command(
    "measure",
    "Compute how many bytes an image file would take: a new one, or one converted from another image.",
    [
        "[-O FMT] [-o OPTIONS] [-f FMT | --image-opts] [-l SNAPSHOT] [-U]",
        "[--object OBJDEF]... [--output human|json] (--size SIZE | FILENAME)",
    ],
    [
        spec.HELP,
        Option("-O --target-format", VALUE, "FMT", "format of the image to be made (default: raw)"),
        Option("-f --format", VALUE, "FMT", "format of FILENAME; without it, the format is detected", key="format"),
        spec.IMAGE_OPTS,
        Option("-o --options", VALUE, "OPTIONS", "options of the image to be made: KEY=VALUE,...", key="options"),
        Option(
            "-l --snapshot",
            VALUE,
            "SNAPSHOT",
            "measure this internal snapshot of FILENAME",
            key="snapshot",
            check=spec.check_snapshot,
        ),
        spec.OBJECT,
        spec.OUTPUT,
        Option("--size", VALUE, "SIZE", "measure a new image of so many bytes", check=spec.size_argument("image size")),
        spec.FORCE_SHARE,
        Option("-s", VALUE, "SIZE", "the same as --size", key="size", check=spec.size_argument("image size")),
    ],
    [("FILENAME", "the image that would be converted")],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `measure` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    operands = given.operands
    if len(operands) > 1:
        raise spec.OptionError("At most one filename argument is allowed.")
    if not operands and any(key in given for key in ("image_opts", "format", "snapshot")):
        raise spec.OptionError("--image-opts, -f, and -l require a filename argument.")
    if not operands and "size" not in given:
        raise spec.OptionError("Either --size N or one filename must be specified.")
    if operands and "size" in given:
        raise spec.OptionError("--size N cannot be used together with a filename.")
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    result = measure(
        operands[0] if operands else None,
        size=given.get("size"),
        target_format=given.get("target_format", "raw"),
        options=given.get("options"),
        format=given.get("format"),
        image_opts="image_opts" in given,
        snapshot=given.get("snapshot"),
        force_share="force_share" in given,
        objects=given.objects,
        warn=ui.caution,
    )
    if given.get("output") == "json":
        from ..json_text import dumps

        ui.write(dumps(as_dict(result), 0) + "\n")
    else:
        ui.write(human(result))
    return 0


def as_dict(result: Measure) -> dict[str, int]:
    """The result as qemu-img measure --output=json has it (QAPI's BlockMeasureInfo)."""
    values = {"required": result.required, "fully-allocated": result.fully_allocated}
    if result.bitmaps is not None:
        values["bitmaps"] = result.bitmaps
    return values


def human(result: Measure) -> str:
    """The lines that qemu-img measure prints."""
    text = "required size: %d\nfully allocated size: %d\n" % (result.required, result.fully_allocated)
    return text if result.bitmaps is None else text + "bitmaps size: %d\n" % result.bitmaps


def measure(
    filename: Optional[str] = None,
    *,
    size: Optional[int] = None,
    target_format: str = "raw",
    options: Optional[str] = None,
    format: Optional[str] = None,
    image_opts: bool = False,
    snapshot: Optional[str] = None,
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> Measure:
    """The size in bytes of a `target_format` image made with `options` ("k=v,..."), holding either a new disk of `size`
    bytes or what the image `filename` (or its snapshot `snapshot`: a name, an id, or "snapshot.id=I,snapshot.name=N")
    holds.

    The result has `required`, `fully_allocated` and `bitmaps` (None if there are none). Raises Error or OSError.
    """
    if filename is None:
        return _measure(None, size or 0, target_format, options, objects)
    with Graph(policy, objects, warn).open(filename, format, OpenFlags(force_share=force_share), image_opts) as source:
        if snapshot is not None:
            load(source, snapshot)
        return _measure(source, source.size, target_format, options, objects)


def _measure(source: Optional[Node], size: int, target_format: str, options: Optional[str], objects: Optional[Mapping[str, Any]]) -> Measure:
    own, protocol = creatable(target_format, None)
    try:
        chosen = CreationOptions(own, protocol, options, objects)
    except spec.OptionError as error:
        raise spec.InvalidOptions(error, "Invalid options for file format '%s'" % target_format) from error
    chosen.set("size", size)
    return own.measure(chosen.own_record(), source)
