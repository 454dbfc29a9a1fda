# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`io`: requests to an image, one by one, as scripts and tests make them (qemu-io's command line and output).

The verbs are in io_verbs.py, the open image and its requests in io_session.py.
"""

from __future__ import annotations

from ..errors import OptionError
from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Optional, Sequence

    from .spec import Given
    from .ui import UI

COMMAND = Command(
    "io",
    "Read, write and look at an image by single requests: those of -c, or those that come from standard input, a line each.",
    [
        "[-f FMT | --image-opts] [-c CMD]... [-r] [-s] [-n | -t CACHE] [-d MODE] [-i AIO | -k] [-U] [-C] [-m]",
        "[--object OBJDEF]... [--blockdev NODE]... [FILENAME]",
    ],
    [
        spec.HELP,
        spec.OBJECT,
        spec.IMAGE_OPTS,
        Option(
            "-c --cmd", VALUE, "CMD", key="cmd", help="run this command and do not read any from standard input;\nmay be repeated. `-c help` lists the commands"
        ),
        Option("-f --format", VALUE, "FMT", key="format", help="format of the image; without it, the format is detected"),
        Option("-r --read-only", FLAG, key="read_only", help="open the image for reading only"),
        Option("-s --snapshot", FLAG, key="snapshot", help="what is written goes to a temporary file, and is gone at the end"),
        Option("-n --nocache", FLAG, key="nocache", help="as -t none"),
        Option("-t --cache", VALUE, "CACHE", key="cache", help="cache mode: none, writeback (default), writethrough, directsync\nor unsafe"),
        Option("-d --discard", VALUE, "MODE", key="discard", help="what becomes of discards: unmap (default) or ignore"),
        Option("-i --aio", VALUE, "AIO", key="aio", help="threads, native or io_uring; requests are made by threads"),
        Option("-k --native-aio", FLAG, key="native", help="as -i native"),
        Option("-C --copy-on-read", FLAG, key="copy_on_read", help="write into the image what is read from its backing chain"),
        Option("-m --misalign", FLAG, key="misalign", help="accepted: any buffer will do"),
        spec.FORCE_SHARE,
        Option("-T --trace", VALUE, "TRACE", key="trace", help="trace events, as before the command word"),
        Option("-V --version", key="version", help="show the version"),
    ],
    [("FILENAME", "the image; without it, the command `open` opens one")],
)

PROMPT = "qemu-io> "
AIO = ("threads", "native", "io_uring")


def main(args: Sequence[str], ui: UI) -> int:
    """Run `io` with the arguments `args`; the exit code: 1 if any command failed."""
    given, commands = _read(args, ui)
    from .io_session import Session
    from .io_verbs import run

    if len(given.operands) > 1:
        raise UsageError("Expecting one image file name")
    session = Session(ui, given.objects)
    if given.operands:
        name = given.operands[0]
        if "image_opts" in given and "format" in given:
            raise OptionError("--image-opts and -f are mutually exclusive")
        if not session.open_image(name, given, image_opts="image_opts" in given):
            return 1
    failed = False
    try:
        for line in commands if commands else _lines(ui):
            failed = not run(session, line) or failed
            if session.done:
                break
    finally:
        session.close()
    return int(failed)


def _read(args: Sequence[str], ui: UI) -> tuple[Given, list[str]]:
    """The options and the commands, which may be many."""
    from ..getopt import Parser

    given = spec.Given()
    traced = ui.tracer is not None  # by -T before the command word
    commands: list[str] = []
    for option, value in COMMAND.parse(Parser(COMMAND.options, args, ui.posixly_correct), ui):
        if option is None:
            given.operands.append(value or "")
        elif option.key in ("trace", "version") and ui.take_global is not None:
            ui.take_global(option.key, value)
        elif option.key == "cmd":
            commands.append(value or "")
        else:
            COMMAND.take(given, option, value)
            check(option.key, value)
    if ui.tracer is not None and not traced:
        ui.tracer.begin()
    if "nocache" in given:
        given.setdefault("cache", "none")
    if "native" in given:
        given.setdefault("aio", "native")
    return given, commands


def check(key: str, value: Optional[str]) -> None:
    """Raise OptionError for an unknown mode; the words are qemu-io's."""
    if key == "cache":
        spec.check_cache_mode(value or "", "cache")
    elif key == "discard" and value not in ("ignore", "off", "unmap", "on"):
        raise OptionError("Invalid discard option: %s" % value)
    elif key == "aio" and value not in AIO:
        raise OptionError("Invalid aio option: %s" % value)


def _lines(ui: UI) -> Iterator[str]:
    """Commands from standard input, after a prompt each."""
    import sys

    while True:
        ui.write(PROMPT)
        ui.flush()
        line = sys.stdin.readline() if sys.stdin is not None else ""
        if not line:
            return
        yield line.rstrip("\n")
