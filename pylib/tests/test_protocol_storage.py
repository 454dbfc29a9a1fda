# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""iscsi and nfs against tgt and NFS-Ganesha, side by side with qemu-img; and the storage that is not there: rbd, gluster, nvme, libblkio."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diskwright import drivers
from diskwright.errors import Denied, Error, OptionError, ProtocolError, ReadOnly, Unsupported
from diskwright.extent import DATA, ZERO
from diskwright.graph import Graph, OpenPolicy, parse_filename
from diskwright.hooks import OpenFlags
from diskwright.objects import parse_object
from diskwright.protocols import connections
from diskwright.protocols.iscsi.scsi import Unit
from servers_storage import HOST, PASSWORD, USER, Stall, Targets, ganesha, tgt
from side_by_side import Outcome, difference, ours, same, theirs

M = 1 << 20
WRITABLE = OpenFlags(writable=True, resize=True, unmap=True)
OBJECTS = {"s": parse_object("secret,id=s,data=%s" % PASSWORD), "wrong": parse_object("secret,id=wrong,data=another word")}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Targets]:
    with tgt(tmp_path_factory.mktemp("tgt")) as running:
        yield running


@pytest.fixture(scope="module")
def export() -> Iterator[Path]:
    with ganesha() as place:
        yield place


@pytest.fixture
def folder(export: Path, tmp_path: Path) -> Path:
    """A directory of this test's own on the NFS server."""
    place = export / ("%s-%d" % (tmp_path.name, os.getpid()))
    place.mkdir()
    return place


def file_of(directory: Path, size: int = 4 * M, name: str = "unit") -> Path:
    path = directory / name
    path.write_bytes(b"")
    os.truncate(path, size)
    return path


def spec(name: str, **more: Any) -> dict[str, Any]:
    file: dict[str, Any] = parse_filename(name)["file"]
    return {**file, **more}


# -- iscsi -------------------------------------------------------------------------------------------------------


def test_a_unit_is_described_as_by_qemu_img(targets: Targets, tmp_path: Path) -> None:
    name = targets.unit(file_of(tmp_path))
    place, number = name.rsplit("/", 1)
    portal, target = place[len("iscsi://") :].split("/")
    for text in (name, name.replace(":open", "%3aopen"), place, place + "/", place + "/x", place + "/900", "iscsi://h", "iscsi:x", name + "?a=b"):
        same("info %s" % text, tmp_path)
    same("info iscsi://%s/iqn.none/1" % portal, tmp_path)
    same("info --output=json %s" % name, tmp_path)
    same("map --output=json %s" % name, tmp_path)
    known = "driver=iscsi,transport=tcp,portal=%s,target=%s,lun=%s" % (portal, target, number)
    for more in ("", ",header-digest=none", ",header-digest=x", ",user=me", ",initiator-name=iqn.a:b,timeout=7", ",bogus=1", ",lun=x"):
        same("info --image-opts %s" % (known + more), tmp_path)
    for text in ("driver=iscsi", "driver=iscsi,transport=tcp,portal=p", "driver=iscsi,transport=x,portal=p,target=t"):
        same("info --image-opts %s" % text, tmp_path)


def test_images_go_to_units_that_are_large_enough(targets: Targets, tmp_path: Path) -> None:
    name = targets.unit(file_of(tmp_path, 16 * M))
    for line in (
        "create -f raw %s 17M",
        "create -f raw -o preallocation=full %s 1M",
        "create -f raw -o help %s",
        "create -f raw %s9 1M",
        "resize -f raw %s 17M",
        "resize -f raw --shrink %s 1M",
    ):
        same(line % name, tmp_path)
    file = tmp_path / "unit"
    file.write_bytes(b"\1" * 16 * M)
    assert ours(["create", "-q", "-f", "raw", name, "3M"], tmp_path) == Outcome(0, "", "")
    assert file.read_bytes()[:1024] == bytes(512) + b"\1" * 512
    for format in ("qcow2", "vmdk", "vhdx", "vdi", "luks"):
        extra = ["--object", "secret,id=k,data=x", "-o", "key-secret=k,iter-time=10"] if format == "luks" else []
        assert ours(["create", "-q", "-f", format, *extra, name, "1M"], tmp_path) == Outcome(0, "", ""), format
        assert '"format": "%s"' % format in theirs(["info", "--output=json", name], tmp_path).out
    assert ours(["resize", "-q", "-f", "raw", "--shrink", name, "1M"], tmp_path).code == 1


