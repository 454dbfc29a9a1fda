# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`compare`: whether two images hold the same data (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from .ui import UI

COMMAND = Command(
    "compare",
    "Tell whether two images hold the same data. Where one is longer, the rest of it must read as zeroes.",
    ["[--image-opts | [-f FMT1] [-F FMT2]] [-s] [-T CACHE] [-U] [-p] [-q]", "[--object OBJDEF]... FILENAME1 FILENAME2"],
    [
        spec.HELP,
        spec.QUIET,
        spec.OBJECT,
        spec.CACHE,
        Option("--image-opts", FLAG, help="the file names are lists of options; excludes -f and -F"),
        Option(
            "-f --a-format --left-format",
            VALUE,
            "FMT1",
            "format of FILENAME1; without it, the format is detected",
            key="format1",
        ),
        Option(
            "-F --b-format --right-format",
            VALUE,
            "FMT2",
            "format of FILENAME2; without it, the format is detected",
            key="format2",
        ),
        spec.FORCE_SHARE,
        Option("-s --strict", FLAG, help="the sizes and what is allocated must be the same too"),
        Option("-p", FLAG, key="p", help="show progress"),
        spec.progress_option("--progress"),
    ],
    [("FILENAME1, FILENAME2", "the images")],
    "Exit codes: 0 the images are the same, 1 they differ (or the command line cannot be read),\n"
    "2 an image cannot be opened, 3 the block status or 4 the data of an image cannot be read.",
    failure=2,
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `compare` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    ui.quiet = "quiet" in given
    spec.settle_progress_argument(given, 2, 2)
    if len(given.operands) != 2:
        raise UsageError("Expecting two image file names")
    cache = given.get("cache", "writeback")
    with ui.progress("compare", given, 2.0) as progress:
        spec.check_cache_mode(cache)
        spec.check_one_image_form("image_opts" in given, given.get("format1"))
        result = compare(
            given.operands[0],
            given.operands[1],
            format1=given.get("format1"),
            format2=given.get("format2"),
            image_opts="image_opts" in given,
            strict="strict" in given,
            cache=cache,
            force_share="force_share" in given,
            objects=given.objects,
            progress=progress.update,
        )
        raise NotImplementedError(result)  # print the result inside the `with`: qemu-img's newline of -p comes after it


def compare(
    filename1: str,
    filename2: str,
    *,
    format1: Optional[str] = None,
    format2: Optional[str] = None,
    image_opts: bool = False,
    strict: bool = False,
    cache: str = "writeback",
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    progress: Optional[Callable[[int, int], None]] = None,
) -> Any:
    """Compare the guest data of two images; the result says whether they are the same and if not, where and how.

    `progress` is called with (bytes done, bytes in all). Raises Error or OSError.
    """
    raise NotImplementedError
