# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""raw where nobody said that it is: what makes it look like another format is not written, as QEMU has it."""

from __future__ import annotations

import errno
import struct
import subprocess
from pathlib import Path

import diskwright
import pytest
from diskwright.errors import Error, WrongFormat
from diskwright.graph import open_image
from diskwright.hooks import OpenFlags
from samples import sample
from side_by_side import ours, theirs, twins

WRITABLE = OpenFlags(writable=True, resize=True)
HEADER = struct.pack(">IIQIIQ", 0x514649FB, 3, 0, 0, 16, 1 << 20)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize("data", [HEADER, HEADER.ljust(512, b"\1"), HEADER.ljust(1 << 16, b"\1"), b"LUKS\xba\xbe\0\1"])
def test_a_probed_image_stays_raw(image: Path, data: bytes) -> None:
    with open_image(str(image), None, WRITABLE) as node:
        with pytest.raises(Error, match="Operation not permitted") as caught:
            node.pwrite(0, data)
        assert caught.value.errno == errno.EPERM
    assert image.read_bytes() == bytes(1 << 20)
    with open_image(str(image), "raw", WRITABLE) as node:
        node.pwrite(0, data)
    assert image.read_bytes() == data.ljust(1 << 20, b"\0")


def test_the_magic_in_two_writes(image: Path) -> None:
    """What counts is what the first sector would be, not what one request brings."""
    with open_image(str(image), None, WRITABLE) as node:
        node.pwrite(2, HEADER[2:])
        with pytest.raises(Error, match="Operation not permitted"):
            node.pwrite(0, HEADER[:2])
        node.pwrite(300, b"x" * 1000)
        node.pwrite(512, HEADER)
    expected = bytearray(1 << 20)
    expected[2 : len(HEADER)] = HEADER[2:]
    expected[300:1300] = b"x" * 1000
    expected[512 : 512 + len(HEADER)] = HEADER
    assert image.read_bytes() == expected


@pytest.mark.parametrize("size", [100, 512, 700])
def test_small_files(tmp_path: Path, size: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(size))
    with open_image(str(path), None, WRITABLE) as node:
        node.pwrite(10, b"data")
    assert path.read_bytes()[:14] == bytes(10) + b"data"


def test_an_ambiguous_image(tmp_path: Path) -> None:
    """The magics of two formats, each in its place: QEMU takes whichever it asks first, we ask who is meant."""
    both = HEADER.ljust(64, b"\0") + b"\x7f\x10\xda\xbe" + b"\x01\0\1\0"
    image = tmp_path / "image"
    image.write_bytes(both.ljust(4096, b"\0"))
    with pytest.raises(WrongFormat, match="ambiguous: it may be qcow2 or vdi"):
        open_image(str(image))
    with open_image(str(image), "raw") as node:
        assert node.pread(0, len(both)) == both
    image.write_bytes(bytes(4096))
    with open_image(str(image), None, WRITABLE) as node, pytest.raises(Error, match="Operation not permitted"):
        node.pwrite(0, both)


def test_luks2_is_named(tmp_path: Path) -> None:
    """To QEMU it is raw data, and so it is to us; but we say what it is."""
    (tmp_path / "volume").write_bytes(b"LUKS\xba\xbe\0\2".ljust(4096, b"\0"))
    expected, found = theirs(["info", "volume"], tmp_path), ours(["info", "volume"], tmp_path)
    assert found[:2] == expected[:2]
    assert "LUKS version 2" in found.err
    assert ours(["info", "-f", "raw", "volume"], tmp_path) == theirs(["info", "-f", "raw", "volume"], tmp_path)
    assert ours(["info", "-f", "luks", "volume"], tmp_path) == theirs(["info", "-f", "luks", "volume"], tmp_path)


def test_a_boot_sector_is_raw(tmp_path: Path) -> None:
    assert diskwright.info(str(sample("grub_mbr.raw", tmp_path)))[0].format == "raw"


def test_commit_into_a_probed_image(image: Path) -> None:
    """An overlay that names no format of its backing file must not turn it into a qcow2 image. (Nor does QEMU's.)"""
    place = image.parent
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "image", "-F", "raw", "overlay"], cwd=place, check=True)
    with open_image(str(place / "overlay"), "qcow2", WRITABLE) as node:
        node.pwrite(0, HEADER)
    overlay = bytearray((place / "overlay").read_bytes())
    at = overlay.index(struct.pack(">I", 0xE2792ACA))
    overlay[at : at + 4] = b"none"  # an extension that nobody knows is ignored
    (place / "overlay").write_bytes(overlay)
    left, right = twins(place)
    expected, found = theirs(["commit", "-q", "overlay"], left), ours(["commit", "-q", "overlay"], right)
    assert expected.code == found.code == 1
    assert found.err.splitlines() == [*expected.err.splitlines(), "error while writing at byte 0: Operation not permitted"]
    assert (right / "image").read_bytes() == bytes(1 << 20)
