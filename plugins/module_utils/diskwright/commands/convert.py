# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`convert`: copy images to a new image of any format (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..copy.transfer import SPARSE_SIZE, copy
from ..drivers import FORMATS, PROTOCOLS
from ..errors import Error, Unsupported
from ..graph import Graph, prefixed
from ..hooks import Hooks
from ..node import ALL, RESIZE, WRITE, OpenFlags, cache_flags
from ..parts import part
from . import spec
from .creation import CreationOptions, creatable
from .output import Output
from .spec import FLAG, VALUE, Command, Option, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, Mapping, Optional, Sequence, Union

    from diskwright.commands.ui import UI

    from ..bitmaps import Bitmap
    from ..graph import OpenPolicy
    from ..node import Node

MAX_SPARSE_SIZE = 16 << 20  # bytes; the largest -S


def _sparse_size_argument(text: str) -> int:
    size = spec.read_size(text, "buffer size for sparse output")
    if size % 512 or size > MAX_SPARSE_SIZE:
        raise OptionError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to %d. "
            "Select 0 to disable sparse detection (fully allocates output)." % MAX_SPARSE_SIZE
        )
    return size


COMMAND = Command(
    "convert",
    "Copy one image, or several one after the other, to a new image, which is overwritten if it exists.",
    [
        "[-f FMT | --image-opts] [-T CACHE] [-l SNAPSHOT] [-U]",
        "[-O TARGET_FMT | --target-image-opts] [-o OPTIONS]... [-t TARGET_CACHE]",
        "[-B BACKING -F BACKING_FMT] [-c] [-S SIZE] [-n [--target-is-zero]]",
        "[--bitmaps [--skip-broken-bitmaps]] [-m COUNT] [-W] [-C] [-r RATE]",
        "[--salvage] [-p] [-q] [--object OBJDEF]... SOURCE [SOURCE...] TARGET",
    ],
    [
        spec.HELP,
        spec.QUIET,
        spec.OBJECT,
        Option(
            "--image-opts --source-image-opts",
            FLAG,
            key="image_opts",
            help="SOURCE is a list of options (driver=...,file.filename=...)\nand not a file name; excludes -f",
        ),
        Option(
            "-f --source-format",
            VALUE,
            "FMT",
            "format of SOURCE; without it, the format is detected",
            "--format",
            key="format",
        ),
        Option(
            "-T --source-cache",
            VALUE,
            "CACHE",
            "cache mode of SOURCE: none, writeback (default), writethrough,\ndirectsync or unsafe",
        ),
        Option(
            "-l --snapshot",
            VALUE,
            "SNAPSHOT",
            "copy this internal snapshot of SOURCE: its name or id,\nor snapshot.id=ID,snapshot.name=NAME",
            "--source-snapshot",
            key="snapshot",
            check=spec.check_snapshot,
        ),
        Option(
            "-S --sparse-size",
            VALUE,
            "SIZE",
            "runs of so many zero bytes are not written (default: 4k);\n0 writes everything",
            key="sparse_size",
            check=_sparse_size_argument,
        ),
        Option(
            "-O --output-format",
            VALUE,
            "TARGET_FMT",
            "format of TARGET (default: raw)",
            "--target-format",
            key="target_format",
        ),
        Option(
            "-o --options",
            VALUE,
            "OPTIONS",
            "options of TARGET_FMT: KEY=VALUE,... (-o help lists them);\nmay be repeated",
            "--target-options --target-format-options",
            key="options",
        ),
        Option(
            "-t --output-cache",
            VALUE,
            "TARGET_CACHE",
            "cache mode of TARGET (default: unsafe)",
            "--target-cache",
            key="target_cache",
        ),
        Option(
            "-B -b --backing",
            VALUE,
            "BACKING",
            "make TARGET an overlay of this image: only what differs from\nit is written",
            key="backing",
        ),
        Option("-F --backing-format", VALUE, "BACKING_FMT", "format of BACKING"),
        spec.FORCE_SHARE,
        Option(
            "--target-image-opts", FLAG, help="TARGET is a list of options and not a file name; needs -n,\nexcludes -O"
        ),
        Option("--salvage", FLAG, help="go on after read errors; what cannot be read becomes zeroes"),
        Option("--target-is-zero", FLAG, help="TARGET is known to read as zeroes; needs -n"),
        Option("--bitmaps", FLAG, help="copy the dirty bitmaps too"),
        Option("--skip-broken-bitmaps", FLAG, help="leave out bitmaps that are inconsistent; needs --bitmaps"),
        Option(
            "-r --rate",
            VALUE,
            "RATE",
            "write at most so many bytes a second",
            "--rate-limit",
            key="rate",
            check=spec.size_argument("rate limit"),
        ),
        Option(
            "-m --parallel",
            VALUE,
            "COUNT",
            "number of requests at a time, 1 to 16 (default: 8)",
            key="parallel",
            check=spec.number_argument("number of coroutines", 1, 16),
        ),
        Option("-W --oob-writes", FLAG, help="TARGET may be written in any order, which may be faster"),
        Option(
            "-C --copy-range-offloading",
            FLAG,
            key="copy_range",
            help="let the kernel or the storage copy (excludes -S, -c, --salvage)",
        ),
        Option("-c", FLAG, help="compress TARGET, if its format can", extra="--compress", key="compress"),
        Option(
            "-n", FLAG, help="write into the existing TARGET and do not make it", extra="--no-create", key="no_create"
        ),
        Option("", VALUE, "BITMAP", "copy only what the dirty bitmap BITMAP of SOURCE has marked (needs -B)", extra="--changed"),
        Option("-p", FLAG, key="p", help="show progress"),
        spec.progress_option(extra="--progress"),
    ],
    [
        ("SOURCE", "the image to copy; - is standard input, read as raw"),
        ("TARGET", "the image to make; - is standard output, written as raw\n(or as a streamOptimized vmdk)"),
    ],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `convert` with the arguments `args`; the exit code."""
    given = COMMAND.read(args, ui)
    ui.quiet = "quiet" in given
    spec.settle_progress_argument(given, 2)
    _check_flags(given)
    options = given.get("options")
    operands = given.operands
    if spec.wants_help(options):
        creation_options = part(__package__, "help").creation_options

        target = operands[-1] if len(operands) > 1 else None
        raise spec.Answer(creation_options(given.get("target_format", "raw"), target))
    if len(operands) < 2:
        raise OptionError("Must specify image file name")
    source_cache = given.get("source_cache", "writeback")
    spec.check_cache_mode(source_cache)
    if operands[-1] == "-":
        ui.out = ui.err  # standard output is the image
    with ui.progress("convert", given, 1.0) as progress:
        progress.start()
        spec.check_one_image_form("image_opts" in given, given.get("format"))
        convert(
            operands[:-1],
            operands[-1],
            format=given.get("format"),
            image_opts="image_opts" in given,
            source_cache=source_cache,
            snapshot=given.get("snapshot"),
            force_share="force_share" in given,
            target_format=given.get("target_format"),
            target_image_opts="target_image_opts" in given,
            target_cache=given.get("target_cache", "unsafe"),
            options=options,
            backing=given.get("backing"),
            backing_format=given.get("backing_format"),
            no_create="no_create" in given,
            target_is_zero="target_is_zero" in given,
            compress="compress" in given,
            sparse_size=given.get("sparse_size"),
            parallel=given.get("parallel", 8),
            out_of_order="oob_writes" in given,
            copy_range="copy_range" in given,
            salvage="salvage" in given,
            bitmaps="bitmaps" in given,
            skip_broken_bitmaps="skip_broken_bitmaps" in given,
            changed=given.get("changed"),
            rate=given.get("rate"),
            objects=given.objects,
            progress=progress.update,
            warn=None if ui.quiet else ui.caution,
        )
        progress.finish()
    return 0


def _check_flags(given: spec.Given) -> None:
    """Raise OptionError for options that contradict each other, in qemu-img's order."""
    if "skip_broken_bitmaps" in given and "bitmaps" not in given:
        raise OptionError("Use of --skip-broken-bitmaps requires --bitmaps")
    if "copy_range" in given:
        if "compress" in given:
            raise OptionError("Cannot enable copy offloading when -c is used")
        if "sparse_size" in given:
            raise OptionError("Cannot enable copy offloading when -S is used")
        if "salvage" in given:
            raise OptionError("Cannot use copy offloading in salvaging mode")
    if "no_create" not in given:
        if "target_image_opts" in given:
            raise OptionError("--target-image-opts requires use of -n flag")
        if "target_is_zero" in given:
            raise OptionError("--target-is-zero requires use of -n flag")
    elif "options" in given:
        raise OptionError("-o has no effect when skipping image creation")


def convert(
    sources: Sequence[str],
    target: str,
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    source_cache: str = "writeback",
    snapshot: Optional[str] = None,
    force_share: bool = False,
    target_format: Optional[str] = None,
    target_image_opts: bool = False,
    target_cache: str = "unsafe",
    options: Optional[str] = None,
    backing: Optional[str] = None,
    backing_format: Optional[str] = None,
    no_create: bool = False,
    target_is_zero: bool = False,
    compress: bool = False,
    sparse_size: Optional[int] = None,
    parallel: int = 8,
    out_of_order: bool = False,
    copy_range: bool = False,
    salvage: bool = False,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    changed: Optional[str] = None,
    rate: Optional[int] = None,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    atomic: bool = False,
    content: Optional[Callable[[str], None]] = None,
    progress: Optional[Callable[[int, int], None]] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> None:
    """Copy the images `sources`, one after the other, to the image `target`, which is raw if `target_format` is not given.

    `options` are the target format's, "k=v,k2=v2" in QEMU's grammar. `sparse_size` is in bytes, 0 writes everything, None
    is the default of 4096. `changed` names a dirty bitmap of the source: only what it has marked is copied, into an overlay of `backing`,
    which has the rest. `rate` is in bytes a second. With `atomic` the target is written beside its name and renamed when
    it is whole: a failure leaves nothing, and an old file there as it was. `content` is called with the content checksum of the source, see
    copy/content.py, before that. `progress` is called with (bytes done, bytes in
    all) and ends the work by raising; `warn` is called with texts. The names "-" are standard input and output. Raises Error.
    """
    import os

    graph = Graph(policy, objects, warn)
    # nobody may write the sources meanwhile, unless the user says that it is all right
    shared = ALL if force_share else ALL & ~(WRITE | RESIZE)
    flags = OpenFlags(force_share=force_share, shared=shared, **_cache(source_cache, "source cache"))
    settings: dict[str, Any] = {
        "sparse_size": SPARSE_SIZE if sparse_size is None else sparse_size,
        "compress": compress,
        "copy_range": copy_range,
        "salvage": salvage,
        "threads": parallel,
        "ordered": not out_of_order,
        "rate": rate,
        "progress": progress,
        "warn": warn,
    }
    inlet = _pipe(sources[0], 0) if len(sources) == 1 and not image_opts else None
    outlet = None
    nodes: list[Node] = []
    try:
        if inlet is None:
            for name in sources:
                nodes.append(graph.open("/dev/stdin" if name == "-" else name, format, flags, image_opts))
        _check_sources(nodes, len(sources), format, snapshot, bitmaps)
        if len(sources) > 1 and backing is not None:
            raise OptionError(CHAINED)
        if changed is not None:
            nodes[:1] = [_changed(nodes, changed, backing)]
        summed = None
        if content is not None:
            if len(nodes) != 1:
                raise OptionError("The content checksum is that of a single source")
            summed = nodes[0] = part(__package__, ".copy.content").Content(nodes[0])
        named_format, target_format = target_format, target_format or "raw"
        recorded = _bitmaps_of(nodes[0], skip_broken_bitmaps, warn) if bitmaps else []
        outlet = _pipe(target, 1) if not target_image_opts else None
        feed: Union[int, Iterator[bytes], None] = inlet
        if len(nodes) == 1 and nodes[0].streamed and target_format in GROWING and not no_create and backing is None:
            if "preallocation" not in (options or ""):
                feed = nodes[0].unpack()
        if outlet is not None:
            if target_format == "raw" and (options or compress) or backing is not None or no_create:
                raise OptionError("%s: a pipe takes a raw image, and no options" % target)
            if target_format == "raw":
                _send(nodes, feed, outlet, target, settings)
                return
            if not nodes:
                raise OptionError("%s: nobody knows how large an image becomes that comes from a pipe" % target)
            streamed = _creation(target_format, "a pipe", options, sum(node.size for node in nodes), None, None)
            with part(__package__, ".copy.stream").Outlet(outlet, target) as pipe, streamed.own.stream(pipe, streamed.own_record()) as node:
                copy(nodes, node, target_is_zero=True, **{**settings, "compress": True, "copy_range": False, "ordered": True})
            return
        chosen = None
        if not no_create:
            size = sum(node.size for node in nodes) if feed is None else 0
            chosen = _creation(target_format, target, options, size, backing, backing_format)
            chosen.objects = graph.objects
            backing = chosen.values.get("backing_file")
            if inlet is not None:
                _check_growing(chosen.own)
            _check_creation(chosen, target, len(sources), compress)
        writable = OpenFlags(writable=True, unmap=settings["sparse_size"] != 0, **_cache(target_cache, "cache"))
        if target_is_zero and backing is not None:
            raise OptionError("Cannot use --target-is-zero when the destination image has a backing file")
        spec.check_one_image_form(target_image_opts, named_format)
        with Output(target, atomic and chosen is not None) as output:
            if chosen is not None:
                output.create(chosen, nodes, "converting %s" % target_format)
            secrets = chosen.secrets() if chosen is not None else {}
            with output.open(graph, None if target_image_opts else target_format, writable, target_image_opts, secrets) as node:
                if inlet is not None:
                    _check_growing(type(node))
                if feed is not None:
                    part(__package__, ".copy.stream").receive(feed, node, sparse_size=settings["sparse_size"], compress=compress, progress=progress)
                else:
                    if bitmaps and not node.stores_bitmaps:
                        raise OptionError("Format driver '%s' does not support bitmaps" % node.driver)
                    settings["compress"] = compress or node.needs_compression
                    _fill(node, nodes, chosen is not None, backing is not None, target_is_zero, settings)
                if content is not None and summed is not None:
                    content(summed.checksum())
                failure = _copy_bitmaps(node, recorded) if bitmaps else None
            if failure is not None:  # the content is whole, and closed as such
                raise failure
    finally:
        for node in nodes:
            node.close()
        for descriptor in (inlet, outlet):
            if descriptor is not None:
                os.close(descriptor)


GROWING = ("raw", "qcow2")  # formats of images that can be made while nobody knows yet how large they become
CHAINED = "Having a backing file for the target makes no sense when concatenating multiple input images"


def _cache(mode: str, what: str) -> dict[str, bool]:
    """The flags of a cache mode. Raises OptionError."""
    flags = cache_flags(mode)
    if flags is None:
        raise OptionError("Invalid %s option: %s" % (what, mode))
    return flags


def _pipe(name: str, standard: int) -> Optional[int]:
    """A descriptor of our own to stream through, where `name` is "-" or a pipe; None for what can be opened as an image.

    Standard input is an image like any other where it is a file.
    """
    import os
    import stat

    try:
        mode = os.fstat(standard).st_mode if name == "-" else os.stat(name).st_mode
    except (OSError, ValueError):
        return None
    if name == "-" and (standard == 1 or not (stat.S_ISREG(mode) or stat.S_ISBLK(mode))):
        return os.dup(standard)
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return None
    if name in ("/dev/stdin", "/dev/stdout"):
        return os.dup(standard)
    try:
        return os.open(name, os.O_RDONLY if standard == 0 else os.O_WRONLY)
    except OSError as exc:
        raise Error("Could not open '%s': %s" % (name, exc.strerror), filename=name, errno=exc.errno) from exc


def _check_growing(target: type[Hooks]) -> None:
    """Raise Unsupported for a driver whose images have the size that they are made with: a pipe does not tell it beforehand."""
    if target._truncate is Hooks._truncate:
        hint = "Convert to raw or qcow2 first and that image to %s, or redirect standard input from a file, whose size is known" % target.driver
        raise Unsupported("An image of format '%s' cannot be made from a pipe, whose size is not known" % target.driver, hint=hint)


def _check_sources(nodes: Sequence[Node], count: int, format: Optional[str], snapshot: Optional[str], bitmaps: bool) -> None:
    """Raise Error for what the sources cannot give; `nodes` is empty if they come through a pipe."""
    if not nodes and format not in (None, "raw"):
        raise OptionError("An image of format '%s' cannot be read from a pipe" % format)
    if snapshot is not None:
        if count > 1 and not snapshot.startswith("snapshot."):
            raise OptionError("No support for concatenating multiple snapshot")
        if not nodes:
            raise Unsupported("Failed to load snapshot: a pipe has no snapshots")
        part(__package__, "snapshot").load(nodes[0], snapshot)
    if bitmaps:
        if count > 1:
            raise OptionError("Copying bitmaps only possible with single source")
        if not nodes or not nodes[0].stores_bitmaps:
            raise OptionError("Source lacks bitmap support")


def _bitmaps_of(node: Node, skip_broken: bool, warn: Optional[Callable[[str], None]]) -> list[Bitmap]:
    """The bitmaps to copy, in the order in which QEMU looks at them. Raises Error for one that is inconsistent."""
    found: list[Bitmap] = []
    for bitmap in reversed(list(node.bitmaps() or ())):
        if not bitmap.inconsistent:
            found.append(bitmap)
        elif not skip_broken:
            hint = "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
            raise Error("Cannot copy inconsistent bitmap '%s'" % bitmap.name, filename=node.filename, hint=hint)
        elif warn is not None:
            warn("Skipping inconsistent bitmap '%s'" % bitmap.name)
    return found


def _changed(nodes: Sequence[Node], name: str, backing: Optional[str]) -> Node:
    """The source, of which only what its bitmap `name` has marked is to be copied. Raises Error."""
    if len(nodes) != 1 or backing is None:
        raise OptionError("What a bitmap has marked can be copied from a single source, into an overlay of a backing file")
    bitmaps = nodes[0].bitmaps()
    if bitmaps is None:
        raise OptionError("Source lacks bitmap support")
    found: Node = part(__package__, ".copy.changed").Changed(nodes[0], bitmaps.usable(name))
    return found


def _copy_bitmaps(node: Node, recorded: Sequence[Bitmap]) -> Optional[Error]:
    """Give the target, which stores bitmaps, those of `recorded`; what went wrong, if anything."""
    bitmaps = node.bitmaps()
    if bitmaps is None:
        return None
    first = len(bitmaps.all)
    for bitmap in recorded:
        try:
            bitmaps.add(bitmap.name, bitmap.granularity, bitmap.enabled)
        except Error as exc:
            return prefixed("Failed to create bitmap %s: " % bitmap.name, exc, node.filename)
        try:
            bitmaps.merge(bitmap.name, bitmap)
        except Error as exc:
            bitmaps.remove(bitmap.name)
            return prefixed("Failed to populate bitmap %s: " % bitmap.name, exc, node.filename)
    bitmaps.all[first:] = bitmaps.all[first:][::-1]
    return None


def _creation(
    format: str, target: str, options: Optional[str], size: int, backing: Optional[str], backing_format: Optional[str]
) -> CreationOptions:
    """The options of the image to make. Raises OptionError."""
    own, protocol = creatable(format, target)
    chosen = CreationOptions(own, protocol, options)
    chosen.set("size", size)
    for key, value, what in (("backing_file", backing, "file"), ("backing_fmt", backing_format, "file format")):
        if value is not None:
            if chosen.field(key) is None:
                raise OptionError("Backing %s not supported for file format '%s'" % (what, own.driver))
            chosen.set(key, value)
    return chosen


def _check_creation(chosen: CreationOptions, target: str, sources: int, compress: bool) -> None:
    """Raise OptionError for creation options that do not go together with the rest."""
    values = chosen.values
    if values.get("backing_file") is not None:
        if sources > 1:
            raise OptionError(CHAINED)
        if values.get("backing_fmt") is None:
            raise OptionError("Use of backing file requires explicit backing format")
        if values["backing_fmt"] not in FORMATS and values["backing_fmt"] not in PROTOCOLS:
            raise OptionError(
                "%s: error while converting %s: Parameter 'backing-fmt' does not accept value '%s'"
                % (target, chosen.own.driver, values["backing_fmt"])
            )
    if compress:
        if not chosen.own.can_compress(values):
            raise OptionError("Compression not supported for this file format")
        if values.get("encryption") or values.get("encrypt.format"):
            raise OptionError("Compression and encryption not supported at the same time")
        if values.get("preallocation", "off") != "off":
            raise OptionError("Compression and preallocation not supported at the same time")


def _fill(node: Node, nodes: Sequence[Node], fresh: bool, overlay: bool, target_is_zero: bool, settings: Mapping[str, Any]) -> None:
    """Copy the sources into the target that is open."""
    if node.size < sum(source.size for source in nodes):
        raise OptionError("output file is smaller than input file")
    if target_is_zero and overlay:
        raise OptionError("Cannot use --target-is-zero when the destination image has a backing file")
    known = fresh and not overlay and settings["sparse_size"] != 0 and node.zero_initialized
    copy(nodes, node, target_is_zero=target_is_zero or known, own=overlay, **settings)


def _send(nodes: Sequence[Node], feed: Union[int, Iterator[bytes], None], outlet: int, name: str, settings: Mapping[str, Any]) -> None:
    """Write the sources into a pipe."""
    stream = part(__package__, ".copy.stream")
    with stream.Outlet(outlet, name) as node:
        if feed is not None:
            stream.receive(feed, node, sparse_size=0, progress=settings["progress"])
        else:
            copy(nodes, node, **{**settings, "sparse_size": 0, "copy_range": False, "threads": 1, "ordered": True})
