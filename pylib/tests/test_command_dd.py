# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`dd` against qemu-img: what is printed, the exit codes, and the image that is made."""

from __future__ import annotations

import random
import shlex
from pathlib import Path

import diskwright
import pytest
from side_by_side import difference, ours, same, setup, theirs, twins

GALLERY = r"""
qemu-img create -f raw some.raw 300000; qemu-io -f raw -c 'write -P 1 0 5k' -c 'write -P 2 64k 64k' -c 'write -P 3 290k 1k' some.raw
head -c 1700 /dev/urandom > odd; truncate -s 0 empty
qemu-img convert -O qcow2 some.raw some.qcow2; qemu-img convert -c -O qcow2 some.raw c.qcow2
head -c 100000 /dev/urandom > old.raw
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dd")
    setup(GALLERY, path)
    return path


def check(line: str, place: Path) -> None:
    """Both leave the same: outcome, and image."""
    outcomes = []
    images = []
    for run, folder in zip((theirs, ours), twins(place)):
        outcomes.append(run(shlex.split("dd " + line), folder))
        image = folder / "out"
        if image.exists():
            form = "qcow2" if "-O qcow2" in line else "raw"
            with diskwright.open(str(image), format=form) as node:
                images.append((node.size, node.pread(0, node.size)))
        else:
            images.append((0, b"none"))
    assert outcomes[0] == outcomes[1], difference(line, outcomes[1], outcomes[0])
    assert images[0] == images[1], line


LINES = [
    "if=some.raw of=out",
    "if=some.raw of=out bs=1k",
    "if=some.raw of=out bs=700 count=3",
    "if=some.raw of=out bs=700 count=3 skip=1",
    "if=some.raw of=out bs=1k count=1 skip=1",
    "if=some.raw of=out bs=1k count=4 skip=2",
    "if=some.raw of=out bs=1k count=2 skip=4",
    "if=some.raw of=out bs=1M count=4",
    "if=some.raw of=out bs=64k skip=1",
    "if=some.raw of=out bs=1k skip=5000",
    "if=some.raw of=out bs=300032 skip=1",
    "if=some.raw of=out count=0",
    "if=odd of=out",
    "if=odd of=out bs=1 count=1",
    "if=odd of=out bs=1 skip=1",
    "if=empty of=out",
    "if=some.qcow2 of=out",
    "-f raw if=some.qcow2 of=out",
    "-f qcow2 -O qcow2 if=c.qcow2 of=out bs=1000 count=200 skip=60",
    "-O qcow2 if=some.raw of=out bs=4k count=30",
    "--image-opts if=driver=raw,offset=512,file.filename=some.raw of=out bs=512 count=10",
    "-U if=some.raw of=out",
    "if=some.raw of=gone/out",
    "if=gone of=out",
    "-f qcow2 if=some.raw of=out",
    "-O nix if=some.raw of=out",
    "if=some.raw of=out of=out bs=512 bs=1k count=2",
]


@pytest.mark.parametrize("line", LINES)
def test_lines(place: Path, line: str) -> None:
    check(line, place)


def test_random_lines(place: Path) -> None:
    rng = random.Random(1)
    for _number in range(25):
        block = rng.choice((1, 511, 512, 1000, 4096, 65536, 100000))
        words = ["bs=%d" % block, "if=%s" % rng.choice(("some.raw", "odd", "c.qcow2")), "of=out"]
        if rng.random() < 0.6:
            words.append("count=%d" % rng.randrange(600000 // block + 2))
        if rng.random() < 0.6:
            words.append("skip=%d" % rng.randrange(200000 // block + 2))
        check(" ".join(words), place)


def test_errors_change_nothing(place: Path) -> None:
    for line in ("if=some.raw", "of=out", "if=some.raw of=out nix=1", "if=some.raw of=out bs=0", "--image-opts -f raw if=some.raw of=out"):
        same("dd " + line, place)
        assert not (place / "out").exists()


def test_the_source_is_never_overwritten(place: Path) -> None:
    """qemu-img empties it; a deliberate difference."""
    before = (place / "old.raw").read_bytes()
    found = ours(["dd", "if=old.raw", "of=./old.raw"], place)
    assert found.code == 1
    assert found.err == (
        'qemu-img: ./old.raw: error while creating output image: Failed to get "write" lock\n'
        "Is another process using the image [./old.raw]?\n"
    )
    assert (place / "old.raw").read_bytes() == before


def test_from_python(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    target.write_bytes(b"old")

    def stop(_done: int, _total: int) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        diskwright.dd(str(place / "some.raw"), str(target), atomic=True, progress=stop)
    assert target.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["new"]
    diskwright.dd(str(place / "some.raw"), str(target), block_size=1024, count=3, skip=1, atomic=True)
    assert target.read_bytes() == (place / "some.raw").read_bytes()[1024:3072]
