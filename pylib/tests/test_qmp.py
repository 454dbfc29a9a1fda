# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""QMP: the same script of commands is given to qemu-storage-daemon and to us; clients that behave, and clients that do not."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import pytest
from qemu.qmp import ConnectError, EventListener, QMPClient
from qemu.qmp.error import QMPError

from qmp_scripts import BITMAPS, CHAIN, CREATION, DRIVES, JOBS, NODES, REFUSALS, SIZE, SNAPSHOTS, WIRE, Step

from diskwright.errors import OptionError
from diskwright.graph import Graph
from diskwright.jobs.live import Live
from diskwright.qmp import codec
from diskwright.qmp.monitor import MAX_CLIENTS, Monitor, parse_address

PATIENCE = 20  # seconds


def qemu_img(*args: object) -> None:
    subprocess.run(["qemu-img", *map(str, args)], check=True, capture_output=True)


class Client:
    """A QMP client that does what it is told, and notes what it hears."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.01)
        self._data = b""
        self.events: list[dict[str, Any]] = []
        self.greeting = self.message()

    def message(self) -> dict[str, Any]:
        """The next one; {} at the end."""
        end = time.monotonic() + PATIENCE
        while b"\n" not in self._data:
            ready = select.select([self.socket], [], [], max(0, end - time.monotonic()))[0]
            assert ready, "no answer"
            data = self.socket.recv(1 << 16)
            if not data:
                return {}
            self._data += data
        line, self._data = self._data.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def raw(self, data: bytes) -> dict[str, Any]:
        self.socket.sendall(data)
        while True:
            found = self.message()
            if "event" not in found:
                return found
            self.events.append(found)

    def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        return self.raw(json.dumps({"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}).encode())

    def wait(self, job: str, status: str) -> None:
        """Until the job came to the state, since it was created the last time."""
        while True:
            seen = [event["data"] for event in self.events if event["event"] == "JOB_STATUS_CHANGE" and event["data"]["id"] == job]
            begun = max((place for place, one in enumerate(seen) if one["status"] == "created"), default=0)
            if any(one["status"] == status for one in seen[begun:]):
                return
            found = self.message()
            assert "event" in found, found
            self.events.append(found)

    def run(self, script: list[Step]) -> list[Any]:
        """The answers to a script."""
        self.command("qmp_capabilities")
        answers: list[Any] = []
        for step in script:
            if isinstance(step, bytes):
                answers.append(self.raw(step))
            elif isinstance(step, str):
                answers.append(self.command(step))
            elif step[0] == "wait":
                self.wait(*step[1:])  # type: ignore[arg-type]
            else:
                answers.append(self.raw(json.dumps({"execute": step[0], "arguments": step[1]}).encode()))
        return answers

    def close(self) -> None:
        self.socket.close()


def of_qemu(directory: Path, script: list[Step]) -> tuple[list[Any], list[dict[str, Any]]]:
    path = directory / "qemu.sock"
    command = ["qemu-storage-daemon", "--chardev", "socket,path=%s,server=on,wait=off,id=c" % path, "--monitor", "chardev=c"]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL) as daemon:
        try:
            client = Client(path)
            answers = client.run(script)
            client.close()
        finally:
            daemon.terminate()
    return answers, client.events


def of_ours(directory: Path, script: list[Step]) -> tuple[list[Any], list[dict[str, Any]]]:
    graph = Graph()
    live = Live(graph)
    monitor = Monitor(live)
    monitor.listen({"type": "unix", "path": str(directory / "ours.sock")})
    monitor.start()
    here = os.getcwd()
    os.chdir(directory)
    try:
        client = Client(directory / "ours.sock")
        answers = client.run(script)
        client.close()
    finally:
        monitor.stop()
        live.close()
        graph.close()
        os.chdir(here)
    return answers, client.events


def simplified(answer: Any) -> Any:
    """What of an answer must be the same."""
    found = answer.get("return")
    if isinstance(found, dict) and "qemu" in found:
        del found["package"]
    if isinstance(found, dict) and "date-sec" in found:
        return sorted(found)
    if isinstance(found, list) and found and "drv" in found[0]:
        shown = []
        for node in found:
            if not node["node-name"].startswith("#"):
                bitmaps = sorted((bitmap for bitmap in node.get("dirty-bitmaps", ()) if "name" in bitmap), key=lambda bitmap: bitmap["name"])
                shown.append((node["node-name"], node["drv"], bitmaps, node["image"]["virtual-size"], node.get("backing_file")))
        return shown
    return answer


def by_job(events: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What was told of each job, in order."""
    found: dict[str, list[Any]] = {}
    for event in events:
        data = dict(event["data"])
        name = data.pop("id", None) or data.pop("device", None)
        if data.get("speed"):
            data.pop("offset")
        found.setdefault(name, []).append((event["event"], data))
    return found


