# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""block-commit: what some images of a chain hold goes into one below them, which takes their place
(https://www.qemu.org/docs/master/interop/live-block-operations.html#live-block-commit-block-commit)."""

from __future__ import annotations

from ..copy.window import copy_ranges
from ..errors import Error, OptionError
from ..node import CONSISTENT_READ
from ..options import opt
from . import chain
from .block import ON_ERROR, BlockJob, BlockJobOptions, begin
from .events import NotFound
from .filters import CommitTop
from .mirror import DEFAULT_GRANULARITY, MirrorJob, MirrorOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ..node import Node
    from ..root import Root
    from .live import Live


class CommitOptions(BlockJobOptions):
    """Options of block-commit."""

    device: str = opt(help="the node that is written: the top of the chain")
    base_node: Optional[str] = opt(None, help="name of the node into which all goes; the lowest one where none is named")
    base: Optional[str] = opt(None, help="its file name")
    top_node: Optional[str] = opt(None, help="name of the highest node that is committed; `device` where none is named")
    top: Optional[str] = opt(None, help="its file name")
    backing_file: Optional[str] = opt(None, help="how the image above `top` is to name the base")
    on_error: str = opt("report", choices=ON_ERROR, help="what to do about errors")


class CommitJob(BlockJob):
    """Commit of nodes that nobody writes."""

    kind = "commit"

    def __init__(self, live: Live, options: CommitOptions, overlay: Node, top: Node, base: Node) -> None:
        super().__init__(live, options, options.on_error, options.on_error)
        self.options = options
        self.overlay = overlay
        self.top = top
        self.base = base
        self.total = top.size

    def begin(self) -> None:
        """Put it into the graph."""
        self.occupy(*[layer for layer in chain.layers(self.top) if layer is not self.base], self.base, self.overlay)
        self.base_user = self.base_root(self.base, self.top.size)
        if self.options.filter_node_name is not None:
            self.put_on_top(CommitTop, self.top, self.options.filter_node_name)
        self.root = self.use(self.top, CONSISTENT_READ)

    def work(self) -> None:
        """See Job.work."""
        unit = max(self.base.allocation_unit, 512)
        while self.current < self.total:
            length = min(self.window(unit), self.total - self.current)
            action = self.attempt(lambda length=length: self._copy(self.current, length))  # type: ignore[misc]
            if action == "stop":
                self.pause_point()
                continue
            self.current += length
            self.pace(self.copied)
        with self.base_user.request() as node:
            node.flush()

    def _copy(self, offset: int, length: int) -> None:
        self.copied = 0
        with self.root.request():
            ranges = chain.added(self.top, self.base, offset, length)
            copy_ranges(self.top, self.base, ranges)
            self.copied = sum(count for _start, count in ranges)

    def prepare(self) -> None:
        """Let the base take the place of what is above it."""
        with self.graph.drained():
            self.take_off()
            name, format = chain.name_for_header(self.base)
            chain.change_header(self.overlay, self.options.backing_file or name, format)
            self.base_user.change_permissions(0, 15)
            self.graph.set_child(self.overlay, "backing", self.base)


class ActiveCommitJob(MirrorJob):
    """Commit of the node that is written, by mirroring it into the base."""

    kind = "commit"

    def take_target(self) -> Root:
        """See MirrorJob.take_target."""
        found = self.base_root(self.target, self.source.size)
        self.occupy(*chain.layers(self.source))
        return found

    def survey(self) -> None:
        """Mark what the base does not have."""
        self._mark_added(self.target)


def commit(live: Live, options: CommitOptions) -> BlockJob:
    """Begin a commit: of what nobody writes, or with the top of the chain one that gets ready and has to be completed. Raises Error."""
    with live.lock:
        if options.device not in live.graph.named:
            raise NotFound("Device '%s' not found" % options.device)
        device = live.root_node(options.device)
        for one, other in (("base_node", "base"), ("top_node", "top")):
            if getattr(options, one) is not None and getattr(options, other) is not None:
                raise OptionError("'%s' and '%s' are mutually exclusive" % (one.replace("_", "-"), other))
        active = device.unfiltered()
        live.check_free(device)
        top = _layer(live, device, options.top_node, options.top, "Top image file %s not found") or active
        base = _layer(live, top, options.base_node, options.base, "Can't find '%s' in the backing chain") or list(chain.layers(top))[-1]
        if base is top:
            raise OptionError("cannot commit an image into itself")
        for layer in chain.layers(top):
            live.check_free(layer, below=True)
            if layer is base:
                break
        if top is active:
            if options.backing_file is not None:
                raise OptionError("'backing-file' specified, but 'top' is the active layer")
            job: BlockJob = _active(live, options, device, base)
        else:
            overlay = chain.overlay_of(device, top)
            job = CommitJob(live, options, overlay, top, base)
            begin(live, job, job.begin)
        job.start()
        return job


def _layer(live: Live, top: Node, name: Optional[str], filename: Optional[str], refusal: str) -> Optional[Node]:
    """The layer of a chain that a node-name or a file name means; None where neither is given. Raises Error: `refusal` for the latter."""
    if name is not None:
        found = live.node(name).unfiltered()
        if found not in list(chain.layers(top)):
            raise Error("'%s' is not in this backing file chain" % name)
        return found
    if filename is None:
        return None
    if filename == top.unfiltered().filename:
        return top.unfiltered()
    named = chain.named_in_chain(top, filename)
    if named is None:
        raise Error(refusal % filename)
    return named


def _active(live: Live, options: CommitOptions, device: Node, base: Node) -> ActiveCommitJob:
    values = {name: getattr(options, name) for name in ("job_id", "speed", "filter_node_name", "auto_finalize", "auto_dismiss", "device")}
    as_mirror = MirrorOptions(**values, target=base.name, sync="top", on_source_error=options.on_error, on_target_error=options.on_error)
    granularity = max(4096, min(base.cluster_size or DEFAULT_GRANULARITY, DEFAULT_GRANULARITY))
    job = ActiveCommitJob(live, as_mirror, device, base, granularity)
    begin(live, job, job.begin)
    return job
