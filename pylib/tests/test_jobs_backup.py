# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Backups, dirty bitmaps and transactions of nodes that are written all the time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from living import CLUSTER, SIZE, Writer, content, finish, image, pattern, qemu_img

from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.jobs import backup, dirty, exports, nodes, snapshots, transaction
from diskwright.jobs.live import Live
from diskwright.node import CONSISTENT_READ, WRITE
from diskwright.qmp.arguments import read
from diskwright.root import Root


@pytest.fixture
def live() -> Iterator[Live]:
    graph = Graph()
    living = Live(graph)
    yield living
    living.close()
    graph.close()


def backup_options(**values: Any) -> backup.BackupOptions:
    return backup.BackupOptions(**{"job_id": "j", "device": "disk", "target": "copy", "sync": "full", **values})


@pytest.mark.parametrize("compress", [False, True])
def test_backup_has_what_was_there_when_it_began(live: Live, tmp_path: Path, compress: bool) -> None:
    first = pattern()
    image(live, tmp_path, "disk", first)
    copy = image(live, tmp_path, "copy")
    writer = Writer(live, "disk", first, pause=0.001)
    try:
        with live.lock, live.graph.drained():
            moment = bytes(writer.root.pread(0, SIZE))
            job = backup.backup(live, backup_options(compress=compress, speed=32 << 20))
        assert job.wait() == "null" and job.error is None
        assert content(live, "copy") == moment
        writer.wait()
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model != moment
    finally:
        writer.close()
    finish(live, copy, tmp_path / "disk.qcow2")


def test_backup_of_a_cancelled_job_leaves_the_disk_alone(live: Live, tmp_path: Path) -> None:
    first = pattern()
    image(live, tmp_path, "disk", first)
    copy = image(live, tmp_path, "copy")
    writer = Writer(live, "disk", first)
    try:
        job = backup.backup(live, backup_options(speed=CLUSTER))
        writer.wait()
        job.cancel()
        assert job.wait() == "null" and job.error == "Operation canceled"
        assert writer.root.node.name == "disk"
        writer.wait()
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
    finally:
        writer.close()
    finish(live, copy, tmp_path / "disk.qcow2")


@pytest.mark.parametrize("persistent", [False, True])
def test_incremental_backups_while_a_client_writes(live: Live, tmp_path: Path, persistent: bool) -> None:
    first = pattern()
    image(live, tmp_path, "disk", first)
    image(live, tmp_path, "copy")
    writer = Writer(live, "disk", first, most=3000, pause=0.01)
    try:
        with live.lock, live.graph.drained():
            dirty.add(live, dirty.NewBitmap(node="disk", name="b", persistent=persistent))
            backup.backup(live, backup_options(job_id="full"))
        live.jobs.find("full").wait()
        for number in range(3):
            writer.wait()
            with live.lock, live.graph.drained():
                moment = bytes(writer.root.pread(0, SIZE))
                marked = sum(count for _offset, count in live.bitmap(live.node("disk"), "b").runs())
                job = backup.backup(live, backup_options(job_id="i%d" % number, sync="incremental", bitmap="b"))
                assert job.total == marked
            assert job.wait() == "null" and job.error is None
            assert content(live, "copy") == moment
        writer.stop()
    finally:
        writer.close()
    finish(live, tmp_path / "disk.qcow2")


