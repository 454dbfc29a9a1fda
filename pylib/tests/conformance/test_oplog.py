# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Which requests reach the file, not only which bytes come out; and what a crash between any two of them leaves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest

from subjects import AES, QCOW2_KEY, CHECKED, SECTOR, Image, Subject, patches, qemu_check
from recorder import Recorder, after_crash

K = 1024
M = 1024 * K

PLAIN = Subject("raw", "raw", size=4 * M)
QCOW2 = Subject("qcow2", "qcow2", {"cluster_size": 64 * K}, size=4 * M)
QED = Subject("qed", "qed", size=4 * M)
QCOW = Subject("qcow", "qcow", size=4 * M)
EACH = pytest.mark.parametrize("subject", [PLAIN, QCOW2, QED, QCOW], ids=["raw", "qcow2", "qed", "qcow"])


@EACH
def test_reading_what_lies_together_is_one_request(tmp_path: Path, subject: Subject) -> None:
    image = Image(subject, tmp_path)
    with image.open() as node:
        node.pwrite(0, b"d" * 2 * M)
    with Recorder(image.path, writable=False) as file, image.open(file, writable=False, resize=False) as node:
        node.pread(0, 1)  # the tables are in memory now
        for offset, length in ((0, 2 * M), (M, M), (100, 3 * 64 * K), (5, 1)):
            file.log.clear()
            assert node.pread(offset, length) == b"d" * length
            assert [(request.verb, request.length) for request in file.log] == [("read", length)]


@EACH
def test_reading_holes_and_zeroes_is_no_request(tmp_path: Path, subject: Subject) -> None:
    image = Image(subject, tmp_path)
    with image.open() as node:
        node.pwrite(0, b"x")
    with Recorder(image.path) as file, image.open(file) as node:
        node.pread(0, 1)
        node.pwrite_zeroes(M, M)
        file.log.clear()
        node.resolve(M, 3 * M, True)
        if subject.driver != "raw":
            assert node.pread(M, 3 * M) == bytes(3 * M)
        assert file.count("read") == 0


@EACH
def test_writing_whole_clusters_reads_nothing(tmp_path: Path, subject: Subject) -> None:
    image = Image(subject, tmp_path)
    with Recorder(image.path) as file, image.open(file) as node:
        node.pwrite(0, b"d" * 64 * K)
        file.log.clear()
        node.pwrite(64 * K, b"d" * M)
        assert [(request.verb, request.length) for request in file.log] == [("write", M)]


@EACH
def test_writing_in_place_is_one_request(tmp_path: Path, subject: Subject) -> None:
    image = Image(subject, tmp_path)
    with Recorder(image.path) as file, image.open(file) as node:
        node.pwrite(0, b"d" * M)
        node.flush()
        file.log.clear()
        node.pwrite(70 * K, b"e" * 200 * K)
        node.pwrite(3, b"f")
        assert [(request.verb, request.length) for request in file.log] == [("write", 200 * K), ("write", 1)]
        file.log.clear()
        node.flush()
        assert {request.verb for request in file.log} == {"flush"} and len(file.log) == 1


def test_a_piece_of_a_new_cluster_is_written_with_its_cluster(tmp_path: Path) -> None:
    image = Image(QCOW2, tmp_path)
    with Recorder(image.path) as file, image.open(file) as node:
        node.pwrite(0, b"d")
        file.log.clear()
        node.pwrite(100 * K, b"e" * 5)
        assert [(request.verb, request.length) for request in file.log] == [("write", 64 * K)]


def test_zeroes_write_no_data(tmp_path: Path) -> None:
    image = Image(QCOW2, tmp_path)
    with Recorder(image.path) as file, image.open(file) as node:
        node.pwrite(0, b"d" * M)
        node.flush()
        file.log.clear()
        node.pwrite_zeroes(0, 2 * M)
        node.flush()
        assert sum(request.length for request in file.log if request.verb == "write") <= 3 * 64 * K


