# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`amend` against qemu-img: the texts, what the image is afterwards, and what a crash leaves of it."""

from __future__ import annotations

import random
import shlex
import subprocess
from pathlib import Path

import pytest

import diskwright
from conformance.recorder import Recorder, after_crash
from diskwright.formats.qcow2 import Qcow2
from diskwright.formats.qcow2.options import Qcow2AmendOptions, Qcow2Options
from diskwright.hooks import OpenFlags
from side_by_side import difference, ours, setup, theirs, twins

GALLERY = r"""
qemu-img create -f raw base 1M; qemu-io -f raw -c 'write -P 1 0 1M' base
qemu-img create -f qcow2 -b base -F raw over 2M; qemu-io -c 'write -P 3 1M 64k' -c 'write -z 200k 300k' -c 'write -P 1 600k 100k' -c 'write -z 600k 100k' over
qemu-img create -f qcow2 -o cluster_size=4k alone 3M; qemu-io -c 'write -P 3 1M 64k' -c 'write -z 200k 300k' -c 'write -c -P 4 64k 4k' alone
qemu-img create -f qcow2 -o cluster_size=512,preallocation=metadata tiny 1000k; qemu-io -c 'write -z 0 200k' -c 'write -P 6 100k 30k' tiny
qemu-img create -f qcow2 -o compat=0.10 old 2M; qemu-io -c 'write -P 5 0 1k' old
qemu-img create -f qcow2 -o refcount_bits=64,lazy_refcounts=on wide 2M; qemu-io -c 'write -P 5 0 1k' wide
qemu-img create -f qcow2 -o compression_type=zstd zstd 1M; qemu-io -c 'write -c -P 5 0 64k' zstd
qemu-img create -f qcow2 -o compression_type=zstd zempty 1M
qemu-img create -f qcow2 -o extended_l2=on extended 1M
qemu-img create -f qcow2 -b base -F raw snapped 2M; qemu-io -c 'write -P 3 0 100k' -c 'write -z 200k 300k' snapped
qemu-img snapshot -c one snapped; qemu-io -c 'write -P 4 50k 200k' snapped; qemu-img snapshot -c two snapped; qemu-io -c 'write -P 4 1500k 200k' snapped
qemu-img create -f qcow2 -o refcount_bits=1 -b base -F raw narrow 2M
"""

NAMES = ("over", "alone", "tiny", "old", "wide", "zstd", "zempty", "extended", "snapped", "narrow")

