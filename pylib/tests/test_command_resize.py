# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`resize` against qemu-img: the texts, and the images afterwards."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import diskwright
from diskwright.commands.resize import WouldShrink
from side_by_side import difference, ours, same_space, setup, theirs, twins

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
    *(
        "-f raw %s %s %s" % (image, option, size)
        for image in ("a.raw", "odd.raw", "empty", "data.raw")
        for option in ("", "--shrink")
        for size in ("2M", "1M", "512", "1000", "0", "+512", "-- -512", "+0", "1048577", "-- -1G", "3000001")
    ),
    *(
        "%s %s %s" % (image, option, size)
        for image in ("plain.qcow2", "v2.qcow2", "tiny.qcow2", "over.qcow2", "full.qcow2")
        for option in ("", "--shrink")
        for size in ("1M", "2M", "+1M", "-- -512k", "0", "1000", "512", "2G", "1536k", "7E")
    ),
    *(
        "--preallocation %s %s %s" % (mode, image, size)
        for mode in ("off", "metadata", "falloc", "full", "bad")
        for image in ("-f raw a.raw", "plain.qcow2", "tiny.qcow2", "over.qcow2")
        for size in ("4M", "1M")
    ),
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


@pytest.mark.parametrize("line", LINES)
def test_lines(pair: tuple[Path, Path], line: str) -> None:
    args = ["resize", *shlex.split(line)]
    source = pair[0].with_name("gallery")
    before = [path.name for path in source.iterdir() if not path.is_symlink()]
    changed = [name for name in before if name in line] or before
    expected = theirs(args, pair[0])
    found = ours(args, pair[1])
    try:
        assert found == expected, difference(line, found, expected)
        for name in changed:
            if expected.code == 0:
                compare(name, *pair)
            else:
                assert (pair[1] / name).read_bytes() == (source / name).read_bytes()
    finally:
        for copy in pair if expected.code == 0 or found.code == 0 else ():
            subprocess.run(["cp", "-a", "--sparse=always", *(str(source / name) for name in changed), str(copy)], check=True)


def compare(name: str, left: Path, right: Path) -> None:
    """Both files are of one size (the virtual size, where they have metadata), consistent, and of one content."""
    sizes = [diskwright.info(str(place / name))[0].virtual_size for place in (left, right)]
    assert sizes[0] == sizes[1]
    if not name.endswith(".qcow2"):
        assert (left / name).stat().st_size == (right / name).stat().st_size
        assert same_space(left / name, right / name)
    else:
        assert theirs(["check", name], right).code == 0
    if sizes[0] < 100 << 20:
        assert theirs(["compare", str(left / name), str(right / name)], left).code == 0


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
    """On a file system of 4 MiB: the same words, and the image is what it was."""
    for line in ("--preallocation falloc -f raw x.raw 20M", "--preallocation full -f raw x.raw 20M", "--preallocation falloc x.qcow2 20M"):
        found = on_small_disk("qemu-img create -q -f raw x.raw 1M; qemu-img create -q -f qcow2 x.qcow2 1M", "resize " + line, tmp_path)
        assert found[0] == found[1], line
        assert "code 1" in found[0] and "No space left on device" in found[0]


def on_small_disk(before: str, line: str, place: Path) -> list[str]:
    """What a command line prints and leaves on a tmpfs of 4 MiB, by qemu-img and by us."""
    program = "import sys; sys.argv[0] = 'qemu-img'; from diskwright.cli import main; sys.exit(main())"
    texts = []
    for tool in ("qemu-img", "%s -c %s" % (sys.executable, shlex.quote(program))):
        script = (
            "mount -t tmpfs -o size=4M none . && cd $PWD && %s && { %s %s; echo code $?; stat -c '%%n %%s' x.raw; qemu-img info x.qcow2 | grep virtual; }"
            % (before, tool, line)
        )
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=place, capture_output=True, text=True, timeout=60, check=True)
        texts.append(done.stdout + done.stderr)
    return texts
