# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""kill -9 in the middle of rebase, commit and amend: the image is whole, at most leaking, and reads as before or after."""

from __future__ import annotations

import os
import random
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
"""

LINES = [
    "rebase -b other -F raw top",
    "rebase -b '' top",
    "rebase -c -b '' top",
    "commit top",
    "amend -o compat=0.10 top",
    "amend -o refcount_bits=64,lazy_refcounts=on top",
    "amend -o size=3M,refcount_bits=1 top",
]


@pytest.mark.parametrize("line", LINES)
def test_killed(tmp_path: Path, line: str) -> None:
    setup(GALLERY, tmp_path)
    images = {name: (tmp_path / name).read_bytes() for name in ("base", "top")}
    content = read(tmp_path / "top")
    chance = random.Random(line)
    count = 1
    while True:
        for name, stored in images.items():
            (tmp_path / name).write_bytes(stored)
        args = [sys.executable, "-c", PROGRAM, str(SOURCE), str(count), *shlex.split(line)]
        done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        assert theirs(["check", "-q", "top"], tmp_path).code in (0, 3)
        found = read(tmp_path / "top")
        assert found[: len(content)] == content and not any(found[len(content) :])
        if not done.returncode:
            return
        count += chance.randrange(1, max(2, count // 2 + 2))


def read(image: Path) -> bytes:
    before = os.getcwd()
    os.chdir(image.parent)
    try:
        with diskwright.open(image.name) as node:
            return node.pread(0, node.size)
    finally:
        os.chdir(before)
