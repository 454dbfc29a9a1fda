# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Image locks: the same bytes as QEMU in every situation, and refusals in both directions."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import pytest

from diskwright.commands.create import create
from diskwright.commands.convert import convert
from diskwright.errors import Error, Locked
from diskwright.graph import Graph, open_image
from diskwright.node import ALL, CONSISTENT_READ, RESIZE, WRITE, OpenFlags
from diskwright.protocols.file import File
from diskwright.protocols.file.locking import ImageLock, bytes_held

from locks import BYTES, Watcher, held_by_others, stranger

CREATING = OpenFlags(writable=True, resize=True, perm=WRITE | RESIZE, shared=ALL & ~RESIZE)
ASKS = "Is another process using the image [%s]?"


def qemu(*args: object, cwd: Optional[Path] = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(arg) for arg in args], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with raw, qcow2 and overlay (of qcow2)."""
    for args in (("-f", "raw", "raw"), ("-f", "qcow2", "qcow2"), ("-f", "qcow2", "-b", "qcow2", "-F", "qcow2", "overlay")):
        assert qemu("qemu-img", "create", "-q", *args, "1M", cwd=tmp_path).returncode == 0
    return tmp_path


def opened(name: str, format: Optional[str] = None, **flags: bool) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        with Graph().open(name, format, OpenFlags(**flags)):
            pass

    return run


def window(directory: Path) -> None:
    with open_image('json:{"driver":"raw","size":512,"file":{"driver":"file","filename":"raw"}}'):
        pass


def created(directory: Path) -> None:
    File.create_file("raw", File.create_options(size=1 << 20), CREATING)


class Case(NamedTuple):
    """What is done to `image` by ours and by theirs (a shell command), and the bytes of it."""

    name: str
    image: str
    ours: Callable[[Path], None]
    theirs: str
    held: set[int]
    checked: set[int]


CASES = [
    Case("info of raw", "raw", opened("raw", "raw", no_io=True, no_backing=True), "qemu-img info -f raw raw", set(), set()),
    Case("info of raw, probed", "raw", opened("raw", no_io=True, no_backing=True), "qemu-img info raw", set(), set()),
    Case("info of raw, shared", "raw", opened("raw", "raw", no_io=True, no_backing=True, force_share=True), "qemu-img info -U -f raw raw", set(), set()),
    Case("info of qcow2", "qcow2", opened("qcow2", no_io=True, no_backing=True), "qemu-img info qcow2", {201, 203}, {101, 103}),
    Case("info of qcow2, shared", "qcow2", opened("qcow2", no_io=True, no_backing=True, force_share=True), "qemu-img info -U qcow2", set(), set()),
    Case("reading raw", "raw", opened("raw", "raw"), "qemu-img map -f raw raw", {100}, {200}),
    Case("reading raw, shared", "raw", opened("raw", "raw", force_share=True), "qemu-img map -U -f raw raw", {100}, {200}),
    Case("reading qcow2", "qcow2", opened("qcow2"), "qemu-img map qcow2", {100, 201, 203}, {101, 103, 200}),
    Case("checking qcow2", "qcow2", opened("qcow2", "qcow2", check=True), "qemu-img check qcow2", {100, 201, 203}, {101, 103, 200}),
    Case("reading qcow2, shared", "qcow2", opened("qcow2", force_share=True), "qemu-img map -U qcow2", {100}, {200}),
    Case("a backing file", "qcow2", opened("overlay"), "qemu-img map overlay", {100, 201, 203}, {101, 103, 200}),
    Case("a backing file, shared", "qcow2", opened("overlay", force_share=True), "qemu-img map -U overlay", {100}, {200}),
    Case("a backing file of one written", "qcow2", opened("overlay", writable=True), "qemu-io -c flush overlay", {100, 201, 203}, {101, 103, 200}),
    Case("writing qcow2", "qcow2", opened("qcow2", writable=True), "qemu-io -c flush qcow2", {100, 101, 103, 201, 203}, {101, 103, 200, 201, 203}),
    Case("resizing qcow2", "qcow2", opened("qcow2", writable=True, resize=True), "qemu-img resize qcow2 1M",
         {100, 101, 103, 201, 203}, {101, 103, 200, 201, 203}),
    Case("writing raw", "raw", opened("raw", "raw", writable=True), "qemu-io -f raw -c flush raw", {100, 101}, {200, 201}),
    Case("resizing raw", "raw", opened("raw", "raw", writable=True, resize=True), "qemu-img resize -f raw raw 1M", {100, 101, 103}, {200, 201, 203}),
    Case("creating raw", "raw", created, "qemu-img create -q -f raw raw 1M", {101, 103, 203}, {103, 201, 203}),
    Case("a window of raw", "raw", window,
         "qemu-img map 'json:{\"driver\":\"raw\",\"size\":512,\"file\":{\"driver\":\"file\",\"filename\":\"raw\"}}'", {100, 203}, {103, 200}),
]  # fmt: skip
by_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@by_case
def test_ours_holds_and_checks_these_bytes(images: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.chdir(images)
    with Watcher(images / case.image) as watcher:
        case.ours(images)
    assert (watcher.most, watcher.checked) == (case.held, case.checked), watcher.requests
    assert held_by_others(images / case.image) == set()


@by_case
def test_both_are_refused_by_the_same_bytes_in_the_same_words(images: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.chdir(images)
    shutil.copytree(images, images / "untouched")
    for byte in BYTES:
        for name in ("raw", "qcow2", "overlay"):
            shutil.copy(images / "untouched" / name, images / name)
        with stranger(images / case.image, byte):
            theirs = qemu("sh", "-c", case.theirs)
            try:
                case.ours(images)
                ours = ""
            except Locked as exc:
                assert exc.errno == errno.EAGAIN and str(os.getpid()) in str(exc.holder)
                ours = "%s\n%s\n" % (exc, exc.hint)
        assert bool(ours) == (byte in case.checked), byte
        assert bool(theirs.returncode) == bool(ours), (byte, theirs.stderr)
        if ours:
            # (qemu-io and create put other words in front of these)
            assert ours.split("lock")[0].split("Failed")[1] in theirs.stderr
            assert theirs.stderr.endswith(ours[ours.index("Failed") :])
            if case.theirs.startswith("qemu-img") and "create" not in case.theirs:
                assert theirs.stderr == "qemu-img: " + ours


@pytest.mark.parametrize(
    ("image", "flags", "command", "refusal"),
    [
        ("qcow2", {"writable": True}, "qemu-img info qcow2", 'shared "write"'),
        ("qcow2", {"writable": True}, "qemu-img info -U qcow2", None),
        ("qcow2", {"writable": True}, "qemu-img resize qcow2 2M", '"write"'),
        ("qcow2", {"writable": True}, "qemu-img create -f qcow2 qcow2 1M", '"write"'),
        ("qcow2", {"writable": True}, "qemu-img map overlay", 'shared "write"'),
        ("qcow2", {}, "qemu-img check qcow2", None),
        ("qcow2", {}, "qemu-img resize qcow2 2M", '"write"'),
        ("qcow2", {"force_share": True}, "qemu-img resize qcow2 2M", None),
        ("raw", {"writable": True}, "qemu-img info -f raw raw", None),
        ("raw", {"writable": True}, "qemu-io -f raw -c flush raw", None),
        ("raw", {"writable": True, "resize": True}, "qemu-img create -f raw raw 1M", 'shared "resize"'),
        ("raw", {"writable": True}, "qemu-img create -f qcow2 raw 1M", 'shared "write"'),
    ],
)
def test_qemu_keeps_off_what_we_use(images: Path, monkeypatch: pytest.MonkeyPatch, image: str, flags: dict[str, bool], command: str, refusal: str) -> None:
    monkeypatch.chdir(images)
    with open_image(image, image, OpenFlags(**flags)):
        done = qemu(*command.split())
    if refusal is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1
        assert done.stderr.endswith("Failed to get %s lock\n%s\n" % (refusal, ASKS % image))


@pytest.fixture
def daemon(images: Path, monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[str]:
    """qemu-storage-daemon, with qcow2 open as a guest would have it."""
    monkeypatch.chdir(images)
    process = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", "driver=file,filename=qcow2,node-name=f", "--blockdev", "driver=qcow2,file=f,node-name=q",
         "--nbd-server", "addr.type=unix,addr.path=socket", "--export", "type=nbd,id=e,node-name=q,writable=on"],
        text=True,
    )  # fmt: skip
    yield process
    process.terminate()
    process.wait(60)


def test_we_keep_off_a_running_guest_and_name_it(daemon: subprocess.Popen[str], images: Path) -> None:
    deadline = time.monotonic() + 30
    while not {101, 201} <= held_by_others(images / "qcow2"):
        assert daemon.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for name, flags, text in (
        ("qcow2", OpenFlags(), "Could not open 'qcow2': Failed to get shared \"write\" lock"),
        ("qcow2", OpenFlags(writable=True), "Could not open 'qcow2': Failed to get \"write\" lock"),
        ("overlay", OpenFlags(), "Could not open 'overlay': Could not open backing file: Failed to get shared \"write\" lock"),
    ):
        with pytest.raises(Locked) as caught:
            open_image(name, "qcow2", flags)
        assert str(caught.value) == text
        assert caught.value.hint == ASKS % "qcow2"
        assert caught.value.holder == "qemu-storage-da (process %d)" % daemon.pid
    with pytest.raises(Locked):
        File.create_file("qcow2", File.create_options(size=0), CREATING)
    for no_create in (False, True):
        with pytest.raises(Locked) as caught:
            convert(["raw"], "qcow2", format="raw", target_format="qcow2", no_create=no_create)
        assert caught.value.filename == "qcow2" and caught.value.holder == "qemu-storage-da (process %d)" % daemon.pid
    with open_image("overlay", "qcow2", OpenFlags(force_share=True)) as node:
        assert node.size == 1 << 20
    assert qemu("qemu-img", "check", "-U", "qcow2").returncode == 0


def test_a_refused_file_is_not_touched(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    before = (images / "qcow2").read_bytes()
    with open_image("qcow2", "qcow2"), pytest.raises(Locked, match='^Failed to get "write" lock$'):
        File.create_file("qcow2", File.create_options(size=0), CREATING)
    assert (images / "qcow2").read_bytes() == before


def test_a_raw_image_in_use_is_not_made_a_qcow2_image(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu-img empties the file before it finds out, since a writer of a raw image tolerates others that resize it."""
    monkeypatch.chdir(images)
    with open_image("raw", "raw", OpenFlags(writable=True)) as disk:
        disk.pwrite(0, b"precious")
        with pytest.raises(Locked):
            create("raw", 1 << 20, format="qcow2")
        assert disk.pread(0, 8) == b"precious" and disk.size == 1 << 20
    assert (images / "raw").read_bytes()[:8] == b"precious"


