# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`diskwright serve` beside qemu-nbd: how long nbdcopy takes, with four connections and 64 requests under way on each of them.

Rows of run.py; the servers run before the clock starts, and only nbdcopy is timed.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

import inputs

NBDCOPY = ["nbdcopy", "--connections=4", "--requests=64"]
GOAL_ACCEL, GOAL_PURE = 1.0, 2.0


class Row(NamedTuple):
    """One line of the table: `source` is what is read, or copied into a new image of `format`; over TCP with `inet`."""

    name: str
    source: str
    format: str
    write: bool = False
    inet: bool = False


TABLE = [
    Row("serve raw, nbdcopy reads", "full.raw", "raw"),
    Row("serve raw, nbdcopy reads, TCP", "full.raw", "raw", inet=True),
    Row("serve qcow2, nbdcopy reads", "data.qcow2", "qcow2"),
    Row("serve raw, nbdcopy writes", "full.raw", "raw", True),
    Row("serve qcow2, nbdcopy writes", "full.raw", "qcow2", True),
]


@contextlib.contextmanager
def serving(words: list[str], environment: dict[str, str], pid: Path) -> Iterator[None]:
    """A server that goes to the background, until the block ends."""
    subprocess.run([*words, "--fork", "--pid-file", str(pid)], env=environment, stdout=subprocess.DEVNULL, check=True)
    number = int(pid.read_text(encoding="ascii"))
    try:
        yield
    finally:
        os.kill(number, 15)
        with contextlib.suppress(OSError):
            while True:
                os.kill(number, 0)
                time.sleep(0.01)


def run_once(row: Row, server: list[str], environment: dict[str, str], source: Path, folder: Path) -> float:
    """Seconds that nbdcopy takes."""
    image, sock = source, folder / "bench.sock"
    if row.write:
        image = folder / "target"
        subprocess.run(["qemu-img", "create", "-q", "-f", row.format, str(image), str(source.stat().st_size)], check=True)
    where = ["-b", "127.0.0.1", "-p", "10899"] if row.inet else ["-k", str(sock)]
    uri = "nbd://127.0.0.1:10899" if row.inet else "nbd+unix:///?socket=%s" % sock
    words = [*server, *where, "-f", row.format, *([] if row.write else ["-r"]), str(image)]
    try:
        with serving(words, environment, folder / "bench.pid"):
            began = time.perf_counter()
            subprocess.run([*NBDCOPY, *([str(source), uri] if row.write else [uri, "null:"])], check=True)
            return time.perf_counter() - began
    finally:
        for path in (sock, *([image] if row.write else [])):
            path.unlink(missing_ok=True)


def measure(row: Row, twins: dict[str, dict[str, str]], rounds: int, memory: Path, size_mib: int, script: Path) -> dict[str, object]:
    """One row's results, in the form of run.py's; `twins` are the environments of our programs by their names."""
    source = inputs.make(row.source, memory, size_mib)
    servers: dict[str, tuple[list[str], Optional[dict[str, str]]]] = {"qemu-img": (["qemu-nbd", "-t", "-e", "0"], None)}
    servers.update((name, ([str(script), "serve", "-t"], environment)) for name, environment in twins.items())
    times: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(rounds + 1):  # the first round warms caches and does not count
        order = list(servers)
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            words, environment = servers[name]
            seconds = run_once(row, words, {**os.environ, **(environment or {})}, source, memory)
            if number:
                times[name].append(seconds)
    ratios = {name: statistics.median(own / theirs for own, theirs in zip(times[name], times["qemu-img"])) for name in twins}
    return {
        "row": row.name,
        "ms": {name: round(statistics.median(series) * 1000, 2) for name, series in times.items()},
        "ratio": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "goal": {"accel": GOAL_ACCEL, "pure": GOAL_PURE},
        "rounds": rounds,
    }
