# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""ftp and ftps: as qemu-img reads them from vsftpd, and servers that lie, stall and break off."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diskwright.errors import Error, ProtocolError
from diskwright.graph import Graph, open_image
from diskwright.hooks import OpenFlags
from diskwright.objects import parse_object

from servers import HOST, Vsftpd, tcp_server, vsftpd
from side_by_side import ours, same

K = 1024
LENGTH = 1_500_000  # bytes of r.raw; no multiple of 512
CONTENT = random.Random("ftp").randbytes(LENGTH)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vsftpd]:
    with vsftpd(tmp_path_factory.mktemp("vsftpd")) as server:
        root = server.root
        (root / "r.raw").write_bytes(CONTENT)
        (root / "empty").write_bytes(b"")
        (root / "sub").mkdir()
        (root / "sub" / "with space").write_bytes(b"x" * 512)
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "r.raw", "a.qcow2"], cwd=root, check=True)
        yield server


def spec(url: str, **options: Any) -> dict[str, Any]:
    return {"driver": url.partition(":")[0], "url": url, **{key.replace("_", "-"): value for key, value in options.items()}}


def read(url: str, **options: Any) -> bytes:
    with Graph(objects={"s": parse_object("secret,id=s,data=let me in")}).open_spec(spec(url, **options), OpenFlags()) as node:
        return node.pread(0, node.size)


LINES = """
info {ftp}/a.qcow2
info --output=json {ftp}/r.raw
info {ftp}/none
info {ftp}/empty
info {ftp}/sub/with%20space
info --image-opts driver=ftps,url={ftps}/r.raw,sslverify=off
info --image-opts driver=qcow2,file.driver=ftp,file.url={ftp}/a.qcow2,file.username=anonymous
map {ftp}/r.raw
resize -f raw {ftp}/r.raw 4M
create -f raw {ftp}/new.raw 1M
info --image-opts driver=ftp,url=http://x/y
info ftp:/x
"""


@pytest.mark.parametrize("line", [line for line in LINES.splitlines() if line])
def test_the_same_as_qemu_img(site: Vsftpd, line: str) -> None:
    same(line.format(ftp=site.url("")[:-1], ftps=site.url("", "ftps")[:-1]), site.root)


def test_certificates(site: Vsftpd, monkeypatch: pytest.MonkeyPatch) -> None:
    """(The data connections go on with the control connection's session: vsftpd insists on it.)"""
    with pytest.raises(Error, match="CURL: Error opening file: server certificate verification failed"):
        open_image(site.url("r.raw", "ftps"))
    monkeypatch.setenv("SSL_CERT_FILE", str(site.certificates.authority))
    assert read(site.url("r.raw", "ftps")) == CONTENT


@pytest.mark.parametrize("scheme", ["ftp", "ftps"])
def test_random_reads(site: Vsftpd, scheme: str) -> None:
    chance = random.Random(scheme)
    with Graph().open_spec(spec(site.url("r.raw", scheme), readahead=4 * K, sslverify=False), OpenFlags()) as node:
        for _round in range(25):
            offset = chance.randrange(LENGTH)
            length = min(LENGTH - offset, chance.choice((1, 500, 4096, 300_000)))
            assert node.pread(offset, length) == CONTENT[offset : offset + length]


def test_many_threads_share_few_sessions(site: Vsftpd) -> None:
    with Graph().open_spec(spec(site.url("r.raw"), readahead=8 * K), OpenFlags()) as node, ThreadPoolExecutor(12) as pool:
        places = [random.Random(number).randrange(LENGTH - 5000) for number in range(60)]
        assert list(pool.map(lambda place: node.pread(place, 5000), places)) == [CONTENT[place : place + 5000] for place in places]
        assert len(node._transport._idle) <= 8  # type: ignore[attr-defined]


def test_convert(site: Vsftpd, tmp_path: Path) -> None:
    assert ours(["convert", "-f", "qcow2", "-O", "raw", site.url("a.qcow2"), "out"], tmp_path).code == 0
    assert (tmp_path / "out").read_bytes().rstrip(b"\0") == CONTENT.rstrip(b"\0")


# -- servers with manners of their own -------------------------------------------------------------------------------------


class Manners:
    """A small FTP server: `replies` replace what it says to a command, "close" closes, "stall" says nothing any more;
    `cut` is how many bytes of a transfer are sent at most, and `stalls` leaves it open then. `said` is what it was told."""

    def __init__(self, replies: dict[str, str] | None = None, cut: int = LENGTH, stalls: bool = False) -> None:
        self.replies = replies or {}
        self.cut = cut
        self.stalls = stalls
        self.said: list[str] = []

    def __call__(self, connection: socket.socket) -> None:
        start = 0
        connection.sendall((self.replies.get("WELCOME", "220 welcome") + "\r\n").encode())
        with socket.create_server((HOST, 0)) as listener, connection.makefile("rb") as stream:
            for raw in stream:
                line = raw.decode().rstrip("\r\n")
                self.said.append(line)
                verb, _space, rest = line.partition(" ")
                answers = {
                    "USER": "331 password?",
                    "PASS": "230 welcome",
                    "TYPE": "200 ok",
                    "SIZE": "213 %d" % LENGTH,
                    "EPSV": "229 Entering Extended Passive Mode (|||%d|)" % listener.getsockname()[1],
                    "REST": "350 ok",
                    "RETR": "150 here it comes",
                }
                answer = self.replies.get(verb, answers.get(verb, "500 what?"))
                if answer == "close":
                    return
                if answer == "stall":
                    connection.recv(1)
                    return
                connection.sendall((answer + "\r\n").encode())
                if verb == "REST":
                    start = int(rest)
                elif verb == "RETR" and answer.startswith("1"):
                    self.send(listener, start)
                    start = 0
                    connection.sendall(b"226 done\r\n")

    def send(self, listener: socket.socket, start: int) -> None:
        data, _address = listener.accept()
        with data:
            try:
                data.sendall(CONTENT[start : start + self.cut])
                if self.stalls:
                    data.recv(1)
            except OSError:
                pass


