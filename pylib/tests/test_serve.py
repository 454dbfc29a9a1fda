# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The NBD server and real clients: qemu-img, qemu-io, qemu-nbd, nbdcopy, nbdinfo, nbd-client, and one of our own that asks for everything."""

from __future__ import annotations

import json
import random
import socket
import threading
from pathlib import Path

import pytest

from diskwright.errors import Error
from diskwright.filter import Filter, Witness
from diskwright.node import OpenFlags
from diskwright.options import NodeRef, Options, opt
from diskwright.protocols.nbd import codec as nbd
from diskwright.server.connection import MAX_IN_FLIGHT
from serving import Client, Served, qcow2, raw, run, serving, wait_for

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw image of 4 MiB with data, a hole and data."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as stream:
        stream.write(random.Random(1).randbytes(MIB))
        stream.seek(3 * MIB)
        stream.write(random.Random(2).randbytes(MIB))
    return path


def image(tmp_path: Path, *more: str) -> Path:
    """A qcow2 overlay of 8 MiB: what its backing file of 6 MiB has at 1M, what it has itself at 2M, and zeroes at 3M."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(base), "6M")
    run("qemu-io", "-c", "write -P 1 1M 1M", "-c", "write -P 1 3M 64k", str(base))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", *more, str(top), "8M")
    run("qemu-io", "-c", "write -P 2 2M 128k", "-c", "write -z 3M 64k", str(top))
    return top


def test_what_clients_are_told_is_what_qemu_nbd_tells(tmp_path: Path) -> None:
    top = image(tmp_path)
    run("qemu-img", "bitmap", "--add", "--disable", str(top), "b0")
    theirs = tmp_path / "theirs.sock"
    line = ["qemu-nbd", "-k", str(theirs), "-f", "qcow2", "-r", "-x", "top", "-D", "one of two", "-A", "-B", "b0", "--fork", "-e", "0", "-t"]
    run(*line, "--pid-file", str(tmp_path / "pid"), str(top))
    try:
        with serving(tmp_path) as served:
            served.add({**qcow2(top), "read-only": True}, "top", False, description="one of two", allocation_depth=True, bitmaps=["b0"])
            for word in ("--json", "--map=base:allocation", "--map=qemu:allocation-depth", "--map=qemu:dirty-bitmap:b0"):
                ours = run("nbdinfo", word, served.uri("top"))
                assert ours.replace(served.path, "S") == run("nbdinfo", word, "nbd+unix:///top?socket=%s" % theirs).replace(str(theirs), "S")
            assert run("qemu-nbd", "-L", "-k", served.path) == run("qemu-nbd", "-L", "-k", str(theirs))
    finally:
        run("kill", (tmp_path / "pid").read_text().strip())


def test_programs_that_read_and_write(tmp_path: Path, disk: Path) -> None:
    content = disk.read_bytes()
    with serving(tmp_path) as served:
        served.add(raw(disk), "a")
        run("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "copy.qcow2"), "4M")
        served.add(qcow2(tmp_path / "copy.qcow2", "copy"), "b")
        run("nbdcopy", "--requests=64", served.uri("a"), str(tmp_path / "out.raw"))
        assert (tmp_path / "out.raw").read_bytes() == content
        run("nbdcopy", str(disk), served.uri("b"))
        assert run("qemu-img", "compare", served.uri("a"), served.uri("b")).startswith("Images are identical")
        run("qemu-img", "convert", "-n", "-O", "raw", str(tmp_path / "out.raw"), served.uri("b"))
        run("nbdcopy", "--synchronous", "--flush", served.uri("b"), served.uri("a"))
        script = ["write -P 7 1M 64k", "write -f -P 8 1M 512", "write -z -u 64k 64k", "discard 128k 64k", "flush", "read -P 8 1M 512", "read -P 0 64k 128k"]
        words = run("qemu-io", "-f", "raw", *[word for line in script for word in ("-c", line)], served.uri("b"))
        assert "failed" not in words and "error" not in words
    run("qemu-img", "check", str(tmp_path / "copy.qcow2"))
    changed = bytearray(content)
    changed[MIB : MIB + 65536] = b"\7" * 65536
    changed[MIB : MIB + 512] = b"\10" * 512
    changed[65536:196608] = bytes(131072)
    run("qemu-img", "convert", "-O", "raw", str(tmp_path / "copy.qcow2"), str(tmp_path / "out.raw"))
    assert (tmp_path / "out.raw").read_bytes() == changed


def test_nbd_client_lists(tmp_path: Path, disk: Path) -> None:
    served = Served(tmp_path)
    served.server.listen({"type": "inet", "host": "127.0.0.1", "port": "0"})
    served.add({"driver": "null-co", "node-name": "n"}, "b", description="second")
    served.server.start()
    try:
        port = served.server.addresses[1]["port"]
        assert "b: second" in run("nbd-client", "-l", "127.0.0.1", "-p", port)
        found = json.loads(run("nbdinfo", "--list", "--json", "nbd://127.0.0.1:%s" % port))
        assert [export["export-name"] for export in found["exports"]] == ["b"]
    finally:
        served.server.stop()
        served.exports.close()
        served.graph.close()
    assert served.deleted == ["x-b"] and not Path(served.path).exists()


@pytest.mark.parametrize("extended", [False, True])
def test_every_request(tmp_path: Path, disk: Path, extended: bool) -> None:
    content = disk.read_bytes()
    with serving(tmp_path) as served:
        served.add(raw(disk))
        with served.connect().go("", extended, contexts=["base:allocation"]) as client:
            assert client.export is not None and client.export.size == 4 * MIB
            assert client.read(0, 4 * MIB) == content
            assert client.read(MIB - 100, 200) == content[MIB - 100 : MIB + 100]
            assert client.read(0, 3 * MIB + 5, nbd.FLAG_DF) == content[: 3 * MIB + 5]
            assert client.do(nbd.CMD_CACHE, 0, 4 * MIB) == 0
            assert client.status(0, 4 * MIB) == {0: [(MIB, 0), (2 * MIB, 3), (MIB, 0)]}
            assert client.status(0, 4 * MIB, nbd.FLAG_REQ_ONE) == {0: [(MIB, 0)]}
            client.write(100, b"hello", nbd.FLAG_FUA)
            client.write(MIB, b"x" * (2 * MIB + 7))
            assert client.do(nbd.CMD_WRITE_ZEROES, MIB, MIB, nbd.FLAG_NO_HOLE | nbd.FLAG_FUA) == 0
            assert client.do(nbd.CMD_WRITE_ZEROES, 2 * MIB, 4096, nbd.FLAG_FAST_ZERO) == 0
            assert client.do(nbd.CMD_TRIM, 3 * MIB + 4096, 4096, nbd.FLAG_FUA) == 0
            assert client.do(nbd.CMD_FLUSH) == 0
            changed = bytearray(content)
            changed[100:105] = b"hello"
            changed[MIB : 3 * MIB + 7] = b"x" * (2 * MIB + 7)
            changed[MIB : 2 * MIB + 4096] = bytes(MIB + 4096)
            assert client.read(0, 3 * MIB + 4096) == changed[: 3 * MIB + 4096]
            assert client.read(3 * MIB + 8192, 100) == changed[3 * MIB + 8192 : 3 * MIB + 8292]
            # what cannot be done is said, and the next request is served
            assert client.do(nbd.CMD_READ, 4 * MIB - 1, 2) == nbd.EINVAL
            assert client.do(nbd.CMD_WRITE, 4 * MIB - 1, 2, payload=b"ab") == nbd.ENOSPC
            assert client.do(nbd.CMD_TRIM, 4 * MIB, 1) == nbd.EINVAL
            assert client.do(99, 0, 1) == nbd.EINVAL
            assert client.read(100, 5) == b"hello"
    assert disk.read_bytes()[100:105] == b"hello"


def test_simple_replies_and_the_oldest_way_in(tmp_path: Path, disk: Path) -> None:
    content = disk.read_bytes()
    with serving(tmp_path) as served:
        served.add(raw(disk), "old")
        with served.connect() as client:
            client.greet()
            client.socket.sendall(client.codec.export_name("old"))
            assert client.event().size == 4 * MIB
            assert client.read(0, 4 * MIB) == content
            client.write(0, b"abc")
            assert client.read(0, 4)[:3] == b"abc"
            assert client.do(nbd.CMD_READ, 5 * MIB, 1) == nbd.EINVAL
        with served.connect() as client:
            client.greet()
            client.socket.sendall(client.codec.export_name("nobody"))
            assert client.gone()


def test_read_only_and_unknown_exports(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path) as served:
        served.add({**raw(disk), "read-only": True}, "ro", False)
        with pytest.raises(Error, match="Cannot export read-only node as writable"):
            served.export("disk", "rw")
        with pytest.raises(Error, match="NBD server already has export named 'ro'"):
            served.exports.add("other", "ro", served.exports["x-ro"].root)
        with served.connect().go("ro") as client:
            assert client.do(nbd.CMD_WRITE, 0, 1, payload=b"x") == nbd.EPERM
            assert client.do(nbd.CMD_WRITE_ZEROES, 0, 1) == nbd.EPERM
        with served.connect() as client:
            client.greet()
            answer = client.ask(client.codec.go("none"))
            assert answer.code == nbd.REP_ERR_UNKNOWN and "export 'none' not present" in answer.text
            assert client.ask(client.codec.go("ro")).accepted


def test_hundred_clients_at_once(tmp_path: Path) -> None:
    """Each writes to its own part, all at the same time, and reads what it and its neighbour wrote."""
    run("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "disk.qcow2"), "16M")
    part = 160 << 10
    failures: list[BaseException] = []
    gate = threading.Barrier(100)

    def client(number: int) -> None:
        try:
            with served.connect().go(extended=bool(number % 2)) as own:
                data = random.Random(number).randbytes(part)
                gate.wait()
                for start in range(0, part, 40 << 10):
                    own.write(number * part + start, data[start : start + (40 << 10)])
                assert own.read(number * part, part) == data
                assert not own.do(nbd.CMD_FLUSH)
                gate.wait()
                other = (number + 1) % 100
                assert own.read(other * part, part) == random.Random(other).randbytes(part)
        except BaseException as exc:  # noqa: BLE001
            gate.abort()
            failures.append(exc)

    with serving(tmp_path) as served:
        served.add(qcow2(tmp_path / "disk.qcow2"))
        threads = [threading.Thread(target=client, args=(number,)) for number in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
    run("qemu-img", "check", str(tmp_path / "disk.qcow2"))


def test_random_requests_of_several_connections(tmp_path: Path) -> None:
    """Many requests under way on each of four connections, with storage that is slow enough to have them done by several threads."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    model = bytearray(MIB)
    dice = random.Random(5)
    with serving(tmp_path) as served:
        served.graph.add(raw(path))
        served.export("disk")
        clients = [served.connect().go(extended=bool(number % 2)) for number in range(4)]
        for connection in list(served.server._connections):
            wait_for(lambda connection=connection: connection._transmission is not None, "no transmission")
            connection._transmission._seconds = 1.0  # type: ignore[union-attr]
        for _round in range(30):
            expected = []
            for client in clients:
                for slot in range(8):
                    start = (clients.index(client) * 8 + slot) * 32768
                    length = dice.randrange(1, 32768)
                    kind = dice.choice([nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES])
                    data = dice.randbytes(length) if kind == nbd.CMD_WRITE else b""
                    client.send(kind, start, length, 0, data)
                    expected.append((client, kind, start, length))
                    if kind != nbd.CMD_READ:
                        model[start : start + length] = data or bytes(length)
            for client in clients:
                mine = [item for item in expected if item[0] is client]
                for _item in mine:
                    client.finish(0, 0)
            start = dice.randrange(MIB - 70000)
            assert clients[0].read(start, 70000) == model[start : start + 70000]
        assert clients[3].read(0, MIB) == model
        most = max(connection._threads for connection in served.server._connections)
        assert 1 < most <= MAX_IN_FLIGHT
        for client in clients:
            client.socket.close()
    assert path.read_bytes() == model


