# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""qcow (version 1) beside qemu-img: options, images both ways, compressed and encrypted ones, backing files, damaged images."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from side_by_side import Outcome, ours, same, setup, theirs, twins

from diskwright.errors import Error
from diskwright.graph import open_image
from diskwright.node import OpenFlags

K = 1024
M = 1024 * K
SECRET = "--object secret,id=s,data=abc --object secret,id=w,data=wrong "
FIELDS = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "mtime": (20, 4),
    "size": (24, 8),
    "cluster_bits": (32, 1),
    "l2_bits": (33, 1),
    "crypt_method": (36, 4),
    "l1_table_offset": (40, 8),
}


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw image with data, text and holes, and the same as qcow images of qemu."""
    place = tmp_path_factory.mktemp("pattern")
    setup("qemu-img create -q -f raw raw 4M; for at in 0 1M 1100k 3M; do qemu-io -f raw -c \"write -P 5 $at 30k\" raw; done", place)
    chance = random.Random(1)
    with (place / "raw").open("r+b") as stream:
        stream.seek(2 * M)
        stream.write(chance.randbytes(100 * K) + b"text " * 20000)
    setup(
        "qemu-img convert -O qcow raw image; qemu-img convert -c -O qcow raw packed || true\n"
        "qemu-img convert %s -O qcow -o encrypt.format=aes,encrypt.key-secret=s raw secret" % SECRET,
        place,
    )
    return place / "raw"


CREATED = [
    "-f qcow image 5M",
    "-f qcow image 1000001",
    "-f qcow image 0",
    "-f qcow image 1",
    "-f qcow image 1T",
    "-f qcow image",
    "-f qcow -u -b base -F raw image 3M",
    "-f qcow -u -b a-longer-name -F qcow2 image 3M",
    "-f qcow -o size=5000 image",
    "-f qcow -o backing_fmt=raw image 1M",
    "-f qcow -o cluster_size=4k image 1M",
    "-f qcow -o preallocation=full image 1M",
    "-f qcow -o encrypt.format=aes,encrypt.key-secret=s image 1M",
    "-f qcow -o encryption=on,encrypt.key-secret=s image 1M",
    "-f qcow -o encryption=off image 1M",
    "-f qcow -o encryption=on image 1M",
    "-f qcow -o encrypt.key-secret=s image 1M",
    "-f qcow -o encrypt.format=luks,encrypt.key-secret=s image 1M",
    "-f qcow -o encrypt.format=none,encrypt.key-secret=s image 1M",
    "-f qcow -o encrypt.format=aes,encrypt.key-secret=nope image 1M",
    "-f qcow -o encryption=on,encrypt.format=aes,encrypt.key-secret=s image 1M",
]


def test_creating(tmp_path: Path) -> None:
    """The same words and the same bytes."""
    image = tmp_path / "image"
    for line in CREATED:
        found = []
        for run in (theirs, ours):
            image.unlink(missing_ok=True)
            outcome = run(("create " + SECRET + line).split(), tmp_path)
            # (qemu-img leaves a last sector that it has not filled up)
            found.append((outcome, None if outcome.code else image.read_bytes().rstrip(b"\0")))
        assert found[0] == found[1], line


def test_what_cannot_be_created(tmp_path: Path) -> None:
    """qemu-img makes images that it cannot open, or writes gigabytes of zeroes first."""
    for line in ("create -f qcow image 1P", "create -f qcow -u -b %s -F raw image 1M" % ("n" * 1024)):
        assert ours(line.split(), tmp_path).code == 1
        assert not (tmp_path / "image").exists()


def test_images_of_qemu(pattern: Path) -> None:
    place = pattern.parent
    for name in ("image", "packed"):
        for line in ("info", "info --output=json", "map", "map --output=json", "check", "check -r all", "measure -O qcow2", "compare raw", "compare -s packed"):
            same("%s %s" % (line, name), place)
    same("compare -s image packed", place)


def test_encrypted_images(pattern: Path, tmp_path: Path) -> None:
    place = pattern.parent
    described = "driver=qcow,file.filename=secret,encrypt.key-secret=%s"
    for line in (
        "info secret",
        "info --output=json secret",
        "map secret",
        "info --image-opts %s" % described % "s",
        "map --output=json --image-opts %s" % described % "s",
        "map --output=json --image-opts %s,encrypt.format=aes" % described % "s",
        "info --image-opts %s,encrypt.format=luks" % described % "s",
        "info --image-opts driver=qcow,file.filename=image,encrypt.format=aes,encrypt.key-secret=s",
        "map --image-opts %s" % described % "nope",
        "compare --image-opts %s driver=raw,file.filename=raw" % described % "s",
        "compare --image-opts %s driver=raw,file.filename=raw" % described % "w",
        "convert -c -O qcow -o encrypt.format=aes,encrypt.key-secret=s raw new",
    ):
        verb, _space, rest = line.partition(" ")
        same("%s %s%s" % (verb, SECRET, rest), place)
    line = "convert %s-O qcow -o encrypt.format=aes,encrypt.key-secret=s %s ours" % (SECRET, pattern)
    assert ours(line.split(), tmp_path) == Outcome(0, "", "")
    line = "compare %s--image-opts driver=qcow,file.filename=ours,encrypt.key-secret=s driver=raw,file.filename=%s" % (SECRET, pattern)
    assert same(line, tmp_path).code == 0


@pytest.mark.parametrize("options", ["", "-c", "-S 0"])
def test_converting_both_ways(tmp_path: Path, pattern: Path, options: str) -> None:
    """With -c, too, the exit code is 0; qemu-img's is 1, though all went well."""
    line = "convert %s -O qcow %s %%s" % (options, pattern)
    assert theirs((line % "theirs").split(), tmp_path).code == (1 if "-c" in options else 0)
    assert ours((line % "ours").split(), tmp_path) == Outcome(0, "", "")
    for names in ("%s ours" % pattern, "ours theirs"):
        assert same("compare %s" % names, tmp_path).code == 0
    sizes = [(tmp_path / name).stat().st_size for name in ("ours", "theirs")]
    assert sizes[0] <= sizes[1]
    with open_image(str(tmp_path / "ours"), None, OpenFlags(writable=True)) as node:  # and over it
        content = bytearray(node.pread(0, node.size))
        for offset in (0, 2 * M + 70000, 2 * M + 120000, 3 * M + 5):
            node.pwrite(offset, b"new" * 1000)
            content[offset : offset + 3000] = b"new" * 1000
    (tmp_path / "raw").write_bytes(content)
    assert same("compare raw ours", tmp_path).code == 0


