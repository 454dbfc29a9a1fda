# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures as text: indented lines, dot (https://graphviz.org/doc/info/lang.html), Mermaid (https://mermaid.js.org/syntax/flowchart.html)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import Box, Picture

_SHAPES = {"export": "cds", "object": "note", "format": "box", "protocol": "cylinder", "filter": "box"}
_BRACKETS = {"export": ("([", "])"), "object": ("[/", "/]"), "format": ("[", "]"), "protocol": ("[(", ")]"), "filter": ("{{", "}}")}


def draw(picture: Picture) -> str:
    """One line a box, and below it what it uses, indented."""
    lines: list[str] = []
    seen: set[int] = set()
    # (box, what it is to the one above, what stands in front of its line, and of the lines below it)
    todo: list[tuple[Box, str, str, str]] = [(box, "", "", "") for box in reversed(picture.tops())]
    while todo:
        box, label, first, rest = todo.pop()
        again = box.number in seen
        text = box.lines[0] + (" (%s)" % ", ".join(box.lines[1:]) if box.lines[1:] and not again else "")
        lines.append("%s%s%s%s" % (first, label + ": " if label else "", text, " (see above)" if again and picture.below(box) else ""))
        if again:
            continue
        seen.add(box.number)
        below = picture.below(box)
        for index in range(len(below) - 1, -1, -1):
            target, role = below[index]
            last = index == len(below) - 1
            todo.append((target, role, rest + ("`-- " if last else "|-- "), rest + ("    " if last else "|   ")))
    return "".join(line + "\n" for line in lines)


def dot(picture: Picture) -> str:
    """The picture in graphviz's language."""
    lines = ["digraph blockdev {", "    rankdir=TB;", '    node [fontname="monospace", fontsize=11];', '    edge [fontname="monospace", fontsize=10];']
    for box in picture.boxes:
        label = "\\n".join(line.replace("\\", "\\\\").replace('"', '\\"') for line in box.lines)
        style = ', style="rounded"' if box.kind == "filter" else ""
        lines.append('    n%d [label="%s", shape=%s%s];' % (box.number, label, _SHAPES[box.kind], style))
    for source, target, label in picture.arrows:
        style = ", style=dashed" if target.kind == "object" else ""
        lines.append('    n%d -> n%d [label="%s"%s];' % (source.number, target.number, label.replace("\\", "\\\\").replace('"', '\\"'), style))
    return "\n".join([*lines, "}", ""])


def mermaid(picture: Picture) -> str:
    """The picture in Mermaid's language."""
    lines = ["flowchart TD"]
    for box in picture.boxes:
        left, right = _BRACKETS[box.kind]
        lines.append('    n%d%s"%s"%s' % (box.number, left, "<br/>".join(_escaped(line) for line in box.lines), right))
    for source, target, label in picture.arrows:
        arrow = "-.->" if target.kind == "object" else "-->"
        lines.append("    n%d %s%s n%d" % (source.number, arrow, '|"%s"|' % _escaped(label) if label else "", target.number))
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    """Mermaid's entities for what has a meaning there."""
    return "".join("#%d;" % ord(character) if character in '"#<>&;`\\' else character for character in text)
