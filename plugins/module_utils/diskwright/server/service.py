# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Serve, a graph with its exports and servers, from the first node to the last flush: what `diskwright serve` runs.

As in https://www.qemu.org/docs/master/tools/qemu-storage-daemon.html.
"""

from __future__ import annotations

import os
import signal
from threading import Thread
from typing import Any, Callable, Mapping, Optional, Sequence
from urllib.parse import quote

from .. import graph_file
from ..description import read_shape
from ..errors import Error, OptionError
from ..graph import Graph
from .daemon import Signals
from .exports import Export, ExportSet, export_root
from .server import HANDSHAKE_SECONDS, MAX_CONNECTIONS, NbdServer
from .systemd import notify


class Serve:
    """Everything that one serving process has. `close` ends it in good order.

    said     told of clients that went in an unusual way
    persist  False: it ends when the last client has gone
    """

    def __init__(
        self,
        graph: Graph,
        *,
        environment: Optional[Mapping[str, str]] = None,
        said: Optional[Callable[[str], None]] = None,
        persist: bool = True,
    ) -> None:
        self.graph = graph
        self.exports = ExportSet()
        self.servers: list[NbdServer] = []
        self.environment = environment or {}
        self.said = said
        self.persist = persist
        self.on_start: list[Callable[[], None]] = []  # called when clients are let in
        self.before_close: list[Callable[[], None]] = []  # called first of all when it ends (QMP: its jobs)
        self._closed = False
        self._failure: Optional[BaseException] = None

    # -- what is there -------------------------------------------------------------------------------------------

    def take_file(self, path: str) -> None:
        """Open the nodes of a graph file, export what it exports, and listen where it says. Raises Error."""
        description = graph_file.load(path)
        description.check()
        for id, found in description.objects.items():
            if id in self.graph.objects:
                raise OptionError("attempt to add duplicate property '%s' to object (type 'container')" % id)
            self.graph.objects[id] = found
        for one in description.in_order():
            self.graph.add(one)
        for export in description.exports:
            self.export(export)
        if description.nbd_server is not None:
            self.server(description.nbd_server)

    def export(self, values: Mapping[str, Any], typed: bool = True) -> Export:
        """Export a node as `values` say: graph_file.EXPORT. Raises Error in QEMU's words."""
        rest = dict(values)
        if "bitmap" in rest:
            rest["bitmaps"] = [rest.pop("bitmap")]
        options: dict[str, Any] = {}
        read_shape(graph_file.EXPORT, rest, options, typed)
        id, node, writable = options["id"], options["node-name"], options.get("writable", False)
        if node not in self.graph.named:
            raise OptionError("Cannot find device='' nor node-name='%s'" % node)
        root = export_root(self.graph, node, writable, id)
        try:
            return self.exports.add(
                id,
                options.get("name", node),
                root,
                writable,
                options.get("description", ""),
                options.get("bitmaps", ()),
                options.get("allocation-depth", False),
                options.get("writethrough", False),
            )
        except BaseException:
            root.close()
            raise

    def server(self, values: Mapping[str, Any], addresses: Sequence[Mapping[str, Any]] = (), fds: Sequence[int] = (), typed: bool = True) -> NbdServer:
        """A server for all exports, at `addresses` and on sockets that we were given; clients come in after `start`.

        `values` are graph_file.SERVER, of which the address may be missing where there is another. Raises Error.
        """
        options: dict[str, Any] = {}
        shape = dict(graph_file.SERVER)
        if "addr" not in values and (addresses or fds):
            del shape["addr"]
        read_shape(shape, dict(values), options, typed)
        made = NbdServer(
            self.exports,
            tls=self._object(options.get("tls-creds"), "TLS credentials"),
            authz=self._object(options.get("tls-authz"), "authorization object"),
            objects=self.graph.objects,
            max_connections=options.get("max-connections", MAX_CONNECTIONS),
            handshake_seconds=options.get("handshake-max-seconds", HANDSHAKE_SECONDS),
            said=self.said,
            idle=None if self.persist else self.stop,
        )
        self.servers.append(made)
        for place in ([options["addr"]] if "addr" in options else []) + list(addresses):
            made.listen(place)
        for fd in fds:
            made.take(fd)
        return made

    def _object(self, id: Optional[str], what: str) -> Any:
        if id is None:
            return None
        if id not in self.graph.objects:
            raise OptionError("No %s with id '%s'" % (what, id))
        return self.graph.objects[id]

    @property
    def uris(self) -> list[str]:
        """How clients find each export at each address."""
        return [uri(address, export.name) for server in self.servers for address in server.addresses for export in self.exports]

    # -- running -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Let clients in."""
        for begin in (*(server.start for server in self.servers), *self.on_start):
            begin()
        notify(self.environment, "READY=1\nMAINPID=%d\nSTATUS=%d exports" % (os.getpid(), len(self.exports)))

    def stop(self) -> None:
        """Let `run` end; from any thread."""
        os.kill(os.getpid(), signal.SIGTERM)

    def run(self, ready: Optional[Callable[[], None]] = None) -> None:
        """Start, call `ready`, serve until one of SIGNALS comes or `stop` is called, and close; in the main thread. A second signal
        disconnects clients that take their time, a third one ends the process. Raises what closing raises."""
        with Signals() as signals:
            try:
                self.start()
                if ready is not None:
                    ready()
                while not signals.wait():
                    pass
            except BaseException:
                self.close(0)
                raise
            closing = Thread(target=self._close_quietly, name="drain")
            closing.start()
            while closing.is_alive():
                if signals.wait(0.05):
                    for server in self.servers:
                        server.hurry()
                    signals.release()
        closing.join()
        if self._failure is not None:
            raise self._failure

    def _close_quietly(self) -> None:
        try:
            self.close()
        except (Error, OSError) as exc:
            self._failure = exc

    def close(self, seconds: Optional[float] = None) -> None:
        """Finish what is under way, disconnect the clients, flush and close all nodes. Raises the first failure, after all is done.
        A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        notify(self.environment, "STOPPING=1")
        failure: Optional[BaseException] = None
        ends: list[Callable[[], Any]] = [*self.before_close]
        ends += [lambda server=server: server.stop(seconds) for server in self.servers]  # type: ignore[misc]
        for end in (*ends, self.exports.close, self.graph.close):
            try:
                end()
            except (Error, OSError) as exc:
                failure = failure or exc
        if failure is not None:
            raise failure


def uri(address: Mapping[str, Any], name: str) -> str:
    """The NBD URI of the export `name` of a server at `address` (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md)."""
    path = quote(name, safe="")
    if address["type"] == "unix":
        return "nbd+unix:///%s?socket=%s" % (path, quote(str(address["path"])))
    if address["type"] == "vsock":
        return "nbd+vsock://%s:%s/%s" % (address["cid"], address["port"], path)
    if address["type"] != "inet":
        return "fd:%s" % address.get("str", "")
    host = str(address["host"])
    return "nbd://%s:%s/%s" % ("[%s]" % host if ":" in host else host, address["port"], path)
