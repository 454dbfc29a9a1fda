# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`check` against qemu-img: the texts, the exit codes, and the images after a repair."""

from __future__ import annotations

import shlex
import struct
import subprocess
from pathlib import Path

import pytest

import diskwright
from diskwright.tally import CheckResult
from diskwright.commands.check import ImageCheck, NoCheck, check, exit_code, human
from side_by_side import difference, ours, setup, theirs, twins

GALLERY = r"""
qemu-img create -f raw a.raw 1M
qemu-img create -f qcow2 plain.qcow2 1M
qemu-img create -f qcow2 used.qcow2 4M; qemu-io -c 'write 0 256k' -c 'write -c 1M 64k' -c 'write 384k 1k' -c 'write 320k 1k' used.qcow2
qemu-img create -f qcow2 -o compat=0.10 v2.qcow2 1M; qemu-io -c 'write 0 100k' v2.qcow2
qemu-img create -f qcow2 -o preallocation=metadata meta.qcow2 1M
qemu-img create -f qcow2 leak.qcow2 1M; qemu-io -c 'write 0 256k' leak.qcow2
cp leak.qcow2 shared.qcow2
qemu-img create -f qcow2 -o lazy_refcounts=on dirty.qcow2 1M
(qemu-io -c 'write 0 64k' -c abort dirty.qcow2 || true) 2>/dev/null
cp plain.qcow2 mark.qcow2; printf '\x02' | dd of=mark.qcow2 bs=1 seek=79 conv=notrunc status=none
head -c 100 plain.qcow2 > cut
head -c 140000 used.qcow2 > short.qcow2
qemu-img create -f qcow2 -b gone -F raw -u gone.qcow2 1M
qemu-img create -f qcow2 -b plain.qcow2 -F qcow2 over.qcow2
"""


def l2_table(data: bytearray) -> int:
    """Where the first L2 table is."""
    l1 = struct.unpack_from(">Q", data, 40)[0]
    entry: int = struct.unpack_from(">Q", data, l1)[0]
    return entry & 0x00FFFFFFFFFFFE00


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("check") / "gallery"
    path.mkdir()
    setup(GALLERY, path)
    data = bytearray((path / "leak.qcow2").read_bytes())
    table = l2_table(data)
    data[table + 8 : table + 16] = bytes(8)
    (path / "leak.qcow2").write_bytes(data)
    data[table + 24 : table + 32] = data[table + 16 : table + 24]  # two guest clusters in one place
    (path / "shared.qcow2").write_bytes(data)
    return twins(path)


IMAGES = (
    "a.raw plain.qcow2 used.qcow2 v2.qcow2 meta.qcow2 leak.qcow2 shared.qcow2 dirty.qcow2 mark.qcow2 cut short.qcow2 gone.qcow2 over.qcow2 "
    "nosuch null-co:// /dev/null"
).split()

OPTIONS = ["", "-q", "--output json", "-r leaks", "-r all", "-r all -q", "-r all --output json", "-q --output json", "-T none", "-U", "-f qcow2", "-f raw"]

OTHERS = [
    "-r all -U plain.qcow2",
    "-r all -f raw a.raw",
    "-r bad plain.qcow2",
    "-T bad plain.qcow2",
    "-T unsafe -r all leak.qcow2",
    "--image-opts driver=qcow2,file.filename=leak.qcow2",
    "--image-opts driver=qcow2,file.filename=leak.qcow2,lazy-refcounts=on",
    "--image-opts driver=raw,file.filename=leak.qcow2",
    "-r all --image-opts driver=qcow2,file.filename=leak.qcow2,read-only=on",
    "-f nosuch plain.qcow2",
]


@pytest.mark.parametrize("line", ["%s %s" % (option, image) for image in IMAGES for option in OPTIONS] + OTHERS)
def test_lines(pair: tuple[Path, Path], line: str) -> None:
    args = ["check", *shlex.split(line)]
    source = pair[0].with_name("gallery")
    name = line.split()[-1]
    expected = theirs(args, pair[0])
    found = ours(args, pair[1])
    try:
        assert found == expected, difference(line, found, expected)
        if "-r" in args and name.endswith(".qcow2"):
            left, right = (theirs(["check", "--output=json", name], place) for place in pair)
            assert left == right
            if left.code != 1:
                assert theirs(["compare", str(pair[0] / name), str(pair[1] / name)], pair[0]).code == 0
        elif (source / name).exists():
            assert (pair[1] / name).read_bytes() == (source / name).read_bytes()
    finally:
        if "-r" in args:
            for copy in pair:
                subprocess.run("cp -a --sparse=always %s/* %s" % (source, copy), shell=True, check=True)


def made(**counts: int) -> ImageCheck:
    result = CheckResult()
    for name, value in counts.items():
        setattr(result, name, value)
    return ImageCheck("x", "qcow2", [result])


def test_exit_codes() -> None:
    """By the worst that remains."""
    assert exit_code(made()) == 0
    assert exit_code(made(leaks=1)) == 3
    assert exit_code(made(leaks=1, corruptions=1)) == 2
    assert exit_code(made(leaks=1, corruptions=1, check_errors=1)) == 1


def test_internal_errors_are_told() -> None:
    """qemu-img has words for them that no small image brings about."""
    assert human(made(check_errors=2)) == "\n2 internal errors have occurred during the check.\n"


def test_result(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The typed result, before, during and after a repair."""
    image = str(tmp_path / "leak.qcow2")
    (tmp_path / "leak.qcow2").write_bytes((pair[0].with_name("gallery") / "leak.qcow2").read_bytes())
    before = check(image)
    assert (before.clean, before.result.leaks, before.leaks_fixed) == (False, 1, 0)
    during = check(image, repair="leaks")
    assert (during.clean, during.result.leaks, during.leaks_fixed, during.corruptions_fixed) == (True, 0, 1, 0)
    assert during.as_dict()["leaks-fixed"] == 1 and "leaks" not in during.as_dict()
    after = check(image)
    assert after.clean and not after.messages
    with pytest.raises(NoCheck):
        check(image, format="raw")
    with pytest.raises(diskwright.OptionError):
        check(image, repair="some")