CHAIN = (
    "qemu-img create -q -f raw base 3M; qemu-io -f raw -c 'write -P 7 0 3M' base\n"
    "qemu-img create -q -f qcow -b base -F raw image 4M; qemu-io -f qcow -c 'write -P 8 100k 100k' -c 'write -z 1M 1M' image\n"
    "qemu-img create -q -f qcow2 -b image -F qcow top 4M; qemu-io -f qcow2 -c 'write -P 6 3M 50k' top\n"
)
CHANGES = [
    "commit -f qcow image",
    "commit -f qcow -d image",
    "commit -f qcow2 top",
    "commit -f qcow2 -b base top",
    "rebase -f qcow -b '' image",
    "rebase -f qcow -u -b '' image",
    "resize -f qcow image 5M",
    "resize -f qcow --shrink image 1M",
    "amend -f qcow -o size=5M image",
    "snapshot -c a image",
    "convert -O qcow -B base -F raw image new",
    "measure -O qcow --size 1M",
    "measure -O qcow image",
]


def test_changes(tmp_path: Path) -> None:
    place = tmp_path / "images"
    place.mkdir()
    setup(CHAIN, place)
    for line in CHANGES:
        left, right = twins(place)
        args = [word.strip("'") for word in line.split()]
        expected, mine = theirs(args, left), ours(args, right)
        assert mine == expected, line
        for name in ("image", "top", "base", "new"):
            if (left / name).exists():
                assert theirs(["compare", str(left / name), name], right).code == 0, (line, name)
        if line == "commit -f qcow image":  # which empties it
            assert (left / "image").read_bytes() == (right / "image").read_bytes()