def same(tmp_path: Path, images: dict[str, tuple[str, ...]], script: list[Step]) -> None:
    """Both give the same answers and tell the same of each job."""
    results = []
    for run in (of_qemu, of_ours):
        directory = tmp_path / run.__name__
        directory.mkdir()
        for name, options in images.items():
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, name, str(SIZE)], cwd=directory, check=True)
        results.append(run(directory, script))
    for step, theirs, ours in zip([step for step in script if step[0] != "wait"], results[0][0], results[1][0]):
        assert simplified(ours) == simplified(theirs), step
    assert by_job(results[1][1]) == by_job(results[0][1])


EMPTY: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("images", "script"),
    [
        ({}, WIRE),
        ({"t1": EMPTY}, NODES),
        ({"a": EMPTY, "t1": EMPTY, "t2": EMPTY}, JOBS),
        ({"base": EMPTY, "mid": ("-b", "base", "-F", "qcow2"), "top": ("-b", "mid", "-F", "qcow2"), "t1": EMPTY}, CHAIN),
        ({"a": EMPTY, "t1": EMPTY}, BITMAPS),
        ({"a": EMPTY, "s": EMPTY, "t1": EMPTY}, SNAPSHOTS),
        ({}, CREATION),
        ({"a": EMPTY}, DRIVES),
        ({"a": EMPTY, "b": EMPTY, "v2": ("-o", "compat=0.10"), "ro": EMPTY}, REFUSALS),
    ],
    ids=["wire", "nodes", "jobs", "chain", "bitmaps", "snapshots", "creation", "drives", "refusals"],
)
def test_the_same_as_qemu_storage_daemon(tmp_path: Path, images: dict[str, tuple[str, ...]], script: list[Step]) -> None:
    same(tmp_path, images, script)


# -- the wire --------------------------------------------------------------------------------------------------------


def requests(data: bytes, step: int) -> list[Any]:
    decoder = codec.Decoder()
    return [found for at in range(0, len(data), step) for found in decoder.feed(data[at : at + step])]


def test_a_stream_may_be_cut_anywhere() -> None:
    text = rb'{"execute": "a\"}{", "id": "\\"} {"execute":"b","arguments":{"x":[{"y":"]}"}]}}' + b"\n[1] 'x' word {}"
    whole = requests(text, len(text))
    assert [found.command for found in whole[:2]] == ['a"}{', "b"] and whole[0].id == "\\"
    for step in range(1, len(text)):
        again = requests(text, step)
        assert [type(found) for found in again] == [type(found) for found in whole], step


def test_what_is_too_much_is_refused() -> None:
    decoder = codec.Decoder()
    found = [one for _part in range(20) for one in decoder.feed(b'{"execute": "' + b"x" * 100000)][0]
    assert isinstance(found, codec.Refused) and found.fatal
    nested = requests(b"[" * 5000 + b"]" * 5000, 1000)[0]
    assert "nesting" in nested.reply["error"]["desc"]
    replies = requests(b"nonsense " * (codec.MAX_ERRORS + 5), 1 << 16)
    assert replies[-1].fatal and len(replies) == codec.MAX_ERRORS


