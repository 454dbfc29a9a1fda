# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Formats without refcounts after a crash: every sector is old or new, and the next one who writes makes the image clean again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from recorder import Recorder, after_crash
from subjects import CHECKED, SECTOR, Image, K, M, Subject, patches, qemu_check

CRASHES = [
    Subject("vdi", "vdi", size=5 * M + SECTOR),
    Subject("vmdk", "vmdk", size=2 * M + SECTOR),
    Subject("vmdk-zero", "vmdk", {"zeroed_grain": True}, size=2 * M + SECTOR),
    Subject("vpc", "vpc", {"force_size": True}, size=5 * M + SECTOR),
    Subject("parallels", "parallels", {"cluster_size": 4 * K}, size=90 * K + SECTOR),
    Subject("parallels-1M", "parallels", size=5 * M + SECTOR),
]
POINTS = 8  # crashes tried of each log


def work(image: Image, file: Recorder, seed: str) -> list[tuple[int, bytes, bool]]:
    """Random requests; after each: how long the log is, what the guest sees, and whether all of it was flushed."""
    chance = random.Random(seed)
    node = image.open(file)
    content = bytearray(image.new)
    moments = [(0, bytes(content), True)]
    for _turn in range(40):
        offset = chance.randrange(len(content) // SECTOR) * SECTOR
        length = min(len(content) - offset, chance.choice((SECTOR, 5 * SECTOR, len(content) // 7 // SECTOR * SECTOR)))
        kind = chance.choice(("write", "write", "write", "zero", "discard", "flush"))
        if kind == "write":
            data = patches(chance, length)
            node.pwrite(offset, data)
            content[offset : offset + length] = data
        elif kind == "zero":
            node.pwrite_zeroes(offset, length, chance.random() < 0.5)
            content[offset : offset + length] = bytes(length)
        elif kind == "discard":
            node.pdiscard(offset, length)
            content[offset : offset + length] = node.pread(offset, length)
        else:
            node.flush()
        moments.append((len(file.log), bytes(content), kind == "flush"))
    node.close()
    moments.append((len(file.log), bytes(content), True))
    return moments


@pytest.mark.parametrize("subject", CRASHES, ids=[subject.name for subject in CRASHES])
@pytest.mark.parametrize("orderly", [True, False], ids=["prefix", "subset"])
def test_a_crash_leaves_old_or_new(tmp_path: Path, subject: Subject, orderly: bool) -> None:
    image = Image(subject, tmp_path)
    before = image.path.read_bytes()
    file = Recorder(image.path)
    moments = work(image, file, subject.name)
    chance = random.Random(subject.name)
    writes = [i + 1 for i, request in enumerate(file.log) if request.verb != "read"]
    for position in sorted(chance.sample(writes, min(POINTS, len(writes)))):
        image.path.write_bytes(after_crash(before, file.log, position, chance, orderly))
        done = max(i for i, moment in enumerate(moments) if moment[2] and moment[0] <= position)
        begun = min((i for i, moment in enumerate(moments) if moment[0] >= position), default=len(moments) - 1)
        states = [moment[1] for moment in moments[done : max(begun, done) + 1]]
        with image.open(writable=False, resize=False) as node:
            found = node.pread(0, node.size)
        for at in range(0, len(found), SECTOR):
            values = {state[at : at + SECTOR] for state in states}
            assert found[at : at + SECTOR] in values, "after request %d, sector %d is neither old nor new" % (position, at // SECTOR)
        expected = bytearray(found)
        with image.open(no_flush=True) as node:  # the disk has nothing to do with it
            for offset in range(0, node.size, max(node.size // 9, SECTOR)):
                node.pwrite(offset, b"on it goes"[: node.size - offset])
                expected[offset : offset + 10] = b"on it goes"[: node.size - offset]
        with image.open(writable=False, resize=False) as node:
            assert node.pread(0, node.size) == expected
        if subject.driver in CHECKED:
            assert qemu_check(image.path, subject.driver) == 0, "after request %d of %d" % (position, len(file.log))
        assert image.read_by_qemu() == expected
