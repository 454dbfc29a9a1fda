# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`commit`: write what an overlay holds into its backing file (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..errors import Error, OptionError, Unsupported
from ..graph import Graph, identity, identity_of_path, parse_filename, resolve_name
from ..node import ALL, CONSISTENT_READ, RESIZE, WRITE, Format, OpenFlags, cache_flags
from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..graph import OpenPolicy
    from ..node import Node

COMMAND = Command(
    "commit",
    "Write what an image holds into its backing file, which grows if it is shorter, and empty the image.",
    ["[-f FMT | --image-opts] [-t CACHE] [-b BASE] [-d] [-r RATE] [-p] [-q]", "[--object OBJDEF]... FILENAME"],
    [
        spec.HELP,
        spec.QUIET,
        spec.OBJECT,
        spec.FORMAT,
        spec.IMAGE_OPTS,
        spec.WRITE_CACHE,
        Option("-d --drop", FLAG, help="do not empty the image afterwards"),
        Option(
            "-b --base",
            VALUE,
            "BASE",
            "commit into this image further down the backing chain; implies -d,\nand makes the images between the two invalid",
        ),
        Option("-p", FLAG, key="p", help="show progress"),
        spec.progress_option("--progress"),
        Option(
            "-r --rate",
            VALUE,
            "RATE",
            "write at most so many bytes a second",
            "--rate-limit",
            key="rate",
            check=spec.size_argument("rate limit"),
        ),
    ],
    [("FILENAME", "the image")],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `commit` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    ui.quiet = "quiet" in given
    spec.settle_progress_argument(given, 1, 1)
    if len(given.operands) != 1:
        raise UsageError("Expecting one image file name")
    cache = given.get("cache", "writeback")
    spec.check_cache_mode(cache, "cache")
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    with ui.progress("commit", given, 1.0) as progress:
        progress.ends_line = False  # until there is one
        commit(
            given.operands[0],
            given.get("base"),
            format=given.get("format"),
            image_opts="image_opts" in given,
            cache=cache,
            drop="drop" in given,
            rate=given.get("rate"),
            objects=given.objects,
            progress=progress.update,
            warn=ui.caution,
            begin=progress.start,
        )
        progress.finish()
    ui.say("Image committed.\n")
    return 0


def commit(
    filename: str,
    base: Optional[str] = None,
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    cache: str = "writeback",
    drop: bool = False,
    rate: Optional[int] = None,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    progress: Optional[Callable[[int, int], None]] = None,
    warn: Optional[Callable[[str], None]] = None,
    begin: Optional[Callable[[], None]] = None,
) -> None:
    """Write what the image `filename` and those below it down to `base` hold into `base`; None: its backing file.

    The base is made as long as the image. Then the image is emptied, if its format can, unless `drop` is set or `base`
    is named; that comes last, so that an interruption harms nothing that is read through the image. `rate` is in bytes a second, `progress`
    is called with (bytes done, bytes in all), and `begin` once the images are open. Raises Error.
    """
    settings = cache_flags(cache)
    if settings is None:
        raise OptionError("Invalid cache option: %s" % cache)
    flags = OpenFlags(writable=True, resize=True, unmap=True, **settings)
    with Graph(policy, objects, warn).open(filename, format, flags, image_opts) as top:
        if begin is not None:
            begin()
        target = _find(top, filename, base)
        from ..copy.overlay import commit as bring_down

        before = target.flags
        for layer in top.layers():
            if layer is target:
                break
            if layer is not top:  # what it holds will make no sense any more
                layer.change_flags(layer.flags.but(shared=layer.flags.permissions()[1] & ~CONSISTENT_READ))
        target.change_flags(flags.but(no_flush=before.no_flush, perm=CONSISTENT_READ | WRITE | RESIZE, shared=ALL & ~RESIZE))
        try:
            if target.size < top.size:
                target.truncate(top.size)
            bring_down(top, target, rate=rate, progress=progress)
            target.flush()
        except Error as exc:
            import os

            reason = os.strerror(exc.errno) if exc.errno else str(exc)
            raise Error("Block job failed: " + reason, filename=target.filename, offset=exc.offset, errno=exc.errno, hint=str(exc)) from exc
        if not drop and base is None and isinstance(top, Format):
            try:
                top.make_empty()
            except Unsupported:
                return  # then it keeps what it has


def _find(top: Node, filename: str, base: Optional[str]) -> Node:
    """The node to commit into. Raises OptionError."""
    if base is None:
        if top.backing is None:
            raise OptionError("Image does not have a backing file", filename=filename)
        return top.backing
    layer: Node = top
    while layer.backing is not None:
        name, node = layer.backing_filename, layer.backing
        found = identity(node)
        if base in (node.filename, name) or (found is not None and _path(resolve_name(top, base)) == found):
            return node
        layer = node
    raise OptionError("Did not find '%s' in the backing chain of '%s'" % (base, filename), filename=filename)


def _path(name: str) -> Any:
    """The identity of the file that `name` names; None where there is none."""
    try:
        inner = parse_filename(name).get("file")
    except Error:
        return None
    return identity_of_path(str(inner.get("filename", ""))) if isinstance(inner, dict) else None