def test_a_failed_incremental_backup_keeps_the_bits(live: Live, tmp_path: Path) -> None:
    image(live, tmp_path, "disk", pattern())
    image(live, tmp_path, "copy")
    dirty.add(live, dirty.NewBitmap(node="disk", name="b"))
    with Root(live.graph, "disk", CONSISTENT_READ | WRITE) as root:
        for cluster in (1, 5, 9, 40):
            root.pwrite(cluster * CLUSTER, b"y")
    marked = live.bitmap(live.node("disk"), "b").runs()
    client = Root(live.graph, "disk", CONSISTENT_READ | WRITE)
    for mode, left in (("on-success", 4), ("always", None), ("never", None)):
        sync = "incremental" if mode == "on-success" else "bitmap"
        job = backup.backup(live, backup_options(sync=sync, bitmap="b", bitmap_mode=mode, speed=1))
        client.pwrite(50 * CLUSTER, b"z")
        with pytest.raises(Error, match="Permission conflict on node 'disk'"):  # it would be written past the job
            Root(live.graph, "disk", CONSISTENT_READ | WRITE)
        while not job.current:
            job.sleep(0.01)
        with pytest.raises(Error, match="currently in use by another operation"):
            dirty.clear(live, dirty.BitmapName(node="disk", name="b"))
        job.cancel()
        assert job.wait() == "null"
        runs = live.bitmap(live.node("disk"), "b").runs()
        if left is not None:
            assert runs == [*marked, (50 * CLUSTER, CLUSTER)]
        elif mode == "always":
            assert sum(count for _offset, count in runs) < 5 * CLUSTER and runs[-1][0] == 50 * CLUSTER
            kept = runs
        else:
            assert runs == kept
    client.close()


def test_backup_of_the_top_layer_alone(live: Live, tmp_path: Path) -> None:
    image(live, tmp_path, "base", pattern(seed=1))
    image(live, tmp_path, "disk", backing="base")
    image(live, tmp_path, "copy", backing="base")
    with Root(live.graph, "disk", CONSISTENT_READ | WRITE) as root:
        root.pwrite(3 * CLUSTER, b"new" * 1000)
    job = backup.backup(live, backup_options(sync="top"))
    assert job.wait() == "null" and job.error is None
    assert content(live, "copy") == content(live, "disk")
    allocated = [(e.offset, e.length) for e in live.node("copy").block_status(0, SIZE, False) if e.status & 0x10]
    assert allocated == [(3 * CLUSTER, CLUSTER)]


def test_backup_of_what_is_written_keeps_a_moment(live: Live, tmp_path: Path) -> None:
    first = pattern()
    image(live, tmp_path, "disk", first)
    qemu_img("create", "-q", "-f", "qcow2", "-b", tmp_path / "disk.qcow2", "-F", "qcow2", tmp_path / "copy.qcow2")
    nodes.add(live, {"driver": "qcow2", "node-name": "copy", "file": {"driver": "file", "filename": str(tmp_path / "copy.qcow2")}, "backing": "disk"})
    writer = Writer(live, "disk", first)
    try:
        with live.lock, live.graph.drained():
            moment = writer.root.pread(0, SIZE)
            job = backup.backup(live, backup_options(sync="none"))
        for _look in range(3):
            writer.wait()
            assert content(live, "copy") == moment
        job.cancel()
        job.wait()
        assert live.node("copy").backing is live.node("disk")
    finally:
        writer.close()


def test_a_transaction_is_one_moment_for_all(live: Live, tmp_path: Path) -> None:
    first = pattern()
    for name in ("disk", "second", "copy", "copy2"):
        image(live, tmp_path, name, first if name in ("disk", "second") else b"")
    writer = Writer(live, "disk", first)
    try:
        writer.wait()
        with live.lock, live.graph.drained():
            moment = writer.root.pread(0, SIZE)
            actions: list[tuple[str, Any]] = [
                ("block-dirty-bitmap-add", dirty.NewBitmap(node="disk", name="b")),
                ("blockdev-backup", backup_options(job_id="one")),
                ("blockdev-backup", backup_options(job_id="two", device="second", target="copy2")),
            ]
            jobs = transaction.transaction(live, actions, grouped=True)
        assert [job.wait() for job in jobs] == ["null", "null"]
        assert content(live, "copy") == moment and content(live, "copy2") == first
        with pytest.raises(Error, match="Transaction aborted using Abort action"):
            options = {"node_name": "disk", "snapshot_file": str(tmp_path / "over.qcow2"), "snapshot_node_name": "over"}
            abort = transaction.Abort()
            transaction.transaction(live, [("blockdev-snapshot-sync", snapshots.FileSnapshot(**options)), ("abort", abort)])
        assert writer.root.node.name == "disk" and not (tmp_path / "over.qcow2").exists()
        writer.wait()
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
    finally:
        writer.close()


