# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""drive-backup and drive-mirror: blockdev-backup and -mirror into a file that is made, or opened, for the job
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, DriveBackup and drive-mirror). QEMU has deprecated them."""

from __future__ import annotations

from ..errors import Error
from ..hooks import ALL, OpenFlags
from ..options import opt
from .backup import BackupJob, BackupOptions, prepare_backup
from .creation import make_image
from .mirror import MirrorJob, MirrorOptions, mirror

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

    from ..node import Node
    from .live import Live

MODES = ("existing", "absolute-paths")


class DriveBackupOptions(BackupOptions):
    """Options of drive-backup: those of blockdev-backup, but `target` is a file."""

    format: Optional[str] = opt(None, help="format of the file; the source's where none is given, or what an existing file looks like")
    mode: str = opt("absolute-paths", choices=MODES, help="whether the file is there already")


class DriveMirrorOptions(MirrorOptions):
    """Options of drive-mirror: those of blockdev-mirror, but `target` is a file."""

    format: Optional[str] = opt(None, help="format of the file; the source's where none is given, or what an existing file looks like")
    node_name: Optional[str] = opt(None, help="name of the file's node")
    mode: str = opt("absolute-paths", choices=MODES, help="whether the file is there already")
    unmap: bool = opt(True, help="taken and ignored: zeroes are always given back where they can be")


def _open_target(live: Live, source: Node, options: Any, name: Optional[str]) -> Node:
    """The node of the file, which nobody keeps. Raises Error."""
    below = source.unfiltered().backing if options.sync == "top" else source if options.sync == "none" else None
    format = options.format
    if options.mode == "absolute-paths":
        format = format or source.unfiltered().driver
        make_image(live, options.target, format, source.size, below)
    spec: dict[str, Any] = {"file": {"filename": options.target}}
    if format is not None:
        spec["driver"] = format
    if name is not None:
        spec["node-name"] = name
    try:
        found = live.graph.open_spec(spec, OpenFlags(writable=True, perm=0, shared=ALL, no_backing=True))
        if below is not None and found.supports_backing:
            with live.graph.drained():
                live.graph.set_child(found, "backing", below)
        return found
    except OSError as exc:
        text = "Could not open '%s': %s" % (options.target, exc.strerror or exc)
        raise Error(text, filename=options.target, errno=exc.errno) from exc


def _plain(declared: type[Any], options: Any, target: Node) -> Any:
    """The record of the same job into a node."""
    values = {field.name: getattr(options, field.name) for field in declared.fields.values()}
    return declared(**{**values, "target": target.name})


def prepare_drive_backup(live: Live, options: DriveBackupOptions) -> BackupJob:
    """See backup.prepare_backup."""
    source = live.node(options.device)
    target = _open_target(live, source, options, None)
    try:
        return prepare_backup(live, _plain(BackupOptions, options, target))
    except BaseException:
        if not target.parents:
            target.close()
        raise


def drive_backup(live: Live, options: DriveBackupOptions) -> BackupJob:
    """Begin a backup into a file. Raises Error."""
    with live.lock:
        with live.graph.drained():
            job = prepare_drive_backup(live, options)
            job.start(held=True)
        job.release()
        return job


def drive_mirror(live: Live, options: DriveMirrorOptions) -> MirrorJob:
    """Begin a mirror into a file. Raises Error."""
    with live.lock:
        source = live.root_node(options.device)
        target = _open_target(live, source, options, options.node_name)
        try:
            return mirror(live, _plain(MirrorOptions, options, target), options.mode == "absolute-paths" and options.sync == "full")
        except BaseException:
            if not target.parents:
                target.close()
            raise
