# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`create`: make a new image (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from .ui import UI

COMMAND = Command(
    "create",
    "Make a new image that reads as zeroes, or as its backing file. An existing FILENAME is overwritten.",
    ["[-f FMT] [-o OPTIONS]... [-b BACKING -F BACKING_FMT [-u]] [-q]", "[--object OBJDEF]... FILENAME [SIZE]"],
    [
        spec.HELP,
        spec.QUIET,
        spec.OBJECT,
        Option("-f --format", VALUE, "FMT", "format of the new image (default: raw)", key="format"),
        Option("-b --backing", VALUE, "BACKING", "what is not written yet is read from this image", key="backing"),
        Option("-F -B --backing-format", VALUE, "BACKING_FMT", "format of BACKING", key="backing_format"),
        Option("-u --backing-unsafe", FLAG, help="do not look at BACKING at all; SIZE is needed then"),
        Option(
            "-o --options",
            VALUE,
            "OPTIONS",
            "options of the format: KEY=VALUE,... (-o help lists them);\nmay be repeated",
            key="options",
        ),
    ],
    [
        ("FILENAME", "the image to make"),
        ("SIZE", "its size in bytes; suffixes k, M, G, T, P, E count in 1024s;\nwithout it, the size of BACKING"),
    ],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `create` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    ui.quiet = "quiet" in given
    operands = given.operands
    filename = operands[0] if operands else None
    format = given.get("format", "raw")
    options = given.get("options")
    if spec.wants_help(options):
        from .help import creation_options

        raise spec.Answer(creation_options(format, filename))
    if filename is None:
        raise UsageError("Expecting image file name")
    size = spec.read_size(operands[1], "image size") if len(operands) > 1 else None
    if len(operands) > 2:
        raise UsageError("Unexpected argument: %s" % operands[2])
    create(
        filename,
        size,
        format=format,
        options=options,
        backing=given.get("backing"),
        backing_format=given.get("backing_format"),
        backing_unsafe="backing_unsafe" in given,
        objects=given.objects,
        announce=ui.say,
    )
    return 0


def create(
    filename: str,
    size: Optional[int] = None,
    *,
    format: str = "raw",
    options: Optional[str] = None,
    backing: Optional[str] = None,
    backing_format: Optional[str] = None,
    backing_unsafe: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    announce: Optional[Callable[[str], None]] = None,
) -> None:
    """Make the image `filename` of `size` bytes (rounded up to 512), or of its backing image's size.

    `options` are the format's, "k=v,k2=v2" in QEMU's grammar. `announce` is called with the line "Formatting ...\n" once
    the options are known to be good and before anything is written. Raises Error (its text begins with the file name)
    or OSError.
    """
    raise NotImplementedError
