# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Both twins of every kernel: the same result as a naive model, or the same exception, on seeded and edge inputs; and the switch between them."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

import diskwright
from diskwright.kernels import contract, pure
from diskwright.kernels.contract import COMPRESSED, COPIED, INVALID, NORMAL, UNALLOCATED, ZERO_ALLOC, ZERO_PLAIN

DEMAND = os.environ.get("DISKWRIGHT_ACCEL", "auto")
TWINS = [pure]
if DEMAND != "off":
    try:
        import diskwright_accel
    except ImportError:
        if DEMAND == "require":
            raise
    else:
        TWINS.append(diskwright_accel)

HUGE = 2**70
EVERYTHING = 1 << 40


def outcome(function, args):
    try:
        return function(*args), None
    except TypeError:
        return None, (TypeError, "")  # the words are the interpreter's
    except Exception as error:
        return None, (type(error), str(error))


def same(name, *args):
    """What every twin answers, an exception being (type, text)."""
    answers = [outcome(getattr(twin, name), args) for twin in TWINS]
    for answer in answers[1:]:
        assert answer == answers[0]
        assert type(answer[0]) is type(answers[0][0])
    result, error = answers[0]
    return result if error is None else error


def patchy(rng, size):
    """Stretches of zeroes, random bytes and single bytes in zeroes."""
    data = bytearray()
    while len(data) < size:
        length = rng.choice([1, 7, 511, 512, 513, 4096, 5000, 70000])
        kind = rng.randrange(4)
        if kind == 0:
            data += rng.randbytes(length)
        else:
            data += bytes(length)
            if kind == 1:
                data[-rng.randrange(1, length + 1)] = rng.randrange(1, 256)
    return bytes(data[:size])


def joined(pairs):
    """Adjacent (start, count) runs as one."""
    runs = []
    for start, count in pairs:
        if runs and runs[-1][0] + runs[-1][1] == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((start, count))
    return runs


def test_twins_have_all_kernels():
    assert sorted(pure.__all__) == sorted(contract.KERNELS)
    for twin in TWINS:
        assert [name for name in contract.KERNELS if not callable(getattr(twin, name, None))] == []
    for twin in TWINS[1:]:
        assert twin.ABI == contract.ABI
        assert [name for name in contract.CODECS if not callable(getattr(twin, name, None))] == []
    for name in contract.KERNELS:
        assert "\n%s(" % name in contract.__doc__


# --- gather and scatter


@pytest.fixture
def files(tmp_path):
    rng = random.Random(1)
    contents = [rng.randbytes(size) for size in (0, 1, 4096, 100_001)]
    fds = []
    for number, content in enumerate(contents):
        path = tmp_path / str(number)
        path.write_bytes(content)
        fds.append(os.open(path, os.O_RDWR))
    yield list(zip(fds, contents))
    for fd in fds:
        os.close(fd)


def test_gather(files):
    rng = random.Random(2)
    for attempt in range(40):
        size = rng.choice([0, 1, 5000, 200_000])
        reads, expected = [], bytearray(b"\xaa" * size)
        for transfer in range(rng.randrange(8)):
            fd, content = rng.choice(files)
            at = rng.randint(0, size)
            length = rng.randint(0, size - at)
            offset = rng.choice([0, rng.randrange(len(content) + 10), 2**62])
            reads.append((fd, offset, at, length))
            expected[at : at + length] = content[offset : offset + length].ljust(length, b"\0")
        for twin in TWINS:
            buffer = bytearray(b"\xaa" * size)
            assert twin.gather(reads, buffer) is None
            assert buffer == expected


def test_scatter(files):
    rng = random.Random(3)
    for attempt in range(40):
        size = rng.choice([0, 1, 5000, 200_000])
        data = rng.randbytes(size)
        writes, model = [], {fd: bytearray(content) for fd, content in files}
        for transfer in range(rng.randrange(8)):
            fd = rng.choice(files)[0]
            at = rng.randint(0, size)
            length = rng.randint(0, size - at)
            offset = rng.randrange(300_000)
            writes.append((fd, offset, at, length))
            if length:
                model[fd].extend(bytes(max(0, offset + length - len(model[fd]))))
                model[fd][offset : offset + length] = data[at : at + length]
        for twin in TWINS:
            for fd, content in files:
                os.ftruncate(fd, 0)
                os.pwrite(fd, content, 0)
            assert twin.scatter(writes, data) is None
            for fd, expected in model.items():
                assert os.pread(fd, 1 << 20, 0) == expected


