# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Snapshot mode: the image stays as it was until what was written is put back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import Error, ReadOnly
from side_by_side import setup, theirs

SIZE = 1 << 20


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    setup("qemu-img create -q -f qcow2 image 1M; qemu-io -c 'write -P 1 0 300k' image; qemu-img convert -O raw image raw; mkdir temporary", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["image", "raw"])
def test_what_is_written_can_be_put_back(place: Path, name: str) -> None:
    format = "raw" if name == "raw" else "qcow2"
    before = (place / name).read_bytes()
    with diskwright.open(name, "r+", format=format, snapshot=True, directory="temporary") as node:
        assert os.listdir("temporary") == []
        node.pwrite(1000, b"x" * 1000)
        node.pwrite_zeroes(100000, 50000)
        node.truncate(2 * SIZE)
        node.pwrite(2 * SIZE - 1, b"y")
        content = node.pread(0, node.size)
        node.flush()
        assert (place / name).read_bytes() == before
        diskwright.commit_snapshot(node)
        assert node.pread(0, node.size) == content
        node.pwrite(0, b"forgotten")
        assert theirs(["info", "-f", format, name], place).code == 0
    with diskwright.open(name, format=format) as node:
        assert node.pread(0, node.size) == content
    assert content[1000:2000] == b"x" * 1000 and content[0:1] == b"\1"
    if format == "qcow2":
        assert theirs(["check", "-q", name], place).code == 0


def test_what_is_not_put_back_is_gone(place: Path) -> None:
    before = (place / "image").read_bytes()
    with diskwright.open("image", "r+", snapshot=True) as node:
        node.pwrite(0, b"x")
    assert (place / "image").read_bytes() == before


def test_an_image_that_cannot_be_written(place: Path) -> None:
    """Snapshot mode does without; only putting back fails, and loses nothing."""
    with diskwright.open('json:{"driver": "qcow2", "read-only": true, "file.filename": "image"}', "r+", snapshot=True) as node:
        node.pwrite(0, b"x")
        content = node.pread(0, SIZE)
    with diskwright.open("image", "r+", snapshot=True) as node, diskwright.open("image") as other:
        node.pwrite(0, b"x")
        assert node.pread(0, SIZE) == content != other.pread(0, SIZE)
    with diskwright.open("image", snapshot=True) as node, pytest.raises(ReadOnly):
        node.pwrite(0, b"x")
    with pytest.raises(Error, match="Could not open temporary file '/nowhere/vl.XXXXXX': No such file or directory"):
        diskwright.open("image", "r+", snapshot=True, directory="/nowhere")
    with diskwright.open("image", "r+") as node, pytest.raises(Error, match="not in snapshot mode"):
        diskwright.commit_snapshot(node)