LINES = [
    *(
        "-o %s %s" % (options, name)
        for name in ("over", "alone", "tiny", "old", "wide", "snapped")
        for options in (
            "compat=0.10",
            "compat=1.1",
            "compat=v3,lazy_refcounts=on,refcount_bits=8",
            "compat=v2,refcount_bits=16,lazy_refcounts=off",
            "refcount_bits=1",
            "refcount_bits=64",
            "refcount_bits=32,size=5M",
            "lazy_refcounts=on",
            "lazy_refcounts=off",
        )
    ),
    *("-o compat=v2 %s" % name for name in ("zstd", "zempty", "narrow")),
    "-o size=512k alone",
    "-o size=0 alone",
    "-o size=1000 alone",
    "-o size=x alone",
    "-o size=1M -o compat=v2 alone",
    "-o compat=xx alone",
    "-o compat= alone",
    "-o refcount_bits=3 alone",
    "-o refcount_bits=128 alone",
    "-o refcount_bits=x alone",
    "-o refcount_bits=8,compat=v2 alone",
    "-o lazy_refcounts=maybe alone",
    "-o lazy_refcounts=on,compat=v2 alone",
    "-o backing_file=base over",
    "-o backing_file=base,backing_fmt=raw over",
    "-o backing_file=,backing_fmt= alone",
    "-o backing_fmt=raw over",
    "-o backing_file=other,backing_fmt=raw over",
    "-o cluster_size=4k alone",
    "-o preallocation=off alone",
    "-o nothing=1 alone",
    "-o lazy_refcounts=on,cluster_size=5 alone",
    "-o data_file=x alone",
    "-o data_file= alone",
    "-o data_file_raw=on alone",
    "-o data_file_raw=off alone",
    "-o encrypt.state=active alone",
    "-o encrypt.keyslot=1 alone",
    "-o , alone",
    "alone",
    "-o size=1M",
    "-o size=1M alone over",
    "-t bad -o size=1M nope",
    "-o size=1M nope",
    "-f raw -o size=1M base",
    "-f nofmt -o size=1M alone",
    "-o help -f raw",
    "-o help -f nofmt",
    "-o help",
    "--image-opts -o size=1M alone",
    "--image-opts -f qcow2 -o size=1M alone",
    "--image-opts -o size=4M driver=qcow2,file.filename=alone",
    "--options size=4M --format qcow2 --cache none --quiet --force alone",
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("amend") / "gallery"
    path.mkdir()
    setup(GALLERY, path)
    return twins(path)


@pytest.mark.parametrize("line", LINES)
def test_lines(pair: tuple[Path, Path], line: str) -> None:
    source = pair[0].with_name("gallery")
    args = ["amend", *shlex.split(line)]
    named = [name for name in NAMES if name in line]
    expected, found = theirs(args, pair[0]), ours(args, pair[1])
    try:
        assert found == expected, difference(line, found, expected)
        for name in named:
            left, right = [diskwright.info(str(place / name))[0] for place in pair]
            assert left.virtual_size == right.virtual_size
            if expected.code == 0:
                assert (left.format_specific, left.dirty) == (right.format_specific, right.dirty)
            assert theirs(["compare", str(pair[0] / name), str(pair[1] / name)], source).code == 0
            assert theirs(["check", "-q", name], pair[1]).code == 0
    finally:
        for copy in pair:
            for name in named:
                subprocess.run(["cp", "-a", str(source / name), str(copy / name)], check=True)


def test_snapshots_stay(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An image with snapshots that goes to version 2 and back: what each snapshot holds is the same."""
    for options in ("compat=0.10", "compat=1.1,refcount_bits=64"):
        assert ours(["amend", "-o", options, "snapped"], pair[1]).code == 0
    for snapshot in ("one", "two"):
        for place in pair:
            subprocess.run(["qemu-img", "convert", "-l", snapshot, "-O", "raw", str(place / "snapped"), str(tmp_path / place.name)], check=True)
        assert (tmp_path / pair[0].name).read_bytes() == (tmp_path / pair[1].name).read_bytes()
    assert theirs(["check", "-q", "snapped"], pair[1]).code == 0


def test_help_names_the_options_of_qemu_img(tmp_path: Path) -> None:
    args = ["amend", "-f", "qcow2", "-o", "help"]
    shown = [outcome.out.splitlines() for outcome in (theirs(args, tmp_path), ours(args, tmp_path))]
    assert [row.split(" - ")[0] for row in shown[0]] == [row.split(" - ")[0] for row in shown[1]]


@pytest.mark.parametrize("options", ["compat=0.10", "refcount_bits=64", "refcount_bits=1,size=4M", "lazy_refcounts=on,refcount_bits=8"])
def test_any_crash_leaves_a_whole_image(tmp_path: Path, options: str) -> None:
    setup(GALLERY, tmp_path)
    chance = random.Random(options)
    for name in ("over", "tiny"):
        image = tmp_path / name
        before = image.read_bytes()
        content = read(image)
        file = Recorder(image)
        node = Qcow2(Qcow2Options.from_mapping({"file": file}), OpenFlags(writable=True, resize=True, no_backing=True))
        if name == "over":
            node.attach("backing", diskwright.open(tmp_path / "base", format="raw"))
        node.amend(Qcow2AmendOptions.from_string(options))
        node.close()
        writes = [number for number, request in enumerate(file.log) if request.verb != "read"]
        for position in [*chance.sample(writes, min(15, len(writes))), len(file.log)]:
            image.write_bytes(after_crash(before, file.log, position, chance, chance.random() < 0.5))
            assert theirs(["check", "-q", name], tmp_path).code in (0, 3)
            found = read(image)
            assert found[: len(content)] == content and not any(found[len(content) :])
        image.write_bytes(before)


def read(image: Path) -> bytes:
    with diskwright.open(image) as node:
        return node.pread(0, node.size)


@pytest.mark.parametrize("extra", [0, 4, 8, 12, 16, 24])
def test_version_3_completes_snapshots(tmp_path: Path, extra: int) -> None:
    """Old programs wrote entries without the extra data that version 3 demands: the same table as qemu-img makes of them."""
    setup("qemu-img create -q -f qcow2 -o cluster_size=4k,compat=0.10 x 1M; qemu-io -c 'write 0 100k' x; qemu-img snapshot -c one x", tmp_path)
    raw = bytearray((tmp_path / "x").read_bytes())
    table = int.from_bytes(raw[64:72], "big")
    names = table + 40 + int.from_bytes(raw[table + 36 : table + 40], "big")
    entry = raw[table : table + 36] + extra.to_bytes(4, "big") + raw[table + 40 : table + 40 + extra] + raw[names : names + 4]
    raw[table : table + 4096] = entry.ljust(4096, b"\0")
    tables = []
    for run in (theirs, ours):
        (tmp_path / "x").write_bytes(raw)
        assert run(["amend", "-o", "compat=1.1", "x"], tmp_path).code == 0
        assert theirs(["check", "-q", "x"], tmp_path).code == 0
        changed = (tmp_path / "x").read_bytes()
        table = int.from_bytes(changed[64:72], "big")
        tables.append(changed[table : table + 68])
    assert tables[0] == tables[1]
