# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What node.py promises for every driver: bounds, chains, copy-on-write, alignment, serialised writes, clean failure."""

from __future__ import annotations

import errno
import random
import threading
from typing import Any

import pytest

from diskwright.errors import Error, ReadOnly, Unsupported
from diskwright.extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from diskwright.node import ALL, CHUNK, RESIZE, WRITE, OpenFlags, cache_flags
from toy import Broken, Memory, Units

UNIT = 64


def model_run(node: Any, model: bytearray, seed: int, steps: int = 300) -> None:
    """Random reads, writes, zeroes; after each the bytes agree with the model."""
    rng = random.Random(seed)
    size = len(model)
    for _number in range(steps):
        offset = rng.randrange(size)
        length = min(rng.choice([1, 3, UNIT, 2 * UNIT, rng.randrange(1, 500)]), size - offset)
        verb = rng.randrange(4)
        if verb == 0:
            data = rng.randbytes(length)
            node.pwrite(offset, data)
            model[offset : offset + length] = data
        elif verb == 1:
            node.pwrite_zeroes(offset, length, unmap=rng.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        else:
            assert node.pread(offset, length) == model[offset : offset + length]
    assert node.pread(0, size) == model


@pytest.mark.parametrize("align", [1, 16, 512])
@pytest.mark.parametrize("backing_size", [0, 700, 1000, 3000])
def test_random_operations_over_a_chain(backing_size: int, align: int) -> None:
    base = random.Random(9).randbytes(backing_size)
    backing = Memory(base) if backing_size else None
    node = Units(Memory(align=align), 1000, UNIT, backing)
    model = bytearray((base + bytes(1000))[:1000])
    assert node.pread(0, 1000) == model
    model_run(node, model, seed=backing_size + align)
    assert backing is None or backing.data == base


def test_status_is_exact_merged_and_truthful() -> None:
    node = Units(Memory(), 1000, UNIT, Memory(b"b" * 500))
    node.table = {0: 640, 1: 704, 3: -1, 4: -1, 15: 0}
    held = DATA | OFFSET_VALID | ALLOCATED
    assert node.block_status(10, 985) == [
        Extent(10, 118, held, node.file, 650),
        Extent(128, 64, 0),
        Extent(192, 128, ZERO | ALLOCATED),
        Extent(320, 640, 0),
        Extent(960, 35, held, node.file, 0),
    ]
    backing = node.backing
    assert node.resolve(100, 500) == [
        Extent(100, 28, DATA, node.file, 740),
        Extent(128, 64, DATA, backing, 128),
        Extent(192, 128, ZERO),
        Extent(320, 180, DATA, backing, 320),
        Extent(500, 100, ZERO),
    ]
    assert node.block_status(5, 0) == [] and node.resolve(5, 0) == []


@pytest.mark.parametrize(
    "extents",
    [[], [(0, 100, 0)], [(0, 50, 0), (60, 900, 0)], [(10, 200, 0)], [(0, 90, 0), (95, 10, 0)]],
    ids=["empty", "short", "gap", "late", "gap at the end"],
)
def test_a_wrong_map_fails_at_its_first_call_with_the_drivers_name(extents: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="driver units: _map"):
        Broken(extents).block_status(0, 110)


def test_bounds_and_permissions() -> None:
    node = Units(Memory(), 1000, UNIT)
    for offset, length in ((-1, 4), (998, 3), (1000, 1), (1 << 62, 1 << 62)):
        with pytest.raises(Error) as caught:
            node._check_range(offset, length)
        assert caught.value.errno == errno.EIO and caught.value.offset == offset
    with pytest.raises(Error):
        node.pread(990, 11)
    with pytest.raises(Error):
        node.pwrite(999, b"xy")
    with pytest.raises(Error):
        node.truncate(1 << 63)
    node.flags = OpenFlags()
    for call in (lambda: node.pwrite(0, b"x"), lambda: node.pwrite_zeroes(0, 1), lambda: node.pdiscard(0, 1), lambda: node.truncate(5)):
        with pytest.raises(ReadOnly):
            call()
    with pytest.raises(Unsupported):
        node.check()
    assert node.file.log == []  # type: ignore[attr-defined]


def test_whole_units_are_written_without_reading_and_parts_with_one_write() -> None:
    file = Memory()
    node = Units(file, 100 * UNIT, UNIT, Memory(b"b" * 6400))
    node.pwrite(2 * UNIT, b"x" * (3 * UNIT))
    assert [verb for verb, _offset, _length in file.log] == ["write"] * 3
    del file.log[:]
    node.pwrite(10 * UNIT + 5, b"y")
    assert [(verb, length) for verb, _offset, length in file.log] == [("write", UNIT)]
    assert node.pread(10 * UNIT, UNIT) == b"bbbbby" + b"b" * 58
    del file.log[:]
    node.pwrite(10 * UNIT + 6, b"z")  # in place now: neither read nor copied
    assert [(verb, length) for verb, _offset, length in file.log] == [("write", 1)]


def test_copy_on_write_around_units_larger_than_a_chunk() -> None:
    unit = 2 * CHUNK + 4096
    base = random.Random(1).randbytes(2 * unit)
    node = Units(Memory(), 2 * unit, unit, Memory(base))
    node.pwrite(unit - 10, b"0123456789abcdefghij")
    assert node.pread(0, 2 * unit) == base[: unit - 10] + b"0123456789abcdefghij" + base[unit + 10 :]


def test_a_failed_write_is_given_back_and_changes_nothing() -> None:
    file = Memory()
    node = Units(file, 1000, UNIT, Memory(b"b" * 1000))

    def fail(_offset: int, _view: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file._pwrite = fail  # type: ignore[method-assign]
    with pytest.raises(OSError):
        node.pwrite(0, b"x" * 130)
    assert node.aborted == 3 and not node.table and not node.reserved and not node._inflight
    assert node.pread(0, 130) == b"b" * 130


def test_writes_to_one_unit_from_many_threads_all_survive() -> None:
    node = Units(Memory(), 16 * UNIT, UNIT, Memory(b"b" * 16 * UNIT))
    failures = []

    def work(lane: int) -> None:
        try:
            for number in range(16):
                for step in range(8):
                    offset = number * UNIT + lane + 8 * step
                    node.pwrite(offset, bytes([lane + 1]))
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert node.pread(0, 16 * UNIT) == bytes(range(1, 9)) * (16 * UNIT // 8)
    assert node.linked == 16 and not node._inflight


def test_unaligned_requests_to_an_aligned_host() -> None:
    model = bytearray(5000)
    file = Memory(bytes(5000), align=512)
    file.data = bytearray(5120)
    rng = random.Random(3)
    for _number in range(200):
        offset = rng.randrange(5000)
        data = rng.randbytes(rng.randrange(1, 5001 - offset))
        file.pwrite(offset, data)
        model[offset : offset + len(data)] = data
        start = rng.randrange(5000)
        assert file.pread(start, 5000 - start) == model[start:]


def test_closing_flushes_bottom_last_and_abandoning_writes_nothing() -> None:
    file = Memory()
    node = Units(file, 1000, UNIT)
    node.pwrite(0, b"x")
    node.close()
    node.close()
    assert file.log[-1][0] == "flush" and file._closed
    file = Memory()
    node = Units(file, 1000, UNIT)
    with pytest.raises(KeyError), node:
        raise KeyError
    assert file._closed and file.log == []


def test_writethrough_flushes_each_write() -> None:
    file = Memory()
    node = Units(file, 1000, UNIT)
    node.flags = OpenFlags(writable=True, writethrough=True)
    node.pwrite(0, b"x" * UNIT)
    node.pwrite_zeroes(0, 10)
    assert [verb for verb, _offset, _length in file.log if verb == "flush"] == ["flush"] * 2


def test_open_flags() -> None:
    assert OpenFlags().permissions() == (1, ALL)
    assert OpenFlags(writable=True, resize=True).permissions() == (1 | WRITE | RESIZE, ALL)
    assert OpenFlags(no_io=True).permissions() == (0, ALL)
    changed = OpenFlags(direct=True).but(writable=True)
    assert changed.direct and changed.writable and changed.perm is None
    with pytest.raises(TypeError, match="colour"):
        OpenFlags(colour=True)
    assert cache_flags("directsync") == {"direct": True, "writethrough": True}
    assert cache_flags("fast") is None
