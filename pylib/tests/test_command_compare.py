# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`compare` against qemu-img: what is printed, and the exit codes 0 to 4."""

from __future__ import annotations

import struct
from pathlib import Path

import diskwright
import pytest
from side_by_side import ours, same, setup, theirs

GALLERY = r"""
qemu-img create -f raw zero.raw 1M; qemu-img create -f raw long.raw 3M; truncate -s 0 empty; truncate -s 1000 odd
qemu-img create -f raw some.raw 1M; qemu-io -f raw -c 'write -P 1 0 4k' -c 'write -P 1 64k 64k' some.raw
cp --sparse=always some.raw other.raw; printf x | dd of=other.raw bs=1 seek=70000 conv=notrunc status=none
cp --sparse=always some.raw full.raw; fallocate full.raw -l 1M; cat some.raw > solid.raw
cp --sparse=always some.raw longer.raw; truncate -s 2M longer.raw
cp --sparse=always longer.raw tail.raw; printf x | dd of=tail.raw bs=1 seek=1500000 conv=notrunc status=none
for v in 2:compat=0.10 3:compat=1.1 s:cluster_size=512 b:cluster_size=2M; do
    qemu-img convert -O qcow2 -o ${v#*:} some.raw ${v%:*}.qcow2
done
qemu-img convert -c -O qcow2 some.raw c.qcow2
qemu-img create -f qcow2 -o preallocation=metadata meta.qcow2 1M
qemu-img create -f qcow2 void.qcow2 1M
qemu-img create -f qcow2 zeroed.qcow2 1M; qemu-io -c 'write -z 0 512k' zeroed.qcow2
qemu-img create -f qcow2 -F raw -b some.raw over.qcow2; qemu-img create -f qcow2 -F raw -b some.raw over2.qcow2 2M
qemu-img create -f qcow2 -F qcow2 -b over.qcow2 more.qcow2; qemu-io -c 'write -P 3 256k 10k' more.qcow2
"""

NAMES = (
    "zero.raw long.raw empty odd some.raw other.raw full.raw solid.raw longer.raw tail.raw 2.qcow2 3.qcow2 s.qcow2 b.qcow2 c.qcow2 "
    "meta.qcow2 void.qcow2 zeroed.qcow2 over.qcow2 over2.qcow2 more.qcow2"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare")
    setup(GALLERY, path)
    image = bytearray((path / "c.qcow2").read_bytes())
    (table,) = struct.unpack_from(">Q", image, 40)
    (entry,) = struct.unpack_from(">Q", image, table)
    (descriptor,) = struct.unpack_from(">Q", image, (entry & ~(1 << 63)) + 8)  # the cluster at 64 KiB
    start = descriptor & ((1 << 54) - 1)
    image[start : start + 4] = b"\xff\xff\xff\xff"
    (path / "bad.qcow2").write_bytes(image)
    image = bytearray((path / "3.qcow2").read_bytes())
    struct.pack_into(">Q", image, table, (1 << 63) + 513)
    (path / "lost.qcow2").write_bytes(image)
    return path


@pytest.mark.parametrize("left", NAMES)
def test_all_pairs(place: Path, left: str) -> None:
    for right in NAMES[NAMES.index(left) :]:
        same("compare %s %s" % (left, right), place)


@pytest.mark.parametrize("left", NAMES)
def test_all_pairs_strictly(place: Path, left: str) -> None:
    for right in NAMES[: NAMES.index(left) + 1]:
        same("compare -s %s %s" % (left, right), place)


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=8k", "cluster_size=64k", "cluster_size=32k,extended_l2=on", "qed"])
def test_strictly_what_several_tables_map(tmp_path: Path, options: str) -> None:
    """The last range of an image is marked as such, and that begins where QEMU looked up a table: strict comparison sees it."""
    made = "-f qed -o cluster_size=4k,table_size=2" if options == "qed" else "-f qcow2 -o " + options
    span = {"qed": 4, "cluster_size=4k": 2, "cluster_size=8k": 8, "cluster_size=64k": 512, "cluster_size=32k,extended_l2=on": 64}[options]
    for size, code in ((span, 0), (span + 1, 1)):
        setup("truncate -s %dM raw; qemu-img create -q %s -b raw -F raw image; rm -rf raw2; cp raw raw2" % (size, made), tmp_path)
        assert same("compare -s -F raw image raw2", tmp_path).code == code


def test_strictly_over_a_directory(tmp_path: Path) -> None:
    setup("mkdir files; echo data > files/name; qemu-img create -q -f qcow2 -b fat:files -F raw image", tmp_path)
    assert same("compare -s -F raw image fat:files", tmp_path).code == 0


LINES = [
    "-q some.raw other.raw",
    "-q some.raw longer.raw",
    "-q some.raw some.raw",
    "-f raw -F qcow2 some.raw 3.qcow2",
    "-f qcow2 some.raw some.raw",
    "-F qcow2 some.raw some.raw",
    "-F nix some.raw some.raw",
    "gone some.raw",
    "some.raw gone",
    "-T none some.raw 3.qcow2",
    "-T nix some.raw 3.qcow2",
    "-U some.raw 3.qcow2",
    "--image-opts driver=raw,file.filename=some.raw driver=qcow2,file.filename=3.qcow2",
    "--image-opts -f raw some.raw some.raw",
    "--image-opts driver=raw,offset=65536,size=65536,file.filename=some.raw driver=raw,offset=65536,size=65536,file.filename=other.raw",
    "bad.qcow2 some.raw",
    "some.raw bad.qcow2",
    "bad.qcow2 other.raw",
    "bad.qcow2 zero.raw",
    "-s bad.qcow2 c.qcow2",
    "some.raw",
    "some.raw some.raw some.raw",
    "-p empty empty",
]


@pytest.mark.parametrize("line", LINES)
def test_lines(place: Path, line: str) -> None:
    same("compare " + line, place)


def test_a_hole_in_the_middle_of_a_bad_image_is_reported(place: Path) -> None:
    found = ours(["compare", "bad.qcow2", "some.raw"], place)
    assert found.code == 4 and found.err.startswith("qemu-img: Error while reading offset 65536 of bad.qcow2: Input/output error\n")


def test_status_that_cannot_be_read_is_exit_code_3(place: Path) -> None:
    """An L2 table beyond the end of the world: qemu-img and we agree on 3."""
    expected = theirs(["compare", "lost.qcow2", "some.raw"], place)
    found = ours(["compare", "lost.qcow2", "some.raw"], place)
    assert found.code == expected.code == 3
    assert "Sector allocation test failed for lost.qcow2" in found.err and "Sector allocation test failed for lost.qcow2" in expected.err


def test_from_python(place: Path) -> None:
    result = diskwright.compare(str(place / "some.raw"), str(place / "other.raw"))
    assert not result and not result.identical
    assert (result.kind, result.offset, result.sizes) == ("content", 69632, (1 << 20, 1 << 20))
    result = diskwright.compare(str(place / "some.raw"), str(place / "longer.raw"))
    assert result and (result.kind, result.offset, result.sizes) == (None, None, (1 << 20, 2 << 20))
    result = diskwright.compare(str(place / "some.raw"), str(place / "longer.raw"), strict=True)
    assert (result.kind, result.offset) == ("size", None)
    assert diskwright.compare(str(place / "some.raw"), str(place / "3.qcow2"), strict=True).kind == "status"
    with pytest.raises(diskwright.Error, match="Error while reading offset 65536 of .*bad.qcow2: Input/output error"):
        diskwright.compare(str(place / "bad.qcow2"), str(place / "some.raw"))
