# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""One command line of `io`, run by qemu-io and by us in the same place: what they print, but for times and help, must be the same."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from diskwright import cli
from diskwright.commands.ui import UI
from side_by_side import Outcome, twins

TIMES = (
    (re.compile(r"(ops; ).*\)$", re.MULTILINE), r"\1..."),
    (re.compile(r"^(\d+,\d+,).*$", re.MULTILINE), r"\1..."),
    (re.compile(r"vl\.\w+"), "vl.X"),
    (re.compile(r"^([a-z_?]+ .*)-- .*$", re.MULTILINE), r"\1--"),
)


def masked(text: str) -> str:
    """Without what is another at each run, and without the help, which is our own."""
    for pattern, replacement in TIMES:
        text = pattern.sub(replacement, text)
    return text


def their_io(args: Sequence[str], place: Path) -> Outcome:
    """qemu-io's outcome in the directory `place`."""
    done = subprocess.run(["qemu-io", *args], cwd=place, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    return Outcome(done.returncode, masked(done.stdout.decode()), masked(done.stderr.decode()))


def our_io(args: Sequence[str], place: Path) -> Outcome:
    """Our outcome in the directory `place`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(place)
    try:
        code = cli.run(["io", *args], UI("qemu-io", out, err))
    finally:
        os.chdir(before)
    return Outcome(code, masked(out.getvalue()), masked(err.getvalue()))


def same_io(place: Path, line: str, *commands: str, ordered: bool = True) -> Outcome:
    """Run `line` (options and image) with commands on two copies of a directory; the outcome, which both share.

    Without `ordered` the lines may come in any order: that of requests in the background is nobody's promise.
    """
    left, right = twins(place)
    args = [word for command in commands for word in ("-c", command)] + shlex.split(line)
    expected, found = their_io(args, left), our_io(args, right)
    if not ordered:
        expected, found = (Outcome(one.code, "\n".join(sorted(one.out.splitlines())), one.err) for one in (expected, found))
    assert found == expected, "%s\nqemu-io: %d\n%s%s\nours: %d\n%s%s" % (args, *expected[:1], *expected[:0:-1], *found[:1], *found[:0:-1])
    return found
