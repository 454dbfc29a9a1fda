# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What a check of a qcow2 image comes to, by us and by qemu-img, in one form."""

from __future__ import annotations

import json
import subprocess

from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.node import OpenFlags

COUNTS = (
    "check-errors image-end-offset corruptions leaks corruptions-fixed leaks-fixed total-clusters allocated-clusters fragmented-clusters compressed-clusters"
).split()

# What qemu-img says of bitmaps that it loads, and of clusters that it cannot free a second time.
_NOT_OURS = ("Some clusters may be leaked", "qcow2_free_clusters failed", "qemu-img: Lost persistent bitmaps", "qemu-img: warning: a program lacking bitmap")


def ours(path, mode):
    """(exit code, messages, counts) of our check, and of a second one if the first mended something."""
    lines = []
    flags = OpenFlags(check=True, writable=bool(mode), resize=bool(mode), no_backing=True)
    try:
        with Graph().open(str(path), format="qcow2", flags=flags) as node:
            result = node.check(mode)
            lines += result.messages
            fixed = result.leaks_fixed, result.corruptions_fixed
            if result.failure is None and any(fixed):
                result = node.check()
                lines += result.messages
                result.leaks_fixed, result.corruptions_fixed = fixed
    except Error as error:
        return 1, [*lines, "qemu-img: %s" % error], {}
    if result.failure is not None:
        return 1, [*lines, "qemu-img: Check failed: %s" % result.failure], {}
    if result.check_errors:
        lines.append("qemu-img: Check failed")
    counts = {key: getattr(result, key.replace("-", "_")) for key in COUNTS}
    code = 1 if result.check_errors else 2 if result.corruptions else 3 if result.leaks else 0
    return code, lines, {key: value for key, value in counts.items() if value or key == "check-errors"}


def theirs(path, mode, timeout=20):
    """The same of qemu-img; None if it does not come to an end."""
    command = ["qemu-img", "check", "-f", "qcow2", "--output=json", *(["-r", mode] if mode else []), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return None
    counts = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    lines = done.stderr.replace("file to fix.Leaked", "file to fix.\nLeaked").splitlines()
    lines = [line for line in lines if not line.startswith(_NOT_OURS)]
    return done.returncode, lines, {key: value for key, value in counts.items() if key in COUNTS}


def verdict(path):
    """The exit code of qemu-img check."""
    return subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], capture_output=True, check=False, timeout=20).returncode
