# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What a command takes, and the reading of it.

The names of options are those of qemu-img (https://www.qemu.org/docs/master/tools/qemu-img.html) in the union of its
dialects: upstream 10.0, Debian 10.0.2, and 10.1.
"""

from __future__ import annotations

from ..errors import OptionError
from ..getopt import FLAG, MAYBE, VALUE, Option, Parser
from ..parts import part
from ..units import MAX_IMAGE_SIZE, OutOfRange, parse_number, parse_size

__all__ = [
    "FLAG",
    "MAYBE",
    "VALUE",
    "Answer",
    "Command",
    "InvalidOptions",
    "Option",
    "OptionError",
    "UsageError",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI


class Answer(Exception):
    """The command line asks for a text (some help), which is printed in place of doing anything; exit code 0."""


class UsageError(OptionError):
    """The command line cannot be read; a line says where to find help. `parsing` tells getopt's errors from ours."""

    def __init__(self, message: str, parsing: bool = False) -> None:
        super().__init__(message)
        self.parsing = parsing


class InvalidOptions(OptionError):
    """A list of options is wrong: `reason` says why, and `where` in which list; qemu-img prints both, as two messages."""

    def __init__(self, reason: OptionError, where: str) -> None:
        super().__init__("%s: %s" % (where, reason), hint=reason.hint)
        self.reason = reason
        self.where = where


class Command:
    """One command: what its line looks like.

    `usage` lines come without the program's and the command's name; `failure` is the exit code for any Error but a
    UsageError, which always gives 1. `operands` are (name, help) pairs, `notes` a last paragraph of the help.
    """

    __slots__ = ("name", "summary", "usage", "options", "operands", "notes", "failure")

    def __init__(
        self,
        name: str,
        summary: str,
        usage: Sequence[str],
        options: Sequence[Option],
        operands: Sequence[tuple[str, str]],
        notes: str = "",
        failure: int = 1,
    ) -> None:
        self.name = name
        self.summary = summary
        self.usage = usage
        self.options = [known for option in options for known in ((option, BLOCKDEV) if option is OBJECT else (option,))]
        self.operands = operands
        self.notes = notes
        self.failure = failure

    def read(self, args: Sequence[str], ui: UI) -> Given:
        """Read the arguments (those after the command word).

        Raises Answer for help, UsageError for what getopt refuses, and whatever an option's own check raises, in the
        order of the command line.
        """
        given = Given()
        for option, value in self.parse(Parser(self.options, args, ui.posixly_correct), ui):
            if option is None:
                given.operands.append(value or "")
            else:
                self.take(given, option, value)
        return given

    def parse(self, parser: Parser, ui: UI) -> Iterator[tuple[Optional[Option], Optional[str]]]:
        """The parser's items, with its errors as UsageError and -h answered."""
        items = iter(parser)
        while True:
            try:
                option, value = next(items)
            except StopIteration:
                return
            except OptionError as error:
                raise UsageError(str(error), parsing=True) from None
            if option is not None and option.key == "help":
                raise Answer(part(__package__, "help").command_help(self, ui))
            yield option, value

    def take(self, given: Given, option: Option, value: Optional[str]) -> None:
        """Check one option and note it in `given`."""
        if option.kind == FLAG:
            given[option.key] = True
        elif option.key == "object":
            objects = part(__package__, ".objects")
            text = objects.help_text(value or "")
            if text:
                raise Answer(text)
            objects.add_object(given.objects, value or "")
            objects.complete(given.objects, next(reversed(list(given.objects))))
        elif option.key == "blockdev":
            try:
                given.objects.blockdevs.append(part(__package__, ".description").parse_blockdev(value or ""))
            except OptionError as error:
                raise OptionError("--blockdev %s: %s" % (value, error), hint=error.hint) from None
        elif option.key == "options":
            text = value or ""
            if not valid_option_list(text):
                raise OptionError("Invalid option list: %s" % text)
            given["options"] = given["options"] + "," + text if "options" in given else text
        else:
            given[option.key] = value if option.check is None or value is None else option.check(value)
            if value is None:
                given.loose[option.key] = len(given.operands)
            else:
                given.loose.pop(option.key, None)


class Definitions(dict):  # type: ignore[type-arg]
    """The objects that a command line defines, by id, and the nodes that it describes (--blockdev), as typed specifications."""

    def __init__(self) -> None:
        super().__init__()
        self.blockdevs: list[Mapping[str, Any]] = []

    def described(self) -> Sequence[Mapping[str, Any]]:
        """The nodes, once all options are read. Raises OptionError, or Error, where they do not go together; see description.py."""
        if self.blockdevs:
            part(__package__, ".description").check_blockdevs(self.blockdevs, self)
        return self.blockdevs


class Given(dict):  # type: ignore[type-arg]
    """The options given, by key, with the values that their checks returned; a key that is absent was not given.

    `operands` are in order; `objects` are the --object definitions by id; `loose` tells, for an option whose argument is
    optional and was not joined to it, how many operands stood before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[str] = []
        self.objects = Definitions()
        self.loose: dict[str, int] = {}


def size_argument(what: str, least: int = 0, limit: int = MAX_IMAGE_SIZE) -> Callable[[str], int]:
    """A check for a size of `least` .. `limit` bytes, which is called `what` in messages."""
    return lambda text: read_size(text, what, least, limit)


def number_argument(what: str, least: int = 0, limit: int = MAX_IMAGE_SIZE) -> Callable[[str], int]:
    """A check for a plain number of `least` .. `limit`, which is called `what` in messages."""

    def check(text: str) -> int:
        try:
            return parse_number(text, limit, least)
        except OutOfRange:
            raise OptionError(_RANGE % (what, least, limit)) from None
        except OptionError:
            raise OptionError("Invalid %s specified: '%s'." % (what, text)) from None

    return check


_RANGE = "Invalid %s specified. Must be between %d and %d."


def read_size(text: str, what: str, least: int = 0, limit: int = MAX_IMAGE_SIZE) -> int:
    """The bytes that `text` means; errors say that it is no good `what`."""
    try:
        size = parse_size(text, limit)
    except OutOfRange:
        size = -1
    except OptionError:
        raise OptionError("Invalid %s specified: '%s'." % (what, text)) from None
    if size < least:
        raise OptionError(_RANGE % (what, least, limit))
    return size


def output_argument(text: str) -> str:
    """The check of --output."""
    if text not in ("human", "json"):
        raise UsageError("--output expects 'human' or 'json' not '%s'" % text)
    return text


PROGRESS_FORMS = ("plain", "bar", "json", "none")


def progress_argument(text: str) -> str:
    """The check of --progress=FORM."""
    if text not in PROGRESS_FORMS:
        raise UsageError("--progress expects 'plain', 'bar', 'json' or 'none' not '%s'" % text)
    return text


def settle_progress_argument(given: Given, least: int, most: int = 1 << 30) -> None:
    """Take the word after a bare --progress as its form, if nothing else can be meant.

    In qemu-img --progress takes no argument, so the word could be a file name. It is the form if it is one of
    PROGRESS_FORMS, the command has `least` operands without it, and it is not a file that exists (or there are more than
    the `most` operands that the command takes).
    """
    position = given.loose.get("progress")
    if position is None or len(given.operands) <= max(position, least):
        return
    word = given.operands[position]
    if word not in PROGRESS_FORMS:
        return
    if len(given.operands) <= most:
        from os.path import lexists

        if lexists(word):
            return
    given["progress"] = given.operands.pop(position)


def valid_option_list(text: str) -> bool:
    """Whether -o may have this argument: not empty, and no comma at either end that would join two -o's into one."""
    return bool(text) and text[0] != "," and (len(text) - len(text.rstrip(","))) % 2 == 0


def wants_help(options: Optional[str]) -> bool:
    """Whether a list of -o options has a bare `help` or `?` in it, which asks for the list of options."""
    return options is not None and any(item in ("help", "?") for item in options.split(","))


def check_cache_mode(mode: str, what: str = "source cache") -> None:
    """Raise OptionError unless `mode` is a cache mode; `what` names the option in the message."""
    from ..node import cache_flags

    if cache_flags(mode) is None:
        raise OptionError("Invalid %s option: %s" % (what, mode))


def check_snapshot(text: str) -> str:
    """The check of -l: a name or an id, or "snapshot.id=ID,snapshot.name=NAME", of which only the keys are looked at."""
    if text.startswith("snapshot."):
        from ..options import split_pairs

        for key, _value in split_pairs(text):
            if key not in ("snapshot.id", "snapshot.name"):
                reason = OptionError("Invalid parameter '%s'" % key)
                raise InvalidOptions(reason, "Failed in parsing snapshot param '%s'" % text)
    return text


def check_one_image_form(image_opts: bool, format: Optional[str]) -> None:
    """Raise OptionError if both --image-opts and a format are given."""
    if image_opts and format is not None:
        raise OptionError("--image-opts and --format are mutually exclusive")


# Options that several commands share, all with the same meaning.
HELP = Option("-h --help", key="help", help="show this help")
QUIET = Option("-q --quiet", key="quiet", help="print nothing but errors")
OBJECT = Option(
    "--object",
    VALUE,
    "OBJDEF",
    key="object",
    help="define an object (a secret, a throttle group) that images may refer to;\nmay be repeated",
)
BLOCKDEV = Option(
    "",
    VALUE,
    "NODE",
    extra="--blockdev",  # which qemu-img has not, so that its prefixes mean what they mean there
    key="blockdev",
    help="describe a node (DRIVER,node-name=NAME,KEY=VALUE... or JSON), to which\n"
    "later ones, and with --image-opts the operands, refer by its name;\nmay be repeated",
)
IMAGE_OPTS = Option(
    "--image-opts",
    key="image_opts",
    help="FILENAME is a list of options (driver=...,file.filename=...) or the\nname of a node, and not a file name; excludes --format",
)
FORCE_SHARE = Option(
    "-U --force-share",
    key="force_share",
    help="open the image even if another process is writing to it;\nwhat is read may be inconsistent",
)
FORMAT = Option(
    "-f --format", VALUE, "FMT", key="format", help="format of the image; without it, the format is detected"
)
OUTPUT = Option(
    "--output",
    VALUE,
    "human|json",
    key="output",
    check=output_argument,
    help="how to print the result (default: human)",
)
CACHE = Option(
    "-T --cache",
    VALUE,
    "CACHE",
    key="cache",
    help="cache mode: none, writeback (default), writethrough, directsync\nor unsafe",
)


WRITE_CACHE = Option(
    "-t --cache",
    VALUE,
    "CACHE",
    key="cache",
    help="cache mode: none, writeback (default), writethrough, directsync\nor unsafe",
)


def progress_option(names: str = "", extra: str = "") -> Option:
    """--progress, which qemu-img has in some dialects of some commands only."""
    text = "show progress as plain (what -p prints where there is no terminal),\nbar, json (one object a line on standard error) or none"
    return Option(names, MAYBE, "FORM", text, extra, "progress", progress_argument)
