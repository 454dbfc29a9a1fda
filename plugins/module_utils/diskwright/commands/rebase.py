# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`rebase`: give an image another backing file (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from .. import drivers
from ..errors import Error, OptionError, Unsupported
from ..graph import Graph, identity, identity_of_path, parse_filename, prefixed, resolve_name
from ..node import Format, OpenFlags, cache_flags
from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..graph import OpenPolicy
    from ..node import Node

COMMAND = Command(
    "rebase",
    "Give an image another backing file, or none; what it reads as stays the same.",
    [
        "[-f FMT | --image-opts] [-t CACHE] [-b BACKING -F BACKING_FMT]",
        "[-T BACKING_CACHE] [-u] [-c] [-U] [-p] [-q] [--object OBJDEF]... FILENAME",
    ],
    [
        spec.HELP,
        spec.QUIET,
        Option("-p", FLAG, key="p", help="show progress"),
        spec.progress_option("--progress"),
        spec.OBJECT,
        spec.IMAGE_OPTS,
        Option("-U --force-share", FLAG, help="read BACKING even if another process is writing to it"),
        spec.FORMAT,
        spec.WRITE_CACHE,
        Option("-c --compress", FLAG, help="compress what is written, if the image's format can"),
        Option(
            "-b --backing",
            VALUE,
            "BACKING",
            'the new backing file, relative to the image; "" for none: the\nimage then holds all of its data itself',
        ),
        Option("-F --backing-format -B", VALUE, "BACKING_FMT", "format of BACKING", key="backing_format"),
        Option("-T --backing-cache", VALUE, "CACHE", "cache mode for BACKING"),
        Option(
            "-u --backing-unsafe",
            FLAG,
            help="change only the name: neither backing file is opened, so BACKING\nmust hold the same data already; without -b, name none",
        ),
    ],
    [("FILENAME", "the image")],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `rebase` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    ui.quiet = "quiet" in given
    spec.settle_progress_argument(given, 1, 1)
    if len(given.operands) != 1:
        raise UsageError("Expecting one image file name")
    if "backing_unsafe" not in given and "backing" not in given:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    with ui.progress("rebase", given, 2.0) as progress:
        progress.start()
        cache, backing_cache = given.get("cache", "writeback"), given.get("backing_cache", "writeback")
        spec.check_cache_mode(cache, "cache")
        spec.check_cache_mode(backing_cache)
        spec.check_one_image_form("image_opts" in given, given.get("format"))
        rebase(
            given.operands[0],
            given.get("backing"),
            format=given.get("format"),
            image_opts="image_opts" in given,
            backing_format=given.get("backing_format"),
            unsafe="backing_unsafe" in given,
            compress="compress" in given,
            cache=cache,
            backing_cache=backing_cache,
            force_share="force_share" in given,
            objects=given.objects,
            progress=progress.update,
            warn=ui.caution,
        )
        progress.finish()
    return 0


def rebase(
    filename: str,
    backing: Optional[str],
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    backing_format: Optional[str] = None,
    unsafe: bool = False,
    compress: bool = False,
    cache: str = "writeback",
    backing_cache: str = "writeback",
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    progress: Optional[Callable[[int, int], None]] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> None:
    """Make `backing` ("" or None: nothing) the backing file of the image `filename`; the name is stored as it is.

    The image reads as before: what differs is written into it, and the name is changed once that is on the disk, so that
    an interruption harms nothing. With `unsafe` only the name is changed. `progress` is called with (bytes done, bytes in all). Raises Error.
    """
    settings, backing_settings = cache_flags(cache), cache_flags(backing_cache)
    if settings is None or backing_settings is None:
        raise OptionError("Invalid %scache option: %s" % (("", cache) if settings is None else ("source ", backing_cache)))
    graph = Graph(policy, objects, warn)
    flags = OpenFlags(writable=True, unmap=True, no_backing=unsafe, **settings)
    with graph.open(filename, format, flags, image_opts) as node:
        _check(node, backing, backing_format, compress)
        if not unsafe:
            source = OpenFlags(force_share=force_share, **backing_settings)
            new = _new_backing(graph, node, backing, backing_format, source) if backing else None
            try:
                _refuse(node, backing, backing_format)
                from ..copy.overlay import rebase as bring_over

                bring_over(node, new, compress=compress, progress=progress)
            finally:
                if new is not None and new not in node.layers():
                    new.close()
        _refuse(node, backing, backing_format)
        if isinstance(node, Format):
            _change(node, backing, backing_format)


def _check(node: Node, backing: Optional[str], backing_format: Optional[str], compress: bool) -> None:
    """Raise OptionError for what can be told before the new backing file is opened."""
    if backing_format is not None and backing_format not in {**drivers.FORMATS, **drivers.PROTOCOLS, **drivers.FILTERS}:
        raise OptionError("Invalid format name: '%s'" % backing_format)
    if compress and not node.supports_compression:
        raise Unsupported("Compression not supported for this file format")


def _refuse(node: Node, backing: Optional[str], backing_format: Optional[str]) -> None:
    """Raise Error for what makes the change of the name fail, before anything is written."""
    reason = ""
    if backing and backing_format is None:
        reason = "backing format must be specified"
    elif not node.supports_backing:
        reason = "Operation not supported"
    elif backing and (node.format_specific() or {}).get("data-file-raw"):
        reason = "Invalid argument"  # its data file has to read as the disk does
    if reason:
        raise OptionError("Could not change the backing file to '%s': %s" % ("(null)" if backing is None else backing, reason), filename=node.filename)


def _new_backing(graph: Graph, node: Node, name: str, format: Optional[str], flags: OpenFlags) -> Node:
    """The new backing node: the one of the present chain that it is, or a newly opened one. Raises Error."""
    resolved = resolve_name(node, name)
    inner = parse_filename(resolved).get("file")
    path = str(inner.get("filename", "")) if isinstance(inner, dict) else ""
    wanted = identity_of_path(path)
    if wanted is not None and node.backing is not None:
        for layer in node.backing.layers():
            if identity(layer) == wanted and format in (None, layer.driver):
                return layer
    try:
        return graph.open(resolved, format, flags)
    except Error as exc:
        text = str(exc)
        own = "Could not open '%s': " % resolved
        again = prefixed("", exc, node.filename)
        again.args = ("Could not open new backing file '%s': %s" % (name, text[len(own) :] if text.startswith(own) else text),)
        raise again from exc


def _change(node: Format, backing: Optional[str], backing_format: Optional[str]) -> None:
    """Store the name. Raises Error in QEMU's words."""
    import errno

    try:
        node.change_backing(backing or None, backing_format if backing else None)
    except OptionError as exc:
        reason = "No space left in the file header" if exc.errno == errno.ENOSPC else "Invalid argument"
        raise OptionError("Could not change the backing file to '%s': %s" % (backing, reason), filename=node.filename, errno=exc.errno) from exc
