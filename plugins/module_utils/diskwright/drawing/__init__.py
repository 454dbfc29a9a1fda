# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of graphs: boxes and arrows from descriptions or from open nodes, as dot, Mermaid, SVG or text.

dot is https://graphviz.org/doc/info/lang.html, Mermaid https://mermaid.js.org/syntax/flowchart.html. SVG is laid out here.
"""

from __future__ import annotations

from ..description import all_nodes, children_of
from ..errors import OptionError
from ..filter import Filter
from ..units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Mapping

    from ..graph_file import GraphDescription
    from ..node import Node

MAX_BOXES = 1000  # of one picture
MAX_TEXT = 40  # characters of a line in a box

EXPORT, OBJECT, FORMAT, PROTOCOL, FILTER = "export", "object", "format", "protocol", "filter"


class Box:
    """One thing: `lines` are its text, the first one its name; `kind` is what it is."""

    __slots__ = ("kind", "lines", "number")

    def __init__(self, number: int, kind: str, lines: Iterable[str]) -> None:
        self.number = number
        self.kind = kind
        self.lines = [_shortened(line) for line in lines]


class Picture:
    """Boxes and the arrows among them: (from, to, label), each from what uses to what is used."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self.arrows: list[tuple[Box, Box, str]] = []

    def add(self, kind: str, *lines: str) -> Box:
        """One more box. Raises OptionError where there are too many to be looked at."""
        if len(self.boxes) >= MAX_BOXES:
            raise OptionError("A picture has at most %d boxes" % MAX_BOXES)
        self.boxes.append(Box(len(self.boxes), kind, [line for line in lines if line]))
        return self.boxes[-1]

    def below(self, box: Box) -> list[tuple[Box, str]]:
        """What a box uses, and as what."""
        return [(target, label) for source, target, label in self.arrows if source is box]

    def tops(self) -> list[Box]:
        """The boxes that none uses."""
        used = {target.number for _source, target, _label in self.arrows}
        return [box for box in self.boxes if box.number not in used]

    def text(self) -> str:
        """The picture as indented lines; what is used twice is drawn once."""
        from .text import draw

        return draw(self)

    def dot(self) -> str:
        """The picture for graphviz."""
        from .text import dot

        return dot(self)

    def mermaid(self) -> str:
        """The picture for Mermaid."""
        from .text import mermaid

        return mermaid(self)

    def svg(self) -> str:
        """The picture as SVG."""
        from .svg import draw

        return draw(self)


def _shortened(line: str) -> str:
    """A line that fits into a box: of what is long the end matters, which is where names of files differ."""
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= MAX_TEXT else "..." + line[3 - MAX_TEXT :]


def kind_of(cls: type[Node]) -> str:
    """What a driver's box is drawn as."""
    if cls.leaf:
        return PROTOCOL
    return FILTER if issubclass(cls, Filter) or not hasattr(cls, "create_options") else FORMAT


def picture_of_description(description: GraphDescription) -> Picture:
    """The picture of what is described, with its objects and exports. Nothing is opened."""
    from .. import drivers

    picture = Picture()
    boxes: dict[Any, Box] = {}
    for export in description.exports:
        access = "writable" if export.get("writable") else "read-only"
        boxes["export", export["id"]] = picture.add(EXPORT, str(export.get("name") or export["node-name"]), "%s export, %s" % (export["type"], access))
    specs = list(all_nodes(list(reversed(description.in_order()))))
    for spec in specs:
        cls = drivers.lookup(spec["driver"])
        names = (spec["node-name"], spec["driver"]) if "node-name" in spec else (spec["driver"],)
        box = picture.add(kind_of(cls), *names, _place(spec) if cls.leaf else "", _access(spec))
        boxes[id(spec)] = box
        if "node-name" in spec:
            boxes[spec["node-name"]] = box
    for found in description.objects.values():
        boxes["object", found.id] = picture.add(OBJECT, found.id, found.type)
    for export in description.exports:
        picture.arrows.append((boxes["export", export["id"]], boxes[export["node-name"]], ""))
    for spec in specs:
        for role, child in children_of(spec):
            target = boxes.get(child if isinstance(child, str) else id(child))
            if target is not None:
                picture.arrows.append((boxes[id(spec)], target, role))
        for key, field in drivers.lookup(spec["driver"]).options_class.fields.items():
            if field.kind in ("ObjectRef", "SecretRef"):
                value: Any = spec
                for part in key.split("."):
                    value = value.get(part) if isinstance(value, dict) else None
                if ("object", value) in boxes:
                    picture.arrows.append((boxes[id(spec)], boxes["object", value], key))
    return picture


def _place(spec: Mapping[str, Any]) -> str:
    """Where a protocol's bytes are, as far as a line can tell."""
    server = spec.get("server")
    address = str(server.get("path") or server.get("host") or "") if isinstance(server, dict) else ""
    for key in ("filename", "url", "path", "export", "target", "dir", "image", "device"):
        if isinstance(spec.get(key), str):
            return address + (" " if address else "") + str(spec[key])
    return address


def _access(spec: Mapping[str, Any]) -> str:
    return "read-only" if spec.get("read-only") else ""


def picture_of_nodes(tops: Iterable[Node]) -> Picture:
    """The picture of open nodes: those in `tops` and all that they are made of, with their sizes."""
    picture = Picture()
    boxes: dict[int, Box] = {}
    todo = list(tops)
    nodes: list[Node] = []
    while todo:
        node = todo.pop(0)
        if id(node) in boxes:
            continue
        nodes.append(node)
        generated = not node.name or node.name.startswith("#")
        place = str(getattr(node.options, "filename", "") or "") if node.leaf else ""
        sizes = format_size(node.size)
        if node.backing is None and not node.leaf and node.backing_filename:
            place = "backing file: " + node.backing_filename
        lines = (node.driver if generated else node.name, "" if generated else node.driver, place, sizes, "read-only" if node.read_only else "")
        boxes[id(node)] = picture.add(kind_of(type(node)), *lines)
        todo[:0] = node.children.values()
    for node in nodes:
        for role, child in node.children.items():
            picture.arrows.append((boxes[id(node)], boxes[id(child)], role))
    return picture
