# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Mirrors, commits, streams and snapshots of nodes that are written all the time: what is copied is what it should be, and nothing is lost."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
from living import CLUSTER, SIZE, Writer, content, finish, image, pattern, qemu_img

from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.jobs import backup, commit, creation, dirty, exports, mirror, nodes, snapshots, stream
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
            saving = backup.backup(live, backup.BackupOptions(job_id="save", device="disk", target="save", sync="full", speed=64 << 20))
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