def test_transfer_errors(files, tmp_path):
    fd = files[3][0]
    buffer = bytearray(100)
    bad_fd = os.dup(fd)
    os.close(bad_fd)
    read_end, write_end = os.pipe()
    full = os.open("/dev/full", os.O_RDWR)
    read_only = os.open(tmp_path / "3", os.O_RDONLY)
    for name in ("gather", "scatter"):
        for transfer in [(bad_fd, 0, 0, 1), (read_end, 0, 0, 1), (write_end, 0, 0, 1)]:
            kind, text = same(name, [transfer], buffer)
            assert issubclass(kind, OSError) and text.startswith("[Errno ")
        for transfer in [(fd, -1, 0, 1), (fd, 0, 0, -1), (fd, HUGE, 0, 1), (fd, 2**63 - 1, 0, 1), (fd, 0, 0, -HUGE)]:
            assert same(name, [(fd, 0, 0, 1), transfer], buffer) == (ValueError, "file range is out of range")
        for transfer in [(fd, 0, -1, 1), (fd, 0, 100, 1), (fd, 0, 0, 101), (fd, 0, HUGE, 0), (fd, 0, 1, 100), (fd, 0, 0, 2**62)]:
            assert same(name, [transfer], buffer) == (ValueError, "range is outside the buffer")
        for number in (-1, -HUGE, HUGE, 2**31):
            assert same(name, [(number, 0, 0, 1)], buffer) == (ValueError, "file descriptor is out of range")
        assert same(name, [], buffer) is None
    for twin in TWINS:
        with pytest.raises(OSError) as caught:
            twin.scatter([(full, 0, 0, 1)], buffer)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError) as caught:
            twin.scatter([(read_only, 0, 0, 1)], buffer)
        assert caught.value.errno == errno.EBADF
    assert same("gather", [], b"read-only") == (ValueError, "buffer is read-only")
    for number in (read_end, write_end, full, read_only):
        os.close(number)


def test_nothing_is_moved_if_any_transfer_is_invalid(files):
    fd, content = files[2]
    for twin in TWINS:
        buffer = bytearray(10)
        with pytest.raises(ValueError):
            twin.gather([(fd, 0, 0, 10), (fd, 0, 0, 11)], buffer)
        assert buffer == bytes(10)
        with pytest.raises(ValueError):
            twin.scatter([(fd, 0, 0, 10), (fd, 0, 0, 11)], buffer)
        assert os.pread(fd, 5000, 0) == content


# --- plain bytes


def units(offset, end, unit):
    return [(at, min(unit, end - at)) for at in range(offset, end, unit)]


def test_nonzero_runs():
    rng = random.Random(4)
    for attempt in range(150):
        data = patchy(rng, rng.choice([0, 1, 100, 4096, 70000, 300_000]))
        offset = rng.randint(0, len(data))
        length = rng.randint(0, len(data) - offset)
        unit = rng.choice([1, 3, 512, 4096, 65536, 100_000, 1 << 21, HUGE]) if length < 5000 else rng.choice([64, 512, 4096, 65536, 1 << 21])
        expected = joined(run for run in units(offset, offset + length, unit) if any(data[run[0] : run[0] + run[1]]))
        assert same("nonzero_runs", data, offset, length, unit) == expected
    large = bytearray(5 << 20)
    assert same("nonzero_runs", large, 0, len(large), 4096) == []
    large[-1] = 1
    assert same("nonzero_runs", large, 0, len(large), 4096) == [(len(large) - 4096, 4096)]
    assert same("nonzero_runs", large, 1, len(large) - 1, 4 << 20) == [(1 + (4 << 20), (1 << 20) - 1)]


def test_nonzero_runs_arguments():
    for args in [(-1, 1, 1), (0, -1, 1), (0, 11, 1), (5, 6, 1), (HUGE, 0, 1), (0, HUGE, 1), (-HUGE, 0, 1)]:
        assert same("nonzero_runs", bytes(10), *args) == (ValueError, "range is outside the buffer")
    for unit in (0, -1, -HUGE):
        assert same("nonzero_runs", bytes(10), 0, 10, unit) == (ValueError, "unit is not positive")