def test_convert_to_a_unit_and_back(targets: Targets, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"".join(bytes([number]) * 70000 for number in range(50)) + bytes(212))
    name = targets.unit(file_of(tmp_path), block_size=4096)
    for line in (["-O", "qcow2", str(source), name], ["-f", "qcow2", "-O", "raw", name, "back"]):
        assert ours(["convert", *line], tmp_path) == Outcome(0, "", "")
    assert (tmp_path / "back").read_bytes() == source.read_bytes().ljust(-(-source.stat().st_size // 512) * 512, b"\0")
    assert theirs(["compare", "-f", "qcow2", name, str(tmp_path / "back")], tmp_path).code == 0


def test_space_of_a_thin_unit_is_given_back(targets: Targets, tmp_path: Path) -> None:
    path = file_of(tmp_path)
    with Graph().open(targets.unit(path), "raw", WRITABLE) as node:
        node.pwrite(0, b"\1" * 2 * M)
        node.flush()
        full = path.stat().st_blocks
        assert [extent.status & (DATA | ZERO) for extent in node.block_status(0, 4 * M)] == [DATA, ZERO]
        node.pwrite_zeroes(100, M, unmap=True)
        node.pdiscard(M + 4096, 512 << 10)
        assert path.stat().st_blocks < full
        assert node.pread(0, 2 * M).count(b"\1") <= M - (512 << 10)
        assert any(extent.status & ZERO for extent in node.block_status(0, M))


def test_a_protected_unit(targets: Targets, tmp_path: Path) -> None:
    name = targets.unit(file_of(tmp_path), parameters="readonly=1")
    with pytest.raises(ReadOnly, match="LUN is write protected"):
        Graph().open(name, "raw", WRITABLE)
    same("info %s" % name, tmp_path)
    with Graph().open(name, "raw") as node, pytest.raises(Error, match="write protected"):
        node.change_flags(WRITABLE)


def test_chap(targets: Targets, tmp_path: Path) -> None:
    name = targets.unit(file_of(tmp_path), "chap")
    same("info %s" % name, tmp_path)
    with Graph(objects=OBJECTS).open_spec(spec(name, user=USER, **{"password-secret": "s"}), WRITABLE) as node:
        node.pwrite(1, b"abc")
        assert node.pread(0, 5) == b"\0abc\0" and PASSWORD not in node.filename
    with pytest.raises(Error, match="Authentication failure") as caught:
        Graph(objects=OBJECTS).open_spec(spec(name, user=USER, **{"password-secret": "wrong"}), WRITABLE)
    assert "another word" not in str(caught.value)
    with pytest.raises(OptionError, match="no password was given"):
        Graph(objects=OBJECTS).open_spec(spec(name, user=USER), WRITABLE)


def test_a_lost_connection_is_made_again(targets: Targets, tmp_path: Path) -> None:
    path = file_of(tmp_path)
    with Graph().open(targets.unit(path), "raw", WRITABLE) as node:
        for round_ in range(3):
            node.pwrite(round_ * 1000, b"\7" * 1000)
            targets.drop_connections()
        assert node.pread(0, 3000) == b"\7" * 3000
        node.flush()
    assert path.read_bytes()[:3000] == b"\7" * 3000


def test_a_target_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "RECONNECT_TIME", 0.3)
    place = tmp_path / "tgt"
    place.mkdir()
    with tgt(place) as own:
        node = Graph().open(own.unit(file_of(tmp_path)), "raw", WRITABLE)
        node.pwrite(0, b"x")
        portal = own.portal()
    for request in (lambda: node.pread(0, 512), lambda: node.pwrite(0, b"y"), node.flush):
        with pytest.raises(Error, match="nobody answers at %s|was lost" % portal):
            request()
    node.abandon()
    with pytest.raises(Error, match="Failed to connect to LUN : nobody answers at %s" % portal):
        Graph().open("iscsi://%s/t/1" % portal, "raw")


def test_a_target_that_does_not_answer() -> None:
    with Stall() as silent:
        started = time.monotonic()
        with pytest.raises(Error, match="no answer from 127.0.0.1:%d within 1 seconds|Failed to connect" % silent.port):
            Graph().open_spec(spec("iscsi://%s:%d/t/1" % (HOST, silent.port), timeout=1), OpenFlags())
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("noise", [b"\0" * 100, b"\xff" * 5000, bytes(range(256)) * 64, b"\x23" + b"\0" * 4 + b"\xff\xff\xff" + b"\0" * 40], ids=range(4))
def test_a_target_that_sends_garbage(noise: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "RECONNECT_TIME", 0.0)
    with socket.create_server((HOST, 0)) as server:

        def babble() -> None:
            peer, _address = server.accept()
            with peer:
                peer.settimeout(5)
                peer.recv(1)
                peer.sendall(noise)

        thread = threading.Thread(target=babble)
        thread.start()
        with pytest.raises(Error, match="Failed to connect to LUN"):
            Graph().open_spec(spec("iscsi://%s:%d/t/1" % (HOST, server.getsockname()[1]), timeout=1), OpenFlags())
        thread.join()


class Liar:
    """A session with a target whose answers a test decides, by operation code."""

    def __init__(self, **answers: bytes) -> None:
        self.answers = {int(key[1:], 16): value for key, value in answers.items()}

    def command(self, _name: str, cdb: bytes, into: Any = None, out: Any = None) -> int:
        answer = self.answers.get(cdb[0], bytes(4))[: len(into or b"")]
        if cdb[0] == 0x12:  # INQUIRY: the page that was asked for, with nothing in it
            answer = bytes((0, cdb[2])).ljust(len(into), b"\0")
        if into is not None:
            into[: len(answer)] = answer
        return len(answer) if into is not None else len(out or b"")


def capacity(last: int, block: int, flags: int = 0x80) -> bytes:
    return struct.pack(">QIBBB17x", last, block, 0, 0, flags)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (capacity(100, 0), "its blocks have 0 bytes"),
        (capacity(100, 513), "its blocks have 513 bytes"),
        (capacity(100, 1 << 31), "its blocks have 2147483648 bytes"),
        (capacity((1 << 64) - 1, 512), "18446744073709551616 blocks of 512 bytes"),
        (b"\0\0\0", "the answer to READ CAPACITY"),
    ],
)
def test_a_unit_that_lies_of_its_size(answer: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        Unit(Liar(x9E=answer))  # type: ignore[arg-type]


def test_a_unit_that_lies_of_its_blocks() -> None:
    liar: Any = Liar(x9E=capacity(99, 512))
    unit = Unit(liar)
    assert unit.size == 51200
    with pytest.raises(ProtocolError, match="READ gave 4 bytes in place of 512"):
        unit.read(liar, 0, memoryview(bytearray(512)))
    runs = struct.pack(">QIB3xQIB3xQIB3x", 0, 2, 1, 2, 1 << 31, 0, 7, 0, 0)
    for length, start, found in (
        (52, 0, [(0, 1024, 1), (1024, 51200, 0)]),
        (1 << 31, 0, [(0, 1024, 1), (1024, 51200, 0)]),
        (20, 512, [(512, 1024, 1)]),
        (0, 0, []),
    ):
        liar.answers[0x9E] = struct.pack(">I4x", length) + runs
        assert unit.status(liar, start) == found
    with pytest.raises(ProtocolError, match="were answered for block 3"):
        liar.answers[0x9E] = struct.pack(">I4x", 20) + runs
        unit.status(liar, 3 * 512)


# -- nfs ---------------------------------------------------------------------------------------------------------


def test_a_file_is_described_as_by_qemu_img(folder: Path, tmp_path: Path) -> None:
    name = "nfs://127.0.0.1%s/" % folder
    file_of(folder, name="file")
    os.chmod(folder / "file", 0o600)
    for text in ("file", "fil%65", "none", "file?uid=7", "file?uid=x", "file?uid=", "file?bogus=1", "file?pagecache=99999", "file?readahead=4096"):
        same("info %s" % (name + text), tmp_path)
    for text in ("nfs://", "nfs:x", "nfs://h", "nfs://127.0.0.1:99%s/file" % folder, "nfs://u@127.0.0.1%s/file" % folder):
        same("info %s" % text, tmp_path)
    same("info --output=json %sfile" % name, tmp_path)
    same("map --output=json %sfile" % name, tmp_path)
    os.chmod(folder / "file", 0o666)
    for more in ("", "?uid=7", "?gid=7", "?uid=7&gid=8", "?uid=0&gid=0"):
        same("info '%sfile%s'" % (name, more), tmp_path)
    known = "driver=nfs,server.type=inet,server.host=127.0.0.1,path=%s/file" % folder
    for more in ("", ",user=7", ",bogus=1", ",server.port=1", ",server.type=unix", ",debug=0,tcp-syn-count=2"):
        same("info --image-opts %s" % (known + more), tmp_path)
    for text in ("driver=nfs", "driver=nfs,path=/a", "driver=nfs,server.type=inet,path=/a", "driver=nfs,server.host=h,server.type=inet,path=a"):
        same("info --image-opts %s" % text, tmp_path)
    assert "limited" not in ours(["info", "--image-opts", known + ",readahead-size=8192,cache.direct=on"], tmp_path).out


def test_files_are_created_and_grow(folder: Path, tmp_path: Path) -> None:
    name = "nfs://127.0.0.1%s/new" % folder
    same("create -f raw -o help %s" % name, tmp_path)
    assert ours(["create", "-q", "-f", "raw", name, "1M"], tmp_path) == Outcome(0, "", "")
    path = folder / "new"
    assert path.stat().st_size == M and path.stat().st_mode & 0o777 == 0o600
    with Graph().open(name, "raw", WRITABLE) as node:
        node.pwrite(M, b"more")
        assert node.size == M + 512 and node.file.size == M + 4
        node.truncate(3 * M)
        node.flush()
        assert path.stat().st_size == 3 * M and path.read_bytes()[M : M + 5] == b"more\0"
        with pytest.raises(Error, match="Unsupported preallocation mode 'full'"):
            node.truncate(4 * M, "full")
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * M))
    assert ours(["convert", "-O", "qcow2", str(source), name], tmp_path) == Outcome(0, "", "")
    assert theirs(["compare", str(source), name], tmp_path).code == 0
    outcome = ours(["create", "-f", "qcow2", "-b", "new", "-F", "qcow2", name + "2"], tmp_path)
    assert outcome.code == 0 and "backing_file=new" in outcome.out, outcome
    assert "backing file: new (actual path: %s)" % name in ours(["info", name + "2"], tmp_path).out


