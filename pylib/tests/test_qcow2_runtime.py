# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Runtime options of qcow2: what qemu-img refuses in the same words, and what they do to the file."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from diskwright.errors import Corrupt, Error
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags
from diskwright.units import parse_size

from qcow2_images import check_theirs, make, make_theirs, open_image, tool
from side_by_side import difference, ours, setup, theirs

K = 1024
M = 1024 * K
RW = OpenFlags(writable=True, resize=True, unmap=True)

GIVEN = """
lazy-refcounts=on
lazy-refcounts=maybe
pass-discard-request=2
pass-discard-snapshot=off
pass-discard-other=x
discard-no-unref=on
overlap-check=none
overlap-check=all
overlap-check=some
overlap-check=
overlap-check.template=constant
overlap-check.template=foo
overlap-check=all,overlap-check.template=all
overlap-check=all,overlap-check.template=none
overlap-check=none,overlap-check.main-header=on
overlap-check.main-header=of
overlap-check.active-l1=on,overlap-check.active-l2=on,overlap-check.refcount-table=on
overlap-check.refcount-block=on,overlap-check.snapshot-table=off,overlap-check.inactive-l1=on,overlap-check.inactive-l2=on
overlap-check.bitmap-directory=off
overlap-check.foo=on
cache-size=0
cache-size=1M
cache-size=-1
cache-size=1T
cache-size=8E
cache-size=x
cache-size=1M,l2-cache-size=2M
cache-size=1M,refcount-cache-size=2M
cache-size=1M,l2-cache-size=512k,refcount-cache-size=512k
l2-cache-size=1
l2-cache-size=8E
refcount-cache-size=1
refcount-cache-size=128T
refcount-cache-size=127T
l2-cache-entry-size=512
l2-cache-entry-size=256
l2-cache-entry-size=4095
l2-cache-entry-size=64k
l2-cache-entry-size=128k
cache-clean-interval=600
cache-clean-interval=4294967296
cache-clean-interval=-1
cache-clean-interval=abc
encrypt.format=luks
data-file=x
data-file.driver=file,data-file.filename=x
""".split()


@pytest.mark.parametrize("options", ["", "compat=0.10", "cluster_size=2M,extended_l2=on"])
def test_what_is_refused(tmp_path: Path, options: str) -> None:
    make_theirs(tmp_path / "x", M, options)
    for given in GIVEN:
        line = ["map", "--image-opts", "driver=qcow2,%s,file.filename=x" % given]
        expected, found = theirs(line, tmp_path), ours(line, tmp_path)
        assert found == expected, difference(" ".join(line), found, expected)


