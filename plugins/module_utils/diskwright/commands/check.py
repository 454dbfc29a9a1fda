# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`check`: look for inconsistencies, and repair them (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from . import spec
from .spec import VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, Sequence

    from .ui import UI


def _repair_argument(text: str) -> str:
    if text not in ("leaks", "all"):
        raise UsageError("--repair (-r) expects 'leaks' or 'all' not '%s'" % text)
    return text


COMMAND = Command(
    "check",
    "Look for inconsistencies in an image, and repair them if asked to.",
    [
        "[-f FMT | --image-opts] [-T CACHE] [-r leaks|all] [-U] [-q]",
        "[--output human|json] [--object OBJDEF]... FILENAME",
    ],
    [
        spec.HELP,
        spec.QUIET,
        spec.FORMAT,
        spec.CACHE,
        Option(
            "-r --repair",
            VALUE,
            "leaks|all",
            "repair only leaked clusters, or everything that can be repaired;\nthe image is opened for writing (excludes --force-share)",
            check=_repair_argument,
        ),
        spec.OUTPUT,
        spec.OBJECT,
        spec.IMAGE_OPTS,
        spec.FORCE_SHARE,
    ],
    [("FILENAME", "the image")],
    "Exit codes: 0 the image is consistent (after the repair, if there was one), 1 the check itself\n"
    "failed, 2 corruptions were found, 3 leaked clusters but no corruptions, 63 the format cannot be\nchecked.",
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `check` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    ui.quiet = "quiet" in given
    if len(given.operands) != 1:
        raise UsageError("Expecting one image file name")
    cache = given.get("cache", "writeback")
    spec.check_cache_mode(cache)
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    result = check(
        given.operands[0],
        format=given.get("format"),
        image_opts="image_opts" in given,
        repair=given.get("repair"),
        cache=cache,
        force_share="force_share" in given,
        objects=given.objects,
    )
    raise NotImplementedError((result, given.get("output", "human")))


def check(
    filename: str,
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    repair: Optional[str] = None,
    cache: str = "writeback",
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
) -> Any:
    """Check the image `filename` and, if `repair` is "leaks" or "all", repair it and check again.

    Returns the last check's result together with what was fixed. Raises Unsupported if the format has no check, Error or
    OSError if the check cannot be done.
    """
    raise NotImplementedError
