# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The ring of requests: what it writes and reads, results by tag, failures, and the clear refusal where there can be none."""

from __future__ import annotations

import ctypes
import errno
import os
import random
from pathlib import Path

import pytest

from diskwright import uring
from diskwright.errors import Unsupported
from diskwright.node import aligned_buffer

PIECE = 4096


@pytest.fixture
def ring() -> uring.Ring:
    return uring.Ring(8)


def addressed(size: int) -> tuple[memoryview, int]:
    buffer = aligned_buffer(size)
    return buffer, ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def exchange(ring: uring.Ring, operation: int, fd: int, address: int, numbers: list[int]) -> dict[int, int]:
    """Piece by piece through the ring, as many under way as it takes; the results by number."""
    results: dict[int, int] = {}
    sent = 0
    for number in numbers:
        while sent - len(results) >= ring.entries:
            results.update(ring.wait())
        ring.add(operation, fd, address + number * PIECE, PIECE, number * PIECE, number)
        sent += 1
    while len(results) < sent:
        results.update(ring.wait())
    return results


def test_what_is_written_is_read(ring: uring.Ring, tmp_path: Path) -> None:
    """A hundred pieces, many more than there are entries, in another order each time."""
    chance = random.Random(7)
    content, source = addressed(100 * PIECE)
    content[:] = chance.randbytes(len(content))
    copy, target = addressed(len(content))
    numbers = list(range(100))
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    try:
        for operation, address in ((uring.WRITE, source), (uring.READ, target)):
            chance.shuffle(numbers)
            assert exchange(ring, operation, fd, address, numbers) == dict.fromkeys(numbers, PIECE)
        assert (tmp_path / "x").read_bytes() == bytes(content) == bytes(copy)
        assert exchange(ring, uring.READ, fd, target - 100 * PIECE, [100]) == {100: 0}  # behind the end
    finally:
        os.close(fd)
        ring.close()


def test_failures_are_results(ring: uring.Ring, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    _buffer, address = addressed(PIECE)
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        ring.add(uring.WRITE, fd, address, 1, 0, 5)
        assert ring.wait() == [(5, -errno.EBADF)]
    finally:
        os.close(fd)
        ring.close()
        ring.close()


def test_a_ring_that_cannot_be() -> None:
    with pytest.raises(Unsupported, match="^Unable to use io_uring: failed to init linux io_uring ring: Invalid argument$"):
        uring.Ring(1 << 20)


def test_nothing_stays_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _number in range(20):
        uring.Ring(4).close()
    assert set(os.listdir("/proc/self/fd")) == before
