# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Naming another backing file, with qemu-img as the judge of the result."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import diskwright


def qemu_img(*words: object) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    return tmp_path / "top.qcow2"


@pytest.mark.parametrize("name, format", [("x", "qcow2"), ("a longer name, with a comma.raw", "raw"), ("n" * 300, "qcow2"), ("\u00e4.qcow2", None)])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_the_name_and_the_format_are_what_qemu_img_reads(tmp_path: Path, compat: str, name: str, format: str | None) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base", "1M")
    path = tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=" + compat, "-b", "base", "-F", "qcow2", path)
    with diskwright.open(path, "r+", backing=False) as node:
        node.change_backing(name, format)
        assert (node.backing_filename, node.backing_format) == (name, format)
    found = json.loads(qemu_img("info", "--output=json", path))
    assert (found["backing-filename"], found.get("backing-filename-format")) == (name, format)
    qemu_img("rebase", "-u", "-b", "base", "-F", "qcow2", path)
    assert "No errors" in qemu_img("check", path)


def test_no_backing_file_at_all(overlay: Path) -> None:
    with diskwright.open(overlay, "r+", backing=False) as node:
        node.change_backing(None)
    assert "backing-filename" not in json.loads(qemu_img("info", "--output=json", overlay))


@pytest.mark.parametrize("name, format", [("n" * 1024, "raw"), ("x", "f" * 16)])
def test_what_does_not_fit_is_refused_and_nothing_changes(overlay: Path, name: str, format: str) -> None:
    before = overlay.read_bytes()
    with diskwright.open(overlay, "r+", backing=False) as node, pytest.raises(diskwright.OptionError, match="too long"):
        node.change_backing(name, format)
    assert overlay.read_bytes() == before


def test_a_name_that_fills_more_than_the_header_s_cluster(tmp_path: Path) -> None:
    path = tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-o", "cluster_size=512", "-b", "base", "-F", "qcow2", path, "1M")
    before = path.read_bytes()
    with diskwright.open(path, "r+", backing=False) as node:
        with pytest.raises(diskwright.OptionError, match="too long"):
            node.change_backing("n" * 500, "raw")
        assert node.backing_filename == "base"
    assert path.read_bytes() == before


def test_reading_only_and_formats_without_backing_files(overlay: Path, tmp_path: Path) -> None:
    with diskwright.open(overlay, backing=False) as node, pytest.raises(diskwright.ReadOnly):
        node.change_backing("other", "raw")
    qemu_img("create", "-q", tmp_path / "disk.raw", "1M")
    with diskwright.open(tmp_path / "disk.raw", "r+", format="raw") as node, pytest.raises(diskwright.Unsupported):
        node.change_backing("other", "raw")
