# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM at any write of any command: said in one line, a death by that signal, and images as whole as after kill -9."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diskwright
from side_by_side import setup, theirs

PYLIB = Path(__file__).parents[1]

# Sends itself the signal at its Nth write to a file: every run is interrupted at a place of its own, however fast the machine is.
PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
left, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
def counted(call):
    def wrapped(*args):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return call(*args)
    return wrapped
os.environ["DISKWRIGHT_ACCEL"] = "off"
for name in ("pwrite", "pwritev", "fdatasync", "ftruncate", "posix_fallocate"):
    setattr(os, name, counted(getattr(os, name)))
sys.argv[0] = "qemu-img"
from diskwright.cli import main
raise SystemExit(main())
"""

GALLERY = r"""
qemu-img create -f qcow2 -o cluster_size=4k image 4M
qemu-io -c 'write -P 3 0 1M' -c 'write -P 4 2M 100k' image
"""

LINES = [
    "check -r all damaged",
    "check -r leaks leaking",
    "create -q -f qcow2 -o preallocation=full,cluster_size=4k new 2M",
    "create -q -f raw -o preallocation=full new 20M",
    "create -q -f qcow2 -o preallocation=metadata,cluster_size=512 new 2M",
    "resize -q --preallocation=full image 6M",
    "resize -q --shrink image 1M",
    "snapshot -c one image",
    "convert -O qcow2 image new",
    "dd -O qcow2 if=image of=new bs=64k",
]


@pytest.mark.parametrize("line", LINES)
def test_interrupted(tmp_path: Path, line: str) -> None:
    setup(GALLERY, tmp_path)
    whole = (tmp_path / "image").read_bytes()
    leaks = refcounts(whole, 250, 280, 3)
    images = {"image": whole, "leaking": leaks, "damaged": refcounts(leaks, 30, 80, 0)}
    expected = read(tmp_path / "image")
    chance = random.Random(line)
    count = 1
    interrupted = 0
    while True:
        for name, stored in images.items():
            (tmp_path / name).write_bytes(stored)
        (tmp_path / "new").unlink(missing_ok=True)
        number = (signal.SIGINT, signal.SIGTERM)[interrupted % 2]
        args = [sys.executable, "-c", PROGRAM, str(PYLIB / "src"), str(count), str(int(number)), *shlex.split(line)]
        done = subprocess.run(args, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != -number:  # too late to matter
            assert done.returncode == 0, done.stderr
            break
        interrupted += 1
        assert done.stderr == "qemu-img: %s was interrupted by %s\n" % (line.split()[0], number.name)
        assert (tmp_path / "image").read_bytes() == images["image"] or theirs(["check", "-q", "image"], tmp_path).code in (0, 3)
        reached = min(len(expected), 1 << 20) if "--shrink" in line else len(expected)
        assert read(tmp_path / "image")[:reached] == expected[:reached]
        for name in ("leaking", "damaged"):
            assert theirs(["check", "-q", "-r", "all", name], tmp_path).code == 0
            assert read(tmp_path / name) == expected
        count += chance.randrange(1, max(2, count // 2 + 2))
    assert interrupted > 2


def refcounts(image: bytes, first: int, stop: int, value: int) -> bytes:
    """The image with other refcounts (16 bits wide, all in the first block) for a run of clusters."""
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    return image[: block + 2 * first] + value.to_bytes(2, "big") * (stop - first) + image[block + 2 * stop :]


def read(image: Path) -> bytes:
    with diskwright.open(str(image), format="qcow2") as node:
        return node.pread(0, node.size)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_installed_script(tmp_path: Path, number: signal.Signals) -> None:
    """The shell at the script's beginning has become Python: the signal reaches it, and the caller sees the death."""
    packages = tmp_path / "lib" / ("python%d.%d" % sys.version_info[:2]) / "site-packages"
    packages.mkdir(parents=True)
    (packages / "diskwright-0.1.0.dist-info").mkdir()
    (packages / "diskwright").symlink_to(PYLIB / "src" / "diskwright")
    (tmp_path / "bin").mkdir()
    shutil.copy(PYLIB / "bin" / "diskwright", tmp_path / "bin")
    (tmp_path / "bin" / ("python%d.%d" % sys.version_info[:2])).symlink_to(os.path.realpath(sys.executable))
    source = 'json:{"driver": "null-co", "size": 68719476736, "latency-ns": 20000000, "read-zeroes": true}'
    args = [tmp_path / "bin" / "diskwright", "convert", "-S", "0", "-O", "raw", source, tmp_path / "target"]
    environment = {**os.environ, "DISKWRIGHT_ACCEL": "auto"}  # there is none in this installation
    process = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while not (tmp_path / "target").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        message = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert (process.returncode, message) == (-number, "diskwright: convert was interrupted by %s\n" % number.name)
