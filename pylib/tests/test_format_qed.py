# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""qed beside qemu-img: options, images both ways, backing files, the need-check mark, check and repair of damaged tables."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from side_by_side import ours, same, setup, theirs, twins

from diskwright.errors import Error
from diskwright.graph import open_image
from diskwright.node import OpenFlags

K = 1024
M = 1024 * K
OPTIONS = ["", "-o cluster_size=4k", "-o cluster_size=1M,table_size=2", "-o table_size=16", "-o cluster_size=4k,table_size=16"]
FIELDS = {
    "magic": (0, 4),
    "cluster_size": (4, 4),
    "table_size": (8, 4),
    "header_size": (12, 4),
    "features": (16, 8),
    "compat_features": (24, 8),
    "autoclear_features": (32, 8),
    "l1_table_offset": (40, 8),
    "image_size": (48, 8),
    "backing_filename_offset": (56, 4),
    "backing_filename_size": (60, 4),
}
NEED_CHECK = 2


def set_field(data: bytes, name: str, value: int) -> bytes:
    at, width = FIELDS[name]
    return data[:at] + (value & (1 << 8 * width) - 1).to_bytes(width, "little") + data[at + width :]


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that qemu made, with data, zeroes and holes."""
    place = tmp_path_factory.mktemp("pattern")
    setup(
        "qemu-img create -q -f qed -o cluster_size=4k,table_size=2 image 4M\n"
        "qemu-io -f qed -c 'write -P 1 0 64k' -c 'write -P 2 1M 32k' -c 'write -P 5 3M 100k' -c 'write -z 2M 16k' image",
        place,
    )
    return place / "image"


def test_creating(tmp_path: Path) -> None:
    """The same words and the same bytes, but that our L1 table takes no room."""
    lines = [
        *("create -f qed %s image 5M" % options for options in OPTIONS),
        "create -f qed image 1000001",
        "create -f qed image 0",
        "create -f qed image 64T",
        "create -f qed -u -b base -F raw image 1M",
        "create -f qed -u -b base -F qcow2 image 1M",
        "create -f qed -u -b json:{} -F raw image 1M",
        *("create -f qed -o %s image 1M" % options for options in ("backing_fmt=raw", "preallocation=full", "size=3M", "foo=1")),
        *("create -f qed -o cluster_size=%s image 1M" % size for size in ("0", "1", "2k", "3k", "5000", "4M", "64M", "128M")),
        *("create -f qed -o table_size=%s image 1M" % size for size in (0, 3, 17, 32)),
        "create -f qed image 65T",
        "create -f qed image 9E",
        "create -f qed -o cluster_size=4k,table_size=2 image 9G",
        "create -f qed image",
    ]
    for line in lines:
        (tmp_path / "image").unlink(missing_ok=True)
        assert theirs(line.split(), tmp_path) == ours(line.split(), tmp_path), line
        written = (tmp_path / "image").read_bytes() if (tmp_path / "image").exists() else None
        (tmp_path / "image").unlink(missing_ok=True)
        theirs(line.split(), tmp_path)
        assert written == ((tmp_path / "image").read_bytes() if (tmp_path / "image").exists() else None), line


def test_the_options_of_create(tmp_path: Path) -> None:
    expected, mine = theirs("create -f qed -o help".split(), tmp_path), ours("create -f qed -o help".split(), tmp_path)
    assert [line.partition(" - ")[0] for line in mine.out.splitlines()] == [line.partition(" - ")[0] for line in expected.out.splitlines()]


def test_an_image_of_qemu(pattern: Path) -> None:
    for line in ("info", "info --output=json", "map", "map --output=json", "check", "check --output=json", "check -r all", "compare -s image", "snapshot -l"):
        same("%s image" % line, pattern.parent)


@pytest.mark.parametrize("options", OPTIONS)
def test_converting_both_ways(tmp_path: Path, pattern: Path, options: str) -> None:
    for name, run in (("theirs", theirs), ("ours", ours)):
        assert run(("convert -O qed %s %s %s" % (options, pattern, name)).split(), tmp_path).code == 0
    for line in ("compare %s ours" % pattern, "compare ours theirs", "check ours", "check --output=json ours", "check theirs"):
        assert same(line, tmp_path).code == 0
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


CHAIN = (
    "qemu-img create -q -f raw base 3M; qemu-io -f raw -c 'write -P 7 0 3M' base\n"
    "qemu-img create -q -f qed -b base -F raw image 4M; qemu-io -f qed -c 'write -P 8 100k 100k' -c 'write -z 1M 1M' image\n"
    "qemu-img create -q -f qcow2 other 2M; qemu-io -f qcow2 -c 'write -P 7 64k 64k' -c 'write -P 9 1M 1M' other\n"
    "qemu-img create -q -f qed -b image -F qed top 4M; qemu-io -f qed -c 'write -P 6 3M 50k' top\n"
)
CHANGES = [
    "rebase -f qed -b other -F qcow2 image",
    "rebase -f qed -b '' image",
    "rebase -f qed -u -b other -F qcow2 image",
    "rebase -f qed -u -b '' image",
    "rebase -f qed -u -b new -F raw image",
    "rebase -f qed -c -b '' image",
    "commit -f qed image",
    "commit -f qed -d image",
    "commit -f qed top",
    "commit -f qed -b base top",
    "resize -f qed image 5M",
    "resize -f qed image 1T",
    "resize -f qed top 10M",
    "resize -f qed --shrink image 2M",
    "resize -f qed image 3M",
    "resize -f qed image 65T",
    "resize -f qed --preallocation=falloc image 5M",
    "amend -f qed -o size=5M image",
    "snapshot -c a image",
    "convert -c -O qed image new",
    "convert -O qed -B base -F raw image new",
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
            if not (left / name).exists():
                continue
            assert theirs(["info", "-U", name], left).out.split("disk size")[0] == theirs(["info", "-U", name], right).out.split("disk size")[0], line
            if name != "base" and "-b new" not in line:
                assert theirs(["compare", str(left / name), name], right).code == 0, (line, name)
                assert theirs(["check", name], right).code == 0


def test_growing_hides_the_backing_file(tmp_path: Path) -> None:
    """What is added to an image reads as zeroes, whatever its backing file has there (qemu-img refuses to grow such an image)."""
    setup("qemu-img create -q -f raw base 3M; qemu-io -f raw -c 'write -P 7 0 3M' base; qemu-img create -q -f qed -b base -F raw image 1000k", tmp_path)
    assert ours("resize -f qed image 4M".split(), tmp_path).code == 0
    with open_image(str(tmp_path / "image")) as node:
        assert node.pread(0, 4 * M) == b"\7" * 1000 * K + bytes(4 * M - 1000 * K)
    assert theirs("check image".split(), tmp_path).code == 0


def test_the_need_check_mark(tmp_path: Path, pattern: Path) -> None:
    """No obstacle to reading, and gone once an image without corruptions is opened for writing; info does not tell of it."""
    path = tmp_path / "image"
    marked = set_field(pattern.read_bytes(), "features", NEED_CHECK)
    path.write_bytes(marked)
    for line in ("info image", "info --output=json image", "check image", "map image"):
        same(line, tmp_path)
    assert path.read_bytes() == marked
    for line in ("check -r all image", "check -r leaks image", "resize image 5M"):
        path.write_bytes(marked)
        expected = theirs(line.split(), tmp_path), path.read_bytes()
        path.write_bytes(marked)
        assert (ours(line.split(), tmp_path), path.read_bytes()) == expected
    broken = bytearray(marked)
    l1 = struct.unpack_from("<Q", broken, 40)[0]
    l2 = struct.unpack_from("<Q", broken, l1)[0]
    struct.pack_into("<Q", broken, l2 + 8, 1 << 40)  # repaired when it is opened
    path.write_bytes(broken)
    with open_image(str(path), None, OpenFlags(writable=True)) as node:
        assert node.pread(4 * K, 4 * K) == bytes(4 * K)
    assert theirs(["check", "image"], tmp_path).code == 3  # the cluster that it should have pointed at is nobody's


def test_features(tmp_path: Path, pattern: Path) -> None:
    path = tmp_path / "image"
    for name, value in (("features", 8), ("features", 1 << 63), ("features", 0xF0), ("compat_features", 0xFF), ("autoclear_features", 0xFF)):
        data = set_field(pattern.read_bytes(), name, value)
        path.write_bytes(data)
        same("info -f qed image", tmp_path)
        for run in (theirs, ours):  # unknown autoclear bits are gone after a write
            path.write_bytes(data)
            if run("resize -f qed image 5M".split(), tmp_path).code == 0:
                assert struct.unpack_from("<QQ", path.read_bytes(), 24) == ((value if name == "compat_features" else 0), 0)


def damaged(chance: random.Random, whole: bytes) -> bytes:
    """A copy with a few entries or fields that make no sense."""
    data = bytearray(whole)
    l1 = struct.unpack_from("<Q", data, 40)[0]
    l2 = struct.unpack_from("<Q", data, l1)[0]
    for _turn in range(chance.choice((1, 1, 2, 3))):
        table = chance.choice((l1, l2, l2, l2))
        value = chance.choice((0, 1, 2, 4095, 4096, l1, l2, 0x5000, 0x8000, len(data), len(data) - 4096, 1 << 40, (1 << 64) - 4096))
        struct.pack_into("<Q", data, table + 8 * chance.choice((0, 0, 1, 2, 3, 7, 9, 100, 511)), value)
    return bytes(data)


def test_check_and_repair_of_damaged_tables(tmp_path: Path, pattern: Path) -> None:
    """The same findings, the same repair, byte for byte; reading fails where qemu-img's fails."""
    chance = random.Random(2)
    whole = pattern.read_bytes()
    path = tmp_path / "image"
    for _turn in range(45):
        data = damaged(chance, whole)
        path.write_bytes(data)
        same("check --output=json -f qed image", tmp_path)
        expected = theirs("check -r all -f qed image".split(), tmp_path), path.read_bytes()
        path.write_bytes(data)
        assert (ours("check -r all -f qed image".split(), tmp_path), path.read_bytes()) == expected
        path.write_bytes(data)
        args = "convert -f qed -O raw image out".split()
        left, right = theirs(args, tmp_path), ours(args, tmp_path)
        assert left.code == right.code and right.err.startswith(left.err), (left, right)


