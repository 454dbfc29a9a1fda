# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Eight threads at once on one image: ranges of their own inside shared clusters, and ranges that overlap."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Callable

from diskwright.node import Node

from subjects import SECTOR, Image, Subject, every_subject

THREADS = 8


def run(work: Callable[[int], None]) -> None:
    """Call work(0) .. work(THREADS - 1) at once; the first failure is raised."""
    failures: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def guarded(own: int) -> None:
        start.wait(60)
        try:
            work(own)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=guarded, args=(own,), daemon=True) for own in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "the threads wait for one another"
    if failures:
        raise failures[0]


@every_subject
def test_own_sectors_of_shared_clusters(tmp_path: Path, subject: Subject) -> None:
    """Each thread writes every eighth stretch of sectors; nothing of it gets lost in somebody's copy-on-write."""
    image = Image(subject, tmp_path)
    content = bytearray(image.new)
    with image.open() as node:
        stretch = max(SECTOR, node.cluster_size // 16)
        turns = min(160, node.size // stretch)
        order = list(range(turns))
        random.Random(subject.name).shuffle(order)

        def work(own: int) -> None:
            for turn in order:
                if turn % THREADS == own:
                    data = bytes([turn % 255 + 1]) * (stretch - 3)
                    node.pwrite(turn * stretch, data)
                    assert node.pread(turn * stretch, len(data)) == data

        run(work)
        for turn in range(turns):
            content[turn * stretch : turn * stretch + stretch - 3] = bytes([turn % 255 + 1]) * (stretch - 3)
        assert node.pread(0, node.size) == content
    image.check()
    assert image.read_by_qemu() == content


@every_subject
def test_overlapping_ranges(tmp_path: Path, subject: Subject) -> None:
    """Each sector ends up as one of the threads wrote it, or as it was; the image has no leaks."""
    image = Image(subject, tmp_path)
    allowed = [{image.new[at : at + SECTOR]} for at in range(0, len(image.new), SECTOR)]
    lock = threading.Lock()
    with image.open() as node:
        unit = max(node.cluster_size, 4096)
        area = min(len(allowed), 6 * unit // SECTOR)

        def note(first: int, count: int, values: set[bytes]) -> None:
            with lock:
                for index in range(first, first + count):
                    allowed[index] |= values

        def work(own: int) -> None:
            chance = random.Random("%s %d" % (subject.name, own))
            for turn in range(12):
                first = chance.randrange(area)
                count = min(area - first, chance.randrange(1, 3 * unit // SECTOR))
                offset, length = first * SECTOR, count * SECTOR
                kind = chance.choice(("write", "write", "write", "zero", "discard", "flush", "read"))
                if kind == "write":
                    sector = bytes([own * 16 + turn + 1]) * SECTOR
                    note(first, count, {sector})
                    node.pwrite(offset, sector * count)
                elif kind == "zero":
                    note(first, count, {bytes(SECTOR)})
                    node.pwrite_zeroes(offset, length, chance.random() < 0.5)
                elif kind == "discard":
                    below = image.below(subject.size)
                    note(first, count, {bytes(SECTOR)})
                    with lock:
                        for index in range(first, first + count):
                            allowed[index].add(below[index * SECTOR : (index + 1) * SECTOR])
                    node.pdiscard(offset, length)
                elif kind == "flush":
                    node.flush()
                else:
                    check(node, first, count, torn=True)

        def check(node: Node, first: int, count: int, torn: bool = False) -> None:
            """With `torn`, a sector that is being written may show where the write has come to: the kernel promises no more."""
            found = node.pread(first * SECTOR, count * SECTOR)
            for i in range(count):
                sector = found[i * SECTOR : (i + 1) * SECTOR]
                with lock:
                    known = list(allowed[first + i])
                fine = sector in known or torn and all(any(byte == value[at] for value in known) for at, byte in enumerate(sector))
                assert fine, "sector %d holds what nobody wrote" % (first + i)

        run(work)
        check(node, 0, len(allowed))
        content = node.pread(0, node.size)
    image.check()
    assert image.read_by_qemu() == content
