# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""quorum, blkverify and raw windows in scripts of `io`: votes, members that fail, and differences, as with qemu-io."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags
from io_side_by_side import our_io, same_io
from side_by_side import setup

GALLERY = r"""
for name in a b c; do qemu-img create -q -f raw $name 1M; qemu-io -f raw -c 'write -P 1 0 512k' $name; done
qemu-io -f raw -c 'write -P 9 64k 64k' c
"""
SCRIPT = (
    "read -P 1 0 4k|read -P 1 64k 64k|write -P 5 0 4k|read -P 5 0 4k|write -z 8k 4k|read -P 0 8k 4k|flush|discard 0 64k|length|"
    "read -P 1 60k 8k|truncate 2M|map|alloc 0 1M"
).split("|")


def member(number: int, name: str, broken: bool = False) -> str:
    """A child of quorum; with `broken` none of its requests succeeds."""
    at = ",children.%d." % number
    if not broken:
        return at + at.join(["driver=raw", "file.driver=file", "file.filename=" + name])
    return at + at.join(["driver=raw", "file.driver=blkdebug", "file.image.driver=file", "file.image.filename=" + name, "file.inject-error.0.event=none"])


CASES = {
    "two-of-three": "vote-threshold=2" + member(0, "a") + member(1, "b") + member(2, "c"),
    "all": "vote-threshold=3" + member(0, "a") + member(1, "b") + member(2, "c"),
    "rewriting": "vote-threshold=2,rewrite-corrupted=on" + member(0, "a") + member(1, "b") + member(2, "c"),
    "undecided": "vote-threshold=2" + member(0, "a") + member(1, "c"),
    "alike": "vote-threshold=2,blkverify=on" + member(0, "a") + member(1, "b"),
    "the-first": "vote-threshold=1,read-pattern=fifo" + member(0, "c") + member(1, "a"),
    "the-second": "vote-threshold=1,read-pattern=fifo" + member(0, "a", True) + member(1, "b"),
    "one-fails": "vote-threshold=1" + member(0, "a") + member(1, "b", True),
    "one-of-three-fails": "vote-threshold=2" + member(0, "a") + member(1, "b", True) + member(2, "c"),
}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quorum") / "gallery"
    place.mkdir()
    setup(GALLERY, place)
    return place


@pytest.mark.parametrize("name", list(CASES))
def test_votes(gallery: Path, name: str) -> None:
    same_io(gallery, "--image-opts driver=quorum," + CASES[name], *SCRIPT)
    for image in "abc":
        ours, theirs = (gallery.with_name("gallery." + whose) / image for whose in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_difference_is_told(gallery: Path) -> None:
    for options, text in (
        ("driver=quorum,vote-threshold=2,blkverify=on" + member(0, "a") + member(1, "c"), "quorum: offset=65536 bytes=4096 contents mismatch at offset 65536"),
        (
            "driver=blkverify,test.driver=file,test.filename=c,raw.driver=file,raw.filename=a",
            "blkverify: read offset=65536 bytes=4096 contents mismatch at offset 65536",
        ),
    ):
        found = our_io(["-c", "read 0 4k", "-c", "read 64k 4k", "--image-opts", options], gallery)
        assert (found.code, found.err) == (1, text + "\n")
        assert found.out.endswith("read failed: Input/output error\n")


def test_a_vote_that_cannot_be_flushed(gallery: Path) -> None:
    broken: dict[str, Any] = {
        "driver": "blkdebug",
        "image": {"driver": "file", "filename": str(gallery / "b")},
        "inject-error": [{"event": "pwritev_done", "iotype": "flush"}],
    }
    spec = {"driver": "quorum", "vote-threshold": 2, "children": [{"driver": "file", "filename": str(gallery / "a")}, broken]}
    node = Graph().open_spec(spec, OpenFlags(writable=True))
    node.pwrite(0, b"\1")
    for call in (node.flush, node.close):
        with pytest.raises((Error, OSError), match="Input/output error"):
            call()


WINDOWS = [
    "offset=0",
    "offset=512",
    "offset=4096,size=8192",
    "offset=1M",
    "offset=2M",
    "size=1000",
    "size=0",
    "size=2M",
    "offset=512k,size=1M",
    "offset=100,size=512",
]


@pytest.mark.parametrize("window", WINDOWS)
def test_windows(gallery: Path, window: str) -> None:
    commands = ["length", "map", "read -v 0 32", "write -P 3 0 512", "write -z 0 1k", "truncate 64k", "length", "read 8k 1k", "info", "alloc 0 4k"]
    same_io(gallery, "--image-opts driver=raw,%s,file.driver=file,file.filename=a" % window, *commands)