class FailingOptions(Options):
    """Options of Failing."""

    file: NodeRef = opt()


class Failing(Witness):
    """A node that cannot read beyond 1 MiB."""

    driver = "failing"
    options_class = FailingOptions

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        if host_offset + len(view) > MIB:
            raise OSError(5, "Input/output error")
        super()._pread_into(host_offset, view)


def test_an_error_of_storage_reaches_the_client_and_nobody_else(tmp_path: Path, disk: Path) -> None:
    content = disk.read_bytes()
    with serving(tmp_path) as served:
        served.graph.add(raw(disk))
        bad = served.graph.adopt(Failing(FailingOptions(file=served.graph.find("disk")), OpenFlags(writable=True)), "bad")
        # what the image has itself is sent from its file, then comes the backing file, which fails
        run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "x", "-F", "raw", str(tmp_path / "top.qcow2"), "4M")
        served.add({**qcow2(tmp_path / "top.qcow2", "top"), "backing": bad.name}, "top")
        with served.connect().go("top") as client:
            client.write(MIB - 131072, b"x" * 131072)
            for _round in range(20):
                assert client.do(nbd.CMD_READ, MIB - 131072, 262144) == nbd.EIO
                assert client.do(nbd.CMD_READ, MIB, 4096) == nbd.EIO
                assert client.read(MIB - 131072, 131072) == b"x" * 131072
                assert client.read(0, 65536) == content[:65536]
        with served.connect().go("top", structured=False) as client, served.connect().go("top") as other:
            assert client.do(nbd.CMD_READ, MIB, 4096) == nbd.EIO
            client.send(nbd.CMD_READ, MIB - 131072, 262144)  # too late for an error: half of it is sent
            with pytest.raises((AssertionError, OSError)):
                while True:
                    client.finish(MIB - 131072, 262144)
                    client.send(nbd.CMD_READ, MIB - 131072, 262144)
            assert other.read(0, 65536) == content[:65536]


