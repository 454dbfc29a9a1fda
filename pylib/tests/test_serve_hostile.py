# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that mean harm: the server sends them away, keeps its memory, and goes on serving the others."""

from __future__ import annotations

import random
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diskwright.protocols.nbd import codec as nbd
from diskwright.server.connection import MAX_OPTIONS
from serving import Client, Served, raw, serving, wait_for

MIB = 1 << 20
CONTENT = random.Random(3).randbytes(MIB)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A server with one export, which a well-behaved client must be able to use to the end."""
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    with serving(tmp_path, max_connections=20) as server:
        server.add(raw(path))
        yield server
        with server.connect().go() as client:
            assert client.read(0, MIB) == CONTENT
    assert path.read_bytes() == CONTENT


def threads() -> int:
    return threading.active_count()


GREETING = struct.pack(">I", nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)


def option(number: int, data: bytes = b"", length: int = -1, magic: bytes = nbd.OPTION_MAGIC) -> bytes:
    return nbd.OPTION_HEADER.pack(magic, number, len(data) if length < 0 else length) + data


@pytest.mark.parametrize(
    "words",
    [
        b"\xff" * 4,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        GREETING + option(nbd.OPT_LIST, magic=b"IHAVENOT"),
        GREETING + option(nbd.OPT_GO, length=(1 << 32) - 1),
        GREETING + option(nbd.OPT_EXPORT_NAME, b"x" * 5000),
        GREETING + option(nbd.OPT_EXPORT_NAME, b"nobody"),
        GREETING + option(nbd.OPT_ABORT),
        GREETING + option(nbd.OPT_EXPORT_NAME) + b"\0" * 64,
        GREETING + option(nbd.OPT_EXPORT_NAME) + nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 1, 0, (1 << 32) - 1),
        GREETING + option(nbd.OPT_LIST) * (MAX_OPTIONS + 1),
    ],
)
def test_what_cannot_be_answered_ends_the_connection(served: Served, words: bytes) -> None:
    with served.connect() as client:
        client.event()
        try:
            client.socket.sendall(words)
            while client.socket.recv(65536):
                pass
        except OSError:
            pass
    wait_for(lambda: not served.server.clients, "the connection stays")


def test_bad_options_are_refused_and_the_client_may_go_on(served: Served) -> None:
    bad = [
        (99, b""),
        (nbd.OPT_LIST, b"xx"),
        (nbd.OPT_GO, b""),
        (nbd.OPT_GO, struct.pack(">I", 5000)),
        (nbd.OPT_GO, nbd.counted(b"\xff\xfe") + b"\0\0"),
        (nbd.OPT_INFO, nbd.counted(b"x") + struct.pack(">H", 9)),
        (nbd.OPT_SET_META_CONTEXT, nbd.counted(b"") + struct.pack(">I", 1 << 31)),
        (nbd.OPT_STARTTLS, b""),
        (nbd.OPT_GO, bytes(2 * MIB)),
    ]
    with served.connect() as client:
        client.greet()
        for number, data in bad:
            assert client.codec is not None
            client.socket.sendall(option(number, data))
            header = b""
            while len(header) < 20:
                header += client.socket.recv(20 - len(header))
            magic, same, code, length = nbd.OPTION_REPLY.unpack(header)
            assert magic == nbd.OPTION_REPLY_MAGIC and same == number and code & nbd.REP_ERROR
            while length:
                length -= len(client.socket.recv(length))
        assert client.ask(client.codec.go("")).accepted
        assert client.read(5, 5) == CONTENT[5:10]


def test_garbage_of_all_kinds(served: Served) -> None:
    dice = random.Random(11)
    valid = GREETING + option(nbd.OPT_STRUCTURED_REPLY) + option(nbd.OPT_GO, nbd.counted(b"") + b"\0\0")
    requests = b"".join(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, command, command, 0, 512) for command in (0, 3, 5, 7))
    for _round in range(60):
        words = bytearray(valid + requests)
        for _number in range(dice.randrange(1, 6)):
            words[dice.randrange(len(words))] = dice.randrange(256)
        with served.connect() as client:
            client.event()
            try:
                client.socket.sendall(words)
                client.socket.shutdown(socket.SHUT_WR)
                while client.socket.recv(65536):
                    pass
            except OSError:
                pass
    wait_for(lambda: not served.server.clients, "a connection stays")


def test_slow_and_silent_clients_are_sent_away(tmp_path: Path) -> None:
    """As many as the server takes sit there, one sends a byte now and then; another one waits for its turn, and gets it."""
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    with serving(tmp_path, max_connections=5, handshake_seconds=1) as served:
        served.add(raw(path))
        idle = [served.connect() for _number in range(5)]
        idle[0].event()
        wait_for(lambda: served.server.clients == 5, "they do not come in")
        drops = threading.Event()

        def drip() -> None:
            for byte in GREETING + option(nbd.OPT_LIST) * 10:
                if drops.wait(0.05):
                    return
                try:
                    idle[0].socket.sendall(bytes([byte]))
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        with served.connect().go() as client:
            assert client.read(0, 100) == CONTENT[:100]
            for other in idle[1:]:
                other.event()
                assert other.gone()
            wait_for(lambda: served.server.clients == 1, "they stay")
        drops.set()
        dripping.join()
        for other in idle:
            other.socket.close()
        assert sum("took too long" in text for text in served.said) == 5


def test_requests_that_are_left_half_done(served: Served) -> None:
    for words in (
        nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 1, MIB - 10, 5) + b"ab",
        nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 1, MIB, 32 << 20) + b"x" * 4096,
        nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 1, 0, MIB)[:11],
        nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 1, 0, MIB) * 50,
    ):
        with served.connect().go() as client:
            client.socket.sendall(words)
    with served.connect().go() as client:  # it sends no more, but takes its answers
        client.send(nbd.CMD_READ, 0, MIB)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.finish(0, MIB)[1] == CONTENT
        assert client.gone()
    wait_for(lambda: not served.server.clients, "a connection stays")


def test_no_memory_and_no_threads_are_left_behind(served: Served) -> None:
    def visit(count: int) -> None:
        for _number in range(count):
            with served.connect().go() as client:
                client.send(nbd.CMD_READ, 0, MIB)
                client.socket.sendall(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 1, 0, 32 << 20))
        wait_for(lambda: not served.server.clients, "a connection stays")

    visit(20)
    before, most = threads(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    visit(100)
    assert threads() <= before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 16 << 10  # KiB


def test_a_flood_of_connections(served: Served) -> None:
    """More than the server takes at a time: no more threads than that, and whoever is served is not disturbed."""
    with served.connect().go() as client:
        flood = [Client(served.path) for _number in range(90)]
        wait_for(lambda: served.server.clients == 20, "they do not come in")
        assert client.read(0, MIB) == CONTENT
        for other in flood:
            other.socket.close()
        wait_for(lambda: served.server.clients == 1, "they stay")


def test_a_client_that_takes_nothing_stops_nobody_from_leaving(served: Served) -> None:
    client = served.connect().go()
    for _number in range(32):
        client.send(nbd.CMD_READ, 0, MIB)
    wait_for(lambda: served.exports["x-default"].clients == 1, "no client")
    served.server.hurry()
    wait_for(lambda: not served.server.clients, "the connection stays")
    client.socket.close()
