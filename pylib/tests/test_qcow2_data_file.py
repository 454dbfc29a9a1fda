# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""External data files against qemu-img: what is made, resized and checked, and files that are missing or too short."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import Error
from side_by_side import difference, ours, same, setup, theirs

CREATE = [
    "-o data_file=d x 1M",
    "-o data_file=d,data_file_raw=on x 1000k",
    "-o data_file=d,preallocation=metadata x 1M",
    "-o data_file=d,preallocation=full,cluster_size=4k x 1M",
    "-o data_file=d,data_file_raw=on,lazy_refcounts=on,cluster_size=2M x 3M",
    "-o data_file_raw=on x 1M",
    "-o data_file=d,compat=0.10 x 1M",
]


@pytest.mark.parametrize("line", CREATE)
def test_made_like_qemu_img(tmp_path: Path, line: str) -> None:
    args = ["create", "-f", "qcow2", *shlex.split(line)]
    places = tmp_path / "theirs", tmp_path / "ours"
    for place in places:
        place.mkdir()
    expected, found = theirs(args, places[0]), ours(args, places[1])
    assert found == expected, difference(line, found, expected)
    if expected.code:
        return
    for command in (["check", "x"], ["map", "--output=json", "x"], ["info", "--output=json", "x"]):
        left = theirs(command, places[0])
        assert theirs(command, places[1]).code == left.code == 0
    assert theirs(["map", "--output=json", "x"], places[0]).out == theirs(["map", "--output=json", "x"], places[1]).out
    # with the metadata preallocated qemu-img's file ends with a whole cluster; ours is as long as the disk
    assert (places[1] / "d").stat().st_size == diskwright.info(str(places[1] / "x"))[0].virtual_size <= (places[0] / "d").stat().st_size
    for size in ("5M", "--shrink 300k"):
        resize = ["resize", *size.split()[:-1], "x", size.split()[-1]]
        assert ours(resize, places[1]) == theirs(resize, places[0])
        assert (places[1] / "d").stat().st_size == diskwright.info(str(places[1] / "x"))[0].virtual_size <= (places[0] / "d").stat().st_size
        assert theirs(["map", "--output=json", "x"], places[0]).out == theirs(["map", "--output=json", "x"], places[1]).out
        assert theirs(["check", "-q", "x"], places[1]).code == 0


def test_a_raw_data_file_holds_the_content(tmp_path: Path) -> None:
    setup("qemu-img create -f qcow2 -o data_file=d,data_file_raw=on x 1M", tmp_path)
    with diskwright.open(tmp_path / "x", "r+") as node:
        node.pwrite(1000, b"content" * 50000)
        node.pwrite_zeroes(65536, 65536, True)
        node.pwrite_zeroes(200000, 300)
        node.pdiscard(131072, 65536)
        content = node.pread(0, node.size)
    assert (tmp_path / "d").read_bytes() == content
    assert theirs(["check", "-q", "x"], tmp_path).code == 0


def test_missing_and_too_short(tmp_path: Path) -> None:
    setup("qemu-img create -f qcow2 -o data_file=d x 1M; qemu-io -c 'write -P 5 0 1M' x; truncate -s 1000 d", tmp_path)
    same("map --output=json x", tmp_path)
    with diskwright.open(tmp_path / "x") as node:
        content = node.pread(0, node.size)
    assert content == (b"\5" * 1000).ljust(1 << 20, b"\0")
    (tmp_path / "d").unlink()
    same("info x", tmp_path)
    for line in ("map x", "check x", "convert -O raw x y", "resize x 2M"):
        same(line, tmp_path)
    with pytest.raises(Error, match="Could not open 'd'|No such file"):
        diskwright.open(tmp_path / "x")
