# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""vpc beside qemu-img: images both ways, sizes by every rule, a sample, words, parents, and damaged images."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any, Optional

import pytest
from damage import attempt, edges, little_memory
from samples import sample
from side_by_side import ours, same, theirs

from diskwright.errors import Error
from diskwright.formats.vpc import DIFFERENCING, DYNAMIC, FIXED, FREE, MAX_CHS, NOWHERE, Footer, Header, checksum, geometry
from diskwright.graph import Graph, OpenPolicy, open_image
from diskwright.hooks import OpenFlags
from diskwright.ondisk import Struct

K = 1024
M = 1024 * K
SECTOR = 512
BLOCK = 64 * K  # bytes of a block of the images made here
BITMAP = SECTOR
CODES = {"u8": ">B", "u16": ">H", "u32": ">I", "u64": ">Q"}


def numbers(kind: type[Struct]) -> dict[str, tuple[int, str]]:
    return {name: (kind.OFFSETS[name], CODES[code]) for name, code in kind.__annotations__.items() if code in CODES}


def summed(record: Struct, given: dict[str, Any]) -> bytes:
    """The record with these fields, and a checksum that is right unless it is given."""
    for name, value in given.items():
        setattr(record, name, value)
    if "checksum" not in given:
        record.checksum = 0  # type: ignore[attr-defined]
        record.checksum = checksum(record.pack(), type(record))  # type: ignore[attr-defined]
    return record.pack()


def footer(size: int, disk_type: int = DYNAMIC, **given: Any) -> bytes:
    return summed(
        Footer(
            data_offset=NOWHERE if disk_type == FIXED else SECTOR,
            time_stamp=0,
            creator_application=b"win ",
            original_size=size,
            current_size=size,
            cylinders=3,
            heads=4,
            sectors_per_track=17,
            disk_type=disk_type,
            unique_id=b"u" * 16,
        ),
        given,
    )


