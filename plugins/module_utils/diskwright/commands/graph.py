# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`graph`: whether the description of a graph is right, the same in other languages, and its picture.

The languages are those of https://www.qemu.org/docs/master/interop/qemu-storage-daemon-qmp-ref.html and its command line.
"""

from __future__ import annotations

from ..beside import beside
from ..drawing import Picture, picture_of_description, picture_of_nodes
from ..drive import Drive, parse_drive
from ..errors import Error, OptionError
from ..getopt import Parser
from ..graph import Graph, prefixed
from ..graph_file import GraphDescription, load, rewrite, to_arguments, to_json, to_yaml
from ..node import OpenFlags
from ..parts import part
from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..graph import OpenPolicy

DRAWINGS = ("text", "dot", "mermaid", "svg")
OUTPUTS = (*DRAWINGS, "json", "yaml", "qemu", "nodes")


def _output_argument(text: str) -> str:
    if text not in OUTPUTS:
        raise UsageError("--output expects one of %s, not '%s'" % (", ".join(OUTPUTS), text))
    return text


COMMAND = Command(
    "graph",
    "Check descriptions of block graphs, print them in other languages, draw them.",
    [
        "[--open [-U]] [--output text|dot|mermaid|svg|json|yaml|qemu|nodes] [-q] FILE",
        "[--open [-U]] [--output ...] [-q] [--object OBJDEF]... {--blockdev NODE | --drive DRIVE}...",
        "[-U] [--output text|dot|mermaid|svg|nodes] [-f FMT] --image IMAGE",
        "[-q] --rewrite FILE...",
        "--schema",
    ],
    [
        spec.HELP,
        spec.QUIET,
        spec.OBJECT,
        Option("--drive", VALUE, "DRIVE", key="drive", help="a node in the syntax of QEMU's -drive (file=...,format=...); may be repeated"),
        Option("--image", VALUE, "IMAGE", key="image", help="draw an image and its backing files, which are opened for reading"),
        spec.FORMAT,
        Option("--open", FLAG, key="open", help="open all nodes as they are described; sizes and backing files are shown then"),
        Option("-U --force-share", FLAG, key="force_share", help="open for reading only, even if another process is writing"),
        Option(
            "--output",
            VALUE,
            "OUTPUT",
            key="output",
            check=_output_argument,
            help="text (default), dot, mermaid or svg: a picture; json, yaml or qemu: the\n"
            "description as a file or as arguments of qemu-storage-daemon; nodes: what\nquery-named-block-nodes would say (with --open)",
        ),
        Option("--rewrite", FLAG, key="rewrite", help="write each FILE again in its normal form; comments in YAML stay"),
        Option("--schema", FLAG, key="schema", help="print the JSON Schema of graph files"),
    ],
    [("FILE", "a graph file: YAML or JSON with the keys objects, blockdevs, exports and nbd-server")],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `graph` with the arguments `args`; the exit code."""
    given, drives = _read(args, ui)
    ui.quiet = "quiet" in given
    if "schema" in given:
        ui.write(to_json(part(__package__, ".graph_schema").schema()))
        return 0
    if "rewrite" in given:
        if not given.operands:
            raise UsageError("Expecting names of graph files")
        for path in given.operands:
            _rewrite(path)
        return 0
    output = given.get("output", "text")
    if "image" in given:
        if given.operands or given.objects.blockdevs or drives:
            raise UsageError("--image excludes graph files, --blockdev and --drive")
        if output in ("json", "yaml", "qemu"):
            raise UsageError("An image has no description: --image goes with text, dot, mermaid, svg and nodes")
        ui.say(image_graph(given["image"], output, given.get("format"), "force_share" in given, given.objects, warn=ui.caution))
        return 0
    description = _described(given, drives)
    for drive in drives:
        _tell(drive, ui)
    ui.say(graph(description, output, "open" in given or output == "nodes", "force_share" in given, warn=ui.caution))
    return 0


def _tell(drive: Drive, ui: UI) -> None:
    """Say what of a drive is not in its nodes."""
    for note in drive.notes:
        ui.warning(note)
    if drive.device:
        ui.hint("belongs to the device: -device ...,drive=%s,%s" % (drive.top, ",".join("%s=%s" % pair for pair in drive.device.items())))