def test_one_that_fails_takes_its_group_with_it(live: Live, tmp_path: Path) -> None:
    for name in ("disk", "second", "copy", "copy2"):
        image(live, tmp_path, name, pattern())
    actions = [
        ("blockdev-backup", backup_options(job_id="one")),
        ("blockdev-backup", backup_options(job_id="two", device="second", target="copy2", speed=1)),
    ]
    jobs = transaction.transaction(live, actions, grouped=True)
    assert jobs[0].wait("waiting") == "waiting"
    jobs[1].cancel()
    assert [job.wait() for job in jobs] == ["null", "null"]
    assert [job.error for job in jobs] == ["Operation canceled"] * 2


def test_a_pause_holds_a_job(live: Live, tmp_path: Path) -> None:
    image(live, tmp_path, "disk", pattern())
    image(live, tmp_path, "copy")
    job = backup.backup(live, backup_options(speed=1 << 20))
    job.pause()
    assert job.status == "paused"
    done = job.current
    job.changed.acquire()
    job.changed.release()
    assert job.current == done
    job.set_speed(0)
    job.resume()
    assert job.wait() == "null" and job.error is None


def test_no_space_stops_a_job_until_it_is_told_to_go_on(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(live, tmp_path, "disk", pattern())
    image(live, tmp_path, "copy")
    target = live.node("copy")
    full = threading.Event()
    full.set()

    def refuse(self: Any, offset: int, length: int) -> Any:
        if full.is_set():
            raise OSError(28, "No space left on device")
        return type(target)._alloc(target, offset, length)

    monkeypatch.setattr(target, "_alloc", refuse.__get__(target))
    seen: list[str] = []
    live.events.listen(lambda event: seen.append(event["event"]))
    job = backup.backup(live, backup_options(on_target_error="enospc"))
    assert job.wait("paused") == "paused"
    assert job.block_json()["io-status"] == "nospace" and "BLOCK_JOB_ERROR" in seen
    full.clear()
    job.resume()
    assert job.wait() == "null" and job.error is None
    assert content(live, "copy") == content(live, "disk")


def test_a_bitmap_in_memory_can_be_exported(live: Live, tmp_path: Path) -> None:
    image(live, tmp_path, "disk")
    dirty.add(live, dirty.NewBitmap(node="disk", name="b"))
    with Root(live.graph, "disk", CONSISTENT_READ | WRITE) as root:
        root.pwrite(3 * CLUSTER + 5, b"x")
    dirty.disable(live, dirty.BitmapName(node="disk", name="b"))
    exports.start_server(live, read(exports.ServerOptions, {"addr": {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}}))
    exports.add(live, read(exports.ExportOptions, {"type": "nbd", "id": "e", "node-name": "disk", "bitmaps": ["b"]}))
    words = "driver=nbd,export=disk,server.type=unix,server.path=%s,x-dirty-bitmap=qemu:dirty-bitmap:b" % (tmp_path / "nbd")
    found = json.loads(qemu_img("map", "--output=json", "--image-opts", words))
    assert [(part["start"], part["length"]) for part in found if not part["data"]] == [(3 * CLUSTER, CLUSTER)]


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_two_backups_of_one_disk(live: Live, tmp_path: Path, first_ends_first: bool) -> None:
    first = pattern()
    for name in ("disk", "copy", "copy2"):
        image(live, tmp_path, name, first if name == "disk" else b"")
    writer = Writer(live, "disk", first)
    jobs = []
    moments = []
    try:
        for name, speed in (("copy", 64 << 20 if first_ends_first else 16 << 20), ("copy2", 32 << 20)):
            with live.lock, live.graph.drained():
                moments.append(writer.root.pread(0, SIZE))
                jobs.append(backup.backup(live, backup_options(job_id=name, target=name, speed=speed)))
            writer.wait(5)
        for job in jobs if first_ends_first else reversed(jobs):
            assert job.wait() == "null" and job.error is None
        assert [content(live, name) for name in ("copy", "copy2")] == moments
        assert writer.root.node.name == "disk"
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
    finally:
        writer.close()