def image(
    entries: list[Optional[int]], given: Optional[dict[str, Any]] = None, head: Optional[dict[str, Any]] = None, bitmaps: Optional[dict[int, bytes]] = None
) -> bytes:
    """A dynamic image whose table has these blocks by number (None: no such block, negative: the very entry); block N is
    full of the byte N + 1."""
    given, bitmaps = dict(given or {}), bitmaps or {}
    size = given.pop("size", len(entries) * BLOCK)
    start = SECTOR + Header.SIZE + SECTOR + 4 * SECTOR  # the last are for what an image has besides
    table = [FREE if entry is None else -entry if entry < 0 else (start + entry * (BITMAP + BLOCK)) // SECTOR for entry in entries]
    record = Header(table_offset=SECTOR + Header.SIZE, max_table_entries=len(entries), block_size=BLOCK)
    end = footer(size, **given)
    data = (end + summed(record, head or {}) + struct.pack(">%dI" % len(table), *table)).ljust(start, b"\0")
    stored = max((entry for entry in entries if entry is not None and entry >= 0), default=-1) + 1
    for number in range(stored):
        data += bitmaps.get(number, b"\xff" * (BLOCK // SECTOR // 8)).ljust(BITMAP, b"\0") + bytes((number + 1,)) * BLOCK
    return data + end


WHOLE = image([1, None, 0, 2, None], {"size": 4 * BLOCK + 5 * SECTOR})
FIXED_WHOLE = b"f" * (34 * K) + bytes(68 * K) + footer(102 * K, FIXED)


@pytest.mark.parametrize("options", ["subformat=dynamic", "subformat=fixed", "force_size=on", "subformat=fixed,force_size=on"])
@pytest.mark.parametrize("size", [34 * K, 5 * M + 7 * SECTOR])
def test_both_ways(tmp_path: Path, options: str, size: int) -> None:
    chance = random.Random(size)
    data = bytearray(size)
    data[:SECTOR] = chance.randbytes(SECTOR)
    data[-9 * K :] = chance.randbytes(9 * K)
    (tmp_path / "raw").write_bytes(data)
    for make, read in ((theirs, ours), (ours, theirs)):
        assert make(["convert", "-O", "vpc", "-o", options, "raw", "image"], tmp_path).code == 0
        for line in ("info -f vpc image", "info --output=json -f vpc image", "map --output=json -f vpc image", "compare -f raw -F vpc raw image"):
            same(line, tmp_path)
        assert read(["convert", "-f", "vpc", "-O", "raw", "image", "back"], tmp_path) == (0, "", "")
        found = (tmp_path / "back").read_bytes()
        assert found[:size] == data and not any(found[size:]) and ("force_size" not in options or len(found) == size)


def test_new_images_are_the_same(tmp_path: Path) -> None:
    """Byte for byte, but for the time and the ID, and what depends on them."""
    chance = random.Random(5)
    sizes = [0, 1, M, 127 << 30, MAX_CHS * SECTOR, 2040 << 30, *(chance.randrange(1 << chance.randrange(10, 40)) for _time in range(12))]
    for size in sizes:
        for options in ([], ["-o", "force_size=on"], ["-o", "subformat=fixed"]):
            if size > 1 << 32 and size != 127 << 30 and options:
                continue
            outcomes = []
            for make in (theirs, ours):
                outcomes.append(make(["create", "-f", "vpc", *options, "image", str(size)], tmp_path))
                with open(tmp_path / "image", "rb") as file:
                    head = bytearray(file.read(4096))
                    end = bytearray(file.read()[-SECTOR:] if (tmp_path / "image").stat().st_size < 1 << 20 else b"")
                for part in (head, end):
                    for at in (part.find(b"conectix"), part.rfind(b"conectix")):
                        if at >= 0:
                            part[at + 24 : at + 28] = bytes(4)
                            part[at + 64 : at + 84] = bytes(20)
                outcomes.append((head, end, (tmp_path / "image").stat().st_size))
            assert outcomes[:2] == outcomes[2:], (size, options)


def test_geometries() -> None:
    """They grow with the disk, hold what they must within a cylinder, and stay in their fields."""
    before = 0
    for sectors in sorted({random.Random(6).randrange(1 << bits) for bits in range(7, 41)} | {65535 * 16 * 63 + d for d in (-1, 0, 1)} | {MAX_CHS}):
        cylinders, heads, spt = geometry(sectors)
        assert cylinders < 65536 and heads <= 16 and spt <= 255
        assert min(sectors, MAX_CHS) - heads * spt < cylinders * heads * spt <= sectors or cylinders * heads * spt == 0
        assert cylinders * heads * spt >= before - 16 * 255
        before = cylinders * heads * spt


def test_who_made_it_decides_about_the_size(tmp_path: Path) -> None:
    most = {"cylinders": 65535, "heads": 16, "sectors_per_track": 255}
    for creator in (b"vpc ", b"vs  ", b"qemu", b"qem2", b"win ", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"vbox"):
        for given in ({}, most):
            (tmp_path / "image").write_bytes(image([None], {"size": 30 * K, "creator_application": creator, **given}, {"max_table_entries": 2}))
            (tmp_path / "fixed").write_bytes(bytes(34 * K) + footer(30 * K + 3, FIXED, creator_application=creator, **given))
            same("info image", tmp_path)
            same("info -f vpc fixed", tmp_path)
    for mode in ("chs", "current_size", "foo"):
        same("info --image-opts driver=vpc,force_size_calc=%s,file.filename=image" % mode, tmp_path)


def test_a_sample(tmp_path: Path) -> None:
    sample("virtualpc-dynamic.vhd", tmp_path)
    for line in ("info virtualpc-dynamic.vhd", "info --output=json virtualpc-dynamic.vhd", "map --output=json virtualpc-dynamic.vhd"):
        same(line, tmp_path)


REFUSED = [
    "check image",
    "check -f vpc -r all fixed",
    "resize -f vpc image 9M",
    "resize -f vpc --shrink fixed 16k",
    "measure -O vpc --size 1M",
    "measure -O vpc image",
    "amend -f vpc -o size=1M image",
    "snapshot -c x image",
    "snapshot -l image",
    "commit image",
    "rebase -b '' image",
    "convert -c -O vpc image new",
    "convert -O vpc -B image -F vpc image new",
    "create -f vpc -b image -F vpc new",
    "create -f vpc -o subformat=sparse new 1M",
    "create -f vpc -o force_size=maybe new 1M",
    "create -f vpc new",
    "create -f vpc new 2041G",
    "create -f vpc -o force_size=on new 2041G",
    "create -f vpc -o preallocation=metadata new 1M",
    "info --image-opts driver=vpc,file.filename=image,backing.file.filename=fixed",
    "info --image-opts driver=vpc,file.filename=image,block_size=1",
    "info -f vpc raw",
    "info -f vpc empty",
]


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(WHOLE)
    (tmp_path / "fixed").write_bytes(FIXED_WHOLE)
    (tmp_path / "raw").write_bytes(bytes(70 * K))
    (tmp_path / "empty").write_bytes(b"")
    for line in REFUSED:
        same(line, tmp_path)
    rows = [[row.split(" - ")[0] for row in run("create -f vpc -o help new".split(), tmp_path).out.split("\n")] for run in (ours, theirs)]
    assert rows[0] == rows[1]


def test_damaged_headers(tmp_path: Path) -> None:
    """Each number at its edges, with right checksums: QEMU's words."""
    for name, (_offset, code) in numbers(Header).items():
        if name not in ("data_offset", "header_version", "parent_time_stamp", "reserved"):
            for value in [512, 1024, *edges(code, BLOCK if name == "block_size" else 5)][:: 1 if name != "checksum" else 7]:
                (tmp_path / "image").write_bytes(image([1, None, 0], head={name: value}))
                same("info image", tmp_path)
    for name, (_offset, code) in numbers(Footer).items():
        if name in ("data_offset", "current_size", "cylinders", "heads", "disk_type", "checksum"):
            for value in edges(code, 3)[:: 1 if name in ("current_size", "disk_type") else 4]:
                (tmp_path / "image").write_bytes(image([1, None, 0], {name: value}))
                same("info image", tmp_path)
                (tmp_path / "image").write_bytes(FIXED_WHOLE[:-SECTOR] + footer(102 * K, **{"disk_type": FIXED, name: value}))
                same("info -f vpc image", tmp_path)
    for length in (0, 100, 511, 512, 1536, 2000, len(WHOLE) - 1025, len(WHOLE) - 1024, len(WHOLE) - 1023, len(WHOLE) - 512, len(WHOLE) - 1):
        (tmp_path / "image").write_bytes(WHOLE[:length])
        same("info -f vpc image", tmp_path)
        (tmp_path / "image").write_bytes(WHOLE[length:])
        same("info -f vpc image", tmp_path)


def test_tables_that_point_anywhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for entry in (-1, -2, -4, -5, -130, -131, -263, -264, -(FREE - 1)):
        (tmp_path / "image").write_bytes(image([1, entry, 0]))
        same("map --output=json image", tmp_path)
    (tmp_path / "image").write_bytes(image([1, -1, 0]))
    with open_image(str(tmp_path / "image"), "vpc", OpenFlags(writable=True)) as node, pytest.raises(Error, match="block 1 is said to be at"):
        node.pwrite(BLOCK, b"over the header")


def test_hostile_images(tmp_path: Path) -> None:
    refused = []
    path = tmp_path / "image"
    with little_memory():
        for name, (_offset, code) in numbers(Footer).items():
            for value in edges(code, 3):
                if attempt(path, "vpc", image([1, None, 0], {name: value})):
                    refused.append(name)
                elif name in ("current_size", "disk_type", "heads"):
                    attempt(path, "vpc", FIXED_WHOLE[:-SECTOR] + footer(102 * K, **{"disk_type": FIXED, name: value}))
        for name, (_offset, code) in numbers(Header).items():
            for value in edges(code, BLOCK if name == "block_size" else 3):
                if attempt(path, "vpc", image([1, None, 0], head={name: value})):
                    refused.append(name)
        for length in [*range(0, 600, 24), *range(600, 2100, 100), *range(2100, len(WHOLE), 30000)]:
            attempt(path, "vpc", WHOLE[:length])
        for entry in (-1, -2, -3, -4, -5, -131, -(FREE - 1)):
            attempt(path, "vpc", image([1, entry, entry, 0]))
    assert {"data_offset", "current_size", "checksum", "table_offset", "max_table_entries", "block_size"} <= set(refused)


def test_a_table_of_holes_takes_no_time(tmp_path: Path) -> None:
    """2 GiB of table that is not there says that everything is in one place."""
    path = tmp_path / "image"
    path.write_bytes(image([None], {"size": 1 << 30}, {"max_table_entries": (1 << 29) - 1})[: SECTOR + Header.SIZE])
    with open(path, "r+b") as file:
        file.truncate((1 << 31) + M)
    with little_memory():
        assert "where none can be" in (attempt(path, "vpc") or "")


# -- differencing images ---------------------------------------------------------------------------------------------------


def locators(*named: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """The header's parent locators, and the data to which they point, which lies behind the table."""
    entries, data, start = b"", b"", SECTOR + Header.SIZE + SECTOR
    for code, name in named:
        entries += struct.pack(">4sIIIQ", code, SECTOR, len(name), 0, start + len(data))
        data += name.ljust(SECTOR, b"\0")
    return entries, data


def child(
    entries: list[Optional[int]],
    *named: tuple[bytes, bytes],
    parent: bytes = b"u" * 16,
    bitmaps: Optional[dict[int, bytes]] = None,
    **head: Any,
) -> bytes:
    """A differencing image; `named` are the codes and names of its parent."""
    table, names = locators(*named)
    given = {"disk_type": DIFFERENCING, "unique_id": b"c" * 16, "size": 4 * BLOCK + 5 * SECTOR}
    data = image(entries, given, {"parent_unique_id": parent, "parent_locators": table, **head}, bitmaps)
    start = SECTOR + Header.SIZE + SECTOR
    return data[:start] + names + data[start + len(names) :]


def utf16(name: str) -> bytes:
    return name.encode("utf-16-le")


def test_a_parent_has_what_the_bitmaps_leave_out(tmp_path: Path) -> None:
    (tmp_path / "base.vhd").write_bytes(WHOLE)
    (tmp_path / "middle.vhd").write_bytes(
        child([0, 1, None, None, None], (b"W2ru", utf16(".\\base.vhd")), bitmaps={0: b"\x80\0\0\0\0\0\0\x01" + b"\xff" * 8, 1: b"\xaa" * 16})
    )
    (tmp_path / "top.vhd").write_bytes(child([None, None, 0, None, None], (b"W2ru", utf16("middle.vhd")), parent=b"c" * 16))
    with open_image(str(tmp_path / "base.vhd")) as node:
        expected = bytearray(node.pread(0, node.size))
    for block, number, bits in ((0, 0, b"\x80\0\0\0\0\0\0\x01" + b"\xff" * 8), (1, 1, b"\xaa" * 16)):
        for sector in range(BLOCK // SECTOR):
            if bits[sector // 8] & 0x80 >> sector % 8:
                at = block * BLOCK + sector * SECTOR
                expected[at : at + SECTOR] = bytes((number + 1,)) * SECTOR
    with open_image(str(tmp_path / "middle.vhd")) as node:
        assert node.backing is not None and node.pread(0, node.size) == expected
        assert sum(extent.length for extent in node.block_status(0, node.size)) == node.size
    expected[2 * BLOCK : 3 * BLOCK] = b"\1" * BLOCK
    with open_image(str(tmp_path / "top.vhd")) as node:
        assert [layer.driver for layer in node.layers()] == ["vpc"] * 3 and node.pread(0, node.size) == expected
    assert ours(["convert", "-O", "raw", "top.vhd", "raw"], tmp_path) == (0, "", "")
    assert (tmp_path / "raw").read_bytes() == expected
    assert "backing file: middle.vhd" in ours(["info", "top.vhd"], tmp_path).out
    assert ours(["info", "--backing-chain", "top.vhd"], tmp_path).out.count("cluster_size") == 3
    found = ours(["resize", "-f", "vpc", "top.vhd", "1M"], tmp_path)
    assert found.code == 1 and "can only be read" in found.err


@pytest.mark.parametrize(
    "named",
    [
        [(b"W2ru", utf16(".\\base.vhd"))],
        [(b"W2ku", utf16("C:\\machines\\nowhere.vhd")), (b"W2ru", utf16(".\\sub\\..\\base.vhd"))],
        [(b"W2ku", utf16("C:\\machines\\base.vhd"))],
        [(b"W2ku", utf16("\\\\server\\share\\base.vhd"))],
        [(b"MacX", b"file://localhost%s/b%%61se.vhd")],
        [(b"W2ku", b"%s/base.vhd")],
        [(b"W2xx", b"nothing")],
    ],
    ids=["relative", "relative first", "drive", "server", "URL", "absolute", "name only"],
)
def test_how_a_parent_is_named(tmp_path: Path, named: list[tuple[bytes, bytes]]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.vhd").write_bytes(WHOLE)
    place = bytes(tmp_path)
    named = [(code, utf16((name % place).decode()) if code == b"W2ku" and b"%s" in name else name % place if b"%s" in name else name) for code, name in named]
    (tmp_path / "image").write_bytes(child([None] * 5, *named, parent_unicode_name="base.vhd".encode("utf-16-be")))
    with open_image(str(tmp_path / "base.vhd")) as base, open_image(str(tmp_path / "image")) as node:
        assert node.pread(0, node.size) == base.pread(0, base.size)


def test_parents_that_are_not(tmp_path: Path) -> None:
    path = tmp_path / "image"
    (tmp_path / "base.vhd").write_bytes(WHOLE)
    path.write_bytes(child([None] * 5, (b"W2ru", utf16("base.vhd")), parent=b"x" * 16))
    with pytest.raises(Error, match="is another image: its ID is 7575"):
        open_image(str(path))
    path.write_bytes(child([None] * 5, (b"W2ru", utf16("missing.vhd"))))
    with pytest.raises(Error, match="missing.vhd"):
        open_image(str(path))
    path.write_bytes(child([None] * 5, (b"W2ru", utf16("image")), parent=b"c" * 16))
    with pytest.raises(Error, match="infinite loop"):
        open_image(str(path))
    path.write_bytes(child([None] * 5, (b"W2ru", utf16("nbd:localhost:1"))))
    with pytest.raises(Error, match="nbd:localhost:1.*No such file"):
        open_image(str(path))
    path.write_bytes(child([None] * 5, (b"W2ru", utf16("..\\outside.vhd"))))
    for mode in ("none", "same_directory"):
        with pytest.raises(Error, match="open policy refuses"):
            Graph(OpenPolicy(mode)).open(str(path))
    with little_memory():
        for offset, length in ((NOWHERE, 4), (0, FREE), (1 << 62, 4096), (0, 4096), (100, 3)):
            table = struct.pack(">4sIIIQ", b"W2ru", SECTOR, length, 0, offset)
            assert attempt(path, "vpc", child([None] * 5, parent_locators=table, parent_unicode_name=b"\xd8\0" * 256))
    path.write_bytes(child([None, 0, None, None, None], (b"W2ru", utf16("base.vhd"))))
    same("info --image-opts driver=vpc,file.filename=base.vhd", tmp_path)
