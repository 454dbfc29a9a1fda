# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""vdi beside qemu-img: images both ways, maps and checks of every kind of block, words, and damaged images."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from damage import attempt, edges, little_memory, with_field
from side_by_side import ours, same, theirs

from diskwright.formats.vdi import BLOCK, FREE, ZEROED, Header
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags

K = 1024
SECTOR = 512
CODES = {"u32": "<I", "u64": "<Q"}
FIELDS = {name: (Header.OFFSETS[name], CODES[kind]) for name, kind in Header.__annotations__.items() if kind in CODES}


def image(entries: list[int], size: int = 0, **fields: int) -> bytes:
    """An image whose table has these entries; block N is full of the byte N + 1."""
    header = Header(
        image_type=1,
        offset_data=2 * SECTOR,
        disk_size=size or len(entries) * BLOCK,
        blocks_in_image=len(entries),
        blocks_allocated=sum(entry < ZEROED for entry in entries),
        uuid_image=b"i" * 16,
        uuid_last_snap=b"s" * 16,
    )
    data = header.pack().ljust(SECTOR, b"\0") + struct.pack("<%dI" % len(entries), *entries).ljust(SECTOR, b"\0")
    for name, value in fields.items():
        data = with_field(data, *FIELDS[name], value)
    stored = [entry for entry in entries if entry < len(entries)]
    return data + b"".join(bytes((number + 1,)) * BLOCK for number in range(max(stored, default=-1) + 1))


WHOLE = image([1, FREE, 0, ZEROED], 3 * BLOCK + 5 * SECTOR)


