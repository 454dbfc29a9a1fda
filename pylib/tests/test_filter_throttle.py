# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""throttle: rates by a clock that we turn, bursts, shared groups; and the same answers as qemu-img over all kinds of children."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diskwright.filters.throttle import READ, WRITE, Group
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags
from diskwright.objects import add_object
from side_by_side import ours, same, setup, theirs, twins

GALLERY = r"""
qemu-img create -q -f raw base 1M; qemu-io -f raw -c 'write -P 1 0 64k' base
qemu-img create -q -f qcow2 -b base -F raw top 2M; qemu-io -c 'write -P 2 128k 64k' -c 'write -z 1M 64k' top
"""
GROUP = "--object throttle-group,id=g,x-bps-total=1000000000"
OVER_RAW = "driver=throttle,throttle-group=g,file.driver=file,file.filename=base"
OVER_QCOW2 = "driver=throttle,throttle-group=g,file.driver=qcow2,file.file.driver=file,file.file.filename=top"
UNDER_QCOW2 = "driver=qcow2,file.driver=throttle,file.throttle-group=g,file.file.driver=file,file.file.filename=top"


class Clock:
    """Time passes only where somebody waits."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def rate(limits: dict[str, int], way: str, length: int, requests: int) -> tuple[float, float]:
    """Bytes and requests a second that come through of a caller who always wants more; each waits for the one before."""
    clock = Clock()
    group = Group(limits, clock)
    for _number in range(requests):
        clock.now += group.take(way, length)
    return length * requests / clock.now, requests / clock.now


@pytest.mark.parametrize("way", [READ, WRITE])
@pytest.mark.parametrize("length", [512, 65536, 1 << 20])
def test_the_average_holds(way: str, length: int) -> None:
    for limits in ({"bps-total": 1 << 20}, {"bps-" + way: 1 << 20}):
        assert rate(limits, way, length, 3000)[0] == pytest.approx(1 << 20, rel=0.3 if length > 1 << 16 else 0.1)
    for limits in ({"iops-total": 100}, {"iops-" + way: 100}, {"iops-" + way: 100, "iops-size": 1 << 21}):
        assert rate(limits, way, length, 3000)[1] == pytest.approx(100, rel=0.05)
    assert rate({"iops-total": 100, "iops-size": 4096}, way, 65536, 3000)[1] == pytest.approx(100 / 16, rel=0.05)


def test_one_direction_does_not_hold_the_other() -> None:
    group = Group({"bps-read": 1000, "iops-write": 1}, Clock())
    assert group.take(READ, 10**6) == 0
    assert group.take(READ, 1) > 0
    assert group.take(WRITE, 10**9) == 0
    assert group.take(WRITE, 1) > 0


def test_bursts() -> None:
    """Two seconds at ten times the average go through at the burst rate, not faster; then the average holds."""
    clock = Clock()
    group = Group({"bps-total": 1000, "bps-total-max": 10000, "bps-total-max-length": 2}, clock)
    sent = 0
    while clock.now < 1.5:
        clock.now += group.take(READ, 100)
        sent += 100
    assert sent == pytest.approx(15000, rel=0.15)
    while clock.now < 100:
        clock.now += group.take(READ, 100)
        sent += 100
    assert sent == pytest.approx(100 * 1000 + 2 * 10000, rel=0.05)


def test_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    group = Group({"iops-total": 10}, clock)
    clock.now = 1000
    waits = [group.take(READ, 1) for _number in range(5)]
    assert waits[0] == 0 and waits[4] == pytest.approx(0.3)


def test_nodes_of_a_group_share_it(tmp_path: Path) -> None:
    setup(GALLERY, tmp_path)
    objects: dict[str, object] = {}
    add_object(objects, "throttle-group,id=g,x-bps-total=1000000000")  # type: ignore[arg-type]
    graph = Graph(objects=objects)
    spec = {"driver": "throttle", "throttle-group": "g", "file": {"driver": "file", "filename": str(tmp_path / "base")}}
    with graph.open_spec(spec, OpenFlags()) as one, graph.open_spec(spec, OpenFlags()) as other:
        assert one._group is other._group  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [OVER_RAW, OVER_QCOW2, UNDER_QCOW2])
def test_as_qemu_img(tmp_path: Path, options: str) -> None:
    setup(GALLERY, tmp_path)
    for command in ("info", "info --output=json", "info --backing-chain", "map", "map --output=json", "check", "measure -O qcow2"):
        same("%s %s --image-opts %s" % (command, GROUP, options), tmp_path)
    same("compare %s --image-opts %s %s" % (GROUP, options, options), tmp_path)
    pair = twins(tmp_path)
    for line in ("convert %s --image-opts %s out" % (GROUP, options), "snapshot %s -c one --image-opts %s" % (GROUP, options)):
        assert ours(line.split(), pair[1]) == theirs(line.split(), pair[0])
    assert (pair[0] / "out").read_bytes() == (pair[1] / "out").read_bytes()
    assert theirs(["check", "-q", "top"], pair[1]).code == 0


def test_refusals(tmp_path: Path) -> None:
    setup(GALLERY, tmp_path)
    for options in (
        "driver=throttle,file.driver=file,file.filename=base",
        OVER_RAW.replace("group=g", "group=x"),
        OVER_RAW + ",iops=3",
        "driver=throttle,throttle-group=g",
    ):
        same("info %s --image-opts %s" % (GROUP, options), tmp_path)
    same("info --object secret,id=g,data=x --image-opts " + OVER_RAW, tmp_path)


def test_writes_arrive(tmp_path: Path) -> None:
    setup(GALLERY, tmp_path)
    chance = random.Random(1)
    model = bytearray((tmp_path / "base").read_bytes())
    objects: dict[str, object] = {}
    add_object(objects, "throttle-group,id=g,x-iops-total=1000000")  # type: ignore[arg-type]
    spec = {"driver": "throttle", "throttle-group": "g", "file": {"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "base")}}}
    with Graph(objects=objects).open_spec(spec, OpenFlags(writable=True, resize=True, unmap=True)) as node:
        for _number in range(200):
            offset = chance.randrange(len(model))
            data = chance.randbytes(min(chance.randrange(1, 70000), len(model) - offset))
            kind = chance.randrange(3)
            if kind == 0:
                node.pwrite(offset, data)
                model[offset : offset + len(data)] = data
            elif kind == 1:
                node.pwrite_zeroes(offset, len(data))
                model[offset : offset + len(data)] = bytes(len(data))
            else:
                assert node.pread(offset, len(data)) == model[offset : offset + len(data)]
    assert (tmp_path / "base").read_bytes() == model
