# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`resize` against qemu-img: the texts, and the images afterwards."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import diskwright
from diskwright.commands.resize import WouldShrink
from side_by_side import difference, ours, setup, theirs, twins

GALLERY = r"""
qemu-img create -f raw a.raw 1M
head -c 1000 /dev/urandom > odd.raw
: > empty
head -c 3M /dev/urandom > data.raw
qemu-img create -f qcow2 plain.qcow2 1M
qemu-img create -f qcow2 -o compat=0.10 v2.qcow2 1M; qemu-io -c 'write 0 1M' v2.qcow2
qemu-img create -f qcow2 -o cluster_size=512 tiny.qcow2 1M; qemu-io -c 'write 511k 300k' tiny.qcow2
qemu-img create -f qcow2 -b data.raw -F raw over.qcow2 2M; qemu-io -c 'write 1M 100k' over.qcow2
qemu-img create -f qcow2 full.qcow2 5M; qemu-io -c 'write 0 5M' full.qcow2
ln -s a.raw link.raw; cp a.raw ro.raw; chmod 444 ro.raw
cp plain.qcow2 corrupt.qcow2; printf '\x02' | dd of=corrupt.qcow2 bs=1 seek=79 conv=notrunc status=none
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("resize") / "gallery"
    path.mkdir()
    setup(GALLERY, path)
    return twins(path)


LINES = [
    *("-f raw %s %s %s" % (image, option, size) for image in ("a.raw", "odd.raw", "empty", "data.raw") for option in ("", "--shrink") for size in (
        "2M", "1M", "512", "1000", "0", "+512", "-- -512", "+0", "1048577", "-- -1G", "3000001")),
    *("%s %s %s" % (image, option, size) for image in ("plain.qcow2", "v2.qcow2", "tiny.qcow2", "over.qcow2", "full.qcow2")
      for option in ("", "--shrink") for size in ("1M", "2M", "+1M", "-- -512k", "0", "1000", "512", "20G", "1536k", "7E")),
    *("--preallocation %s %s %s" % (mode, image, size) for mode in ("off", "metadata", "falloc", "full", "bad")
      for image in ("-f raw a.raw", "plain.qcow2", "tiny.qcow2", "over.qcow2") for size in ("4M", "1M")),
    "a.raw 2M",
    "data.raw 1M",
    "--shrink data.raw 1M",
    "-q a.raw 2M",
    "-q -f raw a.raw 2M",
    "-q -f raw data.raw 1M",
    "link.raw 2M",
    "nosuch 2M",
    "-f qcow2 a.raw 2M",
    "-f nosuch a.raw 2M",
    "-f file a.raw 2M",
    "-f raw a.raw 8E",
    "-f raw a.raw 7.9E",
    "-f raw a.raw 18446744073709551615",
    "-f raw a.raw +9223372036854775807",
    "-f raw a.raw 1x",
    "-f raw a.raw 1.5",
    "null-co:// 5M",
    "-f raw null-co:// 5M",
    "-f raw null-co:// 1G",
    "--image-opts driver=raw,file.filename=a.raw,size=512 1M",
    "--image-opts driver=raw,file.filename=a.raw,offset=512 2M",
    "--image-opts file.filename=a.raw 2M",
    "--image-opts driver=qcow2,file.filename=plain.qcow2 2M",
    "--image-opts driver=qcow2,file.filename=plain.qcow2,read-only=on 2M",
    "corrupt.qcow2 2M",
    "a.raw",
]


def restore(source: Path, copy: Path) -> None:
    for path in source.iterdir():
        if not path.is_symlink():
            target = copy / path.name
            subprocess.run(["cp", "-a", "--sparse=always", str(path), str(target)], check=True)


@pytest.mark.parametrize("line", LINES)
def test_lines(pair: tuple[Path, Path], line: str) -> None:
    args = ["resize", *shlex.split(line)]
    source = pair[0].with_name("gallery")
    expected = theirs(args, pair[0])
    found = ours(args, pair[1])
    try:
        assert found == expected, difference(line, found, expected)
        for path in sorted(source.iterdir()):
            left, right = pair[0] / path.name, pair[1] / path.name
            if path.suffix != ".qcow2" or "-f raw" in line:
                assert left.stat().st_size == right.stat().st_size
            if left.stat().st_size > 1 << 30 or not line.count(path.name):
                continue
            infos = [theirs(["map", "--output=json", path.name], place).out.count("start") for place in pair]
            assert infos[0] > 0 and infos[1] > 0
            sizes = [diskwright.info(str(place / path.name))[0].virtual_size for place in pair]
            assert sizes[0] == sizes[1]
            assert theirs(["check", path.name], pair[1]).code in (0, 63)
            if sizes[0] < 100 << 20:
                assert theirs(["compare", str(left), str(right)], pair[0]).code == 0
    finally:
        if expected.code == 0 or found.code == 0:
            restore(source, pair[0])
            restore(source, pair[1])


def test_result(tmp_path: Path) -> None:
    """The function returns the new size, and says apart that it would shrink."""
    image = str(tmp_path / "x.raw")
    diskwright.create(image, 1 << 20)
    assert diskwright.resize(image, 4096, relative=1, format="raw") == (1 << 20) + 4096
    with pytest.raises(WouldShrink):
        diskwright.resize(image, 512, format="raw")
    said: list[str] = []
    diskwright.resize(image, 512, shrink=True, warn=said.append)
    assert len(said) == 1 and "probing guessed raw" in said[0]


def test_in_use(tmp_path: Path) -> None:
    """An image that another process has open is refused in the same words."""
    setup("qemu-img create -f qcow2 x.qcow2 1M", tmp_path)
    holder = subprocess.Popen(["qemu-io", "-f", "qcow2", "x.qcow2"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdin and holder.stdout
        holder.stdin.write("length\n")
        holder.stdin.flush()
        while "1 MiB" not in holder.stdout.readline():
            pass
        assert ours(["resize", "x.qcow2", "2M"], tmp_path) == theirs(["resize", "x.qcow2", "2M"], tmp_path)
    finally:
        holder.communicate("quit\n")


def test_no_space(tmp_path: Path) -> None:
    """More than the host has."""
    free = shutil.disk_usage(tmp_path).free
    setup("qemu-img create -f raw x.raw 1M; qemu-img create -f qcow2 x.qcow2 1M", tmp_path)
    for line in ("--preallocation falloc -f raw x.raw %d" % (free + (1 << 40)), "--preallocation falloc x.qcow2 %d" % (free + (1 << 34))):
        expected = theirs(["resize", *line.split()], tmp_path)
        found = ours(["resize", *line.split()], tmp_path)
        assert expected.code == 1
        assert found == expected, difference(line, found, expected)
        assert (tmp_path / "x.raw").stat().st_size == 1 << 20