def _read(args: Sequence[str], ui: UI) -> tuple[spec.Given, list[Drive]]:
    """Read the arguments, and the drives among them."""
    given = spec.Given()
    drives: list[Drive] = []
    for option, value in COMMAND.parse(Parser(COMMAND.options, args, ui.posixly_correct), ui):
        if option is None:
            given.operands.append(value or "")
        elif option.key == "drive":
            try:
                drives.append(parse_drive(value or "", len(drives)))
            except OptionError as error:
                raise OptionError("--drive %s: %s" % (value, error), hint=error.hint) from None
        else:
            COMMAND.take(given, option, value)
    return given, drives


def _described(given: spec.Given, drives: Iterable[Drive]) -> GraphDescription:
    """What the operand or the options describe, checked."""
    if given.operands:
        if len(given.operands) > 1:
            raise UsageError("Expecting one graph file")
        path = given.operands[0]
        description = load(path)
        description.objects.update(given.objects)
        description.blockdevs += given.objects.blockdevs
        try:
            description.check()
        except Error as error:
            raise prefixed("%s: " % path, error, path) from None
        return description
    description = GraphDescription(given.objects, given.objects.blockdevs)
    for drive in drives:
        description.blockdevs += drive.blockdevs
        description.objects.update(drive.objects)
    if not description.blockdevs:
        raise UsageError("Expecting a graph file, --blockdev, --drive or --image")
    description.check(ordered=True)
    return description


def graph(
    description: GraphDescription,
    output: str = "text",
    opened: bool = False,
    force_share: bool = False,
    *,
    policy: Optional[OpenPolicy] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> str:
    """A description, which `check` found right, in one of OUTPUTS. If `opened`, all its nodes are opened for that, and closed again.

    Raises Error where one cannot be opened, Unsupported where YAML is asked for and ruamel.yaml is not installed.
    """
    if output not in OUTPUTS:
        raise OptionError("Unknown output '%s'" % output)
    nodes = ""
    if opened:
        with_nodes = Graph(policy, description.objects, warn)
        flags = OpenFlags(writable=not force_share, force_share=force_share, perm=0)
        try:
            for one in description.in_order():
                with_nodes.add(_for_reading(one) if force_share else one, flags)
            nodes = _nodes(with_nodes, output, [with_nodes.find(str(one["node-name"])) for one in reversed(description.in_order())])
        finally:
            with_nodes.close()
    if output == "json":
        return to_json(description.as_mapping())
    if output == "yaml":
        return to_yaml(description.as_mapping())
    if output == "qemu":
        return _arguments(to_arguments(description))
    return nodes if opened else _drawn(picture_of_description(description), output)


def _for_reading(one: Mapping[str, Any]) -> Mapping[str, Any]:
    """A description without what asks for writing."""
    return {key: _for_reading(value) if isinstance(value, dict) and "driver" in value else value for key, value in one.items() if key != "read-only"}


def image_graph(
    filename: str,
    output: str = "text",
    format: Optional[str] = None,
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    *,
    policy: Optional[OpenPolicy] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> str:
    """The picture of an image and all that it is made of: `output` is one of DRAWINGS, or "nodes". Raises what opening raises."""
    found = Graph(policy, objects, warn)
    with found.open(filename, format, OpenFlags(force_share=force_share)) as node:
        return _nodes(found, output, [node])


def _nodes(found: Graph, output: str, tops: Iterable[Any]) -> str:
    if output in DRAWINGS:
        return _drawn(picture_of_nodes(tops), output)
    if output != "nodes":
        return ""
    live = part(__package__, ".jobs.live").Live(found)
    return to_json(part(__package__, ".jobs.queries").named_nodes(live))


def _drawn(picture: Picture, output: str) -> str:
    draw: Callable[[], str] = getattr(picture, output)
    return draw()


def _arguments(words: Sequence[str]) -> str:
    """A command line, an option a line, as a shell reads it."""
    from shlex import quote

    pairs = ["%s %s" % (words[index], quote(words[index + 1])) for index in range(0, len(words), 2)]
    return " \\\n".join(pairs) + "\n"


def _rewrite(path: str) -> None:
    """Put the normal form of a graph file in its place, in one step."""
    text = rewrite(path).encode()
    with open(path, "rb") as old:
        if old.read(len(text) + 1) == text:
            return
    with beside(path) as temporary, open(temporary, "wb") as new:
        new.write(text)