def test_any_bytes_are_answered() -> None:
    rng = random.Random(5)
    words = [b"{", b"}", b"[", b"]", b'"', b"'", b"\\", b",", b":", b"execute", b" ", b"\n", b"1", b"\xff", b"null"]
    for _round in range(300):
        for found in requests(b"".join(rng.choice(words) for _word in range(60)), rng.randrange(1, 50)):
            assert isinstance(found, (codec.Request, codec.Refused))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:a", {"type": "unix", "path": "a"}),
        ("./a,server=on,wait=off", {"type": "unix", "path": "./a"}),
        ("localhost:4444", {"type": "inet", "host": "localhost", "port": "4444"}),
        ("tcp:[::1]:0", {"type": "inet", "host": "::1", "port": "0"}),
        ("nonsense", None),
        ("a:70000", None),
        ("unix:a,server=off", None),
    ],
)
def test_addresses(text: str, address: Optional[dict[str, str]]) -> None:
    if address is None:
        with pytest.raises(OptionError):
            parse_address(text)
    else:
        assert parse_address(text) == address


# -- monitors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    graph = Graph()
    made = Monitor(Live(graph))
    made.listen({"type": "unix", "path": str(tmp_path / "qmp")})
    made.start()
    yield made
    made.stop()
    made.live.close()
    graph.close()


def test_several_clients_hear_of_everything(monitor: Monitor) -> None:
    path = Path(monitor.addresses[0]["path"])
    clients = [Client(path) for _client in range(3)]
    assert clients[0].command("query-jobs")["error"]["class"] == "CommandNotFound"
    for client in clients:
        assert client.command("qmp_capabilities") == {"return": {}}
    for number in range(2):
        clients[0].command("blockdev-add", driver="null-co", node_name="n%d" % number, size=SIZE)
    clients[1].command("blockdev-mirror", job_id="j", device="n0", target="n1", sync="full")
    clients[2].wait("j", "ready")
    clients[2].command("job-cancel", id="j")
    for client in clients:
        client.wait("j", "null")
    sequences = [[(event["event"], event["data"].get("status")) for event in client.events] for client in clients]
    assert sequences[0] == sequences[1] == sequences[2]
    assert all({"seconds", "microseconds"} == set(event["timestamp"]) for event in clients[0].events)
    for client in clients:
        client.close()


def test_a_client_that_does_not_read_keeps_nobody_waiting(monitor: Monitor) -> None:
    path = Path(monitor.addresses[0]["path"])
    lazy = Client(path)
    lazy.command("qmp_capabilities")
    for _event in range(2000):
        monitor.live.events.emit("BLOCK_JOB_ERROR", device="x" * 10000)
    with Monitorable(path) as other:
        assert "return" in other.command("query-version")
    lazy.close()


class Monitorable(Client):
    """A client that has agreed."""

    def __enter__(self) -> Monitorable:
        self.command("qmp_capabilities")
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()


def test_clients_that_talk_nonsense_or_are_too_many_are_sent_away(monitor: Monitor) -> None:
    path = Path(monitor.addresses[0]["path"])
    noisy = Client(path)
    noisy.socket.sendall(b"nonsense " * 1000)
    while noisy.message():
        pass
    noisy.close()
    clients = [Client(path) for _client in range(MAX_CLIENTS)]
    with socket.socket(socket.AF_UNIX) as one_more:
        one_more.connect(str(path))
        assert one_more.recv(1) == b""
    clients[0].socket.sendall(b'{"execute":')  # half a request, and gone
    for client in clients:
        client.close()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as one_more:
            one_more.connect(str(path))
            if one_more.recv(1):
                return
    raise AssertionError("no room for a new client")


