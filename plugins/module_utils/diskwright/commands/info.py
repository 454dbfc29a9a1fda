# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`info`: what an image is (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from . import spec
from .spec import FLAG, Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, Sequence

    from .ui import UI

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
    )
    raise NotImplementedError((chain, given.get("output", "human")))


def info(
    filename: str,
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    backing_chain: bool = False,
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
) -> list[Any]:
    """Describe the image `filename` (image options if `image_opts`): one record, or with `backing_chain` one for each
    image from the top to the last backing file.

    Opens read-only, without backing files unless `backing_chain`. `objects` are secrets and throttle groups by id.
    Raises Error or OSError.
    """
    raise NotImplementedError
