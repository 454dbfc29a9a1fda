# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The host_device protocol on a loop device; and on a file in its place, for what a device answers that can do nothing."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest

from diskwright.errors import Error, Locked, OptionError
from diskwright.extent import DATA
from diskwright.graph import open_image
from diskwright.node import OpenFlags
from diskwright.protocols.file import FileOptions
from diskwright.protocols.file.device import HostDevice

from locks import held_by_others

K = 1024
M = 1024 * K
SIZE = 2 * M
WRITABLE = OpenFlags(writable=True, unmap=True)


def qemu(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(arg) for arg in args], capture_output=True, text=True, timeout=60, check=False)


class PlainDevice(HostDevice):
    """A file taken for a device that knows no ioctl."""

    def _examine(self) -> None:
        self._is_block = True
        if self.flags.direct:
            self.request_alignment = 512
        self._size = os.fstat(self._fd).st_size


def attach(path: Path, *options: str) -> Optional[str]:
    """A loop device over `path`; None where the machine has none to give."""
    done = subprocess.run(["losetup", "--find", "--show", *options, str(path)], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def detach(device: str) -> None:
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture(params=["loop", "file"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[type[HostDevice], str]]:
    """A driver and a path of SIZE bytes. Where there are no loop devices both are the file, which is less but not nothing."""
    path = tmp_path / "disk"
    path.write_bytes(b"\xaa" * SIZE)
    loop = attach(path) if request.param == "loop" else None
    if loop is None:
        yield PlainDevice, str(path)
        return
    try:
        yield HostDevice, loop
    finally:
        detach(loop)


def opened(device: tuple[type[HostDevice], str], flags: OpenFlags = WRITABLE) -> HostDevice:
    return device[0](FileOptions.from_mapping({"filename": device[1]}), flags)


@pytest.mark.parametrize("direct", [False, True])
def test_random_requests_against_a_model(device: tuple[type[HostDevice], str], direct: bool) -> None:
    chance = random.Random(4)
    model = bytearray(b"\xaa" * SIZE)
    with opened(device, WRITABLE.but(direct=direct)) as node:
        assert node.size == SIZE and (node.request_alignment >= 512) == direct
        for _step in range(200):
            offset = chance.choice((chance.randrange(SIZE - 70 * K), chance.randrange(480) * 4096))
            length = chance.choice((1, 511, 512, 4096, 64 * K, chance.randrange(1, 70 * K)))
            verb = chance.choice(("write", "zero", "unmap", "discard", "read", "flush"))
            if verb == "write":
                model[offset : offset + length] = data = chance.randbytes(length)
                node.pwrite(offset, data)
            elif verb in ("zero", "unmap"):
                model[offset : offset + length] = bytes(length)
                node.pwrite_zeroes(offset, length, unmap=verb == "unmap")
            elif verb == "discard":
                node.pdiscard(offset, length)
                model[offset : offset + length] = found = node.pread(offset, length)
                assert found == model[offset : offset + length]
            elif verb == "flush":
                node.flush()
            assert node.pread(offset, length) == model[offset : offset + length]
        assert [(e.offset, e.length, e.status & DATA) for e in node.block_status(0, SIZE)] == [(0, SIZE, DATA)]
    with opened(device, OpenFlags(direct=not direct)) as node:
        assert node.pread(0, SIZE) == model


def test_a_device_does_not_change_its_size(device: tuple[type[HostDevice], str]) -> None:
    with opened(device) as node:
        for size, mode, text in (
            (SIZE + 512, "off", "Cannot grow device files"),
            (SIZE - 512, "off", "Cannot resize device files"),
            (SIZE, "full", "Unsupported preallocation mode 'full'"),
        ):
            with pytest.raises(Error, match="^%s$" % text):
                node.truncate(size, mode)
        node.truncate(SIZE)
        for offset in (SIZE, SIZE - 1):
            with pytest.raises(Error):
                node.pwrite(offset, b"xy")
            with pytest.raises(Error):
                node.write_own(offset, memoryview(b"xy"))
        assert node.pread(SIZE - 1, 1) == b"\xaa"


def test_creation(device: tuple[type[HostDevice], str]) -> None:
    cls, path = device

    def create(**options: Any) -> None:
        cls.create_file(path, cls.create_options.from_mapping(options), WRITABLE)

    create(size="1M")
    with open(path, "rb") as found:
        assert found.read(1024) == bytes(512) + b"\xaa" * 512
    for options, text in (
        ({"size": "3M"}, "Cannot grow device files"),
        ({"size": "1M", "preallocation": "full"}, "Unsupported preallocation mode 'full'"),
        ({"size": "1M", "nocow": "on"}, "Invalid parameter 'nocow'"),
    ):
        with pytest.raises(Error, match="^%s$" % text):
            create(**options)
        if cls is HostDevice:
            text_options = ",".join("%s=%s" % pair for pair in options.items() if pair[0] != "size") or "preallocation=off"
            theirs = qemu("qemu-img", "create", "-q", "-f", "raw", "-o", text_options, path, options["size"])
            assert theirs.stderr == "qemu-img: %s: %s\n" % (path, text)


def test_locks(device: tuple[type[HostDevice], str]) -> None:
    cls, path = device
    with opened(device, WRITABLE.but(shared=13)):
        assert held_by_others(Path(path)) == {100, 101, 201}
        with pytest.raises(Locked):
            opened(device)
        theirs = qemu("qemu-io", "-f", "raw", "-c", "flush", path)
        assert 'Failed to get "write" lock\nIs another process using the image [%s]?\n' % path in theirs.stderr


def test_plain_names_and_the_protocol(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    loop = attach(path)
    for name in ("/dev/null", "host_device:/dev/zero", *([loop, "host_device:" + loop] if loop else [])):
        with open_image(name) as node:
            file = node.children["file"]
            assert isinstance(file, HostDevice) and file.driver == "host_device"
            shown = qemu("qemu-img", "info", name).stdout
            assert "    protocol type: host_device\n" in shown and "(%d bytes)\n" % node.size in shown and "image: %s\n" % node.filename in shown
            assert node.disk_size() == 0
    if loop:
        with pytest.raises(Error) as caught:
            open_image("file:" + loop)
        assert qemu("qemu-img", "info", "file:" + loop).stderr == "qemu-img: %s\n" % caught.value
        detach(loop)


def test_a_read_only_device(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    loop = attach(path, "--read-only")
    if loop is None:  # then what is tested is that a file without write permission says so, in the same words
        loop = "/proc/version"
    try:
        with pytest.raises(Error) as caught:
            open_image(loop, "raw", WRITABLE)
        assert caught.value.errno == errno.EACCES
        assert qemu("qemu-img", "resize", "-f", "raw", loop, "4M").stderr == "qemu-img: %s\n" % caught.value
    finally:
        if loop != "/proc/version":
            detach(loop)


def test_what_is_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("image").touch()
    for name in ("image", "missing"):
        with pytest.raises(Error) as caught:
            HostDevice.create_file(name, HostDevice.create_options.from_mapping({"size": "1M"}), WRITABLE)
        theirs = qemu("qemu-img", "create", "-q", "-f", "raw", "host_device:" + name, "1M")
        assert theirs.stderr == "qemu-img: host_device:%s: %s\n" % (name, caught.value)
    with pytest.raises(OptionError, match="The 'host_device' block driver requires a file name"):
        HostDevice(FileOptions.from_mapping({}), WRITABLE)
