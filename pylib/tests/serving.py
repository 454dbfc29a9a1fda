# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of the NBD server share: a server in this process or as a command, and a client that says what it is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

from diskwright.graph import Graph
from diskwright.protocols.nbd import codec as nbd
from diskwright.protocols.nbd.codec_client import Answer, ClientCodec, Context, Data, Done, Export, Hole, Status
from diskwright.server.exports import ExportSet, export_root
from diskwright.server.server import NbdServer

PATIENCE = 20.0  # seconds within which whatever is waited for must happen


def wait_for(condition: Any, what: str) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


class Served:
    """A graph, its exports and a server on a unix socket, in this process."""

    def __init__(self, place: Path, **limits: Any) -> None:
        self.graph = Graph()
        self.deleted: list[str] = []
        self.said: list[str] = []
        self.exports = ExportSet(lambda export: self.deleted.append(export.id))
        self.server = NbdServer(self.exports, said=self.said.append, **limits)
        self.path = str(place / "server.sock")
        self.server.listen({"type": "unix", "path": self.path})

    def add(self, spec: Mapping[str, Any], name: str = "", writable: bool = True, **more: Any) -> None:
        """Open a node, and export it by `name`."""
        self.graph.add(spec)
        self.export(spec["node-name"], name, writable, **more)

    def export(self, node: str, name: str = "", writable: bool = True, **more: Any) -> None:
        """Export a node by `name`."""
        root = export_root(self.graph, node, writable, node)
        try:
            self.exports.add("x-" + (name or "default"), name, root, writable, **more)
        except BaseException:
            root.close()
            raise

    def uri(self, name: str = "") -> str:
        """How clients find an export."""
        return "nbd+unix:///%s?socket=%s" % (name, self.path)

    def connect(self) -> Client:
        """A new client, before it has said anything."""
        return Client(self.path)


@contextmanager
def serving(place: Path, **limits: Any) -> Iterator[Served]:
    """A server; whatever happens, all is closed in the end."""
    served = Served(place, **limits)
    served.server.start()
    try:
        yield served
    finally:
        served.server.stop(5)
        served.exports.close()
        served.graph.close()


def raw(path: Path, name: str = "disk") -> dict[str, Any]:
    """The description of a raw image."""
    return {"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": str(path)}}


def qcow2(path: Path, name: str = "disk") -> dict[str, Any]:
    """The description of a qcow2 image."""
    return {"driver": "qcow2", "node-name": name, "discard": "unmap", "file": {"driver": "file", "filename": str(path)}}


class Client:
    """A client that sends what it is told, and takes what comes."""

    def __init__(self, place: Union[str, tuple[str, int]]) -> None:
        self.socket = socket.socket(socket.AF_UNIX if isinstance(place, str) else socket.AF_INET)
        try:
            self.socket.settimeout(PATIENCE)
            self.socket.connect(place)
        except OSError:
            self.socket.close()
            raise
        self.codec = ClientCodec()
        self.handle = 0
        self.contexts: dict[str, int] = {}
        self.export: Optional[Export] = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_details: object) -> None:
        self.socket.close()

    def event(self) -> Any:
        """The next thing that the server says; its payload is in `self.data`."""
        while True:
            event = self.codec.next_event()
            if event is not None:
                break
            data = self.socket.recv(65536)
            assert data, "the server has closed the connection"
            self.codec.receive(data)
        self.data = bytearray(self.codec.payload)
        view = memoryview(self.data)
        while self.codec.payload:
            count = self.codec.payload_into(view)
            if not count:
                count = self.socket.recv_into(view)
                assert count
                self.codec.payload_received(count)
            view = view[count:]
        return event

    def ask(self, data: bytes) -> Answer:
        """Send an option; the last answer to it."""
        self.socket.sendall(data)
        while True:
            event = self.event()
            if isinstance(event, Answer):
                return event
            if isinstance(event, Context):
                self.contexts[event.name] = event.id
            if isinstance(event, Export):
                self.export = event

    def greet(self) -> None:
        """Answer the greeting."""
        self.event()
        self.socket.sendall(self.codec.client_flags())

    def go(self, name: str = "", extended: bool = False, structured: bool = True, contexts: Sequence[str] = ()) -> Client:
        """Negotiate, and choose an export."""
        self.greet()
        if extended:
            assert self.ask(self.codec.extended_headers()).accepted
        elif structured:
            assert self.ask(self.codec.structured_reply()).accepted
        if contexts:
            assert self.ask(self.codec.set_meta_context(name, contexts)).accepted
        assert self.ask(self.codec.go(name)).accepted
        return self

    def send(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request; its handle."""
        self.handle += 1
        self.socket.sendall(self.codec.request(command, self.handle, offset, length, flags) + payload)
        return self.handle

    def finish(self, offset: int = 0, length: int = 0) -> tuple[int, bytearray, list[Status]]:
        """Take replies until a request is done: the error, what was read, and what was said of blocks."""
        content = bytearray(b"?" * length)
        statuses = []
        while True:
            event = self.event()
            if isinstance(event, Data):
                content[event.offset - offset : event.offset - offset + event.length] = self.data
            elif isinstance(event, Hole):
                content[event.offset - offset : event.offset - offset + event.length] = bytes(event.length)
            elif isinstance(event, Status):
                statuses.append(event)
            elif isinstance(event, Done):
                return event.error, content, statuses

    def do(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request and wait; its error."""
        self.send(command, offset, length, flags, payload)
        return self.finish(offset, length)[0]

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """Bytes of the export."""
        self.send(nbd.CMD_READ, offset, length, flags)
        error, content, _statuses = self.finish(offset, length)
        assert not error
        return bytes(content)

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write to the export."""
        assert not self.do(nbd.CMD_WRITE, offset, len(data), flags, data)

    def status(self, offset: int, length: int, flags: int = 0) -> dict[int, list[tuple[int, int]]]:
        """Block status, by the numbers of the contexts."""
        self.send(nbd.CMD_BLOCK_STATUS, offset, length, flags)
        error, _content, statuses = self.finish()
        assert not error
        return {status.context: list(status.extents()) for status in statuses}

    def gone(self) -> bool:
        """Wait until the server has closed the connection, or says something."""
        try:
            return not self.socket.recv(1)
        except OSError:
            return True


@contextmanager
def command(
    *args: str, place: Path, environment: Optional[Mapping[str, str]] = None, first: str = "", fds: Sequence[int] = ()
) -> Iterator[tuple[Any, list[str]]]:
    """`diskwright serve ARGS`, in a process that has `fds` and did what `first` says in Python, from when it is ready: the process,
    and the first line that it printed. It must end well when it is told to."""
    program = (first or "pass") + "; import sys; sys.argv[0] = 'diskwright'; from diskwright.cli import main; sys.exit(main())"
    line = [sys.executable, "-c", program, "serve", *args]
    env = {**os.environ, **(environment or {})}
    process = subprocess.Popen(line, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=fds)
    assert process.stdout is not None and process.stderr is not None
    try:
        uris = [process.stdout.readline().strip()]
        assert uris[0], process.stderr.read()
        yield process, uris
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        _out, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def run(*args: str, code: int = 0, place: Optional[Path] = None) -> str:
    """What a program prints; it must end with `code`."""
    done = subprocess.run(args, cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE * 2, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