def test_what_is_refused(pattern: Path) -> None:
    for line in ("info -f qcow raw", "info -f qcow2 image", "create -f qcow -o help", "check -f qcow image", "bench -w -c 1 -f qcow missing"):
        expected, mine = theirs(line.split(), pattern.parent), ours(line.split(), pattern.parent)
        assert mine.code == expected.code and mine.err == expected.err
        assert [text.partition(" - ")[0] for text in mine.out.splitlines()] == [text.partition(" - ")[0] for text in expected.out.splitlines()]


def touch(path: Path, writable: bool = False) -> None:
    """Open, read, write a bit: whatever it is that comes of it, it is ours."""
    try:
        with open_image(str(path), "qcow", OpenFlags(writable=writable)) as node:
            node.resolve(0, node.size, limit=100)
            for offset in (0, node.size // 2, node.size - 512):
                node.pread(max(0, offset), min(node.size - offset, 4096))
            if writable:
                node.pwrite(0, b"x" * 512)
    except (Error, OSError) as exc:
        assert str(exc)


def test_damaged_headers(tmp_path: Path, pattern: Path) -> None:
    whole = (pattern.parent / "packed").read_bytes()
    path = tmp_path / "image"
    for name, (at, width) in FIELDS.items():
        for value in (0, 1, 2, 3, 8, 9, 16, 17, 1023, 1024, 1 << 31, 1 << 50, (1 << 64) - 1, 1 << 63, 1 << 8 * width - 1):
            value &= (1 << 8 * width) - 1
            path.write_bytes(whole[:at] + value.to_bytes(width, "big") + whole[at + width :])
            if value in (0, 1, 8, 17, 1024, 1 << 50, (1 << 8 * width) - 1) and (name, value) not in (("size", 1 << 50), ("backing_file_offset", 1 << 50)):
                expected, mine = theirs(["info", "-f", "qcow", "image"], tmp_path), ours(["info", "-f", "qcow", "image"], tmp_path)
                assert (mine.code, mine.err) == (expected.code, expected.err), (name, value)
            touch(path)
            touch(path, writable=True)


def test_damaged_tables(tmp_path: Path, pattern: Path) -> None:
    """Entries that lead nowhere, in circles, or to streams that are none; what qemu-img cannot read we cannot either."""
    whole = (pattern.parent / "packed").read_bytes()
    path = tmp_path / "image"
    l1 = struct.unpack_from(">Q", whole, 40)[0]
    l2 = struct.unpack_from(">Q", whole, l1)[0]
    chance = random.Random(3)
    packed = 1 << 63
    for _turn in range(30):
        data = bytearray(whole)
        for _change in range(chance.choice((1, 1, 3))):
            value = chance.choice((0, 1, 511, 512, l1, l2, len(whole), 1 << 40, 1 << 62, packed, packed + 5000, packed + (300 << 51) + 5000, (1 << 64) - 1))
            struct.pack_into(">Q", data, chance.choice((l1, l1 + 8, l2, l2 + 8, l2 + 16, l2 + 800)), value)
        path.write_bytes(data)
        args = ["convert", "-f", "qcow", "-O", "raw", "image", "out"]
        left, right = theirs(args, tmp_path), ours(args, tmp_path)
        assert not left.code or right.code, (left, right)
        touch(path)
        touch(path, writable=True)


def test_hostile_images(tmp_path: Path) -> None:
    """The largest L1 table, empty; tables in circles."""
    path = tmp_path / "image"
    for entry in (0, 48, 4096):
        path.write_bytes(struct.pack(">IIQIIQBBHIQ", 0x514649FB, 1, 0, 0, 0, 1 << 49, 16, 13, 0, 0, 48) + struct.pack(">Q", entry) * 600)
        touch(path)
        touch(path, writable=True)


def test_cut_files(tmp_path: Path, pattern: Path) -> None:
    whole = (pattern.parent / "packed").read_bytes()
    path = tmp_path / "image"
    for length in [*(at for at, _width in FIELDS.values()), 47, 48, 60, 4096, 5000, len(whole) - 1]:
        path.write_bytes(whole[:length])
        touch(path)
        if length < 48:
            with pytest.raises(Error):
                open_image(str(path), "qcow")
