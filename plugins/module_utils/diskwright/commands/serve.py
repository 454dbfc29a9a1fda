# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`serve`: export nodes over NBD. Options are those of qemu-nbd and of qemu-storage-daemon
(https://www.qemu.org/docs/master/tools/qemu-nbd.html, https://www.qemu.org/docs/master/tools/qemu-storage-daemon.html).
"""

from __future__ import annotations

from ..errors import Error, OptionError
from ..getopt import Parser
from ..graph import Graph, prefixed
from ..node import OpenFlags, cache_flags
from ..objects import read_pairs
from ..options import nest
from ..parts import part
from . import spec
from .spec import VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from ..node import Node
    from ..server.service import Serve
    from .ui import UI

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 10809
MAX_NUMBER = (1 << 31) - 1


def _choice(text: str, values: Sequence[str], message: str) -> str:
    if text not in values:
        raise OptionError(message % text)
    return text


def _cache(text: str) -> str:
    if cache_flags(text) is None:
        raise OptionError("Invalid cache mode `%s'" % text)
    return text


def _aio(text: str) -> str:
    return _choice(text, ("native", "io_uring", "threads"), "Invalid aio mode '%s'")


def _discard(text: str) -> str:
    return _choice(text, ("ignore", "off", "unmap", "on"), "Invalid discard mode `%s'")


def _zeroes(text: str) -> str:
    return _choice(text, ("off", "on", "unmap"), "Failed to parse detect_zeroes mode: invalid parameter value: %s")


def _socket(text: str) -> str:
    if not text.startswith("/"):
        raise OptionError("socket path must be absolute")
    return text


def _offset(text: str) -> int:
    from ..units import parse_size

    try:
        return parse_size(text, (1 << 63) - 1)
    except OptionError:
        raise OptionError("Invalid offset '%s'" % text) from None


def _number(what: str, most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) > most:
            raise OptionError("Invalid %s '%s'" % (what, text))
        return int(text)

    return check


COMMAND = Command(
    "serve",
    "Export images over NBD to virtual machines and other clients, until told to stop (SIGTERM).",
    [
        "[-r | -s] [-f FMT | --image-opts] [-x NAME] [-k PATH | -b HOST -p PORT] FILE",
        "[--blockdev NODE]... --export NODE-NAME... [--nbd-server ADDRESS]...",
        "[--graph GRAPH-FILE] [--qmp ADDRESS]... [OPTION]...",
        "-L [-k PATH | -b HOST -p PORT] [--tls-creds ID]",
    ],
    [
        spec.HELP,
        Option("-k --socket", VALUE, "PATH", "listen on a unix socket; may be repeated", key="socket", check=_socket),
        Option("-p --port", VALUE, "PORT", "listen on a TCP port (default: %d); 0 takes any" % DEFAULT_PORT, check=_number("port", 65535)),
        Option("-b --bind", VALUE, "HOST", "with -p: the address to listen at (default: %s);\n0.0.0.0 is all of this host's" % DEFAULT_HOST),
        Option("-x --export-name", VALUE, "NAME", 'what clients call the image (default: "")', key="name"),
        Option("-D --description", VALUE, "TEXT", "what a list of exports says about it"),
        Option("-r --read-only", help="clients may not write"),
        Option("-s --snapshot", help="what clients write goes to a temporary overlay, and is forgotten"),
        Option(
            "-l --load-snapshot",
            VALUE,
            "SNAPSHOT",
            "export an internal snapshot: its ID or name,\nor snapshot.id=ID,snapshot.name=NAME",
            check=spec.check_snapshot,
        ),
        Option("-o --offset", VALUE, "OFFSET", "export what is behind this offset", check=_offset),
        Option("-A --allocation-depth", help="let clients see which image of the chain holds what"),
        Option("-B --bitmap", VALUE, "NAME", "let clients read a dirty bitmap; may be repeated", key="bitmap"),
        Option("-e --shared", VALUE, "NUM", "clients at a time (default: 100; 0: any number)", check=_number("shared device number", MAX_NUMBER)),
        Option("-t --persistent", help="stay when the last client goes, which is what happens anyway"),
        Option("--until-idle", help="end when the last client goes, as qemu-nbd does without -t"),
        Option(
            "--handshake-limit",
            VALUE,
            "SECONDS",
            "for a client to make up its mind (default: 10; 0: forever)",
            check=_number("handshake limit", MAX_NUMBER),
        ),
        Option("--tls-creds", VALUE, "ID", "an object: credentials that clients must use"),
        Option("--tls-authz", VALUE, "ID", "an object: who may come in"),
        Option("--tls-hostname", VALUE, "HOST", "with -L: the name that the server's certificate must have"),
        Option("-L --list", help="list the exports of another server"),
        Option(
            "--export",
            VALUE,
            "EXPORT",
            "[type=]nbd,id=ID,node-name=NODE[,name=NAME][,writable=on]\n[,bitmaps.0=NAME][,allocation-depth=on], or JSON; may be repeated",
        ),
        Option(
            "--nbd-server",
            VALUE,
            "SERVER",
            "addr.type=unix,addr.path=PATH or addr.type=inet,addr.host=HOST,\naddr.port=PORT[,tls-creds=ID][,tls-authz=ID]"
            "[,max-connections=N],\nor JSON; may be repeated",
            key="nbd_server",
        ),
        Option("--graph", VALUE, "FILE", "a graph file: objects, nodes and exports", key="graph"),
        Option("--qmp", VALUE, "ADDRESS", "take QMP commands at unix:PATH or HOST:PORT; may be repeated", key="qmp"),
        Option("--fork", help="go on in the background once clients can come", extra="--daemonize", key="fork"),
        Option("--pid-file", VALUE, "PATH", "a file that has the process's number while it serves", extra="--pidfile", key="pid_file"),
        spec.FORMAT,
        spec.IMAGE_OPTS,
        Option("--cache", VALUE, "CACHE", spec.WRITE_CACHE.help, check=_cache),
        Option("-n --nocache", help="--cache=none"),
        Option("--aio", VALUE, "AIO", "threads (default), native or io_uring", check=_aio),
        Option("--discard", VALUE, "MODE", "unmap (default): discarded space is given back; or ignore", check=_discard),
        Option("--detect-zeroes", VALUE, "MODE", "off (default), on or unmap", check=_zeroes),
        Option("-v --verbose", help="say what becomes of clients"),
        Option("-q --quiet", help="do not print where the exports are"),
        spec.OBJECT,
    ],
    [("FILE", "the image")],
    "Clients that are connected when it ends get the answers to what they asked for; a second\nsignal lets it not wait for them. "
    "Sockets that systemd hands over are used if no other is named.",
)

_REPEATED = ("socket", "bitmap", "export", "nbd_server", "qmp")


def main(args: Sequence[str], ui: UI) -> int:
    """Run `serve` with the arguments `args`; the exit code."""
    given = spec.Given()
    for option, value in COMMAND.parse(Parser(COMMAND.options, args, ui.posixly_correct), ui):
        if option is None:
            given.operands.append(value or "")
        elif option.key in _REPEATED:
            given.setdefault(option.key, []).append(value if option.check is None else option.check(value or ""))
        else:
            COMMAND.take(given, option, value)
    ui.quiet = "quiet" in given
    _check(given)
    if "list" in given:
        return _list(given, ui)
    from ..server.daemon import Background, PidFile

    background = None
    if "fork" in given:
        ui.flush()
        background = Background()
        if background.code is not None:
            return background.code
    serve = _prepare(given, ui)
    pid_file: Optional[PidFile] = None

    def ready() -> None:
        nonlocal pid_file
        if "pid_file" in given:
            pid_file = PidFile(given["pid_file"])
        for uri in serve.uris:
            ui.say(uri + "\n")
        ui.flush()
        if background is not None:
            background.ready()

    try:
        serve.run(ready)
    except BaseException:
        serve.close(0)
        raise
    finally:
        if pid_file is not None:
            pid_file.remove()
    return 0


def _check(given: spec.Given) -> None:
    """Raise OptionError for options that do not go together."""
    if "list" in given:
        if given.operands or "export" in given or "graph" in given:
            raise OptionError("List mode is incompatible with a file name")
        return
    others = [key for key in ("export", "graph", "qmp") if key in given]
    if len(given.operands) > 1 or not given.operands and not others:
        raise UsageError("Invalid number of arguments")
    if "snapshot" in given and "read_only" in given:
        raise OptionError("--snapshot and --read-only are mutually exclusive")
    if "tls_authz" in given and "tls_creds" not in given:
        raise OptionError("--tls-authz is not permitted without --tls-creds")
    if "tls_hostname" in given:
        raise OptionError("TLS hostname is only supported with export list")
    if "nocache" in given and "cache" in given:
        raise OptionError("-n and --cache can only be specified once")
    spec.check_one_image_form("image_opts" in given, given.get("format"))


def _prepare(given: spec.Given, ui: UI) -> Serve:
    """Open the nodes, export them, listen; nobody comes in yet."""
    from ..server.service import Serve

    described = given.objects.described()
    graph = _graph(given, ui)
    serve = Serve(
        graph,
        environment=ui.environment,
        said=ui.warning if "verbose" in given else None,
        persist="until_idle" not in given,
    )
    try:
        for one in described:
            graph.add(one)
        if "graph" in given:
            serve.take_file(given["graph"])
        if given.operands:
            _export_file(serve, given, ui)
        for text in given.get("export", ()):
            serve.export(*_values(text, "type"))
        _listen(serve, given, ui)
        if "qmp" in given:
            _take_commands(serve, given["qmp"])
    except BaseException:
        serve.close(0)
        raise
    return serve


def _graph(given: spec.Given, ui: UI) -> Graph:
    if "aio" in given:
        from .bench import AioGraph

        return AioGraph(given["aio"], None, dict(given.objects), ui.caution)
    return Graph(None, dict(given.objects), ui.caution)


def _values(text: str, implied: str) -> tuple[dict[str, Any], bool]:
    """What --export and --nbd-server say, pairs or JSON, and whether that has types."""
    if text.startswith("{"):
        from ..json_parser import parse_json

        return dict(parse_json(text)), True
    return nest(read_pairs(text, implied)), False


def _export_file(serve: Serve, given: spec.Given, ui: UI) -> None:
    """Open the operand and export it."""
    node = _open(serve.graph, given, ui)
    from ..server.exports import export_root

    writable = "read_only" not in given and "load_snapshot" not in given
    try:
        root = export_root(serve.graph, node, writable, "file")
    except BaseException:
        node.close()
        raise
    try:
        serve.exports.add("file", given.get("name", ""), root, writable, given.get("description", ""), given.get("bitmap", ()), "allocation_depth" in given)
    except BaseException:
        root.close()
        raise


def _open(graph: Graph, given: spec.Given, ui: UI) -> Node:
    """The node that is exported: the operand's, with what -s, -l and -o put on top of it."""
    filename = given.operands[0]
    mode = "none" if "nocache" in given else given.get("cache", "writeback")
    writable = not {"read_only", "snapshot", "load_snapshot"} & set(given)
    flags = OpenFlags(writable=writable, unmap=given.get("discard", "unmap") in ("unmap", "on"), **(cache_flags(mode) or {}))
    extra = {"detect-zeroes": given["detect_zeroes"]} if "detect_zeroes" in given else None
    try:
        node = graph.open(filename, given.get("format"), flags, "image_opts" in given, extra)
    except Error as exc:
        raise prefixed("Failed to open '%s': " % filename, exc, filename) if "Could not open" not in str(exc) else exc from exc
    try:
        if "load_snapshot" in given:
            _load_snapshot(node, given["load_snapshot"])
        if "snapshot" in given:
            from ..temporary import overlay

            node = overlay(node, directory=ui.scratch)
        if given.get("offset"):
            if given["offset"] >= node.size:
                raise OptionError("Offset (%d) has to be smaller than the image size (%d)" % (given["offset"], node.size))
            node = graph.open_spec({"driver": "raw", "offset": given["offset"], "file": node.name}, flags.but(writable=not node.read_only))
    except BaseException:
        node.close()
        raise
    return node


def _load_snapshot(node: Node, wanted: str) -> None:
    from ..options import split_pairs

    try:
        if wanted.startswith("snapshot."):
            names = dict(split_pairs(wanted))
            node.load_snapshot(names.get("snapshot.id"), names.get("snapshot.name"))
            return
        try:
            node.load_snapshot(wanted, None)
        except Error:
            node.load_snapshot(None, wanted)
    except Error as exc:
        raise prefixed("Failed to load snapshot: ", exc, node.filename) from exc


def _listen(serve: Serve, given: spec.Given, ui: UI) -> None:
    """Open all sockets: those that are named, or those that systemd gave us, or the default one."""
    for text in given.get("nbd_server", ()):
        values, typed = _values(text, "addr.type")
        serve.server(values, typed=typed)
    common: dict[str, Any] = {"tls-creds": given.get("tls_creds"), "tls-authz": given.get("tls_authz")}
    if "shared" in given:
        common["max-connections"] = given["shared"]
    if "handshake_limit" in given:
        common["handshake-max-seconds"] = given["handshake_limit"]
    limits = {key: value for key, value in common.items() if value is not None}
    from ..server.systemd import listening_fds

    fds = listening_fds(ui.environment)
    addresses = _addresses(given)
    if not addresses and not fds and not serve.servers and (len(serve.exports) or "qmp" not in given):
        addresses = [{"type": "inet", "host": DEFAULT_HOST, "port": str(DEFAULT_PORT)}]
    if addresses or fds:
        serve.server(limits, addresses, fds)
    elif limits:
        raise OptionError("With --nbd-server, its credentials and limits are said there")


def _take_commands(serve: Serve, addresses: Sequence[str]) -> None:
    """Let QMP clients in."""
    qmp = part(__package__, ".qmp.monitor")  # which uses commands itself
    live = part(__package__, ".jobs.live").Live(serve.graph, serve.exports, on_quit=serve.stop)
    live.server = serve.servers[0] if serve.servers else None
    part(__package__, ".jobs.exports").watch(live)
    monitor = qmp.Monitor(live)
    serve.before_close += [monitor.stop, live.close]
    for address in addresses:
        monitor.listen(qmp.parse_address(address))
    serve.on_start.append(monitor.start)


def _addresses(given: spec.Given) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = [{"type": "unix", "path": path} for path in given.get("socket", ())]
    if "port" in given or "bind" in given:
        found.append({"type": "inet", "host": given.get("bind", DEFAULT_HOST), "port": str(given.get("port", DEFAULT_PORT))})
    return found


def _list(given: spec.Given, ui: UI) -> int:
    """Print what another server exports."""
    from ..server.listing import exports_of

    addresses = _addresses(given) or [{"type": "inet", "host": "localhost", "port": str(DEFAULT_PORT)}]
    creds: Optional[str] = given.get("tls_creds")
    if creds is not None and creds not in given.objects:
        raise OptionError("No TLS credentials with id '%s'" % creds)
    for line in exports_of(addresses[0], given.objects[creds] if creds is not None else None, given.objects, given.get("tls_hostname")):
        ui.write(line + "\n")
    return 0
