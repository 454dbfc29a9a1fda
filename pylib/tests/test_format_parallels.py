# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""parallels beside qemu-img: images both ways, checks and repairs of everything that can be wrong, bitmaps, samples, words, and damaged images."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import pytest
from damage import attempt, edges, little_memory
from samples import sample
from side_by_side import ours, same, same_space, theirs

from diskwright.errors import Error
from diskwright.formats.parallels.image import IN_USE, MAGIC_EXT, MAGIC_OLD, Header
from diskwright.graph import Graph, open_image
from diskwright.hooks import OpenFlags

K = 1024
M = 1024 * K
SECTOR = 512
CLUSTER = 4 * K
TRACKS = CLUSTER // SECTOR
V21 = 0x312E3276
CODES = {"u32": "<I", "u64": "<Q"}
FIELDS = {name: (Header.OFFSETS[name], CODES[kind]) for name, kind in Header.__annotations__.items() if kind in CODES}


def image(entries: Sequence[int], clusters: Optional[int] = None, old: bool = False, tail: bytes = b"", **given: Any) -> bytes:
    """An image with this table, and so many clusters (as many as the table needs) behind the first one, which has the
    header; cluster N is full of the byte N."""
    unit = TRACKS if old else 1
    fields = {"tracks": TRACKS, "nb_bat_entries": len(entries), "nb_sectors": len(entries) * TRACKS, "in_use": V21, "data_off": TRACKS, "cylinders": 1}
    record = Header(**{**fields, "magic": MAGIC_OLD if old else MAGIC_EXT, **given})
    data = (record.pack() + struct.pack("<%dI" % len(entries), *entries)).ljust(CLUSTER, b"\0")
    count = max((entry // unit for entry in entries), default=0) if clusters is None else clusters
    return data + b"".join(bytes((number + 1,)) * CLUSTER for number in range(count)) + tail


@pytest.mark.parametrize("options", ["cluster_size=1M", "cluster_size=64k", "cluster_size=63k", "cluster_size=1000"])
@pytest.mark.parametrize("size", [0, SECTOR, 2 * M + 5 * SECTOR])
def test_both_ways(tmp_path: Path, options: str, size: int) -> None:
    data = bytearray(size)
    for at in range(0, size, 700 * K):
        data[at : at + 9 * K] = random.Random(at).randbytes(9 * K)[: size - at]
    (tmp_path / "raw").write_bytes(data)
    for make, read in ((theirs, ours), (ours, theirs)):
        assert make(["convert", "-O", "parallels", "-o", options, "raw", "image"], tmp_path).code == 0
        for line in ("check image", "info image", "info --output=json image", "map --output=json image", "compare -f raw -F parallels raw image"):
            same(line, tmp_path)
        assert read(["convert", "-O", "raw", "image", "back"], tmp_path) == (0, "", "")
        assert (tmp_path / "back").read_bytes() == data


def test_new_images_are_the_same(tmp_path: Path) -> None:
    """Byte for byte, and as large on the disk."""
    for place in ("ours", "theirs"):
        (tmp_path / place).mkdir()
    for size in ("0", "1", "1000000", "3M", "700M", "2T"):
        for options in ([], ["-o", "cluster_size=63k"], ["-o", "cluster_size=1000,preallocation=full"], ["-o", "preallocation=metadata"]):
            if size == "2T" and options:
                continue
            line = ["create", "-f", "parallels", *options, "image", size]
            assert ours(line, tmp_path / "ours") == theirs(line, tmp_path / "theirs")
            if "preallocation=metadata" not in options:
                assert (tmp_path / "ours" / "image").read_bytes() == (tmp_path / "theirs" / "image").read_bytes()
                assert same_space(tmp_path / "ours" / "image", tmp_path / "theirs" / "image")


def test_samples(tmp_path: Path) -> None:
    for name in ("parallels-v1", "parallels-v2"):
        sample(name, tmp_path)
        for line in ("info", "info --output=json", "check", "check --output=json", "map --output=json"):
            same("%s %s" % (line, name), tmp_path)
        theirs(["convert", "-O", "raw", name, "raw"], tmp_path)
        with open_image(str(tmp_path / name)) as node:
            assert node.pread(0, node.size) == (tmp_path / "raw").read_bytes()


# -- check and repair ------------------------------------------------------------------------------------------------------

UNCLEAN = {"in_use": IN_USE}
IMAGES = {
    "clean": image([1, 0, 2, 0]),
    "all free": image([0] * 5),
    "no table": image([]),
    "a hole": image([1, 0, 3, 0]),
    "fragmented": image([2, 1, 0, 3]),
    "reversed": image([4, 3, 2, 1]),
    "from 0 on": image([0, 1, 2, 3]),
    "from 0 on, old": image([0, 8, 16, 24], old=True),
    "twice": image([1, 1, 2, 0]),
    "thrice": image([1, 1, 1, 2]),
    "twice, old": image([8, 8, 16, 0], old=True),
    "in the table, old": image([8, 1, 16, 0], 2, old=True),
    "leaks": image([1, 0, 2, 0], 4),
    "leaks less than a cluster": image([1, 0, 2, 0], tail=bytes(700)),
    "unclean": image([1, 0, 2, 0], **UNCLEAN),
    "unclean, leaks": image([1, 0, 2, 0], 4, **UNCLEAN),
    "unclean, twice": image([1, 1, 2, 0], **UNCLEAN),
    "no data_off": image([1, 0, 2, 0], data_off=0),
    "data_off too large": image([1, 0, 2, 0], data_off=80),
    "data_off too large, old": image([8, 0, 16, 0], data_off=80, old=True),
    "no data_off, old": image([8, 0, 16, 0], data_off=0, old=True),
    "data_off of the table's end, old": image([8, 0, 16, 0], data_off=1, old=True),
    "data_off later": image([0, 0, 2, 0], 3, data_off=16),
    "between clusters, old": image([8, 0, 17, 0], 2, old=True, tail=bytes(SECTOR)),
    "outside": image([1, 9, 2, 0], 2),
    "partly outside": image([1, 2, 3], 2, tail=bytes(SECTOR)),
    "partly outside, off sectors": image([1, 2, 3], 2, tail=bytes(100)),
    "the last one outside": image([1, 2, 0, 9], 2),
    "everything": image([1, 1, 9, 2], 4, data_off=0, **UNCLEAN),
    "twice outside and twice inside": image([9, 9, 1, 1], 3),
}
# QEMU aborts where a check without repair meets a cluster outside the image.
ABORTS = ("outside", "partly outside", "partly outside, off sectors", "the last one outside", "everything", "twice outside and twice inside")


@pytest.mark.parametrize("name", IMAGES)
def test_checks_and_repairs(tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    for line in ("check -f parallels image", "check -f parallels --output=json image", "check -f parallels -r leaks image", "check -f parallels -r all image"):
        results = []
        for run in (theirs, ours):
            path.write_bytes(IMAGES[name])
            outcome = run(line.split(), tmp_path)
            content = bytearray(path.read_bytes())
            if content[: Header.SIZE] != IMAGES[name][: Header.SIZE]:
                content[44:48] = bytes(4)  # QEMU touches the mark whenever it opens an image for writing
            results.append((outcome, content))
        if name in ABORTS and "-r all" not in line:
            assert results[0][0].code < 0 and results[1][0].code == 2 and "is outside image" in results[1][0].err
            continue
        assert results[0][0] == results[1][0]
        if "-r" in line:
            for _outcome, content in results:
                content[44:48] = bytes(4)
            assert results[0][1] == results[1][1]
    assert ours(["check", "-f", "parallels", "image"], tmp_path).code == 0
    same("check -f parallels image", tmp_path)


def test_opening_for_writing_repairs_first(tmp_path: Path) -> None:
    """As QEMU does, with the same lines and the same bytes; what is written then is where nothing else is."""
    path = tmp_path / "image"
    for name in ("unclean", "twice", "unclean, twice", "outside", "no data_off", "everything", "a hole"):
        path.write_bytes(IMAGES[name])
        done = subprocess.run(["qemu-io", "-f", "parallels", "-c", "read -q 0 512", str(path)], check=True, capture_output=True, text=True)
        expected = bytearray(path.read_bytes())
        path.write_bytes(IMAGES[name])
        said: list[str] = []
        with Graph(warn=said.append).open(str(path), "parallels", OpenFlags(writable=True)):
            pass
        found = bytearray(path.read_bytes())
        expected[44:48] = found[44:48] = bytes(4)
        assert (said, found) == (done.stderr.splitlines(), expected), name
        with open_image(str(path), "parallels", OpenFlags(writable=True)) as node:
            content = bytearray(node.pread(0, node.size))
            node.pwrite(3 * CLUSTER + 5, b"w" * 100)
            content[3 * CLUSTER + 5 : 3 * CLUSTER + 105] = b"w" * 100
        with open_image(str(path)) as node:
            assert node.pread(0, node.size) == content
        assert theirs(["check", "image"], tmp_path).code == 0


def test_the_last_of_two(tmp_path: Path) -> None:
    """QEMU's check fails where the last cluster of all is one that is used twice; ours counts it."""
    (tmp_path / "image").write_bytes(image([1, 2, 2]))
    assert theirs(["check", "image"], tmp_path).err.endswith("Check failed: Device or resource busy\n")
    assert ours(["check", "image"], tmp_path).code == 2
    assert ours(["check", "-r", "all", "image"], tmp_path).code == 0
    same("check image", tmp_path)


def test_the_mark_and_the_length(tmp_path: Path) -> None:
    """The image is marked while it is changed, and ends with its last cluster when it is closed."""
    path = tmp_path / "image"
    for mode in (None, "truncate", "falloc"):
        path.write_bytes(image([1, 0, 2, 0]))
        runtime = {} if mode is None else {"prealloc-mode": mode, "prealloc-size": 50 * K}
        node = Graph().open_spec({"driver": "parallels", **runtime, "file": {"driver": "file", "filename": str(path)}}, OpenFlags(writable=True, unmap=True))
        node.pwrite(0, b"in place")
        assert path.read_bytes()[44:48] == struct.pack("<I", V21)
        node.pwrite(CLUSTER, b"new")
        assert path.read_bytes()[44:48] == struct.pack("<I", IN_USE)
        assert path.stat().st_size >= 3 * CLUSTER + (0 if mode is None else 50 * K)
        assert (path.stat().st_blocks * SECTOR > 50 * K) == (mode == "falloc")
        node.pwrite(3 * CLUSTER, b"and gone")
        node.pwrite_zeroes(2 * CLUSTER, 2 * CLUSTER)
        node.close()
        assert path.stat().st_size == 4 * CLUSTER and path.read_bytes()[44:48] == bytes(4)
        same("check image", tmp_path)
        same("map --output=json image", tmp_path)
        with open_image(str(path)) as node:
            assert node.pread(0, node.size)[: CLUSTER + 9] == b"in place".ljust(CLUSTER, b"\1") + b"new" + bytes(6)


def test_a_backing_file_that_is_given(tmp_path: Path) -> None:
    """The format names none, but one may be put below it; what is written is completed from it."""
    (tmp_path / "base").write_bytes(b"b" * 4 * CLUSTER)
    (tmp_path / "image").write_bytes(image([1, 0, 0, 0]))
    spec = {"driver": "parallels", "file": {"driver": "file", "filename": str(tmp_path / "image")}, "backing": {"driver": "raw", "file": {"driver": "file"}}}
    spec["backing"]["file"]["filename"] = str(tmp_path / "base")  # type: ignore[index]
    with Graph().open_spec(spec, OpenFlags(writable=True)) as node:
        node.pwrite(CLUSTER + 7, b"new")
        node.pwrite_zeroes(2 * CLUSTER, CLUSTER)
        node.pdiscard(0, CLUSTER)
        expected = b"\1" * CLUSTER + b"b" * 7 + b"new" + b"b" * (CLUSTER - 10) + bytes(CLUSTER) + b"b" * CLUSTER
        assert node.pread(0, node.size) == expected
    line = "map --output=json --image-opts driver=parallels,file.filename=image,backing.driver=raw,backing.file.filename=base"
    same(line, tmp_path)


# -- bitmaps ---------------------------------------------------------------------------------------------------------------

BITMAP = 0x20385FAE252CB34A
SIZE = 32  # sectors of the disk
GOOD = (BITMAP, 0, struct.pack("<Q16sIIQ", SIZE, b"\x12\x34\x56\x78" * 4, 8, 1, 1))
END = (0, 0, b"")


def bitmap(size: int = SIZE, granularity: int = 8, table: Sequence[int] = (1,), count: Optional[int] = None, flags: int = 0) -> tuple[int, int, bytes]:
    head = struct.pack("<Q16sII", size, b"x" * 16, granularity, len(table) if count is None else count)
    return BITMAP, flags, head + struct.pack("<%dQ" % len(table), *table)


def extended(*features: tuple[int, int, bytes], more: bytes = b"", checksum: bytes = b"", length: int = 0, **given: Any) -> bytes:
    """An image whose fourth cluster is a format extension."""
    body = b"".join(struct.pack("<QQII", magic, flags, length or len(data), 0) + data + bytes(-len(data) % 8) for magic, flags, data in features)
    body = body.ljust(CLUSTER - 24, b"\0")
    extension = struct.pack("<Q", 0xAB234CEF23DCEA87) + (checksum or hashlib.md5(body).digest()) + body
    return image([1, 2, 0, 0], tail=extension + more, **{"ext_off": 3 * TRACKS, **given})


REFUSED_EXTENSIONS = {
    "magic": extended(GOOD, END, ext_off=2 * TRACKS),
    "behind the file": extended(GOOD, END, ext_off=99 * TRACKS),
    "far behind": extended(GOOD, END, ext_off=1 << 54),
    "checksum": extended(GOOD, END, checksum=b"c" * 16),
    "twice": extended(GOOD, GOOD, END),
    "size": extended(bitmap(SIZE - 1), END),
    "table too long": extended(bitmap(table=(1, 1)), END),
    "no table": extended(bitmap(table=()), END),
    "table longer than its feature": extended(bitmap(count=5), END),
    "table much longer": extended(bitmap(count=0xFFFFFFFF), END),
    "short": extended((BITMAP, 0, bytes(20)), END),
    "feature too long": extended(GOOD, length=CLUSTER),
    "unknown": extended((0x1234, 0, b"abcd"), END),
    "flags": extended((0x1234, 1, b"abcd"), END),
    "flags of a bitmap": extended(bitmap(flags=2), END),
}


@pytest.mark.parametrize("name", REFUSED_EXTENSIONS)
def test_extensions_that_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "image").write_bytes(REFUSED_EXTENSIONS[name])
    assert same("info image", tmp_path).code == 1


def test_bitmaps_are_read(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(extended(GOOD, bitmap(granularity=1, table=(4 * TRACKS,)), END, more=b"\x05\x80".ljust(CLUSTER, b"\0")))
    with open_image(str(path)) as node:
        found = {bitmap.name: (bitmap.granularity, list(bitmap.runs())) for bitmap in node.bitmaps() or ()}
    assert found == {
        "12345678-1234-5678-1234-567812345678": (8 * SECTOR, [(0, SIZE * SECTOR)]),
        "78787878-7878-7878-7878-787878787878": (SECTOR, [(0, SECTOR), (2 * SECTOR, SECTOR), (15 * SECTOR, SECTOR)]),
    }
    told = ours(["info", "image"], tmp_path).out
    assert "name: 12345678-1234-5678-1234-567812345678\n            granularity: 4096\n" in told
    assert ours(["convert", "--bitmaps", "-O", "qcow2", "image", "copy"], tmp_path) == (0, "", "")
    assert "78787878-7878-7878-7878-787878787878" in theirs(["info", "copy"], tmp_path).out
    same("check image", tmp_path)
    same("map --output=json image", tmp_path)


def test_a_write_drops_the_bitmaps(tmp_path: Path) -> None:
    """They would not be true any more (and QEMU writes over them, which leaves an image that cannot be opened)."""
    path = tmp_path / "image"
    path.write_bytes(extended(GOOD, END))
    said: list[str] = []
    with Graph(warn=said.append).open(str(path), None, OpenFlags(writable=True)) as node:
        assert said == ["Format Extension ignored in RW mode"] and not node.bitmaps()
    assert path.read_bytes() == extended(GOOD, END)
    with Graph().open(str(path), None, OpenFlags(writable=True)) as node:
        node.pwrite(2 * CLUSTER, b"new")
    with open_image(str(path)) as node:
        assert list(node.bitmaps() or ()) == []
    same("check image", tmp_path)


def test_bitmaps_that_are_not(tmp_path: Path) -> None:
    """A granularity that makes QEMU abort, data that is nowhere, an extension without an end."""
    path = tmp_path / "image"
    for granularity in (0, 3, 1 << 23, 1 << 31, 0xFFFFFFFF):
        path.write_bytes(extended(bitmap(granularity=granularity), END))
        with pytest.raises(Error, match="Invalid granularity"):
            open_image(str(path))
    path.write_bytes(extended(bitmap(table=(1 << 60,)), END))
    with open_image(str(path)) as node, pytest.raises(Error, match="has data at sector 0x1000000000000000"):
        list(next(iter(node.bitmaps() or ())).runs())
    path.write_bytes(extended((BITMAP, 0, GOOD[2].ljust(CLUSTER - 48, b"\0"))))
    with pytest.raises(Error, match=r"remaining bytes \(0\)"):
        open_image(str(path))


# -- words and damage ------------------------------------------------------------------------------------------------------

REFUSED = [
    "resize image 1M",
    "resize --shrink image 4k",
    "measure -O parallels --size 1M",
    "measure -O qcow2 image",
    "amend -f parallels -o size=1M image",
    "snapshot -l image",
    "snapshot -c x image",
    "convert -c -O parallels image new",
    "convert -O parallels -B image -F parallels image new",
    "convert --bitmaps -O qcow2 image new",
    "create -f parallels -b image -F parallels new",
    "create -f parallels -o cluster_size=0 new 3M",
    "create -f parallels -o cluster_size=3G new 3M",
    "create -f parallels -o cluster_size=x new 3M",
    "create -f parallels -o cluster_size=512 new 2T",
    "create -f parallels new 4E",
    "create -f parallels new",
    "info --image-opts driver=parallels,file.filename=image,prealloc-mode=foo",
    "info --image-opts driver=parallels,file.filename=image,prealloc-size=x",
    "info --image-opts driver=parallels,file.filename=image,prealloc-mode=falloc,prealloc-size=1k",
    "info --image-opts driver=parallels,file.filename=image,cluster_size=1",
    "info -f parallels raw",
]


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(70 * K))
    for line in REFUSED:
        (tmp_path / "image").write_bytes(IMAGES["clean"])
        same(line, tmp_path)
    rows = [[row.split(" - ")[0] for row in run("create -f parallels -o help new".split(), tmp_path).out.split("\n")] for run in (ours, theirs)]
    assert rows[0] == rows[1]
    found = ours(["create", "-f", "parallels", "new", "513T"], tmp_path)  # (QEMU makes an image that it cannot open)
    assert found.code == 1 and "The image size is too large for file format 'parallels' (try using a larger cluster size)" in found.err
    found = ours(["convert", "--bitmaps", "-O", "parallels", "image", "new"], tmp_path)  # (QEMU forgets them without a word)
    assert found.err == "qemu-img: Format driver 'parallels' does not support bitmaps\n"


@pytest.mark.parametrize("old", [False, True])
def test_damaged_headers(tmp_path: Path, old: bool) -> None:
    """Each number at its edges: QEMU's words, but for clusters so large that it misjudges data_off."""
    whole = image([8, 0, 16, 0], old=True) if old else IMAGES["clean"]
    for name, (offset, code) in FIELDS.items():
        if name in ("heads", "cylinders", "flags"):
            continue
        for value in [16, 24, *edges(code, struct.unpack_from(code, whole, offset)[0])]:
            if name == "nb_sectors" and value == 1 << 63 or name == "nb_bat_entries" and value > 1 << 29:
                continue
            (tmp_path / "image").write_bytes(whole[:offset] + struct.pack(code, value) + whole[offset + struct.calcsize(code) :])
            line = "info" if name in ("tracks", "ext_off", "nb_bat_entries") or name == "data_off" and value in (9, 16) else "check"
            same("%s -f parallels image" % line, tmp_path)


def test_hostile_images(tmp_path: Path) -> None:
    refused = []
    path = tmp_path / "image"
    with little_memory():
        for whole in (IMAGES["clean"], image([8, 0, 16, 0], old=True)):
            for name, (offset, code) in FIELDS.items():
                if name in ("heads", "cylinders", "flags", "version") and whole is not IMAGES["clean"]:
                    continue
                for value in edges(code, struct.unpack_from(code, whole, offset)[0])[:: 4 if name in ("heads", "cylinders", "flags") else 1]:
                    if attempt(path, "parallels", whole[:offset] + struct.pack(code, value) + whole[offset + struct.calcsize(code) :], repair=True):
                        refused.append(name)
            for length in [*range(0, 100, 8), *range(100, len(whole), 1500)]:
                attempt(path, "parallels", whole[:length], repair=True)
        for data in (*IMAGES.values(), *REFUSED_EXTENSIONS.values(), image([0xFFFFFFFF, 1, 0xFFFFFFFF, 2], 2), image([1] * 900)):
            attempt(path, "parallels", data, repair=True)
            attempt(path, "parallels", data)
    assert {"version", "tracks", "nb_bat_entries", "nb_sectors", "ext_off"} <= set(refused)


def test_a_table_of_holes_takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(image([1, 2], nb_bat_entries=(1 << 29) - 1, nb_sectors=1 << 31, tracks=2048)[: Header.SIZE + 8])
    with open(path, "r+b") as file:
        file.truncate(3 << 30)
    with little_memory():
        attempt(path, "parallels", repair=True)
