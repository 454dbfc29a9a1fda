# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`compare`: whether two images hold the same data (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..copy.difference import CONTENT, STATUS_DIFFERS, ReadError, StatusError
from ..copy.difference import compare as difference
from ..errors import OptionError
from ..graph import Graph
from ..node import OpenFlags, cache_flags
from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..graph import OpenPolicy

MISMATCH = "Warning: Image size mismatch!\n"

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
        try:
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
                notice=ui.say,
                warn=None if ui.quiet else ui.caution,
            )
        except (StatusError, ReadError) as error:
            ui.error(str(error))
            return 3 if isinstance(error, StatusError) else 4
        ui.say(result.text() + "\n")
    return 0 if result.identical else 1


class Comparison:
    """What a comparison found: `identical`, or the first difference.

    `kind` is "content", "status" (strict only) or "size" (strict only), `offset` where it is in bytes (None for "size");
    `sizes` are the virtual sizes of the two images.
    """

    __slots__ = ("kind", "offset", "sizes")

    def __init__(self, kind: Optional[str], offset: Optional[int], sizes: tuple[int, int]) -> None:
        self.kind = kind
        self.offset = offset
        self.sizes = sizes

    @property
    def identical(self) -> bool:
        return self.kind is None

    def __bool__(self) -> bool:
        return self.identical

    def __repr__(self) -> str:
        return "Comparison(kind=%r, offset=%r, sizes=%r)" % (self.kind, self.offset, self.sizes)

    def text(self) -> str:
        """The result in qemu-img's words."""
        if self.kind == "size":
            return "Strict mode: Image size mismatch!"
        if self.kind == STATUS_DIFFERS:
            return "Strict mode: Offset %d block status mismatch!" % (self.offset or 0)
        if self.kind == CONTENT:
            return "Content mismatch at offset %d!" % (self.offset or 0)
        return "Images are identical."


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
    policy: Optional[OpenPolicy] = None,
    progress: Optional[Callable[[int, int], None]] = None,
    notice: Optional[Callable[[str], None]] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> Comparison:
    """Compare the guest data of two images; the result says whether they are the same and if not, where and how.

    Where one is longer, the rest of it must be zeroes; with `strict` the sizes must be the same, and how the data is stored.
    `progress` is called with (bytes done, bytes in all), `notice` with a line about differing sizes, `warn` with what there is to know about
    the images. Raises StatusError or ReadError where an image cannot be read, Error where it cannot be opened.
    """
    flags = cache_flags(cache)
    if flags is None:
        raise OptionError("Invalid source cache option: %s" % cache)
    graph = Graph(policy, objects, warn)
    opening = OpenFlags(force_share=force_share, **flags)
    with graph.open(filename1, format1, opening, image_opts) as left, graph.open(filename2, format2, opening, image_opts) as right:
        sizes = left.size, right.size
        if sizes[0] != sizes[1] and strict:
            return Comparison("size", None, sizes)
        tail = min(sizes) if sizes[0] != sizes[1] and notice is not None else None
        try:
            found = difference(left, right, strict=strict, progress=progress)
        except (StatusError, ReadError) as error:
            if tail is not None and notice is not None and (error.offset or 0) >= tail:
                notice(MISMATCH)
            raise
        if tail is not None and notice is not None and (found is None or found.offset >= tail):
            notice(MISMATCH)
    return Comparison(None, None, sizes) if found is None else Comparison(found.kind, found.offset, sizes)
