# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The content checksum: the same for the same content, in whatever form it is kept."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path

import pytest

import diskwright
from diskwright.copy import content as module
from diskwright.copy.content import BLOCK, content_checksum

SIZE = 3 * (1 << 20) + 512


def expected(data: bytes) -> str:
    """By the definition."""
    digests = [hashlib.sha256(data[start : start + BLOCK]).digest() for start in range(0, len(data), BLOCK)]
    return hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.fixture()
def disk(tmp_path: Path) -> tuple[Path, bytes]:
    chance = random.Random(5)
    data = bytearray(SIZE)
    for _number in range(20):
        start, length = chance.randrange(SIZE), chance.randrange(1, 100000)
        data[start : start + length] = chance.randbytes(len(data[start : start + length]))
    path = tmp_path / "disk.raw"
    path.write_bytes(data)
    return path, bytes(data)


@pytest.mark.parametrize(
    ("format", "options"),
    [("qcow2", {}), ("qcow2", {"compress": True}), ("qcow2", {"options": "cluster_size=512"}), ("vmdk", {}), ("raw", {"sparse_size": 0}), ("vhdx", {})],
)
def test_copies_have_the_checksum_of_what_they_were_made_from(disk: tuple[Path, bytes], tmp_path: Path, format: str, options: dict[str, object]) -> None:
    path, data = disk
    middle, copy = str(tmp_path / "middle"), str(tmp_path / "copy")
    found: list[str] = []
    diskwright.convert([str(path)], middle, format="raw", target_format=format, content=found.append, **options)  # type: ignore[arg-type]
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", format, str(path), middle], check=True, stdout=subprocess.DEVNULL)
    size = diskwright.info(middle, format=format)[0].virtual_size
    diskwright.convert([middle], copy, format=format, target_format="qcow2", content=found.append)
    assert found[0] == expected(data)
    assert found[1] == expected(data + bytes(size - SIZE))


def test_digests_that_wait_are_few(disk: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be kept is read again, or folded early."""
    monkeypatch.setattr(module, "AHEAD", 4)
    path, data = disk
    found: list[str] = []
    diskwright.convert([str(path)], str(tmp_path / "copy"), format="raw", target_format="qcow2", content=found.append)
    assert found == [expected(data)]


def test_of_holes_and_backing_files(tmp_path: Path) -> None:
    """A terabyte of holes takes no time, and an overlay reads as it does."""
    large, overlay = str(tmp_path / "large.qcow2"), str(tmp_path / "overlay.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", large, "64G"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 1G 4096", large], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", large, "-F", "qcow2", overlay], check=True)
    with diskwright.open(large) as node, diskwright.open(overlay) as upper:
        first, second = content_checksum(node), content_checksum(upper)
    block = hashlib.sha256(bytes([7]) * 4096 + bytes(BLOCK - 4096)).digest()
    zeroes = hashlib.sha256(bytes(BLOCK)).digest()
    total = hashlib.sha256(zeroes * ((1 << 30) // BLOCK) + block + zeroes * ((63 << 30) // BLOCK - 1))
    assert first == second == total.hexdigest()


def test_of_several_sources_there_is_none(disk: tuple[Path, bytes], tmp_path: Path) -> None:
    with pytest.raises(diskwright.OptionError, match="single source"):
        diskwright.convert([str(disk[0])] * 2, str(tmp_path / "copy"), content=str)