def content(size: int) -> bytes:
    """Data with holes: whole blocks, and parts of them."""
    chance = random.Random(3)
    data = bytearray(size)
    for _time in range(6):
        at = chance.randrange(size // SECTOR) * SECTOR
        noise = chance.randbytes(chance.randrange(1, 300) * SECTOR)[: size - at]
        data[at : at + len(noise)] = noise
    return bytes(data)


@pytest.mark.parametrize("options", ["static=off", "static=on"])
@pytest.mark.parametrize("size", [0, SECTOR, 3 * BLOCK, 5 * BLOCK + 700 * K])
def test_both_ways(tmp_path: Path, options: str, size: int) -> None:
    (tmp_path / "raw").write_bytes(content(size) if size else b"")
    for make, read in ((theirs, ours), (ours, theirs)):
        assert make(["convert", "-O", "vdi", "-o", options, "raw", "image"], tmp_path).code == 0
        same("check image", tmp_path)
        same("info image", tmp_path)
        same("info --output=json image", tmp_path)
        same("map --output=json image", tmp_path)
        same("compare -f raw -F vdi raw image", tmp_path)
        assert read(["convert", "-O", "raw", "image", "back"], tmp_path) == (0, "", "")
        assert (tmp_path / "back").read_bytes() == (tmp_path / "raw").read_bytes()


@pytest.mark.parametrize("options", ["", "-o static=on", "-o preallocation=metadata", "-o preallocation=falloc", "-o preallocation=full"])
def test_new_images_are_the_same(tmp_path: Path, options: str) -> None:
    """Byte for byte, but for the UUIDs."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    for size in ("0", "1", "1536000", "3M", "700M"):
        line = ["create", "-f", "vdi", *options.split(), "image", size]
        assert ours(line, tmp_path / "ours") == theirs(line, tmp_path / "theirs")
        found, expected = (tmp_path / "ours" / "image"), (tmp_path / "theirs" / "image")
        if "metadata" in options:
            assert not found.exists()
            continue
        assert found.stat().st_size == expected.stat().st_size
        start, length = Header.OFFSETS["uuid_image"], 32
        with open(found, "rb") as left, open(expected, "rb") as right:
            head, wanted = left.read(64 * K), right.read(64 * K)
        assert head[:start] + head[start + length :] == wanted[:start] + wanted[start + length :]
        uuid = head[start : start + 16]
        assert uuid[7] >> 4 == 4 and uuid[8] >> 6 == 2 and uuid != head[start + 16 : start + 32]


MAPS = {
    "markers": [0, FREE, 1, ZEROED, FREE],
    "two in one": [1, 1, 1, 0],
    "one again and outside": [1, 0, 4, 5, 1],
    "all outside": [5, 6, 7, 8, 9],
    "up to the markers": [ZEROED - 2, ZEROED - 1, ZEROED, FREE, 0],
    "reversed": [3, 2, 1, 0],
    "one block": [0] * 9,
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_and_checks(tmp_path: Path, name: str) -> None:
    for kind in (1, 2, 7):
        (tmp_path / "image").write_bytes(image(MAPS[name], image_type=kind))
        for line in ("check image", "map --output=json image") if kind != 1 else ("check --output=json image", "map image", "map --output=json image"):
            same(line, tmp_path)
    for counted in (0, 3, 99):
        (tmp_path / "image").write_bytes(image(MAPS[name], blocks_allocated=counted))
        same("check image", tmp_path)
    theirs(["convert", "-f", "vdi", "-O", "raw", "image", "raw"], tmp_path)
    same("compare -f vdi -F raw image raw", tmp_path)


REFUSED = [
    "check -r all image",
    "check -r leaks image",
    "resize -f vdi image 9M",
    "resize -f vdi --shrink image 1M",
    "measure -O vdi --size 1M",
    "measure -O vdi image",
    "amend -f vdi -o static=on image",
    "snapshot -c x image",
    "snapshot -l image",
    "commit image",
    "convert -c -O vdi image new",
    "create -f vdi -b image -F vdi new",
    "create -f vdi -o block_size=2M new 1M",
    "create -f vdi -o static=maybe new 1M",
    "create -f vdi new",
    "create -f vdi new 512T",
    "create -f vdi new 4E",
    "convert -O vdi -B image -F vdi image new",
    "info --image-opts driver=vdi,file.filename=image,backing.file.filename=x",
    "info --image-opts driver=vdi,file.filename=image,static=on",
    "info -f vdi raw",
]


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(WHOLE)
    (tmp_path / "raw").write_bytes(bytes(70 * K))
    for line in REFUSED:
        same(line, tmp_path)
    rows = [[row.split(" - ")[0] for row in run("create -f vdi -o help new".split(), tmp_path).out.split("\n")] for run in (ours, theirs)]
    assert rows[0] == rows[1]


def test_damaged_headers(tmp_path: Path) -> None:
    """Each number at its edges: QEMU's words; where we refuse more, that is what overlaps."""
    (tmp_path / "image").write_bytes(WHOLE)
    for name, (offset, code) in FIELDS.items():
        for value in edges(code, struct.unpack_from(code, WHOLE, offset)[0])[:: 1 if name in ("disk_size", "offset_bmap", "offset_data") else 3]:
            with open(tmp_path / "image", "r+b") as file:
                file.write(with_field(WHOLE, offset, code, value)[:SECTOR])
            same("check -f vdi image", tmp_path)
    for name in ("uuid_link", "uuid_parent"):
        (tmp_path / "image").write_bytes(with_field(WHOLE, Header.OFFSETS[name], "<I", 1))
        same("info -f vdi image", tmp_path)
    for length in (0, 64, 68, 384, 400, 512, 516, 600, 1025):
        (tmp_path / "image").write_bytes(WHOLE[:length])
        same("check -f vdi image", tmp_path)


def test_hostile_images(tmp_path: Path) -> None:
    refused = []
    with little_memory():
        for name, (offset, code) in FIELDS.items():
            for value in edges(code, struct.unpack_from(code, WHOLE, offset)[0]):
                if attempt(tmp_path / "image", "vdi", with_field(WHOLE, offset, code, value)):
                    refused.append(name)
        for length in [*range(0, 400, 4), *range(400, 1300, 50)]:
            attempt(tmp_path / "image", "vdi", WHOLE[:length])
        for entries in MAPS.values():
            attempt(tmp_path / "image", "vdi", image(entries))
    assert {"signature", "version", "offset_bmap", "offset_data", "sector_size", "block_size", "disk_size", "blocks_in_image"} <= set(refused)


def test_the_largest_image_takes_no_time(tmp_path: Path) -> None:
    """A table of 2 GiB is all holes: it says that everything is in block 0."""
    with little_memory():
        head = image([FREE], size=1 << 48, blocks_in_image=(1 << 29) - 128, offset_data=(1 << 31) + 512)
        assert attempt(tmp_path / "image", "vdi", head[:SECTOR]) is None
        (tmp_path / "image").write_bytes(head[:SECTOR])
        with Graph().open(str(tmp_path / "image"), "vdi") as node:
            result = node.check()
            assert result.corruptions == (1 << 29) - 128 and len(result.messages) + result.omitted == result.corruptions


def test_blocks_are_never_given_out_twice(tmp_path: Path) -> None:
    """Whatever the header says is in use, a new block takes the first place that no entry names, and begins with zeroes."""
    for entries, counted in (([0, FREE, 1, FREE], 0), ([3, FREE, 1, FREE], 1), ([3, FREE, 1, FREE], 99), ([0, FREE, 2, FREE], 4)):
        path = tmp_path / "image"
        path.write_bytes(image(entries, blocks_allocated=counted))
        with Graph().open(str(path), "vdi", OpenFlags(writable=True)) as node:
            before = node.pread(0, node.size)
            node.pwrite(BLOCK + 5, b"new")
            node.pwrite(3 * BLOCK, b"new")
            expected = bytearray(before)
            expected[BLOCK + 5 : BLOCK + 8] = expected[3 * BLOCK : 3 * BLOCK + 3] = b"new"
            assert node.pread(0, node.size) == expected
        assert theirs(["check", "image"], tmp_path).code == 0
        with Graph().open(str(path), "vdi") as node:
            assert node.pread(0, node.size) == expected
    path.write_bytes(image([0, FREE, 5, 9, 1, FREE, 0]))
    with Graph().open(str(path), "vdi", OpenFlags(writable=True)) as node:
        for index in (1, 5):
            node.pwrite(index * BLOCK, b"new")
        with pytest.raises(Exception, match="block 3 is said to be at"):
            node.pwrite(3 * BLOCK, b"new")
