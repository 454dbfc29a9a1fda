# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`commit` against qemu-img: the texts, and all images of the chain afterwards."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import OptionError
from side_by_side import difference, ours, setup, theirs, twins

GALLERY = r"""
qemu-img create -f qcow2 base 1M; qemu-io -c 'write -P 1 0 1M' base
qemu-img create -f qcow2 -b base -F qcow2 mid 2M; qemu-io -c 'write -P 2 64k 64k' -c 'write -P 7 1200k 100k' mid
qemu-img create -f qcow2 -b mid -F qcow2 top 3M; qemu-io -c 'write -P 3 1M 64k' -c 'write -z 200k 300k' -c 'write -z 64k 10k' top
qemu-img create -f raw flat 1000k; qemu-io -f raw -c 'write -P 1 10k 900k' flat
qemu-img create -f qcow2 -o cluster_size=512 -b flat -F raw tiny 2500k; qemu-io -c 'write -P 4 777k 3k' -c 'write -z 0 100k' -c 'write -P 8 2499k 1k' tiny
qemu-img create -f qcow2 -o compat=0.10,cluster_size=2M -b tiny -F qcow2 huge 5M; qemu-io -c 'write -P 5 100 1k' -c 'write -P 6 4M 1M' huge
qemu-img create -f qcow2 -b huge -F qcow2 short 1M; qemu-io -c 'write -P 10 100k 300k' short
qemu-img create -f qcow2 -b top -F qcow2 snapped; qemu-io -c 'write -P 11 0 200k' snapped; qemu-img snapshot -c s snapped
qemu-io -c 'write -P 12 100k 200k' snapped
qemu-img create -f qcow2 -b base -F qcow2 nothing
qemu-img create -f qcow2 -u -b nowhere -F qcow2 lost 1M
mkdir sub; qemu-img create -f qcow2 -b ../base -F qcow2 sub/inner 1M; qemu-io -c 'write -P 4 5k 1k' sub/inner
chmod 444 base flat
"""

NAMES = ("base", "mid", "top", "flat", "tiny", "huge", "short", "snapped", "nothing", "lost", "sub/inner")

LINES = [
    *("%s %s" % (option, image) for image in NAMES for option in ("", "-d", "-q -p", "-r 100M -t none")),
    "-b base top",
    "-b base -d top",
    "-b mid top",
    "-b flat huge",
    "-b tiny huge",
    "-b flat short",
    "-b base snapped",
    "-b ../base sub/inner",
    "-b base sub/inner",
    "-b nope top",
    "-b top top",
    "-b '' top",
    "--base base --drop --rate 1G --cache unsafe --format qcow2 top",
    "-t bad top",
    "-r bad top",
    "-r -1 top",
    "-f raw top",
    "-f nofmt top",
    "top mid",
    "",
    "nope",
    "--image-opts driver=qcow2,file.filename=top",
    "--image-opts top",
    "--image-opts -f qcow2 top",
]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commit") / "gallery"
    path.mkdir()
    setup(GALLERY, path)
    return path


@pytest.mark.parametrize("line", LINES)
def test_lines(gallery: Path, line: str) -> None:
    args = ["commit", *shlex.split(line)]
    left, right = twins(gallery)
    expected, found = theirs(args, left), ours(args, right)
    assert found == expected, difference(line, found, expected)
    for name in NAMES if expected.code == 0 else ():
        before = (gallery / name).stat().st_size, (left / name).stat().st_size, (right / name).stat().st_size
        if name == "lost" or (left / name).read_bytes() == (gallery / name).read_bytes():
            assert (right / name).read_bytes() == (gallery / name).read_bytes(), name
            continue
        assert theirs(["compare", "-s", str(left / name), str(right / name)], left).code == 0 or theirs(
            ["compare", str(left / name), str(right / name)], left
        ).code == 0, name
        assert name == "flat" or theirs(["check", "-q", name], right).code == 0
        if before[1] < before[0]:  # emptied
            assert before[2] <= before[1] + 65536


def test_the_function(tmp_path: Path) -> None:
    setup(GALLERY, tmp_path)
    with pytest.raises(OptionError, match="does not have a backing file"):
        diskwright.commit(str(tmp_path / "base"))
    seen: list[tuple[int, int]] = []
    diskwright.commit(str(tmp_path / "top"), progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] == 3 << 20
    with diskwright.open(tmp_path / "top", backing=False) as node:
        assert not any(extent.status for extent in node.block_status(0, node.size))
    subprocess.run(["qemu-img", "check", "-q", str(tmp_path / "top")], check=True)
