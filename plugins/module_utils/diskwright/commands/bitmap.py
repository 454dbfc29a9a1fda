# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`bitmap`: the persistent dirty bitmaps of an image (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

import os

from ..bitmaps import missing
from ..errors import Error
from ..getopt import Parser
from ..graph import Graph, identity, prefixed
from ..node import OpenFlags
from . import spec
from .spec import FLAG, VALUE, Command, Option, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..bitmaps import BitmapSet
    from ..graph import OpenPolicy
    from ..node import Node

ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")
ENOTSUP = 95

COMMAND = Command(
    "bitmap",
    "Change a persistent dirty bitmap of an image, which records what is written to it.",
    [
        "(--add [-g SIZE] | --remove | --clear | --enable | --disable |",
        "--merge SOURCE)...",
        "[-b SOURCE_FILE [-F SOURCE_FMT]] [-f FMT | --image-opts]",
        "[--object OBJDEF]... FILENAME BITMAP",
    ],
    [
        spec.HELP,
        spec.OBJECT,
        Option("-f", VALUE, "FMT", "format of the image; without it, the format is detected", "--format", "format"),
        spec.IMAGE_OPTS,
        Option("--add", FLAG, help="make BITMAP, which then records writes"),
        Option("--remove", FLAG, help="remove BITMAP"),
        Option("--clear", FLAG, help="forget what BITMAP recorded"),
        Option("--enable", FLAG, help="record writes from now on"),
        Option("--disable", FLAG, help="record no writes any more"),
        Option("--merge", VALUE, "SOURCE", "add to BITMAP what the bitmap SOURCE recorded"),
        Option(
            "-g --granularity",
            VALUE,
            "SIZE",
            "with --add: bytes for each bit, a power of two from 512 to 2G\n(default: the size of a cluster, from 4k to 64k)",
            check=spec.size_argument("granularity"),
        ),
        Option("-b --source-file", VALUE, "SOURCE_FILE", "the image that has SOURCE, if it is another one"),
        Option("-F --source-format", VALUE, "SOURCE_FMT", "format of SOURCE_FILE; without it, the format is detected"),
    ],
    [("FILENAME", "the image"), ("BITMAP", "the name of the bitmap")],
    "What is asked for is done in the order of the command line.",
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `bitmap` with the arguments `args`; the exit code."""
    given = spec.Given()
    actions: list[tuple[str, str]] = []
    for option, value in COMMAND.parse(Parser(COMMAND.options, args, ui.posixly_correct), ui):
        if option is None:
            given.operands.append(value or "")
        elif option.key in ACTIONS:
            actions.append((option.key, value or ""))
        else:
            COMMAND.take(given, option, value)
    _check_options(given, actions)
    bitmap(
        given.operands[0],
        given.operands[1],
        actions,
        granularity=given.get("granularity", 0),
        source_file=given.get("source_file"),
        source_format=given.get("source_format"),
        format=given.get("format"),
        image_opts="image_opts" in given,
        objects=given.objects,
        warn=ui.caution,
    )
    return 0


def _check_options(given: spec.Given, actions: Sequence[tuple[str, str]]) -> None:
    """Raise OptionError for what does not go together, in qemu-img's order."""
    words = [action for action, _source in actions]
    if len(given.operands) != 2 and actions:
        raise OptionError("Expecting filename and bitmap name")
    if not actions:
        raise OptionError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    if given.get("granularity") and "add" not in words:
        raise OptionError("granularity only supported with --add")
    if "source_format" in given and "source_file" not in given:
        raise OptionError("-F only supported with -b")
    if "source_file" in given and "merge" not in words:
        raise OptionError("Merge bitmap source file only supported with --merge")
    spec.check_one_image_form("image_opts" in given, given.get("format"))


def bitmap(
    filename: str,
    name: str,
    actions: Sequence[tuple[str, str]],
    *,
    granularity: int = 0,
    source_file: Optional[str] = None,
    source_format: Optional[str] = None,
    format: Optional[str] = None,
    image_opts: bool = False,
    no_io: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> None:
    """Do `actions`, one after the other, with the dirty bitmap `name` of the image `filename`.

    Each is a pair: a word of ACTIONS, and for "merge" the name of a bitmap of this image or of `source_file` (else "").
    `granularity` is in bytes, 0 for the default. The backing file is not opened, and with `no_io` the passphrase of an
    encrypted image is not asked for: bitmaps need neither. When one fails those before it are done. Raises OptionError, Error or OSError.
    """
    failure: Optional[Error] = None
    graph = Graph(policy, objects, warn)
    with graph.open(filename, format, OpenFlags(writable=True, no_io=no_io, no_backing=True), image_opts) as node:
        other: Optional[Node] = None
        try:
            if source_file is not None:
                other = _open_source(graph, node, source_file, source_format, no_io)
            for action, source in actions:
                try:
                    _apply(node, node if other is None else other, name, action, source, granularity)
                except Error as exc:
                    raise prefixed("Operation %s on bitmap %s failed: " % (action, name), exc, filename) from exc
        except Error as exc:
            failure = exc  # the image must be closed as if all had gone well
        finally:
            if other is not None and other is not node:
                other.close()
    if failure is not None:
        raise failure


def _open_source(graph: Graph, node: Node, filename: str, format: Optional[str], no_io: bool) -> Node:
    """The image that has the bitmap to merge: `node`, if it is the same file."""
    try:
        status = os.stat(filename)
        if identity(node) == (status.st_dev, status.st_ino):
            return node
    except (OSError, ValueError):
        pass  # opening it will tell
    return graph.open(filename, format, OpenFlags(no_io=no_io, no_backing=True))


def _apply(node: Node, other: Node, name: str, action: str, source: str, granularity: int) -> None:
    bitmaps = node.bitmaps()
    if action == "add" and bitmaps is None:
        if not name:
            raise OptionError("Bitmap name cannot be empty")
        raise OptionError("Can't store persistent bitmaps to %s: %s" % (node.filename, os.strerror(ENOTSUP)), errno=ENOTSUP)
    if bitmaps is None:
        raise missing(name)
    _apply_to(bitmaps, other, name, action, source, granularity)


def _apply_to(bitmaps: BitmapSet, other: Node, name: str, action: str, source: str, granularity: int) -> None:
    if action == "add":
        bitmaps.add(name, granularity)
    elif action == "remove":
        bitmaps.remove(name)
    elif action == "clear":
        bitmaps.usable(name).clear()
    elif action in ("enable", "disable"):
        bitmaps.usable(name).enabled = action == "enable"
    elif action == "merge":
        bitmaps.find(name)
        theirs = other.bitmaps()
        if theirs is None:
            raise missing(source)
        bitmaps.merge(name, theirs.find(source))
    else:
        raise OptionError("Unknown action '%s'" % action)
