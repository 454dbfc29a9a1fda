# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""qcow2's internal snapshots: against a model, across crashes at any request, and of damaged images."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from conformance.recorder import Recorder, after_crash
from diskwright.errors import Error
from diskwright.formats.qcow2 import Qcow2
from diskwright.formats.qcow2.resize import grow_l1
from diskwright.formats.qcow2.snapshots import read_snapshots
from diskwright.hooks import Snapshot
from diskwright.node import Node
from qcow2_images import check_theirs, make, open_image, open_over, read_theirs, tool

K = 1024
M = 1024 * K


def change(node: Node, model: bytearray, chance: random.Random) -> None:
    """One random write, zeroing, discard or compressed write."""
    length = min(chance.choice((512, 3 * K, 64 * K, 200 * K)), len(model))
    offset = chance.randrange(0, len(model) - length + 1, 512)
    verb = chance.choice(("write", "write", "zero", "discard", "compressed"))
    if verb == "write":
        data = chance.randbytes(length)
        node.pwrite(offset, data)
        model[offset : offset + length] = data
    elif verb == "compressed":
        unit = node.cluster_size
        offset = offset // unit * unit
        data = (b"%d" % chance.randrange(1000) * unit)[: min(unit, len(model) - offset)]
        node.write_compressed(offset, data)
        model[offset : offset + len(data)] = data
    elif verb == "zero":
        node.pwrite_zeroes(offset, length, unmap=chance.random() < 0.5)
        model[offset : offset + length] = bytes(length)
    else:
        start, end = -(-offset // node.cluster_size) * node.cluster_size, (offset + length) // node.cluster_size * node.cluster_size
        if start < end:
            node.pdiscard(start, end - start)
            model[start:end] = bytes(end - start)


def content_of(path: Path, id: str) -> bytes:
    with open_image(path, writable=False) as node:
        node.load_snapshot(id=id)
        return node.pread(0, node.size)


@pytest.mark.parametrize("options", ["", "cluster_size=512", "compat=0.10", "refcount_bits=64,cluster_size=4k", "refcount_bits=4", "cluster_size=2M"])
@pytest.mark.parametrize("seed", range(2))
def test_model(tmp_path: Path, options: str, seed: int) -> None:
    """Random writes, snapshots, applying and deleting, by us and by qemu-img, against bytearrays."""
    chance = random.Random("%s %d" % (options, seed))
    path = tmp_path / "image"
    make(path, M, options)
    model = bytearray(M)
    kept: dict[str, bytes] = {}
    resizable = options != "compat=0.10"
    for _step in range(14):
        with open_image(path) as node:
            for _write in range(4):
                change(node, model, chance)
            verb = chance.choice(("create", "create", "apply", "delete", "resize"))
            if verb == "create" and len(kept) < 6:
                made = node.create_snapshot("name")
                kept[made.id] = bytes(model)
                assert node.holds_snapshot(made.id)
                change(node, model, chance)
            elif verb == "apply" and kept:
                id = chance.choice(sorted(kept))
                node.apply_snapshot(id)
                model = bytearray(kept[id])
                assert node.size == len(model) and node.holds_snapshot(id)
                change(node, model, chance)
            elif verb == "delete" and kept:
                id = chance.choice(sorted(kept))
                node.delete_snapshot("name", id)
                del kept[id]
            elif verb == "resize" and resizable:
                size = chance.randrange(512 * K, 2 * M, 512)
                node.truncate(size)
                model = bytearray(model[:size].ljust(size, b"\0"))
            assert node.pread(0, node.size) == model
            assert all(kept[id] == model for id in kept if node.holds_snapshot(id))
        assert check_theirs(path) == 0
        assert read_theirs(path) == model
        for id, content in kept.items():
            assert content_of(path, id)[: len(content)] == content
        if kept and chance.random() < 0.3:
            id = chance.choice(sorted(kept))
            tool("qemu-img", "snapshot", "-a", id, path)
            model = bytearray(kept[id])
            assert check_theirs(path) == 0


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    """What a snapshot took is used again by the next ones."""
    path = tmp_path / "image"
    make(path, 64 * M, "cluster_size=4k")
    sizes = []
    with open_image(path) as node:
        node.pwrite(0, b"d" * 8 * M)
        for _round in range(12):
            node.create_snapshot("s")
            node.pwrite(4 * M, b"e" * 64 * K)
            node.delete_snapshot("s")
            sizes.append(node.file.size)
    assert max(sizes[4:]) <= max(sizes[:4])
    assert check_theirs(path) == 0


def test_vm_state_and_extra_data(tmp_path: Path) -> None:
    """Size, clock and icount are kept when the table is written anew, and so is extra data that nobody knows; the VM state
    behind the end of the disk goes where the L1 table goes."""
    path = tmp_path / "image"
    make(path, M, "cluster_size=4k")
    reach = 4 * K * 512
    with open_image(path) as node:
        node.pwrite(0, b"d" * 64 * K)
        node._size = reach + 64 * K  # as an emulator does: behind the disk, from the next L2 table on
        grow_l1(node, 2)
        node.pwrite(reach, b"v" * 64 * K)
        node._size = M
        node.create_snapshot("state", Snapshot("", "", 5 << 32, 1, 2000, 3 * 10**9, 77))
        node.pwrite(0, b"e" * 64 * K)
    raw = bytearray(path.read_bytes())
    at = struct.unpack_from(">Q", raw, 64)[0]
    assert struct.unpack_from(">I", raw, at + 36)[0] == 24
    long = raw[at : at + 36] + struct.pack(">I", 32) + raw[at + 40 : at + 64] + b"whatever" + raw[at + 64 : at + 70]
    raw[at : at + len(long)] = long
    path.write_bytes(raw)
    with open_image(path) as node:
        node.create_snapshot("other")
        node.apply_snapshot("state")
        node.delete_snapshot("other")
        listed = node.snapshots()
        stored = read_snapshots(node)[0]
        index = node.tables.l1[1] & 0x00FFFFFFFFFFFE00
        assert index
        node._size = reach + 64 * K
        assert node.pread(reach, 64 * K) == b"v" * 64 * K
        node._size = M
    assert [(s.id, s.name, s.vm_state_size, s.date_sec, s.date_nsec, s.vm_clock_nsec, s.icount) for s in listed] == [
        ("1", "state", 5 << 32, 1, 2000, 3 * 10**9, 77)
    ]
    assert stored[0].extra[24:] == b"whatever"
    assert check_theirs(path) == 0
    assert tool("qemu-img", "snapshot", "-l", path).splitlines()[-1].split()[1:4] == ["state", "20", "GiB"]


@pytest.mark.parametrize("verb", ["create", "apply", "delete", "apply a longer one"])
@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=64k,compat=0.10"])
def test_crash(tmp_path: Path, verb: str, options: str) -> None:
    """After a crash at any request the image is clean but for leaks, and the disk and each snapshot are the old or the new."""
    chance = random.Random(verb + options)
    path, crashed = tmp_path / "image", tmp_path / "crashed"
    make(path, M, options)
    with open_image(path) as node:
        node.pwrite(0, chance.randbytes(300 * K))
        node.create_snapshot("s")
        if verb == "apply a longer one" and node.header.version > 2:
            node.truncate(M // 2)
        node.pwrite(100 * K, chance.randbytes(300 * K))
        node.write_compressed(448 * K, b"c" * node.cluster_size)
        node.create_snapshot("t")
        node.pwrite(200 * K, chance.randbytes(100 * K))
    before = path.read_bytes()

    def state(of: Path) -> tuple[object, ...]:
        with open_image(of, writable=False) as found:
            ids = [(entry.id, entry.name) for entry in found.snapshots()]
            return (found.pread(0, found.size), *((id, name, content_of(of, id)) for id, name in ids))

    old = state(path)
    with Recorder(path) as file:
        with open_over(file) as node:
            file.log.clear()
            if verb == "create":
                node.create_snapshot("new")
            elif verb == "delete":
                node.delete_snapshot("s")
            else:
                node.apply_snapshot("s")
        log = list(file.log)
    new = state(path)
    assert check_theirs(path) == 0
    seen = set()
    for position in range(len(log) + 1):
        for orderly in (True, False, False):
            crashed.write_bytes(after_crash(before, log, position, chance, orderly))
            assert check_theirs(crashed) in (0, 3), (position, log[position - 1])
            now = state(crashed)
            assert now in (old, new), position
            seen.add(now == new)
    assert seen == {True, False}


def test_a_failure_changes_nothing(tmp_path: Path) -> None:
    """No refcount can hold another user: the image goes on as before."""
    path = tmp_path / "image"
    make(path, M, "refcount_bits=1")
    with open_image(path) as node:
        node.pwrite(0, b"a" * 128 * K)
        size = node.file.size
        with pytest.raises(Error, match="Invalid argument"):
            node.create_snapshot("s")
        assert node.snapshots() == [] and node.file.size == size
        node.pwrite(64 * K, b"b" * 128 * K)
        assert node.pread(0, 192 * K) == b"a" * 64 * K + b"b" * 128 * K
    assert check_theirs(path) == 0


def damaged(tmp_path: Path, offset: int, data: bytes, table: bool) -> Path:
    path = tmp_path / "image"
    make(path, M)
    with open_image(path) as node:
        node.pwrite(0, b"d" * 100 * K)
        node.create_snapshot("s")
        node.pwrite(0, b"e" * 100 * K)
    raw = bytearray(path.read_bytes())
    entry = struct.unpack_from(">Q", raw, 64)[0]
    base = entry if table else struct.unpack_from(">Q", raw, entry)[0]
    raw[base + offset : base + offset + len(data)] = data
    path.write_bytes(raw)
    return path


DAMAGE = {
    "L1 table nowhere": (0, struct.pack(">Q", 1 << 50), True),
    "L1 table unaligned": (0, struct.pack(">Q", 12345), True),
    "L1 table huge": (8, struct.pack(">I", 0xFFFFFFFF), True),
    "L1 table empty": (8, struct.pack(">I", 0), True),
    "L1 table is the header": (0, bytes(8), True),
    "ID and name huge": (12, b"\xff\xff\xff\xff", True),
    "extra data huge": (36, b"\xff\xff\xff\xff", True),
    "extra data odd": (36, struct.pack(">I", 13), True),
    "disk huge": (48, b"\xff" * 8, True),
    "L2 table unaligned": (0, struct.pack(">Q", 0x10200), False),
    "L2 table nowhere": (0, struct.pack(">Q", 1 << 50), False),
    "L2 table is the L1 table": (0, struct.pack(">Q", 3 << 16), False),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_named_error(tmp_path: Path, kind: str) -> None:
    """Whatever the table says, each verb ends, and raises nothing but our errors."""
    raw = damaged(tmp_path, *DAMAGE[kind]).read_bytes()
    path = tmp_path / "copy"
    for verb in ("create", "apply", "delete", "load"):
        path.write_bytes(raw)
        try:
            with open_image(path, writable=verb != "load") as node:
                if verb == "create":
                    node.create_snapshot("x")
                elif verb == "apply":
                    node.apply_snapshot("s")
                elif verb == "delete":
                    node.delete_snapshot("s")
                else:
                    node.load_snapshot(name="s")
                    node.pread(0, min(node.size, M))
        except (Error, OSError):
            continue


def test_fuzz(tmp_path: Path) -> None:
    """Random bytes in the snapshot table, the L1 table of a snapshot and refcounts."""
    chance = random.Random(7)
    whole = damaged(tmp_path, 0, b"", True).read_bytes()
    path = tmp_path / "copy"
    for _round in range(120):
        raw = bytearray(whole)
        for _byte in range(chance.randrange(1, 4)):
            place = chance.choice((struct.unpack_from(">Q", whole, 64)[0] + chance.randrange(72), 3 * 65536 + chance.randrange(8), chance.randrange(len(raw))))
            raw[min(place, len(raw) - 1)] = chance.randrange(256)
        path.write_bytes(raw)
        try:
            with open_image(path) as node:
                chance.choice((node.create_snapshot, node.apply_snapshot, node.delete_snapshot))("s")
        except (Error, OSError):
            continue


def test_loading_needs_an_image_open_for_reading(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, M)
    with open_image(path) as node:
        node.create_snapshot("s")
        with pytest.raises(Error, match="not readonly"):
            node.load_snapshot(name="s")
    with open_image(path, writable=False) as node:
        with pytest.raises(Error, match="Can't find snapshot"):
            node.load_snapshot(id="1", name="t")
        with pytest.raises(Error):
            node.create_snapshot("t")
        assert isinstance(node, Qcow2)