@pytest.mark.parametrize("subject", [QCOW2, QED, QCOW], ids=["qcow2", "qed", "qcow"])
def test_tables_are_written_once_and_in_order(tmp_path: Path, subject: Subject) -> None:
    """Many writes and one flush: each table goes out once, counts (or new tables) before what points at clusters, with a flush between."""
    image = Image(subject, tmp_path)
    with Recorder(image.path) as file, image.open(file) as node:
        for cluster in range(0, 64, 2):
            node.pwrite(cluster * 64 * K, b"d" * 64 * K)
        assert file.count("write") == 32
        assert file.count("flush") == 0
        file.log.clear()
        node.flush()
        verbs = [request.verb for request in file.log if request.verb != "truncate"]
        assert verbs.count("write") <= 4 and verbs[-1] == "flush"
        assert verbs[0] == "write" and "flush" in verbs[1:-1]


def test_an_open_reads_little(tmp_path: Path) -> None:
    image = Image(QCOW2, tmp_path)
    with Recorder(image.path, writable=False) as file, image.open(file, writable=False, resize=False):
        assert file.count("read") <= 3 and file.count("write", "flush", "truncate", "zero") == 0


@EACH
def test_close_without_a_change_writes_nothing(tmp_path: Path, subject: Subject) -> None:
    image = Image(subject, tmp_path)
    before = image.path.read_bytes()
    with Recorder(image.path) as file, image.open(file) as node:
        node.pread(0, M)
    assert file.count("write", "truncate", "zero", "discard") == 0
    assert image.path.read_bytes() == before


# -- crashes ------------------------------------------------------------------------------------------------------------

CRASHES = [
    Subject("v3", "qcow2", {"cluster_size": 4 * K}, size=600 * K),
    Subject("v3-512", "qcow2", {"cluster_size": 512}, size=300 * K),
    Subject("v2-512", "qcow2", {"cluster_size": 512, "compat": "0.10"}, size=300 * K),
    Subject("r64-512", "qcow2", {"cluster_size": 512, "refcount_bits": 64}, size=300 * K),
    Subject("r1", "qcow2", {"cluster_size": 1 * K, "refcount_bits": 1}, size=300 * K),
    Subject("v3-backing", "qcow2", {"cluster_size": 2 * K}, size=300 * K, backing="equal"),
    Subject("v2-backing", "qcow2", {"cluster_size": 2 * K, "compat": "0.10"}, size=300 * K, backing="shorter"),
    Subject("64k", "qcow2", {}, size=2 * M),
    # so much data that the refcount table has to move
    Subject("table-moves", "qcow2", {"cluster_size": 512, "refcount_bits": 64}, size=3 * M),
    Subject("sub-16k", "qcow2", {"extended_l2": True, "cluster_size": 16 * K}, size=600 * K),
    Subject("sub-32k", "qcow2", {"extended_l2": True, "cluster_size": 32 * K}, size=600 * K, backing="shorter"),
    Subject("lazy", "qcow2", {"cluster_size": 1 * K, "lazy_refcounts": True}, size=300 * K),
    Subject("aes", "qcow2", {**AES, "cluster_size": 4 * K}, size=300 * K, backing="shorter", runtime=QCOW2_KEY),
    Subject("qed", "qed", {"cluster_size": 4 * K, "table_size": 2}, size=600 * K),
    Subject("qcow", "qcow", size=600 * K),
    Subject("qed-backing", "qed", {"cluster_size": 4 * K}, size=600 * K, backing="longer"),
]
SOUND = (0, 3, 63)  # exit codes of qemu-img check: clean, leaking, a format that it does not check
POINTS = 14  # crashes tried of each log, twice


class Moment(NamedTuple):
    """A point of the guest's time: how far the log is, what the guest sees, and whether all of it was flushed."""

    position: int
    content: bytes
    flushed: bool


