# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`create`: make a new image (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

import errno
import os

from ..drivers import KNOWN
from ..errors import Error, OptionError
from ..graph import Graph, identity, identity_of_path, join_name, parse_filename, prefixed, with_driver
from ..node import ALL, RESIZE, WRITE, OpenFlags
from ..parts import part
from . import spec
from .creation import CreationOptions, creatable
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..graph import OpenPolicy
    from ..node import Node

SECTOR = 512  # sizes are rounded up to a multiple of it
LOOP = "Error: Trying to create an image with the same filename as the backing file"
MAX_GUEST = 0x7FFFFFFFC0000000  # bytes, the largest virtual size that QEMU's block layer takes
UNKNOWN = (1 << 64) - 1  # a size that QEMU takes for none

COMMAND = Command(
    "create",
    "Make a new image that reads as zeroes, or as its backing file. An existing FILENAME is overwritten.",
    ["[-f FMT] [-o OPTIONS]... [-b BACKING -F BACKING_FMT [-u]] [-q]", "[--object OBJDEF]... FILENAME [SIZE]"],
    [
        spec.HELP,
        spec.QUIET,
        spec.OBJECT,
        Option("-f --format", VALUE, "FMT", "format of the new image (default: raw)", key="format"),
        Option("-b --backing", VALUE, "BACKING", "what is not written yet is read from this image", key="backing"),
        Option("-F -B --backing-format", VALUE, "BACKING_FMT", "format of BACKING", key="backing_format"),
        Option("-u --backing-unsafe", FLAG, help="do not look at BACKING at all; SIZE is needed then"),
        Option(
            "-o --options",
            VALUE,
            "OPTIONS",
            "options of the format: KEY=VALUE,... (-o help lists them);\nmay be repeated",
            key="options",
        ),
    ],
    [
        ("FILENAME", "the image to make"),
        ("SIZE", "its size in bytes; suffixes k, M, G, T, P, E count in 1024s;\nwithout it, the size of BACKING"),
    ],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `create` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    ui.quiet = "quiet" in given
    operands = given.operands
    filename = operands[0] if operands else None
    format = given.get("format", "raw")
    options = given.get("options")
    if spec.wants_help(options):
        creation_options = part(__package__, "help").creation_options

        raise spec.Answer(creation_options(format, filename))
    if filename is None:
        raise UsageError("Expecting image file name")
    size = spec.read_size(operands[1], "image size") if len(operands) > 1 else None
    if len(operands) > 2:
        raise UsageError("Unexpected argument: %s" % operands[2])
    create(
        filename,
        size,
        format=format,
        options=options,
        backing=given.get("backing"),
        backing_format=given.get("backing_format"),
        backing_unsafe="backing_unsafe" in given,
        objects=given.objects,
        announce=ui.say,
        warn=ui.caution,
    )
    return 0


def create(
    filename: str,
    size: Optional[int] = None,
    *,
    format: str = "raw",
    options: Optional[str] = None,
    backing: Optional[str] = None,
    backing_format: Optional[str] = None,
    backing_unsafe: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    announce: Optional[Callable[[str], None]] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> None:
    """Make the image `filename` of `size` bytes (rounded up to 512), or of its backing image's size.

    `options` are the format's, "k=v,k2=v2" in QEMU's grammar. `announce` is called with the line "Formatting ...\n" once
    the options are known to be good and before anything is written. Raises Error (its text begins with the file name);
    what was begun is removed then.
    """
    creating = False  # whether what fails is the new image, and not its backing file
    try:
        own, protocol = creatable(format, filename)
        chosen = CreationOptions(own, protocol, options, objects)
        _set_given(chosen, size, backing, backing_format)
        _look_at_backing(chosen, filename, backing_unsafe, Graph(policy, objects, warn))
        if announce is not None:
            announce("Formatting '%s', fmt=%s %s\n" % (filename, format, chosen.line()))
        creating = True
        _check_announced(chosen)
        write_image(filename, own, protocol, chosen.own_record(), chosen.protocol_record())
    except Error as error:
        if creating and error.errno == errno.EFBIG:
            hint = " (try using a larger cluster size)" if chosen.field("cluster_size") else ""
            text = "%s: The image size is too large for file format '%s'%s" % (filename, format, hint)
            raise Error(text, filename=filename, errno=error.errno) from error
        raise prefixed("%s: " % filename, error, filename) from error
    except OSError as error:
        raise Error("%s: %s" % (filename, error.strerror or error), filename=filename, errno=error.errno) from error


def _check_announced(chosen: CreationOptions) -> None:
    """Round the size up, and check what QEMU checks only after it has announced the image."""
    size = -(-chosen.values["size"] // SECTOR) * SECTOR
    if size >> 63:
        raise OptionError("Could not resize file: Invalid argument" if chosen.own.plain else "Could not resize image: Image size cannot be negative")
    if size > MAX_GUEST and not chosen.own.plain:
        raise OptionError("Could not resize image: offset(%d) exceeds maximum(%d)" % (size, MAX_GUEST))
    chosen.set("size", size)
    format = chosen.values.get("backing_fmt")
    if format is not None and format not in KNOWN.split():
        raise OptionError("Parameter 'backing-fmt' does not accept value '%s'" % format)


def _set_given(chosen: CreationOptions, size: Optional[int], backing: Optional[str], backing_format: Optional[str]) -> None:
    """Add to the options what was given besides them."""
    if size is not None:
        if "size" in chosen.values:
            raise OptionError("The image size must be specified only once")
        chosen.set("size", size)
    for key, value, what in (("backing_file", backing, "file"), ("backing_fmt", backing_format, "file format")):
        if value is not None:
            if chosen.field(key) is None:
                raise OptionError("Backing %s not supported for file format '%s'" % (what, chosen.own.driver))
            chosen.set(key, value)


def _look_at_backing(chosen: CreationOptions, filename: str, unsafe: bool, graph: Graph) -> None:
    """Open the backing file, unless told not to, to see that it is there; settle the size, and refuse a loop."""
    name: Optional[str] = chosen.values.get("backing_file")
    format: Optional[str] = chosen.values.get("backing_fmt")
    size: Optional[int] = chosen.values.get("size")
    if size == UNKNOWN:
        size = None
    if name is not None:
        if not name:
            raise OptionError("Expected backing file name, got empty string")
        own = identity_of_path(filename)
        full = join_name(filename, name)
        if name == filename or own is not None and own == identity_of_path(full):
            raise OptionError(LOOP)
        hint = None
        if not unsafe:
            found, length, files = _open_backing(graph, full, format)
            if own is not None and own in files:
                raise OptionError(LOOP)
            size = length if size is None else size
            hint = "Detected format of %s." % found
        if format is None:
            raise OptionError("Backing file specified without backing format", hint=hint)
    if size is None:
        raise OptionError("Image creation needs a size parameter")
    chosen.set("size", size)


def _open_backing(graph: Graph, name: str, format: Optional[str]) -> tuple[str, int, list[Any]]:
    """The format and the size of the backing image, and the identities of the files in its chain."""
    try:
        described = parse_filename(name)
        if format is not None:
            described = with_driver(described, format)
        with graph.open_spec(described, OpenFlags(no_io=True, force_share=True)) as node:
            return node.driver, node.size, [identity(layer) for layer in node.layers()]
    except Error as error:
        hint = "Could not open backing image."
        raise Error(str(error), filename=error.filename, errno=error.errno, hint=(error.hint + "\n" if error.hint else "") + hint) from error


def write_image(filename: str, own: type[Node], protocol: type[Node], own_options: Any, protocol_options: Any) -> None:
    """Make the file, then the image in it; if that fails, take away what was made."""
    described = parse_filename(filename)["file"]
    path = str(described.get("filename", filename))
    made = not os.path.lexists(path)
    own.check_creation(own_options)
    try:
        # the format's own permissions from the first, so that a file in use is refused before it is emptied
        flags = own.child_flags("file", OpenFlags(writable=True, resize=True, perm=WRITE | RESIZE, shared=ALL & ~RESIZE))
        protocol.create_file(path, protocol_options, flags)  # type: ignore[attr-defined]
        if own.leaf:
            return
        made = True
        _write_files(described, path, own, own_options, flags)
    except BaseException:
        if made:
            _remove(path)
        raise


def _write_files(described: Any, path: str, own: type[Node], own_options: Any, flags: OpenFlags) -> None:
    """Write the image into the file that `described` opens and `path` names, and into those that its options name, which are made anew."""
    from contextlib import ExitStack

    from ..protocols.file import File

    graph = Graph()
    with ExitStack() as stack:
        children = {"file": stack.enter_context(graph.open_spec(described, flags))}
        for role, name in own.creation_files(own_options, path).items():
            File.create_file(name, File.create_options.from_mapping({}), flags)
            children[role] = stack.enter_context(graph.open_spec({"driver": "raw", "file": {"driver": "file", "filename": name}}, flags))
        if own.creation_needs_backing(own_options):
            children["backing"] = stack.enter_context(_backing_of(graph, path, own_options))
        own.create_over(children, own_options)


def _backing_of(graph: Graph, path: str, own_options: Any) -> Node:
    """The backing file of the image that is being made, itself without its own."""
    name = parse_filename(join_name(path, own_options.backing_file))
    spec = with_driver(name, own_options.backing_fmt) if own_options.backing_fmt else name
    return graph.open_spec(spec, OpenFlags(no_io=True, no_backing=True, force_share=True))


def _remove(path: str) -> None:
    """Remove a regular file that is not wanted any more."""
    import stat

    try:
        if stat.S_ISREG(os.lstat(path).st_mode):
            os.unlink(path)
    except OSError:
        return