def test_a_node_that_became_smaller(tmp_path: Path, disk: Path) -> None:
    content = disk.read_bytes()
    with serving(tmp_path) as served:
        served.add(raw(disk))
        with served.connect().go() as client:
            with served.graph.drained():
                served.graph.find("disk").truncate(2 * MIB)
            assert client.do(nbd.CMD_READ, 2 * MIB - 512, 1024) == nbd.EINVAL
            assert client.do(nbd.CMD_WRITE, 2 * MIB, 2 * MIB, payload=bytes(2 * MIB)) == nbd.ENOSPC
            assert client.do(nbd.CMD_TRIM, 2 * MIB, MIB) == nbd.EINVAL
            assert client.read(2 * MIB - 512, 512) == bytes(512) and client.read(0, 512) == content[:512]
        with served.connect().go() as client:
            assert client.export is not None and client.export.size == 2 * MIB
            with disk.open("r+b") as stream:  # nobody told us
                stream.truncate(MIB)
            assert client.do(nbd.CMD_READ, MIB - 512, 1024) == nbd.EINVAL
            assert client.read(0, 512) == content[:512]


def test_what_was_asked_for_before_the_good_bye_is_answered(tmp_path: Path, disk: Path) -> None:
    content = disk.read_bytes()
    with serving(tmp_path) as served:
        served.add(raw(disk))
        for length in (512, 65536):
            with served.connect().go() as client:
                words = b"".join(client.codec.request(nbd.CMD_READ, number, number * 512, length) for number in range(20))
                client.socket.sendall(words + client.codec.request(nbd.CMD_DISC, 99))
                for number in range(20):
                    assert client.finish(number * 512, length)[1] == content[number * 512 : number * 512 + length]
                assert client.gone()


