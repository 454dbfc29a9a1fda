# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`rebase` against qemu-img: the texts, the content afterwards, and what is written."""

from __future__ import annotations

import random
import shlex
import subprocess
from pathlib import Path

import pytest

import diskwright
from conformance.recorder import Recorder, after_crash
from diskwright.copy.overlay import rebase as bring_over
from diskwright.formats.qcow2 import Qcow2
from diskwright.formats.qcow2.options import Qcow2Options
from diskwright.hooks import OpenFlags
from side_by_side import difference, ours, setup, theirs, twins

GALLERY = r"""
qemu-img create -f qcow2 base 1M; qemu-io -c 'write -P 1 0 1M' base
qemu-img create -f qcow2 -b base -F qcow2 mid 2M; qemu-io -c 'write -P 2 64k 64k' -c 'write -P 7 1200k 100k' mid
qemu-img create -f qcow2 -b mid -F qcow2 top 3M; qemu-io -c 'write -P 3 1M 64k' -c 'write -z 200k 300k' top
qemu-img create -f raw short 300k; qemu-io -f raw -c 'write -P 1 10k 200k' short
qemu-img create -f raw long 5M; qemu-io -f raw -c 'write -P 9 0 5M' long
qemu-img create -f raw same 3M; qemu-io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 64k 64k' -c 'write -P 7 1200k 100k' same
qemu-img create -f qcow2 -o cluster_size=512,compat=0.10 -b mid -F qcow2 tiny 2500k; qemu-io -c 'write -P 4 777k 3k' tiny
qemu-img create -f qcow2 -o cluster_size=2M -b base -F qcow2 huge 5M; qemu-io -c 'write -P 5 0 1k' huge
qemu-img create -f qcow2 alone 2M; qemu-io -c 'write -P 6 0 1M' alone
qemu-img create -f qcow2 -u -b nowhere -F qcow2 lost 1M
mkdir sub; qemu-img create -f qcow2 -b ../base -F qcow2 sub/inner 1M; qemu-img create -f qcow2 -b ../mid -F qcow2 sub/second 1M
"""

LINES = [
    *(
        "%s -b %s %s" % (option, base, image)
        for image in ("top", "tiny", "huge", "alone")
        for base in ("base -F qcow2", "mid -F qcow2", "short -F raw", "long -F raw", "same -F raw", "''", "base -F raw")
        for option in ("", "-c", "-u")
        if (image, base[:3]) != ("tiny", "lon")
    ),
    "sub/inner -b ../mid -F qcow2",
    "sub/second -b ../base --backing-format qcow2",
    "sub/second -u -b base -F qcow2",
    "sub/inner -b base -F qcow2",
    "-u top",
    "-u alone",
    "-u -F qcow2 top",
    "-F qcow2 -b '' top",
    "-u lost",
    "-b '' lost",
    "-u -b base -F qcow2 lost",
    "-b base top",
    "-u -b base top",
    "-b base -F nofmt top",
    "-b nope -F qcow2 top",
    "-b nope top",
    "-b top -F qcow2 top",
    "-b base -F qcow2 -f raw top",
    "-f raw -u top",
    "-f raw -c -b '' top",
    "-f raw -b '' same",
    "-t none -T none -b base -F qcow2 top",
    "--cache unsafe --backing-cache directsync -b base -F qcow2 top",
    "-t bad -b base -F qcow2 top",
    "-T bad -b base -F qcow2 top",
    "-U -b base -F qcow2 top",
    "--image-opts -b base -F qcow2 driver=qcow2,file.filename=top",
    "--image-opts -b base -F qcow2 top",
    "--image-opts -f qcow2 -b base -F qcow2 top",
    "-u -b %s -F raw top" % ("a" * 1200),
    "-u -b %s -F raw tiny" % ("a" * 500),
    "-u -b x -F verylongformatname top",
    "top",
    "",
    "top mid",
    "-q -p -b base -F qcow2 top",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("rebase") / "gallery"
    path.mkdir()
    setup(GALLERY, path)
    return twins(path)


def backing(image: Path) -> tuple[object, object]:
    found = diskwright.info(str(image))[0]
    return found.backing_filename, found.backing_format


@pytest.mark.parametrize("line", LINES)
def test_lines(pair: tuple[Path, Path], line: str) -> None:
    args = ["rebase", *shlex.split(line)]
    source = pair[0].with_name("gallery")
    named = [name for name in ("sub/inner", "sub/second", "top", "tiny", "huge", "alone", "lost", "same") if name in line]
    expected, found = theirs(args, pair[0]), ours(args, pair[1])
    try:
        assert found == expected, difference(line, found, expected)
        for name in named if expected.code == 0 else ():
            left, right = pair[0] / name, pair[1] / name
            assert backing(left) == backing(right)
            if name != "lost" and "-u" not in line:
                assert name == "same" or theirs(["check", "-q", name], pair[1]).code == 0
                assert theirs(["compare", str(source / name), str(right)], pair[0]).code == 0
                if "base -F raw" in line:
                    continue  # qemu-img takes it for the qcow2 image of the same name, and changes what the image reads as
                assert theirs(["compare", str(left), str(right)], pair[0]).code == 0
                assert right.stat().st_size <= left.stat().st_size + (4 << 20 if name == "huge" else 200 << 10)
    finally:
        for copy in pair:
            for name in named:
                subprocess.run(["cp", "-a", str(source / name), str(copy / name)], check=True)


def test_only_what_differs_is_written(pair: tuple[Path, Path]) -> None:
    """Onto an image of the same content nothing is written but the header; down its own chain, only what lay between."""
    before = (pair[1] / "top").stat().st_size
    diskwright.rebase(str(pair[1] / "top"), "same", backing_format="raw")
    assert (pair[1] / "top").stat().st_size == before
    subprocess.run(["cp", "-a", str(pair[0] / "top"), str(pair[1] / "top")], check=True)
    diskwright.rebase(str(pair[1] / "top"), "base", backing_format="qcow2")
    assert (pair[1] / "top").stat().st_size == before + (1 + 3) * 65536  # what mid has: 1 cluster, and 3 behind the end of base


def test_any_crash_leaves_the_old_content(tmp_path: Path) -> None:
    """After every prefix of what is written the image reads as before, whichever name it has."""
    setup(GALLERY, tmp_path)
    chance = random.Random(3)
    for base, format in (("short", "raw"), ("", None)):
        image = tmp_path / "top"
        before = image.read_bytes()
        content = read(image)
        file = Recorder(image)
        node = Qcow2(Qcow2Options.from_mapping({"file": file}), OpenFlags(writable=True, resize=True, no_backing=True))
        node.filename = str(image)
        old = diskwright.open(tmp_path / "mid")
        node.attach("backing", old)
        new = diskwright.open(tmp_path / base, format=format) if base else None
        bring_over(node, new)
        node.change_backing(base or None, format)
        node.close()
        if new is not None:
            new.close()
        log = file.log
        writes = [number for number, request in enumerate(log) if request.verb not in ("read",)]
        for position in [*chance.sample(writes, min(20, len(writes))), len(log) - 1, len(log)]:
            image.write_bytes(after_crash(before, log, position, chance, chance.random() < 0.5))
            code = theirs(["check", "-q", "top"], tmp_path).code
            assert code in (0, 3)
            assert read(image) == content
        image.write_bytes(before)


def read(image: Path) -> bytes:
    with diskwright.open(image) as node:
        return node.pread(0, node.size)