def test_a_command_that_takes_its_time_does_not_keep_a_monitor_from_stopping(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diskwright.qmp.monitor.SECONDS", 0.1)
    client = Client(Path(monitor.addresses[0]["path"]))
    client.command("qmp_capabilities")
    with monitor.live.lock:
        client.socket.sendall(b'{"execute": "query-jobs"}')
        monitor.stop()
    assert client.message() == {} and not Path(monitor.addresses[0]["path"]).exists()
    client.close()


def test_what_there_is_can_be_asked_for(monitor: Monitor) -> None:
    with Monitorable(Path(monitor.addresses[0]["path"])) as client:
        names = {entry["name"] for entry in client.command("query-commands")["return"]}
        schema = client.command("query-qmp-schema")["return"]
        commands = {entry["name"]: entry for entry in schema if entry["meta-type"] == "command"}
        assert set(commands) == names and {"blockdev-add", "transaction", "job-pause", "query-qmp-schema"} <= names
        types = {entry["name"] for entry in schema}
        for entry in schema:
            for member in entry.get("members", ()):
                assert entry["meta-type"] == "enum" or member["type"] in types
            assert entry.get("arg-type", "any") in types and entry.get("ret-type", "any") in types
        theirs = of_qemu(Path(monitor.addresses[0]["path"]).parent, ["query-commands"])[0][0]["return"]
        missing = {entry["name"] for entry in theirs} - names - {"qmp_capabilities"}
        assert missing <= NOT_THERE


# what qemu-storage-daemon has besides: character devices, objects' properties, what is deprecated, and what needs a virtual machine
NOT_THERE = set(
    "add-fd blockdev-set-iothread chardev-add chardev-change chardev-remove chardev-send-break device_add device_del "
    "query-chardev query-chardev-backends qom-get qom-list qom-list-properties qom-list-types qom-set "
    "query-fdsets remove-fd replication x-blockdev-set-iothread x-nbd-server-add getfd closefd get-win32-socket query-yank yank "
    "query-iothreads ringbuf-read ringbuf-write query-block-latency-histogram block-latency-histogram-set nbd-server-list "
    "trace-event-get-state trace-event-set-state".split()
)


# -- qemu.qmp against a running server ---------------------------------------------------------------------------------


def test_a_served_disk_is_mirrored_while_a_client_writes(tmp_path: Path) -> None:
    for name in ("disk", "copy"):
        qemu_img("create", "-q", "-f", "qcow2", tmp_path / name, 8 << 20)
    node_options = "driver=qcow2,node-name=%s,file.driver=file,file.filename=%s"
    command = [sys.executable, "-m", "diskwright", "serve", "--qmp", "unix:%s" % (tmp_path / "qmp"), "-q"]
    for name in ("disk", "copy"):
        command += ["--blockdev", node_options % (name, tmp_path / name)]
    command += ["--nbd-server", "addr.type=unix,addr.path=%s" % (tmp_path / "nbd"), "--export", "nbd,id=e,node-name=disk,writable=on"]
    with subprocess.Popen(command) as server:
        try:
            model = asyncio.run(drive(tmp_path))
            assert server.wait(PATIENCE) == 0
        finally:
            server.kill()
    qemu_img("check", "-q", tmp_path / "copy")
    qemu_img("convert", "-O", "raw", tmp_path / "copy", tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == model


async def drive(directory: Path) -> bytes:
    """Mirror the disk while it is written, over qemu.qmp; what the copy should hold."""
    model = bytearray(8 << 20)
    uri = "nbd+unix:///disk?socket=%s" % (directory / "nbd")
    words = ["qemu-io", "-f", "raw", uri]
    for number in range(200):
        offset, value = number * 37 % 8000 * 1024, number % 250 + 1
        words += ["-c", "write -P %d %d 7k" % (value, offset)]
        model[offset : offset + 7168] = bytes([value]) * 7168
    client = QMPClient("test")
    for attempt in range(1000):
        try:
            await client.connect(str(directory / "qmp"))
            break
        except ConnectError:
            assert attempt < 999
            await asyncio.sleep(0.01)
    with client.listener() as listener:
        writing = await asyncio.create_subprocess_exec(*words, stdout=subprocess.DEVNULL)
        await client.execute("blockdev-mirror", {"job-id": "m", "device": "disk", "target": "copy", "sync": "full"})
        await heard(listener, "BLOCK_JOB_READY")
        await client.execute("job-complete", {"id": "m"})
        await heard(listener, "BLOCK_JOB_COMPLETED")
        assert await writing.wait() == 0
    exports = await client.execute("query-block-exports")
    assert exports == [{"node-name": "copy", "shutting-down": False, "type": "nbd", "id": "e"}]
    with pytest.raises(QMPError, match="Job not found"):
        await client.execute("job-pause", {"id": "m"})
    await client.execute("quit")
    with suppress(EOFError):  # the server may have been faster
        await client.disconnect()
    return bytes(model)


async def heard(listener: EventListener, name: str) -> None:
    async for event in listener:
        if event["event"] == name:
            return
