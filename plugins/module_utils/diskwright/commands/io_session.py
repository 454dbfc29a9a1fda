# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The image that `io` has open, its requests in the foreground and in the background, and what is said of them."""

from __future__ import annotations

import errno
import os
from queue import SimpleQueue
from threading import Thread
from time import monotonic

from ..errors import Error, OptionError, Unsupported
from ..graph import Graph, parse_filename, with_driver
from ..node import OpenFlags, cache_flags
from ..options import nest, split_pairs
from .io_report import dump, report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional

    from ..node import Node
    from .ui import UI

SECTOR = 512
MAX_LENGTH = (1 << 31) - SECTOR  # bytes of one request
MAX_BACKGROUND = 256  # requests under way at once; one more waits for one of them


class Failure(Exception):
    """A command failed, and this is to be said of it on standard output."""


class Request:
    """One read or write: what, where, and what is to be said when it is done."""

    __slots__ = ("verb", "done", "offset", "length", "terse", "quiet", "work", "after", "hint")

    def __init__(
        self,
        verb: str,
        done: str,
        offset: int,
        length: int,
        flags: Mapping[str, Any],
        work: Callable[[], Any],
        after: Optional[Callable[[Any], tuple[str, bool]]] = None,
    ) -> None:
        """`done` is the verb in the past, `work` makes the request and `after` turns what it returns into (text, whether all is well)."""
        self.verb = verb
        self.done = done
        self.offset = offset
        self.length = length
        self.terse = "C" in flags
        self.quiet = "q" in flags
        self.work = work
        self.after = after
        self.hint = ""  # what is known beyond the errno, where a person wants to know it

    def run(self) -> tuple[str, bool]:
        """Make the request; (what is to be said, whether all is well)."""
        start = monotonic()
        try:
            found = self.work()
        except (Error, OSError) as exc:
            if isinstance(exc, Error) and str(exc).startswith(("blkverify: ", "quorum: ")):
                self.hint = str(exc)
            return "%s failed: %s\n" % (self.verb, reason(exc)), False
        seconds = monotonic() - start
        text, well = self.after(found) if self.after is not None else ("", True)
        if not self.quiet:
            text += report(self.done, self.offset, self.length, seconds, self.terse)
        return text, well


def reason(exc: BaseException) -> str:
    """The text of an exception's error number."""
    return os.strerror(getattr(exc, "errno", None) or errno.EIO)


def shown(data: memoryview, offset: int) -> tuple[str, bool]:
    """What -v says."""
    return dump(data, offset), True