def test_damaged_headers(tmp_path: Path, pattern: Path) -> None:
    whole = pattern.read_bytes()
    path = tmp_path / "image"
    for name, (_at, width) in FIELDS.items():
        for value in (0, 1, 2, 4096, 1 << 20, 1 << 31, (1 << 8 * width) - 1, 1 << 8 * width - 1, (1 << 8 * width) - 4096):
            path.write_bytes(set_field(whole, name, value))
            if name != "table_size" or value != 1:  # qemu-img refuses what it makes itself
                same("info -f qed image", tmp_path)
            touch(path)


def touch(path: Path, **flags: Any) -> None:
    """Open, read a bit, check: whatever it is that comes of it, it is ours."""
    try:
        with open_image(str(path), "qed", OpenFlags(check=True, **flags)) as node:
            node.resolve(0, node.size, limit=100)
            node.pread(0, min(node.size, 4096))
            node.check()
    except Error as exc:
        assert str(exc)


def test_hostile_tables(tmp_path: Path) -> None:
    """The largest tables, all of them sparse or all the same one."""
    path = tmp_path / "image"
    header = struct.pack("<4I5Q2I", 0x444551, 64 * M, 1, 1, 0, 0, 0, 64 * M, 1 << 62, 0, 0)
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(1 << 43)
    touch(path)
    header = struct.pack("<4I5Q2I", 0x444551, 4096, 16, 1, 0, 0, 0, 4096, 1 << 37, 0, 0)
    table = struct.pack("<Q", 4096 + 65536) * 8192
    path.write_bytes(header.ljust(4096, b"\0") + table + table)
    touch(path)
    path.write_bytes(header.ljust(4096, b"\0") + struct.pack("<Q", 4096) * 8192)
    touch(path)
    touch(path, writable=True)


def test_cut_files(tmp_path: Path, pattern: Path) -> None:
    whole = pattern.read_bytes()
    path = tmp_path / "image"
    for length in [*(at for at, _width in FIELDS.values()), 63, 64, 100, 4095, 4096, 12287, 12288, 20000, len(whole) - 1]:
        path.write_bytes(whole[:length])
        same("info -f qed image", tmp_path)
        same("check -f qed image", tmp_path)


def test_a_table_of_one_cluster(tmp_path: Path) -> None:
    """qemu-img makes such images, and then refuses them; we read and write them."""
    assert ours("create -f qed -o table_size=1,cluster_size=4k image 4M".split(), tmp_path).code == 0
    with open_image(str(tmp_path / "image"), None, OpenFlags(writable=True)) as node:
        node.pwrite(3 * M, b"x" * 5000)
    with open_image(str(tmp_path / "image")) as node:
        assert node.pread(3 * M - 1, 5002) == b"\0" + b"x" * 5000 + b"\0"
        assert node.check().clean
