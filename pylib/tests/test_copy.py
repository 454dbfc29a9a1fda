# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The copy engine against a bytearray, over toy drivers and files: content, order, failures, interrupts, memory."""

from __future__ import annotations

import _thread
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

import pytest
import diskwright
from diskwright import Error, Unsupported
from diskwright.copy import pieces as pieces_module
from diskwright.copy.crew import Crew
from diskwright.copy.difference import CONTENT, STATUS_DIFFERS, compare
from diskwright.copy.pieces import CHUNK, batches, pieces, source_runs
from diskwright.copy.transfer import copy, place
from diskwright.extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from diskwright.graph import open_image
from diskwright.node import Node, OpenFlags

from toy import Memory, Units


class Sparse(Memory):
    """Memory that knows its runs of zero units, and that some units are zero though it does not say so."""

    def __init__(self, size: int, seed: int, grain: int = 512) -> None:
        rng = random.Random(seed)
        content = bytearray(size)
        self.runs: list[tuple[int, int, bool]] = []
        position = 0
        while position < size:
            length = min(size - position, rng.choice((1, 1, 2, 7, 8, 64, 200)) * grain)
            data = rng.random() < 0.5
            if data and rng.random() < 0.7:
                content[position : position + length] = rng.randbytes(length)
                for hole in range(rng.randrange(3)):
                    start = position + rng.randrange(length)
                    stop = min(position + length, start + rng.randrange(20000))
                    content[start:stop] = bytes(stop - start)
            self.runs.append((position, length, data))
            position += length
        super().__init__(bytes(content))

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        for start, count, data in self.runs:
            if start < offset + length and offset < start + count:
                yield Extent(start, count, (DATA if data else ZERO) | OFFSET_VALID | ALLOCATED, self, start)


class Fresh(Memory):
    """Memory filled with a pattern that shows which bytes were written."""

    def __init__(self, size: int, filler: int = 0) -> None:
        super().__init__(bytes([filler]) * size)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self.log.append(("zero", offset, length))
        self.data[offset : offset + length] = bytes(length)
        return offset, length

    def _alloc(self, offset: int, length: int) -> list[Any]:
        from diskwright.node import Alloc

        return [Alloc(offset, length, self, offset)]


def content(node: Node) -> bytes:
    return node.pread(0, node.size)


def units(size: int, unit: int, filler: int = 0, backing: Optional[Node] = None) -> Units:
    """A toy image whose table sends units to random places of a file that is full of other bytes."""
    return Units(Memory(bytes([filler]) * 4096), size, unit, backing=backing)


def allocation_units(size: int) -> list[int]:
    """Without those of which the toy image would have more than it can look for in good time."""
    return [unit for unit in (0, 512, 4096, 65536, 1 << 19) if not unit or size <= unit * 600]


SIZES = (0, 512, 100 * 512, 300_032, 1 << 20, (2 << 20) + 512)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", (1, 2, 5))
@pytest.mark.parametrize("ordered", (True, False))
def test_copy_to_a_target_that_reads_as_zeroes(size: int, threads: int, ordered: bool) -> None:
    for seed in range(6):
        source = Sparse(size, seed)
        for unit in allocation_units(size):
            for sparse_size in (0, 512, 4096, 1 << 17):
                target: Node = units(size, unit, 0xAA) if unit else Fresh(size)
                copy([source], target, target_is_zero=True, threads=threads, ordered=ordered, sparse_size=sparse_size)
                assert content(target) == source.data, (seed, unit, sparse_size)


@pytest.mark.parametrize("size", SIZES)
def test_copy_over_old_content(size: int) -> None:
    for seed in range(6):
        source = Sparse(size, seed)
        for unit in allocation_units(size):
            for sparse_size in (0, 512, 4096):
                for more in (0, 512, 100_352):
                    target: Node = units(size + more, unit) if unit else Fresh(size + more, 0xBB)
                    if unit and target.size:
                        target.pwrite(0, b"\xbb" * target.size)
                    copy([source], target, sparse_size=sparse_size)
                    assert content(target) == source.data + b"\xbb" * more, (seed, unit, sparse_size, more)


