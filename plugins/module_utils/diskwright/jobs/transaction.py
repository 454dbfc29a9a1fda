# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Several operations as one: all of them happen, at one moment as clients see it, or none
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, transaction)."""

from __future__ import annotations

from ..errors import Error
from ..options import Options, opt
from . import backup, dirty, drive, snapshots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Sequence

    from .job import Job
    from .live import Live

    Undo = Callable[[], None]

MAX_ACTIONS = 1024


class MergeBitmaps(Options):
    """Options of block-dirty-bitmap-merge."""

    node: str = opt(help="name of the node")
    target: str = opt(help="name of the bitmap that gets the bits")
    bitmaps: list = opt(help="the bitmaps whose bits it gets: names, or {node, name}")  # type: ignore[type-arg]


class Abort(Options):
    """The action that always fails."""


def _merge(live: Live, options: MergeBitmaps) -> Undo:
    return dirty.merge(live, options.node, options.target, options.bitmaps)


def _abort(_live: Live, _options: Abort) -> Undo:
    raise Error("Transaction aborted using Abort action")


# name -> (record of options, the operation, which returns what takes it back)
ACTIONS: dict[str, tuple[type[Options], Callable[[Any, Any], Any]]] = {
    "abort": (Abort, _abort),
    "block-dirty-bitmap-add": (dirty.NewBitmap, dirty.add),
    "block-dirty-bitmap-remove": (dirty.BitmapName, dirty.remove),
    "block-dirty-bitmap-clear": (dirty.BitmapName, dirty.clear),
    "block-dirty-bitmap-enable": (dirty.BitmapName, dirty.enable),
    "block-dirty-bitmap-disable": (dirty.BitmapName, dirty.disable),
    "block-dirty-bitmap-merge": (MergeBitmaps, _merge),
    "blockdev-backup": (backup.BackupOptions, backup.prepare_backup),
    "drive-backup": (drive.DriveBackupOptions, drive.prepare_drive_backup),
    "blockdev-snapshot": (snapshots.OverlaySnapshot, snapshots.snapshot),
    "blockdev-snapshot-sync": (snapshots.FileSnapshot, snapshots.snapshot_sync),
    "blockdev-snapshot-internal-sync": (snapshots.InternalSnapshot, snapshots.internal_snapshot),
}


def transaction(live: Live, actions: Sequence[tuple[str, Any]], grouped: bool = False) -> list[Job]:
    """Do `actions`, pairs of a name of ACTIONS and its record of options; the jobs that were begun. With `grouped` all jobs fail if one
    does. Raises the first failure; all that was done before is taken back then."""
    if len(actions) > MAX_ACTIONS:
        raise Error("More than %d actions" % MAX_ACTIONS)
    undo: list[Undo] = []
    jobs: list[Job] = []
    with live.lock:
        with live.graph.drained():
            try:
                for name, options in actions:
                    done = ACTIONS[name][1](live, options)
                    if isinstance(done, backup.BackupJob):
                        jobs.append(done)
                        undo.append(done.drop)
                    else:
                        undo.append(done)
            except BaseException:
                for step in reversed(undo):
                    step()
                raise
            if grouped:
                for job in jobs:
                    job.group = jobs
            for job in jobs:
                job.start(held=True)
        for job in jobs:
            job.release()
    return jobs
