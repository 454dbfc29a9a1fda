# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`amend`: change options of an image that exists (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from .. import drivers
from ..errors import OptionError
from ..graph import Graph
from ..node import OpenFlags, cache_flags
from ..options import parse_value, split_pairs
from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI
    from diskwright.progress import Progress

    from ..graph import OpenPolicy
    from ..node import Node

COMMAND = Command(
    "amend",
    "Change options that an image was made with.",
    ["[-f FMT | --image-opts] [-t CACHE] [--force] [-p] [-q]", "[--object OBJDEF]... -o OPTIONS FILENAME"],
    [
        spec.HELP,
        spec.QUIET,
        Option("-p", FLAG, key="p", help="show progress"),
        spec.progress_option("--progress"),
        spec.OBJECT,
        spec.FORMAT,
        spec.WRITE_CACHE,
        Option("-o --options", VALUE, "OPTIONS", "what to change: k=v,k2=v2; help lists what the format has"),
        spec.IMAGE_OPTS,
        Option("--force", FLAG, help="allow what may make the image unusable"),
    ],
    [("FILENAME", "the image")],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `amend` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    ui.quiet = "quiet" in given
    if "options" not in given:
        raise UsageError("Must specify options (-o)")
    spec.settle_progress_argument(given, 1, 1)
    options = given["options"]
    with ui.progress("amend", given, 1.0) as progress:
        try:
            _run(given, ui, progress, options)
        except spec.Answer as answer:
            ui.write(str(answer))
    return 0


def _run(given: spec.Given, ui: UI, progress: Progress, options: str) -> None:
    wants_help = spec.wants_help(options)
    if wants_help and given.get("format"):
        raise spec.Answer(options_help(given["format"]))
    if len(given.operands) != 1:
        raise OptionError("Expecting one image file name")
    cache = given.get("cache", "writeback")
    spec.check_cache_mode(cache, "cache")
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    amend(
        given.operands[0],
        options,
        format=given.get("format"),
        image_opts="image_opts" in given,
        cache=cache,
        force="force" in given,
        objects=given.objects,
        progress=progress.update,
        warn=ui.caution,
        begin=progress.start,
        asks=wants_help,
    )
    progress.finish()


def options_help(format: str) -> str:
    """What -o help prints. Raises OptionError for a format that is unknown or has nothing to amend."""
    if format not in drivers.FORMATS and format not in drivers.PROTOCOLS and format not in drivers.FILTERS:
        raise OptionError("Unknown file format '%s'" % format)
    cls = drivers.lookup(format)
    record = getattr(cls, "amend_options", None)
    if record is None:
        raise OptionError("Format driver '%s' does not support option amendment" % format)
    return "Amend options for '%s':\n" % format + "".join(line + "\n" for line in record.help_lines())


def amend(
    filename: str,
    options: str,
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    cache: str = "writeback",
    force: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    progress: Optional[Callable[[int, int], None]] = None,
    warn: Optional[Callable[[str], None]] = None,
    begin: Optional[Callable[[], None]] = None,
    asks: bool = False,
) -> None:
    """Give the image `filename` the `options`, "k=v,k2=v2" in QEMU's grammar.

    `force` allows what may make the image unusable. `progress` is called with (steps done, steps in all). Raises
    OptionError for options that the format has not, or cannot change; Error. `begin` is called once the image is open and
    the options are read; `asks` is for a command line that wants the list of options of whatever format the image has.
    """
    settings = cache_flags(cache)
    if settings is None:
        raise OptionError("Invalid cache option: %s" % cache)
    flags = OpenFlags(writable=True, resize=True, **settings)
    with Graph(policy, objects, warn).open(filename, format, flags, image_opts) as node:
        if asks:
            raise spec.Answer(options_help(node.driver))
        record = getattr(node, "amend_options", None)
        if record is None:
            raise OptionError("Format driver '%s' does not support option amendment" % node.driver, filename=filename)
        values = _read(node, record, options)
        if begin is not None:
            begin()
        node.amend(record.from_mapping(values).bind(objects or {}), force, progress)


def _read(node: Node, record: Any, text: str) -> dict[str, Any]:
    """The options given, by key, parsed. Raises OptionError in QEMU's words."""
    values: dict[str, Any] = {}
    created = getattr(node, "create_options", None)
    for key, value in split_pairs(text):
        field = record.fields.get(key)
        if field is None:
            known = created is not None and key in created.fields
            hint = "This option is only supported for image creation" if known else None
            raise OptionError("Invalid parameter '%s'" % key, filename=node.filename, hint=hint)
        values[key] = parse_value(field, value, key)
    return values
