# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`snapshot`, `convert -l` and `measure -l` against qemu-img: the texts, and the images afterwards."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import Error
from side_by_side import Outcome, difference, ours, same, setup, theirs, twins

GALLERY = r"""
qemu-img create -f qcow2 a.qcow2 1M
qemu-img create -f raw r.raw 1M
for v in 0.10 1.1; do
    qemu-img create -f qcow2 -o compat=$v s$v.qcow2 1M; qemu-io -c 'write -P 1 0 300k' -c 'write -c -P 2 512k 64k' s$v.qcow2
    qemu-img snapshot -c one s$v.qcow2; qemu-io -c 'write -P 3 100k 500k' s$v.qcow2; qemu-img snapshot -c two s$v.qcow2
    qemu-img snapshot -c one s$v.qcow2; qemu-img snapshot -c 1 s$v.qcow2; qemu-io -c 'write -P 4 0 1M' s$v.qcow2
done
cp s1.1.qcow2 grown.qcow2; qemu-img resize grown.qcow2 3M; qemu-io -c 'write -P 5 0 3M' grown.qcow2; qemu-img snapshot -c big grown.qcow2
cp s1.1.qcow2 shrunk.qcow2; qemu-img resize --shrink shrunk.qcow2 200k
qemu-img create -f qcow2 -o refcount_bits=1 bit.qcow2 1M; qemu-io -c 'write 0 64k' bit.qcow2
qemu-img create -f qcow2 -o refcount_bits=2 bits.qcow2 1M; qemu-io -c 'write 0 64k' bits.qcow2
for i in 1 2; do qemu-img snapshot -c s bits.qcow2; done
qemu-img create -f qcow2 map.qcow2 1M; qemu-img snapshot -c s map.qcow2; qemu-img bitmap --add map.qcow2 x
qemu-img create -f qcow2 -b a.qcow2 -F qcow2 over.qcow2
cp a.qcow2 corrupt.qcow2; printf '\x02' | dd of=corrupt.qcow2 bs=1 seek=79 conv=notrunc status=none
qemu-img create -f qcow2 -o cluster_size=512 tiny.qcow2 1M; qemu-io -c 'write 1k 700k' tiny.qcow2; qemu-img snapshot -c t tiny.qcow2
"""

DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "gallery"
    path.mkdir()
    setup(GALLERY, path)
    return path


READING = [
    *("snapshot %s %s" % (option, image) for option in ("", "-l", "-q -l", "-U -l") for image in ("a.qcow2", "s0.10.qcow2", "s1.1.qcow2", "corrupt.qcow2")),
    "snapshot",
    "snapshot -l",
    "snapshot -l a.qcow2 r.raw",
    "snapshot -c",
    "snapshot -l -l a.qcow2",
    "snapshot -l -c x a.qcow2",
    "snapshot -a x -d x",
    "snapshot -c x -c y a.qcow2",
    "snapshot -l r.raw",
    "snapshot -l nosuch",
    "snapshot -c x nosuch",
    "snapshot -U -c x a.qcow2",
    "snapshot -f qcow2 -l a.qcow2",
    "snapshot -f raw -l a.qcow2",
    "snapshot -f nosuch -l a.qcow2",
    "snapshot -f qcow2 -l r.raw",
    "snapshot --image-opts -l driver=qcow2,file.filename=s1.1.qcow2",
    "snapshot --image-opts -f qcow2 -l driver=qcow2,file.filename=a.qcow2",
    "snapshot --image-opts -c x driver=qcow2,file.filename=a.qcow2,read-only=on",
    "snapshot --object foo a.qcow2",
    "snapshot --foo a.qcow2",
    "snapshot -a nope a.qcow2",
    "snapshot -d nope a.qcow2",
    "snapshot -d 2 s1.1.qcow2",
    "snapshot -a nope map.qcow2",
    "snapshot -a s map.qcow2",
    "snapshot -c x corrupt.qcow2",
    "snapshot -c x -f raw r.raw",
    "snapshot -a x -f raw r.raw",
    "snapshot -d x -f raw r.raw",
    *(
        "measure -O qcow2 -l %s %s" % (name, image)
        for image in ("s0.10.qcow2", "s1.1.qcow2", "grown.qcow2")
        for name in ("one", "1", "4", "nope", "snapshot.id=3,snapshot.name=one", "snapshot.id=3,snapshot.name=two", "snapshot.name=two", "snapshot.id=9")
    ),
    "measure -l one r.raw",
    "measure -l snapshot.id=1 r.raw",
    "convert -l nope -O raw s1.1.qcow2 x.raw",
    "convert -l '' -O raw s1.1.qcow2 x.raw",
    "convert -l one -O raw r.raw x.raw",
    "convert -l one -O raw s1.1.qcow2 s1.1.qcow2 x.raw",
    "convert -l snapshot.id=1,snapshot.name=two -O raw s1.1.qcow2 x.raw",
]


@pytest.mark.parametrize("line", READING)
def test_lines_that_change_nothing(place: Path, line: str) -> None:
    same(line, place)


