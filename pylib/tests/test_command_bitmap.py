# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`bitmap`, `convert --bitmaps` and measure's bitmaps against qemu-img: the texts, and the images afterwards."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import Error
from side_by_side import Outcome, difference, ours, setup, theirs, twins

GALLERY = r"""
for i in a b x; do qemu-img create -f qcow2 $i.qcow2 10M; done
qemu-img bitmap --add a.qcow2 one; qemu-img bitmap --add -g 4k a.qcow2 two; qemu-img bitmap --add --disable a.qcow2 off
qemu-io -c 'write 1M 100k' -c 'write -z 5M 1M' -c 'discard 7M 64k' a.qcow2
qemu-img bitmap --add -g 512 b.qcow2 fine; qemu-io -c 'write 9M 1k' -c 'write 3000 100' b.qcow2
qemu-img create -f qcow2 long.qcow2 20M; qemu-img bitmap --add long.qcow2 one
qemu-img create -f qcow2 -o compat=0.10 v2.qcow2 10M
qemu-img create -f qcow2 -o cluster_size=512 tiny.qcow2 10M
qemu-img create -f qcow2 -o cluster_size=2M large.qcow2 10M
qemu-img create -f qcow2 -b a.qcow2 -F qcow2 over.qcow2; qemu-img bitmap --add over.qcow2 top
qemu-img create -f raw r.raw 10M
cp a.qcow2 broken.qcow2; qemu-io -c 'sleep 20000' broken.qcow2 & sleep 1; kill -9 $!; wait $! || true
qemu-img bitmap --add broken.qcow2 good
cp a.qcow2 corrupt.qcow2; printf '\x02' | dd of=corrupt.qcow2 bs=1 seek=79 conv=notrunc status=none
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bitmap") / "gallery"
    path.mkdir()
    setup(GALLERY, path)
    return path


LINES = """
bitmap
bitmap a.qcow2
bitmap a.qcow2 one
bitmap --add a.qcow2
bitmap --add a.qcow2 x y
bitmap --foo --add a.qcow2 x
bitmap -q --add a.qcow2 x
bitmap -g 64k --clear a.qcow2 one
bitmap -g 0 --clear a.qcow2 one
bitmap -g 1x --add a.qcow2 x
bitmap -g -1 --add a.qcow2 x
bitmap -g 8E --add a.qcow2 x
bitmap -F qcow2 --merge two a.qcow2 one
bitmap -b b.qcow2 --add a.qcow2 x
bitmap --image-opts -f qcow2 --add a.qcow2 x
bitmap --object foo --add a.qcow2 x
bitmap --add nosuch x
bitmap --add -f nosuch a.qcow2 x
bitmap --add corrupt.qcow2 x
bitmap --add --image-opts driver=qcow2,file.filename=a.qcow2,read-only=on x
bitmap --add a.qcow2 x
bitmap --add a.qcow2 one
bitmap --add a.qcow2 ''
bitmap --add -g 512 a.qcow2 x
bitmap --add -g 2G a.qcow2 x
bitmap --add -g 0 a.qcow2 x
bitmap --add -g 256 a.qcow2 x
bitmap --add -g 3k a.qcow2 x
bitmap --add -g 4G a.qcow2 x
bitmap --add tiny.qcow2 x
bitmap --add large.qcow2 x
bitmap --add v2.qcow2 x
bitmap --clear v2.qcow2 x
bitmap --add r.raw x
bitmap --add -f raw r.raw x
bitmap --add -f raw r.raw ''
bitmap --clear -f raw r.raw x
bitmap --merge x -f raw r.raw x
bitmap --add --disable --merge one --merge two a.qcow2 x
bitmap --add --add a.qcow2 x
bitmap --add --remove --add a.qcow2 x
bitmap --clear --merge nope --disable a.qcow2 one
bitmap --remove a.qcow2 one
bitmap --remove a.qcow2 nope
bitmap --clear a.qcow2 two
bitmap --clear a.qcow2 nope
bitmap --enable a.qcow2 off
bitmap --enable a.qcow2 nope
bitmap --disable a.qcow2 one
bitmap --disable a.qcow2 nope
bitmap --merge one a.qcow2 one
bitmap --merge one a.qcow2 two
bitmap --merge two a.qcow2 off
bitmap --merge nope a.qcow2 one
bitmap --merge one a.qcow2 nope
bitmap --merge fine -b b.qcow2 a.qcow2 one
bitmap --merge fine -b b.qcow2 -F qcow2 a.qcow2 off
bitmap --merge fine -b b.qcow2 -F raw a.qcow2 off
bitmap --merge fine -b b.qcow2 -F nosuch a.qcow2 off
bitmap --merge fine -b nosuch a.qcow2 off
bitmap --merge x -b r.raw a.qcow2 off
bitmap --merge one -b long.qcow2 a.qcow2 off
bitmap --add --merge one -b a.qcow2 over.qcow2 x
bitmap --merge one -b broken.qcow2 a.qcow2 one
bitmap --add broken.qcow2 x
bitmap --add broken.qcow2 one
bitmap --clear broken.qcow2 one
bitmap --enable broken.qcow2 one
bitmap --disable broken.qcow2 one
bitmap --merge one broken.qcow2 good
bitmap --merge good broken.qcow2 one
bitmap --remove broken.qcow2 one
resize broken.qcow2 20M
resize a.qcow2 20M
resize --shrink a.qcow2 1200k
snapshot -c s a.qcow2
convert --bitmaps -O qcow2 a.qcow2 t.qcow2
convert --bitmaps -O qcow2 -o cluster_size=512 a.qcow2 t.qcow2
convert --bitmaps -O qcow2 over.qcow2 t.qcow2
convert --bitmaps -O qcow2 v2.qcow2 t.qcow2
convert --bitmaps -O qcow2 r.raw t.qcow2
convert --bitmaps -O qcow2 x.qcow2 t.qcow2
convert --bitmaps -O qcow2 a.qcow2 b.qcow2 t.qcow2
convert --bitmaps -O raw a.qcow2 t.raw
convert --bitmaps -O qcow2 -o compat=0.10 a.qcow2 t.qcow2
convert --bitmaps -O qcow2 -n a.qcow2 b.qcow2
convert --bitmaps -O qcow2 -n a.qcow2 a2.qcow2
convert --bitmaps -O qcow2 -n a.qcow2 long.qcow2
convert --bitmaps -O qcow2 broken.qcow2 t.qcow2
convert --skip-broken-bitmaps -O qcow2 broken.qcow2 t.qcow2
convert --bitmaps --skip-broken-bitmaps -O qcow2 broken.qcow2 t.qcow2
convert -n -O qcow2 r.raw a.qcow2
measure -O qcow2 a.qcow2
measure -O qcow2 -o cluster_size=512 a.qcow2
measure -O qcow2 -o compat=0.10 a.qcow2
measure -O raw a.qcow2
measure -O qcow2 broken.qcow2
measure --output json -O qcow2 b.qcow2
""".strip().splitlines()

NODE = re.compile(r"#block\d+")


def described(path: Path, name: str) -> list[object]:
    """What qemu-img says of the bitmaps of an image."""
    text = theirs(["info", "--output=json", "-f", "qcow2", name], path).out
    found: list[object] = json.loads(text)["format-specific"]["data"].get("bitmaps", [])
    return found


def content(path: Path) -> dict[str, list[tuple[int, int]]]:
    """The bitmaps that are consistent, as we read them."""
    with diskwright.open(str(path), format="qcow2", backing=False) as node:
        return {bitmap.name: joined(bitmap.runs()) for bitmap in node.bitmaps() or () if not bitmap.inconsistent}


def joined(runs: object) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for offset, length in runs:  # type: ignore[attr-defined]
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((offset, length))
    return found


@pytest.mark.parametrize("line", LINES)
def test_lines(place: Path, line: str, tmp_path: Path) -> None:
    """The same answers; images that qemu-img finds nothing wrong with, and with the same bitmaps."""
    args = shlex.split(line)
    source = tmp_path / "images"
    names = sorted({name for name in (path.name for path in place.iterdir()) if name in line} | {"a.qcow2"})
    source.mkdir()
    setup("cp %s '%s'; cp a.qcow2 '%s/a2.qcow2'" % (" ".join(names), source, source), place)
    pair = twins(source)
    expected, found = theirs(args, pair[0]), ours(args, pair[1])
    wanted = Outcome(expected.code, expected.out, NODE.sub(names[-1] if names[-1] in line else "", expected.err))
    if NODE.search(expected.err):
        wanted = Outcome(expected.code, expected.out, NODE.sub(args[-2], expected.err))
    assert found == wanted, difference(line, found, wanted)
    for path in pair[0].glob("*.qcow2"):
        if path.name in line and path.name not in ("corrupt.qcow2", "nosuch"):
            assert theirs(["check", "-q", path.name], pair[1]) == Outcome(0, "", "")
            assert described(pair[0], path.name) == described(pair[1], path.name)
            assert content(pair[0] / path.name) == content(pair[1] / path.name), path.name


def test_merge_from_the_image_itself(place: Path, tmp_path: Path) -> None:
    """qemu-img fails on its own lock (docs/differences.md)."""
    setup("cp '%s' ." % (place / "a.qcow2"), tmp_path)
    line = ["bitmap", "--merge", "one", "-b", "./a.qcow2", "a.qcow2", "off"]
    assert ours(line, tmp_path) == Outcome(0, "", "")
    found = content(tmp_path / "a.qcow2")
    assert found["off"] == found["one"] != []


def test_the_function(tmp_path: Path) -> None:
    image = str(tmp_path / "x.qcow2")
    diskwright.create(image, 1 << 20, format="qcow2")
    diskwright.bitmap(image, "b", [("add", "")], granularity=512)
    with diskwright.open(image, "r+") as node:
        node.pwrite(1000, b"x")
    assert content(tmp_path / "x.qcow2") == {"b": [(512, 512)]}
    with pytest.raises(Error, match="Operation remove on bitmap nope failed: Dirty bitmap 'nope' not found"):
        diskwright.bitmap(image, "nope", [("remove", "")])
    with pytest.raises(diskwright.OptionError):
        diskwright.bitmap(image, "b", [("rename", "")])
    diskwright.bitmap(image, "b", [("remove", "")])
    assert content(tmp_path / "x.qcow2") == {}


@pytest.mark.parametrize(
    "line", ["snapshot -d nope a.qcow2", "snapshot -a nope a.qcow2", "resize a.qcow2 1M", "bitmap --clear a.qcow2 nope", "resize a.qcow2 0"]
)
def test_a_command_that_refuses_leaves_the_bitmaps_as_they_are(place: Path, tmp_path: Path, line: str) -> None:
    setup("cp '%s' ." % (place / "a.qcow2"), tmp_path)
    before = described(tmp_path, "a.qcow2"), content(tmp_path / "a.qcow2")
    assert ours(shlex.split(line), tmp_path).code == 1
    assert (described(tmp_path, "a.qcow2"), content(tmp_path / "a.qcow2")) == before
