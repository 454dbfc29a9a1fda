# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""blockdev-mirror: another node becomes, and stays, a copy of one that is written, and may take its place; and block-commit of the
image that is written, which is a mirror into one of its own backing files
(https://www.qemu.org/docs/master/interop/live-block-operations.html#live-disk-synchronization-blockdev-mirror)."""

from __future__ import annotations

from time import monotonic

from ..copy.window import copy_ranges
from ..errors import Error, OptionError
from ..node import ALL
from ..options import opt
from . import chain
from .block import ON_ERROR, WINDOW, BlockJob, BlockJobOptions, begin
from .filters import MirrorTop
from .job import READY, STANDBY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Optional

    from ..node import Node
    from ..root import Root
    from .live import Live

MIN_GRANULARITY, MAX_GRANULARITY = 512, 64 << 20  # bytes
DEFAULT_GRANULARITY = 64 << 10
# What may still be dirty for the target to count as a copy, since a client that writes all the time is never caught up with: bytes, or what is
# copied in so many seconds. Clients wait for so long in the end.
NEARLY = 1 << 20
STILL = 0.2
IDLE = 0.2  # seconds at most between two looks at what is asked of a job that has nothing to copy
SPANS = 256  # dirty runs that are copied in one go


class MirrorOptions(BlockJobOptions):
    """Options of blockdev-mirror."""

    device: str = opt(help="the node that is copied")
    target: str = opt(help="the node that becomes the copy")
    replaces: Optional[str] = opt(None, help="the node whose place the target takes in the end, where that is not `device`")
    sync: str = opt(choices=("top", "full", "none", "incremental", "bitmap"), help="what is copied besides what is written from now on")
    granularity: int = opt(0, help="bytes that are copied at a time, at least: a power of two")
    buf_size: int = opt(0, help="taken and ignored: memory is bounded anyway")
    on_source_error: str = opt("report", choices=ON_ERROR, help="what to do about errors of reading")
    on_target_error: str = opt("report", choices=ON_ERROR, help="what to do about errors of writing")
    copy_mode: str = opt("background", choices=("background", "write-blocking"), help="whether a write waits for the target")


class MirrorJob(BlockJob):
    """One mirror."""

    kind: ClassVar[str] = "mirror"
    filter: Optional[MirrorTop]

    def __init__(self, live: Live, options: MirrorOptions, source: Node, target: Node, granularity: int) -> None:
        super().__init__(live, options, options.on_source_error, options.on_target_error)
        self.options = options
        self.source = source
        self.target = target
        self.granularity = granularity
        self.fresh = False  # the target is new, and reads as zeroes
        self._rate = 0.0  # bytes a second, of the last copy
        self.softly = False  # to end without giving the target to the users of the source
        self.replaced = live.node(options.replaces) if options.replaces is not None else None

    def begin(self) -> None:
        """Put it into the graph."""
        self.occupy(self.source, self.target)
        self.target_root = self.take_target()
        top = self.put_on_top(MirrorTop, self.source, self.options.filter_node_name)
        if isinstance(top, MirrorTop):
            self.filter = top
            top.job_kind = self.kind
            top.begin(self.target, self.granularity, self.options.copy_mode == "write-blocking")
        self.root = self.use(self.source)

    def take_target(self) -> Root:
        """Become the writer of the target."""
        return self.use_target(self.target)

    @property
    def top(self) -> MirrorTop:
        """The filter. Raises Error once it is gone."""
        if self.filter is None:
            raise Error("The job is over")
        return self.filter

    def survey(self) -> None:
        """Mark what is to be copied at first."""
        if self.source.size != self.target.size:
            raise Error("Source and target image have different sizes")
        if self.options.sync == "full" and self.fresh:
            self._mark_added(None)
        elif self.options.sync == "full":
            self.top.mark(0, self.source.size)
        elif self.options.sync == "top":
            self._mark_added(self.source.unfiltered().backing)

    def _mark_added(self, base: Optional[Node]) -> None:
        layer = self.source.unfiltered()
        base = base.unfiltered() if base is not None else None
        for offset in range(0, self.source.size, WINDOW * 16):
            with self.root.request():
                found = chain.added(layer, base, offset, min(WINDOW * 16, self.source.size - offset))
            for start, count in found:
                self.top.mark(start, count)
            self.pause_point()

    def work(self) -> None:
        """See Job.work."""
        self.survey()
        top = self.top
        position = 0
        first = top.remaining()
        while True:
            left = top.remaining()
            self.total = self.current + left
            if not left or self.current >= first and left <= max(NEARLY, self._rate * STILL):
                self.become_ready()
                if self.completing or self.softly:
                    break
            if left:
                position += self._copy_some(top, position)
            else:
                self._idle(top)
        with self.target_root.request() as node:
            node.flush()

    def _idle(self, top: MirrorTop) -> None:
        self.pause_point()
        top.news.wait(IDLE)
        top.news.clear()

    def _copy_some(self, top: MirrorTop, position: int) -> int:
        """Copy some of what is dirty; how far to go on with the search."""
        taken: list[tuple[int, int]] = []
        start = monotonic()

        def step() -> None:
            with self.root.request():
                run = top.peek(position % max(self.source.size, 1))
                room = self.window(self.granularity, self.source, *run) if run is not None else 0
                while room > 0 and len(taken) < SPANS:
                    found = top.take(position % max(self.source.size, 1) if not taken else sum(taken[-1]), room)
                    if found is None:
                        break
                    if taken and found[0] < sum(taken[-1]):  # from the beginning again
                        top.mark(*found)
                        break
                    taken.append(found)
                    room -= found[1]
                self.copy_locked(top, taken)

        try:
            action = self.attempt(step)
        except BaseException:
            for span in taken:
                top.mark(*span)
            raise
        if action:
            for span in taken:
                top.mark(*span)
            self.pause_point()
            return 0
        done = sum(length for _offset, length in taken)
        self._rate = done / max(monotonic() - start, 1e-6)
        self.current += done
        self.pace(done)
        return sum(taken[-1]) - position if taken else 0

    def copy_locked(self, top: MirrorTop, spans: list[tuple[int, int]]) -> None:
        """Copy ranges while nobody writes there, if writes go to both sides; otherwise who writes marks them again."""
        if not spans:
            return
        entry = top.lock(spans[0][0], sum(spans[-1]) - spans[0][0]) if top.blocking else None
        try:
            if top.blocking:
                for span in spans:  # what was written meanwhile is being copied now
                    top.clean(*span)
            if top.failed is not None:
                top.failed = None  # it is dirty, and what is wrong with the target shows now
            copy_ranges(self.source, self.target, spans)
        finally:
            if entry is not None:
                top.release(entry)

    def prepare(self) -> None:
        """Copy the rest, with nobody writing, and let the target take its place."""
        with self.graph.drained():
            top = self.top
            while True:
                found = top.take(0, WINDOW)
                if found is None:
                    break
                copy_ranges(self.source, self.target, [found])
                self.current += found[1]
            self.target.flush()
            self.total = self.current
            if self.softly and not self.completing:
                self.take_off()
            else:
                self.pivot()

    def pivot(self) -> None:
        """Give the users of the source the target. Under `drained`."""
        self.target_root.change_permissions(0, ALL)
        if self.replaced is not None and self.replaced is not self.source:
            self.graph.replace(self.replaced, self.target)
            self.take_off()
        else:
            self.take_off(self.target)

    def cancel_softly(self) -> bool:
        """See Job.cancel_softly."""
        self.softly = True
        self.changed.notify_all()
        self.top.news.set()
        return True

    def check_completion(self) -> None:
        """See Job.check_completion."""
        if self.filter is not None:
            self.filter.news.set()

    def change(self, copy_mode: str) -> None:
        """Go over to another copy mode, as far as there is a way."""
        with self.jobs.lock:
            self.allow("change")
            if copy_mode != "write-blocking":
                raise OptionError("Change to copy mode '%s' is not implemented" % copy_mode)
            with self.graph.drained():
                self.top.blocking = True
            self.options.copy_mode = copy_mode

    def block_json(self) -> dict[str, object]:
        """See BlockJob.block_json."""
        found = super().block_json()
        synced = self.filter is not None and self.filter.blocking and self.status in (READY, STANDBY) and not self.filter.remaining()
        return {**found, "actively-synced": synced} if self.kind == "mirror" else found


def mirror(live: Live, options: MirrorOptions, fresh: bool = False) -> MirrorJob:
    """Begin a mirror; a `fresh` target reads as zeroes. Raises Error."""
    with live.lock:
        source = live.root_node(options.device)
        target = live.node(options.target)
        if options.sync in ("incremental", "bitmap"):
            raise OptionError("Sync mode '%s' not supported" % options.sync)
        granularity = options.granularity
        if granularity and not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY:
            raise OptionError("Parameter 'granularity' expects a value in range [512B, 64MB]")
        if granularity & granularity - 1:
            raise OptionError("Parameter 'granularity' expects a power of 2")
        live.check_free(source)
        if options.buf_size < 0:
            raise OptionError("Invalid parameter 'buf-size'")
        if source is target:
            raise OptionError("Can't mirror node into itself")
        live.check_free(target)
        if options.replaces is not None and options.replaces not in live.graph.named:
            raise OptionError("Failed to find node with node-name='%s'" % options.replaces)
        if options.sync == "top" and source.unfiltered().backing is None:
            options.sync = "full"
        job = MirrorJob(live, options, source, target, granularity or default_granularity(target))
        job.fresh = fresh
        begin(live, job, job.begin)
        job.start()
        return job


def default_granularity(target: Node) -> int:
    """Bytes that are copied at a time where nobody says: a cluster of the target, within bounds."""
    return max(4096, min(target.cluster_size or DEFAULT_GRANULARITY, DEFAULT_GRANULARITY))