IMAGES = """
qemu-img create -q -f qcow2 plain 2M; qemu-io -c 'write -P 1 0 1M' -c 'write -c -P 2 1M 64k' -c 'write -P 1 1536k 64k' plain
cp plain snap; qemu-img snapshot -c s snap
qemu-img create -q -f qcow2 -o extended_l2=on sub 2M; qemu-io -c 'write -P 1 0 1M' -c 'write -c -P 2 1M 64k' -c 'write -P 1 1536k 64k' sub
truncate -s 2M base; qemu-img create -q -f qcow2 -b base -F raw over 2M; qemu-io -c 'write -P 1 0 1M' -c 'write -z 1M 512k' over
qemu-img create -q -f qcow2 -o data_file=data external 2M; qemu-io -c 'write -P 1 0 1M' external
"""
REQUESTS = ["discard 0 64k", "discard 74k 150k", "write -z 256k 64k", "write -z -u 320k 64k", "write -z -u 400k 2k", "discard 1M 64k"]
SETTINGS = [
    "",
    "pass-discard-request=on",
    "discard=unmap,pass-discard-request=off",
    "discard=unmap,pass-discard-other=on",
    "discard=unmap,discard-no-unref=on",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runtime")
    setup(IMAGES, place)
    return place


@pytest.mark.parametrize("name", ["plain", "snap", "sub", "over", "external"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_discarded_in_the_file(images: Path, tmp_path: Path, name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same map, places and all, and as many blocks of the disk as after qemu-io's requests (but for the last page of a file)."""
    options = "driver=qcow2,file.filename=%s" % name + ("," + setting if setting else "")
    requests = [request for request in REQUESTS if name != "external" or "1M" not in request]  # we discard there what was never written
    maps, blocks = [], []
    for who in ("theirs", "ours"):
        place = tmp_path / who
        place.mkdir()
        for file in (name, "base", "data"):
            shutil.copyfile(images / file, place / file)
        monkeypatch.chdir(place)
        if who == "theirs":
            commands = [arg for request in requests for arg in ("-c", request)]
            done = subprocess.run(["qemu-io", *commands, "--image-opts", options], capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0 and "failed" not in done.stdout
        else:
            with Graph().open(options, None, RW, True) as node:
                for request in requests:
                    words = request.split()
                    offset, length = (parse_size(word) for word in words[-2:])
                    if words[0] == "discard":
                        node.pdiscard(offset, length)
                    else:
                        node.pwrite_zeroes(offset, length, "-u" in words)
        maps.append(tool("qemu-img", "map", "--output=json", "-f", "qcow2", name))
        blocks.append(sum(os.stat(file).st_blocks for file in (name, "data")))
    assert maps[0] == maps[1]
    assert abs(blocks[0] - blocks[1]) <= 16
    assert check_theirs(tmp_path / "ours" / name) == 0


@pytest.mark.parametrize(("setting", "punched"), [(None, True), (True, True), (False, False)])
def test_what_a_snapshot_gives_back(tmp_path: Path, setting: object, punched: bool) -> None:
    path = tmp_path / "x"
    make(path, 4 * M)
    with open_image(path, **({} if setting is None else {"pass-discard-snapshot": setting})) as node:
        node.pwrite(0, b"1" * 2 * M)
        node.create_snapshot("s")
        node.pwrite(0, b"2" * 2 * M)
        node.flush()
        before = path.stat().st_blocks
        node.delete_snapshot("s")
    assert (before - path.stat().st_blocks >= 2 * M // 512) == punched
    assert check_theirs(path) == 0


TEMPLATES = {"none": 0, "constant": 1, "cached": 2, "all": 3}
# What a damaged image says is free, and from which template on a write into it is refused.
VICTIMS = {"active L1 table": 1, "active L2 table": 2, "refcount block": 2, "snapshot table": 1, "inactive L1 table": 2, "inactive L2 table": 3}


@pytest.mark.parametrize("victim", VICTIMS)
def test_overlap_checks(tmp_path: Path, victim: str) -> None:
    """Each structure is guarded by the templates that have it, and by its own flag whatever the template is."""
    path = tmp_path / "x"
    make(path, M)
    with open_image(path) as node:
        node.pwrite(0, b"x" * 64 * K)
        node.create_snapshot("s")
        node.pwrite(0, b"y" * 64 * K)
        node.flush()
        header, snapshot = node.header, int.from_bytes(path.read_bytes()[node.header.snapshots_offset :][:8], "big")
        raw = path.read_bytes()
        place = {
            "active L1 table": header.l1_table_offset,
            "active L2 table": node.tables.l2_offset(0),
            "refcount block": node.refcounts.block_offset(0),
            "snapshot table": header.snapshots_offset,
            "inactive L1 table": snapshot,
            "inactive L2 table": int.from_bytes(raw[snapshot : snapshot + 8], "big") & (1 << 56) - 512,
        }[victim]
        block = node.refcounts.block_offset(0)
    damaged = bytearray(raw)
    for cluster in range(len(raw) // (64 * K)):
        if not any(raw[block + cluster * 2 : block + cluster * 2 + 2]):
            damaged[block + cluster * 2 + 1] = 1
    damaged[block + place // (64 * K) * 2 : block + place // (64 * K) * 2 + 2] = bytes(2)  # it looks free
    own = "overlap-check.%s" % victim.replace(" table", "").replace(" ", "-").lower().replace("snapshot", "snapshot-table")
    cases = [({"overlap-check": template}, rank >= VICTIMS[victim]) for template, rank in TEMPLATES.items()]
    cases += [({"overlap-check.template": "none", own: True}, True), ({"overlap-check.template": "all", own: False}, False)]
    for options, refused in cases:
        path.write_bytes(damaged)
        node = open_image(path, **options)
        try:
            if refused:
                with pytest.raises(Corrupt, match=r"Preventing invalid write on metadata \(overlaps with %s\)" % victim):
                    node.pwrite(512 * K, b"z" * 64 * K)
            else:
                node.pwrite(512 * K, b"z" * 64 * K)
        finally:
            node.abandon()
        marked = bool(path.read_bytes()[79] & 2)
        assert marked == refused


@pytest.mark.parametrize(("given", "l2", "refcounts"), [("64k", 2, 4), ("300k", 2, 4), ("1M", 12, 4), ("4M", 32, 32)])
def test_cache_sizes_are_divided(tmp_path: Path, given: str, l2: int, refcounts: int) -> None:
    """L2 tables get as much as the image can use, refcount blocks the rest, and four at least."""
    make(tmp_path / "x", 16 << 30)
    with open_image(tmp_path / "x", **{"cache-size": given}) as node:
        assert (node.tables.cache.capacity, node.refcounts.cache.capacity) == (l2, refcounts)


# -- other files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["", ",data_file_raw=on", ",extended_l2=on"])
def test_a_data_file_that_is_too_short(tmp_path: Path, extra: str) -> None:
    """What is missing reads as zeroes; a write makes it longer."""
    make_theirs(tmp_path / "x", M, "data_file=%s%s" % (tmp_path / "data", extra))
    with open_image(tmp_path / "x") as node:
        node.pwrite(0, b"a" * 500 * K)
    for length in (100 * K, 1000, 0):
        os.truncate(tmp_path / "data", length)
        with open_image(tmp_path / "x", writable=False) as node:
            assert node.pread(0, M) == b"a" * length + bytes(M - length)
        line = ["convert", "-O", "raw", "x", "out"]
        assert ours(line, tmp_path) == theirs(line, tmp_path)
    with open_image(tmp_path / "x") as node:
        node.pwrite(300 * K, b"b" * 100 * K)
        assert node.pread(299 * K, 102 * K) == bytes(K) + b"b" * 100 * K + bytes(K)
    assert check_theirs(tmp_path / "x") == 0


def test_a_data_file_that_is_missing(tmp_path: Path) -> None:
    make_theirs(tmp_path / "x", M, "data_file=data")
    os.unlink(tmp_path / "data") if (tmp_path / "data").exists() else os.unlink("data")
    for command in ("info x", "map x", "check x", "resize x 2M", "convert -O raw x out", "amend -o data_file=other x", "snapshot -l x"):
        expected, found = theirs(command.split(), tmp_path), ours(command.split(), tmp_path)
        if command == "info x":
            assert (found.code, found.err) == (expected.code, expected.err)
        else:
            assert found == expected, difference(command, found, expected)


def test_a_bitmap_name_with_a_nul_byte(tmp_path: Path) -> None:
    path = tmp_path / "x"
    make_theirs(path, M)
    tool("qemu-img", "bitmap", "--add", path, "abcdefghijklmnopq")
    raw = path.read_bytes()
    at = raw.index(b"abcdefghijklmnopq")
    path.write_bytes(raw[: at + 3] + b"\0" + raw[at + 4 :])
    with open_image(path, writable=False) as node:
        assert [bitmap.name for bitmap in node.bitmaps()] == ["abc"]
    damaged = path.read_bytes()
    expected = theirs(["bitmap", "--add", "x", "new"], tmp_path)
    path.write_bytes(damaged)
    assert ours(["bitmap", "--add", "x", "new"], tmp_path) == expected and expected.code == 1
    path.write_bytes(damaged)
    with pytest.raises(Error, match="Can't update bitmap directory: Invalid argument"):
        open_image(path)