def test_copy_a_part_and_a_sequence() -> None:
    rng = random.Random(1)
    for seed in range(40):
        sources = [Sparse(rng.choice((0, 512, 7 * 512, 200_192)), seed * 7 + number) for number in range(rng.randrange(1, 5))]
        whole = b"".join(bytes(source.data) for source in sources)
        offset = rng.randrange(len(whole) + 1000) // 512 * 512
        length = rng.choice((None, rng.randrange(len(whole) + 1000)))
        expected = whole[offset:] if length is None else whole[offset : offset + length]
        target = units(-(-len(expected) // 512) * 512, rng.choice((512, 4096, 65536)))
        copy(sources, target, target_is_zero=True, offset=offset, length=length)
        assert content(target)[: len(expected)] == expected
        assert not any(content(target)[len(expected) :])


def test_copy_of_a_layer_onto_its_backing_file() -> None:
    """Only what the source's own layer holds is written, and what it holds as zeroes too."""
    rng = random.Random(2)
    for seed in range(12):
        size = rng.choice((512 * 9, 300_032, 1 << 20))
        base = Fresh(max(512, size - rng.choice((0, 0, 65536))), 0xBB)
        source = units(size, 4096, backing=base)
        for _number in range(rng.randrange(8)):
            start = rng.randrange(size)
            count = rng.randrange(size - start) % 70_000
            if rng.random() < 0.5:
                source.pwrite(start, rng.randbytes(count))
            else:
                source.pwrite_zeroes(start, count)
        for unit in (512, 4096, 65536):
            target = units(size, unit, backing=base)
            copy([source], target, own=True)
            assert content(target) == content(source)
            if unit == 4096:
                assert set(target.table) == set(source.table)


def test_nothing_is_read_to_write_a_whole_image() -> None:
    """Data is aligned out to the target's units, so there is no copy-on-write."""
    source = Sparse(1 << 20, 3)
    file = Memory()
    target = Units(file, 1 << 20, 65536)
    copy([source], target, target_is_zero=True)
    assert all(verb == "write" and length == 65536 for verb, _offset, length in file.log)
    assert len(file.log) == len(target.table) == target.linked
    assert not target.aborted


def test_zeroes_are_not_written_but_asked_for() -> None:
    source = Sparse(1 << 20, 3)
    target = Fresh(1 << 20, 0xBB)
    copy([source], target)
    assert content(target) == source.data
    written = sum(length for verb, _offset, length in target.log if verb == "write")
    assert written < len(source.data) - source.data.count(0) + 200 * 4096


def test_sparse_size_zero_writes_everything() -> None:
    source = Sparse(1 << 20, 3)
    target = Fresh(1 << 20)
    copy([source], target, sparse_size=0)
    assert sum(length for _verb, _offset, length in target.log) == 1 << 20
    assert {verb for verb, _offset, _length in target.log} == {"write"}


@pytest.mark.parametrize("threads", (1, 2, 4))
def test_space_is_taken_in_order(threads: int) -> None:
    class Recorder(Fresh):
        def _alloc(self, offset: int, length: int) -> list[Any]:
            self.log.append(("alloc", offset, length))
            return super()._alloc(offset, length)

    source = solid(Sparse, 16 << 20)
    target = Recorder(16 << 20)
    copy([source], target, target_is_zero=True, threads=threads)
    taken = [offset for verb, offset, _length in target.log if verb == "alloc"]
    assert taken == list(range(0, 16 << 20, CHUNK))
    assert target.data == source.data


def test_pieces_partition_the_range() -> None:
    for seed in range(30):
        source = Sparse(random.Random(seed).randrange(1, 3000) * 512, seed)
        for unit, chunk in ((1, 1 << 18), (512, 4096), (65536, 1 << 18), (1 << 20, 1 << 20)):
            position = 0
            covered = bytearray(source.size)
            for offset, length, reads in pieces(source_runs([source]), unit, chunk, source.size):
                assert offset == position and length > 0
                position += length
                assert not reads or length <= chunk
                assert offset % unit == 0
                assert position % unit == 0 or position == source.size
                place = 0
                for host, host_offset, at, count in reads:
                    assert host is source and host_offset == offset + at and at >= place and count > 0
                    place = at + count
                    assert place <= length
                    covered[host_offset : host_offset + count] = b"\1" * count
            assert position == source.size
            for start, count, data in source.runs:
                assert covered[start : start + count] == (b"\1" if data else b"\0") * count


def test_extents_are_asked_for_a_thousand_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Sparse(1 << 20, 9)
    calls = []
    resolve = Node.resolve

    def counting(self: Node, *arguments: Any) -> list[Extent]:
        found = resolve(self, *arguments)
        calls.append(len(found))
        return found

    monkeypatch.setattr(Node, "resolve", counting)
    monkeypatch.setattr(pieces_module, "EXTENTS", 3)
    target = Fresh(1 << 20)
    copy([source], target, target_is_zero=True)
    assert target.data == source.data
    assert max(calls) <= 3 and len(calls) > 5


# -- files ---------------------------------------------------------------------------------------------------------


def make_file(path: Path, size: int, seed: int) -> bytes:
    source = Sparse(size, seed, 4096)
    with open(path, "wb") as file:
        file.truncate(size)
        for start, length, data in source.runs:
            if data:
                os.pwrite(file.fileno(), source.data[start : start + length], start)
    return bytes(source.data)


WRITABLE = OpenFlags(writable=True, resize=True)


@pytest.mark.parametrize("copy_range", (False, True))
def test_copy_between_files(tmp_path: Path, copy_range: bool) -> None:
    expected = make_file(tmp_path / "source", (3 << 20) + 4096, 11)
    (tmp_path / "target").write_bytes(b"")
    os.truncate(tmp_path / "target", len(expected))
    with open_image(str(tmp_path / "source"), "raw") as source, open_image(str(tmp_path / "target"), "raw", WRITABLE) as target:
        copy([source], target, target_is_zero=True, copy_range=copy_range)
    assert (tmp_path / "target").read_bytes() == expected
    assert (tmp_path / "target").stat().st_blocks <= (tmp_path / "source").stat().st_blocks + 8


@pytest.mark.parametrize("seed", range(4))
def test_zeroes_at_the_edges_of_new_clusters_stay_holes(tmp_path: Path, seed: int) -> None:
    """Only what the source holds is written into clusters behind the end of the file; the file reaches to the end of the last one."""
    rng = random.Random(seed)
    source, target = tmp_path / "source", tmp_path / "target"
    with open(source, "wb") as file:
        file.truncate(20 << 20)
        for _number in range(40):
            os.pwrite(file.fileno(), rng.randbytes(4096), rng.randrange(5 << 10) << 12)
    diskwright.convert([str(source)], str(target), target_format="qcow2", format="raw")
    assert diskwright.compare(str(source), str(target)).identical
    checked = subprocess.run(["qemu-img", "check", "--output=json", str(target)], capture_output=True, check=True)
    result = json.loads(checked.stdout)
    assert target.stat().st_size >= result["image-end-offset"]
    assert target.stat().st_blocks <= source.stat().st_blocks + (10 << 16 >> 9)  # tables, and ext4's own
    assert result["allocated-clusters"] << 16 > source.stat().st_blocks << 9


def test_small_pieces_share_a_batch() -> None:
    """A hundred small extents, each far from the next, are few kernel calls; every byte of the buffer still has its place."""
    source = Fresh(16)
    work: list[Any] = [(at << 17, 4096, [(source, at << 17, 0, 4096)]) for at in range(100)] + [(1 << 30, 4096, [])]
    found = list(batches(iter(work), 4096, 128 << 10))
    assert [len(batch) for batch in found] == [32, 32, 32, 4, 1]
    for batch in found[:-1]:
        assert [part[3] for part in batch] == [number << 12 for number in range(len(batch))]
        assert all(reads == [(source, offset, base, 4096)] for offset, _length, reads, base in batch)
        for offset, length, _reads, base in batch:
            assert place(batch, base) == offset and place(batch, base + length - 1) == offset + length - 1


def test_copy_range_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel refuses is read and written; so is what no descriptor leads to."""
    expected = make_file(tmp_path / "source", 3 << 20, 12)
    refusals = []

    def refuse(*_arguments: int) -> int:
        refusals.append(1)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "target").write_bytes(b"")
    os.truncate(tmp_path / "target", len(expected))
    with open_image(str(tmp_path / "source"), "raw") as source, open_image(str(tmp_path / "target"), "raw", WRITABLE) as target:
        copy([source], target, target_is_zero=True, copy_range=True)
    assert (tmp_path / "target").read_bytes() == expected
    assert refusals == [1]
    source_node = Sparse(1 << 20, 13)
    memory = Fresh(1 << 20)
    copy([source_node], memory, target_is_zero=True, copy_range=True)
    assert memory.data == source_node.data


# -- failures ------------------------------------------------------------------------------------------------------


class BadSectors(Sparse):
    """Some sectors cannot be read."""

    bad: tuple[int, ...] = ()

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        for sector in self.bad:
            if host_offset <= sector < host_offset + len(view):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        super()._pread_into(host_offset, view)


class Full(Fresh):
    """No space is left from an offset on."""

    room = 0

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        if host_offset + len(view) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super()._pwrite(host_offset, view)


def solid(kind: type[Sparse], size: int) -> Sparse:
    node = kind(size, 1)
    node.runs = [(0, size, True)]
    node.data[:] = random.Random(6).randbytes(size)
    return node


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Whatever a test does, the engine leaves no thread behind."""
    before = _thread._count()
    yield
    deadline = time.monotonic() + 10
    while _thread._count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _thread._count() <= before


def test_a_read_error_ends_the_copy() -> None:
    source = solid(BadSectors, 4 << 20)
    source.bad = (3 << 20,)
    with pytest.raises(Error, match=r"^error while reading at byte 3145728: Input/output error$") as caught:
        copy([source], Fresh(4 << 20), target_is_zero=True)
    assert caught.value.errno == errno.EIO


def test_a_write_error_ends_the_copy_and_gives_back_what_was_reserved() -> None:
    source = solid(Sparse, 4 << 20)
    target = Full(4 << 20)
    target.room = 2 << 20
    with pytest.raises(Error, match=r"^error while writing at byte 2097152: No space left on device$"):
        copy([source], target, target_is_zero=True)
    assert source.data[: 2 << 20] == target.data[: 2 << 20]
    image = Units(Full(0), 4 << 20, 65536)
    image.file.room = 1 << 20  # type: ignore[attr-defined]
    with pytest.raises(Error, match="^error while writing at byte [0-9]+: No space left on device$"):
        copy([source], image, target_is_zero=True)
    assert len(image.reserved) == len(image.table) and image.aborted


def test_salvage() -> None:
    source = solid(BadSectors, 1 << 20)
    source.bad = (5 * 512, 300 * 512, 301 * 512)
    target = Fresh(1 << 20)
    told: list[str] = []
    copy([source], target, target_is_zero=True, salvage=True, warn=told.append)
    for sector in source.bad:
        source.data[sector : sector + 512] = bytes(512)
    assert target.data == source.data
    assert sorted(told) == sorted("error while reading offset %d: Input/output error" % sector for sector in source.bad)


def test_a_status_error_ends_the_copy() -> None:
    class Unmapped(Sparse):
        def _map(self, offset: int, length: int) -> Iterator[Extent]:
            if offset >= 1 << 19:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield Extent(0, 1 << 19, DATA, self, 0)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(Error, match="^error while reading block status at offset 524288: Input/output error$"):
        copy([Unmapped(1 << 20, 1)], Fresh(1 << 20))


def test_compression_needs_a_format_that_can() -> None:
    with pytest.raises(Unsupported, match="^Compression not supported for this file format$"):
        copy([Sparse(512, 1)], Fresh(512), compress=True)


@pytest.mark.parametrize("threads", (1, 2, 4))
def test_progress_may_end_the_copy(threads: int) -> None:
    class Cancelled(BaseException):
        pass

    reports: list[tuple[int, int]] = []
    cancelled = threading.Event()
    caller = threading.get_ident()

    def progress(done: int, total: int) -> None:
        reports.append((done, total))
        if done > 1 << 20:
            cancelled.set()
            raise Cancelled

    class Held(Fresh):
        """Only the caller is told of progress: the other threads must not be done before it has its turn."""

        def _pwrite(self, host_offset: int, view: memoryview) -> None:
            if threading.get_ident() != caller:
                cancelled.wait(20)
            super()._pwrite(host_offset, view)

    source = solid(Sparse, 16 << 20)
    before = bytes(source.data)
    target = Held(16 << 20)
    with pytest.raises(Cancelled):
        copy([source], target, target_is_zero=True, threads=threads, progress=progress)
    assert source.data == before
    assert sum(length for _verb, _offset, length in target.log) < 8 << 20
    assert all(total == 16 << 20 for _done, total in reports)


def test_progress_begins_at_nothing_and_ends_with_all() -> None:
    reports: list[tuple[int, int]] = []
    copy([Sparse(3 << 20, 8)], Fresh(3 << 20), progress=lambda done, total: reports.append((done, total)))
    assert reports[0] == (0, 3 << 20) and reports[-1] == (3 << 20, 3 << 20)


def test_an_interrupt_ends_the_copy() -> None:
    class Slow(Sparse):
        def _pread_into(self, host_offset: int, view: memoryview) -> None:
            if host_offset == 1 << 20:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.001)
            super()._pread_into(host_offset, view)

    for threads in (1, 2, 3):
        target = Fresh(64 << 20)
        with pytest.raises(KeyboardInterrupt):
            copy([solid(Slow, 64 << 20)], target, target_is_zero=True, threads=threads)
            assert len(target.log) < 128


def test_rate() -> None:
    """The rate is kept in the long run: the first write is free, the others wait for their turn."""
    source = solid(Sparse, 4 * CHUNK)
    began = time.monotonic()
    copy([source], Fresh(4 * CHUNK), target_is_zero=True, rate=CHUNK * 10)
    assert time.monotonic() - began >= 0.29


def test_a_failure_wakes_what_the_rate_holds_back() -> None:
    source = solid(BadSectors, 1 << 20)
    source.bad = (600 << 10,)
    with pytest.raises(Error, match="error while reading at byte 524288"):
        copy([source], Fresh(1 << 20), target_is_zero=True, rate=1 << 16, threads=2)


def test_the_crew_hands_out_everything_once() -> None:
    for threads in (1, 2, 7):
        crew = Crew(iter(range(1000)))
        seen: list[int] = []
        ordered: list[int] = []

        def member(crew: Crew = crew, seen: list[int] = seen, ordered: list[int] = ordered) -> None:  # pylint: disable=dangerous-default-value
            while True:
                item = crew.take()
                if item is None:
                    return
                number, turn = item
                seen.append(number)
                turn.wait()
                ordered.append(number)
                turn.pass_on()

        crew.run(member, threads)
        assert sorted(seen) == ordered == list(range(1000))


# -- comparing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", (1, 2))
def test_the_first_difference(threads: int) -> None:
    rng = random.Random(4)
    for seed in range(60):
        left = Sparse(rng.choice((512, 100 * 512, 1 << 20)), seed)
        right = Sparse(left.size, seed)
        right.runs = [(0, left.size, True)] if rng.random() < 0.5 else right.runs
        if rng.random() < 0.3:
            right.data += bytes(512 * 3)
            right.runs = [(0, right.size, True)]
        assert compare(left, right, threads=threads) is None
        changed = [rng.randrange(right.size) for _number in range(rng.randrange(1, 4))]
        right.runs = [(0, right.size, True)]
        for at in changed:
            right.data[at] ^= 1
        for pair in ((left, right), (right, left)):
            found = compare(*pair, threads=threads)
            if len(set(changed)) == len(changed):
                assert found is not None and (found.offset, found.kind) == (min(changed) // 512 * 512, CONTENT)


def test_strict_compares_the_status_too() -> None:
    left, right = Sparse(1 << 20, 5), Sparse(1 << 20, 5)
    assert compare(left, right, strict=True) is None
    start, length, data = right.runs[4]
    right.runs[4:5] = [(start, length, not data)]
    right.data[start : start + length] = bytes(length)
    left.data[start : start + length] = bytes(length)
    found = compare(left, right, strict=True)
    assert found is not None and (found.offset, found.kind) == (start, STATUS_DIFFERS)
    assert compare(left, right) is None
    right.data[right.runs[0][0]] ^= 1
    right.runs[0] = left.runs[0] = (0, right.runs[0][1], True)
    found = compare(left, right, strict=True)
    assert found is not None and (found.offset, found.kind) == (0, CONTENT)


def test_a_difference_before_a_read_error_wins() -> None:
    from diskwright.copy.difference import ReadError

    for _attempt in range(5):
        left, right = solid(BadSectors, 4 << 20), solid(Sparse, 4 << 20)
        left.bad = (1 << 20,)
        with pytest.raises(ReadError, match="^Error while reading offset 1048576 of "):
            compare(left, right)
        right.data[(1 << 20) - 1] ^= 1
        found = compare(left, right)
        assert found is not None and found.offset == (1 << 20) - 512


# -- memory --------------------------------------------------------------------------------------------------------

MEMORY = """
import os, resource, sys
from diskwright.copy.transfer import copy
from diskwright.copy.difference import compare
from diskwright.graph import open_image
from diskwright.node import OpenFlags
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_image(sys.argv[1], "raw") as source, open_image(sys.argv[2], "raw", OpenFlags(writable=True, resize=True)) as target:
    copy([source], target, target_is_zero=True, sparse_size=int(sys.argv[3]) or 4096)
    assert compare(source, target) is None
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("sparse_size", (0, 16 << 20))
def test_memory_does_not_grow_with_the_image(tmp_path: Path, sparse_size: int) -> None:
    size = 100 << 30
    source, target = tmp_path / "source", tmp_path / "target"
    with open(source, "wb") as file:
        file.truncate(size)
        for number in range(20000):
            os.pwrite(file.fileno(), b"x" * 4096, size // 20000 * number // 4096 * 4096)
    target.write_bytes(b"")
    os.truncate(target, size)
    run = subprocess.run([sys.executable, "-c", MEMORY, str(source), str(target), str(sparse_size)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 64 << 10
    if not sparse_size:
        assert target.stat().st_blocks <= source.stat().st_blocks * 1.05
