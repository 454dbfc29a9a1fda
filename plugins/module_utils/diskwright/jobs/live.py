# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Live, a graph with what happens to it: jobs, events, exports (https://www.qemu.org/docs/master/interop/live-block-operations.html).

The operations are in the modules beside this one; each takes a Live. All of them, and whatever changes the state of a job, happen under one
lock, `Live.lock`, which no request of a client ever waits for.
"""

from __future__ import annotations

import errno

from ..errors import Error, OptionError
from ..node import Node
from .events import Events
from .job import Jobs
from .recording import Found, Recording, find, recording

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Optional

    from ..graph import Graph
    from .job import Job


class Live:
    """`on_quit` is called, from whatever thread, when somebody asks for the end; see exports.py for `exports` and `serve`."""

    def __init__(self, graph: Graph, exports: Any = None, on_quit: Optional[Callable[[], None]] = None) -> None:
        self.graph = graph
        self.events = Events()
        self.jobs = Jobs(self.events)
        self.lock = self.jobs.lock
        self.on_quit = on_quit
        graph.notify = lambda name, data: self.events.emit(name, **data)
        self.exports = exports
        self.server: Any = None  # the NBD server that nbd-server-start made
        self._users: dict[str, list[tuple[str, bool]]] = {}  # node-name -> kinds of the jobs at work, and whether they share it
        self._busy: dict[int, int] = {}  # id() of a bitmap -> how many use it

    # -- nodes ---------------------------------------------------------------------------------------------------

    def node(self, name: str) -> Node:
        """The node of that name. Raises OptionError."""
        return self.graph.find(name)

    def node_of(self, device: Optional[str], name: Optional[str]) -> Node:
        """The node that one of the two names, as commands have it that take both. Raises OptionError."""
        wanted = name if name is not None else device or ""
        if wanted not in self.graph.named:
            raise OptionError("Cannot find device='%s' nor node-name='%s'" % (device or "", name or ""))
        return self.graph.named[wanted]

    def root_node(self, name: str) -> Node:
        """The node of that name, which no other node uses. Raises OptionError."""
        node = self.node(name)
        if any(isinstance(edge.user, Node) for edge in node.parents):
            raise OptionError("Need a root block node")
        return node

    def check_free(self, node: Node, below: bool = False, shared: bool = False) -> None:
        """Raise Error if something is under way with a node, or an overlay needs it as it is; with `below` that does not matter, with `shared`
        nothing that shares it does."""
        reason: Optional[str] = None
        for kind, shares in self._users.get(node.name, ()):
            if not (shared and shares):
                reason = "block device is in use by block job: " + kind
        if reason is None and not below:
            for edge in node.parents:
                if edge.role == "backing" and isinstance(edge.user, Node):
                    reason = "node is used as backing hd of '%s'" % edge.user.name
        if reason is not None:
            raise Error("Node '%s' is busy: %s" % (node.name, reason), errno=errno.EBUSY)

    def occupy(self, job: Job, nodes: Iterable[Node], shared: bool = False) -> list[tuple[str, tuple[str, bool]]]:
        """Let nobody else do anything with these nodes (but for what does not mind, if `shared`) until `vacate` is given the result."""
        taken = [(node.name, (job.kind, shared)) for node in nodes]
        for name, user in taken:
            self._users.setdefault(name, []).append(user)
        return taken

    def vacate(self, taken: list[tuple[str, tuple[str, bool]]]) -> None:
        """End what `occupy` began."""
        for name, user in taken:
            self._users[name].remove(user)
            if not self._users[name]:
                del self._users[name]
        taken.clear()

    # -- bitmaps -------------------------------------------------------------------------------------------------

    def record(self, node: Node) -> Recording:
        """What is recorded of a node; begins to record. To be called under `drained`, or before anybody writes."""
        found = recording(node)
        if found is None:
            found = Recording(node, self._crossed)
            node.recorder = found
        return found

    def _crossed(self, node: Node, beyond: int, threshold: int) -> None:
        self.events.emit("BLOCK_WRITE_THRESHOLD", node_name=node.name, amount_exceeded=beyond, write_threshold=threshold)

    def bitmap(self, node: Node, name: str, idle: bool = True) -> Found:
        """A bitmap of a node. Raises Error where there is none; with `idle`, also if it is in use or inconsistent."""
        found = find(node, name)
        if idle and id(found.bitmap) in self._busy:
            raise Error("Bitmap '%s' is currently in use by another operation and cannot be used" % name, errno=errno.EBUSY)
        if idle:
            found.bitmap.check_usable()
        return found

    def is_busy(self, found: Found) -> bool:
        """Whether something uses it that others must not disturb."""
        return id(found.bitmap) in self._busy

    def take(self, found: Found) -> None:
        """Keep others from using a bitmap."""
        self._busy[id(found.bitmap)] = self._busy.get(id(found.bitmap), 0) + 1

    def give_back(self, found: Found) -> None:
        """End what `take` began."""
        left = self._busy.pop(id(found.bitmap), 1) - 1
        if left:
            self._busy[id(found.bitmap)] = left

    def resized(self) -> None:
        """Nodes may have other sizes now."""
        for node in list(self.graph.named.values()):
            recorded = recording(node)
            if recorded is not None and recorded.bitmaps.size != node.size:
                with recorded.lock:
                    recorded.bitmaps.resize(node.size)

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all jobs, then the exports; the graph is the caller's to close."""
        self.jobs.stop()
        if self.server is not None:
            self.server.stop()
            self.server = None
        if self.exports is not None:
            self.exports.close()