CONVERSIONS = [
    "%s %s" % (name, image)
    for image in ("s0.10.qcow2", "s1.1.qcow2", "grown.qcow2", "tiny.qcow2")
    for name in ("one", "two", "1", "4", "big", "t", "snapshot.id=2", "snapshot.id=3,snapshot.name=one")
]


@pytest.mark.parametrize("line", CONVERSIONS)
def test_convert_reads_a_snapshot(place: Path, line: str, tmp_path: Path) -> None:
    name, image = line.split()
    args = ["convert", "-l", name, "-O", "raw", str(place / image)]
    expected = theirs([*args, "theirs"], tmp_path)
    assert ours([*args, "ours"], tmp_path) == expected
    if not expected.code:
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_snapshot_of_a_longer_disk_is_whole(place: Path, tmp_path: Path) -> None:
    """qemu-img shows no more of it than the disk has now (docs/differences.md)."""
    assert ours(["convert", "-l", "two", "-O", "raw", str(place / "shrunk.qcow2"), "x"], tmp_path).code == 0
    assert ours(["convert", "-l", "two", "-O", "raw", str(place / "s1.1.qcow2"), "y"], tmp_path).code == 0
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


WRITING = [
    "a.qcow2: -c x",
    "a.qcow2: -c x; -c x; -c 1; -c ''; -a x; -d x; -d x; -d x; -d ''",
    "a.qcow2: -c %s; -a %s; -d %s" % ("n" * 300, "n" * 300, "n" * 300),
    "a.qcow2: -c näme; -a näme; -d näme",
    *(
        "%s: %s" % (image, actions)
        for image in ("s0.10.qcow2", "s1.1.qcow2")
        for actions in ("-a one", "-a 2", "-a 1", "-d one", "-d one; -d one", "-d two; -c three; -a three; -d 1", "-c x; -d x", "-a two; -c new; -a 3")
    ),
    "grown.qcow2: -a one",
    "grown.qcow2: -a one; -a big",
    "grown.qcow2: -d one; -a big; -d big",
    "shrunk.qcow2: -a two; -a one",
    "shrunk.qcow2: -c small; -a two; -a small",
    "bit.qcow2: -c x",
    "bits.qcow2: -c x; -a s",
    "bits.qcow2: -d s; -c x; -c x",
    "map.qcow2: -c x; -d s",
    "over.qcow2: -c x; -a x",
    "tiny.qcow2: -c x; -a t; -d x; -d t",
]


@pytest.mark.parametrize("line", WRITING)
def test_lines_that_change_an_image(place: Path, line: str, tmp_path: Path) -> None:
    """The same answers, images that qemu-img finds nothing wrong with, the same content, now and in each snapshot."""
    image, actions = line.split(": ")
    source = tmp_path / "images"
    setup("mkdir '%s'; cp '%s' '%s' '%s'" % (source, place / image, place / "a.qcow2", source), tmp_path)
    pair = twins(source)
    for action in actions.split("; "):
        args = ["snapshot", *shlex.split(action), image]
        expected, found = theirs(args, pair[0]), ours(args, pair[1])
        assert found == expected, difference(action, found, expected)
        if not found.code:
            assert theirs(["check", "-q", image], pair[1]) == Outcome(0, "", "")
        assert theirs(["compare", *(str(copy / image) for copy in pair)], tmp_path).code == 0
        lists = [theirs(["snapshot", "-l", image], copy).out for copy in pair]
        assert DATE.sub("", lists[0]) == DATE.sub("", lists[1])
    for snapshot in diskwright.info(str(pair[0] / image))[0].snapshots:
        for copy in pair:
            assert theirs(["convert", "-l", "snapshot.id=" + snapshot.id, "-O", "raw", image, "out"], copy).code == 0
        assert (pair[0] / "out").read_bytes() == (pair[1] / "out").read_bytes()


def test_the_function(tmp_path: Path) -> None:
    image = str(tmp_path / "x.qcow2")
    diskwright.create(image, 1 << 20, format="qcow2")
    assert diskwright.snapshot(image) == []
    made = diskwright.snapshot(image, "create", "first")
    assert [(entry.id, entry.name, entry.disk_size, entry.vm_state_size) for entry in made] == [("1", "first", 1 << 20, 0)]
    with diskwright.open(image, "r+") as node:
        like = diskwright.Snapshot("", "", 0, 1000000000, 5000, 7 * 10**9, None)
        assert node.create_snapshot("second", like).id == "2"
    listed = ours(["snapshot", "-l", image], tmp_path)
    assert listed == theirs(["snapshot", "-l", image], tmp_path)
    assert "0000:00:07.000" in listed.out and "--" in listed.out
    assert [entry.name for entry in diskwright.snapshot(image, "delete", "first")] == ["second"]
    with pytest.raises(Error, match="Could not apply snapshot 'first': Failed to load snapshot"):
        diskwright.snapshot(image, "apply", "first")
    with pytest.raises(diskwright.OptionError):
        diskwright.snapshot(image, "rename", "first")
