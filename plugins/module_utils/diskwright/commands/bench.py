# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`bench`: time requests to an image (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from time import monotonic

from ..copy.crew import Crew
from ..errors import Error, OptionError, Unsupported
from ..getopt import Parser
from ..graph import Graph, prefixed
from ..node import OpenFlags, cache_flags
from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..graph import OpenPolicy
    from ..node import Node

MAX_NUMBER = (1 << 31) - 1
MAX_THREADS = 64  # requests under way at a time; a larger depth waits in line


AIO = ("threads", "native", "io_uring")


def _aio_argument(text: str) -> str:
    if text not in AIO:
        raise OptionError("Invalid aio option: %s" % text)
    return text


def _cache_argument(text: str) -> str:
    if cache_flags(text) is None:
        raise OptionError("Invalid cache mode")
    return text


def _size(what: str, least: int) -> Callable[[str], int]:
    return spec.size_argument(what, least, MAX_NUMBER)


COMMAND = Command(
    "bench",
    "Time requests to an image: reads, or writes, which destroy what it holds.",
    [
        "[-f FMT | --image-opts] [-t CACHE] [-c COUNT] [-d DEPTH] [-o OFFSET]",
        "[-s BUFFER_SIZE] [-S STEP_SIZE] [-i AIO] [-n] [-U] [-q]",
        "[-w [--pattern PATTERN] [--flush-interval INTERVAL [--no-drain]]] FILENAME",
    ],
    [
        spec.HELP,
        Option("-q", key="quiet", help="print nothing but errors", extra="--quiet"),
        spec.FORMAT,
        spec.IMAGE_OPTS,
        spec.BLOCKDEV,
        Option("-t --cache", VALUE, "CACHE", spec.WRITE_CACHE.help, key="cache", check=_cache_argument),
        Option(
            "-c --count", VALUE, "COUNT", "number of requests (default: 75000)", check=spec.number_argument("request count", 1, MAX_NUMBER)
        ),
        Option(
            "-d --depth", VALUE, "DEPTH", "requests under way at a time (default: 64)", check=spec.number_argument("queue depth", 1, MAX_NUMBER)
        ),
        Option("-o --offset", VALUE, "OFFSET", "where the first request begins (default: 0)", check=spec.size_argument("offset")),
        Option("-s --buffer-size", VALUE, "BUFFER_SIZE", "bytes of a request (default: 4096)", check=_size("buffer size", 1)),
        Option("-S --step-size", VALUE, "STEP_SIZE", "from one request to the next (default: BUFFER_SIZE)", check=_size("step size", 0)),
        Option(
            "-i --aio",
            VALUE,
            "AIO",
            "threads (default), native or io_uring; native needs a cache\nmode without the host's cache, and is done by threads",
            check=_aio_argument,
        ),
        Option("-n --native", FLAG, help="the same as -i native"),
        Option("-w --write", FLAG, help="write; what the image holds is lost"),
        Option("--pattern", VALUE, "PATTERN", "the byte to write, 0 to 255 (default: 0)", check=spec.number_argument("pattern byte", 0, 255)),
        Option(
            "--flush-interval",
            VALUE,
            "INTERVAL",
            "flush after so many writes",
            check=spec.number_argument("flush interval", 0, MAX_NUMBER),
        ),
        Option("--no-drain", FLAG, help="let a flush overlap with requests under way, where that can be"),
        spec.FORCE_SHARE,
    ],
    [("FILENAME", "the image")],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `bench` with the arguments `args`; the exit code."""
    given = spec.Given()
    aio: set[str] = set()
    for option, value in COMMAND.parse(Parser(COMMAND.options, args, ui.posixly_correct), ui):
        if option is None:
            given.operands.append(value or "")
            continue
        COMMAND.take(given, option, value)
        if option.key == "aio":
            aio.add(given["aio"])
        elif option.key == "native":
            aio.add("native")
    ui.quiet = "quiet" in given
    if len(given.operands) != 1:
        raise UsageError("Expecting one image file name")
    write, interval, depth = "write" in given, given.get("flush_interval", 0), given.get("depth", 64)
    if interval and not write:
        raise OptionError("--flush-interval is only available in write tests")
    if interval and interval < depth:
        raise OptionError("Flush interval can't be smaller than depth")
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    size = given.get("buffer_size", 4096)
    step = given.get("step_size") or size

    def begin() -> None:
        ui.say(
            "Sending %d %s requests, %d bytes each, %d in parallel (starting at offset %d, step size %d)\n"
            % (given.get("count", 75000), "write" if write else "read", size, depth, given.get("offset", 0), step)
        )
        if interval:
            ui.say("Sending flush every %d requests\n" % interval)
        ui.flush()

    seconds = bench(
        given.operands[0],
        format=given.get("format"),
        image_opts="image_opts" in given,
        cache=given.get("cache", "writeback"),
        aio=next((mode for mode in ("native", "io_uring") if mode in aio), "threads"),
        count=given.get("count", 75000),
        depth=depth,
        buffer_size=size,
        offset=given.get("offset", 0),
        step_size=step,
        write=write,
        pattern=given.get("pattern", 0),
        flush_interval=interval,
        drain="no_drain" not in given,
        force_share="force_share" in given,
        objects=given.objects,
        begin=begin,
        warn=ui.caution,
    )
    ui.say("Run completed in %3.3f seconds.\n" % seconds)
    return 0


def bench(
    filename: str,
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    cache: str = "writeback",
    aio: str = "threads",
    count: int = 75000,
    depth: int = 64,
    buffer_size: int = 4096,
    offset: int = 0,
    step_size: int = 4096,
    write: bool = False,
    pattern: int = 0,
    flush_interval: int = 0,
    drain: bool = True,
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    begin: Optional[Callable[[], None]] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> float:
    """Send `count` requests of `buffer_size` bytes, the first at `offset`, each `step_size` behind the one before, around
    the end of the image; the seconds that they took.

    Up to `depth` are under way at a time: of as many threads, at most MAX_THREADS, or with the `aio` "io_uring" in the kernel.
    Each `flush_interval` writes are flushed, with `drain` only once they are all done.
    `begin` is called before the first. Raises Error "Failed request: ...", and as opening does for an `aio` that cannot be.
    """
    settings = cache_flags(cache)
    if settings is None:
        raise OptionError("Invalid cache mode")
    if aio not in AIO:
        raise OptionError("Invalid aio option: %s" % aio)
    flags = OpenFlags(writable=write, unmap=True, force_share=force_share, **settings)
    if write and force_share:
        raise OptionError("Could not open '%s': force-share=on can only be used with read-only images" % filename)
    with AioGraph(aio, policy, objects, warn).open(filename, format, flags, image_opts) as node:
        requests: Requests
        run = (node, count, buffer_size, offset, step_size, bytes((pattern,)) if write else b"", flush_interval, drain)
        if getattr(_file_below(node).options, "aio", "") == "io_uring":
            from .bench_uring import RingRequests

            try:
                requests = RingRequests(*run)
            except Unsupported as exc:
                raise prefixed("Could not open '%s': " % filename, exc, filename) from exc
        else:
            requests = Requests(*run)
        if begin is not None:
            begin()
        try:
            return requests.time(depth)
        except (Error, OSError) as exc:
            import os

            raise Error("Failed request: %s" % os.strerror(getattr(exc, "errno", None) or 5), filename=filename, hint=None) from exc


def _file_below(node: Node) -> Node:
    """The protocol node that `node` has its bytes in."""
    while "file" in node.children:
        node = node.children["file"]
    return node


class AioGraph(Graph):
    """A graph whose files are read and written by `aio`, where nothing else is said of them."""

    def __init__(self, aio: str, *rest: Any) -> None:
        super().__init__(*rest)
        self._aio = aio

    def open_spec(self, spec: Mapping[str, Any], flags: OpenFlags, above: tuple[Any, ...] = ()) -> Node:
        if self._aio != "threads" and spec.get("driver") in ("file", "host_device", "host_cdrom") and "aio" not in spec:
            spec = {**spec, "aio": self._aio}
        return super().open_spec(spec, flags, above)


class Requests:
    """The requests of one run; `pattern` is the byte to write, none to read."""

    def __init__(self, node: Node, count: int, size: int, offset: int, step: int, pattern: bytes, flush_interval: int, drain: bool) -> None:
        self.node = node
        self.count = count
        self.size = size
        self.offset = offset
        self.step = step
        self.data = pattern * size
        self.flush_interval = flush_interval
        self.drain = drain

    def time(self, depth: int) -> float:
        """Send all of them, `depth` at a time; the seconds it took. Raises the first failure."""
        start = monotonic()
        batch = self.flush_interval if self.drain and self.flush_interval else self.count
        sent = 0
        while sent < self.count:
            part = min(batch, self.count - sent)
            self._crew = Crew(self.offsets(part))
            self._crew.run(self._member, min(depth, part, MAX_THREADS))
            sent += part
            if self.drain and self.flush_interval and part == batch:
                self.node.flush()
        return monotonic() - start

    def offsets(self, count: int) -> Iterator[tuple[int, bool]]:
        """Where the next `count` requests begin, and whether a flush follows at once, others being under way."""
        node_size = self.node.size
        for number in range(1, count + 1):
            yield self.offset, bool(self.flush_interval) and not self.drain and not number % self.flush_interval
            self.offset = (self.offset + self.step) % node_size if node_size else 0

    def _member(self) -> None:
        """What each thread does."""
        node = self.node
        buffer = None if self.data else bytearray(self.size)
        while True:
            item = self._crew.take()
            if item is None:
                return
            offset, flush = item[0]
            if buffer is not None:
                node.pread_into(offset, buffer)
            else:
                node.pwrite(offset, self.data)
            if flush:
                node.flush()
