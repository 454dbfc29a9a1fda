# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`map` against qemu-img."""

from __future__ import annotations

import io
import os
import random
import resource
from pathlib import Path

import pytest

import diskwright
from diskwright import cli
from diskwright.commands.map import map_image
from diskwright.commands.ui import UI
from side_by_side import same, setup

GALLERY = r"""
qemu-img create -f raw a.raw 1M
head -c 1000 /dev/urandom > odd.raw
: > empty
truncate -s 3M sparse.raw; dd if=/dev/urandom of=sparse.raw bs=64k count=1 seek=5 conv=notrunc status=none
qemu-img create -f qcow2 -b sparse.raw -F raw mid.qcow2 4M
qemu-io -c 'write 1M 64k' -c 'write -z 2M 128k' -c 'write -c 2560k 64k' -c 'write 384k 1k' mid.qcow2
qemu-img create -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 5M
qemu-io -c 'write 4M 64k' -c 'discard 1M 64k' -c 'write 1088k 64k' top.qcow2
qemu-img create -f qcow2 -b top.qcow2 -F qcow2 short.qcow2 1M
qemu-img create -f qcow2 full.qcow2 5M; qemu-io -c 'write 0 4M' full.qcow2
qemu-img create -f qcow2 -o preallocation=metadata meta.qcow2 1M
qemu-img create -f qcow2 -o preallocation=falloc falloc.qcow2 1M
qemu-img create -f qcow2 -o preallocation=full pre.qcow2 1M
qemu-img create -f qcow2 -o cluster_size=512 tiny.qcow2 1M; qemu-io -c 'write 511k 300k' -c 'write -z 600k 3k' tiny.qcow2
qemu-img create -f qcow2 -o compat=0.10 v2.qcow2 4M; qemu-io -c 'write 1M 64k' -c 'discard 1M 64k' -c 'write 3M 1k' v2.qcow2
qemu-img create -f qcow2 -o cluster_size=2M huge.qcow2 1E
qemu-img create -f qcow2 -u -b gone -F raw gone.qcow2 4M
qemu-img create -f qcow2 -b sparse.raw -F raw bigger.qcow2 1P
printf x > a,b
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("map")
    setup(GALLERY, path)
    return path


IMAGES = (
    "a.raw odd.raw empty sparse.raw mid.qcow2 top.qcow2 short.qcow2 full.qcow2 meta.qcow2 falloc.qcow2 pre.qcow2 tiny.qcow2 v2.qcow2 "
    "gone.qcow2 a,b null-co:// nosuch /dev/null"
).split()

OTHERS = [
    *(
        "-s %s -l %s %s" % (start, length, image)
        for image in ("sparse.raw", "top.qcow2")
        for start, length in (
            ("1M", "1M"),
            ("100", "1000"),
            ("327680", "100"),
            ("4M", "4M"),
            ("3M", "0"),
            ("0", "10M"),
            ("10M", "1"),
            ("0x10000", "1.5M"),
            ("5M", "1"),
        )
    ),
    "-s 1M sparse.raw",
    "-l 7000 odd.raw",
    "-f raw mid.qcow2",
    "-f file sparse.raw",
    "-f qcow2 sparse.raw",
    "-U top.qcow2",
    """'json:{"driver":"null-co","read-zeroes":true}'""",
    "--image-opts driver=raw,offset=512,size=512,file.filename=sparse.raw",
    "--image-opts driver=raw,offset=327000,size=51200,file.filename=sparse.raw",
    "--image-opts driver=qcow2,file.filename=mid.qcow2,backing=",
    "--image-opts driver=qcow2,file.filename=mid.qcow2,backing=foo",
    "--image-opts driver=qcow2,file.filename=mid.qcow2,backing.driver=raw,backing.file.filename=full.qcow2",
    """'json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"mid.qcow2"}}'""",
]


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("line", IMAGES + OTHERS)
def test_lines(place: Path, line: str, output: str) -> None:
    same("map --output %s %s" % (output, line), place)


@pytest.mark.parametrize("seed", range(6))
def test_random_chains(tmp_path: Path, seed: int) -> None:
    """Three layers of random writes, zeroes and discards."""
    chance = random.Random(seed)
    script = ["truncate -s 2000k base"]
    below = "base"
    for layer in range(3):
        name = "layer%d" % layer
        size = chance.choice((1800, 2000, 2304))
        options = "cluster_size=%s,compat=%s" % (chance.choice(("512", "4k", "64k")), chance.choice(("0.10", "1.1")))
        script.append("qemu-img create -f qcow2 -o %s -b %s -F %s %s %dk" % (options, below, "qcow2" if layer else "raw", name, size))
        script.append(
            "qemu-io %s %s"
            % (
                name,
                " ".join(
                    "-c '%s %dk %dk'" % (chance.choice(("write", "write -z", "discard", "write -z -u")), chance.randrange(1700), chance.randrange(1, 99))
                    for _round in range(12)
                ),
            )
        )
        below = name
    setup("\n".join(script), tmp_path)
    for layer in range(3):
        same("map --output json layer%d" % layer, tmp_path)
        same("map layer%d" % layer, tmp_path)


def test_huge_images_cost_nothing(place: Path) -> None:
    """qemu-img would take minutes of processor time for the first."""
    for image, size in (("huge.qcow2", 1 << 60), ("bigger.qcow2", 1 << 50)):
        entries = list(map_image(str(place / image)))
        assert sum(entry.length for entry in entries) == size
        assert entries[-1].zero and not entries[-1].present


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A map of a hundred thousand entries is printed as it is found."""
    setup("qemu-img create -f qcow2 -o cluster_size=512 many.qcow2 100M", tmp_path)
    with diskwright.open(str(tmp_path / "many.qcow2"), "r+") as node:
        for offset in range(0, 100 << 20, 1024):
            node.pwrite(offset, b"x" * 512)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(1 for _entry in map_image(str(tmp_path / "many.qcow2")))
    assert count == 200 << 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
    same("map --output json -l 3M many.qcow2", tmp_path)


def test_entries(place: Path) -> None:
    """The typed results."""
    entries = list(map_image(str(place / "mid.qcow2"), start=1 << 20, length=64 << 10))
    assert [entry.as_dict() for entry in entries] == [
        {"start": 1 << 20, "length": 64 << 10, "depth": 0, "present": True, "zero": False, "data": True, "compressed": False, "offset": 327680}
    ]
    assert entries[0].filename == str(place / "mid.qcow2")


def test_an_iterator_that_nobody_reads_closes_the_image(place: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    map_image(str(place / "mid.qcow2"))
    assert set(os.listdir("/proc/self/fd")) == before


def test_an_error_in_the_middle(place: Path, tmp_path: Path) -> None:
    """A damaged L2 table: what is known is printed, then the error."""
    out, err = io.StringIO(), io.StringIO()
    image = tmp_path / "bad.qcow2"
    data = bytearray((place / "full.qcow2").read_bytes())
    data[196608:196616] = (0x8000000000000200 | 7).to_bytes(8, "big")  # an L2 table off its place
    image.write_bytes(data)
    code = cli.run(["map", "-f", "qcow2", str(image)], UI("qemu-img", out, err))
    assert code == 1 and "\nqemu-img: " in "\n" + err.getvalue()
