# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""cloop beside qemu-img: a sample, block sizes, words, damaged tables and blocks."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path
from typing import Any, Optional

import pytest
from samples import sample
from side_by_side import ours, same, setup, theirs

from diskwright.errors import Error
from diskwright.graph import open_image

K = 1024
M = 1024 * K
MAGIC = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
TABLE = 136


def image(
    content: bytes,
    block_size: int = 64 * K,
    streams: Optional[dict[int, bytes]] = None,
    offsets: Optional[dict[int, int]] = None,
    **fields: Any,
) -> bytes:
    """A cloop image; `streams` and `offsets` replace single ones."""
    blocks = [zlib.compress(content[at : at + block_size].ljust(block_size, b"\0"), 9) for at in range(0, len(content), block_size)]
    for number, stream in (streams or {}).items():
        blocks[number] = stream
    places = [TABLE + (len(blocks) + 1) * 8]
    for block in blocks:
        places.append(places[-1] + len(block))
    for number, place in (offsets or {}).items():
        places[number] = place
    header = struct.pack(">2I", fields.get("block_size", block_size), fields.get("n_blocks", len(blocks)))
    return MAGIC.ljust(128, b"\0") + header + struct.pack(">%dQ" % len(places), *places) + b"".join(blocks)


def noise(length: int) -> bytes:
    chance = random.Random(length)
    return b"".join(chance.choice((bytes(1000), b"text " * 200, chance.randbytes(1000))) for turn in range(-(-length // 1000)))[:length]


SIZES = {512: 40 * K, 1536: 40 * K, 64 * K: 1 * M, 1 * M: 3 * M, 9 * M: 18 * M}


@pytest.mark.parametrize("block_size", SIZES)
def test_images_beside_qemu_img(tmp_path: Path, block_size: int) -> None:
    content = noise(SIZES[block_size])
    (tmp_path / "image").write_bytes(image(content, block_size))
    for line in ("info image", "info --output=json image", "map --output=json image", "measure -O qcow2 image"):
        same(line, tmp_path)
    (tmp_path / "raw").write_bytes(content.ljust(-(-len(content) // block_size) * block_size, b"\0"))
    same("compare image raw", tmp_path)
    same("compare -s image image", tmp_path)
    chance = random.Random(block_size)
    with open_image(str(tmp_path / "image")) as node:
        assert node.driver == "cloop"
        for _turn in range(40):
            offset = chance.randrange(len(content))
            length = chance.randrange(min(3 * block_size, len(content) - offset) + 1)
            assert node.pread(offset, length) == content[offset : offset + length]


def test_an_image_without_blocks(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(image(b""))
    same("info image", tmp_path)
    same("map --output=json image", tmp_path)


def test_a_sample(tmp_path: Path) -> None:
    sample("simple-pattern.cloop", tmp_path)
    assert theirs(["convert", "-O", "raw", "simple-pattern.cloop", "raw"], tmp_path).code == 0
    same("info simple-pattern.cloop", tmp_path)
    same("compare simple-pattern.cloop raw", tmp_path)


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(image(noise(100 * K)))
    (tmp_path / "raw").write_bytes(bytes(3 * K))
    for line in (
        "check image",
        "check -r all image",
        "resize -f cloop image 2M",
        "snapshot -l image",
        "snapshot -c a image",
        "create -f cloop new 1M",
        "convert -O cloop image new",
        "convert -c -O cloop image new",
        "measure -O cloop --size 1M",
        "bench -w -c 1 -f cloop image",
        "info -f cloop raw",
        "info --image-opts driver=cloop,file.filename=image,foo=3",
    ):
        same(line, tmp_path)


def test_what_is_no_cloop(tmp_path: Path) -> None:
    """The whole preamble decides."""
    whole = image(noise(100 * K))
    for data in (whole[:40], MAGIC[:-1], MAGIC[:-2] + b"2\n" + whole[84:], whole.replace(b"V2.0", b"V3.0"), b"#!/bin/sh\n"):
        (tmp_path / "image").write_bytes(data)
        assert same("info image", tmp_path).code == 0


def outcome(path: Path, data: bytes) -> Optional[str]:
    """Open an image and read all of it; what it was refused with, if it was."""
    path.write_bytes(data)
    try:
        with open_image(str(path), "cloop") as node:
            for offset in range(0, node.size, M):
                node.pread(offset, min(M, node.size - offset))
    except Error as exc:
        assert str(exc)
        return str(exc)
    return None


def test_damaged_headers(tmp_path: Path) -> None:
    content = noise(200 * K)
    for value in (0, 1, 511, 513, 1024, (64 << 20) + 512, 1 << 31, (1 << 32) - 512, (1 << 32) - 1):
        outcome(tmp_path / "image", image(content, block_size=64 * K, **{}).replace(struct.pack(">2I", 64 * K, 4), struct.pack(">2I", value, 4), 1))
        same("info -f cloop image", tmp_path)
    for count in (0, 1, 3, (512 << 17) - 1, 512 << 17, 0x1FFFFFFE, 0x20000000, (1 << 32) - 1):
        found = outcome(tmp_path / "image", image(content, n_blocks=count))
        if count > 4 and found is not None and "table of offsets ends" in found:
            continue
        same("info -f cloop image", tmp_path)


def test_damaged_tables(tmp_path: Path) -> None:
    content = noise(300 * K)
    for offsets in ({0: 1 << 40}, {1: 0}, {2: 1 << 63}, {5: 0}, {4: (1 << 64) - 1}, {3: 128 << 20}, {0: 0}, {5: 200 << 20}):
        outcome(tmp_path / "image", image(content, offsets=offsets))
        same("info -f cloop image", tmp_path)
    # QEMU looks at tables of half a gigabyte entry by entry; we look at what is read
    far = image(b"", block_size=512, n_blocks=4 << 20)
    (tmp_path / "image").write_bytes(far)
    with (tmp_path / "image").open("r+b") as stream:
        stream.truncate(TABLE + (8 * ((4 << 20) + 1)))
    with open_image(str(tmp_path / "image")) as node, pytest.raises(Error):
        node.pread(0, 512)


DAMAGED = {
    "empty": b"",
    "noise": b"noise" * 40,
    "short": zlib.compress(bytes(64 * K - 1)),
    "long": zlib.compress(bytes(64 * K + 1)),
    "bomb": zlib.compress(bytes(100 * M), 9),
    "cut": zlib.compress(noise(64 * K))[:-5],
    "without checksum": zlib.compress(bytes(64 * K))[:-4],
    "raw deflate": zlib.compress(bytes(64 * K))[2:-4],
    "dictionary": zlib.compressobj(zdict=b"abc").flush(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_blocks(tmp_path: Path, name: str) -> None:
    content = noise(256 * K)
    found = outcome(tmp_path / "image", image(content, streams={2: DAMAGED[name]}))
    assert found is not None and "block 2 cannot be decompressed" in found
    (tmp_path / "raw").write_bytes(content)
    for args in (["convert", "-O", "raw", "image", "out"], ["compare", "image", "raw"]):
        expected, mine = theirs(args, tmp_path), ours(args, tmp_path)
        assert mine.code == expected.code != 0
        assert mine.err.startswith(expected.err)  # we say why, too


def test_cut_files(tmp_path: Path) -> None:
    whole = image(noise(100 * K))
    for length in (0, 1, 127, 128, 131, 132, 135, 136, 143, 144, 152, 159, 160, 1000, len(whole) - 1):
        assert outcome(tmp_path / "image", whole[:length])


def test_nothing_is_committed_into_it(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(image(noise(100 * K)))
    setup("qemu-img create -q -f qcow2 -b image -F cloop top; qemu-io -f qcow2 -c 'write 0 4k' top", tmp_path)
    found = ours(["commit", "top"], tmp_path)
    assert found.code == 1 and "Block format 'cloop' used by node 'image' does not support reopening files" in found.err
