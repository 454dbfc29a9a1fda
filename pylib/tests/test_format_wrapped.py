# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Raw images in gzip, xz, bzip2 and zstd files: read as a stream and out of order, in members, damaged, and as bombs."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from damage import attempt, little_memory
from side_by_side import Outcome, ours, theirs

from diskwright.errors import Error
from diskwright.formats import wrapped
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags

M = 1 << 20
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": zstandard.compress,
}
every_kind = pytest.mark.parametrize("kind", PACKERS)


def content(size: int) -> bytes:
    chance = random.Random(1)
    return b"".join(chance.choice((bytes(70000), chance.randbytes(40000), b"\7" * 45000)) for _part in range(size // 40000 + 1))[:size]


@every_kind
def test_images_become_images(tmp_path: Path, kind: str) -> None:
    data = content(2 * M + 300)
    (tmp_path / "raw").write_bytes(data + bytes(212))
    (tmp_path / "image").write_bytes(PACKERS[kind](data))
    assert "file format: %s\nvirtual size: 2 MiB (2097664 bytes)" % kind in ours(["info", "image"], tmp_path).out
    for format in ("raw", "qcow2", "vmdk"):
        assert ours(["convert", "-O", format, "image", "out"], tmp_path) == Outcome(0, "", "")
        assert theirs(["compare", "-f", "raw", "-F", format, "raw", "out"], tmp_path).out == "Images are identical.\n"
    assert ours(["convert", "-O", "qcow2", "-o", "preallocation=metadata", "image", "out"], tmp_path).code == 0
    assert ours(["compare", "-f", kind, "-F", "qcow2", "image", "out"], tmp_path).out == "Images are identical.\n"
    assert ours(["convert", "-f", "raw", "image", "copy"], tmp_path).code == 0
    assert (tmp_path / "copy").read_bytes().startswith((tmp_path / "image").read_bytes())
    for line in ("resize -f %s image 1M", "create -f %s new 1M", "convert -O %s image new", "check image"):
        assert ours((line.replace("%s", kind)).split(), tmp_path).code in (1, 63)


@every_kind
def test_members_and_padding(tmp_path: Path, kind: str) -> None:
    data = content(M + M // 4)
    pack = PACKERS[kind]
    parts = [pack(data[:1000]), pack(b""), pack(data[1000:M]), pack(data[M:])]
    for text in (b"".join(parts), b"".join(parts) + bytes(2048), parts[0] + bytes(8) + b"".join(parts[1:])):
        (tmp_path / "image").write_bytes(text)
        with Graph().open(str(tmp_path / "image")) as node:
            assert node.driver == kind and node.pread(0, node.size) == data
    (tmp_path / "image").write_bytes(b"".join(parts) + b"garbage")
    with Graph().open(str(tmp_path / "image"), kind) as node, pytest.raises(Error, match="followed by something else"):
        assert node.size
    (tmp_path / "image").write_bytes(pack(b""))
    with Graph().open(str(tmp_path / "image")) as node:
        assert node.size == 0


@every_kind
def test_reading_in_any_order(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not far back needs no new start."""
    monkeypatch.setattr(wrapped, "WINDOW", 1 << 18)
    data = content(M + M // 2)
    (tmp_path / "image").write_bytes(PACKERS[kind](data))
    chance = random.Random(kind)
    with Graph().open(str(tmp_path / "image")) as node:
        for _turn in range(12):
            offset = chance.randrange(len(data))
            length = min(len(data) - offset, chance.randrange(1, 300000))
            assert node.pread(offset, length) == data[offset : offset + length]
        passes = []
        plain = wrapped.Unpacker.__init__
        monkeypatch.setattr(wrapped.Unpacker, "__init__", lambda self, image: (passes.append(1), plain(self, image))[1])
        node.pread(0, 1)
        for offset in range(0, len(data) - 200000, 50000):
            for where in (offset + 100000, offset):
                assert node.pread(where, 50000) == data[where : where + 50000]
        assert len(passes) <= 1


@every_kind
def test_damage(tmp_path: Path, kind: str) -> None:
    data = content(M)
    whole = PACKERS[kind](data)
    path = tmp_path / "image"
    with little_memory():
        for length in (*range(0, 40), len(whole) // 2, len(whole) - 1):
            refused = attempt(path, kind, whole[:length])
            assert refused or not length
        for offset in (*range(0, 24), len(whole) // 2, len(whole) - 3):
            attempt(path, kind, whole[:offset] + bytes((whole[offset] ^ 0x55,)) + whole[offset + 1 :])
    path.write_bytes(whole[: len(whole) // 2])
    for target in ("raw", "vmdk"):
        outcome = ours(["convert", "-O", target, "image", "out"], tmp_path)
        assert outcome.code == 1 and "ends too early" in outcome.err


@every_kind
def test_bombs(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image"
    path.write_bytes(PACKERS[kind](bytes(20 * M)))
    monkeypatch.setattr(wrapped, "LIMIT_FREE", 1 << 20)
    monkeypatch.setattr(wrapped, "LIMIT_RATIO", 100)
    with little_memory():
        for line in ("info image", "convert image out", "convert -O vmdk image out"):
            assert "come out of a %s file of" % kind in ours(line.split(), tmp_path).err
        small = ours(["info", "--image-opts", "driver=%s,limit=1M,file.filename=image" % kind], tmp_path)
        assert "More than 1048576 bytes come out" in small.err
        if kind == "gzip":
            assert ours(["info", "--image-opts", "driver=gzip,limit=1G,file.filename=image"], tmp_path).code == 0


def test_images_inside_are_named(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(gzip.compress(b"QFI\xfb" + bytes(5000)))
    assert "There is a qcow2 image inside" in ours(["convert", "image", "out"], tmp_path).err
    with pytest.raises(Error, match="can only be read"):
        Graph().open(str(tmp_path / "image"), flags=OpenFlags(writable=True))


def test_the_index_of_xz(tmp_path: Path) -> None:
    """It says how long the disk is; what lies is found out by whoever reads on."""
    data = content(200 * 1024)
    path = tmp_path / "image"
    several = subprocess.run(["xz", "-c", "--block-size=20KiB"], input=data, capture_output=True, check=True).stdout
    one = lzma.compress(data[:5])
    for text, length in ((several, 204800), (several + one, 204805), (one + bytes(8) + several + bytes(4), 204805), (lzma.compress(b""), 0)):
        path.write_bytes(text)
        with Graph().open(str(path), "xz") as node:
            assert isinstance(node, wrapped.Xz) and node.stated_size() == length
            assert node.pread(0, node.size)[:length] == (data if text is several else (data + data[:5]) if text == several + one else b"".join(node.unpack()))
    with little_memory():
        for offset in range(1, 60, 3):
            for byte in (0, 0xFF):
                attempt(path, "xz", several[:-offset] + bytes((byte,)) + several[len(several) - offset + 1 :])


def test_memory_of_xz(tmp_path: Path) -> None:
    """A dictionary of 1 GiB is not given."""
    (tmp_path / "image").write_bytes(lzma.compress(bytes(M), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 128 * M, "preset": 0}]))
    with Graph().open(str(tmp_path / "image")) as node, pytest.raises(Error, match="[Mm]emory"):
        node.pread(0, 1)
