# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""NBD servers that the tests talk to, each over a UNIX socket: qemu-nbd, nbdkit, nbd-server, and one that lies as it is told.

Each is a context manager: it yields once the server listens, and always stops it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diskwright.protocols.nbd import codec as nbd
from diskwright.protocols.nbd.codec_server import Request, ServerCodec

from servers import PATIENCE, certificates, program

FLAGS = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.SEND_DF | nbd.SEND_FAST_ZERO


def uri(path: Path, export: str = "") -> str:
    return "nbd+unix://%s?socket=%s" % ("/" + export if export else "", path)


@contextmanager
def listening(command: list[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`command`, from when the socket `path` is there until the block ends."""
    log = path.with_name(path.name + ".log")
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    try:
        end = time.monotonic() + PATIENCE
        while not _listens(path):
            assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")
            time.sleep(0.005)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        path.unlink(missing_ok=True)


@contextmanager
def qemu_nbd(path: Path, *words: str) -> Iterator[Path]:
    """qemu-nbd for up to 10 clients, until it is stopped."""
    with listening([program("qemu-nbd"), "-t", "-e", "10", "-k", str(path), *words], path):
        yield path


@contextmanager
def nbdkit(path: Path, *words: str) -> Iterator[Path]:
    with listening([program("nbdkit"), "-f", "--exit-with-parent", "-U", str(path), *words], path):
        yield path


@contextmanager
def nbd_server(path: Path, image: Path) -> Iterator[Path]:
    """nbd-server with the export "disk". It goes to the background by itself."""
    config, pid = path.with_name(path.name + ".conf"), path.with_name(path.name + ".pid")
    config.write_text("[generic]\nunixsock = %s\nallowlist = true\n[disk]\nexportname = %s\ntrim = true\nflush = true\n" % (path, image))
    subprocess.run([program("nbd-server"), "-C", str(config), "-p", str(pid)], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=True)
    end = time.monotonic() + PATIENCE
    while not (pid.exists() and pid.read_text().strip() and _greets(path)):
        assert time.monotonic() < end, "nbd-server does not start"
        time.sleep(0.01)
    try:
        yield path
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)
        path.unlink(missing_ok=True)


def _listens(path: Path) -> bool:
    """Whether a server is there; the socket alone may be there earlier."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        return True
    return False


def _greets(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1)
        sock.connect(str(path))
        return sock.recv(8) == nbd.INIT_MAGIC
    return False


def credentials(place: Path) -> Path:
    """A directory with the files that TLS objects look for: an authority, certificates for both ends, two keys."""
    place.mkdir()
    made = certificates(place)
    shutil.copy(made.authority, place / "ca-cert.pem")
    for side in ("server", "client"):
        shutil.copy(made.certificate, place / (side + "-cert.pem"))
        shutil.copy(made.key, place / (side + "-key.pem"))
    (place / "keys.psk").write_text("qemu:%s\njoe:%s\n" % ("12" * 32, "ab" * 16))
    return place


class Connected:
    """The server's side of one connection, to be told what to say."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.codec = ServerCodec()

    def next(self) -> tuple[Any, bytes]:
        """The next thing that the client says, with its payload. Raises EOFError."""
        while True:
            event = self.codec.next_event()
            if event is not None:
                break
            data = self.sock.recv(65536)
            if not data:
                raise EOFError
            self.codec.receive(data)
        payload = bytearray(self.codec.payload)
        taken = self.codec.payload_into(memoryview(payload))
        while taken < len(payload):
            count = self.sock.recv_into(memoryview(payload)[taken:])
            if not count:
                raise EOFError
            self.codec.payload_received(count)
            taken += count
        return event, bytes(payload)

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def greet(self) -> None:
        self.send(self.codec.greeting())

    def negotiate(self, size: int = 1 << 20, flags: int = FLAGS, mode: str = "extended", block: tuple[int, int, int] | None = None) -> None:
        """The whole handshake, with structured replies or extended headers if `mode` says so."""
        self.greet()
        while not self.codec.transmission:
            option, _payload = self.next()
            number = option.option
            if option.error:
                self.send(self.codec.refuse(option))
            elif number == nbd.OPT_EXTENDED_HEADERS and mode != "extended" or number == nbd.OPT_STRUCTURED_REPLY and mode == "simple":
                self.send(self.codec.refuse(option, nbd.REP_ERR_UNSUP, ""))
            elif number == nbd.OPT_SET_META_CONTEXT:
                self.send(*(self.codec.meta_context(option, 5, query) for query in option.queries), self.codec.accept(option))
            elif number == nbd.OPT_GO:
                self.send(self.codec.info_export(option, size, flags))
                if block is not None:
                    self.send(self.codec.info_block_size(option, *block))
                self.send(self.codec.accept(option))
            else:
                self.send(self.codec.accept(option))

    def serve(self, content: bytearray, hook: Callable[[Connected, Request], bool] | None = None) -> None:
        """Answer requests about `content`; where `hook` returns True, it has."""
        while True:
            request, payload = self.next()
            if request.command == nbd.CMD_DISC:
                return
            if hook is not None and hook(self, request):
                continue
            self.answer(request, payload, content)

    def answer(self, request: Request, payload: bytes, content: bytearray) -> None:
        span = slice(request.offset, request.offset + request.length)
        if request.error:
            self.send(self.codec.reply_error(request))
        elif request.command == nbd.CMD_READ:
            self.send(self.codec.reply_data(request, request.offset, request.length), content[span])
        elif request.command == nbd.CMD_BLOCK_STATUS:
            self.send(self.codec.reply_status(request, 5, [(request.length, 0)]))
        else:
            if request.command == nbd.CMD_WRITE:
                content[span] = payload
            elif request.command == nbd.CMD_WRITE_ZEROES:
                content[span] = bytes(request.length)
            self.send(self.codec.reply_done(request))


@contextmanager
def liar(path: Path, *scripts: Callable[[Connected], None]) -> Iterator[Path]:
    """A server whose nth connection does what the nth script says (the last one for all further), and is closed then."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(16)
    open_sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def talk(sock: socket.socket, script: Callable[[Connected], None]) -> None:
        with suppress(OSError, EOFError), sock:
            script(Connected(sock))

    def accept() -> None:
        while True:
            try:
                sock, _address = listener.accept()
            except OSError:
                return
            script = scripts[min(len(open_sockets), len(scripts) - 1)]
            open_sockets.append(sock)
            threads.append(threading.Thread(target=talk, args=(sock, script), daemon=True))
            threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield path
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join(PATIENCE)
        for sock in open_sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(PATIENCE)
        path.unlink(missing_ok=True)
