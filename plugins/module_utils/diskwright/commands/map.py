# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`map`: where the data of an image is stored (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..errors import Error
from ..extent import ALLOCATED, COMPRESSED, DATA, OFFSET_VALID, ZERO
from ..graph import Graph
from ..node import OpenFlags
from . import spec
from .spec import VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..extent import Extent
    from ..graph import OpenPolicy
    from ..node import Node

EXTENTS_AT_ONCE = 4096  # keeps memory flat

COMMAND = Command(
    "map",
    "Show which parts of an image hold data, and where in its backing chain they are stored.",
    ["[-f FMT | --image-opts] [-U] [--object OBJDEF]... [-s OFFSET] [-l LENGTH]", "[--output human|json] FILENAME"],
    [
        spec.HELP,
        spec.FORMAT,
        spec.OUTPUT,
        spec.OBJECT,
        spec.IMAGE_OPTS,
        spec.FORCE_SHARE,
        Option(
            "-s --start-offset",
            VALUE,
            "OFFSET",
            "begin at this guest offset (default: 0)",
            check=spec.size_argument("start offset"),
        ),
        Option(
            "-l --max-length",
            VALUE,
            "LENGTH",
            "stop after so many bytes (default: the rest)",
            check=spec.size_argument("max length"),
        ),
    ],
    [("FILENAME", "the image")],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `map` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    if len(given.operands) != 1:
        raise UsageError("Expecting one image file name")
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    extents = map_image(
        given.operands[0],
        format=given.get("format"),
        image_opts="image_opts" in given,
        start=given.get("start_offset", 0),
        length=given.get("max_length"),
        force_share="force_share" in given,
        objects=given.objects,
        warn=ui.caution,
    )
    return _print_json(extents, ui) if given.get("output") == "json" else _print_human(extents, ui)


class MapEntry:
    """A run of `length` bytes at guest offset `start`, all stored the same way.

    `depth` counts the layers from the top (0) to the one that decides the content. `present`: some layer does;
    otherwise the bytes are zeroes since no layer has them. `zero`: they read as zeroes; `data`: they are stored.
    `compressed`: they are stored compressed. `offset` is their place in the file `filename`, None where they
    cannot be read from a file as they are.
    """

    __slots__ = ("start", "length", "depth", "present", "zero", "data", "compressed", "offset", "filename")

    def __init__(self, start: int, length: int, depth: int, status: int, offset: Optional[int] = None, filename: Optional[str] = None) -> None:
        self.start = start
        self.length = length
        self.depth = depth
        self.present = bool(status & ALLOCATED)
        self.zero = bool(status & ZERO)
        self.data = bool(status & DATA)
        self.compressed = bool(status & COMPRESSED)
        self.offset = offset
        self.filename = filename

    def continued_by(self, other: MapEntry) -> bool:
        """Whether `other` could be the rest of this run."""
        return (
            self.depth == other.depth
            and self.present == other.present
            and self.zero == other.zero
            and self.data == other.data
            and self.compressed == other.compressed
            and self.filename == other.filename
            and (other.offset is None if self.offset is None else other.offset == self.offset + self.length)
        )

    def as_dict(self) -> dict[str, Any]:
        """The entry as qemu-img map --output=json has it (QAPI's MapEntry, without the file name)."""
        values: dict[str, Any] = {
            "start": self.start,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
            "compressed": self.compressed,
        }
        if self.offset is not None:
            values["offset"] = self.offset
        return values


def map_image(
    filename: str,
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    start: int = 0,
    length: Optional[int] = None,
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> Iterator[MapEntry]:
    """The runs of the image `filename` in [start, start + length), in bytes, as qemu-img map --output=json lists them.

    A range that is empty or lies behind the end gives one empty entry. The image stays open while the iterator is in use.
    Raises Error or OSError: those of opening at once, later ones where they occur.
    """
    node = Graph(policy, objects, warn).open(filename, format, OpenFlags(force_share=force_share), image_opts)
    entries = _entries(node, start, node.size if length is None else min(node.size, start + length))
    next(entries)  # from here on the iterator closes the node, also where nobody reads it
    return entries


def _entries(node: Node, start: int, end: int) -> Iterator[MapEntry]:
    """The merged entries of a range, after a first one that only says that the node is in good hands."""
    with node:
        yield MapEntry(start, 0, 0, 0)
        if start >= end:
            yield MapEntry(start, 0, 0, 0)
            return
        last: Optional[MapEntry] = None
        for entry in _runs(node.unfiltered(), start, end - start, 0):
            if last is None:
                last = entry
            elif last.continued_by(entry):
                last.length += entry.length
            else:
                yield last
                last = entry
        if last is not None:
            yield last


def _runs(node: Node, start: int, length: int, depth: int) -> Iterator[MapEntry]:
    """The runs of a range of one layer, and of those below it where it has nothing; neighbours may be alike."""
    end = start + length
    limit = EXTENTS_AT_ONCE
    while start < end:
        try:
            extents = node.block_status(start, end - start, limit=limit)
        except Error as exc:
            if limit > 1:  # all up to the place that fails
                limit = 1
                continue
            import errno
            import os

            reason = os.strerror(exc.errno or errno.EIO)
            raise Error("Could not read file metadata: " + reason, filename=node.filename, offset=exc.offset, errno=exc.errno, hint=str(exc)) from exc
        for extent in extents:
            yield from _layer(node, extent, depth)
        start = extent.offset + extent.length


def _layer(node: Node, extent: Extent, depth: int) -> Iterator[MapEntry]:
    start, length, status, host, host_offset = extent
    if status & (DATA | ZERO):
        if status & OFFSET_VALID and host is not None:
            yield MapEntry(start, length, depth, status | ALLOCATED, host_offset, host.filename)
        else:
            yield MapEntry(start, length, depth, status | ALLOCATED)
        return
    if not node.supports_backing:
        yield MapEntry(start, length, depth, 0)
        return
    backing = node.backing
    inside = 0 if backing is None else max(0, min(length, backing.size - start))
    if backing is not None and inside:
        yield from _runs(backing.unfiltered(), start, inside, depth + 1)
    if inside < length:
        kept = host_offset + inside if status & OFFSET_VALID else None
        yield MapEntry(start + inside, length - inside, depth, ZERO, kept)


def _print_json(extents: Iterator[MapEntry], ui: UI) -> int:
    mark = "["
    for entry in extents:
        offset = "" if entry.offset is None else ', "offset": %d' % entry.offset
        flags = tuple("true" if flag else "false" for flag in (entry.present, entry.zero, entry.data, entry.compressed))
        line = '{ "start": %d, "length": %d, "depth": %d, "present": %s, "zero": %s, "data": %s, "compressed": %s%s}'
        ui.write(mark + line % (entry.start, entry.length, entry.depth, *flags, offset))
        mark = ",\n"
    ui.write("]\n")
    return 0


def _print_human(extents: Iterator[MapEntry], ui: UI) -> int:
    row = "%-16s%-16s%-16s%s\n"
    ui.write(row % ("Offset", "Length", "Mapped to", "File"))
    for entry in extents:
        if not entry.data or entry.zero:
            continue
        if entry.offset is None:
            ui.error("File contains external, encrypted or compressed clusters.")
            return 1
        ui.write(row % (_hexadecimal(entry.start), _hexadecimal(entry.length), _hexadecimal(entry.offset), entry.filename))
    return 0


def _hexadecimal(number: int) -> str:
    return "%#x" % number if number else "0"
