# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Exports: nodes under the names by which NBD clients ask for them.

As in https://www.qemu.org/docs/master/interop/qemu-storage-daemon-qmp-ref.html (BlockExportOptionsNbd).
"""

from __future__ import annotations

from threading import Condition, RLock
from time import monotonic

from ..bitmaps import all_bitmaps
from ..errors import Error, OptionError, ReadOnly
from ..hooks import ALL, CONSISTENT_READ, RESIZE, WRITE
from ..protocols.nbd import codec as nbd
from ..root import Root
from .contexts import AllocationDepth, BaseAllocation, Context, DirtyBitmap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, Mapping, Optional, Sequence, Union

    from ..graph import Graph
    from ..node import Node
    from .connection import Connection

MAX_EXPORTS = 4096
PREFERRED_BLOCK = 4096  # bytes
HARD_SECONDS = 10  # that a disconnected client may take to end what it has under way, before its socket is shut


def export_root(graph: Graph, node: Union[Node, str], writable: bool = False, id: str = "") -> Root:
    """The user of `node` that an export is: others may write it, but not change its size.

    Raises ReadOnly for a node that cannot be written, and what Root raises.
    """
    found = graph.find(node) if isinstance(node, str) else node
    if writable and found.read_only:
        raise ReadOnly("Cannot export read-only node as writable", filename=found.filename)
    perm = CONSISTENT_READ | (WRITE if writable else 0)
    return Root(graph, found, perm, ALL & ~RESIZE, "block export '%s'" % id if id else "an unnamed block device")


class Export:
    """One node and the name under which it is served. Made by ExportSet.add; `root` belongs to it from then on."""

    def __init__(
        self, id: str, name: str, root: Root, writable: bool, description: str, contexts: Sequence[Context], writethrough: bool, multi_conn: bool
    ) -> None:
        self.id = id
        self.name = name
        self.root = root
        self.writable = writable
        self.description = description
        self.contexts = contexts  # their numbers are their places
        self.writethrough = writethrough
        self.multi_conn = multi_conn
        self.node_name = root.node.name
        self.ending = False
        self._connections: set[Connection] = set()
        self._changed = Condition()

    @property
    def size(self) -> int:
        """Bytes that clients see."""
        return self.root.size

    @property
    def bitmaps(self) -> list[str]:
        """The names of the dirty bitmaps that are served with it."""
        return [context.bitmap.name for context in self.contexts if isinstance(context, DirtyBitmap)]

    @property
    def allocation_depth(self) -> bool:
        return any(isinstance(context, AllocationDepth) for context in self.contexts)

    @property
    def clients(self) -> int:
        """How many connections use it."""
        return len(self._connections)

    @property
    def flags(self) -> int:
        """Transmission flags, but for those that depend on what a client negotiated."""
        flags = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_CACHE | (nbd.CAN_MULTI_CONN if self.multi_conn else 0)
        return flags | (nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.SEND_FAST_ZERO if self.writable else nbd.READ_ONLY)

    @property
    def block_sizes(self) -> tuple[int, int, int]:
        """The unit of requests, the size that suits best, and the largest payload."""
        return 1, PREFERRED_BLOCK, nbd.MAX_PAYLOAD

    def as_json(self) -> dict[str, Any]:
        """An element of query-block-exports."""
        return {"node-name": self.root.node.name, "shutting-down": self.ending, "type": "nbd", "id": self.id}

    def enter(self, connection: Connection) -> bool:
        """A client begins to use it; False if it is about to go."""
        with self._changed:
            if self.ending:
                return False
            self._connections.add(connection)
            return True

    def leave(self, connection: Connection) -> None:
        """A client has gone."""
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()

    def end(self, hard: bool) -> None:
        """Take no more clients; with `hard` those that are there are disconnected once their requests under way are done.
        Raises Error, and changes nothing, if there are any and not `hard`."""
        with self._changed:
            if self._connections and not hard:
                text = "export '%s' still in use" % self.id
                raise Error(text, hint="Use mode='hard' to force client disconnect")
            self.ending = True
            for connection in self._connections:
                connection.stop()
            until = monotonic() + HARD_SECONDS
            while self._connections:
                if not self._changed.wait(max(0.0, until - monotonic())):
                    for connection in self._connections:
                        connection.shut()
                    until = monotonic() + HARD_SECONDS


class ExportSet:
    """All exports of a process, by id and by name. `deleted` is called with each once it is gone. Any thread may use it."""

    def __init__(self, deleted: Optional[Callable[[Export], None]] = None) -> None:
        self.deleted = deleted
        self._lock = RLock()
        self._by_id: dict[str, Export] = {}
        self._by_name: dict[str, Export] = {}

    def add(
        self,
        id: str,
        name: str,
        root: Root,
        writable: bool = False,
        description: str = "",
        bitmaps: Sequence[Union[str, Mapping[str, str]]] = (),
        allocation_depth: bool = False,
        writethrough: bool = False,
        multi_conn: bool = True,
    ) -> Export:
        """Serve what `root` uses as `name`. The export closes `root` when it is removed; if this raises, the caller still has it.

        Raises Error in QEMU's words: an id or a name that is in use, a name that is too long, a bitmap that is not there.
        """
        with self._lock:
            if not id or id[0] not in _LETTERS or id.strip(_LETTERS + "0123456789-._"):
                raise OptionError("Invalid block export id")
            if id in self._by_id:
                raise Error("Block export id '%s' is already in use" % id)
            for what, text in (("export name", name), ("description", description)):
                if len(text.encode("utf-8", "surrogateescape")) > nbd.MAX_STRING:
                    raise Error("%s '%s' too long" % (what, text))
            if name in self._by_name:
                raise Error("NBD server already has export named '%s'" % name)
            if len(self._by_id) >= MAX_EXPORTS:
                raise Error("There are %d exports already" % MAX_EXPORTS)
            if writable and root.node.read_only:
                raise ReadOnly("Cannot export read-only node as writable", filename=root.node.filename)
            contexts: list[Context] = [BaseAllocation()]
            if allocation_depth:
                contexts.append(AllocationDepth())
            contexts += [_bitmap_context(root, bitmap, writable) for bitmap in bitmaps]
            if len(contexts) > nbd.MAX_CONTEXTS:
                raise Error("An export has at most %d metadata contexts" % nbd.MAX_CONTEXTS)
            export = Export(id, name, root, writable, description, contexts, writethrough, multi_conn)
            self._by_id[id] = self._by_name[name] = export
            return export

    def remove(self, id: str, mode: str = "safe") -> None:
        """End an export; see Export.end. Raises Error in QEMU's words."""
        export = self._by_id.get(id)
        if export is None:
            raise Error("Export '%s' is not found" % id)
        export.end(mode == "hard")
        self._forget(export)

    def _forget(self, export: Export) -> None:
        with self._lock:
            if self._by_id.get(export.id) is not export:
                return
            del self._by_id[export.id], self._by_name[export.name]
        try:
            if export.writable:
                export.root.flush()
        finally:
            export.root.close()
            if self.deleted is not None:
                self.deleted(export)

    def close(self) -> None:
        """Remove all, newest first. Raises the first failure, after all is done."""
        failure: Optional[Exception] = None
        for export in reversed(list(self)):
            try:
                export.end(True)
                self._forget(export)
            except (Error, OSError) as exc:
                failure = failure or exc
        if failure is not None:
            raise failure

    def by_name(self, name: str) -> Optional[Export]:
        """The export that a client asks for."""
        return self._by_name.get(name)

    def __getitem__(self, id: str) -> Export:
        return self._by_id[id]

    def __contains__(self, id: str) -> bool:
        return id in self._by_id

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _bitmap_context(root: Root, wanted: Union[str, Mapping[str, str]], writable: bool) -> DirtyBitmap:
    """The context of a bitmap of the node, of a node below it, or of the one that `wanted` names."""
    name = wanted if isinstance(wanted, str) else str(wanted.get("name"))
    if isinstance(wanted, str):
        layers: list[Node] = [layer for node in root.node.layers() for layer in (node, node.unfiltered())]
    else:
        layers = [root.graph.find(str(wanted.get("node")))]
    for node in layers:
        bitmap = next((bitmap for bitmap in all_bitmaps(node) if bitmap.name == name), None)
        if bitmap is not None:
            bitmap.check_usable()
            if bitmap.enabled and not writable and not node.read_only:
                raise Error("Enabled bitmap '%s' incompatible with readonly export" % name)
            return DirtyBitmap(bitmap)
    raise Error("Bitmap '%s' is not found" % name)
