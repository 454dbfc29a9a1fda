# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The file protocol: holes, zeroes, preallocation, direct I/O, and what goes wrong with files."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest

from diskwright.errors import Error, OptionError, ReadOnly
from diskwright.extent import ALLOCATED, DATA, OFFSET_VALID, ZERO
from diskwright.graph import open_image
from diskwright.node import OpenFlags, cache_flags
from diskwright.protocols.file import File, FileOptions
from diskwright.protocols.file.attributes import set_extent_size_hint, set_nocow
from diskwright.protocols.file.preallocate import fallocate
from side_by_side import same_space

K = 1024
M = 1024 * K
BLOCK = 64 * K  # whole file system blocks everywhere

WRITABLE = OpenFlags(writable=True, resize=True, unmap=True)
MODES = ("writeback", "none", "writethrough", "directsync", "unsafe")


def qemu(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(arg) for arg in args], capture_output=True, text=True, timeout=60, check=False)


def file(path: Path, flags: Optional[OpenFlags] = None, **options: Any) -> File:
    return File(FileOptions.from_mapping({"filename": str(path), **options}), flags or WRITABLE)


@contextmanager
def mounted(kind: str, where: Path, options: str = "") -> Iterator[Path]:
    """A file system in memory at `where`; needs root, as the whole suite has in CI."""
    where.mkdir()
    subprocess.run(["mount", "-t", kind, *(["-o", options] if options else []), kind, str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


@pytest.fixture(params=["disk", "tmpfs", "ramfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Directories with and without: zeroing of ranges, holes, direct I/O."""
    if request.param == "disk":
        yield tmp_path
    else:
        with mounted(request.param, tmp_path / "mnt") as where:
            yield where


def modes(place: Path) -> tuple[str, ...]:
    """The cache modes that this place allows."""
    (place / "probe").touch()
    try:
        os.close(os.open(place / "probe", os.O_RDWR | os.O_DIRECT))
    except OSError as exc:
        assert exc.errno == errno.EINVAL
        return tuple(mode for mode in MODES if not cache_flags(mode).get("direct"))
    return MODES


def test_random_requests_against_a_model(place: Path) -> None:
    for mode in modes(place):
        chance = random.Random(mode)
        path = place / mode
        path.write_bytes(b"")
        model = bytearray()
        flags = WRITABLE.but(**cache_flags(mode))
        node = file(path, flags)
        assert (node.request_alignment > 1) == bool(flags.direct)
        for _step in range(300):
            offset = chance.choice((chance.randrange(3 * BLOCK), chance.randrange(48) * 4096, len(model)))
            length = chance.choice((1, chance.randrange(1, 9000), 4096, chance.randrange(1, 30) * 512))
            verb = chance.choice(("write", "write", "read", "zero", "unmap", "discard", "truncate", "reopen", "flush"))
            end = offset + length
            if verb in ("write", "zero", "unmap"):
                model.extend(bytes(max(0, end - len(model))))
            if verb == "write":
                model[offset:end] = data = chance.randbytes(length)
                node.pwrite(offset, data)
            elif verb in ("zero", "unmap"):
                model[offset:end] = bytes(length)
                node.pwrite_zeroes(offset, length, unmap=verb == "unmap")
            elif verb == "discard":
                end = min(end, len(model))
                if offset < end:  # a hole, or left alone where there are none
                    node.pdiscard(offset, end - offset)
                    found = node.pread(offset, end - offset)
                    assert found in (bytes(end - offset), model[offset:end])
                    model[offset:end] = found
            elif verb == "truncate":
                if chance.random() < 0.2:
                    node.truncate(offset)
                    del model[offset:]
                    model.extend(bytes(offset - len(model)))
            elif verb == "reopen":
                node.close()
                assert path.read_bytes() == model
                node = file(path, flags)
            elif verb == "flush":
                node.flush()
            else:
                assert node.pread(offset, length) == bytes(model[offset:end]).ljust(length, b"\0")
            assert node.size == len(model)
            _check_status(node, model)
        node.close()
        assert path.read_bytes() == model


def _check_status(node: File, model: bytearray) -> None:
    for extent in node.block_status(0, len(model)):
        assert extent.host is node and extent.host_offset == extent.offset
        assert extent.status in (DATA | OFFSET_VALID | ALLOCATED, ZERO | OFFSET_VALID | ALLOCATED)
        if extent.status & ZERO:
            assert not any(model[extent.offset : extent.offset + extent.length])


@pytest.mark.parametrize("direct", [False, True])
def test_threads_that_grow_a_file_together(tmp_path: Path, direct: bool) -> None:
    path = tmp_path / "file"
    path.touch()
    length = 3000  # of no alignment, so that every padding meets somebody's data
    with file(path, WRITABLE.but(direct=direct)) as node:

        def work(own: int) -> None:
            for turn in range(own, 160, 8):
                node.pwrite(turn * length, bytes([turn + 1]) * length)

        threads = [threading.Thread(target=work, args=(own,)) for own in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert node.size == 160 * length
    assert path.read_bytes() == b"".join(bytes([turn + 1]) * length for turn in range(160))


def sparse(path: Path, layout: str) -> bytes:
    """A file of `layout`: a letter is a block of it, a dot a hole."""
    with open(path, "wb") as out:
        out.truncate(len(layout) * BLOCK)
        for i, letter in enumerate(layout):
            if letter != ".":
                out.seek(i * BLOCK)
                out.write(letter.encode() * BLOCK)
    return path.read_bytes()


@pytest.mark.parametrize("layout", ["", ".", "a", "a.", ".a", "..aab..c", "a.b.c.d.e", "." * 20 + "z" + "." * 20])
@pytest.mark.parametrize("writable", [False, True])
def test_holes(tmp_path: Path, layout: str, writable: bool) -> None:
    path = tmp_path / "file"
    sparse(path, layout)
    with file(path, OpenFlags(writable=writable)) as node:
        for first in range(len(layout)):
            for last in range(first + 1, len(layout) + 1):
                found = "".join(
                    ("." if extent.status & ZERO else "#") * (extent.length // BLOCK)
                    for extent in node.block_status(first * BLOCK, (last - first) * BLOCK)
                )
                assert found == "".join("." if letter == "." else "#" for letter in layout[first:last])
        assert node.disk_size() == sum(letter != "." for letter in layout) * BLOCK
    theirs = qemu("qemu-img", "map", "--output=json", "-f", "raw", path).stdout
    assert theirs.count('"zero": true') == sum(1 for part in layout.replace("a", "#").split("#") if "." in part) if not layout.strip("a.") else True


def test_a_sparse_file_costs_one_seek_an_extent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with open(path, "wb") as out:
        out.truncate(1 << 40)
        for i in range(8):
            out.seek(i << 36)
            out.write(b"x" * BLOCK)
    calls = counted(monkeypatch, "lseek")
    with open_image(str(path), "raw") as node:
        for start in range(0, node.size, 1 << 28):
            node.resolve(start, 1 << 28, True)
    assert len(calls) <= 18  # 4096 windows, 16 extents


def test_holes_that_others_make_meanwhile(tmp_path: Path) -> None:
    """What was remembered is never wrong about what reads as zeroes."""
    path = tmp_path / "file"
    sparse(path, "aaaa....")
    with file(path) as node:
        node.block_status(0, 8 * BLOCK)
        os.pwrite(node.fileno(), b"x", 6 * BLOCK)  # as a parent does that got the place from an Alloc
        assert [extent.status & ZERO for extent in node.block_status(4 * BLOCK, 4 * BLOCK)] == [ZERO, 0, ZERO]
        os.truncate(path, BLOCK)
        assert node.pread(0, 8 * BLOCK) == b"a" * BLOCK + bytes(7 * BLOCK)
        assert sum(extent.length for extent in node.block_status(0, 8 * BLOCK)) == 8 * BLOCK


def test_space_taken_by_zeroes_and_discards(tmp_path: Path) -> None:
    """The same space as qemu-io leaves."""
    for unmap, theirs in ((False, "write -z"), (True, "write -z -u"), (True, "discard")):
        paths = [tmp_path / name for name in ("ours", "theirs")]
        for path in paths:
            sparse(path, "aa..aaaa")
            if path.name == "theirs":
                assert qemu("qemu-io", "-f", "raw", "-d", "unmap", "-c", "%s %d %d" % (theirs, BLOCK, 5 * BLOCK), path).returncode == 0
            else:
                with file(path) as node:
                    if theirs == "discard":
                        node.pdiscard(BLOCK, 5 * BLOCK)
                    else:
                        node.pwrite_zeroes(BLOCK, 5 * BLOCK, unmap)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert same_space(*paths)


def test_discard_needs_leave(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = sparse(path, "aaaa")
    with file(path, WRITABLE.but(unmap=False)) as node:
        node.pdiscard(0, 2 * BLOCK)
        assert path.read_bytes() == before
        node.pwrite_zeroes(0, BLOCK, unmap=True)
        assert node.disk_size() == 4 * BLOCK


# -- creation and resize ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
@pytest.mark.parametrize("size", [0, 1, 4096, 1000000])
def test_creation_is_qemus(tmp_path: Path, mode: str, size: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        path.write_bytes(b"was here before" * 1000)
    File.create_file(str(ours), File.create_options(size=-(-size // 512) * 512, preallocation=mode), WRITABLE)
    assert qemu("qemu-img", "create", "-q", "-f", "raw", "-o", "preallocation=" + mode, theirs, size).returncode == 0
    assert ours.read_bytes() == theirs.read_bytes()
    assert same_space(ours, theirs)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_growing(tmp_path: Path, mode: str, direct: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10000)
    with file(path, WRITABLE.but(direct=direct)) as node:
        node.truncate(3 * M + 1234, mode)
        assert node.size == 3 * M + 1234
        assert (node.disk_size() or 0) > 3 * M or mode == "off"
        assert node.pread(0, 20000) == b"x" * 10000 + bytes(10000)
        with pytest.raises(Error, match="Preallocation can't be used for shrinking files") if mode != "off" else _nothing():
            node.truncate(5000, mode)
        node.truncate(5000)
        assert node.size == 5000
    assert path.read_bytes() == b"x" * 5000


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("mode", "text"),
    [("falloc", "Could not preallocate new data: No space left on device"), ("full", "Could not write zeros for preallocation: No space left on device")],
)
def test_no_space_for_preallocation(tmp_path: Path, mode: str, text: str) -> None:
    with mounted("tmpfs", tmp_path / "mnt", "size=1m") as where:
        path = where / "image"
        with pytest.raises(Error) as caught:
            File.create_file(str(path), File.create_options(size=2 * M, preallocation=mode), WRITABLE)
        assert str(caught.value) == text and caught.value.errno == errno.ENOSPC
        assert path.stat().st_size == 0
        theirs = qemu("qemu-img", "create", "-q", "-f", "raw", "-o", "preallocation=" + mode, path, "2M")
        assert theirs.stderr == "qemu-img: %s: %s\n" % (path, text)
        path.write_bytes(b"x" * 300 * K)
        with file(path) as node:
            with pytest.raises(Error, match="^%s$" % text):
                node.truncate(4 * M, mode)
            assert node.size == 300 * K
        assert path.read_bytes() == b"x" * 300 * K


def test_no_space_half_way(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "mnt", "size=1m") as where:
        path = where / "image"
        path.touch()
        os.truncate(path, 4 * M)
        with file(path) as node:
            with pytest.raises(OSError) as caught:
                node.pwrite(0, b"x" * 2 * M)
            assert caught.value.errno == errno.ENOSPC
            node.pwrite_zeroes(0, 4 * M, unmap=True)
            node.pwrite(3 * M, b"room again")
            with pytest.raises(OSError) as caught:
                node.pwrite_zeroes(0, 4 * M)
            assert caught.value.errno == errno.ENOSPC
        assert path.stat().st_size == 4 * M


def test_too_large_for_the_file_system(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    program = (
        "import sys, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from diskwright.errors import Error; from diskwright.node import OpenFlags; from diskwright.protocols.file import File, FileOptions\n"
        "node = File(FileOptions.from_mapping({'filename': sys.argv[1]}), OpenFlags(writable=True))\n"
        "for mode in ('off', 'falloc', 'full'):\n"
        "    try: node.truncate(1 << 30, mode)\n"
        "    except Error as exc: print(exc.errno, exc, node.size)\n"
        "try: node.pwrite((1 << 20) - 1, b'xy')\n"
        "except OSError as exc: print(exc.errno)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "%d Could not resize file: File too large 0" % errno.EFBIG,
        "%d Could not preallocate new data: File too large 0" % errno.EFBIG,
        "%d Could not resize file: File too large 0" % errno.EFBIG,
        str(errno.EFBIG),
    ]
    with file(path) as node, pytest.raises(Error, match="^Required too big image size"):
        node.truncate(1 << 63)


@pytest.mark.parametrize("mode", ["metadata", "x"])
def test_preallocation_that_files_do_not_know(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "file"
    with pytest.raises(OptionError) as caught:
        File.create_file(str(path), File.create_options.from_mapping({"size": "1M", "preallocation": mode}), WRITABLE)
    theirs = qemu("qemu-img", "create", "-q", "-f", "raw", "-o", "preallocation=" + mode, path, "1M")
    assert theirs.stderr == "qemu-img: %s: %s\n" % (path, caught.value)


def test_attributes_are_asked_for_and_never_in_the_way(place: Path) -> None:
    path = place / "file"
    File.create_file(str(path), File.create_options.from_mapping({"size": "1M", "nocow": "on", "extent_size_hint": "3k"}), WRITABLE)
    assert path.stat().st_size == M
    with open(path, "r+b") as out:
        set_nocow(out.fileno())
        set_extent_size_hint(out.fileno(), 1 << 40)
    with file(path) as node:
        assert node.format_specific() in ({}, {"extent-size-hint": 3072})


def test_fallocate_reports_what_matters(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with open(path, "r+b") as out:
        assert fallocate(out.fileno(), 0, 0, 8192) and path.stat().st_size == 8192
        assert not fallocate(out.fileno(), 0x80, 0, 8192)  # no such mode
        with pytest.raises(OSError) as caught:
            fallocate(out.fileno(), 0, 0, 1 << 62)
        assert caught.value.errno == errno.EFBIG


# -- names, permissions, kinds of files ---------------------------------------------------------------------------------


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("dir").mkdir()
    Path("image").write_bytes(bytes(M))
    Path("loop").symlink_to("loop")
    os.mkfifo("fifo")
    return tmp_path


NAMES = ["missing", "dir", "loop", "a" * 300, "image/x", "", "file:missing", "file:", "host_device:image", "host_device:missing", "nosuch:x", "/dev/tty"]
JSON = [
    '{"driver":"file"}',
    '{"driver":"raw","file":{"driver":"file"}}',
    '{"driver":"raw","file":{"driver":"file","filename":"image","foo":1}}',
    '{"driver":"raw","file":{"driver":"file","filename":"image","aio":"x"}}',
    '{"driver":"raw","file":{"driver":"file","filename":"image","aio":"native"}}',
    '{"driver":"raw","file":{"driver":"file","filename":"image","aio-max-batch":"x"}}',
    '{"driver":"raw","file":{"driver":"file","filename":"image","locking":"x"}}',
    '{"driver":"raw","file":{"driver":"file","filename":"image","pr-manager":"x"}}',
    '{"driver":"raw","file":{"driver":"file","filename":"image","drop-cache":"x"}}',
    '{"driver":"raw","file":{"driver":"file","filename":"image","x-check-cache-dropped":"x"}}',
    '{"driver":"raw","file":{"driver":"file","filename":"/dev/null"}}',
    '{"driver":"raw","file":{"driver":"host_device","filename":"image"}}',
]


@pytest.mark.parametrize("name", NAMES + ["json:" + text for text in JSON])
def test_names_that_cannot_be_opened(zoo: Path, name: str) -> None:
    with pytest.raises(Error) as caught:
        open_image(name)
    theirs = qemu("qemu-img", "map", name)
    assert theirs.returncode == 1 and theirs.stderr == "qemu-img: %s\n" % caught.value


@pytest.mark.parametrize("name", ["missing", "dir", "loop", "image/x"])
def test_names_that_cannot_be_opened_for_writing(zoo: Path, name: str) -> None:
    with pytest.raises(Error) as caught:
        open_image(name, "raw", OpenFlags(writable=True, resize=True))
    theirs = qemu("qemu-img", "resize", "-f", "raw", name, "2M")
    assert theirs.returncode == 1 and theirs.stderr == "qemu-img: %s\n" % caught.value


@pytest.mark.parametrize("name", ["dir", "loop", "a" * 300, "image/x", "nosuch/x", "fifo"])
def test_names_that_cannot_be_created(zoo: Path, name: str) -> None:
    with pytest.raises(Error) as caught:
        File.create_file(name, File.create_options(size=M), WRITABLE)
    theirs = qemu("qemu-img", "create", "-q", "-f", "raw", name, "1M")
    assert theirs.returncode == 1 and theirs.stderr == "qemu-img: %s: %s\n" % (name, caught.value)


@pytest.mark.parametrize(
    "options",
    ['"aio":"io_uring"', '"aio":"threads"', '"aio-max-batch":"16"', '"locking":"on"', '"drop-cache":"off"', '"x-check-cache-dropped":true'],
)
def test_options_that_open(zoo: Path, options: str) -> None:
    name = 'json:{"driver":"raw","file":{"driver":"file","filename":"image",%s}}' % options
    with open_image(name) as node:
        assert node.size == M and node.filename == "image"
    assert "image: image\n" in qemu("qemu-img", "info", name).stdout


def test_a_fifo_keeps_nobody_waiting(zoo: Path) -> None:
    for writable in (False, True):
        with pytest.raises(Error, match="^Could not open 'fifo': 'file' driver requires 'fifo' to be a regular file$"):
            open_image("fifo", "raw", OpenFlags(writable=writable))


def test_names_of_any_bytes(zoo: Path) -> None:
    for name in (b"caf\xc3\xa9", b"\xff\xfe", b"a\nb", b"per%cent", b" "):
        text = os.fsdecode(name)
        Path(text).write_bytes(bytes(1024))
        with open_image(text) as node:
            assert node.size == 1024
    with pytest.raises(Error):
        open_image("nul\0byte")


def as_nobody(attempts: Callable[[], None]) -> str:
    """What a function prints when nobody, of no group, calls it (in a child, with all that is imported here)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with open(writer, "w") as out, redirect_stdout(out):
                attempts()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as found:
        text = found.read()
    os.waitpid(child, 0)
    return text


def test_permission_denied(zoo: Path) -> None:
    zoo.chmod(0o755)
    Path("image").chmod(0o444)
    Path("secret").touch(0o600)

    def attempt(call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
            print("done")
        except Error as exc:
            print(exc)

    def attempts() -> None:
        attempt(open_image, "image", "raw")
        attempt(open_image, "image", "raw", OpenFlags(writable=True))
        attempt(open_image, "secret", "raw")
        attempt(File.create_file, "new", File.create_options(size=512), OpenFlags())
        attempt(File.create_file, "image", File.create_options(size=512), OpenFlags())

    attempts()  # as root: all that will be imported is
    Path("new").unlink()
    assert as_nobody(attempts).splitlines() == [
        "done",
        "Could not open 'image': Could not open 'image': Permission denied",
        "Could not open 'secret': Could not open 'secret': Permission denied",
        "Could not create 'new': Permission denied",
        "Could not create 'image': Permission denied",
    ]
    theirs = qemu("setpriv", "--reuid=65534", "--clear-groups", "qemu-img", "resize", "-f", "raw", "image", "2M")
    assert theirs.stderr == "qemu-img: Could not open 'image': Could not open 'image': Permission denied\n"


def test_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted("tmpfs", tmp_path / "mnt", "size=2m") as where:
        (where / "image").write_bytes(bytes(M))
        subprocess.run(["mount", "-o", "remount,ro", str(where)], check=True)
        monkeypatch.chdir(where)
        with open_image("image", "raw") as node:
            assert node.read_only
            with pytest.raises(ReadOnly):
                node.pwrite(0, b"x")
            with pytest.raises(ReadOnly):
                node.truncate(5)
        with pytest.raises(Error) as caught:
            open_image("image", "raw", WRITABLE)
        assert "qemu-img: %s\n" % caught.value == qemu("qemu-img", "resize", "-f", "raw", "image", "2M").stderr
        with pytest.raises(Error) as caught:
            File.create_file("new", File.create_options(size=M), WRITABLE)
        assert "qemu-img: new: %s\n" % caught.value == qemu("qemu-img", "create", "-q", "-f", "raw", "new", "1M").stderr
        monkeypatch.chdir("/")


def test_direct_io_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted("ramfs", tmp_path / "mnt") as where:
        monkeypatch.chdir(where)
        Path("image").write_bytes(bytes(M))
        with pytest.raises(Error) as caught:
            open_image("image", "raw", OpenFlags(direct=True))
        theirs = qemu("qemu-img", "convert", "-T", "none", "-f", "raw", "-O", "raw", "image", "out")
        assert theirs.stderr == "qemu-img: %s\n" % caught.value
        monkeypatch.chdir("/")


def test_direct_writing_keeps_an_odd_size(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 1000)
    with file(path, OpenFlags(writable=True, direct=True)) as node:
        assert node.size == 1000 and node.pread(990, 20) == b"x" * 10 + bytes(10)
        node.pwrite(995, b"yy")
        assert node.size == 1000 and node.pread(990, 20) == b"xxxxxyyxxx" + bytes(10)
    assert path.read_bytes() == b"x" * 995 + b"yyxxx"


def test_every_failed_open_closes_its_descriptor(zoo: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for name in (*NAMES, "fifo", "json:" + JSON[-1]):
        with pytest.raises(Error):
            open_image(name)
    with pytest.raises(Error):
        File.create_file("fifo", File.create_options(size=M), WRITABLE)
    assert os.listdir("/proc/self/fd") == before


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The calls of a function of os from now on, which is called all the same."""
    calls: list[tuple[Any, ...]] = []
    call = getattr(os, name)

    def count(*args: Any) -> Any:
        calls.append(args)
        return call(*args)

    monkeypatch.setattr(os, name, count)
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_flushes_of_the_cache_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """How often the file is synchronised: after each write, at a flush and at the end, or never."""
    path = tmp_path / "file"
    path.write_bytes(bytes(M))
    calls = counted(monkeypatch, "fdatasync")
    with open_image(str(path), "raw", OpenFlags(writable=True, **(cache_flags(mode) or {}))) as node:
        for write in (lambda: node.pwrite(0, bytes(4096)), lambda: node.pwrite_zeroes(4096, 4096), lambda: node.pwrite(9, b"x")):
            before = len(calls)
            write()
            assert len(calls) - before == (1 if mode in ("writethrough", "directsync") else 0)
        before = len(calls)
        node.flush()
        assert len(calls) - before == (0 if mode == "unsafe" else 1)
        before = len(calls)
    assert (len(calls) > before) == (mode != "unsafe")
