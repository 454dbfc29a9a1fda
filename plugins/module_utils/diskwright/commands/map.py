# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`map`: where the data of an image is stored (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from . import spec
from .spec import VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterator, Mapping, Optional, Sequence

    from .ui import UI

COMMAND = Command(
    "map",
    "Show which parts of an image hold data, and where in its backing chain they are stored.",
    ["[-f FMT | --image-opts] [-U] [--object OBJDEF]... [-s OFFSET] [-l LENGTH]", "[--output human|json] FILENAME"],
    [
        spec.HELP,
        spec.FORMAT,
        spec.OUTPUT,
        spec.OBJECT,
        spec.IMAGE_OPTS,
        spec.FORCE_SHARE,
        Option(
            "-s --start-offset",
            VALUE,
            "OFFSET",
            "begin at this guest offset (default: 0)",
            check=spec.size_argument("start offset"),
        ),
        Option(
            "-l --max-length",
            VALUE,
            "LENGTH",
            "stop after so many bytes (default: the rest)",
            check=spec.size_argument("max length"),
        ),
    ],
    [("FILENAME", "the image")],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `map` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    if len(given.operands) != 1:
        raise UsageError("Expecting one image file name")
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    extents = map_image(
        given.operands[0],
        format=given.get("format"),
        image_opts="image_opts" in given,
        start=given.get("start_offset", 0),
        length=given.get("max_length"),
        force_share="force_share" in given,
        objects=given.objects,
    )
    raise NotImplementedError((extents, given.get("output", "human")))


def map_image(
    filename: str,
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    start: int = 0,
    length: Optional[int] = None,
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
) -> Iterator[Any]:
    """The extents of the image `filename` in [start, start + length), in bytes, as qemu-img map --output=json lists them.

    Raises Error or OSError.
    """
    raise NotImplementedError
