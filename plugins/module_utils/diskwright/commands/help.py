# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The texts of --help and of -o help, made from the declarations of commands and formats."""

from __future__ import annotations

from ..errors import OptionError
from . import SUMMARIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ..getopt import Option
    from ..options import Options
    from .spec import Command
    from .ui import UI

_INDENT = 28  # where the second column begins


def global_help(ui: UI) -> str:
    """What --help prints before a command word."""
    lines = [
        "Make, convert, inspect and repair virtual machine disk images.",
        "",
        "Usage: %s [-h | -V] [-T TRACE] COMMAND [OPTION]... [OPERAND]..." % ui.name,
        "",
        "Options:",
        *_row("-h, --help", "show this help"),
        *_row("-V, --version", "show the version, and which kernels are in use"),
        *_row("-T, --trace TRACE", "trace events: [[enable=]PATTERN][,events=FILE][,file=FILE]"),
        "",
        "Commands:",
    ]
    for name, summary in SUMMARIES.items():
        lines += _row(name, summary)
    lines += ["", "%s COMMAND --help tells more about a command." % ui.name]
    return "\n".join(lines) + "\n"


def command_help(command: Command, ui: UI) -> str:
    """What --help prints after a command word."""
    lines = [command.summary, ""]
    start = "Usage: %s %s " % (ui.name, command.name)
    for index, line in enumerate(command.usage):
        lines.append((start if index == 0 else " " * len(start)) + line)
    lines += ["", "Operands:"]
    for name, text in command.operands:
        lines += _row(name, text)
    lines += ["", "Options:"]
    for option in command.options:
        lines += _row(spellings(option), option.help or ("show this help" if option.key == "help" else ""))
    if command.notes:
        lines += ["", command.notes]
    return "\n".join(lines) + "\n"


def spellings(option: Option) -> str:
    """An option as help shows it: "-f, --format FMT"."""
    names = option.names + (option.extra[:1] if not any(name.startswith("--") for name in option.names) else [])
    text = ", ".join(sorted(names, key=lambda name: name.startswith("--")))
    if not option.metavar:
        return text
    return "%s[=%s]" % (text, option.metavar) if option.kind == 2 else "%s %s" % (text, option.metavar)


def _row(left: str, right: str) -> list[str]:
    """A name and its explanation in two columns."""
    texts = right.split("\n")
    if len(left) + 4 > _INDENT:
        rows = ["  " + left, " " * _INDENT + texts[0]]
    else:
        rows = [("  " + left).ljust(_INDENT) + texts[0]]
    return rows + [" " * _INDENT + text for text in texts[1:]]


def creation_options(format: str, filename: Optional[str]) -> str:
    """What -o help prints: the options for creating an image of `format`, with those of the protocol of `filename`.

    Raises OptionError in QEMU's words for a format or protocol that is unknown or cannot create.
    """
    own = _options_of(format)
    if filename is None:
        return (
            "Supported %s options:\n" % format
            + "".join(line + "\n" for line in own.values())
            + "\nThe protocol level may support further options.\n"
            "Specify the target filename to include those options.\n"
        )
    rows = {**_protocol_options_of(filename), **own}
    return "Supported options:\n" + "".join(rows[key] + "\n" for key in sorted(rows))


def _options_of(format: str) -> dict[str, str]:
    """The help lines of the creation options of a driver, by key."""
    from ..drivers import FILTERS, FORMATS, PROTOCOLS, lookup

    if format not in FORMATS and format not in PROTOCOLS and format not in FILTERS:
        raise OptionError("Unknown file format '%s'" % format)
    options = getattr(lookup(format), "create_options", None)
    if options is None:
        raise OptionError("Format driver '%s' does not support image creation" % format)
    return _rows(options)


def _protocol_options_of(filename: str) -> dict[str, str]:
    """The help lines of the creation options of the protocol that `filename` names, by key."""
    from ..drivers import lookup_protocol
    from ..graph import parse_filename, protocol_prefix

    prefix = protocol_prefix(filename)
    if prefix is None:
        prefix = parse_filename(filename)["file"]["driver"]
    options = getattr(lookup_protocol(prefix), "create_options", None)
    if options is None:
        raise OptionError("Protocol driver '%s' does not support image creation" % prefix)
    return _rows(options)


def _rows(options: type[Options]) -> dict[str, str]:
    return {line.split("=", 1)[0].strip(): line for line in options.help_lines()}
