# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`check`: look for inconsistencies, and repair them (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..errors import Unsupported
from ..graph import Graph
from ..node import OpenFlags, cache_flags
from . import spec
from .spec import VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI
    from diskwright.tally import CheckResult

    from ..graph import OpenPolicy


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
    try:
        result = check(
            given.operands[0],
            format=given.get("format"),
            image_opts="image_opts" in given,
            repair=given.get("repair"),
            cache=cache,
            force_share="force_share" in given,
            objects=given.objects,
            warn=ui.caution,
        )
    except NoCheck as error:
        ui.error(str(error))
        return 63
    if result.messages:
        # some lines begin with the program's name, which the driver does not know
        own = "qemu-img: "
        ui.hint("\n".join("%s: %s" % (ui.name, line[len(own) :]) if line.startswith(own) else line for line in result.messages))
    if result.omitted:
        ui.hint("(and %d more lines)" % result.omitted)
    if given.get("output") == "json" and result.failure is None:
        from ..json_text import dumps

        ui.say(dumps(result.as_dict(), 0) + "\n")
    else:
        ui.say(human(result))
    if result.failure is not None:
        ui.error("Check failed: %s" % result.failure)
    elif result.result.check_errors:
        ui.error("Check failed")
    return exit_code(result)


class NoCheck(Unsupported):
    """The format has no check."""


class ImageCheck:
    """What check tells of an image: the counts of the last check (see CheckResult), and what a repair before it mended.

    `messages` are the lines of all checks. `failure` is the reason if the last check, or the repair, could not be
    finished; the counts mean nothing then.
    """

    __slots__ = ("filename", "format", "result", "repaired", "corruptions_fixed", "leaks_fixed", "messages", "omitted", "failure")

    def __init__(self, filename: str, format: str, results: Sequence[CheckResult]) -> None:
        """`results` are those of the check, and of the second one after a repair."""
        self.filename = filename
        self.format = format
        self.result = results[-1]
        self.corruptions_fixed = sum(result.corruptions_fixed for result in results)
        self.leaks_fixed = sum(result.leaks_fixed for result in results)
        self.repaired = bool(self.corruptions_fixed or self.leaks_fixed)
        self.messages = [line for result in results for line in result.messages]
        self.omitted = sum(result.omitted for result in results)
        self.failure = self.result.failure

    @property
    def clean(self) -> bool:
        """Nothing is wrong (any more)."""
        return self.result.clean

    def as_dict(self) -> dict[str, Any]:
        """The record as qemu-img check --output=json has it (QAPI's ImageCheck)."""
        result = self.result
        values: dict[str, Any] = {"filename": self.filename, "format": self.format, "check-errors": result.check_errors}
        for key, value in (
            ("image-end-offset", result.image_end_offset),
            ("corruptions", result.corruptions),
            ("leaks", result.leaks),
            ("corruptions-fixed", self.corruptions_fixed),
            ("leaks-fixed", self.leaks_fixed),
            ("total-clusters", result.total_clusters),
            ("allocated-clusters", result.allocated_clusters),
            ("fragmented-clusters", result.fragmented_clusters),
            ("compressed-clusters", result.compressed_clusters),
        ):
            if value:
                values[key] = value
        return values


def exit_code(checked: ImageCheck) -> int:
    """The exit code of qemu-img check."""
    result = checked.result
    if result.failure is not None or result.check_errors:
        return 1
    return 2 if result.corruptions else 3 if result.leaks else 0


def human(checked: ImageCheck) -> str:
    """The lines that qemu-img check prints to standard output."""
    result = checked.result
    text = ""
    if checked.repaired:
        text = (
            "The following inconsistencies were found and repaired:\n\n    %d leaked clusters\n    %d corruptions\n\n"
            "Double checking the fixed image now...\n" % (checked.leaks_fixed, checked.corruptions_fixed)
        )
    if result.failure is not None:
        return text
    if result.clean:
        text += "No errors were found on the image.\n"
    if result.corruptions:
        text += "\n%d errors were found on the image.\n" % result.corruptions
        text += "Data may be corrupted, or further writes to the image may corrupt it.\n"
    if result.leaks:
        text += "\n%d leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n" % result.leaks
    if result.check_errors:
        text += "\n%d internal errors have occurred during the check.\n" % result.check_errors
    total, allocated = result.total_clusters, result.allocated_clusters
    if total and allocated:
        text += "%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n" % (
            allocated,
            total,
            allocated * 100 / total,
            result.fragmented_clusters * 100 / allocated,
            result.compressed_clusters * 100 / allocated,
        )
    if result.image_end_offset:
        text += "Image end offset: %d\n" % result.image_end_offset
    return text


def check(
    filename: str,
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    repair: Optional[str] = None,
    cache: str = "writeback",
    force_share: bool = False,
    no_io: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> ImageCheck:
    """Check the image `filename` and, if `repair` is "leaks" or "all", repair it and check again.

    Returns the last check's result together with what was fixed. With `no_io` the passphrase of an encrypted image is not
    asked for, and the backing file not opened: only metadata are checked. Raises NoCheck if the format has no check, Error or
    OSError if the image cannot be opened.
    """
    settings = cache_flags(cache)
    if settings is None or repair not in (None, "leaks", "all"):
        raise spec.OptionError("No such cache mode or way to repair: %s, %s" % (cache, repair))
    flags = OpenFlags(writable=repair is not None, check=True, force_share=force_share, no_io=no_io, no_backing=no_io, **settings)
    with Graph(policy, objects, warn).open(filename, format, flags, image_opts) as node:
        try:
            results = [node.check(repair or "")]
        except Unsupported as error:
            raise NoCheck(str(error), filename=filename) from error
        first = results[0]
        if first.failure is None and (first.corruptions_fixed or first.leaks_fixed):
            results.append(node.check())
        return ImageCheck(filename, node.driver, results)
