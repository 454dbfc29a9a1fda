# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A graph that lives, for tests: images, and a client that writes all the time."""

from __future__ import annotations

import random
import subprocess
import threading
from pathlib import Path
from typing import Any, Optional

from diskwright.jobs import nodes
from diskwright.jobs.live import Live
from diskwright.node import ALL, CONSISTENT_READ, RESIZE, WRITE
from diskwright.root import Root

SIZE = 8 << 20
CLUSTER = 64 << 10


def qemu_img(*args: object) -> str:
    return subprocess.run(["qemu-img", *map(str, args)], check=True, capture_output=True, text=True).stdout


class Writer:
    """A client that writes at random, and remembers what the disk should hold."""

    def __init__(self, live: Live, node: str, content: bytes, seed: int = 1, most: int = 40000, pause: float = 0.0005) -> None:
        self.root = Root(live.graph, node, CONSISTENT_READ | WRITE, ALL & ~RESIZE, "a client")
        self.model = bytearray(content)
        self.writes = 0
        self.failure: Optional[BaseException] = None
        self._random = random.Random(seed)
        self._most = most
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        rng = self._random
        try:
            while not self._stop.wait(self._pause):
                offset = rng.randrange(len(self.model))
                length = min(rng.randrange(1, self._most), len(self.model) - offset)
                if rng.random() < 0.8:
                    data = rng.randbytes(16) * (length // 16 + 1)
                    self.root.pwrite(offset, data[:length])
                    self.model[offset : offset + length] = data[:length]
                else:
                    self.root.pwrite_zeroes(offset, length, rng.random() < 0.5)
                    self.model[offset : offset + length] = bytes(length)
                self.writes += 1
        except BaseException as exc:
            self.failure = exc

    def wait(self, more: int = 20) -> None:
        """Until it has written so many times more."""
        until = self.writes + more
        while self.writes < until and self.failure is None:
            self._stop.wait(0.001)

    def stop(self) -> bytes:
        """What the disk should hold."""
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure
        return bytes(self.model)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.root.close()


def pattern(size: int = SIZE, seed: int = 7) -> bytes:
    """Data, with zeroes in between."""
    rng = random.Random(seed)
    return b"".join(rng.choice((bytes(CLUSTER), rng.randbytes(64) * (CLUSTER // 64))) for _cluster in range(size // CLUSTER))


def image(live: Live, directory: Path, name: str, content: bytes = b"", backing: Optional[str] = None, **options: Any) -> Path:
    """A qcow2 image of SIZE bytes, open as the node `name`."""
    path = directory / (name + ".qcow2")
    below = () if backing is None else ("-b", directory / (backing + ".qcow2"), "-F", "qcow2")
    qemu_img("create", "-q", "-f", "qcow2", *below, path, SIZE)
    nodes.add(live, {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}, "backing": backing, **options})
    if content:
        with Root(live.graph, name, CONSISTENT_READ | WRITE) as root:
            for offset in range(0, len(content), CLUSTER):
                if any(content[offset : offset + CLUSTER]):
                    root.pwrite(offset, content[offset : offset + CLUSTER])
    return path


def content(live: Live, name: str) -> bytes:
    with Root(live.graph, name) as root:
        return root.pread(0, root.size)


def check(path: Path) -> None:
    """The image is consistent, says QEMU."""
    qemu_img("check", "-q", path)


def finish(live: Live, *paths: Path) -> None:
    live.close()
    live.graph.close()
    for path in paths:
        check(path)
