# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Root, a user of a node from outside of the graph (an export, a job, a command), and the gate that all their requests pass.

What QEMU calls a block backend; the counters are those of
https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html (BlockDeviceStats).
"""

from __future__ import annotations

from contextlib import contextmanager
from errno import ENOSPC
from threading import Condition, Lock, get_ident
from time import perf_counter_ns

from . import edges
from .errors import Denied, Error
from .hooks import ALL, CONSISTENT_READ, WRITE, WRITE_UNCHANGED, is_zero
from .node import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterator, Optional, Union

    from typing_extensions import Self

    from .extent import Extent
    from .graph import Graph
    from .node import Buffer

KINDS = ("rd", "wr", "flush", "unmap", "zero")  # of requests, as the counters name them


class Gate:
    """Requests pass it, and it can be closed: then those under way are waited for, and new ones wait.

    A thread may pass it again while it is inside. The thread that closed it passes it freely, and may close it again.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._inside: dict[int, int] = {}  # requests under way, by thread
        self._closer: Optional[int] = None
        self._times = 0

    @property
    def closing(self) -> bool:
        """Whether somebody waits for those inside, or has waited."""
        return self._closer is not None

    def enter(self) -> None:
        """Begin a request; waits while the gate is closed."""
        thread = get_ident()
        with self._changed:
            while self._closer is not None and self._closer != thread and thread not in self._inside:
                self._changed.wait()
            self._inside[thread] = self._inside.get(thread, 0) + 1

    def leave(self) -> None:
        """End a request."""
        thread = get_ident()
        with self._changed:
            left = self._inside[thread] - 1
            if left:
                self._inside[thread] = left
            else:
                del self._inside[thread]
                if self._closer is not None:
                    self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Wait until nobody is inside and keep others out. Not to be called from inside: raises RuntimeError."""
        thread = get_ident()
        with self._changed:
            if self._closer != thread:
                if thread in self._inside:
                    raise RuntimeError("the graph cannot be drained from within a request")
                while self._closer is not None:
                    self._changed.wait()
                self._closer = thread
                try:
                    while self._inside:
                        self._changed.wait()
                except BaseException:  # a signal ended the wait
                    self._closer = None
                    self._changed.notify_all()
                    raise
            self._times += 1
        try:
            yield
        finally:
            with self._changed:
                self._times -= 1
                if not self._times:
                    self._closer = None
                    self._changed.notify_all()


def gate(graph: Graph) -> Gate:
    """The gate of a graph."""
    with graph.lock:
        if graph.gate is None:
            graph.gate = Gate()
        found: Gate = graph.gate
    return found


class Counter:
    """Requests of one kind: how many were done and their bytes, how many failed, and how long they took."""

    __slots__ = ("bytes", "failed", "nanoseconds", "operations")

    def __init__(self) -> None:
        self.bytes = 0
        self.operations = 0
        self.failed = 0
        self.nanoseconds = 0

    def add(self, length: int, nanoseconds: int) -> None:
        """One more request was done."""
        self.operations += 1
        self.bytes += length
        self.nanoseconds += nanoseconds


class Root:
    """One user of a node. Requests through it never see the graph half changed; see Graph.drained.

    `description` is what messages about permissions call it ("an unnamed block device", "block device 'x'", "block job 'y'").
    """

    def __init__(
        self,
        graph: Graph,
        node: Union[Node, str],
        perm: int = CONSISTENT_READ,
        shared: int = ALL,
        description: str = "an unnamed block device",
        role: str = "root",
    ) -> None:
        """Raises Error where another user of the node objects, ReadOnly for one that cannot be written, Locked."""
        self.description = description
        self.graph = graph
        self.counters = {kind: Counter() for kind in KINDS}
        self.highest_write = 0  # the end of the write that reached farthest
        self._counting = Lock()
        self._gate = gate(graph)
        with graph.lock:
            self._edge = edges.use(self, role, graph.find(node) if isinstance(node, str) else node, perm, shared)

    # -- the node ------------------------------------------------------------------------------------------------

    @property
    def node(self) -> Node:
        """The node that is used now; see Graph.replace."""
        return self._edge.node

    @property
    def size(self) -> int:
        """Virtual size in bytes."""
        return self.node.size

    @property
    def permissions(self) -> tuple[int, int]:
        """What it does with the node, and what it lets others do."""
        return self._edge.perm, self._edge.shared

    def change_permissions(self, perm: int, shared: int) -> None:
        """Raises what the constructor raises; nothing is changed then."""
        with self.graph.lock:
            edges.change(self._edge, perm, shared)

    def use(self, node: Node) -> None:
        """Go over to another node, under `graph.drained()`. Raises what the constructor raises; nothing is changed then."""
        with self.graph.lock:
            old = self.node
            if node is not old:
                edges.move([self._edge], old, node)
                edges.release(old, (), Node.close)

    def attach(self, role: str, node: Node) -> None:
        """For edges.py: the node is another one now."""

    def close(self) -> None:
        """Give the node back; it is closed if nobody else uses or keeps it. A second call does nothing."""
        with self.graph.lock:
            if self._edge in self.node.parents:
                edges.release(self.node, [self._edge], Node.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_details: Any) -> None:
        self.close()

    # -- requests ------------------------------------------------------------------------------------------------

    @contextmanager
    def request(self) -> Iterator[Node]:
        """For a `with` in which the node is the same and is not drained: several calls as one request.

        Whatever waits for another request (a lock of a range, say) is to be waited for inside: who holds such a lock outside and
        then waits for the gate may be waited for by a request that is inside.
        """
        self._gate.enter()
        try:
            yield self._edge.node
        except (Error, OSError) as exc:
            self._tell_of("rd", exc)
            raise
        finally:
            self._gate.leave()

    def _do(self, kind: str, length: int, method: str, *args: Any) -> Any:
        """Call a method of the node inside the gate, and count it as `length` bytes of the kind `kind`."""
        start = perf_counter_ns()
        self._gate.enter()
        try:
            result = getattr(self._edge.node, method)(*args)
        except BaseException as exc:
            with self._counting:
                self.counters[kind].failed += 1
            self._tell_of(kind, exc)
            raise
        finally:
            self._gate.leave()
        self.count(kind, length, perf_counter_ns() - start)
        return result

    def count(self, kind: str, length: int, nanoseconds: int) -> None:
        """Count a request of the kind `kind` that was made of several calls inside `request`."""
        with self._counting:
            self.counters[kind].add(length, nanoseconds)

    def _tell_of(self, kind: str, exc: BaseException) -> None:
        """Report a request of a client that failed; see Hooks.report. Jobs have words of their own for it."""
        if self._edge.role == "root":
            node = self._edge.node
            reason = getattr(exc, "strerror", None) or str(exc)
            what = {"operation": "read" if kind == "rd" else "write", "action": "report", "nospace": getattr(exc, "errno", None) == ENOSPC}
            node.report("BLOCK_IO_ERROR", device="", qom_path="", node_name=node.name, reason=reason, **what)

    def _may_write(self, end: int) -> None:
        if not self._edge.perm & (WRITE | WRITE_UNCHANGED):
            raise Denied("%s does not write to node '%s'" % (self.description, self.node.name), filename=self.node.filename)
        self.highest_write = max(self.highest_write, end)

    def pread(self, offset: int, length: int) -> bytes:
        """See Node.pread."""
        data: bytes = self._do("rd", length, "pread", offset, length)
        return data

    def pread_into(self, offset: int, buffer: Union[bytearray, memoryview]) -> None:
        """See Node.pread_into."""
        self._do("rd", len(buffer), "pread_into", offset, buffer)

    def pwrite(self, offset: int, data: Buffer, fua: bool = False) -> None:
        """See Node.pwrite; with `fua` what was written is on stable storage afterwards."""
        mode = self.node.flags.detect_zeroes
        if mode and is_zero(memoryview(data).cast("B")):
            self.pwrite_zeroes(offset, len(data), mode == "unmap", fua)
            return
        self._may_write(offset + len(data))
        self._do("wr", len(data), "pwrite", offset, data)
        if fua:
            self.flush()

    def pwrite_zeroes(self, offset: int, length: int, unmap: bool = False, fua: bool = False) -> None:
        """See Node.pwrite_zeroes and pwrite."""
        self._may_write(offset + length)
        self._do("zero", length, "pwrite_zeroes", offset, length, unmap)
        if fua:
            self.flush()

    def pdiscard(self, offset: int, length: int) -> None:
        """See Node.pdiscard."""
        self._may_write(0)
        self._do("unmap", length, "pdiscard", offset, length)

    def flush(self) -> None:
        """See Node.flush."""
        self._do("flush", 0, "flush")

    def block_status(self, offset: int, length: int, want_zero: bool = True, limit: int = 0) -> list[Extent]:
        """See Node.block_status. The hosts may not be used once the graph may have changed; see `request`."""
        with self.request() as node:
            return node.block_status(offset, length, want_zero, limit)

    def resolve(self, offset: int, length: int, want_zero: bool = False, limit: int = 0, own: bool = False) -> list[Extent]:
        """See Node.resolve, and block_status for what holds of the hosts."""
        with self.request() as node:
            return node.resolve(offset, length, want_zero, limit, own)

    def truncate(self, size: int, preallocation: str = "off") -> None:
        """See Node.truncate."""
        with self.request() as node:
            node.truncate(size, preallocation)
