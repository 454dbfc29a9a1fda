# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""One command line, run by qemu-img and by us in the same place: exit codes, standard output and standard error must be the same."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from diskwright import cli
from diskwright.commands.ui import UI


class Outcome(NamedTuple):
    """What a run left: the exit code, and the text of both streams."""

    code: int
    out: str
    err: str


def theirs(args: list[str], place: Path) -> Outcome:
    """qemu-img's outcome in the directory `place`."""
    done = subprocess.run(["qemu-img", *args], cwd=place, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    return Outcome(done.returncode, done.stdout.decode(errors="surrogateescape"), done.stderr.decode(errors="surrogateescape"))


def ours(args: list[str], place: Path) -> Outcome:
    """Our outcome in the directory `place`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(place)
    try:
        code = cli.run(args, UI("qemu-img", out, err))
    finally:
        os.chdir(before)
    return Outcome(code, out.getvalue(), err.getvalue())


def setup(text: str, place: Path) -> None:
    """Run lines of shell, which make images with the real tools."""
    subprocess.run(["bash", "-e", "-c", text], cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60, check=True)


def same(line: str, place: Path) -> Outcome:
    """Check that both do the same to a command line that changes nothing; the outcome."""
    args = shlex.split(line)
    expected = theirs(args, place)
    found = ours(args, place)
    assert found == expected, difference(line, found, expected)
    return found


def same_space(left: Path, right: Path) -> bool:
    """Whether two files take the same space, but for the block in which ext4 keeps the list of many extents."""
    return abs(left.stat().st_blocks - right.stat().st_blocks) <= 8


def difference(line: str, found: Outcome, expected: Outcome) -> str:
    """What a person wants to see of a failure."""
    return "%s\nqemu-img: %d\n%s%s\nours: %d\n%s%s" % (line, expected.code, expected.err, expected.out, found.code, found.err, found.out)


def twins(place: Path) -> tuple[Path, Path]:
    """Two copies of a directory of images, for command lines that change something."""
    pair = place.with_name(place.name + ".theirs"), place.with_name(place.name + ".ours")
    for copy in pair:
        if copy.exists():
            shutil.rmtree(copy)
        subprocess.run(["cp", "-a", "--sparse=always", str(place), str(copy)], check=True)
    return pair
