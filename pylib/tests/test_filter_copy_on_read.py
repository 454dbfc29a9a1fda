# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""copy-on-read down to a bottom, and with writers; filters that are only described."""

from __future__ import annotations

import random
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import diskwright
from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags
from io_side_by_side import same_io
from side_by_side import same, setup, theirs

K = 1024
WRITABLE = OpenFlags(writable=True, resize=True, unmap=True)

GALLERY = r"""
qemu-img create -q -f qcow2 base 1M; qemu-io -c 'write -P 1 0 256k' base
qemu-img create -q -f qcow2 -b base -F qcow2 middle; qemu-io -c 'write -P 2 256k 256k' middle
qemu-img create -q -f qcow2 -b middle -F qcow2 top
"""
TOP = "driver=copy-on-read,file.driver=qcow2,file.node-name=top,file.file.driver=file,file.file.filename=top,"
MIDDLE = "file.backing.driver=qcow2,file.backing.node-name=middle,file.backing.file.driver=file,file.backing.file.filename=middle,"
BASE = "file.backing.backing.driver=qcow2,file.backing.backing.node-name=base,file.backing.backing.file.driver=file,file.backing.backing.file.filename=base,"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    inside = tmp_path / "place"
    inside.mkdir()
    setup(GALLERY, inside)
    monkeypatch.chdir(inside)
    return inside


@pytest.mark.parametrize("options", [TOP, TOP + MIDDLE + "bottom=middle", TOP + MIDDLE + BASE + "bottom=base", TOP + "bottom=nowhere"])
def test_down_to_the_bottom(place: Path, options: str) -> None:
    reads = ["read 0 64k", "map", "read -P 2 256k 100k", "map", "read -P 1 0 256k", "read 200k 400k", "map"]
    same_io(place, "--image-opts " + options.rstrip(","), *reads)
    expected = diskwright.open("top", format="qcow2")
    with expected, diskwright.open(place.with_name("place.ours") / "top", format="qcow2") as found:
        assert found.pread(0, 1 << 20) == expected.pread(0, 1 << 20)


def test_what_is_no_bottom(place: Path) -> None:
    setup("qemu-img create -q -f qcow2 other 1M", place)
    graph = Graph()
    with graph.open_spec({"driver": "qcow2", "node-name": "other", "file": {"driver": "file", "filename": "other"}}, WRITABLE):
        spec = {"driver": "copy-on-read", "bottom": "other", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": "top"}}}
        with pytest.raises(Error, match="Bottom node 'other' is not in the backing chain of 'top'"):
            graph.open_spec(spec, WRITABLE)


def test_readers_never_bring_back_what_was_overwritten(place: Path) -> None:
    """Writers of one cluster each, readers of all: what was written last is there at the end."""
    spec: dict[str, Any] = {"driver": "copy-on-read", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": "top"}}}
    with Graph().open_spec(spec, WRITABLE) as node:

        def write(number: int) -> None:
            for round in range(8):
                for cluster in range(number, 16, 4):
                    node.pwrite(cluster * 64 * K + round * K, bytes([100 + round]) * K)

        def read(seed: int) -> None:
            chance = random.Random(seed)
            for _round in range(40):
                node.pread(chance.randrange(900 * K), 100 * K)

        threads = [Thread(target=write, args=(number,)) for number in range(4)] + [Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        content = node.pread(0, 1 << 20)
    for cluster in range(16):
        for round in range(8):
            at = cluster * 64 * K + round * K
            assert content[at : at + K] == bytes([100 + round]) * K
    assert theirs(["check", "-q", "top"], place).code == 0


@pytest.mark.parametrize("options", ["", "mode=nope", "mode=secondary", "mode=primary,top-id=x"])
def test_replication_as_described_to_qemu_img(place: Path, options: str) -> None:
    same("info --image-opts driver=replication,file.driver=qcow2,file.file.driver=file,file.file.filename=top," + options, place)


@pytest.mark.parametrize(
    "spec,reason",
    [
        ({"driver": "replication", "mode": "primary", "file": {"driver": "null-co"}}, "COLO"),
        ({"driver": "blkreplay", "image": {"driver": "null-co"}}, "instruction counter"),
    ],
)
def test_filters_that_need_a_machine(spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(Error, match="works only in the QEMU that runs the virtual machine.*%s" % reason):
        Graph().open_spec(spec, WRITABLE)
