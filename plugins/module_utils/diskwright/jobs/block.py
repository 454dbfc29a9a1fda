# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""BlockJob, a job that moves data of nodes that are in use: speed, errors, progress in bytes, and the filter on top
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, BlockJobInfo and BlockdevOnError)."""

from __future__ import annotations

import errno
import os
from time import monotonic

from ..copy.window import zeroes
from ..errors import Error, OptionError
from ..node import ALL, CONSISTENT_READ, RESIZE, WRITE, OpenFlags
from ..options import Options, opt
from ..root import Root
from .filters import JobFilter
from .job import CONCLUDED, PAUSED, READY, STANDBY, Cancelled, Job

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional, Union

    from ..node import Node
    from .live import Live

WINDOW = 4 << 20  # bytes that are copied between two pauses, at most
ZEROES = 64 << 20  # the same of what is known to be zeroes
SLICES = 8  # of a second: with a speed limit a window is no more than what is due in one of them
RETRY = 0.1  # seconds before what failed is tried again
ON_ERROR = ("report", "ignore", "enospc", "stop", "auto")


class BlockJobOptions(Options):
    """What all block jobs can be told."""

    job_id: Optional[str] = opt(None, help="its name; the device's where none is given, if that has one")
    speed: int = opt(0, help="bytes a second, at most; 0: as fast as it goes")
    filter_node_name: Optional[str] = opt(None, help="name of the node that the job puts on top of the one that it works on")
    auto_finalize: bool = opt(True, help="whether it does its last without being told to")
    auto_dismiss: bool = opt(True, help="whether it is forgotten once it is concluded")


class BlockJob(Job):
    """A job on nodes. A subclass asks for `pause_point`, `pace` and `attempt` around each window."""

    block = True

    def __init__(self, live: Live, options: BlockJobOptions, on_source_error: str = "report", on_target_error: str = "report") -> None:
        """Raises OptionError for what cannot be."""
        super().__init__(live.jobs, options.job_id or "", options.auto_finalize, options.auto_dismiss)
        self.live = live
        self.graph = live.graph
        self.speed = options.speed
        self.total = 0
        self.on_error = {"read": on_source_error, "write": on_target_error}
        self.io_status = "ok"
        self.ready = False
        self.filter: Optional[JobFilter] = None
        self._due = 0.0  # when the next window may begin
        self._roots: list[Root] = []
        self._occupied: list[tuple[str, tuple[str, bool]]] = []
        if options.speed < 0:
            raise OptionError("Parameter 'speed' expects a non-negative value")

    # -- nodes ---------------------------------------------------------------------------------------------------

    def occupy(self, *nodes: Node, shared: bool = False) -> None:
        """Nobody else does anything with these nodes while the job lives; see Live.occupy."""
        self._occupied += self.live.occupy(self, nodes, shared)

    def use(self, node: Node, perm: int = CONSISTENT_READ, shared: int = ALL, role: str = "main node") -> Root:
        """Become a user of a node until the job is over."""
        root = Root(self.graph, node, perm, shared, "block job '%s'" % self.id, role)
        self._roots.append(root)
        return root

    def put_on_top(self, cls: type[JobFilter], node: Node, name: Optional[str]) -> JobFilter:
        """Put a filter on top of a node: all its users use the filter. Under `drained`."""
        made = cls(cls.options_class(file=node), OpenFlags(writable=not node.read_only, perm=0, shared=ALL))
        self.graph.adopt(made, name)
        show_as_child(made)
        try:
            self.graph.replace(node, made)
            self.use(made)
        except BaseException:
            made.close()
            raise
        self.filter = made
        return made

    def take_off(self, node: Optional[Node] = None) -> None:
        """Remove the filter: its users use what is below it, or `node`. Under `drained`."""
        made, self.filter = self.filter, None
        if made is not None:
            self.graph.replace(made, node or made.file)

    def clean(self) -> None:
        """See Job.clean."""
        with self.graph.drained():
            self.take_off()
        for root in self._roots:
            root.close()
        self._roots.clear()
        self.live.vacate(self._occupied)

    def share_backing(self, node: Node) -> None:
        """Let the overlays of a node tolerate that it is written."""
        from .. import edges

        for edge in list(node.parents):
            if edge.role == "backing":
                edges.change(edge, edge.perm, ALL)

    def use_target(self, target: Node) -> Root:
        """Become a writer of a node."""
        return self.use(target, CONSISTENT_READ | WRITE, ALL, "target")

    def base_root(self, base: Node, size: int) -> Root:
        """Become the writer of a backing node, which may have been opened for reading only, and make it as long as `size` bytes."""
        self.share_backing(base)
        if base.read_only:
            base.change_flags(base.flags.but(writable=True))
        if base.size < size:
            with Root(self.graph, base, CONSISTENT_READ | WRITE | RESIZE, ALL, "block job '%s'" % self.id) as root:
                root.truncate(size)
        return self.use_target(base)

    # -- windows -------------------------------------------------------------------------------------------------

    def window(self, unit: int, source: Optional[Node] = None, offset: int = 0, length: int = 0) -> int:
        """How many bytes to do now, a multiple of `unit`: more where `source` has zeroes at `offset`, in `length` bytes."""
        most = min(WINDOW, self.speed // SLICES) if self.speed else WINDOW
        if source is not None and length > WINDOW and not self.speed:
            most = max(most, zeroes(source, offset, min(length, ZEROES)))
        return max(most // unit, 1) * unit

    def pace(self, length: int) -> None:
        """So many bytes were done: wait until more may be, and come to a pause point."""
        self.pause_point()
        if not self.speed or not length:
            return
        self._due = max(self._due, monotonic()) + length / self.speed
        while True:
            left = self._due - monotonic()
            if left <= 0 or not self.speed:
                return
            self.sleep(left)
            self.pause_point()

    def attempt(self, step: Callable[[], Any]) -> str:
        """Do a step: "" if it is done, else what to do about its failure: "ignore" it, or "stop", which is to try it again once the job goes on.

        Raises Error where the failure is the job's.
        """
        try:
            step()
        except Cancelled:
            raise
        except (Error, OSError) as exc:
            reading = isinstance(exc, Error) and str(exc).startswith("error while reading")
            return self.decide(exc, "read" if reading else "write")
        return ""

    def decide(self, exc: Union[Error, OSError], operation: str) -> str:
        """What to do about a failed operation; see `attempt`."""
        number = exc.errno or errno.EIO
        policy = self.on_error[operation]
        if policy == "enospc":
            policy = "stop" if number == errno.ENOSPC else "report"
        action = "report" if policy == "auto" else policy
        self.jobs.events.emit("BLOCK_JOB_ERROR", device=self.id, operation=operation, action=action)
        if action == "report":
            raise Error(os.strerror(number), errno=number, hint=str(exc))
        if action == "stop":
            with self.jobs.lock:
                self.paused_by_user = True
                self.io_status = "nospace" if number == errno.ENOSPC else "failed"
        else:
            self.sleep(RETRY)
        return action

    # -- what is told --------------------------------------------------------------------------------------------

    def resumed(self) -> None:
        """See Job.resumed."""
        self.io_status = "ok"

    def set_speed(self, speed: int) -> None:
        """Go no faster than so many bytes a second from now on; 0: as fast as it goes."""
        with self.jobs.lock:
            self.allow("set-speed")
            if speed < 0:
                raise OptionError("Parameter 'speed' expects a non-negative value")
            self.speed = speed
            self._due = 0.0
            self.changed.notify_all()

    def become_ready(self) -> None:
        """All is copied, and will stay so until `complete`."""
        with self.jobs.lock:
            if not self.ready:
                self.ready = True
                self.set_status(READY)
                self.tell("BLOCK_JOB_READY")

    def tell(self, name: str, **more: Any) -> None:
        """Emit an event about the job."""
        self.jobs.events.emit(name, device=self.id, len=self.total, offset=self.current, speed=self.speed, type=self.kind, **more)

    def announce_pending(self) -> None:
        """See Job.announce_pending."""
        if not self.auto_finalize:
            self.jobs.events.emit("BLOCK_JOB_PENDING", type=self.kind, id=self.id)

    def announce(self) -> None:
        """See Job.announce."""
        if isinstance(self.failure, Cancelled):
            self.tell("BLOCK_JOB_CANCELLED")
        elif self.failure is not None:
            self.tell("BLOCK_JOB_COMPLETED", error=self.error)
        else:
            self.tell("BLOCK_JOB_COMPLETED")

    def block_json(self) -> dict[str, Any]:
        """Its element of query-block-jobs."""
        found = {
            "type": self.kind,
            "device": self.id,
            "len": self.total,
            "offset": self.current,
            "speed": self.speed,
            "io-status": self.io_status,
            "status": self.status,
            "ready": self.ready and self.status in (READY, STANDBY),
            "paused": self.wants_pause or self.status in (PAUSED, STANDBY),
            "busy": False,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
        }
        error = self.error
        if error is not None and self.status == CONCLUDED:
            found["error"] = error
        return found


def show_as_child(made: Node) -> None:
    """Let a filter that a job made go by the name of what it is on top of: nobody can open it again."""
    made.filename = made.children["file"].filename
    made.full_options = made.children["file"].full_options


def begin(live: Live, job: BlockJob, prepare: Callable[[], None]) -> None:
    """Make a new job known, do `prepare` under `drained`, which puts it into the graph, and let it run. What fails leaves nothing behind."""
    with live.lock:
        live.jobs.check_id(job.id)
        try:
            with live.graph.drained():
                prepare()
            live.jobs.add(job)
        except BaseException:
            job.discard_made()
            raise