def test_a_lost_connection_to_nfs(folder: Path) -> None:
    path = file_of(folder)
    with Graph().open("nfs://127.0.0.1%s" % path, "raw", WRITABLE) as node:
        pool = node.file._pool  # type: ignore[attr-defined]

        def cut() -> None:
            with pool.connection() as session, socket.socket(fileno=os.dup(session._api.nfs_get_fd(session._context))) as link:
                link.shutdown(socket.SHUT_RDWR)

        cut()
        assert node.pread(0, 5) == bytes(5)  # again, over another
        node.pwrite(0, b"abc")
        node.flush()
        cut()
        node.pwrite(3, b"def")
        cut()
        with pytest.raises(Error, match="the connection was lost before all that had been written was flushed"):
            node.pwrite(6, b"ghi")
            node.flush()
        node.pwrite(0, b"ABCDEFGHI")
        node.flush()
    assert path.read_bytes()[:10] == b"ABCDEFGHI\0"


def test_an_nfs_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "RECONNECT_TIME", 0.0)
    with pytest.raises(Error, match="Failed to mount nfs share: .*nohost.invalid"):
        Graph().open("nfs://nohost.invalid/a/b", "raw")
    with pytest.raises(Error, match="Failed to mount nfs share: "):
        Graph().open("nfs://127.0.0.1/not/exported/file", "raw")


