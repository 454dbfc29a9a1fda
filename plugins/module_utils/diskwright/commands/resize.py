# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`resize`: change the size of an image (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..getopt import Parser
from ..graph import Graph
from ..node import OpenFlags
from ..units import MAX_IMAGE_SIZE, parse_size_option
from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..graph import OpenPolicy

_EXPECTED = "Expecting image file name and size"

SHRINK_WARNING = (
    "Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an operation, "
    "make sure there is no important data there."
)
PREALLOCATION_MODES = ("off", "metadata", "falloc", "full")


def _preallocation_argument(text: str) -> str:
    if text not in PREALLOCATION_MODES:
        raise spec.OptionError("Invalid preallocation mode '%s'" % text)
    return text


COMMAND = Command(
    "resize",
    "Give an image another size. Growing adds zeroes at the end; shrinking cuts off what is there.",
    ["[-f FMT | --image-opts] [--preallocation MODE] [--shrink] [-q]", "[--object OBJDEF]... FILENAME [+|-]SIZE"],
    [
        spec.HELP,
        spec.QUIET,
        spec.OBJECT,
        spec.FORMAT,
        spec.IMAGE_OPTS,
        Option(
            "--preallocation",
            VALUE,
            "MODE",
            "how to store the added space: off (default), metadata, falloc or full",
            check=_preallocation_argument,
        ),
        Option("--shrink", FLAG, help="allow the new size to be smaller: data past it is lost"),
    ],
    [
        ("FILENAME", "the image"),
        (
            "SIZE",
            "the new size in bytes, or what to add (+) or take away (-);\nsuffixes k, M, G, T, P, E count in 1024s",
        ),
    ],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `resize` with the arguments `args`; the exit code."""
    given = _read(args, ui)
    ui.quiet = "quiet" in given
    if len(given.operands) != 2:
        raise UsageError(_EXPECTED)
    filename, size = given.operands
    sign = size[0] if size[:1] in ("+", "-") and size else ""
    number = parse_size_option(size[len(sign) :], "size")
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    try:
        resize(
            filename,
            number,
            relative={"": 0, "+": 1, "-": -1}[sign],
            format=given.get("format"),
            image_opts="image_opts" in given,
            preallocation=given.get("preallocation", "off"),
            shrink="shrink" in given,
            objects=given.objects,
            warn=ui.caution,
        )
    except WouldShrink as error:
        ui.error(str(error))
        ui.warning(error.hint or "")
        return 1
    ui.say("Image resized.\n")
    return 0


def _read(args: Sequence[str], ui: UI) -> spec.Given:
    """Read the arguments. A size like -1G may follow the file name without looking like an option."""
    given = spec.Given()
    parser = Parser(COMMAND.options, args, ui.posixly_correct)
    for option, value in COMMAND.parse(parser, ui):
        if option is not None:
            COMMAND.take(given, option, value)
            continue
        if len(given.operands) == 2:
            raise UsageError(_EXPECTED if parser.ended else "Extra argument(s) in command line")
        given.operands.append(value or "")
        following = args[parser.index] if parser.index < len(args) else ""
        if len(given.operands) == 1 and following[:1] == "-" and following[1:2] and following[1] in "0123456789":
            parser.index += 1
            given.operands.append(following)
    return given


class WouldShrink(spec.OptionError):
    """The new size is smaller, and nobody said that it may be; `hint` is a warning."""


def resize(
    filename: str,
    size: int,
    *,
    relative: int = 0,
    format: Optional[str] = None,
    image_opts: bool = False,
    preallocation: str = "off",
    shrink: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> int:
    """Give the image `filename` the size `size` bytes, or `size` more (`relative` 1) or fewer (-1). The new size.

    `preallocation` is one of PREALLOCATION_MODES and only for growing. Raises OptionError if the new size is not positive
    (its leaf WouldShrink if it is smaller without `shrink`); Error or OSError.
    """
    flags = OpenFlags(writable=True, resize=True)
    with Graph(policy, objects, warn).open(filename, format, flags, image_opts) as node:
        current = node.size
        total = current + relative * size if relative else size
        if not 0 < total <= MAX_IMAGE_SIZE:
            raise spec.OptionError("New image size must be positive", filename=filename)
        if total <= current and preallocation != "off":
            raise spec.OptionError("Preallocation can only be used for growing images", filename=filename)
        if total < current and not shrink:
            raise WouldShrink("Use the --shrink option to perform a shrink operation.", filename=filename, hint=SHRINK_WARNING)
        node.truncate(total, preallocation)
        return node.size
