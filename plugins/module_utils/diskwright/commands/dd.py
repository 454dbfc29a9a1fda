# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`dd`: copy blocks of one image to a new image (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..copy.transfer import SECTOR, copy
from ..errors import Error
from ..graph import Graph
from ..node import OpenFlags
from . import spec
from .creation import CreationOptions, creatable
from .output import Output
from .spec import VALUE, Command, Option, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..graph import OpenPolicy

COMMAND = Command(
    "dd",
    "Copy blocks of one image to a new image, which is overwritten if it exists.",
    [
        "[-f FMT | --image-opts] [-O OUTPUT_FMT] [-U] [--object OBJDEF]...",
        "[bs=SIZE] [count=N] [skip=N] if=INPUT of=OUTPUT",
    ],
    [
        spec.HELP,
        spec.OBJECT,
        Option("-f --format", VALUE, "FMT", "format of INPUT; without it, the format is detected", key="format"),
        Option("-O --output-format", VALUE, "OUTPUT_FMT", "format of OUTPUT (default: raw)"),
        Option("--image-opts", help="INPUT is a list of options and not a file name; excludes --format"),
        spec.FORCE_SHARE,
    ],
    [
        ("if=INPUT", "the image to read"),
        ("of=OUTPUT", "the image to make"),
        ("bs=SIZE", "block size in bytes (default: 512); suffixes k, M, G count in 1024s"),
        (
            "count=N",
            "read no further than block N of INPUT, counted from its beginning\n(unlike dd(1), skipped blocks count)",
        ),
        ("skip=N", "leave out the first N blocks"),
    ],
)

_OPERANDS = {
    "bs": spec.size_argument("bs", 1, (1 << 31) - 1),
    "count": spec.number_argument("count"),
    "skip": spec.number_argument("skip"),
}


def main(args: Sequence[str], ui: UI) -> int:
    """Run `dd` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    operands: dict[str, Any] = {}
    for operand in given.operands:
        key, equals, text = operand.partition("=")
        if not equals or key not in ("if", "of", "bs", "count", "skip"):
            raise spec.OptionError("unrecognized operand %s" % key)
        operands[key] = _OPERANDS[key](text) if key in _OPERANDS else text
    if "if" not in operands or "of" not in operands:
        raise spec.OptionError("Must specify both input and output files")
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    dd(
        operands["if"],
        operands["of"],
        format=given.get("format"),
        output_format=given.get("output_format", "raw"),
        image_opts="image_opts" in given,
        block_size=operands.get("bs", 512),
        count=operands.get("count"),
        skip=operands.get("skip", 0),
        force_share="force_share" in given,
        objects=given.objects,
        notice=ui.error,
        warn=ui.caution,
    )
    return 0


def dd(
    source: str,
    target: str,
    *,
    format: Optional[str] = None,
    output_format: str = "raw",
    image_opts: bool = False,
    block_size: int = 512,
    count: Optional[int] = None,
    skip: int = 0,
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    atomic: bool = False,
    progress: Optional[Callable[[int, int], None]] = None,
    notice: Optional[Callable[[str], None]] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> None:
    """Make the image `target` of the bytes of `source` from block `skip` up to block `count`, blocks of `block_size` bytes.

    As in qemu-img, `count` is counted from the beginning of the source and not from `skip`. With `atomic` the target gets
    its name only when it is whole. `notice` is told if there is nothing behind `skip`: then the target is empty; `warn` is
    told what there is to know about the images. `progress` is called with (bytes done, bytes in all) and ends the work by
    raising. Raises Error.
    """
    graph = Graph(policy, objects, warn)
    with graph.open(source, format, OpenFlags(force_share=force_share), image_opts) as node:
        try:
            own, protocol = creatable(output_format, target)
        except OptionError as exc:
            if str(exc).startswith("Unknown file format"):
                raise OptionError("Unknown file format") from None
            raise
        end = node.size if count is None else min(node.size, count * block_size)
        start = skip * block_size
        if start > end and notice is not None:
            notice("%s: cannot skip to specified offset" % source)
        size = max(0, end - start)
        chosen = CreationOptions(own, protocol, None, objects)
        chosen.set("size", -(-size // SECTOR) * SECTOR)
        with Output(target, atomic) as output:
            output.create(chosen, [node], "creating output image")
            writable = OpenFlags(writable=True, no_flush=not atomic)
            with output.open(graph, output_format, writable) as image:
                try:
                    copy([node], image, offset=start, length=size, target_is_zero=image.zero_initialized, progress=progress)
                except Error as exc:
                    raise _in_words_of_dd(exc) from exc


def _in_words_of_dd(exc: Error) -> Error:
    """The engine's errors as dd tells them."""
    text = str(exc)
    for begin, words in (
        ("error while reading", "error while reading from input image file"),
        ("error while writing", "error while writing to output image file"),
    ):
        if text.startswith(begin):
            text = words + text[text.index(":") :]
    return Error(text, filename=exc.filename, offset=exc.offset, errno=exc.errno, hint=exc.hint)