# -- what is not there -------------------------------------------------------------------------------------------

NAMES = {
    "iscsi": "iscsi://127.0.0.1:%d/iqn/1",
    "nfs": "nfs://127.0.0.1/export/file",
    "rbd": "rbd:pool/image",
    "gluster": "gluster+tcp://127.0.0.1:%d/volume/file",
    "nvme": "nvme://0000:44:00.0/1",
    "json": 'json:{"driver":"iscsi","transport":"tcp","portal":"127.0.0.1:%d","target":"t"}',
}


@pytest.mark.parametrize("driver", NAMES)
@pytest.mark.parametrize("mode", ["none", "same_directory", "listed"])
def test_stored_names_are_refused_without_a_connection(tmp_path: Path, driver: str, mode: str) -> None:
    with socket.create_server((HOST, 0)) as server:
        server.setblocking(False)
        name = NAMES[driver].replace("%d", str(server.getsockname()[1]))
        line = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", str(tmp_path / "image"), "1M"]
        subprocess.run(line, timeout=30, check=True)
        with pytest.raises(Denied):
            Graph(OpenPolicy(mode)).open(str(tmp_path / "image"), "qcow2")
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(("driver", "package"), [("iscsi", "libiscsi7"), ("nfs", "libnfs13"), ("gluster", "libgfapi0")])
def test_a_library_that_is_missing(driver: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diskwright.protocols.%s.library.SONAMES" % driver, ("libabsent.so.1",))
    with pytest.raises(Unsupported, match="libabsent.so.1, which is not there: install %s" % package):
        Graph().open(NAMES[driver].replace("%d", "1"), "raw")


def test_bindings_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rados", None)
    with pytest.raises(Unsupported, match="install python3-rados and python3-rbd"):
        Graph().open("rbd:pool/image", "raw")


def test_names_of_rbd() -> None:
    for name, expected in {
        "rbd:p/i": {"pool": "p", "namespace": "", "image": "i"},
        "rbd:p/n/i@s:id=joe:conf=/c": {"pool": "p", "namespace": "n", "image": "i", "snapshot": "s", "user": "joe", "conf": "/c"},
        r"rbd:p\/q/i\@j\:k:a=b\:c": {"pool": "p/q", "namespace": "", "image": "i@j:k", "=keyvalue-pairs": '["a", "b:c"]'},
    }.items():
        assert parse_filename(name)["file"] == {"driver": "rbd", **expected}
    for name, words in {"rbd:p": "Pool name is required", "rbd:p/i:x": "conf option x has no value"}.items():
        with pytest.raises(OptionError, match=words):
            parse_filename(name)


@pytest.mark.parametrize(
    ("driver", "options", "words"),
    [
        ("rbd", {}, "Parameter 'pool' is missing"),
        ("rbd", {"pool": "p"}, "Parameter 'image' is missing"),
        ("rbd", {"pool": "p", "image": "i", "bogus": 1}, "Parameter 'bogus' is unexpected"),
        ("rbd", {"pool": "p", "image": "i", "server": [{"host": "h"}]}, "Parameter 'server.0.port' is missing"),
        ("rbd", {"pool": "p", "image": "i", "server": [{"host": "h", "port": 1}]}, "Invalid parameter type for 'server.0.port'"),
        ("rbd", {"pool": "p", "image": "i", "encrypt": {"format": "luks"}}, "Parameter 'encrypt.key-secret' is missing"),
        ("rbd", {"pool": "p", "image": "i", "encrypt": {"format": "x", "key-secret": "s"}}, "Parameter 'format' does not accept value 'x'"),
        ("gluster", {}, "Parameter 'server' is missing"),
        ("gluster", {"server": [{"type": "x"}]}, "Parameter 'type' may be 'inet' or 'unix'"),
        ("gluster", {"server": [{"type": "unix", "path": "/s"}], "bogus": 1}, "Block protocol 'gluster' doesn't support the option 'bogus'"),
        ("gluster", {"filename": "gluster://h/volume"}, "invalid URI gluster://h/volume"),
        ("gluster", {"filename": "gluster+unix:///volume/file?host=a"}, "invalid URI"),
        ("nvme", {}, "'device' option is required"),
        ("nvme", {"device": "0000:44:00.0", "namespace": "a"}, "Parameter 'namespace' expects a number"),
        ("nvme", {"device": "0000:ff:1f.7"}, "/dev/vfio/vfio|There is no PCI device 0000:ff:1f.7"),
        ("io_uring", {}, "Parameter 'filename' is missing"),
        ("io_uring", {"filename": "/dev/null"}, "needs libblkio, which is not used here: use file or host_device"),
        ("nvme-io_uring", {"path": "/dev/ng9n9"}, "Could not open '/dev/ng9n9': No such file or directory"),
        ("virtio-blk-vfio-pci", {"path": "/sys/bus/pci/devices/0000:ff:1f.7"}, "/dev/vfio/vfio|There is no PCI device"),
        ("virtio-blk-vhost-user", {"path": "/none"}, "Could not open '/none'"),
        ("virtio-blk-vhost-vdpa", {"path": "/dev/null"}, "needs libblkio"),
        ("host_cdrom", {}, "The 'host_cdrom' block driver requires a file name"),
        ("host_cdrom", {"filename": "/dev/none"}, "Could not open '/dev/none': No such file or directory"),
    ],
)
def test_descriptions_are_checked(driver: str, options: dict[str, Any], words: str) -> None:
    assert driver in drivers.KNOWN.split()
    with pytest.raises(Error, match=words):
        Graph().open_spec({"driver": driver, **options}, OpenFlags())


def test_a_drive_without_a_medium(tmp_path: Path) -> None:
    same("info host_cdrom:/dev/null", tmp_path)
    same("info host_cdrom:%s" % file_of(tmp_path), tmp_path)
    with Graph().open_spec({"driver": "host_cdrom", "filename": "/dev/null"}, WRITABLE) as node:
        assert node.size == 0 and node.fileno() == -1
        with pytest.raises(Error, match="No medium found"):
            node.write_own(0, memoryview(bytes(512)))


def test_names_of_nvme(tmp_path: Path) -> None:
    for name in ("nvme:x", "nvme://", "nvme://0000:44:00.0", "nvme://0000:44:00.0/x", "nvme://0000:44:00.0/1"):
        if not os.path.exists("/dev/vfio/vfio"):
            found, expected = ours(["info", name], tmp_path), theirs(["info", name], tmp_path)
            assert found == expected, difference(name, found, expected)
