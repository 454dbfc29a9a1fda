# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Exports and the NBD server of a live graph: block-export-add, nbd-server-start, and the like
(https://www.qemu.org/docs/master/interop/qemu-storage-daemon-qmp-ref.html).

`Live.exports` is an ExportSet of server/exports.py, which may be shared with whoever serves it; `Live.server` the server that is running.
"""

from __future__ import annotations

from ..errors import Error, OptionError, Unsupported
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    from .live import Live

KINDS = ("nbd", "vhost-user-blk", "fuse", "vduse-blk")


class ExportOptions(Options):
    """Options of block-export-add, for NBD."""

    type: str = opt(choices=KINDS, help="how it is exported; only nbd is there")
    id: str = opt(help="name of the export")
    node_name: str = opt(help="name of the node")
    name: Optional[str] = opt(None, help="the name that clients ask for; the node's where none is given")
    writable: bool = opt(False, help="whether clients may write")
    writethrough: bool = opt(False, help="whether what is written is on stable storage before a client hears of it")
    description: Optional[str] = opt(None, help="a text for people")
    bitmaps: Optional[list] = opt(None, help="dirty bitmaps that clients can read")  # type: ignore[type-arg]
    allocation_depth: bool = opt(False, help="whether clients can see which layer holds what")
    fixed_iothread: bool = opt(False, help="taken and ignored")
    iothread: Any = opt(None, help="taken and ignored")


class ServerOptions(Options):
    """Options of nbd-server-start."""

    addr: dict = opt(help="where to listen: {type, data}")  # type: ignore[type-arg]
    tls_creds: Optional[str] = opt(None, help="id of TLS credentials")
    tls_authz: Optional[str] = opt(None, help="id of the object that says who may come in")
    max_connections: int = opt(100, help="clients at a time; 0: any number")
    handshake_max_seconds: int = opt(10, help="seconds that a client may take to agree")


def watch(live: Live) -> None:
    """Tell of exports that are gone by events."""
    before = live.exports.deleted

    def deleted(export: Any) -> None:
        if before is not None:
            before(export)
        live.events.emit("BLOCK_EXPORT_DELETED", id=export.id)

    live.exports.deleted = deleted


def add(live: Live, options: ExportOptions) -> None:
    """Export a node. Raises Error."""
    with live.lock:
        if options.type != "nbd":
            raise Unsupported("Exports of the type '%s' are not there: only nbd is" % options.type)
        exports = _exports(live)
        if live.server is None:
            raise Error("NBD server not running")
        if not options.id:
            raise OptionError("Invalid block export id")
        if options.id in exports:
            raise Error("Block export id '%s' is already in use" % options.id)
        name = options.name if options.name is not None else options.node_name
        if options.node_name not in live.graph.named:
            raise OptionError("Cannot find device='' nor node-name='%s'" % options.node_name)
        from ..server.exports import export_root

        root = export_root(live.graph, options.node_name, options.writable, options.id)
        try:
            exports.add(
                options.id,
                name,
                root,
                options.writable,
                options.description or "",
                options.bitmaps or (),
                options.allocation_depth,
                options.writethrough,
            )
        except BaseException:
            root.close()
            raise


def _exports(live: Live) -> Any:
    if live.exports is None:
        from ..server.exports import ExportSet

        live.exports = ExportSet()
        watch(live)
    return live.exports


def remove(live: Live, id: str, mode: str = "safe") -> None:
    """End an export; with the mode "hard" even if clients use it. Raises Error."""
    _exports(live).remove(id, mode)


def listing(live: Live) -> list[dict[str, Any]]:
    """What query-block-exports tells."""
    return [export.as_json() for export in reversed(list(live.exports or ()))]


def start_server(live: Live, options: ServerOptions) -> None:
    """Let clients in. Raises Error."""
    with live.lock:
        if live.server is not None:
            raise Error("NBD server already running")
        from ..server.server import NbdServer

        objects = live.graph.objects
        for id in (options.tls_creds, options.tls_authz):
            if id is not None and id not in objects:
                raise OptionError("No TLS credentials with id '%s'" % id)
        server = NbdServer(
            _exports(live),
            tls=objects[options.tls_creds] if options.tls_creds is not None else None,
            authz=objects[options.tls_authz] if options.tls_authz is not None else None,
            max_connections=options.max_connections,
            handshake_seconds=options.handshake_max_seconds,
        )
        server.listen(_address(options.addr))
        server.start()
        live.server = server


def _address(given: Mapping[str, Any]) -> dict[str, Any]:
    kind = given.get("type")
    if not isinstance(kind, str):
        raise OptionError("Parameter 'addr.type' is missing")
    if kind not in ("inet", "unix", "vsock", "fd"):
        raise OptionError("Parameter 'type' does not accept value '%s'" % kind)
    data = given.get("data", {key: value for key, value in given.items() if key != "type"})
    if not isinstance(data, dict):
        raise OptionError("Invalid parameter type for 'addr.data', expected: object")
    needed = {"inet": ("host", "port"), "unix": ("path",), "vsock": ("cid", "port"), "fd": ("str",)}[kind]
    for key in needed:
        if key not in data:
            raise OptionError("Parameter 'addr.data.%s' is missing" % key)
        if not isinstance(data[key], str):
            raise OptionError("Invalid parameter type for 'addr.data.%s', expected: string" % key)
    return {"type": kind, **data}


def stop_server(live: Live) -> None:
    """Let no more clients in, disconnect those that are there, and end all exports. Raises Error."""
    with live.lock:
        if live.server is None:
            raise Error("NBD server not running")
        server, live.server = live.server, None
    if live.exports is not None:
        live.exports.close()
    server.stop()