def test_an_export_goes_while_others_stay(tmp_path: Path, disk: Path) -> None:
    with serving(tmp_path) as served:
        served.add(raw(disk), "a")
        served.add({"driver": "null-co", "node-name": "n", "read-zeroes": True}, "b")
        with served.connect().go("a") as one, served.connect().go("b") as other:
            with pytest.raises(Error, match="export 'x-a' still in use"):
                served.exports.remove("x-a")
            served.exports.remove("x-a", "hard")
            assert one.gone() and served.deleted == ["x-a"]
            assert other.read(0, 100) == bytes(100)
        served.graph.remove("disk")
        wait_for(lambda: not served.exports["x-b"].clients, "the client stays")
        served.exports.remove("x-b")
        with served.connect() as client:
            client.greet()
            assert client.ask(client.codec.go("b")).code == nbd.REP_ERR_UNKNOWN
        with pytest.raises(Error, match="Export 'x-b' is not found"):
            served.exports.remove("x-b")


def test_a_drain_over_tcp_gives_what_was_asked_for(tmp_path: Path, disk: Path) -> None:
    """Requests that are here when the server stops are answered, and a client that is idle is disconnected at once."""
    content = disk.read_bytes()
    served = Served(tmp_path)
    served.server.listen({"type": "inet", "host": "127.0.0.1", "port": "0"})
    served.add(raw(disk))
    served.server.start()
    address = served.server.addresses[1]
    with Client((address["host"], int(address["port"]))).go() as busy, served.connect().go() as idle:
        busy.send(nbd.CMD_READ, 0, 4 * MIB)
        busy.socket.recv(1, socket.MSG_PEEK)
        stop = threading.Thread(target=served.server.stop)
        stop.start()
        assert idle.gone()
        assert busy.finish(0, 4 * MIB)[1] == content
        assert busy.gone()
        stop.join()
        with pytest.raises(OSError):
            Client((address["host"], int(address["port"])))
    served.exports.close()
    served.graph.close()


