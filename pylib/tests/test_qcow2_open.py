# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Opening and reading qcow2 images: what is refused, in whose words, and what the features that cannot be written yet read as."""

from __future__ import annotations

import random
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from qcow2_images import check_theirs, make_theirs, open_image, qemu_io, read_theirs, tool

from diskwright.errors import Corrupt, Error
from diskwright.extent import ALLOCATED, DATA, ZERO
from diskwright.formats.qcow2 import header as layout
from diskwright.formats.qcow2.options import Qcow2Options, check_options
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags

K, M = 1 << 10, 1 << 20
INFO = OpenFlags(no_io=True, no_backing=True)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("empty") / "image"
    make_theirs(path, 1 << 30)
    return path.read_bytes()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two clusters of data; the L1 table at 0x30000, its L2 table at 0x40000."""
    path = tmp_path_factory.mktemp("filled") / "image"
    make_theirs(path, 10 * M)
    qemu_io(path, "write -P 1 0 128k")
    return path.read_bytes()


def edited(image: bytes, *edits: tuple[int, str, Any]) -> bytes:
    content = bytearray(image)
    for offset, code, value in edits:
        if code == "raw":
            content[offset : offset + len(value)] = value
        else:
            struct.pack_into(">" + code, content, offset, value)
    return bytes(content)


EDITS: list[tuple[tuple[int, str, Any], ...]] = [
    ((0, "I", 0),),
    *(((4, "I", version),) for version in (0, 1, 4)),
    *(((20, "I", bits),) for bits in (0, 8, 22, 64)),
    *(((100, "I", length),) for length in (0, 96, 104, 107, 70000)),
    ((8, "Q", 70000),),
    ((8, "Q", 1 << 63),),
    ((8, "Q", 0x300), (16, "I", 1024)),
    ((8, "Q", 65000), (16, "I", 1000)),
    ((8, "Q", 4), (16, "I", 4)),
    ((8, "Q", 0x300), (16, "I", 0)),
    ((32, "I", 3),),
    ((32, "I", 1),),
    ((32, "I", 2),),
    *(((40, "Q", offset),) for offset in (0, 0x30001, 0x1000000, 1 << 60, (1 << 64) - 65536)),
    *(((36, "I", size),) for size in (0, 1, 4 << 20, (4 << 20) + 1, 0x7FFFFFFF, 0xFFFFFFFF)),
    *(((48, "Q", offset),) for offset in (0, 0x10001, 0x1000000, 1 << 62)),
    *(((56, "I", clusters),) for clusters in (0, 128, 129, 0xFFFFFFFF)),
    ((60, "I", 65537),),
    ((60, "I", 1), (64, "Q", 0x30001)),
    *(((72, "Q", 1 << bit),) for bit in (0, 1, 2, 3, 4, 5, 20, 63)),
    ((72, "Q", 1 << 5 | 1 << 40),),
    ((72, "Q", 1 << 5 | 3),),
    ((72, "Q", 1 << 5), (0x78, "raw", b"\0\5my feature")),
    ((72, "Q", 8), (104, "B", 1)),
    ((72, "Q", 8), (104, "B", 2)),
    ((104, "B", 1),),
    ((96, "I", 7),),
    ((96, "I", 0xFFFFFFFF),),
    *(((24, "Q", size),) for size in (0, 1000, 1 << 63, (1 << 63) - 512)),
    *(((0x74, "I", length),) for length in (0x7FFFFFFF, 65536 - 0x78 + 1, 65536 - 0x78)),
    ((0x70, "I", layout.EXT_BACKING_FORMAT), (0x74, "I", 16)),
    ((0x70, "I", layout.EXT_BACKING_FORMAT), (0x74, "I", 15)),
    ((0x70, "I", layout.EXT_BITMAPS), (0x74, "I", 23), (88, "Q", 1)),
    ((0x70, "I", layout.EXT_BITMAPS), (0x74, "I", 24), (88, "Q", 1)),
    ((0x70, "I", layout.EXT_ENCRYPTION), (0x74, "I", 16)),
    ((0x70, "I", layout.EXT_ENCRYPTION), (0x74, "I", 15), (32, "I", 2)),
]


@pytest.mark.parametrize("edits", EDITS, ids=lambda edits: "-".join("%d:%s" % (edit[0], edit[2]) for edit in edits))
def test_headers(tmp_path: Path, empty: bytes, edits: tuple[tuple[int, str, Any], ...]) -> None:
    """qemu-img info and we open the same headers, and refuse the same ones in the same words."""
    path = tmp_path / "image"
    path.write_bytes(edited(empty, *edits))
    done = subprocess.run(["qemu-img", "info", "-f", "qcow2", path], capture_output=True, text=True, timeout=30, check=False)
    theirs = done.stderr.strip().replace("qemu-img: Could not open '%s': " % path, "")
    try:
        Graph().open(str(path), "qcow2", INFO).close()
    except Error as exc:
        ours = str(exc).replace("Could not open '%s': " % path, "")
    else:
        ours = ""
    assert ours == theirs


OPTION_ERRORS = [
    {"l2-cache-size": "1M", "cache-size": "512k"},
    {"refcount-cache-size": "2M", "cache-size": "1M"},
    {"l2-cache-size": "1M", "refcount-cache-size": "1M", "cache-size": "2M"},
    {"l2-cache-entry-size": "1000"},
    {"l2-cache-entry-size": "128k"},
    {"refcount-cache-size": "8000P"},
    {"overlap-check": "foo"},
    {"overlap-check.template": "foo"},
    {"overlap-check.main-header": "foo"},
    {"overlap-check.foo": "on"},
    {"lazy-refcounts": "foo"},
    {"cache-clean-interval": "99999999999"},
    {"cache-clean-interval": "abc"},
    {"pass-discard-request": "x"},
    {"foo": "bar"},
    {"encrypt.format": "luks"},
]


@pytest.mark.parametrize("options", OPTION_ERRORS, ids=str)
def test_runtime_options(tmp_path: Path, empty: bytes, options: dict[str, str]) -> None:
    path = tmp_path / "image"
    path.write_bytes(empty)
    text = "driver=qcow2,file.filename=%s,%s" % (path, ",".join("%s=%s" % pair for pair in options.items()))
    theirs = subprocess.run(["qemu-io", "--image-opts", "-c", "quit", text], capture_output=True, text=True, timeout=30, check=False).stderr.strip()
    with pytest.raises(Error) as caught:
        Graph().open(text, image_opts=True)
    assert str(caught.value).replace("Could not open '%s': " % text, "") == theirs.replace("qemu-io: can't open: ", "")


def test_overlap_check_said_twice() -> None:
    options = Qcow2Options.from_mapping({"file": "x", "overlap-check": "none", "overlap-check.template": "all"})
    with pytest.raises(Error) as caught:
        check_options(options, layout.new_header(M, 16))
    assert str(caught.value) == "Conflicting values for qcow2 options 'overlap-check' ('none') and 'overlap-check.template' ('all')"


@pytest.mark.parametrize("options", [{"lazy-refcounts": "on"}, {"discard-no-unref": "on"}], ids=str)
def test_runtime_options_of_version_3(tmp_path: Path, options: dict[str, str]) -> None:
    path = tmp_path / "image"
    make_theirs(path, M, "compat=0.10")
    test_runtime_options(tmp_path, path.read_bytes(), options)


DAMAGE = [
    ((0x30000, "Q", 1 << 63 | 0x40200),),
    ((0x40000, "Q", 1 << 63 | 0x50200),),
    ((0x40008, "Q", 1 << 63 | 0x50201),),
    ((0x40000, "Q", 1 << 62 | 0x50000),),
    ((0x40000, "Q", 1 << 62 | 0x5000000),),
    ((0x30000, "Q", 1 << 63 | 0x4000000),),
    ((0x40000, "Q", 1 << 63 | 0x5000000),),
    ((0x40000, "Q", 1 << 63 | 0x50002),),
    ((0x30000, "Q", 1 << 63 | 0x30000),),
]


@pytest.mark.parametrize("edits", DAMAGE, ids=lambda edits: hex(edits[0][2]))
@pytest.mark.parametrize("writable", [False, True])
def test_damaged_tables(tmp_path: Path, filled: bytes, edits: tuple[tuple[int, str, Any], ...], writable: bool) -> None:
    """Reading fails where QEMU's fails, in its words where it has some; the corrupt bit is set where it sets it."""
    path = tmp_path / "image"
    path.write_bytes(edited(filled, *edits))
    done = subprocess.run(
        ["qemu-io", *(() if writable else ("-r",)), "-f", "qcow2", "-c", "read 0 128k", path], capture_output=True, text=True, timeout=30, check=False
    )
    marked = path.read_bytes()[72:80]
    path.write_bytes(edited(filled, *edits))
    ours = ""
    with open_image(path, writable=writable) as node:
        try:
            content = node.pread(0, 128 * K)
        except Corrupt as exc:
            ours = str(exc)
            assert exc.errno == 5
    assert bool(ours) == (done.returncode != 0)
    if done.stderr:
        assert ours == done.stderr.strip()
    elif not ours:
        assert content == read_theirs(path)[: 128 * K]
    assert path.read_bytes()[72:80] == marked