def work(image: Image, file: Recorder, seed: str) -> list[Moment]:
    """Random requests; a Moment after each."""
    chance = random.Random(seed)
    node = image.open(file)
    content = bytearray(image.new)
    moments = [Moment(0, bytes(content), True)]
    unit = node.cluster_size
    for _turn in range(45):
        offset = chance.choice((chance.randrange(len(content)), chance.randrange(len(content) // unit) * unit))
        length = min(len(content) - offset, chance.choice((chance.randrange(1, 3 * unit), unit * chance.randrange(1, 12), len(content) // 8)))
        kind = chance.choice(("write", "write", "write", "zero", "unmap", "discard", "compressed", "resize", "flush", "flush"))
        if kind == "write":
            data = patches(chance, length)
            node.pwrite(offset, data)
            content[offset : offset + length] = data
        elif kind in ("zero", "unmap"):
            node.pwrite_zeroes(offset, length, kind == "unmap")
            content[offset : offset + length] = bytes(length)
        elif kind == "discard":
            node.pdiscard(offset, length)
            content[offset : offset + length] = node.pread(offset, length)
        elif kind == "compressed" and node.supports_compression:
            offset = offset // unit * unit
            data = patches(chance, min(unit, len(content) - offset))
            node.write_compressed(offset, data)
            content[offset : offset + len(data)] = data
        elif kind == "resize":
            size = max(SECTOR * 8, len(content) + chance.randrange(-90, 90) * SECTOR)
            if not image.subject.is_resizable(size > len(content)):
                continue
            node.truncate(size)
            del content[size:]
            content.extend(bytes(size - len(content)))
        else:
            node.flush()
        moments.append(Moment(len(file.log), bytes(content), kind == "flush"))
    node.close()
    moments.append(Moment(len(file.log), bytes(content), True))
    return moments


def acceptable(moments: list[Moment], position: int) -> list[bytes]:
    """What the guest may find after a crash at `position`: all that was there since the last flush that was done by then."""
    done = max(i for i, moment in enumerate(moments) if moment.flushed and moment.position <= position)
    begun = min((i for i, moment in enumerate(moments) if moment.position >= position), default=len(moments) - 1)
    return [moment.content for moment in moments[done : max(begun, done) + 1]]


def repairable(subject: Subject, path: Path) -> bool:
    """With lazy refcounts counts may be wrong after a crash, if the image says that it is dirty."""
    return "lazy_refcounts" in subject.options and bool(path.read_bytes()[79] & 1)


@pytest.mark.parametrize("subject", CRASHES, ids=[subject.name for subject in CRASHES])
@pytest.mark.parametrize("seed", ["a", "b"])
@pytest.mark.parametrize("orderly", [True, False], ids=["prefix", "subset"])
def test_a_crash_leaves_old_or_new_and_at_worst_leaks(tmp_path: Path, subject: Subject, seed: str, orderly: bool) -> None:
    image = Image(subject, tmp_path)
    before = image.path.read_bytes()
    file = Recorder(image.path)
    moments = work(image, file, subject.name + seed)
    assert image.path.read_bytes() == after_crash(before, file.log, len(file.log), random.Random(), True)
    chance = random.Random(seed)
    writes = [i + 1 for i, request in enumerate(file.log) if request.verb != "read"]
    for position in sorted(chance.sample(writes, min(POINTS, len(writes)))):
        image.path.write_bytes(after_crash(before, file.log, position, chance, orderly))
        sound = qemu_check(image.path, subject.driver, subject.runtime) in SOUND
        assert sound or repairable(subject, image.path), "corrupt after request %d of %d" % (position, len(file.log))
        with image.open(writable=False, resize=False) as node:
            if subject.driver in CHECKED:
                result = node.check()
                assert node.dirty or not result.corruptions and not result.check_errors, (position, result.messages)
            found = node.pread(0, node.size)
        states = acceptable(moments, position)
        assert len(found) in {len(state) for state in states}
        shrinks = any(len(after) < len(before) for before, after in zip(states, states[1:]))
        for at in range(0, len(found), SECTOR):
            # what is added reads as zeroes from the start; what is being cut off may be gone already
            values = [state[at : at + SECTOR] or bytes(SECTOR) for state in states]
            if shrinks:
                values.append(image.below(len(found))[at : at + SECTOR])
            assert found[at : at + SECTOR] in values, "after request %d, sector %d is neither old nor new" % (position, at // SECTOR)
        with image.open() as node:  # and it can be written on, and repaired
            node.pwrite(0, b"on it goes")
            assert node.pread(0, 10) == b"on it goes"
        assert qemu_check(image.path, subject.driver, subject.runtime) in SOUND
        if subject.driver == "qcow2":
            with image.open(check=True) as node:
                node.check("leaks")
            assert qemu_check(image.path, subject.driver, subject.runtime) == 0