def test_differences():
    rng = random.Random(5)
    for attempt in range(150):
        a = patchy(rng, rng.choice([0, 1, 100, 4096, 65537, 300_000]))
        b = bytearray(a)
        for change in range(rng.choice([0, 1, 1, 30]) if b else 0):
            at = rng.randrange(len(b))
            length = rng.choice([1, 1, 3000])
            b[at : at + length] = rng.randbytes(length)[: len(b) - at]
        unit = rng.choice([64, 512, 4096, 65536, 1 << 21, HUGE])
        first = next((at for at in range(len(a)) if a[at] != b[at]), -1)
        runs = joined(run for run in units(0, len(a), unit) if a[run[0] : run[0] + run[1]] != b[run[0] : run[0] + run[1]])
        for left, right in [(a, b), (b, a), (memoryview(a), memoryview(b)), (memoryview(b), a)]:
            assert same("first_difference", left, right) == first
            assert same("difference_runs", left, right, unit) == runs


def test_difference_arguments():
    assert same("first_difference", b"ab", b"abc") == (ValueError, "buffers differ in length")
    assert same("difference_runs", b"ab", b"abc", 1) == (ValueError, "buffers differ in length")
    for unit in (0, -1, -HUGE):
        assert same("difference_runs", b"", b"", unit) == (ValueError, "unit is not positive")


def test_bit_runs():
    rng = random.Random(6)
    for attempt in range(120):
        size = rng.choice([0, 1, 8, 9, 600, 9000])
        bitmap = b"".join(rng.choice([bytes(n), b"\xff" * n, rng.randbytes(n)]) for n in [rng.randrange(1, 5000) for piece in range(9)])[:size]
        total = len(bitmap) * 8
        start = rng.randint(0, total)
        count = rng.choice([total - start, rng.randint(0, total - start)])
        bits = int.from_bytes(bitmap, "little")
        text = bin(bits | 1 << total)[3:][::-1]
        expected = joined((at, 1) for at in range(start, start + count) if text[at] == "1")
        assert same("bit_runs", bitmap, start, count, EVERYTHING) == expected
        limit = rng.randint(0, len(expected) + 1)
        assert same("bit_runs", bitmap, start, count, limit) == expected[:limit]
    for args in [(-1, 1, 1), (0, 81, 1), (80, 1, 1), (0, HUGE, 1)]:
        assert same("bit_runs", bytes(10), *args) == (ValueError, "range is outside the buffer")
    assert same("bit_runs", bytes(10), 0, 80, -1) == (ValueError, "limit is negative")


