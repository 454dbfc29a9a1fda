# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""bochs beside qemu-img: a sample, images with every kind of extent, words, and damaged headers."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any, Optional

import pytest
from samples import sample
from side_by_side import ours, same, setup, theirs

from diskwright.errors import Error
from diskwright.extent import ZERO
from diskwright.graph import open_image

K = 1024
SECTOR = 512
FREE = 0xFFFFFFFF
FIELDS = {"version": 64, "header": 68, "catalog": 72, "bitmap": 76, "extent": 80}


def image(extents: dict[int, tuple[int, dict[int, bytes]]], size: int = 70 * K, extent: int = 8 * K, version: int = 2, **fields: int) -> bytes:
    """An image: guest extent -> (its place in the file, sectors in it by number)."""
    bitmap = fields.get("bitmap", SECTOR)
    catalog = fields.get("catalog", -(-size // extent))
    disk = struct.pack("<Q", size) if version == 1 else struct.pack("<IQ", 0, size)
    numbers = struct.pack("<5I", fields.get("version", version << 16), fields.get("header", SECTOR), catalog, bitmap, fields.get("extent", extent))
    head = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + b"Growing".ljust(16, b"\0") + numbers + disk
    table = [extents[number][0] if number in extents else FREE for number in range(catalog)]
    data = bytearray(head.ljust(SECTOR, b"\0") + struct.pack("<%dI" % catalog, *table))
    room = -(-bitmap // SECTOR) * SECTOR
    start = len(data)
    for place, sectors in extents.values():
        at = start + place * (room + extent)
        data.extend(bytes(max(0, at + room + extent - len(data))))
        for number, content in sectors.items():
            data[at + number // 8] |= 1 << number % 8
            data[at + room + number * SECTOR : at + room + (number + 1) * SECTOR] = content
    return bytes(data)


def noise(seed: str, numbers: Any) -> dict[int, bytes]:
    chance = random.Random(seed)
    return {number: chance.randbytes(SECTOR) for number in numbers}


IMAGES = {
    "empty": image({}),
    "one": image({0: (0, noise("a", [0]))}),
    "full": image({number: (number, noise(str(number), range(16))) for number in range(9)}),
    "out of order": image({0: (2, noise("x", range(3, 9))), 1: (0, noise("y", [0, 2, 4, 15])), 4: (1, noise("z", range(16))), 8: (3, noise("w", [1]))}),
    "version 1": image({3: (0, noise("v", [1, 2, 7, 8]))}, version=1),
    "small extents": image({number: (number // 2, noise(str(number), [0])) for number in range(0, 80, 2)}, size=40 * K, extent=SECTOR),
    "large bitmap": image({1: (0, noise("b", range(5)))}, bitmap=700),
    "large catalog": image({1: (0, noise("c", range(5)))}, catalog=1000),
    "odd size": image({8: (0, noise("o", range(16)))}, size=70 * K + 300),
    "nothing": image({}, size=0, catalog=0),
    "cut data": image({0: (0, noise("q", range(16)))})[: -5 * SECTOR - 100],
    "place beyond the file": image({0: (0, noise("p", [1]))}).replace(struct.pack("<2I", 0, FREE), struct.pack("<2I", 1 << 24, FREE)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_beside_qemu_img(tmp_path: Path, name: str) -> None:
    (tmp_path / "image").write_bytes(IMAGES[name])
    for line in ("info image", "info --output=json image", "map --output=json image", "measure -O qcow2 image", "compare -s image image"):
        same(line, tmp_path)
    assert theirs(["convert", "-O", "raw", "image", "raw"], tmp_path).code == 0
    same("compare image raw", tmp_path)
    with open_image(str(tmp_path / "image")) as node:
        assert node.driver == "bochs"
        assert node.pread(0, node.size) == (tmp_path / "raw").read_bytes()


def test_what_is_not_there_is_not_read(tmp_path: Path) -> None:
    """A sparse image of 4 TiB is told apart at once."""
    (tmp_path / "image").write_bytes(image({5: (0, noise("s", [3]))}, size=4 << 40, extent=8 << 20, bitmap=2048))
    with open_image(str(tmp_path / "image")) as node:
        extents = node.resolve(0, node.size)
        assert [extent.offset for extent in extents if not extent.status & ZERO] == [5 * (8 << 20) + 3 * SECTOR]
        assert len(extents) == 3


def test_a_sample(tmp_path: Path) -> None:
    sample("empty.bochs", tmp_path)
    sample("grub_mbr.raw", tmp_path)
    for name in ("empty.bochs", "grub_mbr.raw"):
        same("info %s" % name, tmp_path)
    with open_image(str(tmp_path / "empty.bochs")) as node:
        assert node.pread(0, node.size) == bytes(1032192)
    with open_image(str(tmp_path / "grub_mbr.raw")) as node:
        assert node.driver == "raw"


REFUSED = [
    "check image",
    "check -r all image",
    "resize -f bochs image 2M",
    "snapshot -l image",
    "snapshot -c a image",
    "create -f bochs new 1M",
    "create -f bochs -o help",
    "convert -O bochs image new",
    "measure -O bochs --size 1M",
    "amend -f bochs -o size=3 image",
    "commit -f bochs image",
    "rebase -u -f bochs -b '' image",
    "bitmap --add image x",
    "bench -w -c 1 -f bochs image",
    "info -f bochs raw",
    "resize -f bochs raw 1M",
    "info --image-opts driver=bochs,file.filename=image,foo=3",
    "info --image-opts driver=bochs,file.filename=image,backing.file.filename=x",
]


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(IMAGES["one"])
    (tmp_path / "raw").write_bytes(bytes(3 * K))
    for line in REFUSED:
        same(line, tmp_path)


def opens(path: Path, data: bytes) -> Optional[str]:
    """Open and read an image; what it was refused with, if it was."""
    path.write_bytes(data)
    try:
        with open_image(str(path), "bochs") as node:
            node.pread(0, min(node.size, 1 << 20))
            node.pread(max(0, node.size - SECTOR), min(node.size, SECTOR))
            node.resolve(0, node.size, limit=1000)
    except Error as exc:
        return str(exc)
    return None


def test_damaged_headers(tmp_path: Path) -> None:
    """Each number at its edges: a named error, in QEMU's words where it has words."""
    whole = IMAGES["one"]
    own = 0
    for name, at in FIELDS.items():
        for value in (0, 1, 2, 7, 511, 512, 513, 1 << 13, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 1 << 23, 1 << 24, 1 << 31, FREE):
            data = whole[:at] + struct.pack("<I", value) + whole[at + 4 :]
            found = opens(tmp_path / "image", data)
            if found is not None and ("ends at" in found or "Bitmap size" in found):
                own += 1
                continue
            if value in (0, 1, 513, 1 << 20, (1 << 20) + 1, FREE) or name == "extent":
                same("info -f bochs image", tmp_path)
    assert own
    for size in (0, 1, 511, 512, 1 << 33, 1 << 63, (1 << 64) - 1):
        opens(tmp_path / "image", whole[:88] + struct.pack("<Q", size) + whole[96:])
        same("info -f bochs image", tmp_path)


def test_cut_files(tmp_path: Path) -> None:
    whole = IMAGES["one"]
    for length in [*range(0, 100, 4), 511, 512, 513, 547]:
        assert opens(tmp_path / "image", whole[:length])
    assert opens(tmp_path / "image", whole[:548]) is None


def test_nothing_is_committed_into_it(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(IMAGES["one"])
    setup("qemu-img create -q -f qcow2 -b image -F bochs top; qemu-io -f qcow2 -c 'write 0 4k' top", tmp_path)
    found = ours(["commit", "top"], tmp_path)
    assert found.code == 1 and "Block format 'bochs' used by node 'image' does not support reopening files" in found.err