def test_writing_finds_damage(tmp_path: Path, filled: bytes) -> None:
    for entry in (1 << 63 | 0x50200, 1 << 63 | 0x50201):
        path = tmp_path / "image"
        path.write_bytes(edited(filled, (0x40000, "Q", entry)))
        done = subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 64k", path], capture_output=True, text=True, timeout=30, check=False)
        path.write_bytes(edited(filled, (0x40000, "Q", entry)))
        node = open_image(path)
        with pytest.raises(Corrupt) as caught:
            node.pwrite(0, bytes(65536))
        assert str(caught.value) == done.stderr.strip()
        node.abandon()


def test_zero_flag_in_version_2(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make_theirs(path, 10 * M, "compat=0.10")
    qemu_io(path, "write 0 64k")
    path.write_bytes(edited(path.read_bytes(), (0x40008, "Q", 1)))
    done = subprocess.run(["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 128k", path], capture_output=True, text=True, timeout=30, check=False)
    with open_image(path, writable=False) as node, pytest.raises(Corrupt) as caught:
        node.pread(0, 128 * K)
    assert str(caught.value) == done.stderr.strip()


# -- features --------------------------------------------------------------------------------------------------------------


def test_unknown_extensions_and_fields_stay(tmp_path: Path, empty: bytes) -> None:
    """A longer header, an extension of an unknown type, and an unknown autoclear bit, which a writer clears."""
    path = tmp_path / "image"
    end = 0x78 + 0x180
    path.write_bytes(
        edited(
            empty,
            (100, "I", 128),
            (104, "raw", bytes(8) + b"unknown field..." + empty[0x70:end]),
            (end + 16, "raw", struct.pack(">II", 0x12345678, 5) + b"stays" + bytes(3) + bytes(8)),
            (88, "Q", 1 << 9 | 1 << 40),
        )
    )
    before = path.read_bytes()
    with open_image(path, writable=False) as node:
        assert node.header.extension(0x12345678) == b"stays"
    assert path.read_bytes() == before
    with open_image(path) as node:
        node.pwrite(0, b"x")
        node.header.backing_file = b"name"
        node.header.set_extension(layout.EXT_BACKING_FORMAT, b"raw")
        node.update_header()
    with Graph().open(str(path), "qcow2", INFO) as again:
        assert again.backing_filename == "name" and again.backing_format == "raw"
        assert again.header.extension(0x12345678) == b"stays"  # type: ignore[attr-defined]
        assert again.header.additional == bytes(8) + b"unknown field..."  # type: ignore[attr-defined]
        assert again.header.autoclear_features == 0  # type: ignore[attr-defined]
    (tmp_path / "name").write_bytes(bytes(M))
    assert check_theirs(path) == 0
    assert '"backing-filename": "name"' in tool("qemu-img", "info", "--output=json", path)


def test_a_dirty_image_is_repaired(tmp_path: Path, filled: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(edited(filled, (72, "Q", 1), (80, "Q", 1), (0x2000A, "H", 0), (0x20020, "H", 1)))
    with open_image(path, writable=False) as node:
        assert node.dirty and node.pread(0, 4) == b"\1\1\1\1"
    with open_image(path) as node:
        assert not node.dirty
        node.pwrite(5 * M, b"x" * M)
        assert node.pread(0, 4) == b"\1\1\1\1"
    assert check_theirs(path) == 0


@pytest.mark.parametrize("options", ["extended_l2=on", "extended_l2=on,cluster_size=16k", "data_file=%s", "data_file=%s,data_file_raw=on"])
@pytest.mark.parametrize("backed", [False, True])
def test_reading_what_qemu_io_wrote(tmp_path: Path, options: str, backed: bool) -> None:
    if backed and "raw=on" in options:
        return
    path = tmp_path / "image"
    if "%s" in options:
        options %= tmp_path / "data"
    (tmp_path / "base").write_bytes(random.Random(1).randbytes(3 * M))
    make_theirs(path, 4 * M, options + (",backing_file=base,backing_fmt=raw" if backed else ""))
    chance = random.Random(options)
    commands = []
    for _turn in range(40):
        offset = chance.randrange(4 * M // 512) * 512
        length = min(4 * M - offset, chance.randrange(1, 300) * 512)
        commands.append("%s %d %d" % (chance.choice(("write -P 5", "write -P 9", "write -z", "write -z -u", "discard")), offset, length))
    if "data_file" not in options:
        commands.insert(0, "write -c -P 3 3M 64k")
    qemu_io(path, *commands)
    with open_image(path, writable=False) as node:
        assert node.pread(0, 4 * M) == read_theirs(path)
        assert sum(extent.length for extent in node.block_status(0, 4 * M)) == 4 * M


def test_a_missing_data_file_name(tmp_path: Path, empty: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(edited(empty, (72, "Q", 4)))
    with pytest.raises(Error, match="^'data-file' is required for this image$"):
        open_image(path, writable=False)
    path.write_bytes(edited(empty, (88, "Q", 2)))
    with pytest.raises(Error, match="^data-file-raw requires a data file$"):
        open_image(path, writable=False)


def test_holes_of_preallocated_images(tmp_path: Path) -> None:
    """Where clusters have a place but the file has a hole, the image has zeroes."""
    path = tmp_path / "image"
    make_theirs(path, 64 * M, "preallocation=metadata")
    qemu_io(path, "write -P 1 8M 1M")
    with open_image(path, writable=False) as node:
        found = [(extent.offset, extent.length) for extent in node.block_status(0, 64 * M) if not extent.status & ZERO]
        assert found == [(8 * M, M)]
        assert all(extent.status & (DATA | ALLOCATED) == DATA | ALLOCATED for extent in node.block_status(0, 64 * M))


def test_snapshots_are_listed(tmp_path: Path, filled: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(filled)
    for name in ("one", "two"):
        tool("qemu-img", "snapshot", "-c", name, path)
    with open_image(path, writable=False) as node:
        assert [(s.id, s.name, s.vm_state_size, s.disk_size) for s in node.snapshots()] == [("1", "one", 0, 10 * M), ("2", "two", 0, 10 * M)]


# -- hostile images --------------------------------------------------------------------------------------------------------


def test_a_huge_empty_image_is_mapped_at_once(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make_theirs(path, 1 << 60, "cluster_size=2M")
    started = time.process_time()
    with open_image(path, writable=False) as node:
        assert [(e.offset, e.length, e.status) for e in node.block_status(0, node.size)] == [(0, 1 << 60, 0)]
    assert time.process_time() - started < 5


def test_all_tables_are_one_table(tmp_path: Path, empty: bytes) -> None:
    """Every L1 entry names the L1 table, which names itself: reading ends, with little memory."""
    path = tmp_path / "image"
    path.write_bytes(edited(empty, (0x30000, "Q", 1 << 63 | 0x30000), (0x30008, "Q", 1 << 63 | 0x30000), (24, "Q", 1 << 30)).ljust(0x40000, b"\0"))
    tracemalloc.start()
    with open_image(path, writable=False) as node:
        for offset in range(0, 1 << 30, 64 * M):
            node.pread(offset, M)
        node.block_status(0, node.size)
    assert tracemalloc.get_traced_memory()[1] < 64 * M
    tracemalloc.stop()


def test_a_refcount_table_of_nonsense(tmp_path: Path, filled: bytes) -> None:
    chance = random.Random(1)
    path = tmp_path / "image"
    for _turn in range(20):
        path.write_bytes(edited(filled, (0x10000, "raw", b"".join(chance.randbytes(7) + b"\0" for _entry in range(chance.randrange(1, 900))))))
        node = open_image(path)
        try:
            node.pwrite(4 * M, b"x" * M)
            node.flush()
        except (Error, OSError):
            pass
        finally:
            node.abandon()