class Session:
    """The image that is open, if any."""

    def __init__(self, ui: UI, objects: Mapping[str, Any]) -> None:
        self.ui = ui
        self.objects = objects
        self.node: Optional[Node] = None
        self.done = False  # `quit` was given
        self.spec: dict[str, Any] = {}
        self.cache = "writeback"
        self.snapshot = False
        self.copying = False
        self._background: set[Thread] = set()
        self._finished: SimpleQueue[tuple[Thread, str, str]] = SimpleQueue()

    # -- opening -------------------------------------------------------------------------------------------------

    def open_image(self, name: Optional[str], given: Mapping[str, Any], *, image_opts: bool = False, options: Optional[str] = None) -> bool:
        """Open an image as the options of the command line, or of `open`, say; False, and a message, where that fails."""
        self.spec = {}
        try:
            described = {spec["node-name"]: spec for spec in getattr(self.objects, "described", tuple)()}
            if image_opts and name in described:
                self.spec = dict(described[name])
            elif image_opts:
                self.spec = nest(dict(split_pairs(name or "", implied_key="file")))
            elif name is not None:
                self.spec = parse_filename(name)
            more = nest(dict(split_pairs(options))) if options else {}
            driver = more.pop("driver", None) if isinstance(more.get("driver"), str) and name is not None and not image_opts else given.get("format")
            if driver is not None:
                self.spec = with_driver(self.spec, driver)
            self.spec.update(more)
            self.cache = given.get("cache", "writeback")
            self.snapshot = "snapshot" in given
            self.copying = "copy_on_read" in given
            writable = "read_only" not in given
            if "force_share" in given and writable:
                raise OptionError("force-share=on can only be used with read-only images")
            if given.get("aio") == "native" and not self._cache()["direct"]:
                raise OptionError("aio=native was specified, but it requires cache.direct=on, which was not specified.")
            unmap = given.get("discard", "unmap") in ("unmap", "on")
            self.node = self._open(OpenFlags(writable=writable, resize=writable, unmap=unmap, force_share="force_share" in given, **self._cache()))
            return True
        except (Error, OSError) as exc:
            where = "can't open: " if name is None or image_opts else "can't open device %s: " % name
            self._complain(where, exc)
            return False

    def _cache(self) -> dict[str, bool]:
        return {"direct": False, **(cache_flags(self.cache) or {})}

    def _complain(self, where: str, exc: BaseException) -> None:
        if isinstance(exc, OSError):
            text = "Could not open '%s': %s" % (os.fsdecode(exc.filename), exc.strerror) if exc.filename is not None else str(exc.strerror)
        else:
            text = str(exc)
        self.ui.error(where + text)
        hint = getattr(exc, "hint", None)
        if hint:
            self.ui.hint(hint)

    def _open(self, flags: OpenFlags) -> Node:
        graph = Graph(None, self.objects, self.ui.caution)
        if self.snapshot:
            from ..temporary import overlay

            base = graph.open_spec(self.spec, flags.but(writable=False, resize=False))
            try:
                node = overlay(base, directory=self.ui.scratch)
            except BaseException:
                base.abandon()
                raise
            if not flags.writable:
                node.change_flags(node.flags.but(writable=False, resize=False))
            return node
        node = graph.open_spec(self.spec, flags)
        if flags.writable and node.read_only:
            node.close()
            raise OptionError("Block node is read-only")
        return node

    def reopen(self, writable: Optional[bool], cache: Optional[str], options: Mapping[str, Any]) -> None:
        """Go on with other flags or options. Raises Error; the image is open as before then."""
        self.drain()
        node = self.opened()
        flags = node.flags
        if cache is not None:
            flags = flags.but(**{"direct": False, "no_flush": False, "writethrough": False, **(cache_flags(cache) or {})})
        if writable is not None:
            flags = flags.but(writable=writable, resize=writable)
        if not options and flags.direct == node.flags.direct:
            node.flush()
            node.change_flags(flags)
            return
        old, before = self.spec, node.flags
        self._check_options(options)
        node.close()
        self.node = None
        try:
            self.spec = {**old, **nest(options)}
            self.node = self._open(flags)
        except BaseException:
            self.spec = old
            self.node = self._open(before)
            raise

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Raise OptionError for what cannot be changed of an image that is open."""
        node = self.opened()
        for key in options:
            if key not in node.options.fields or node.options.fields[key].kind == "NodeRef":
                raise OptionError("Cannot change the option '%s'" % key.rpartition(".")[2])

    def opened(self) -> Node:
        """The image. To be called only where one is open."""
        if self.node is None:
            raise OptionError("no file open")
        return self.node

    @property
    def limit(self) -> int:
        """The end of the image as requests see it: a multiple of a sector."""
        return -(-self.opened().size // SECTOR) * SECTOR

    def close(self) -> None:
        """Wait for requests in the background, and close the image."""
        node = self.node
        if node is None:
            return
        debugger = self.debugger()
        if debugger is not None:
            debugger.release_all()
        self.drain()
        self.node = None
        try:
            node.close()
        except Error as exc:
            self.ui.error(str(exc))
        except OSError as exc:
            self.ui.error(exc.strerror or str(exc))

    # -- requests ------------------------------------------------------------------------------------------------

    def check_range(self, offset: int, length: int) -> None:
        """Raise OSError as QEMU does for a request that is not inside the image."""
        if offset < 0 or offset + length > self.limit:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read(self, offset: int, length: int) -> memoryview:
        """Read from the image; what lies behind its end in the last sector is zero."""
        self.check_range(offset, length)
        node = self.opened()
        buffer = memoryview(bytearray(length))
        inside = max(0, min(length, node.size - offset))
        if inside:
            node = self._source(node)
            node.pread_into(offset, buffer[:inside])
        return buffer

    def _source(self, node: Node) -> Node:
        """The node to read from: with -C what is read is written too."""
        if self.copying and not node.read_only:
            from ..filters.copy_on_read import CopyOnRead, CopyOnReadOptions

            return CopyOnRead(CopyOnReadOptions(file=node, bottom=None), node.flags)
        return node

    def write(self, offset: int, data: bytes, fua: bool = False) -> None:
        """Write to the image."""
        self.check_range(offset, len(data))
        node = self.opened()
        if not node.growable:
            data = data[: max(0, node.size - offset)]
        node.pwrite(offset, data)
        if fua:
            node.flush()

    def write_zeroes(self, offset: int, length: int, unmap: bool, fast: bool = False, fua: bool = False) -> None:
        """Write zeroes; with `fast` only if that is cheap."""
        self.check_range(offset, length)
        node = self.opened()
        if not node.growable:
            length = max(0, min(length, node.size - offset))
        node.pwrite_zeroes(offset, length, unmap and node.flags.unmap, not fast)
        if fua:
            node.flush()

    def write_compressed(self, offset: int, data: bytes) -> None:
        """Write whole clusters, compressed."""
        self.check_range(offset, len(data))
        node = self.opened()
        unit = node.allocation_unit or SECTOR
        if not node.supports_compression:
            raise Unsupported(os.strerror(errno.ENOTSUP), errno=errno.ENOTSUP)
        if offset % unit or len(data) % unit and offset + len(data) != node.size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        for at in range(0, len(data), unit):
            node.write_compressed(offset + at, data[at : at + unit])

    def read_state(self, offset: int, length: int) -> memoryview:
        """Read from the VM state."""
        buffer = memoryview(bytearray(length))
        self.opened().unfiltered().read_state(offset, buffer)
        return buffer

    def write_state(self, offset: int, data: bytes) -> None:
        """Write to the VM state."""
        self.opened().unfiltered().write_state(offset, memoryview(data))

    def discard(self, offset: int, length: int) -> None:
        """Discard, where the image was opened for that."""
        self.check_range(offset, length)
        node = self.opened()
        if node.flags.unmap and not node.read_only:
            node.pdiscard(offset, max(0, min(length, node.size - offset)))

    # -- in the background ---------------------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        """Make a request in the background; `settle` says what became of it."""
        while len(self._background) >= MAX_BACKGROUND:
            self._take(*self._finished.get())

        def work() -> None:
            text = "%s failed: %s\n" % (request.verb, os.strerror(errno.EIO))
            try:
                text = request.run()[0]
            finally:
                self._finished.put((worker, text, request.hint))

        worker = Thread(target=work, name=request.verb, daemon=True)
        self._background.add(worker)
        worker.start()

    def _take(self, worker: Thread, text: str, hint: str) -> None:
        worker.join()
        self._background.discard(worker)
        self.ui.write(text)
        if hint:
            self.ui.hint(hint)

    def settle(self) -> None:
        """Say what became of the requests that have finished."""
        while not self._finished.empty():
            self._take(*self._finished.get())

    def drain(self) -> None:
        """Wait for all requests in the background."""
        while self._background:
            self._take(*self._finished.get())

    @property
    def busy(self) -> int:
        """How many requests are in the background and have not finished."""
        return len(self._background) - self._finished.qsize()

    def debugger(self) -> Optional[Any]:
        """The blkdebug node below the image, which keeps the breakpoints; None where there is none."""
        node = self.node
        while node is not None:
            if hasattr(node, "breakpoint"):
                return node
            node = node.children.get(node.primary)
        return None
