# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Filters over raw and qcow2: whatever is written through them is read through them, and read by qemu-img without them."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags
from diskwright.node import Node
from diskwright.objects import add_object
from side_by_side import same, setup, theirs

K = 1024
SIZE = 2 << 20
WRITABLE = OpenFlags(writable=True, resize=True, unmap=True)

GALLERY = r"""
qemu-img create -q -f raw base 1M; qemu-io -f raw -c 'write -P 1 0 300k' base
qemu-img create -q -f raw raw 2M
qemu-img create -q -f qcow2 -o cluster_size=16k plain 2M
qemu-img create -q -f qcow2 -o cluster_size=16k -b base -F raw overlay 2M
qemu-img create -q -f raw copy 2M
"""

FILES = {name: {"driver": "file", "filename": name} for name in ("raw", "plain", "overlay", "copy")}
CHILDREN = {
    "raw": {"driver": "raw", "file": FILES["raw"]},
    "plain": {"driver": "qcow2", "file": FILES["plain"]},
    "overlay": {"driver": "qcow2", "file": FILES["overlay"]},
}
FILTERS: dict[str, dict[str, Any]] = {
    "compress": {"driver": "compress"},
    "copy-on-read": {"driver": "copy-on-read"},
    "preallocate": {"driver": "preallocate", "prealloc-size": 1 << 20},
    "throttle": {"driver": "throttle", "throttle-group": "g"},
}
PAIRS = [(name, child) for name in FILTERS for child in CHILDREN if (name, child) != ("compress", "raw")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    setup(GALLERY, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_spec(spec: dict[str, Any], flags: OpenFlags = WRITABLE) -> Node:
    objects: dict[str, Any] = {}
    add_object(objects, "throttle-group,id=g,x-iops-total=1000000")
    return Graph(objects=objects).open_spec(spec, flags)


def content(name: str) -> bytearray:
    with diskwright.open(name, format="raw" if name == "raw" else "qcow2") as node:
        return bytearray(node.pread(0, node.size))


def exercise(node: Node, model: bytearray, chance: random.Random, operations: int = 120) -> None:
    """Random operations on a node and on what it is to hold."""
    for _number in range(operations):
        offset = chance.randrange(len(model))
        length = min(chance.choice((1, 512, 4096, 16 * K, 50 * K, 200 * K)), len(model) - offset)
        kind = chance.randrange(5)
        if kind < 2:
            data = chance.choice((chance.randbytes(length), bytes(length), b"\7" * length))
            node.pwrite(offset, data)
            model[offset : offset + length] = data
        elif kind == 2:
            node.pwrite_zeroes(offset, length, chance.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif kind == 3:
            assert node.pread(offset, length) == model[offset : offset + length]
        else:
            extents = node.block_status(offset, length)
            assert sum(extent.length for extent in extents) == length
            node.flush()


@pytest.mark.parametrize("name,child", PAIRS)
def test_what_is_written_is_read(place: Path, name: str, child: str) -> None:
    model = content(child)
    with open_spec({**FILTERS[name], "file": CHILDREN[child]}) as node:
        exercise(node, model, random.Random(name + child))
        assert node.pread(0, node.size) == model
    (place / "expected").write_bytes(model)
    assert theirs(["compare", "-f", "raw", "-F", "raw" if child == "raw" else "qcow2", "expected", child], place).code == 0
    if child != "raw":
        assert theirs(["check", "-q", child], place).code == 0


@pytest.mark.parametrize("name,child", PAIRS)
def test_described_as_by_qemu_img(place: Path, name: str, child: str) -> None:
    file = "file.driver=raw,file.file.driver=file,file.file.filename=raw"
    if child != "raw":
        file = "file.driver=qcow2,file.file.driver=file,file.file.filename=" + child
    options = ",".join("%s=%s" % pair for pair in FILTERS[name].items())
    objects = "--object throttle-group,id=g,x-iops-total=1000000 "
    for command in ("info", "info --output=json", "map --output=json", "check", "measure -O qcow2"):
        same("%s %s --image-opts %s,%s" % (command, objects, options, file), place)


def test_compress_stores_compressed_clusters(place: Path) -> None:
    with open_spec({"driver": "compress", "file": CHILDREN["plain"]}) as node:
        node.pwrite(0, b"\1" * (500 * K))
        node.pwrite(100, b"\2" * 100)
    clusters = diskwright.map("plain", format="qcow2")
    assert all(run.compressed for run in clusters if run.start < 500 * K)
    assert os.stat("plain").st_size < 200 * K


def test_copy_on_read_copies_what_is_read_and_no_more(place: Path) -> None:
    expected = content("overlay")
    with open_spec({"driver": "copy-on-read", "file": CHILDREN["overlay"]}) as node:
        assert node.pread(0, 32 * K) == expected[: 32 * K]
        assert node.pread(290 * K, 20 * K) == expected[290 * K : 310 * K]
        node.pread(1 << 20, 512)
    subprocess.run(["qemu-img", "check", "-q", "overlay"], check=True)
    (place / "base").unlink()
    with open_spec({**CHILDREN["overlay"], "backing": None}, OpenFlags()) as node:
        assert node.pread(0, 32 * K) == expected[: 32 * K]
        assert node.pread(288 * K, 32 * K) == expected[288 * K : 320 * K]
        assert not any(node.pread(32 * K, 256 * K))


def test_preallocate_cuts_the_file_at_the_end(place: Path) -> None:
    spec = {"driver": "qcow2", "file": {"driver": "preallocate", "prealloc-align": 1 << 20, "prealloc-size": 8 << 20, "file": FILES["plain"]}}
    with open_spec(spec) as node:
        node.pwrite(0, b"\1" * K)
        assert os.stat("plain").st_size >= 8 << 20
        assert os.stat("plain").st_size % (1 << 20) == 0
        node.pwrite(1 << 20, b"\2" * K)
        assert os.stat("plain").st_size <= 10 << 20
    assert os.stat("plain").st_size < 1 << 20
    assert content("plain")[: 2 * K] == b"\1" * K + bytes(K)
    assert theirs(["check", "-q", "plain"], place).code == 0


def test_blkverify_finds_the_first_difference(place: Path) -> None:
    spec = {"driver": "blkverify", "test": CHILDREN["plain"], "raw": FILES["copy"]}
    model = bytearray(SIZE)
    with open_spec(spec) as node:
        exercise(node, model, random.Random(5))
        assert node.pread(0, SIZE) == model
    assert (place / "copy").read_bytes() == model == content("plain")
    with open("copy", "r+b") as file:
        os.pwrite(file.fileno(), bytes([model[70000] ^ 1]), 70000)
    with open_spec(spec) as node:
        assert node.pread(0, 60000) == model[:60000]
        with pytest.raises(Error, match="blkverify: read offset=65536 bytes=8192 contents mismatch at offset 70000"):
            node.pread(65536, 8192)
    same("info -f raw blkverify:copy:plain", place)
    same("info blkverify:copy", place)
    same(
        "info --output=json --image-opts driver=blkverify,test.driver=qcow2,test.file.driver=file,test.file.filename=plain,raw.driver=file,raw.filename=copy",
        place,
    )


QUORUM = "driver=quorum,children.0.driver=file,children.0.filename=raw,children.1.driver=file,children.1.filename=copy"


def quorum(*names: str, **options: Any) -> dict[str, Any]:
    return {"driver": "quorum", "children": [FILES[name] for name in names], **options}


def test_quorum_reads_what_most_say(place: Path) -> None:
    model = bytearray(SIZE)
    third = {"driver": "qcow2", "file": FILES["plain"]}
    spec = {"driver": "quorum", "vote-threshold": 2, "children": [FILES["raw"], FILES["copy"], third]}
    with open_spec(spec) as node:
        exercise(node, model, random.Random(6))
    assert (place / "raw").read_bytes() == (place / "copy").read_bytes() == content("plain") == model
    with open("copy", "r+b") as file:
        os.pwrite(file.fileno(), b"\xa5" * 5000, 70000)
    damaged = (place / "copy").read_bytes()
    assert damaged != model
    with open_spec(spec, OpenFlags()) as node:
        assert node.pread(0, SIZE) == model
    assert (place / "copy").read_bytes() == damaged
    with open_spec({**spec, "rewrite-corrupted": True}) as node:
        assert node.pread(69000, 10000) == model[69000:79000]
    assert (place / "copy").read_bytes() == model


def test_quorum_without_a_majority(place: Path) -> None:
    with open("copy", "r+b") as file:
        os.pwrite(file.fileno(), b"\xa5", 70000)
    with open_spec(quorum("raw", "copy", **{"vote-threshold": 2})) as node:
        with pytest.raises(Error, match="Input/output error"):
            node.pread(69000, 10000)
    with open_spec(quorum("raw", "copy", **{"vote-threshold": 2, "blkverify": True})) as node:
        with pytest.raises(Error, match="quorum: offset=69632 bytes=[0-9]+ contents mismatch at offset 70000"):
            node.pread(69000, 10000)
    with open_spec(quorum("copy", "raw", **{"vote-threshold": 1, "read-pattern": "fifo"})) as node:
        assert node.pread(70000, 1) == b"\xa5"


def test_quorum_described_as_by_qemu_img(place: Path) -> None:
    for options in (
        "vote-threshold=2",
        "vote-threshold=1,read-pattern=fifo",
        "vote-threshold=2,blkverify=on",
        "vote-threshold=3",
        "vote-threshold=0",
        "vote-threshold=2,read-pattern=some",
        "vote-threshold=1,blkverify=on",
        "vote-threshold=2,blkverify=on,rewrite-corrupted=on",
    ):
        same("info --image-opts %s,%s" % (QUORUM, options), place)
    for command in ("info --output=json", "map --output=json", "compare driver=file,filename=raw"):
        same("%s --image-opts %s,vote-threshold=2" % (command, QUORUM), place)
    same("info --image-opts driver=quorum,vote-threshold=1", place)
    same("info --image-opts %s,vote-threshold=2" % QUORUM.replace("copy", "base"), place)


@pytest.mark.parametrize(
    "options",
    [
        "driver=compress,file.driver=file,file.filename=raw",
        "driver=copy-on-read",
        "driver=preallocate,prealloc-align=100,file.driver=file,file.filename=raw",
        "driver=preallocate,prealloc-align=0,file.driver=file,file.filename=raw",
        "driver=blkverify,test.driver=file,test.filename=raw",
        "driver=blkverify,raw.driver=file,raw.filename=raw",
        "driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename=plain,level=9",
    ],
)
def test_refusals(place: Path, options: str) -> None:
    same("info --image-opts " + options, place)
