# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""copy-before-write and snapshot-access: whatever is written, what is read of the moment is what was there."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from threading import Thread
from typing import Any, Optional

import pytest

import diskwright
from diskwright.errors import Error, Unsupported
from diskwright.graph import Graph
from diskwright.hooks import CONSISTENT_READ, WRITE, OpenFlags
from diskwright.moment import Moment
from diskwright.node import Node
from diskwright.objects import add_object
from diskwright.root import Root
from side_by_side import same, setup

K = 1024
SIZE = 2 * K * K
UNIT = 64 * K
WRITABLE = OpenFlags(writable=True, resize=True, unmap=True)
CONTENT = random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 4) + random.Random(2).randbytes(SIZE // 4)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").write_bytes(CONTENT)
    setup("qemu-img create -q -f qcow2 target 2M; qemu-img create -q -f qcow2 small 2M -o cluster_size=4k", tmp_path)
    return tmp_path


def file(name: str, driver: str = "raw") -> dict[str, Any]:
    return {"driver": driver, "file": {"driver": "file", "filename": name}}


def open_pair(options: Optional[dict[str, Any]] = None, source: Any = None, target: Any = None, objects: str = "") -> tuple[Node, Node]:
    """A copy-before-write node, and a snapshot-access node over it; closing the second closes both."""
    found: dict[str, Any] = {}
    if objects:
        add_object(found, objects)
    spec = {"driver": "copy-before-write", "file": source or file("disk"), "target": target or file("target", "qcow2"), **(options or {})}
    access = Graph(objects=found).open_spec({"driver": "snapshot-access", "file": spec}, WRITABLE)
    return access.children["file"], access


def test_what_is_written_is_copied_first(place: Path) -> None:
    disk, access = open_pair()
    with access:
        disk.pwrite(100, b"x" * 10)
        disk.pwrite_zeroes(5 * UNIT, 3 * UNIT)
        disk.pdiscard(10 * UNIT + 1, UNIT)
        disk.pwrite(SIZE - 1, b"y")
        disk.pwrite(SIZE // 2 + 5, b"z")
        assert disk.pread(98, 14) == CONTENT[98:100] + b"x" * 10 + CONTENT[110:112]
        assert access.pread(0, SIZE) == CONTENT
        assert access.size == SIZE
        for call in (lambda: access.pwrite(0, b"x"), lambda: access.pwrite_zeroes(0, 512), lambda: access.truncate(512)):
            with pytest.raises(Unsupported):
                call()
    copied = {run.start // UNIT for run in diskwright.map("target") if run.depth == 0 and run.present}
    assert copied == {0, 5, 10, 16, 31}
    assert (place / "disk").read_bytes()[100:110] == b"x" * 10


def test_a_disk_that_shrinks_is_copied_first(place: Path) -> None:
    disk, access = open_pair()
    with access:
        disk.truncate(UNIT // 2)
        disk.truncate(SIZE)
        disk.truncate(SIZE + UNIT)
        disk.pwrite(SIZE, b"beyond")
        assert access.pread(0, SIZE) == CONTENT


@pytest.mark.parametrize("unit", [0, 1 << 18])
def test_writers_and_readers_at_once(place: Path, unit: int) -> None:
    disk, access = open_pair({"min-cluster-size": unit}, target=file("small", "qcow2"))
    wrong: list[str] = []

    def write(seed: int) -> None:
        chance = random.Random(seed)
        for _number in range(60):
            offset = chance.randrange(SIZE)
            data = bytes([seed]) * min(chance.choice((1, 4096, 70 * K)), SIZE - offset)
            chance.choice((lambda: disk.pwrite(offset, data), lambda: disk.pwrite_zeroes(offset, len(data)), lambda: disk.pdiscard(offset, len(data))))()

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _number in range(60):
            offset = chance.randrange(SIZE)
            length = min(chance.choice((1, 4096, 300 * K)), SIZE - offset)
            if access.pread(offset, length) != CONTENT[offset : offset + length]:
                wrong.append("%d bytes at %#x" % (length, offset))
            access.block_status(offset, length)

    def copy() -> None:
        moment = disk.moment  # type: ignore[attr-defined]
        run = moment.pending()
        while run is not None:
            moment.copy(run[0], min(run[1], UNIT))
            run = moment.pending(run[0])

    threads = [Thread(target=write, args=(seed,)) for seed in range(1, 5)] + [Thread(target=read, args=(seed,)) for seed in range(3)] + [Thread(target=copy)]
    with access:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert access.pread(0, SIZE) == CONTENT
        assert disk.moment.remaining() == 0 and disk.moment.copied == SIZE  # type: ignore[attr-defined]
    with diskwright.open("small", format="qcow2") as node:
        assert node.pread(0, SIZE) == CONTENT


def test_a_range_that_nobody_wants_any_more(place: Path) -> None:
    disk, access = open_pair()
    with access:
        disk.pwrite(0, b"x")
        access.pdiscard(0, 3 * UNIT + 1)
        disk.pwrite(2 * UNIT, b"x")
        for offset, length in ((0, 1), (2 * UNIT, 1), (3 * UNIT - 1, 2)):
            with pytest.raises(Error) as caught:
                access.pread(offset, length)
            assert caught.value.errno == errno.EACCES
        assert access.pread(3 * UNIT, UNIT) == CONTENT[3 * UNIT : 4 * UNIT]
        with pytest.raises(Error):
            access.block_status(0, SIZE)
    with diskwright.open("target", format="qcow2") as node:
        assert not any(node.pread(0, SIZE))


def test_only_what_is_dirty(place: Path) -> None:
    setup("qemu-img convert -f raw -O qcow2 disk image; qemu-img bitmap --add image b; qemu-io -c 'write -P 1 200k 100k' image", place)
    source = {**file("image", "qcow2"), "node-name": "image"}
    disk, access = open_pair({"bitmap": {"node": "image", "name": "b"}}, source)
    with access:
        assert access.pread(192 * K, UNIT) == CONTENT[192 * K : 200 * K] + b"\1" * (56 * K)
        disk.pwrite(0, b"x" * SIZE)
        assert access.pread(192 * K, UNIT) == CONTENT[192 * K : 200 * K] + b"\1" * (56 * K)
        with pytest.raises(Error) as caught:
            access.pread(0, 1)
        assert caught.value.errno == errno.EACCES
    for options in ({"node": "image", "name": "c"}, {"node": "other", "name": "b"}, {"node": "image"}):
        with pytest.raises(Error, match="Dirty bitmap 'c' not found|Node 'other' not found|Parameter 'bitmap.name' is missing"):
            open_pair({"bitmap": options}, source)


def test_nobody_writes_past_the_filter(place: Path) -> None:
    graph = Graph()
    for spec in (
        {"node-name": "disk", **file("disk")},
        {"node-name": "target", **file("target", "qcow2")},
        {"node-name": "live", "driver": "copy-before-write", "file": "disk", "target": "target"},
        {"node-name": "moment", "driver": "snapshot-access", "file": "live"},
    ):
        graph.add(spec)
    try:
        other = Root(graph, "disk", WRITE)  # nobody uses the moment yet
        other.close()
        reader, writer = Root(graph, "moment", CONSISTENT_READ), Root(graph, "live", WRITE)
        with pytest.raises(Error, match="permissions 'write' are both required by .* and unshared by node 'live' .uses node 'disk' as 'file' child."):
            Root(graph, "disk", WRITE)
        writer.pwrite(0, b"x")
        assert reader.pread(0, 512) == CONTENT[:512]
        for user in (reader, writer):
            user.close()
    finally:
        graph.close()


def test_a_target_that_fails(place: Path) -> None:
    """With break-guest-write the write fails, and the moment stays; with break-snapshot it is the other way round."""
    setup("truncate -s 1M short", place)  # what is beyond cannot be copied
    target = {"driver": "raw", "size": K * K, "file": {"driver": "file", "filename": "short"}}
    disk, access = open_pair(target=target)
    with access:
        disk.pwrite(0, b"x")
        with pytest.raises(Error):
            disk.pwrite(SIZE - 1, b"x")
        assert access.pread(0, SIZE) == CONTENT
        assert disk.pread(SIZE - 1, 1) == CONTENT[-1:]
    (place / "disk").write_bytes(CONTENT)
    disk, access = open_pair({"on-cbw-error": "break-snapshot"}, target=target)
    with access:
        disk.pwrite(0, b"x")
        assert access.pread(0, 1) == CONTENT[:1]
        disk.pwrite(SIZE - 1, b"x")
        disk.pwrite(0, b"y")
        with pytest.raises(Error) as caught:
            access.pread(0, 1)
        assert caught.value.errno == errno.EACCES


def test_a_target_that_is_too_slow(place: Path) -> None:
    """The copy goes on all the same, and is there in the end."""
    slow = {"driver": "null-co", "size": SIZE, "latency-ns": 120_000_000}
    for breaks in (False, True):
        with Graph().open_spec(file("disk"), WRITABLE) as source, Graph().open_spec(slow, WRITABLE) as target:
            moment = Moment(source, target, timeout=0.05, breaks=breaks)
            if breaks:
                moment.before_write(0, 1)
                assert getattr(moment.broken, "errno", 0) == errno.ETIMEDOUT
            else:
                with pytest.raises(Error) as caught:
                    moment.before_write(0, 1)
                assert caught.value.errno == errno.ETIMEDOUT
            moment.wait()
            assert moment.copied == UNIT
            moment.before_write(0, UNIT)


def test_a_compressed_copy(place: Path) -> None:
    with Graph().open_spec(file("disk"), WRITABLE) as source, Graph().open_spec(file("small", "qcow2"), WRITABLE) as target:
        source.pwrite(0, b"\1" * (300 * K))
        moment = Moment(source, target, compress=True)
        moment.exclude(UNIT, 2 * UNIT + 5)
        moment.copy(0, SIZE)
        assert moment.remaining() == 0 and moment.pending() is None and moment.copied == SIZE - 2 * UNIT
        assert target.pread(0, SIZE) == source.pread(0, UNIT) + bytes(2 * UNIT) + source.pread(3 * UNIT, SIZE - 3 * UNIT)
    assert next(iter(diskwright.map("small"))).compressed


CBW = "driver=copy-before-write,file.driver=raw,file.file.driver=file,file.file.filename=disk,target.driver=qcow2,target.file.driver=file"
ACCESS = "driver=snapshot-access,file.driver=raw,file.file.driver=file,file.file.filename=disk"


@pytest.mark.parametrize(
    "options",
    [
        "driver=copy-before-write,file.driver=raw,file.file.driver=file,file.file.filename=disk",
        *(CBW + ",target.file.filename=target," + more for more in ("", "min-cluster-size=3k", "on-cbw-error=none", "bitmap.node=a,bitmap.name=b", "bogus=1")),
        ACCESS,
        "driver=snapshot-access",
        ACCESS + ",bogus=1",
    ],
)
def test_refused_as_by_qemu_img(place: Path, options: str) -> None:
    same("info --image-opts " + options, place)


@pytest.mark.parametrize("command", ["info", "info --output=json", "map", "convert -O qcow2"])
def test_read_by_commands_as_by_qemu_img(place: Path, command: str) -> None:
    same(command + " --image-opts " + ACCESS + (" out" if command.startswith("convert") else ""), place)