def test_the_graph_changes_while_a_client_does_not_take_its_data(tmp_path: Path, disk: Path) -> None:
    """A client that asks for much and takes nothing does not hold up a filter that is put under the export."""
    content = disk.read_bytes()
    with serving(tmp_path) as served:
        served.add(raw(disk))
        with served.connect().go() as client:
            for _number in range(8):
                client.send(nbd.CMD_READ, 0, 4 * MIB)
            with served.connect().go() as other:  # whose socket is full between two answers
                for _number in range(64):
                    other.send(nbd.CMD_READ, 0, 65536)
                wait_for(lambda: served.exports["x-default"].clients == 2, "no clients")
                with served.graph.drained():
                    pass
            top = served.graph.adopt(Filter(FailingOptions(file=served.graph.find("disk")), OpenFlags(writable=True)), "top")
            with served.graph.drained():
                served.graph.replace(served.graph.find("disk"), top)
            assert served.exports["x-default"].root.node is top
            for _number in range(8):
                assert client.finish(0, 4 * MIB)[1] == content


def test_a_client_that_takes_little_at_a_time_holds_up_no_change(tmp_path: Path, disk: Path) -> None:
    content = disk.read_bytes()
    with serving(tmp_path) as served:
        served.add(raw(disk))
        with served.connect().go() as client:
            client.send(nbd.CMD_READ, 0, 4 * MIB)
            over = threading.Event()

            def sip() -> None:
                while not over.wait(0.05):
                    client.codec.receive(client.socket.recv(16384))

            sipping = threading.Thread(target=sip)
            sipping.start()
            for _round in range(3):
                with served.graph.drained():
                    pass
            assert not over.is_set()
            over.set()
            sipping.join()
            assert client.finish(0, 4 * MIB)[1] == content
