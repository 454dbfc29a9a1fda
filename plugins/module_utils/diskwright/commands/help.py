# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The texts of --help and of -o help, made from the declarations of commands and formats."""

from __future__ import annotations

from ..errors import OptionError
from ..getopt import MAYBE
from . import SUMMARIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from diskwright.commands.ui import UI

    from ..getopt import Option
    from ..options import Options
    from .spec import Command

EXAMPLES = {
    "amend": (
        ("the version that old programs read", "-o compat=0.10 disk.qcow2"),
        ("which options qcow2 has", "-f qcow2 -o help"),
    ),
    "bench": (("10000 reads of 64 KiB each", "-c 10000 -s 64k disk.qcow2"),),
    "bitmap": (
        ("record what is written from now on", "--add disk.qcow2 since-backup"),
        ("begin again", "--clear disk.qcow2 since-backup"),
        ("a copy of another one", "--add --merge since-backup disk.qcow2 copy"),
    ),
    "check": (
        ("look, and say it in JSON", "--output json disk.qcow2"),
        ("repair what can be repaired", "-r all disk.qcow2"),
    ),
    "commit": (("an overlay into its backing file", "overlay.qcow2"),),
    "compare": (("a copy against its original, with progress", "-p disk.raw disk.qcow2"),),
    "convert": (
        ("raw to qcow2, with progress", "-p -O qcow2 disk.raw disk.qcow2"),
        ("as small as it gets", "-c -O qcow2 -o compression_type=zstd disk.qcow2 small.qcow2"),
        ("only what differs from base.qcow2", "-O qcow2 -B base.qcow2 -F qcow2 disk.qcow2 overlay.qcow2"),
        ("through a pipe", "disk.qcow2 - | gzip > disk.raw.gz"),
    ),
    "create": (
        ("10 GiB", "-f qcow2 disk.qcow2 10G"),
        ("an overlay, of the size of its backing file", "-f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2"),
        ("which options qcow2 has", "-f qcow2 -o help"),
    ),
    "dd": (("the first 100 MiB", "bs=1M count=100 if=disk.qcow2 of=head.raw"),),
    "graph": (
        ("is this file right, and what does it look like", "vm.yaml"),
        ("the same as arguments of qemu-storage-daemon", "--output qemu vm.yaml"),
        ("a picture of an image and its backing files", "--output svg --image disk.qcow2"),
        ("today's words for an old -drive", "--output qemu --drive file=disk.qcow2,format=qcow2,cache=none,bps=10000000"),
    ),
    "info": (
        ("an image and its backing files, in JSON", "--backing-chain --output json disk.qcow2"),
        ("an image that a virtual machine is using", "-U disk.qcow2"),
    ),
    "io": (
        ("write a pattern, and read it back", "-c 'write -P 0x5a 1M 64k' -c 'read -P 0x5a 1M 64k' disk.qcow2"),
        ("which requests there are", "-c help"),
    ),
    "map": (("every extent, in JSON", "--output json disk.qcow2"),),
    "measure": (
        ("a new image of 10 GiB", "-O qcow2 --size 10G"),
        ("what converting disk.raw would take", "-O qcow2 disk.raw"),
    ),
    "rebase": (
        ("onto another backing file", "-b base2.qcow2 -F qcow2 overlay.qcow2"),
        ("hold all data itself", '-b "" overlay.qcow2'),
        ("the backing file was moved", "-u -b /new/base.qcow2 -F qcow2 overlay.qcow2"),
    ),
    "resize": (
        ("5 GiB more", "disk.qcow2 +5G"),
        ("down to 10 GiB: what is behind is lost", "--shrink disk.qcow2 10G"),
    ),
    "serve": (
        ("to the virtual machines of this host", "-k /run/disk.sock disk.qcow2"),
        ("read-only, to everybody, by the name base", "-r -x base -b 0.0.0.0 -p 10809 base.qcow2"),
        ("a copy that forgets what was written", "-s -k /run/disk.sock disk.qcow2"),
    ),
    "snapshot": (
        ("keep the present content", "-c before-upgrade disk.qcow2"),
        ("go back to it", "-a before-upgrade disk.qcow2"),
    ),
}

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
    from ..drivers import FORMATS, PROTOCOLS

    lines += ["", "Formats:", *_row("", " ".join(sorted(FORMATS))), "", "Protocols:", *_row("", " ".join(sorted(PROTOCOLS)))]
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
    for option in sorted(command.options, key=lambda option: _LAST.get(option.key, 0)):
        if option.key != "p":  # shown with --progress
            lines += _row(spellings(option), option.help)
    if command.notes:
        lines += ["", command.notes]
    lines += ["", "Examples:"]
    for text, words in EXAMPLES[command.name]:
        lines += ["  # " + text, "  %s %s %s" % (ui.name, command.name, words)]
    return "\n".join(lines) + "\n"


# What all commands have comes after what is a command's own.
_LAST = {"object": 1, "p": 2, "progress": 2, "quiet": 3, "help": 4}


def spellings(option: Option) -> str:
    """An option as help shows it: "-f, --format FMT"."""
    names = option.names + (option.extra[:1] if not any(name.startswith("--") for name in option.names) else [])
    if option.key == "progress":
        names = ["-p", *names]
    text = ", ".join(sorted(names, key=lambda name: name.startswith("--")))
    if not option.metavar:
        return text
    return "%s[=%s]" % (text, option.metavar) if option.kind == MAYBE else "%s %s" % (text, option.metavar)


def _row(left: str, right: str) -> list[str]:
    """A name and its explanation in two columns."""
    texts = right.split("\n")
    if not left:
        return ["  " + text for text in texts]
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
