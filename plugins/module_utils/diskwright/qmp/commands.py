# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The commands of QMP: the name, the record of arguments and the operation of each
(https://www.qemu.org/docs/master/interop/qemu-storage-daemon-qmp-ref.html)."""

from __future__ import annotations

from .. import __version__
from ..description import read_node
from ..errors import Error, OptionError
from ..jobs import backup, commit, creation, dirty, drive, exports, mirror, nodes, queries, snapshots, stream, transaction
from ..options import Options, opt
from .arguments import read
from .codec import COMMAND_NOT_FOUND, QmpError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

    from ..jobs.live import Live

    Operation = Callable[[Live, Any], Any]

QEMU_VERSION = {"major": 10, "minor": 0, "micro": 2}  # whose commands these are


class Command:
    """One command. `spec`: its arguments are not a record but whatever a driver declares."""

    __slots__ = ("name", "arguments", "operation", "spec")

    def __init__(self, name: str, arguments: type[Options], operation: Operation, spec: bool = False) -> None:
        self.name = name
        self.arguments = arguments
        self.operation = operation
        self.spec = spec

    def run(self, live: Live, values: dict[str, Any]) -> Any:
        """Carry it out; what it returns, {} if nothing. Raises Error, OSError."""
        found = self.operation(live, values if self.spec else read(self.arguments, values))
        return {} if found is None else found


class Nothing(Options):
    """No arguments."""


class NodeName(Options):
    node_name: str = opt(help="name of a node")


class Flat(Options):
    flat: bool = opt(False, help="whether backing nodes are left out of their overlays")


class Stats(Options):
    query_nodes: bool = opt(False, help="whether all nodes are shown")


class Id(Options):
    id: str = opt(help="name of a job, an object or an export")


class Device(Options):
    device: str = opt(help="name of a block job")


class CancelBlockJob(Device):
    force: bool = opt(False, help="whether it fails even if it is ready")


class Speed(Device):
    speed: int = opt(help="bytes a second; 0: no limit")


class Change(Id):
    type: str = opt(choices=("commit", "stream", "mirror", "backup", "create", "amend"), help="kind of the job")
    copy_mode: Optional[str] = opt(None, choices=("background", "write-blocking"), help="how a mirror copies")


class Reopen(Options):
    options: list = opt(help="descriptions of nodes")  # type: ignore[type-arg]


class Create(Options):
    job_id: str = opt(help="name of the job")
    options: dict = opt(help="what to make")  # type: ignore[type-arg]


class Amend(Create):
    node_name: str = opt(help="name of the node")
    force: bool = opt(False, help="whether what loses data is done")


class Resize(Options):
    device: Optional[str] = opt(None, help="name of the node")
    node_name: Optional[str] = opt(None, help="name of the node")
    size: int = opt(help="bytes")


class Threshold(NodeName):
    write_threshold: int = opt(help="bytes; 0: none")


class BackingFile(Options):
    device: str = opt(help="name of the node on top")
    image_node_name: str = opt(help="name of the node whose image is changed")
    backing_file: str = opt(help="what it is to say")


class Children(Options):
    parent: str = opt(help="name of the node that has the children")
    child: Optional[str] = opt(None, help="the child that goes")
    node: Optional[str] = opt(None, help="name of the node that comes")


class SetActive(Options):
    node_name: Optional[str] = opt(None, help="name of the node")
    active: bool = opt(help="whether it may be used")


class DeleteInternal(Options):
    device: str = opt(help="name of the node")
    id: Optional[str] = opt(None, help="id of the snapshot")
    name: Optional[str] = opt(None, help="name of the snapshot")


class RemoveExport(Id):
    mode: str = opt("safe", choices=("safe", "hard"), help="whether clients are disconnected")


class ServerAdd(Options):
    device: str = opt(help="name of the node")
    name: Optional[str] = opt(None, help="name of the export")
    writable: bool = opt(False, help="whether clients may write")
    description: Optional[str] = opt(None, help="a text for people")
    bitmap: Optional[str] = opt(None, help="a dirty bitmap that clients can read")


class ServerRemove(Options):
    name: str = opt(help="name of the export")
    mode: str = opt("safe", choices=("safe", "hard"), help="whether clients are disconnected")


class Transaction(Options):
    actions: list = opt(help="the actions: {type, data}")  # type: ignore[type-arg]
    properties: Optional[dict] = opt(None, help="{completion-mode}")  # type: ignore[type-arg]


class Completion(Options):
    completion_mode: str = opt("individual", choices=("individual", "grouped"), help="whether all jobs fail if one does")


class Action(Options):
    type: str = opt(choices=tuple(transaction.ACTIONS), help="what to do")
    data: dict = opt(help="its arguments")  # type: ignore[type-arg]


def version() -> dict[str, Any]:
    """What query-version tells."""
    return {"qemu": dict(QEMU_VERSION), "package": "diskwright %s" % __version__}


def _blockdev_add(live: Live, values: dict[str, Any]) -> None:
    nodes.add(live, read_node(values, True))


def _reopen(live: Live, given: Reopen) -> None:
    if not all(isinstance(spec, dict) for spec in given.options):
        raise OptionError("Invalid parameter type for 'options[0]', expected: object")
    nodes.reopen(live, given.options)


def _transaction(live: Live, given: Transaction) -> None:
    grouped = read(Completion, given.properties or {}).completion_mode == "grouped"
    actions = []
    for number, item in enumerate(given.actions):
        path = "actions[%d]" % number
        if not isinstance(item, dict):
            raise OptionError("Invalid parameter type for '%s', expected: object" % path)
        action = read(Action, item, path + ".")
        actions.append((action.type, read(transaction.ACTIONS[action.type][0], action.data, path + ".data.")))
    transaction.transaction(live, actions, grouped)


def _delete_internal(live: Live, given: DeleteInternal) -> Any:
    return queries.snapshot_json(snapshots.delete_internal(live, given.device, given.id, given.name))


def _server_add(live: Live, given: ServerAdd) -> None:
    live.node(given.device)
    name = given.name if given.name is not None else given.device
    bitmaps = [given.bitmap] if given.bitmap is not None else None
    values = {"type": "nbd", "id": name, "node-name": given.device, "name": name, "writable": given.writable}
    optional = {"description": given.description, "bitmaps": bitmaps}
    exports.add(live, read(exports.ExportOptions, {**values, **{key: value for key, value in optional.items() if value is not None}}))


def _change(live: Live, given: Change) -> None:
    if given.type == "mirror" and given.copy_mode is None:
        raise OptionError("Parameter 'copy-mode' is missing")
    job = live.jobs.find_block(given.id)
    if given.type != job.kind or not isinstance(job, mirror.MirrorJob):
        raise Error("Job type does not support change")
    job.change(given.copy_mode or "")


def _set_active(live: Live, given: SetActive) -> None:
    if given.node_name is not None:
        live.node(given.node_name)
    if not given.active:
        raise Error("Nodes cannot be made inactive")


def _quit(live: Live, _given: Any) -> None:
    if live.on_quit is not None:
        live.on_quit()


def _find_block(live: Live, name: str) -> Any:
    return live.jobs.find_block(name)


def _commands() -> list[Command]:
    found = [
        Command("blockdev-add", Nothing, _blockdev_add, True),
        Command("blockdev-del", NodeName, lambda live, a: nodes.remove(live, a.node_name)),
        Command("blockdev-reopen", Reopen, _reopen),
        Command("blockdev-create", Create, lambda live, a: _started(creation.create(live, a.job_id, a.options))),
        Command("x-blockdev-amend", Amend, lambda live, a: _started(creation.amend(live, a.job_id, a.node_name, a.options, a.force))),
        Command("blockdev-set-active", SetActive, _set_active),
        Command("x-blockdev-change", Children, lambda live, a: nodes.change_children(live, a.parent, a.child, a.node)),
        Command("block_resize", Resize, lambda live, a: nodes.resize(live, a.device, a.node_name, a.size)),
        Command("block-set-write-threshold", Threshold, lambda live, a: nodes.set_write_threshold(live, a.node_name, a.write_threshold)),
        Command(
            "change-backing-file", BackingFile, lambda live, a: nodes.change_backing_file(live, a.device, a.image_node_name, a.backing_file)
        ),
        Command("object-add", Nothing, nodes.add_object, True),
        Command("object-del", Id, lambda live, a: nodes.remove_object(live, a.id)),
        Command("blockdev-snapshot", snapshots.OverlaySnapshot, lambda live, a: _started(snapshots.snapshot(live, a))),
        Command("blockdev-snapshot-sync", snapshots.FileSnapshot, lambda live, a: _started(snapshots.snapshot_sync(live, a))),
        Command("blockdev-snapshot-internal-sync", snapshots.InternalSnapshot, lambda live, a: _started(snapshots.internal_snapshot(live, a))),
        Command("blockdev-snapshot-delete-internal-sync", DeleteInternal, _delete_internal),
        Command("block-stream", stream.StreamOptions, lambda live, a: _started(stream.stream(live, a))),
        Command("block-commit", commit.CommitOptions, lambda live, a: _started(commit.commit(live, a))),
        Command("blockdev-mirror", mirror.MirrorOptions, lambda live, a: _started(mirror.mirror(live, a))),
        Command("blockdev-backup", backup.BackupOptions, lambda live, a: _started(backup.backup(live, a))),
        Command("drive-backup", drive.DriveBackupOptions, lambda live, a: _started(drive.drive_backup(live, a))),
        Command("drive-mirror", drive.DriveMirrorOptions, lambda live, a: _started(drive.drive_mirror(live, a))),
        Command("transaction", Transaction, _transaction),
        Command("x-debug-block-dirty-bitmap-sha256", dirty.BitmapName, lambda live, a: {"sha256": dirty.sha256(live, a)}),
        Command("block-dirty-bitmap-merge", transaction.MergeBitmaps, lambda live, a: _started(dirty.merge(live, a.node, a.target, a.bitmaps))),
        Command("block-export-add", exports.ExportOptions, exports.add),
        Command("block-export-del", RemoveExport, lambda live, a: exports.remove(live, a.id, a.mode)),
        Command("nbd-server-start", exports.ServerOptions, exports.start_server),
        Command("nbd-server-stop", Nothing, lambda live, a: exports.stop_server(live)),
        Command("nbd-server-add", ServerAdd, _server_add),
        Command("nbd-server-remove", ServerRemove, lambda live, a: exports.remove(live, a.name, a.mode)),
        Command("query-named-block-nodes", Flat, lambda live, a: queries.named_nodes(live, a.flat)),
        Command("x-debug-query-block-graph", Nothing, lambda live, a: queries.block_graph(live)),
        Command("query-block", Nothing, lambda live, a: []),
        Command("query-blockstats", Stats, lambda live, a: queries.block_stats(live, a.query_nodes)),
        Command("query-jobs", Nothing, lambda live, a: queries.jobs(live)),
        Command("query-block-jobs", Nothing, lambda live, a: queries.block_jobs(live)),
        Command("query-block-exports", Nothing, lambda live, a: exports.listing(live)),
        Command("query-version", Nothing, lambda live, a: version()),
        Command("query-commands", Nothing, lambda live, a: [{"name": name} for name in COMMANDS]),
        Command("query-qmp-schema", Nothing, _schema),
        Command("quit", Nothing, _quit),
        Command("block-job-set-speed", Speed, lambda live, a: _find_block(live, a.device).set_speed(a.speed)),
        Command("block-job-cancel", CancelBlockJob, lambda live, a: _find_block(live, a.device).cancel(a.force)),
        Command("block-job-change", Change, _change),
    ]
    for verb in ("add", "remove", "clear", "enable", "disable"):
        record, operation = transaction.ACTIONS["block-dirty-bitmap-" + verb]
        found.append(Command("block-dirty-bitmap-" + verb, record, _without_undo(operation)))
    for verb in ("pause", "resume", "cancel", "complete", "finalize", "dismiss"):
        found.append(Command("job-" + verb, Id, _on_job(verb)))
        if verb != "cancel":
            by_id = verb in ("finalize", "dismiss")
            found.append(Command("block-job-" + verb, Id if by_id else Device, _on_block_job(verb, "id" if by_id else "device")))
    return found


def _started(_result: Any) -> None:
    """A command returns nothing of what it began."""


def _without_undo(operation: Operation) -> Operation:
    return lambda live, given: _started(operation(live, given))


def _on_job(verb: str) -> Operation:
    return lambda live, given: getattr(live.jobs.find(given.id), verb)()


def _on_block_job(verb: str, key: str) -> Operation:
    return lambda live, given: getattr(_find_block(live, getattr(given, key)), verb)()


def _schema(_live: Live, _given: Any) -> Any:
    from .schema import schema

    return schema(COMMANDS.values())


COMMANDS: dict[str, Command] = {command.name: command for command in _commands()}


def execute(live: Live, name: str, values: dict[str, Any]) -> Any:
    """Carry out a command; what it returns. Raises Error, OSError."""
    command = COMMANDS.get(name)
    if command is None:
        raise QmpError("The command %s has not been found" % name, COMMAND_NOT_FOUND)
    return command.run(live, values)
