# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""kill -9 in the middle of a command: the image is whole, at most leaking, and reads as before or as after, never as a mixture."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import diskwright
from side_by_side import setup, theirs

SOURCE = Path(__file__).parents[1] / "src"

# Kills itself at its Nth write to a file: every run dies at a place of its own, however fast the machine is.
PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
left = int(sys.argv.pop(1))
def deadly(call):
    def wrapped(*args):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return call(*args)
    return wrapped
os.environ["DISKWRIGHT_ACCEL"] = "off"
for name in ("pwrite", "pwritev", "fdatasync", "ftruncate"):
    setattr(os, name, deadly(getattr(os, name)))
from diskwright.cli import main
raise SystemExit(main())
"""

GALLERY = r"""
qemu-img create -f raw base 1M; qemu-io -f raw -c 'write -P 1 0 1M' base
qemu-img create -f raw other 2M; qemu-io -f raw -c 'write -P 1 0 300k' -c 'write -P 8 1M 1M' other
qemu-img create -f qcow2 -o cluster_size=4k -b base -F raw top 2M
qemu-io -c 'write -P 3 900k 300k' -c 'write -z 200k 300k' -c 'write -P 4 1500k 100k' top
qemu-img create -f qcow2 -o cluster_size=4k -b top -F qcow2 peak 2M
qemu-io -c 'write -P 6 1M 100k' -c 'write -P 7 100k 200k' peak
qemu-img create -f qcow2 -o cluster_size=512 snap 1M; qemu-io -c 'write -P 3 100k 300k' snap; qemu-img snapshot -c one snap
qemu-io -c 'write -P 4 200k 400k' snap; qemu-img snapshot -c two snap; qemu-io -c 'write -P 5 0 300k' snap
qemu-img create -f qcow2 -o cluster_size=512 marked 1M; for i in a b; do qemu-img bitmap --add -g 512 marked $i; done
qemu-io -c 'write -P 3 100k 300k' -c 'write -P 3 999k 1k' marked; qemu-img bitmap --add marked c
"""

LINES = [
    "rebase -b other -F raw top",
    "rebase -b '' top",
    "rebase -c -b '' top",
    "rebase -b base -F raw peak",
    "commit top",
    "commit -b base peak",
    "amend -o compat=0.10 top",
    "amend -o refcount_bits=64,lazy_refcounts=on top",
    "amend -o size=3M,refcount_bits=1 top",
    "snapshot -c three snap",
    "snapshot -a one snap",
    "snapshot -d one snap",
    "bitmap --add --merge a marked d",
    "bitmap --clear --disable marked a",
    "bitmap --remove marked b",
]
DISK = re.compile("top|peak|snap|marked")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("killed")
    setup(GALLERY, path)
    return path


@pytest.mark.parametrize("line", LINES)
def test_killed(gallery: Path, tmp_path: Path, line: str) -> None:
    disk = DISK.findall(line)[-1]
    images = {path.name: path.read_bytes() for path in gallery.iterdir() if path.name in ("base", "other", "top", disk)}
    before = tmp_path / "before"
    before.mkdir()
    for name, stored in images.items():
        (before / name).write_bytes(stored)
    wholes = [(read(before / disk), kept(before / disk))]
    chance = random.Random(line)
    count = 1
    while True:
        for name, stored in images.items():
            (tmp_path / name).write_bytes(stored)
        args = [sys.executable, "-c", PROGRAM, str(SOURCE), str(count), *shlex.split(line)]
        done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        assert theirs(["check", "-q", disk], tmp_path).code in (0, 3)
        found = read(tmp_path / disk), kept(tmp_path / disk)
        wholes.append(found)
        if not done.returncode:
            break
        count += chance.randrange(1, max(2, count // 2 + 2))
    first, last = wholes[0], wholes[-1]
    for content, extras in wholes[1:]:
        assert content in (first[0], last[0])
        assert extras in (first[1], last[1]) or "in-use" in str(extras)  # a bitmap that says so itself is no mixture
    if not line.startswith("snapshot -a"):  # of those only the size may change
        assert last[0][: len(first[0])] == first[0] and not any(last[0][len(first[0]) :])


def kept(image: Path) -> object:
    """What the image holds beside its present content: snapshots, and what they read as; bitmaps, and what they cover."""
    if image.name == "snap":
        found = []
        for snapshot in diskwright.info(str(image))[0].snapshots:
            with diskwright.open(image) as node:
                node.load_snapshot(id=snapshot.id)
                found.append((snapshot.id, snapshot.name, node.pread(0, node.size)))
        return found
    if image.name == "marked":
        with diskwright.open(image) as node:
            bitmaps = sorted(node.bitmaps() or (), key=lambda bitmap: bitmap.name)
            return [(bitmap.name, bitmap.enabled, list(bitmap.runs())) if not bitmap.inconsistent else "in-use" for bitmap in bitmaps]
    return None


def read(image: Path) -> bytes:
    before = os.getcwd()
    os.chdir(image.parent)
    try:
        with diskwright.open(image.name) as node:
            return node.pread(0, node.size)
    finally:
        os.chdir(before)
