# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""blklogwrites: the log is the one that QEMU writes, and replaying it up to any flush makes an image that is whole."""

from __future__ import annotations

import random
import shlex
import struct
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import diskwright
from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags
from diskwright.node import Node
from side_by_side import same, theirs

K = 1024
FLUSH, DISCARD = 1, 4
WRITABLE = OpenFlags(writable=True, resize=True, unmap=True)
OPTIONS = "driver=blklogwrites,file.driver=file,file.filename=%s,log.driver=file,log.filename=%s"


class Write(NamedTuple):
    """One entry of a log, in bytes."""

    offset: int
    length: int
    flags: int
    data: bytes


def read_log(path: Path) -> list[Write]:
    log = path.read_bytes()
    magic, version, count, sector = struct.unpack_from("<QQQI", log)
    assert (magic, version) == (0x6A736677736872, 1)
    found = []
    place = sector
    for _number in range(count):
        first, sectors, flags, length = struct.unpack_from("<QQQQ", log, place)
        place += sector
        size = 0 if flags & DISCARD else sectors * sector
        found.append(Write(first * sector, sectors * sector, flags, log[place : place + size]))
        place += size
        assert length == 0
    assert place == len(log)
    return found


def replay(writes: list[Write], content: bytearray) -> None:
    for write in writes:
        data = bytes(write.length) if write.flags & DISCARD else write.data
        if write.offset + len(data) > len(content):
            content.extend(bytes(write.offset + len(data) - len(content)))
        content[write.offset : write.offset + len(data)] = data


def open_logged(file: str, log: str, **options: Any) -> Node:
    spec = {"driver": "blklogwrites", "file": {"driver": "file", "filename": file}, "log": {"driver": "file", "filename": log}, **options}
    return Graph().open_spec(spec, WRITABLE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("ours", "theirs"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
        (tmp_path / (name + ".log")).touch()
    return tmp_path


@pytest.mark.parametrize("sector", [512, 4096])
def test_the_log_is_qemus(place: Path, sector: int) -> None:
    operations = [("write -P 7", 4096, 1000), ("write -P 8", 512, 512), ("discard", 8 * K, 4 * K), ("write -z", 16 * K, 8 * K), ("write -P 9", 0, 64 * K)]
    line = ["qemu-io", "-d", "unmap", "--image-opts", OPTIONS % ("theirs", "theirs.log") + ",log-sector-size=%d" % sector]
    for operation in operations:
        line += ["-c", "%s %d %d" % operation, "-c", "flush"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    with open_logged("ours", "ours.log", **{"log-sector-size": sector}) as node:
        for words, offset, length in operations:
            if words == "discard":
                node.pdiscard(offset, length)
            elif words == "write -z":
                node.pwrite_zeroes(offset, length)
            else:
                node.pwrite(offset, bytes([int(words.split()[-1])]) * length)
            node.flush()
    logs = [[write for write in read_log(place / (name + ".log")) if write.flags != FLUSH] for name in ("ours", "theirs")]
    assert logs[0] == logs[1]
    assert (place / "ours").read_bytes() == (place / "theirs").read_bytes()


def test_replayed_to_any_flush_an_image_is_whole(place: Path) -> None:
    """What our own qcow2 driver writes, in the order in which it reaches the file."""
    (place / "image").touch()
    subprocess.run(shlex.split("qemu-img create -q -f qcow2 -o cluster_size=4k image 4M"), check=True)
    content = bytearray((place / "image").read_bytes())
    chance = random.Random(1)
    spec = {
        "driver": "qcow2",
        "file": {"driver": "blklogwrites", "file": {"driver": "file", "filename": "image"}, "log": {"driver": "file", "filename": "ours.log"}},
    }
    with Graph().open_spec(spec, WRITABLE) as node:
        for _number in range(40):
            offset = chance.randrange(4 << 20)
            node.pwrite(offset, chance.randbytes(min(chance.randrange(1, 30 * K), (4 << 20) - offset)))
            if chance.random() < 0.3:
                node.pwrite_zeroes(offset, (4 << 20) - offset)
                node.flush()
        expected = node.pread(0, node.size)
    writes = read_log(place / "ours.log")
    ends = [number for number, write in enumerate(writes) if write.flags == FLUSH]
    done = 0
    for end in sorted({*chance.sample(ends, min(8, len(ends))), len(writes)}):
        replay(writes[done:end], content)
        done = end
        (place / "replayed").write_bytes(content)
        assert theirs(["check", "-q", "-f", "qcow2", "replayed"], place).code in (0, 3)
    with diskwright.open("replayed", format="qcow2") as image:
        assert image.pread(0, image.size) == expected


def test_a_log_is_continued(place: Path) -> None:
    for number in range(3):
        with open_logged("ours", "ours.log", **{"log-append": True}) as node:
            node.pwrite(number * 4096, bytes([number + 1]) * 4096)
    writes = [write for write in read_log(place / "ours.log") if write.flags != FLUSH]
    assert [(write.offset, write.data[:1]) for write in writes] == [(0, b"\1"), (4096, b"\2"), (8192, b"\3")]
    subprocess.run(
        ["qemu-io", "--image-opts", OPTIONS % ("ours", "ours.log") + ",log-append=on", "-c", "write -P 5 0 512"], check=True, stdout=subprocess.DEVNULL
    )
    assert [write.data for write in read_log(place / "ours.log") if write.flags != FLUSH][-1] == b"\5" * 512


def test_damaged_logs_are_not_continued(place: Path) -> None:
    with open_logged("ours", "ours.log") as node:
        node.pwrite(0, b"\1" * 4096)
    log = (place / "ours.log").read_bytes()
    damages = [b"\0" * len(log), log[:20], log[:600]]
    for offset, value in ((16, 1 << 60), (16, 1 << 20), (24, 3), (24, 1 << 30), (512 + 8, 1 << 62)):
        damages.append(log[:offset] + struct.pack("<Q" if offset != 24 else "<I", value) + log[offset + (8 if offset != 24 else 4) :])
    for damaged in damages:
        (place / "ours.log").write_bytes(damaged)
        with pytest.raises(Error):
            open_logged("ours", "ours.log", **{"log-append": True})


@pytest.mark.parametrize("more", ["", ",log-sector-size=4096", ",log-sector-size=100", ",log-append=on", ",log-super-update-interval=0", ",log-append=x"])
def test_described_as_by_qemu_img(place: Path, more: str) -> None:
    same("info --image-opts " + OPTIONS % ("ours", "ours.log") + more, place)
    same("info --output=json --image-opts " + OPTIONS % ("ours", "ours.log") + more, place)


def test_a_log_must_be_named(place: Path) -> None:
    same("info --image-opts driver=blklogwrites,file.driver=file,file.filename=ours", place)