def test_locking_off_and_on(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    name = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"qcow2","locking":"%s"}}'
    with Watcher(images / "qcow2") as watcher, open_image(name % "off", None, OpenFlags(writable=True)):
        pass
    assert watcher.requests == []
    with open_image(name % "on", None, OpenFlags(writable=True)):
        assert held_by_others(images / "qcow2") == {100, 101, 103, 201, 203}


def test_exclusive_locks_of_strangers(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    with stranger(images / "raw", 100, 101, kind=fcntl.F_WRLCK):
        with pytest.raises(Locked) as caught:
            open_image("raw", "raw")
        theirs = qemu("qemu-img", "map", "-f", "raw", "raw")
        assert theirs.stderr == "qemu-img: %s\n" % caught.value == "qemu-img: Could not open 'raw': Failed to lock byte 100\n"
        with pytest.raises(Locked, match="^Failed to lock byte 101$"):
            created(images)


def test_change_of_permissions_takes_new_before_it_drops_old(images: Path) -> None:
    path = images / "raw"
    fd = os.open(path, os.O_RDWR)
    try:
        with Watcher(path) as watcher:
            lock = ImageLock(str(path), "auto")
            lock.change(fd, CONSISTENT_READ | WRITE, ALL)
            lock.change(fd, CONSISTENT_READ, ALL & ~WRITE)
            assert watcher.requests == ["+100", "+101", "?200", "?201", "+201", "?200", "?101", "-101"]
        assert held_by_others(path) == lock.held == {100, 201}
        with stranger(path, 203):
            with pytest.raises(Locked, match='"resize"'):
                lock.change(fd, CONSISTENT_READ | RESIZE, ALL)
            assert lock.held == {100, 201}
        assert held_by_others(path) == {100, 201}
    finally:
        os.close(fd)
    assert held_by_others(path) == set()


def test_every_pair_of_permissions_agrees_with_the_rule(images: Path) -> None:
    """Two opens go together if and only if each shares what the other one wants."""
    path = images / "raw"
    first, second = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
    try:
        for a in range(256):
            one, other = ImageLock(str(path), "auto"), ImageLock(str(path), "auto")
            one.change(first, a >> 4, a & 15)
            for b in range(a % 7, 256, 7):  # a seventh of all pairs
                perm, shared = b >> 4, b & 15
                if perm & ~a & 15 or (a >> 4) & ~shared:
                    with pytest.raises(Locked):
                        other.change(second, perm, shared)
                    assert not other.held
                else:
                    other.change(second, perm, shared)
                    assert other.held == bytes_held(perm, shared)
                other.change(second, 0, ALL)
            one.change(first, 0, ALL)
            assert not one.held and held_by_others(path) == set()
    finally:
        os.close(first)
        os.close(second)


def test_reopening_for_writing_keeps_the_locks_all_the_time(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    with open_image("raw", "raw") as node:
        file = node.children["file"]
        assert isinstance(file, File)
        before = file.fileno()
        file.change_flags(OpenFlags(writable=True))
        assert file.fileno() != before and held_by_others(images / "raw") == {100, 101}
        file.pwrite(0, b"now writable")
        file.change_flags(OpenFlags())
        assert held_by_others(images / "raw") == {100}
        with pytest.raises(OSError):
            os.pwrite(file.fileno(), b"x", 0)
        with stranger(images / "raw", 201), pytest.raises(Locked):
            file.change_flags(OpenFlags(writable=True))
        assert file.read_only and held_by_others(images / "raw") == {100}
    assert (images / "raw").read_bytes()[:12] == b"now writable"


def test_a_file_opened_twice_by_one_process_is_in_use(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    with open_image("qcow2", None, OpenFlags(writable=True)):
        with pytest.raises(Locked) as caught:
            open_image("qcow2")
        assert str(os.getpid()) in str(caught.value.holder)
        (images / "link").symlink_to("qcow2")
        with pytest.raises(Error, match=r'shared "write"'):
            open_image("link")


def test_locks_die_with_their_process(images: Path) -> None:
    program = "import os, sys; from diskwright.graph import open_image; from diskwright.node import OpenFlags\n"
    program += "node = open_image(sys.argv[1], 'qcow2', OpenFlags(writable=True)); print('open', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(images / "qcow2")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "open\n"
    assert held_by_others(images / "qcow2") == {100, 101, 103, 201, 203}
    assert qemu("qemu-img", "check", images / "qcow2").returncode == 1
    process.kill()
    process.wait(60)
    process.stdin.close()
    process.stdout.close()
    assert held_by_others(images / "qcow2") == set()