@contextmanager
def server(manners: Manners) -> Iterator[str]:
    with tcp_server(manners) as port:
        yield "ftp://%s:%d/x" % (HOST, port)


def test_user_and_password() -> None:
    for options, expected in (
        ({"username": "me", "password_secret": "s"}, ["USER me", "PASS let me in"]),
        ({}, ["USER anonymous", "PASS ftp@example.com"]),
    ):
        manners = Manners()
        with server(manners) as url:
            assert read(url, **options) == CONTENT
        assert manners.said[:2] == expected
    manners = Manners()
    with server(manners) as url:
        assert read(url.replace("//", "//a%40b:c@")) == CONTENT
    assert manners.said[:2] == ["USER a@b", "PASS c"]
    with server(Manners({"PASS": "530 no"})) as url, pytest.raises(Error, match="CURL: Error opening file: Access denied: 530"):
        open_image(url)


def test_a_transfer_goes_on_where_it_is() -> None:
    manners = Manners()
    with server(manners) as url, Graph().open_spec(spec(url, readahead=0), OpenFlags()) as node:
        for offset in (0, 4096, 8192, 20_000, 1_000_000):
            assert node.pread(offset, 4096) == CONTENT[offset : offset + 4096]
    assert [line for line in manners.said if line[:4] in ("REST", "RETR")] == ["RETR x", "REST 1000000", "RETR x"]


def test_passive_mode_of_old_servers_leads_nowhere_else() -> None:
    """Whatever address PASV names, it is the server's own that is connected to."""
    manners = Manners({"EPSV": "500 what?"})
    with server(manners) as url:
        manners.replies["PASV"] = "227 Entering Passive Mode (8,8,8,8,0,1)"
        with pytest.raises(ProtocolError, match="Failed to connect to 127.0.0.1 port 1 "):
            read(url)


LIES: dict[str, tuple[dict[str, str], str]] = {
    "no welcome": ({"WELCOME": "421 too many"}, "The server refused: 421 too many"),
    "garbage": ({"WELCOME": "\x00\x01\x02"}, "Weird server reply"),
    "a long line": ({"WELCOME": "220" + "x" * 100_000}, "got more than 8192 bytes|Weird server reply|Connection closed"),
    "a reply without end": ({"WELCOME": "220-hello\r\n" * 20_000}, "Weird server reply: a reply without end"),
    "closes at login": ({"USER": "close"}, "Connection closed by the server"),
    "no size": ({"SIZE": "500 what?"}, "The server refused: 500 what\\?"),
    "a size that is none": ({"SIZE": "213 many"}, "Weird server reply: not a number"),
    "a size beyond all": ({"SIZE": "213 %d" % (1 << 70)}, "Server reported a file size that is too large"),
    "no REST": ({"REST": "502 no"}, "The server refused: 502 no"),
    "no RETR": ({"RETR": "550 no"}, "The server refused: 550 no"),
    "closes at RETR": ({"RETR": "close"}, "Connection closed by the server"),
    "nonsense for EPSV": ({"EPSV": "229 nonsense"}, "Weird server reply"),
}


@pytest.mark.parametrize("kind", LIES)
def test_lies(kind: str) -> None:
    replies, words = LIES[kind]
    with server(Manners(replies)) as url, pytest.raises(Error, match=words):
        node = open_image(url, "raw")
        with node:
            node.pread(512, 512)


def test_no_longer_than_the_timeout() -> None:
    """All at once: it takes a second each."""

    def attempt(manners: Manners) -> float:
        started = time.monotonic()
        with server(manners) as url, pytest.raises(Error, match="Operation timed out after 1000 milliseconds"):
            read(url, timeout=1)
        return time.monotonic() - started

    with ThreadPoolExecutor(3) as pool:
        slow = [Manners({"SIZE": "stall"}), Manners({"RETR": "stall"}), Manners(cut=1000, stalls=True)]
        assert all(0.9 < spent < 5 for spent in pool.map(attempt, slow))


def test_a_transfer_that_breaks_off() -> None:
    with server(Manners(cut=1000)) as url, pytest.raises(ProtocolError, match="transfer closed with %d bytes remaining to read" % (LENGTH - 1000)):
        read(url)


def test_names_that_are_commands() -> None:
    for name in ("a%0d%0aDELE%20b", "a%00b", ""):
        with server(Manners()) as url, pytest.raises(Error, match="bad/illegal format"):
            open_image(url[:-1] + name)
