# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""qcow2's persistent dirty bitmaps: against a model and qemu's own reading, across crashes, and of damaged images."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import time
from pathlib import Path

import pytest

from conformance.recorder import Recorder, after_crash
from diskwright.bitmaps import Bitmap
from diskwright.errors import Error
from diskwright.formats.qcow2 import Qcow2
from qcow2_images import check_theirs, make, open_image, open_over, qemu_io, tool

K = 1024
M = 1024 * K


def dirty(bitmap: Bitmap) -> set[int]:
    """The numbers of the bits that are set."""
    grain = bitmap.granularity
    return {number for offset, length in bitmap.runs() for number in range(offset // grain, -(-(offset + length) // grain))}


def bits_of(path: Path, name: str) -> set[int]:
    """What we read of a bitmap that nobody uses."""
    with open_image(path, writable=False) as node:
        return dirty(node.bitmaps().usable(name))


def exported(path: Path, name: str, granularity: int) -> set[int]:
    """What qemu-nbd says that a bitmap has."""
    socket = path.with_name(path.name + ".socket")
    server = subprocess.Popen(["qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", str(socket), "-B", name, str(path)])
    try:
        for _attempt in range(400):
            if socket.exists():
                break
            time.sleep(0.02)
        option = "driver=nbd,server.type=unix,server.path=%s,x-dirty-bitmap=qemu:dirty-bitmap:%s" % (socket, name)
        extents = json.loads(tool("qemu-img", "map", "--output=json", "--image-opts", option))
    finally:
        server.terminate()
        server.wait()
    found: set[int] = set()
    for extent in extents:
        if not extent["data"]:
            found.update(range(extent["start"] // granularity, -(-(extent["start"] + extent["length"]) // granularity)))
    return found


class Model:
    """A bitmap as a set of numbers."""

    def __init__(self, granularity: int) -> None:
        self.granularity = granularity
        self.enabled = True
        self.bits: set[int] = set()

    def mark(self, offset: int, length: int) -> None:
        if self.enabled:
            self.bits.update(range(offset // self.granularity, -(-(offset + length) // self.granularity)))


@pytest.mark.parametrize("options", ["", "cluster_size=512", "cluster_size=2M", "cluster_size=4k,refcount_bits=1"])
def test_model(tmp_path: Path, options: str) -> None:
    """Random writes, sessions, sizes and changes of bitmaps, ours and qemu-io's, against sets."""
    chance = random.Random(options)
    path = tmp_path / "image"
    size = 5 * M + 512
    make(path, size, options)
    models: dict[str, Model] = {}
    for step in range(16):
        with open_image(path) as node:
            bitmaps = node.bitmaps()
            assert [bitmap.name for bitmap in bitmaps] == list(models)
            for _action in range(5):
                verb = chance.choice(("write", "write", "zero", "discard", "compressed", "add", "clear", "enable", "merge", "remove", "resize"))
                offset = chance.randrange(0, size - 200 * K, 512)
                length = chance.choice((1, 512, 4 * K, 64 * K, 200 * K))
                name = chance.choice(sorted(models)) if models else ""
                if verb == "write":
                    node.pwrite(offset, chance.randbytes(length))
                elif verb == "zero":
                    node.pwrite_zeroes(offset, length)
                elif verb == "discard":
                    node.pdiscard(offset, length)
                elif verb == "compressed":
                    offset = offset // node.cluster_size * node.cluster_size
                    length = min(node.cluster_size, size - offset)
                    node.write_compressed(offset, b"c" * length)
                elif verb == "add" and len(models) < 5:
                    name = "bitmap %d" % step
                    if name not in models:
                        granularity = chance.choice((512, 4 * K, 64 * K, 16 * M))
                        bitmaps.add(name, granularity)
                        models[name] = Model(granularity)
                elif verb == "clear" and name:
                    bitmaps.usable(name).clear()
                    models[name].bits = set()
                elif verb == "enable" and name:
                    models[name].enabled = bitmaps.usable(name).enabled = chance.random() < 0.7
                elif verb == "merge" and name:
                    other = chance.choice(sorted(models))
                    bitmaps.merge(name, bitmaps.usable(other))
                    source, target = models[other], models[name]
                    for bit in set(source.bits):
                        low = bit * source.granularity
                        high = min(low + source.granularity, size)
                        target.bits.update(range(low // target.granularity, -(-high // target.granularity)))
                elif verb == "remove" and name and chance.random() < 0.3:
                    bitmaps.remove(name)
                    del models[name]
                elif verb == "resize":
                    size = chance.randrange(M, 8 * M, 512)
                    node.truncate(size)
                    for model in models.values():
                        model.bits = {bit for bit in model.bits if bit * model.granularity < size}
                if verb in ("write", "zero", "discard", "compressed"):
                    for model in models.values():
                        model.mark(offset, length)
                for name, model in models.items():
                    assert dirty(bitmaps.usable(name)) == model.bits, (verb, name)
        assert check_theirs(path) == 0
        for name, model in models.items():
            assert bits_of(path, name) == model.bits
        if models and step % 4 == 3:
            name = chance.choice(sorted(models))
            assert exported(path, name, models[name].granularity) == models[name].bits
            qemu_io(path, "write 100k 70k")
            for model in models.values():
                model.mark(100 * K, 70 * K)


def test_while_it_is_written_it_is_in_use(tmp_path: Path) -> None:
    """In the file a bitmap is in use from the open on; a process that is killed leaves it so, a close does not."""
    path, killed = tmp_path / "image", tmp_path / "killed"
    make(path, M)
    with open_image(path) as node:
        node.bitmaps().add("x")
        node.bitmaps().add("y", enabled=False)
    with open_image(path) as node:
        killed.write_bytes(path.read_bytes())
        node.pwrite(0, b"x")
    for image, flags in ((path, [["auto"], []]), (killed, [["in-use", "auto"], ["in-use"]])):
        shown = json.loads(tool("qemu-img", "info", "--output=json", image))["format-specific"]["data"]["bitmaps"]
        assert [bitmap["flags"] for bitmap in shown] == flags
        with open_image(image, writable=False) as node:
            assert node.format_specific()["bitmaps"] == shown
        assert check_theirs(image) == 0
    assert bits_of(path, "x") == {0} and bits_of(path, "y") == set()
    with open_image(killed) as node:
        with pytest.raises(Error, match="Bitmap 'x' is inconsistent and cannot be used"):
            node.truncate(2 * M)
        node.pwrite(0, b"x")
        node.bitmaps().remove("x")
        node.bitmaps().remove("y")
    assert check_theirs(killed) == 0
    assert "bitmaps" not in tool("qemu-img", "info", killed)


def test_bitmaps_that_another_program_forgot(tmp_path: Path) -> None:
    """Without the autoclear bit they do not count; the image says so, and loses them when it is written."""
    path = tmp_path / "image"
    make(path, M)
    with open_image(path) as node:
        node.bitmaps().add("x")
    raw = bytearray(path.read_bytes())
    raw[95] = 0
    path.write_bytes(raw)
    with open_image(path, writable=False) as node:
        assert "lacking bitmap support" in node.warnings[0] and not node.bitmaps().all
    with open_image(path) as node:
        assert node.warnings
    with open_image(path) as node:
        assert not node.warnings
        node.bitmaps().add("x")
    assert bits_of(path, "x") == set() and check_theirs(path) == 3


@pytest.mark.parametrize("verb", ["add", "write", "clear", "remove one", "remove all", "resize", "snapshot"])
def test_crash(tmp_path: Path, verb: str) -> None:
    """After a crash at any request the image is clean but for leaks; a bitmap is in use, or holds what is true."""
    chance = random.Random(verb)
    path, crashed = tmp_path / "image", tmp_path / "crashed"
    make(path, 64 * M, "cluster_size=512")
    with open_image(path) as node:
        node.bitmaps().add("x", 512)
        node.bitmaps().add("y", 4096)
        node.pwrite(0, b"x" * 100 * K)
        node.pwrite(40 * M, b"x" * 2 * K)
    before = path.read_bytes()
    old = {name: bits_of(path, name) for name in "xy"}
    with Recorder(path) as file:
        with open_over(file) as node:
            opened = len(file.log)
            bitmaps = node.bitmaps()
            if verb == "add":
                bitmaps.add("z")
            elif verb == "write":
                node.pwrite(20 * M, b"y" * 30 * K)
            elif verb == "clear":
                bitmaps.usable("x").clear()
            elif verb == "resize":
                node.truncate(200 * M)
            elif verb == "snapshot":
                node.create_snapshot("s")
            else:
                bitmaps.remove("x")
                if verb == "remove all":
                    bitmaps.remove("y")
        log = list(file.log)
    with open_image(path, writable=False) as node:
        new = {bitmap.name: dirty(bitmap) for bitmap in node.bitmaps()}
    assert check_theirs(path) == 0 and opened
    for position in range(len(log) + 1):
        for orderly in (True, False, False, False):
            crashed.write_bytes(after_crash(before, log, position, chance, orderly))
            assert check_theirs(crashed) in (0, 3), (position, log[position - 1])
            with open_image(crashed, writable=False) as node:
                for bitmap in node.bitmaps():
                    if not bitmap.inconsistent:
                        assert dirty(bitmap) in (old.get(bitmap.name), new.get(bitmap.name))
                if node.bitmaps().all and all(not bitmap.inconsistent for bitmap in node.bitmaps()) and position > opened:
                    assert {bitmap.name: dirty(bitmap) for bitmap in node.bitmaps()} in (old, new)


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, 1 << 46)
    with open_image(path) as node:
        bitmaps = node.bitmaps()
        for name, granularity, words in (
            ("x", 8192, "Too much space will be occupied by the bitmap. Use larger granularity"),
            ("n" * 1024, 0, "Name length exceeds maximum"),
            ("", 0, "Bitmap name cannot be empty"),
            ("x", 3000, "Granularity must be power of 2 and at least 512"),
            ("x", 1 << 32, "Granularity must be power of 2 and at least 512"),
        ):
            with pytest.raises(Error, match=words):
                bitmaps.add(name, granularity)
        bitmaps.add("n" * 1023, 16384)
        node.pwrite(1 << 45, b"x")
    assert len(bits_of(path, "n" * 1023)) == 1
    assert check_theirs(path) == 0


def test_an_all_ones_entry(tmp_path: Path) -> None:
    """A table entry may say that all its bits are set, without a cluster."""
    path = tmp_path / "image"
    make(path, 8 * M, "cluster_size=512")
    with open_image(path) as node:
        node.bitmaps().add("x", 512)
        offset = 0
    with open_image(path, writable=False) as node:
        offset = node.bitmaps().usable("x").stored.offset
    raw = bytearray(path.read_bytes())
    struct.pack_into(">Q", raw, offset + 8, 1)
    path.write_bytes(raw)
    assert bits_of(path, "x") == set(range(4096, 8192)) == exported(path, "x", 512)
    with open_image(path) as node:
        node.pwrite(0, b"x")
    assert bits_of(path, "x") == {0, *range(4096, 8192)} == exported(path, "x", 512)


DAMAGE = {
    "flags": (12, b"\0\0\0\x08"),
    "extra data compatible": (12, b"\0\0\0\x06"),
    "type": (16, b"\2"),
    "granularity": (17, b"\x05"),
    "table of no length": (8, bytes(4)),
    "table too long": (8, b"\0\0\0\2"),
    "table huge": (8, b"\xff\xff\xff\xff"),
    "table unaligned": (0, b"\0\0\0\0\0\0\0\xff"),
    "table nowhere": (0, b"\0\0\0\0\0\xff\0\0"),
    "extra data": (20, b"\0\0\0\x08"),
    "name huge": (18, b"\xff\xff"),
    "same name twice": (24, b"y"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_qemu_s_words(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    make(path, M)
    with open_image(path) as node:
        node.bitmaps().add("x")
        node.bitmaps().add("y")
    raw = bytearray(path.read_bytes())
    at = raw.index(struct.pack(">II", 0x23852875, 24))
    base = struct.unpack_from(">Q", raw, at + 24)[0]
    offset, data = DAMAGE[kind]
    raw[base + offset : base + offset + len(data)] = data
    path.write_bytes(raw)
    done = subprocess.run(["qemu-img", "info", str(path)], capture_output=True, text=True, check=False)
    for writable in (False, True):
        try:
            with open_image(path, writable=writable):
                said = ""
        except Error as exc:
            said = str(exc)
        assert done.stderr.strip().replace("qemu-img: Could not open '%s': " % path, "") == said


@pytest.mark.parametrize("what", ["table", "data"])
def test_a_bitmap_on_other_metadata_is_not_written(tmp_path: Path, what: str) -> None:
    """A bitmap that claims the place of the L1 table: nothing is written there."""
    path = tmp_path / "image"
    make(path, M)
    with open_image(path) as node:
        node.pwrite(0, b"d" * 64 * K)
        node.bitmaps().add("x")
        node.pwrite(0, b"e")
    with open_image(path, writable=False) as node:
        stored, l1 = node.bitmaps().usable("x").stored, node.header.l1_table_offset
    raw = bytearray(path.read_bytes())
    at = raw.index(struct.pack(">II", 0x23852875, 24))
    directory = struct.unpack_from(">Q", raw, at + 24)[0]
    struct.pack_into(">Q", raw, directory if what == "table" else stored.offset, l1)
    path.write_bytes(raw)
    table = bytes(raw[l1 : l1 + 64 * K])
    with pytest.raises(Error, match="overlaps with active L1 table|Could not read bitmap_table"):
        with open_image(path) as node:
            node.pwrite(100 * K, b"f")
    assert path.read_bytes()[l1 : l1 + 64 * K] == table


def test_fuzz(tmp_path: Path) -> None:
    """Random bytes in the directory, the extension and the tables raise nothing but our errors."""
    chance = random.Random(5)
    path = tmp_path / "image"
    make(path, M, "cluster_size=512")
    with open_image(path) as node:
        node.bitmaps().add("x", 512)
        node.bitmaps().add("yy", 4096)
        node.pwrite(0, b"x" * 100 * K)
    whole = path.read_bytes()
    extension = whole.index(struct.pack(">II", 0x23852875, 24))
    directory = struct.unpack_from(">Q", whole, extension + 24)[0]
    table = struct.unpack_from(">Q", whole, directory)[0]
    for _round in range(300):
        raw = bytearray(whole)
        for _byte in range(chance.randrange(1, 4)):
            base, length = chance.choice(((extension, 32), (directory, 64), (table, 16), (0, len(raw))))
            raw[base + chance.randrange(length)] = chance.randrange(256)
        path.write_bytes(raw)
        try:
            with open_image(path) as node:
                assert isinstance(node, Qcow2)
                for bitmap in list(node.bitmaps()):
                    if not bitmap.inconsistent:
                        dirty(bitmap)
                        chance.choice((bitmap.clear, lambda: None))()
                node.pwrite(chance.randrange(M // 2), b"x" * K)
                if chance.random() < 0.5 and node.bitmaps().all:
                    node.bitmaps().remove(node.bitmaps().all[0].name)
        except (Error, OSError):
            continue