def test_crc32c():
    assert same("crc32c", b"123456789") == 0xE3069283
    assert same("crc32c", bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    assert same("crc32c", b"\xff" * 32) == 0x62A8AB43
    assert same("crc32c", bytes(range(32))) == 0x46DD794E
    rng = random.Random(7)
    for attempt in range(50):
        data = rng.randbytes(rng.randrange(200))
        split = rng.randint(0, len(data))
        assert same("crc32c", data[split:], same("crc32c", data[:split])) == same("crc32c", data)
    for crc in (-1, 1 << 32, HUGE):
        assert same("crc32c", b"", crc) == (ValueError, "crc is out of range")


# --- tables


def table_model(values, start, count, step):
    runs, at, end = [], start, start + count
    while at < end:
        stop, used = at + 1, 0
        if stop < end and values[stop] != values[at] and values[stop] == values[at] + step:
            used = step
        while stop < end and values[stop] == values[stop - 1] + used:
            stop += 1
        runs.append((at, stop - at, values[at], used))
        at = stop
    return runs


def random_entries(rng, width, step, pieces):
    values = []
    most = (1 << 8 * width) - 1
    for piece in range(pieces):
        length = rng.choice([1, 1, 2, 3, 23, 24, 25, 100, 3000, 20_000])
        value = rng.choice([0, most, rng.randint(0, most), most - 5 * step])
        pitch = rng.choice([0, step, step, step + 1])
        values += [min(most, max(0, value) + at * pitch) for at in range(length)]
        if length > 30 and rng.random() < 0.3:  # a flaw that a look at a few entries does not find
            values[-rng.randrange(1, length)] ^= rng.choice([1, 1 << 31])
    return values


@pytest.mark.parametrize("width", [4, 8])
def test_table_runs(width):
    rng = random.Random(width)
    for attempt in range(60):
        step = rng.choice([0, 1, 1, 512, 65536, 1 << 31, 2**63 - 2])
        values = random_entries(rng, width, step, rng.randrange(8))
        start = rng.choice([0, rng.randint(0, len(values))])
        count = rng.choice([len(values) - start, rng.randint(0, len(values) - start)])
        expected = table_model(values, start, count, step)
        limit = rng.choice([EVERYTHING, EVERYTHING, rng.randint(0, len(expected) + 1)])
        for order in ("little", "big"):
            table = b"".join(value.to_bytes(width, order) for value in values) + b"123"
            assert same("table_runs", table, width, order == "big", start, count, step, limit) == expected[:limit]


def test_table_runs_arguments():
    for width in (0, 1, 2, 16, -4, HUGE):
        assert same("table_runs", bytes(32), width, True, 0, 1, 1, 1) == (ValueError, "width is neither 4 nor 8")
    for start, count in [(-1, 1), (0, -1), (0, 5), (4, 1), (HUGE, 0), (0, HUGE)]:
        assert same("table_runs", bytes(39), 8, True, start, count, 1, 1) == (ValueError, "range is outside the buffer")
    for step in (-1, 2**63 - 1, HUGE):
        assert same("table_runs", bytes(32), 8, True, 0, 4, step, 1) == (ValueError, "step is out of range")
    assert same("table_runs", bytes(32), 8, True, 0, 4, 1, -1) == (ValueError, "limit is negative")
    assert same("table_runs", bytes(32), 8, True, 0, 4, 1, HUGE) == [(0, 4, 0, 0)]


MASK = 0x00FFFFFFFFFFFE00
COPIED_BIT = 1 << 63


def join_l2(singles, pitch):
    runs = []
    for index, count, kind, value in singles:
        if runs and kind != COMPRESSED and runs[-1][2] == kind:
            last = runs[-1]
            if value == (last[3] + last[1] * pitch if kind & 2 else 0):
                runs[-1] = (last[0], last[1] + count, kind, last[3])
                continue
        runs.append((index, count, kind, value))
    return runs


def l2_model(entries, start, count, cluster_size, data_file):
    singles = []
    for index in range(start, start + count):
        entry = entries[index]
        offset, copied = entry & MASK, COPIED if entry & COPIED_BIT else 0
        if entry & 1 << 62:
            single = (COMPRESSED, entry & (2**62 - 1))
        elif entry & 1:
            single = (ZERO_ALLOC + copied, offset) if offset else (ZERO_PLAIN, 0)
        elif offset or (data_file and copied):
            single = (NORMAL + copied, offset)
        else:
            single = (UNALLOCATED, 0)
        singles.append((index, 1) + single)
    return join_l2(singles, cluster_size)


def random_l2(rng, cluster_size, pieces):
    entries = []
    for piece in range(pieces):
        length = rng.choice([1, 1, 1, 2, 5, 23, 24, 25, 26, 100, 3000, 20_000])
        flags = rng.choice([0, 1, COPIED_BIT, COPIED_BIT, COPIED_BIT | 1, 1 << 62, 1 << 56, 1 << 2])
        value = rng.choice([0, 0, rng.randrange(1 << 20) * cluster_size, rng.randrange(1 << 40) * 512, MASK & -cluster_size, MASK - 3 * cluster_size])
        pitch = rng.choice([cluster_size, cluster_size, cluster_size, 0, 2 * cluster_size])
        if not value and rng.random() < 0.7:
            pitch = 0
        part = [(value + at * pitch & 2**64 - 1) | flags for at in range(length)]
        if length > 2 and rng.random() < 0.4:
            part[rng.randrange(length)] ^= rng.choice([1, 4, COPIED_BIT, 1 << 62, 1 << 57, cluster_size])
        entries += part
    return entries


def test_l2_runs():
    rng = random.Random(8)
    for attempt in range(150):
        cluster_size = rng.choice([512, 65536, 2 << 20])
        entries = random_l2(rng, cluster_size, rng.randrange(12))
        table = b"".join(entry.to_bytes(8, "big") for entry in entries) + b"1234567"
        start = rng.choice([0, rng.randint(0, len(entries))])
        count = rng.choice([len(entries) - start, rng.randint(0, len(entries) - start)])
        data_file = rng.random() < 0.3
        expected = l2_model(entries, start, count, cluster_size, data_file)
        assert same("l2_runs", table, start, count, cluster_size, data_file, EVERYTHING) == expected
        limit = rng.randint(0, len(expected) + 1)
        assert same("l2_runs", table, start, count, cluster_size, data_file, limit) == expected[:limit]


def test_l2_runs_of_every_small_difference():
    """All pairs of entries that differ in flags, reserved bits or by a cluster."""
    size = 65536
    values = [base | flags for base in (0, size, 2 * size, MASK & -size) for flags in (0, 1, 2, 512, 1 << 56, 1 << 62, 1 << 63, 1 << 63 | 1)]
    for data_file in (False, True):
        for first in values:
            for second in values:
                table = first.to_bytes(8, "big") + second.to_bytes(8, "big")
                assert same("l2_runs", table, 0, 2, size, data_file, 9) == l2_model([first, second], 0, 2, size, data_file)


def extended_model(words, start, count, cluster_size, data_file):
    pitch = cluster_size // 32
    singles = []
    for at in range(start, start + count):
        entry, bitmap = words[at]
        offset, copied = entry & MASK, COPIED if entry & COPIED_BIT else 0
        hosted = bool(offset or (data_file and copied))
        if entry & 1 << 62:
            singles.append((at * 32, 32, COMPRESSED, entry & (2**62 - 1)))
            continue
        data, zero = bitmap & 0xFFFFFFFF, bitmap >> 32
        for sub in range(32):
            if data & zero or (data and not hosted):
                single = (INVALID, 0)
            elif data >> sub & 1:
                single = (NORMAL + copied, offset + sub * pitch)
            elif zero >> sub & 1:
                single = (ZERO_ALLOC + copied, offset + sub * pitch) if hosted else (ZERO_PLAIN, 0)
            else:
                single = (UNALLOCATED, 0)
            singles.append((at * 32 + sub, 1) + single)
    return join_l2(singles, pitch)


def test_l2_runs_extended():
    rng = random.Random(9)
    full = 0xFFFFFFFF
    for attempt in range(150):
        cluster_size = rng.choice([16384, 65536, 2 << 20])
        entries = []
        for entry in random_l2(rng, cluster_size, rng.randrange(6))[:2000]:
            bitmap = rng.choice([0, full, full, full, full << 32, rng.getrandbits(32), rng.getrandbits(32) << 32, rng.getrandbits(64)])
            if rng.random() < 0.3:
                data = rng.getrandbits(32)
                bitmap = data | (rng.getrandbits(32) & ~data) << 32
            if entries and rng.random() < 0.7:
                bitmap = entries[-1][1]
            entries.append((entry, bitmap))
        table = b"".join(entry.to_bytes(8, "big") + bitmap.to_bytes(8, "big") for entry, bitmap in entries) + bytes(15)
        start = rng.choice([0, rng.randint(0, len(entries))])
        count = rng.choice([len(entries) - start, rng.randint(0, len(entries) - start)])
        data_file = rng.random() < 0.3
        expected = extended_model(entries, start, count, cluster_size, data_file)
        assert same("l2_runs_extended", table, start, count, cluster_size, data_file, EVERYTHING) == expected
        limit = rng.randint(0, len(expected) + 1)
        assert same("l2_runs_extended", table, start, count, cluster_size, data_file, limit) == expected[:limit]


@pytest.mark.parametrize("name", ["l2_runs", "l2_runs_extended"])
def test_l2_arguments(name):
    for cluster_size in (0, -512, 256, 513, 4 << 20, HUGE):
        assert same(name, bytes(32), 0, 1, cluster_size, False, 1) == (ValueError, "cluster size is out of range")
    for start, count in [(-1, 1), (0, -1), (0, 5), (4, 1), (HUGE, 0), (0, HUGE)]:
        assert same(name, bytes(39), start, count, 65536, False, 1) == (ValueError, "range is outside the buffer")
    assert same(name, bytes(32), 0, 1, 65536, False, -1) == (ValueError, "limit is negative")


# --- refcounts


def stored_refcounts(values, order):
    if order >= 3:
        return b"".join(value.to_bytes(1 << order - 3, "big") for value in values)
    return sum(value << (at << order) for at, value in enumerate(values)).to_bytes((len(values) << order) // 8, "little")


def random_refcounts(rng, order, count):
    most = (1 << (1 << order)) - 1
    values = []
    while len(values) < count:
        value = rng.choice([0, 0, 1, 1, most, rng.randint(0, most)])
        values += [value] * rng.choice([1, 1, 2, 100, 10_000])
    return values[:count]


@pytest.mark.parametrize("order", range(7))
def test_refcounts(order):
    rng = random.Random(order)
    for attempt in range(25):
        values = random_refcounts(rng, order, rng.choice([0, 8, 64, 4096, 40_000]))
        block = stored_refcounts(values, order)
        for given in (values, array("Q", values), tuple(values), memoryview(array("Q", values))):
            assert same("refcounts_pack", given, order) == block
        start = rng.choice([0, rng.randint(0, len(values))])
        count = rng.choice([len(values) - start, rng.randint(0, len(values) - start)])
        assert same("refcounts_unpack", block, order, start, count) == array("Q", values[start : start + count])
        free = joined((index, 1) for index in range(start, start + count) if not values[index])
        assert same("refcount_free_runs", block, order, start, count, EVERYTHING) == free
        limit = rng.randint(0, len(free) + 1)
        assert same("refcount_free_runs", block, order, start, count, limit) == free[:limit]


def test_refcount_arguments():
    for order in (-1, 7, HUGE, -HUGE):
        error = (ValueError, "refcount order is out of range")
        assert same("refcounts_unpack", bytes(8), order, 0, 1) == error
        assert same("refcounts_pack", [], order) == error
        assert same("refcount_free_runs", bytes(8), order, 0, 1, 1) == error
        assert same("refcount_mismatches", bytes(8), order, array("H", [0]), 0, 1, 1) == error
    for start, count in [(-1, 1), (0, 5), (4, 1), (0, HUGE)]:
        error = (ValueError, "range is outside the buffer")
        assert same("refcounts_unpack", bytes(9), 4, start, count) == error
        assert same("refcount_free_runs", bytes(9), 4, start, count, 1) == error
        assert same("refcount_mismatches", bytes(9), 4, array("H", [0] * 9), 0, 5, 1) == error
        assert same("refcount_mismatches", bytes(9), 4, array("H", [0] * 4), start, count, 1) == error
    assert same("refcount_free_runs", bytes(8), 4, 0, 4, -1) == (ValueError, "limit is negative")
    assert same("refcount_mismatches", bytes(8), 4, array("H", [0] * 4), 0, 4, -1) == (ValueError, "limit is negative")
    for order in range(7):
        for value in (1 << (1 << order), -1, HUGE):
            assert same("refcounts_pack", [0, 0, 0, 0, 0, 0, 0, value], order) == (OverflowError, "refcount does not fit")
    for order in range(3):
        assert same("refcounts_pack", [1], order) == (ValueError, "refcounts do not fill whole bytes")
    assert same("refcounts_pack", b"\0\1\2\3", 4) == b"\0\0\0\1\0\2\0\3"
    assert same("refcounts_pack", bytearray(8), 0) == b"\0"
    assert same("refcounts_pack", array("H", [258, 1]), 4) == b"\1\2\0\1"
    assert same("refcounts_pack", ["1"], 4)[0] is TypeError
    assert same("refcounts_pack", [1.0], 4)[0] is TypeError


@pytest.mark.parametrize("code", "HIQ")
def test_tally(code):
    rng = random.Random(ord(code))
    most = (1 << 8 * array(code).itemsize) - 1
    for attempt in range(60):
        total = rng.choice([0, 1, 100, 5000, 10_000])
        before = []
        while len(before) < total:
            before += [rng.choice([0, 0, 0, 1, most, most - 1, rng.randint(0, most)])] * rng.choice([1, 50, 5000])
        before = before[:total]
        ranges = [(rng.randint(-10, total + 10), rng.choice([0, 1, 1, 2, 40, 6000])) for number in range(rng.randrange(12))]
        ranges += rng.choice([[], [(-(2**62), 2**62 + total // 2)], [(total // 2, 2**63 - 2)], [(-5, 1)]])
        after, lost = list(before), 0
        for start, count in ranges:
            for index in range(max(0, start), min(total, start + count)):
                lost += after[index] == most
                after[index] = min(most, after[index] + 1)
        for twin in TWINS:
            counts = array(code, before)
            assert twin.tally(rng.choice([counts, memoryview(counts)]), ranges) == lost
            assert counts.tolist() == after


def test_tally_arguments():
    counts = array("H", [0])
    for ranges in [[(0, -1)], [(HUGE, 1)], [(-HUGE, 1)], [(0, HUGE)], [(0, 1), (2**63 - 1, 1)], [(-(2**63), 0)]]:
        assert same("tally", counts, ranges) == (ValueError, "range is out of range")
    assert counts.tolist() == [0]
    assert same("tally", bytes(2), []) == (ValueError, "buffer is read-only")
    for wrong in (bytearray(2), array("h", [0]), array("d", [0]), memoryview(bytearray(8)).cast("L"), memoryview(bytearray(8)).cast("N")):
        assert same("tally", wrong, []) == (ValueError, "counts are not native H, I or Q items")
    assert same("tally", memoryview(bytearray(8)).cast("@H"), []) == 0


@pytest.mark.parametrize("code", "HIQ")
@pytest.mark.parametrize("order", range(7))
def test_refcount_mismatches(order, code):
    rng = random.Random(order * 10 + ord(code))
    most = (1 << 8 * array(code).itemsize) - 1
    for attempt in range(25):
        stored = random_refcounts(rng, order, rng.choice([0, 8, 4096, 20_000]))
        start = rng.choice([0, 3])
        counted = [0] * start + [min(most, value) for value in stored] + [0]
        for change in range(rng.choice([0, 1, 20])):
            counted[rng.randrange(len(counted))] = rng.choice([0, 1, 2, most])
        count = rng.choice([len(stored), rng.randint(0, len(stored))])
        expected = [(index, stored[index], counted[start + index]) for index in range(count) if stored[index] != counted[start + index]]
        args = (stored_refcounts(stored, order), order, array(code, counted), start, count)
        assert same("refcount_mismatches", *args, EVERYTHING) == expected
        limit = rng.randint(0, len(expected) + 1)
        assert same("refcount_mismatches", *args, limit) == expected[:limit]


# --- buffers of every kind

READERS = [
    ("nonzero_runs", lambda buffer: (buffer, 0, 0, 1)),
    ("first_difference", lambda buffer: (buffer, buffer)),
    ("difference_runs", lambda buffer: (buffer, buffer, 1)),
    ("scatter", lambda buffer: ([], buffer)),
    ("gather", lambda buffer: ([], buffer)),
    ("table_runs", lambda buffer: (buffer, 8, True, 0, 0, 1, 1)),
    ("l2_runs", lambda buffer: (buffer, 0, 0, 512, False, 1)),
    ("l2_runs_extended", lambda buffer: (buffer, 0, 0, 512, False, 1)),
    ("refcounts_unpack", lambda buffer: (buffer, 4, 0, 0)),
    ("refcount_free_runs", lambda buffer: (buffer, 4, 0, 0, 1)),
    ("tally", lambda buffer: (buffer, [])),
    ("refcount_mismatches", lambda buffer: (buffer, 4, array("H"), 0, 0, 1)),
    ("refcount_mismatches", lambda buffer: (b"", 4, buffer, 0, 0, 1)),
    ("bit_runs", lambda buffer: (buffer, 0, 0, 1)),
    ("crc32c", lambda buffer: (buffer,)),
]


@pytest.mark.parametrize("name, arguments", READERS)
def test_buffers(name, arguments):
    strided = memoryview(bytearray(16))[::2]
    assert same(name, *arguments(strided)) == (ValueError, "buffer is not C-contiguous")
    released = memoryview(bytearray(16))
    released.release()
    assert same(name, *arguments(released))[0] is ValueError
    for thing in (None, 5, "text", [1, 2]):
        kinds = {outcome(getattr(twin, name), arguments(thing))[1][0] for twin in TWINS}
        assert kinds == {TypeError}
    for empty in (b"", bytearray(), array("H"), memoryview(b"")):
        same(name, *arguments(empty))
    with mmap.mmap(-1, 4096) as mapped:
        same(name, *arguments(mapped))  # closing raises BufferError if a twin keeps the buffer
    grid = memoryview(bytearray(64)).cast("B", shape=[8, 8])
    same(name, *arguments(grid))
    kept = bytearray(16)
    same(name, *arguments(kept))
    kept.append(1)  # as would this


def test_lists_are_not_iterators():
    fd = os.open(os.devnull, os.O_RDWR)
    for name in ("gather", "scatter"):
        assert same(name, iter([(fd, 0, 0, 1)]), bytearray(1)) == (TypeError, "")
    assert same("tally", array("H", [0]), iter([(0, 1)])) == (TypeError, "")
    os.close(fd)


def test_items_wider_than_bytes_are_seen_as_bytes():
    table = array("Q", [1, 0, 2])
    assert same("nonzero_runs", table, 0, 24, 8) == [(0, 8), (16, 8)]
    assert same("first_difference", table, table.tobytes()) == -1
    for twin in TWINS:
        target = array("Q", [7])
        with open(os.devnull, "rb") as nothing:
            twin.gather([(nothing.fileno(), 0, 0, 8)], target)
        assert target[0] == 0


# --- the switch

COMPLETE = "ABI = %d\n__version__ = '9.9'\n" % contract.ABI + "".join(
    "def %s(*args): return 'native'\n" % name for name in contract.KERNELS + contract.CODECS + contract.CIPHERS
)
ABSENT = "raise ImportError('absent')\n"


def switched(tmp_path, demand, module, code):
    """Run code in a fresh interpreter with `module` as the text of diskwright_accel."""
    (tmp_path / "diskwright_accel.py").write_text(module)
    library = str(Path(diskwright.__file__).parent.parent)
    environment = {key: value for key, value in os.environ.items() if key != "DISKWRIGHT_ACCEL"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), library])
    if demand is not None:
        environment["DISKWRIGHT_ACCEL"] = demand
    code = (
        "import sys\nfrom diskwright.errors import Error\ntry:\n    from diskwright import kernels\n    %s\n"
        "except Error as error:\n    print('Error:', error)\n" % code.replace("\n", "\n    ")
    )
    return subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout.strip()


CALL = "result = kernels.bit_runs(b'a', 0, 8, 9)\nprint(kernels.backend(), result)"
PURE_ANSWER = "pure [(0, 1), (5, 2)]"


@pytest.mark.parametrize("demand", [None, "auto", "require"])
def test_switch_takes_the_native_twins(tmp_path, demand):
    assert switched(tmp_path, demand, COMPLETE, CALL) == "accel 9.9 (abi %d) native" % contract.ABI
    assert switched(tmp_path, demand, COMPLETE, "kernels.backend()\nprint('diskwright.kernels.pure' in sys.modules)") == "False"


UNFIT = [
    (ABSENT, "diskwright_accel cannot be imported (absent)"),
    (COMPLETE + "ABI += 1\n", "diskwright_accel has ABI %d, this library needs %d" % (contract.ABI + 1, contract.ABI)),
    (COMPLETE + "del ABI\n", "diskwright_accel has ABI None, this library needs %d" % contract.ABI),
    (COMPLETE + "del tally, crc32c\n", "diskwright_accel lacks tally, crc32c"),
    (COMPLETE + "del zstd_compress\n", "diskwright_accel lacks zstd_compress"),
    (COMPLETE + "del pbkdf2\n", "diskwright_accel lacks pbkdf2"),
]


@pytest.mark.parametrize("module, reason", UNFIT)
def test_switch_with_an_unfit_module(tmp_path, module, reason):
    assert switched(tmp_path, "auto", module, CALL) == PURE_ANSWER
    assert switched(tmp_path, "require", module, "print('imported')") == "Error: DISKWRIGHT_ACCEL=require: " + reason


def test_switch_off_never_imports_the_module(tmp_path):
    assert switched(tmp_path, "off", "raise SystemError('imported')\n", CALL) == PURE_ANSWER


@pytest.mark.parametrize("demand", ["", "on", "Auto"])
def test_switch_refuses_other_values(tmp_path, demand):
    expected = "Error: DISKWRIGHT_ACCEL must be auto, off or require, not '%s'" % demand
    assert switched(tmp_path, demand, COMPLETE, "print('imported')") == expected


def test_import_loads_no_twin(tmp_path):
    code = "print([name for name in sys.modules if 'pure' in name or 'accel' in name])"
    assert switched(tmp_path, "auto", COMPLETE, code) == "[]"


def test_unknown_attribute():
    from diskwright import kernels

    with pytest.raises(AttributeError, match="has no attribute 'gathers'"):
        kernels.gathers  # noqa: B018
