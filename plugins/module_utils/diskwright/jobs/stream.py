# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""block-stream: an image gets what it reads from its backing files, and does without them
(https://www.qemu.org/docs/master/interop/live-block-operations.html#live-block-streaming-block-stream)."""

from __future__ import annotations

from ..copy.window import copy_ranges
from ..errors import Error, OptionError
from ..node import ALL, CONSISTENT_READ, WRITE_UNCHANGED
from ..options import opt
from . import chain
from .block import ON_ERROR, BlockJob, BlockJobOptions, begin
from .filters import StreamTop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ..node import Node
    from .live import Live


class StreamOptions(BlockJobOptions):
    """Options of block-stream."""

    device: str = opt(help="the node that is to get the content")
    base: Optional[str] = opt(None, help="file name of the backing file that stays")
    base_node: Optional[str] = opt(None, help="name of the backing node that stays")
    bottom: Optional[str] = opt(None, help="name of the last node whose content is taken")
    backing_file: Optional[str] = opt(None, help="how the image is to name what stays")
    backing_mask_protocol: bool = opt(False, help="whether the format of a protocol is written down as raw")
    on_error: str = opt("report", choices=ON_ERROR, help="what to do about errors")


class StreamJob(BlockJob):
    """One stream."""

    kind = "stream"

    def __init__(self, live: Live, options: StreamOptions, node: Node, base: Optional[Node]) -> None:
        super().__init__(live, options, options.on_error, options.on_error)
        self.node = node
        self.base = base
        self.options = options
        self.total = node.size

    def begin(self) -> None:
        """Put it into the graph."""
        self.occupy(*self._between())
        top = self.put_on_top(StreamTop, self.node, self.options.filter_node_name)
        top.unit = max(self.node.allocation_unit, 512)
        self.root = self.use(self.node, CONSISTENT_READ | WRITE_UNCHANGED, ALL)
        if self.node.backing is None:
            self.total = 0

    def _between(self) -> list[Node]:
        found = []
        for layer in chain.layers(self.node):
            if layer is self.base:
                break
            found.append(layer)
        return found

    def work(self) -> None:
        """See Job.work."""
        unit = self.filter.unit if self.filter is not None else 1
        while self.current < self.total:
            length = min(self.window(unit), self.total - self.current)
            action = self.attempt(lambda length=length: self._copy(self.current, length))  # type: ignore[misc]
            if action == "stop":
                self.pause_point()
                continue
            self.current += length
            self.pace(self.copied)
        with self.root.request() as node:
            node.flush()

    def _copy(self, offset: int, length: int) -> None:
        self.copied = 0
        top = self.filter
        with self.root.request():
            entry = top.lock(offset, length) if top is not None else None
            try:
                ranges = chain.missing(self.node, self.base, offset, length)
                copy_ranges(self.node, self.node, ranges)
                self.copied = sum(count for _start, count in ranges)
            finally:
                if top is not None:
                    top.release(entry)

    def prepare(self) -> None:
        """Let the image do without what was copied."""
        with self.graph.drained():
            self.take_off()
            if self.node.backing is None:
                return
            name, format = chain.name_for_header(self.base) if self.base is not None else (None, None)
            if self.options.backing_file is not None:
                name = self.options.backing_file
            if self.base is not None and self.base.leaf and self.options.backing_mask_protocol:
                format = "raw"
            chain.change_header(self.node, name, format)
            self.graph.set_child(self.node, "backing", self.base)


def stream(live: Live, options: StreamOptions) -> StreamJob:
    """Begin a stream. Raises Error."""
    with live.lock:
        node = live.node(options.device).unfiltered()
        given = [key for key in ("base", "base_node", "bottom") if getattr(options, key) is not None]
        if len(given) > 1:
            raise OptionError("'%s' and '%s' cannot be specified at the same time" % (given[0].replace("_", "-"), given[1].replace("_", "-")))
        base = _base(live, options, node)
        if base is None and options.backing_file is not None:
            raise OptionError("backing file specified, but streaming the entire chain")
        live.check_free(node, below=True)
        job = StreamJob(live, options, node, base)
        begin(live, job, job.begin)
        job.start()
        return job


def _base(live: Live, options: StreamOptions, node: Node) -> Optional[Node]:
    if options.base is not None:
        found = chain.named_in_chain(node, options.base)
        if found is None:
            raise OptionError("Can't find '%s' in the backing chain" % options.base)
        return found
    name = options.base_node if options.base_node is not None else options.bottom
    if name is None:
        return None
    base = live.node(name).unfiltered()
    if base not in list(chain.layers(node))[1:]:
        words = "Node '%s' is not a backing image of '%s'" if options.bottom is None else "Node '%s' is not in a chain starting from '%s'"
        raise Error(words % (name, options.device))
    if options.bottom is not None:
        return base.backing.unfiltered() if base.backing is not None else None
    return base
