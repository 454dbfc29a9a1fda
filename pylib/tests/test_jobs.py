# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs on nodes that are written all the time: what is copied is what it should be, and nothing is lost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest

from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.jobs import backup, commit, creation, dirty, exports, mirror, nodes, snapshots, stream, transaction
from diskwright.jobs.live import Live
from diskwright.node import ALL, CONSISTENT_READ, RESIZE, WRITE
from diskwright.qmp.arguments import read
from diskwright.root import Root

SIZE = 8 << 20
CLUSTER = 64 << 10


def qemu_img(*args: object) -> str:
    return subprocess.run(["qemu-img", *map(str, args)], check=True, capture_output=True, text=True).stdout


class Writer:
    """A client that writes at random, and remembers what the disk should hold."""

    def __init__(self, live: Live, node: str, content: bytes, seed: int = 1, most: int = 40000, pause: float = 0.0005) -> None:
        self.root = Root(live.graph, node, CONSISTENT_READ | WRITE, ALL & ~RESIZE, "a client")
        self.model = bytearray(content)
        self.writes = 0
        self.failure: Optional[BaseException] = None
        self._random = random.Random(seed)
        self._most = most
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        rng = self._random
        try:
            while not self._stop.wait(self._pause):
                offset = rng.randrange(len(self.model))
                length = min(rng.randrange(1, self._most), len(self.model) - offset)
                if rng.random() < 0.8:
                    data = rng.randbytes(16) * (length // 16 + 1)
                    self.root.pwrite(offset, data[:length])
                    self.model[offset : offset + length] = data[:length]
                else:
                    self.root.pwrite_zeroes(offset, length, rng.random() < 0.5)
                    self.model[offset : offset + length] = bytes(length)
                self.writes += 1
        except BaseException as exc:
            self.failure = exc

    def wait(self, more: int = 20) -> None:
        """Until it has written so many times more."""
        until = self.writes + more
        while self.writes < until and self.failure is None:
            self._stop.wait(0.001)

    def stop(self) -> bytes:
        """What the disk should hold."""
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure
        return bytes(self.model)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.root.close()


@pytest.fixture
def live() -> Iterator[Live]:
    graph = Graph()
    living = Live(graph)
    yield living
    living.close()
    graph.close()


def pattern(size: int = SIZE, seed: int = 7) -> bytes:
    """Data, with zeroes in between."""
    rng = random.Random(seed)
    return b"".join(rng.choice((bytes(CLUSTER), rng.randbytes(64) * (CLUSTER // 64))) for _cluster in range(size // CLUSTER))


def image(live: Live, directory: Path, name: str, content: bytes = b"", backing: Optional[str] = None, **options: Any) -> Path:
    """A qcow2 image of SIZE bytes, open as the node `name`."""
    path = directory / (name + ".qcow2")
    below = () if backing is None else ("-b", directory / (backing + ".qcow2"), "-F", "qcow2")
    qemu_img("create", "-q", "-f", "qcow2", *below, path, SIZE)
    nodes.add(live, {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}, "backing": backing, **options})
    if content:
        with Root(live.graph, name, CONSISTENT_READ | WRITE) as root:
            for offset in range(0, len(content), CLUSTER):
                if any(content[offset : offset + CLUSTER]):
                    root.pwrite(offset, content[offset : offset + CLUSTER])
    return path


def content(live: Live, name: str) -> bytes:
    with Root(live.graph, name) as root:
        return root.pread(0, root.size)


def check(path: Path) -> None:
    """The image is consistent, says QEMU."""
    qemu_img("check", "-q", path)


def finish(live: Live, *paths: Path) -> None:
    live.close()
    live.graph.close()
    for path in paths:
        check(path)


def mirror_options(**values: Any) -> mirror.MirrorOptions:
    return mirror.MirrorOptions(**{"job_id": "j", "device": "disk", "target": "copy", "sync": "full", **values})


@pytest.mark.parametrize("mode", ["background", "write-blocking"])
def test_mirror_takes_over(live: Live, tmp_path: Path, mode: str) -> None:
    first = pattern()
    image(live, tmp_path, "disk", first)
    copy = image(live, tmp_path, "copy", pattern(seed=9))
    writer = Writer(live, "disk", first)
    try:
        job = mirror.mirror(live, mirror_options(copy_mode=mode))
        assert job.wait("ready") == "ready"
        writer.wait()
        before = writer.writes
        job.complete()
        assert job.wait() == "null" and job.failure is None
        assert writer.root.node.name == "copy"
        writer.wait()
        assert writer.writes > before
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
    finally:
        writer.close()
    assert content(live, "copy") == model
    finish(live, copy, tmp_path / "disk.qcow2")


def test_mirror_that_ends_softly_is_a_copy_of_one_moment(live: Live, tmp_path: Path) -> None:
    first = pattern()
    image(live, tmp_path, "disk", first)
    image(live, tmp_path, "copy")
    writer = Writer(live, "disk", first)
    try:
        job = mirror.mirror(live, mirror_options(granularity=4096))
        job.wait("ready")
        writer.wait()
        model = writer.stop()
        job.cancel(force=False)
        assert job.wait() == "null" and job.failure is None
        assert writer.root.node.name == "disk"
        assert content(live, "copy") == model == content(live, "disk")
    finally:
        writer.close()


def test_mirror_of_what_is_written_from_now_on(live: Live, tmp_path: Path) -> None:
    image(live, tmp_path, "disk", pattern())
    image(live, tmp_path, "copy")
    job = mirror.mirror(live, mirror_options(sync="none", granularity=CLUSTER))
    job.wait("ready")
    assert (job.current, job.total) == (0, 0)
    with Root(live.graph, job.top, CONSISTENT_READ | WRITE) as root:
        root.pwrite(5 * CLUSTER, b"x" * 10)
    job.cancel(force=False)
    job.wait()
    old = content(live, "disk")[5 * CLUSTER : 6 * CLUSTER]
    assert content(live, "copy") == bytes(5 * CLUSTER) + old + bytes(SIZE - 6 * CLUSTER)


def test_mirror_to_a_shorter_node(live: Live, tmp_path: Path) -> None:
    image(live, tmp_path, "disk")
    image(live, tmp_path, "copy")
    nodes.resize(live, None, "copy", SIZE // 2)
    job = mirror.mirror(live, mirror_options(auto_dismiss=False))
    assert job.wait("concluded") == "concluded"
    assert job.error == "Source and target image have different sizes"
    assert not [node for node in live.graph.named.values() if node.driver == "mirror_top"]


def commit_options(**values: Any) -> commit.CommitOptions:
    return commit.CommitOptions(**{"job_id": "j", "device": "top", **values})


def chain_of_three(live: Live, directory: Path) -> bytes:
    image(live, directory, "base", pattern(seed=1))
    image(live, directory, "mid", pattern(seed=2)[: SIZE // 2], backing="base")
    image(live, directory, "top", pattern(seed=3)[: SIZE // 4], backing="mid")
    return content(live, "top")


def test_commit_of_the_active_layer(live: Live, tmp_path: Path) -> None:
    first = chain_of_three(live, tmp_path)
    writer = Writer(live, "top", first)
    try:
        job = commit.commit(live, commit_options())
        assert job.wait("ready") == "ready"
        writer.wait()
        job.complete()
        assert job.wait() == "null" and job.error is None
        assert writer.root.node.name == "base"
        writer.wait()
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
    finally:
        writer.close()
    finish(live, tmp_path / "base.qcow2")


def test_commit_of_what_nobody_writes(live: Live, tmp_path: Path) -> None:
    first = chain_of_three(live, tmp_path)
    writer = Writer(live, "top", first)
    try:
        job = commit.commit(live, commit_options(top_node="mid", base_node="base", filter_node_name="between"))
        assert job.wait() == "null" and job.error is None
        assert live.node("top").backing is live.node("base")
        writer.wait()
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
    finally:
        writer.close()
    finish(live, tmp_path / "base.qcow2", tmp_path / "top.qcow2")
    assert "backing file: %s\n" % (tmp_path / "base.qcow2") in qemu_img("info", tmp_path / "top.qcow2")


@pytest.mark.parametrize("base", [None, "base"])
def test_stream(live: Live, tmp_path: Path, base: Optional[str]) -> None:
    first = chain_of_three(live, tmp_path)
    writer = Writer(live, "top", first)
    try:
        job = stream.stream(live, stream.StreamOptions(job_id="j", device="top", base_node=base, speed=64 << 20))
        assert job.wait() == "null" and job.error is None
        writer.wait()
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
        assert live.node("top").backing is (None if base is None else live.node(base))
    finally:
        writer.close()
    finish(live, tmp_path / "top.qcow2")
    raw = tmp_path / "raw"
    qemu_img("convert", "-O", "raw", tmp_path / "top.qcow2", raw)
    assert raw.read_bytes() == model


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


def test_snapshots_while_a_client_writes(live: Live, tmp_path: Path) -> None:
    first = pattern()
    image(live, tmp_path, "disk", first)
    writer = Writer(live, "disk", first)
    names = ["disk"]
    try:
        for number in range(3):
            writer.wait()
            name = "over%d" % number
            options = {"node_name": names[-1], "snapshot_file": str(tmp_path / (name + ".qcow2")), "snapshot_node_name": name}
            snapshots.snapshot_sync(live, snapshots.FileSnapshot(**options))
            names.append(name)
            assert writer.root.node.name == name
        writer.wait()
        job = commit.commit(live, commit_options(device="over2", base_node="disk"))
        job.wait("ready")
        job.complete()
        assert job.wait() == "null" and job.error is None
        assert writer.root.node.name == "disk"
        writer.wait()
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
    finally:
        writer.close()
    finish(live, tmp_path / "disk.qcow2")


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


def test_create_and_amend(live: Live, tmp_path: Path) -> None:
    path = tmp_path / "new.qcow2"
    job = creation.create(live, "c", {"driver": "file", "filename": str(path), "size": 0})
    assert job.wait() == "concluded" and job.error is None
    nodes.add(live, {"driver": "file", "node-name": "file", "filename": str(path)})
    options = {"driver": "qcow2", "file": "file", "size": SIZE, "cluster-size": 4096, "version": "v3", "compression-type": "zstd"}
    job = creation.create(live, "d", options)
    assert job.wait() == "concluded" and job.error is None
    nodes.add(live, {"driver": "qcow2", "node-name": "q", "file": "file"})
    assert live.node("q").size == SIZE and live.node("q").cluster_size == 4096
    nodes.add_object(live, {"qom-type": "secret", "id": "old", "data": "abc"})
    nodes.add_object(live, {"qom-type": "secret", "id": "new", "data": "def"})
    nodes.remove(live, "q")
    encrypt = {"format": "luks", "key-secret": "old", "iter-time": 10}
    assert creation.create(live, "e", {"driver": "qcow2", "file": "file", "size": SIZE, "encrypt": encrypt}).wait() == "concluded"
    nodes.add(live, {"driver": "qcow2", "node-name": "q", "file": "file", "encrypt": {"format": "luks", "key-secret": "old"}})
    change = {"format": "luks", "state": "active", "new-secret": "new", "iter-time": 10}
    job = creation.amend(live, "f", "q", {"driver": "qcow2", "encrypt": change})
    assert job.wait() == "concluded" and job.error is None
    nodes.remove(live, "q")
    nodes.add(live, {"driver": "qcow2", "node-name": "q", "file": "file", "encrypt": {"format": "luks", "key-secret": "new"}})
    with pytest.raises(Error, match="Cannot find device='' nor node-name='nope'"):
        creation.amend(live, "e", "nope", {"driver": "qcow2"})


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


def test_another_backing_node_and_another_throttle_group(live: Live, tmp_path: Path) -> None:
    nodes.add_object(live, {"qom-type": "throttle-group", "id": "slow", "limits": {"iops-total": 10}})
    nodes.add_object(live, {"qom-type": "throttle-group", "id": "fast", "limits": {"iops-total": 10000}})
    image(live, tmp_path, "base", pattern(seed=1))
    image(live, tmp_path, "other", pattern(seed=1))
    path = image(live, tmp_path, "top", pattern(seed=2)[: SIZE // 2], backing="base")
    nodes.add(live, {"driver": "throttle", "node-name": "t", "throttle-group": "slow", "file": "top"})
    first = content(live, "top")
    writer = Writer(live, "t", first)
    try:
        nodes.reopen(live, [{"driver": "throttle", "node-name": "t", "throttle-group": "fast", "file": "top"}])
        for backing in ("other", "base", "other"):
            writer.wait()
            nodes.reopen(live, [{"driver": "qcow2", "node-name": "top", "file": live.node("top").children["file"].name, "backing": backing}])
            assert live.node("top").backing is live.node(backing)
        with pytest.raises(Error, match="Failed to find node with node-name='nope'"):  # and all is as it was
            specs = [{"driver": "qcow2", "node-name": "top", "file": live.node("top").children["file"].name, "backing": "base"}]
            nodes.reopen(live, [*specs, {"driver": "raw", "node-name": "nope"}])
        assert live.node("top").backing is live.node("other")
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
    finally:
        writer.close()
    finish(live, path)


CRASH = """
import os, random, sys, threading, time
from diskwright.graph import Graph
from diskwright.jobs import backup, commit, mirror, nodes, stream
from diskwright.jobs.live import Live
from diskwright.node import ALL, CONSISTENT_READ, RESIZE, WRITE
from diskwright.qmp.arguments import read
from diskwright.root import Root

directory, kind = sys.argv[1:]
live = Live(Graph())
for name, backing in (("base", None), ("mid", "base"), ("disk", "mid"), ("copy", None)):
    file = {"driver": "file", "filename": os.path.join(directory, name)}
    nodes.add(live, {"driver": "qcow2", "node-name": name, "file": file, "backing": backing})
root = Root(live.graph, "disk", CONSISTENT_READ | WRITE, ALL & ~RESIZE)

def write():
    while True:
        root.pwrite(random.randrange(1 << 23) // 512 * 512, os.urandom(512) * 16)

writer = threading.Thread(target=write, daemon=True)
writer.start()
start = {
    "mirror": lambda: mirror.mirror(live, mirror.MirrorOptions(job_id="j", device="disk", target="copy", sync="full")),
    "backup": lambda: backup.backup(live, backup.BackupOptions(job_id="j", device="disk", target="copy", sync="full")),
    "stream": lambda: stream.stream(live, stream.StreamOptions(job_id="j", device="disk")),
    "commit": lambda: commit.commit(live, commit.CommitOptions(job_id="j", device="disk")),
}
job = start[kind]()
if kind in ("mirror", "commit"):
    job.wait("ready")
    job.complete()
while not job.current and job.status not in ("null", "concluded"):
    time.sleep(0.001)
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["mirror", "backup", "stream", "commit"])
def test_a_crash_leaves_images_that_are_clean_or_only_leak(tmp_path: Path, kind: str) -> None:
    size = (1 << 23) + CLUSTER
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base", size)
    subprocess.run(["qemu-io", "-c", "write -P 1 0 8M", tmp_path / "base"], check=True, capture_output=True)
    for name, backing in (("mid", "base"), ("disk", "mid")):
        qemu_img("create", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", tmp_path / name)
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "copy", size)
    subprocess.run([sys.executable, "-c", CRASH, tmp_path, kind], check=True)
    for name in ("base", "mid", "disk", "copy"):
        found = subprocess.run(["qemu-img", "check", tmp_path / name], capture_output=True, text=True, check=False)
        assert found.returncode in (0, 3), found.stdout + found.stderr


def test_what_fails_or_goes_far_is_told(live: Live, tmp_path: Path) -> None:
    spec = {"driver": "blkdebug", "node-name": "disk", "inject-error": [{"event": "none", "iotype": "read", "errno": 5, "sector": 0}]}
    nodes.add(live, {**spec, "image": {"driver": "null-co", "size": SIZE}})
    seen: list[dict[str, Any]] = []
    live.events.listen(seen.append)
    nodes.set_write_threshold(live, "disk", CLUSTER)
    with Root(live.graph, "disk", CONSISTENT_READ | WRITE) as root:
        with pytest.raises(OSError):
            root.pread(0, 512)
        for offset in (0, CLUSTER, 2 * CLUSTER):
            root.pwrite(offset, b"x" * 100)
    told = {"device": "", "qom-path": "", "node-name": "disk", "operation": "read", "action": "report", "nospace": False, "reason": "Input/output error"}
    far = {"node-name": "disk", "amount-exceeded": 100, "write-threshold": CLUSTER}
    assert [(event["event"], event["data"]) for event in seen] == [("BLOCK_IO_ERROR", told), ("BLOCK_WRITE_THRESHOLD", far)]


def test_a_broken_image_and_a_quorum_that_disagrees_are_told(live: Live, tmp_path: Path) -> None:
    path = image(live, tmp_path, "disk", pattern())
    nodes.remove(live, "disk")
    with path.open("r+b") as file:
        file.seek(40)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write((0x80 << 56 | 0x12345).to_bytes(8, "big"))
    nodes.add(live, {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}})
    seen: list[dict[str, Any]] = []
    live.events.listen(seen.append)
    with Root(live.graph, "disk", CONSISTENT_READ | WRITE) as root, pytest.raises(Error):
        root.pread(0, 512)
    corrupted = next(event["data"] for event in seen if event["event"] == "BLOCK_IMAGE_CORRUPTED")
    assert corrupted["node-name"] == "disk" and corrupted["fatal"] and "unaligned" in corrupted["msg"]
    for name, byte in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(byte * 4096)
        nodes.add(live, {"driver": "file", "node-name": name, "filename": str(tmp_path / name)})
    nodes.add(live, {"driver": "quorum", "node-name": "q", "children": ["a", "b", "c"], "vote-threshold": 2})
    nodes.add(live, {"driver": "quorum", "node-name": "q2", "children": ["a", "c"], "vote-threshold": 2})
    del seen[:]
    with Root(live.graph, "q") as root:
        assert root.pread(512, 1024) == b"1" * 1024
    with Root(live.graph, "q2") as root, pytest.raises(Error):
        root.pread(0, 4096)
    assert [(event["event"], event["data"]) for event in seen[:2]] == [
        ("QUORUM_REPORT_BAD", {"type": "read", "node-name": "c", "sector-num": 1, "sectors-count": 2}),
        ("QUORUM_FAILURE", {"reference": "q2", "sector-num": 0, "sectors-count": 8}),
    ]


def test_a_target_that_fails_stops_the_mirror_and_not_the_client(live: Live, tmp_path: Path) -> None:
    first = pattern()
    image(live, tmp_path, "disk", first)
    image(live, tmp_path, "inner")
    fault = {"event": "none", "iotype": "write", "errno": 5, "once": True}
    nodes.add(live, {"driver": "blkdebug", "node-name": "copy", "image": "inner", "inject-error": [fault]})
    writer = Writer(live, "disk", first)
    try:
        job = mirror.mirror(live, mirror_options(on_target_error="stop"))
        assert job.wait("paused", "ready", seconds=20) == "paused" and job.block_json()["io-status"] == "failed"
        writer.wait()
        job.resume()
        job.wait("ready")
        job.complete()
        assert job.wait() == "null" and job.error is None
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
    finally:
        writer.close()


def test_a_mirror_can_take_the_place_of_a_child(live: Live, tmp_path: Path) -> None:
    for name in ("a", "b", "c", "copy"):
        image(live, tmp_path, name, pattern() if name != "copy" else b"")
    nodes.add(live, {"driver": "quorum", "node-name": "disk", "children": ["a", "b", "c"], "vote-threshold": 2})
    writer = Writer(live, "disk", pattern())
    try:
        job = mirror.mirror(live, mirror_options(replaces="c"))
        job.wait("ready")
        job.complete()
        assert job.wait() == "null" and job.error is None
        assert live.node("disk").children["children.2"] is live.node("copy") and not live.node("c").parents
        writer.wait()
        model = writer.stop()
        assert content(live, "copy") == model == writer.root.pread(0, SIZE)
    finally:
        writer.close()


def test_a_slow_client_does_not_hold_the_graph_up(live: Live, tmp_path: Path) -> None:
    nodes.add_object(live, {"qom-type": "throttle-group", "id": "slow", "limits": {"bps-write": 1000}})
    image(live, tmp_path, "inner")
    image(live, tmp_path, "over", backing=None)
    nodes.add(live, {"driver": "throttle", "node-name": "disk", "throttle-group": "slow", "file": "inner"})
    with Root(live.graph, "disk", CONSISTENT_READ | WRITE) as root:
        root.pwrite(0, b"x" * 100000)
        slow = threading.Thread(target=root.pwrite, args=(0, b"y" * 100000))  # a minute and a half
        slow.start()
        while not live.graph.gate._inside:
            pass
        snapshots.snapshot(live, snapshots.OverlaySnapshot(node="disk", overlay="over"))
        slow.join()
        assert root.node.name == "over" and root.pread(0, 10) == b"y" * 10


def test_everything_at_once_over_nbd(live: Live, tmp_path: Path) -> None:
    """A disk that a client writes over NBD goes from image to image."""
    first = pattern()
    image(live, tmp_path, "disk", first)
    image(live, tmp_path, "copy")
    image(live, tmp_path, "save")
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    exports.start_server(live, read(exports.ServerOptions, {"addr": address}))
    dirty.add(live, dirty.NewBitmap(node="disk", name="b"))
    exports.add(live, read(exports.ExportOptions, {"type": "nbd", "id": "e", "node-name": "disk", "writable": True, "bitmaps": ["b"]}))
    outside = Live(Graph())
    server = {"type": "unix", "path": str(tmp_path / "nbd")}
    nodes.add(outside, {"driver": "nbd", "node-name": "remote", "server": server, "export": "disk"})
    writer = Writer(outside, "remote", first)
    try:
        writer.wait()
        with live.lock, live.graph.drained():
            moment = content(live, "disk")
            saving = backup.backup(live, backup_options(target="save", speed=64 << 20))
        assert saving.wait() == "null" and saving.error is None
        assert content(live, "save") == moment
        options = {"node_name": "disk", "snapshot_file": str(tmp_path / "over"), "snapshot_node_name": "over"}
        snapshots.snapshot_sync(live, snapshots.FileSnapshot(**options))
        writer.wait()
        streaming = stream.stream(live, stream.StreamOptions(job_id="s", device="over"))
        assert streaming.wait() == "null" and streaming.error is None
        writer.wait()
        job = mirror.mirror(live, mirror_options(device="over"))
        job.wait("ready")
        job.complete()
        assert job.wait() == "null" and job.error is None
        writer.wait()
        assert exports.listing(live)[0]["node-name"] == "copy"
        with pytest.raises(Error, match="still in use"):
            exports.remove(live, "e")
        model = writer.stop()
        assert writer.root.pread(0, SIZE) == model
    finally:
        writer.close()
        outside.close()
        outside.graph.close()
    exports.remove(live, "e", "hard")
    assert content(live, "copy") == model
    finish(live, tmp_path / "copy.qcow2", tmp_path / "disk.qcow2")


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


def test_what_is_dirty_is_counted(live: Live, tmp_path: Path) -> None:
    nodes.add(live, {"driver": "null-co", "node-name": "disk", "size": 3 * (1 << 30) + 512, "read-zeroes": True})
    nodes.add(live, {"driver": "null-co", "node-name": "copy", "size": 3 * (1 << 30) + 512})
    job = mirror.mirror(live, mirror_options(sync="none", granularity=4096))
    job.wait("ready")
    job.pause()
    top = job.top
    rng = random.Random(3)
    for _change in range(400):
        offset = rng.randrange(top.size - 1)
        length = rng.randrange(1, min(top.size - offset, rng.choice((100, 100000, 1 << 30))) + 1)
        if rng.random() < 0.6:
            top.mark(offset, length)
        else:
            top.take(offset, length)
        assert top.remaining() == sum(count for _offset, count in top.bits.runs())
    job.cancel()
    job.wait()
