# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures as SVG (https://www.w3.org/TR/SVG2/), laid out in rows: what uses stands above what is used."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import Box, Picture

# All in pixels.
LINE = 16
CHARACTER = 7.3  # of the fixed-width font at 12 pixels
PADDING = 10
ACROSS = 36  # between boxes of a row
DOWN = 56  # between rows
MARGIN = 16
ROUNDS = 8  # of moving boxes towards what they are connected with

COLOURS = {
    "export": ("#e8dff5", "#6a4c93"),
    "object": ("#f4f1de", "#8a7f52"),
    "format": ("#dbeafe", "#1d4ed8"),
    "protocol": ("#dcfce7", "#15803d"),
    "filter": ("#ffedd5", "#c2410c"),
}


class Place:
    """Where a box is: its left upper corner and its size."""

    __slots__ = ("height", "row", "width", "x", "y")

    def __init__(self, box: Box) -> None:
        self.width = max(len(line) for line in box.lines) * CHARACTER + 2 * PADDING
        self.height = len(box.lines) * LINE + 2 * PADDING - 4
        self.row = 0
        self.x = 0.0
        self.y = 0.0

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def rows_of(picture: Picture) -> list[list[Box]]:
    """The boxes by rows: each one below all that use it."""
    users = [0] * len(picture.boxes)
    below: list[list[Box]] = [[] for _box in picture.boxes]
    for source, target, _label in picture.arrows:
        below[source.number].append(target)
        users[target.number] += 1
    row = [0] * len(picture.boxes)
    ready = [box for box in picture.boxes if not users[box.number]]
    for box in ready:
        for target in below[box.number]:
            row[target.number] = max(row[target.number], row[box.number] + 1)
            users[target.number] -= 1
            if not users[target.number]:
                ready.append(target)
    rows: list[list[Box]] = [[] for _row in range(max(row, default=-1) + 1)]
    for box in ready:
        rows[row[box.number]].append(box)
    return rows


def layout(picture: Picture) -> list[Place]:
    """Where the boxes are, by their numbers: no two overlap."""
    places = [Place(box) for box in picture.boxes]
    rows = rows_of(picture)
    near: list[list[int]] = [[] for _box in picture.boxes]
    for source, target, _label in picture.arrows:
        near[source.number].append(target.number)
        near[target.number].append(source.number)
    y = float(MARGIN)
    for index, row in enumerate(rows):
        x = float(MARGIN)
        for box in row:
            place = places[box.number]
            place.row, place.x, place.y = index, x, y
            x += place.width + ACROSS
        y += max(places[box.number].height for box in row) + DOWN
    for turn in range(ROUNDS):
        for row in rows if turn % 2 == 0 else reversed(rows):
            _move_row([places[box.number] for box in row], [_wanted(places, near[box.number], box.number) for box in row], turn < ROUNDS // 2)
    left = min((place.x for place in places), default=0.0)
    for place in places:
        place.x += MARGIN - left
    return places


def _wanted(places: list[Place], near: list[int], own: int) -> float:
    """Where the middle of a box would best be: amidst those that it is connected with."""
    return sum(places[number].middle for number in near) / len(near) if near else places[own].middle


def _move_row(row: list[Place], wanted: list[float], sort: bool) -> None:
    """Move the boxes of a row as near to where they should be as the others of the row allow."""
    order = sorted(range(len(row)), key=lambda index: wanted[index]) if sort else sorted(range(len(row)), key=lambda index: row[index].x)
    end: float = -1e9
    total = 0.0
    for index in order:
        place = row[index]
        place.x = max(wanted[index] - place.width / 2, end)
        end = place.x + place.width + ACROSS
        total += wanted[index] - place.middle
    for place in row:  # what was pushed to the right is brought back together
        place.x += total / len(row)


def draw(picture: Picture) -> str:
    """The picture as one SVG document, without anything outside of it."""
    places = layout(picture)
    width = max((place.x + place.width for place in places), default=0.0) + MARGIN
    height = max((place.y + place.height for place in places), default=0.0) + MARGIN
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img">' % (width, height, width, height),
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
        '<path d="M 0 0 L 10 5 L 0 10 z" fill="#475569"/></marker></defs>',
        '<rect width="%d" height="%d" fill="#ffffff"/>' % (width, height),
        '<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">',
    ]
    for source, target, label in picture.arrows:
        lines += _arrow(places[source.number], places[target.number], label, target.kind == "object")
    for box in picture.boxes:
        lines += _box(box, places[box.number])
    return "\n".join([*lines, "</g>", "</svg>", ""])


def _box(box: Box, place: Place) -> list[str]:
    fill, stroke = COLOURS[box.kind]
    corner = 14 if box.kind in ("filter", "export") else 3
    lines = [
        '<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="%d" fill="%s" stroke="%s"/>'
        % (place.x, place.y, place.width, place.height, corner, fill, stroke)
    ]
    for index, line in enumerate(box.lines):
        weight = ' font-weight="bold"' if index == 0 else ""
        y = place.y + PADDING + 10 + index * LINE
        lines.append('<text x="%.1f" y="%.1f" text-anchor="middle"%s fill="#0f172a">%s</text>' % (place.middle, y, weight, _escaped(line)))
    return lines


def _arrow(source: Place, target: Place, label: str, dashed: bool) -> list[str]:
    x1, y1, x2, y2 = source.middle, source.y + source.height, target.middle, target.y - 1
    bend = min(DOWN, (y2 - y1) / 2)
    path = "M %.1f %.1f C %.1f %.1f %.1f %.1f %.1f %.1f" % (x1, y1, x1, y1 + bend, x2, y2 - bend, x2, y2)
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    lines = ['<path d="%s" fill="none" stroke="#475569"%s marker-end="url(#arrow)"/>' % (path, dashes)]
    if label:
        x, y = (x1 + 3 * x2) / 4, y2 - DOWN / 3
        look = 'text-anchor="middle" font-size="10" fill="#475569" stroke="#ffffff" stroke-width="4" paint-order="stroke"'
        lines.append('<text x="%.1f" y="%.1f" %s>%s</text>' % (x, y, look, _escaped(label)))
    return lines


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
