# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""http and https: as qemu-img reads them from nginx; proxies; and servers that lie, change, stall and break off."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from diskwright.errors import Denied, Error, ProtocolError
from diskwright.graph import Graph, OpenPolicy, open_image
from diskwright.hooks import ENVIRONMENT, OpenFlags
from diskwright.objects import parse_object
from diskwright.protocols.url.proxy import proxy_for

from servers import HOST, Asked, Nginx, http_proxy, http_server, nginx
from side_by_side import ours, same

K = 1024
LENGTH = 3_000_000  # bytes of r.raw; no multiple of 512
CONTENT = random.Random("http").randbytes(LENGTH)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(tmp_path_factory.mktemp("nginx")) as server:
        root = server.root
        (root / "r.raw").write_bytes(CONTENT)
        (root / "empty").write_bytes(b"")
        for line in ("convert -f raw -O qcow2 r.raw a.qcow2", "create -q -f qcow2 -u -b a.qcow2 -F qcow2 over.qcow2 10M"):
            subprocess.run(["qemu-img", *line.split()], cwd=root, check=True)
        yield server


def spec(url: str, **options: Any) -> dict[str, Any]:
    return {"driver": url.partition(":")[0], "url": url, **{key.replace("_", "-"): value for key, value in options.items()}}


def read(url: str, **options: Any) -> bytes:
    with Graph(objects={"s": parse_object("secret,id=s,data=let me in")}).open_spec(spec(url, **options), OpenFlags()) as node:
        return node.pread(0, node.size)


# -- as qemu-img does ------------------------------------------------------------------------------------------------------

LINES = """
info {http}/a.qcow2
info --output=json {http}/a.qcow2
info {http}/none
info {http}/whole/r.raw
info {http}/auth/r.raw
info http://me:let%20me%20in@{place}/auth/r.raw
info {http}/moved/r.raw
info {http}/empty
info --backing-chain {http}/over.qcow2
info --image-opts driver=https,url={https}/r.raw,sslverify=off
info --image-opts driver=qcow2,file.driver=https,file.url={https}/a.qcow2,file.sslverify=off,file.readahead=64k,file.timeout=7
info 'json:{{"driver":"raw","file":{{"driver":"http","url":"{http}/r.raw","cookie":"a=b","timeout":3,"username":"x"}}}}'
info --image-opts driver=http,url={http}/r.raw,timeout=0,sslverify=off
info --object 'secret,id=p,data=let me in' --image-opts driver=http,url={http}/auth/r.raw,password-secret=p,username=me
info --image-opts driver=http,url={http}/cookie/r.raw,cookie=token=abc
info --object secret,id=c,data=token=abc --image-opts driver=http,url={http}/cookie/r.raw,cookie-secret=c
info --image-opts driver=http,url={http}/cookie/r.raw
info --image-opts driver=qcow2,file.driver=http,file.url={http}/over.qcow2,file.username=x
map --image-opts driver=qcow2,file.driver=http,file.url={http}/over.qcow2,file.username=x
info --image-opts driver=raw,offset=512,file.driver=http,file.url={http}/r.raw
map {http}/r.raw
map --output=json {http}/a.qcow2
check {http}/a.qcow2
measure -O qcow2 {http}/a.qcow2
resize -f raw {http}/r.raw 4M
commit {http}/a.qcow2
info --image-opts driver=raw,read-only=off,file.driver=http,file.url={http}/r.raw
info --image-opts driver=http,read-only=off,auto-read-only=on,url={http}/r.raw
create -f qcow2 {http}/new.qcow2 1M
create -f raw {http}/new.raw 1M
info --image-opts driver=http,url={http}/r.raw,readahead=100
info --image-opts driver=http,url={http}/r.raw,readahead=x
info --image-opts driver=http,url={http}/r.raw,timeout=10001
info --image-opts driver=http,url={http}/r.raw,timeout=-1
info --image-opts driver=http
info --image-opts driver=http,url=ftp://x/y
info --image-opts driver=http,url={http}/r.raw,cookie=a,cookie-secret=b
info --image-opts driver=https,url={https}/r.raw,sslverify=x
info --image-opts driver=http,url={http}/r.raw,bogus=1
info --image-opts driver=http,url={http}/r.raw,password-secret=p
info --image-opts driver=http,url={http}/r.raw,cookie-secret=p
info --image-opts driver=http,url={http}/r.raw,proxy-password-secret=p
info 'json:{{"driver":"http","filename":"{http}/r.raw"}}'
info 'json:{{"driver":"http","filename":"{http}/r.raw","url":"{http}/r.raw"}}'
info http:x
info http:/x
info HTTP://x/y
info http://nosuch.invalid/x
"""


@pytest.mark.parametrize("line", [line for line in LINES.splitlines() if line])
def test_the_same_as_qemu_img(web: Nginx, line: str) -> None:
    same(line.format(http=web.url("")[:-1], https=web.url("", "https")[:-1], place="%s:%d" % (HOST, web.http)), web.root)


def test_refusals_that_name_a_time(web: Nginx) -> None:
    """(How long it took to find out that nobody listens is the same but for the figure.)"""
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        url = "http://%s:%d/x" % closed.getsockname()
        done = subprocess.run(["qemu-img", "info", url], capture_output=True, text=True, timeout=30, check=False)
        with pytest.raises(Error) as caught:
            open_image(url)
    assert re.sub(r"after \d+ ms", "", "qemu-img: %s\n" % caught.value) == re.sub(r"after \d+ ms", "", done.stderr)


# -- reading ---------------------------------------------------------------------------------------------------------------


def test_certificates(web: Nginx, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Error, match="CURL: Error opening file: server certificate verification failed"):
        open_image(web.url("r.raw", "https"))
    monkeypatch.setenv("SSL_CERT_FILE", str(web.certificates.authority))
    assert read(web.url("r.raw", "https")) == CONTENT
    with pytest.raises(Error, match="certificate verification failed.*mismatch"):
        open_image("https://127.1:%d/r.raw" % web.https)


@pytest.mark.parametrize("readahead", [0, 512, 256 * K])
def test_random_reads(web: Nginx, readahead: int) -> None:
    chance = random.Random(readahead)
    with Graph().open_spec(spec(web.url("r.raw"), readahead=readahead), OpenFlags()) as node:
        for _round in range(60):
            offset = chance.randrange(LENGTH)
            length = min(LENGTH - offset, chance.choice((1, 500, 4096, 70_000, 600_000)))
            assert node.pread(offset, length) == CONTENT[offset : offset + length]
        assert node.pread(LENGTH - 1, 3) == CONTENT[-1:] + bytes(2)


def test_many_threads_read_over_few_connections(web: Nginx) -> None:
    with Graph().open_spec(spec(web.url("r.raw"), readahead=8 * K), OpenFlags()) as node, ThreadPoolExecutor(20) as pool:
        places = [random.Random(number).randrange(LENGTH - 5000) for number in range(300)]
        found = list(pool.map(lambda place: node.pread(place, 5000), places))
        assert found == [CONTENT[place : place + 5000] for place in places]
        assert len(node._transport._idle) <= 8  # type: ignore[attr-defined]


def test_readahead_saves_requests() -> None:
    asked: list[Asked] = []
    with http_server(honest(CONTENT, asked)) as port, Graph().open_spec(spec(url(port), readahead=64 * K), OpenFlags()) as node:
        for offset in range(0, 60 * K, 4 * K):
            assert node.pread(offset, 4 * K) == CONTENT[offset : offset + 4 * K]
    assert [(request.first, request.last) for request in asked if request.method == "GET"] == [(0, 68 * K - 1)]
    assert all(request.headers["accept-encoding"] == "identity" and request.headers["host"] == "127.0.0.1:%d" % port for request in asked)


def test_convert(web: Nginx, tmp_path: Path) -> None:
    assert ours(["convert", "-f", "qcow2", "-O", "raw", web.url("a.qcow2"), "out"], tmp_path).code == 0
    assert (tmp_path / "out").read_bytes().rstrip(b"\0") == CONTENT.rstrip(b"\0")


def test_a_server_that_refuses_head_and_one_that_does_not_speak_of_ranges(web: Nginx) -> None:
    """(Where qemu-img gives up: signed URLs are good for one method, and many servers just do it.)"""
    assert read(web.url("plain/r.raw")) == CONTENT
    with http_server(honest(CONTENT, [], announce="")) as port:
        assert read(url(port)) == CONTENT
    with http_server(honest(CONTENT, [], announce="Accept-Ranges: none\r\n")) as port, pytest.raises(Error, match=re.escape("Server does not support 'range'")):
        read(url(port))


def test_redirections(web: Nginx) -> None:
    assert read(web.url("moved/r.raw")) == CONTENT
    started = time.monotonic()
    with pytest.raises(Error, match=r"CURL: Error opening file: Maximum \(30\) redirects followed"):
        open_image(web.url("round/x"))
    assert time.monotonic() - started < 5
    for target, words in (("ftp://127.0.0.1/x", 'Protocol "ftp" not supported'), ("file:///etc/passwd", "bad/illegal format"), ("http://[", "bad/illegal")):

        def answer(request: Asked, connection: socket.socket, target: str = target) -> None:
            connection.sendall(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n" % target.encode())

        with http_server(answer) as port, pytest.raises(Error, match=words):
            open_image(url(port))


def test_nobody_else_sees_the_password(web: Nginx) -> None:
    there: list[Asked] = []
    here: list[Asked] = []
    with http_server(honest(CONTENT, there)) as other:

        def answer(request: Asked, connection: socket.socket) -> None:
            here.append(request)
            connection.sendall(b"HTTP/1.1 307 Temporary Redirect\r\nContent-Length: 0\r\nLocation: %s\r\n\r\n" % url(other).encode())

        with http_server(answer) as port:
            assert read(url(port), username="me", password_secret="s", cookie="a=b") == CONTENT
    assert here[0].headers["authorization"] == "Basic " + base64.b64encode(b"me:let me in").decode() and here[0].headers["cookie"] == "a=b"
    assert there and not any({"authorization", "cookie"} & set(request.headers) for request in there)
    assert len(here) == 1  # where it led to is remembered


def test_a_place_that_has_expired(web: Nginx) -> None:
    """Storage services redirect to names that are good for a while: then the way there is gone again."""
    valid = [1]

    def answer(request: Asked, connection: socket.socket) -> None:
        if request.target == "/x":
            connection.sendall(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /place%d\r\n\r\n" % valid[0])
        elif request.target != "/place%d" % valid[0]:
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        else:
            honest(CONTENT, [])(request, connection)

    with http_server(answer) as port, Graph().open_spec(spec(url(port), readahead=0), OpenFlags()) as node:
        assert node.pread(0, 512) == CONTENT[:512]
        valid[0] = 2
        assert node.pread(512, 512) == CONTENT[512:1024]


# -- proxies ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """What the command line would have read from the environment."""
    before = dict(ENVIRONMENT)
    ENVIRONMENT.clear()
    yield ENVIRONMENT
    ENVIRONMENT.clear()
    ENVIRONMENT.update(before)


def test_proxies(web: Nginx, environment: dict[str, str]) -> None:
    asked: list[Asked] = []
    with http_proxy(asked) as port:
        environment.update(http_proxy="http://user:pw@%s:%d" % (HOST, port), HTTPS_PROXY="%s:%d" % (HOST, port))
        assert read(web.url("r.raw")) == CONTENT
        assert asked[0].target == web.url("r.raw") and asked[0].headers["proxy-authorization"] == "Basic " + base64.b64encode(b"user:pw").decode()
        asked.clear()
        assert read(web.url("r.raw", "https"), sslverify=False, proxy_username="you", proxy_password_secret="s") == CONTENT
        assert asked[0][:2] == ("CONNECT", "%s:%d" % (HOST, web.https))
        assert asked[0].headers["proxy-authorization"] == "Basic " + base64.b64encode(b"you:let me in").decode()
        asked.clear()
        environment["no_proxy"] = "example.org, 127.0.0.0/8"
        assert read(web.url("r.raw")) == CONTENT and not asked


def test_a_proxy_that_refuses(web: Nginx, environment: dict[str, str]) -> None:
    with http_server(lambda request, connection: connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")) as port:
        environment["https_proxy"] = environment["http_proxy"] = "http://%s:%d" % (HOST, port)
        with pytest.raises(Error, match="CONNECT tunnel failed, response 407"):
            open_image(web.url("r.raw", "https"))
        with pytest.raises(Error, match="The requested URL returned error: 407"):
            open_image(web.url("r.raw"))
    environment["http_proxy"] = "socks5://127.0.0.1:1"
    with pytest.raises(Error, match="Unsupported proxy scheme for 'socks5://127.0.0.1:1'"):
        open_image(web.url("r.raw"))


def test_which_proxy() -> None:
    values = {"http_proxy": "a:1", "HTTP_PROXY": "b:2", "HTTPS_PROXY": "c:3", "all_proxy": "d", "NO_PROXY": ".example.org,10.0.0.0/8,[::1],Host"}
    found = {host: proxy_for("http", host, values) for host in ("x.org", "example.org", "a.example.org", "10.1.2.3", "11.0.0.1", "::1", "host", "myhost")}
    assert [host for host, proxy in found.items() if proxy is None] == ["example.org", "a.example.org", "10.1.2.3", "::1", "host"]
    assert proxy_for("https", "x.org", values)[:2] == ("c", 3)  # type: ignore[index]
    assert proxy_for("ftp", "x.org", values)[:2] == ("d", 1080)  # type: ignore[index]
    assert proxy_for("http", "x.org", {"HTTP_PROXY": "b:2"}) is None  # of a CGI program it would be a client's header
    assert proxy_for("http", "x.org", {"http_proxy": "a:1", "no_proxy": "*"}) is None


# -- servers that mean harm ------------------------------------------------------------------------------------------------


def url(port: int) -> str:
    return "http://%s:%d/x" % (HOST, port)


def head(length: int, more: str = "Accept-Ranges: bytes\r\n") -> bytes:
    return ("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n" % (length, more)).encode()


def part(first: int, last: int, total: int, more: str = "", length: int = -1) -> bytes:
    length = last + 1 - first if length < 0 else length
    return ("HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\nContent-Range: bytes %d-%d/%d\r\n%s\r\n" % (length, first, last, total, more)).encode()


def chunked(data: bytes) -> bytes:
    return data.replace(b"Content-Length: %d" % SIZE, b"Transfer-Encoding: chunked")


def honest(content: bytes, asked: list[Asked], announce: str = "Accept-Ranges: bytes\r\n", more: str = "") -> Callable[[Asked, socket.socket], None]:
    """A server as it should be."""

    def answer(request: Asked, connection: socket.socket) -> None:
        asked.append(request)
        if request.method == "HEAD":
            connection.sendall(head(len(content), announce + more))
        elif announce.endswith("none\r\n"):
            connection.sendall(head(len(content), announce) + content)
        else:
            last = min(request.last, len(content) - 1)
            connection.sendall(part(request.first, last, len(content), more) + content[request.first : last + 1])

    return answer


SIZE = 100 * K

# What is sent for a GET, once HEAD was answered well; and what is said of it.
LIES: dict[str, tuple[Callable[[Asked], bytes], str]] = {
    "short": (lambda request: part(request.first, request.last, SIZE) + b"x" * 100, "transfer closed with %d bytes remaining to read" % (SIZE - 100)),
    "closed at once": (lambda request: b"", "Empty reply from server"),
    "garbage": (lambda request: b"\xff\x00\x01garbage\r\n\r\n", "Received HTTP/0.9 when not allowed"),
    "no such range": (lambda request: b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n", "has changed while it was read"),
    "gone": (lambda request: b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "The requested URL returned error: 404"),
    "another range": (lambda request: part(request.first + 1, request.last, SIZE) + b"x" * SIZE, "another range than the one it was asked for"),
    "more than asked for": (lambda request: part(request.first, request.last + 9, SIZE), "another range than the one it was asked for"),
    "no range at all": (lambda request: b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\n\r\nabcde", "another range than"),
    "contradiction": (lambda request: part(request.first, request.last, SIZE, length=7) + b"x" * 7, "Server reported 7 bytes where it announced"),
    "compressed": (lambda request: part(request.first, request.last, SIZE, "Content-Encoding: gzip\r\n"), "compressed data that nobody asked for"),
    "all of it": (lambda request: head(SIZE), "Server does not support 'range'"),
    "longer by now": (lambda request: part(request.first, request.last, SIZE + 1) + b"x" * SIZE, "has changed while it was read"),
    "new whole": (lambda request: head(SIZE + 1), "has changed while it was read"),
    "other tag": (lambda request: part(request.first, request.last, SIZE, 'ETag: "2"\r\n') + b"x" * SIZE, "has changed while it was read"),
    "other date": (lambda request: part(request.first, request.last, SIZE, "Last-Modified: now\r\n") + b"x" * SIZE, "has changed while it was read"),
    "many headers": (lambda request: b"HTTP/1.1 206 x\r\n" + b"a: b\r\n" * 5000 + b"\r\n", "Weird server reply"),
    "long header": (lambda request: b"HTTP/1.1 206 x\r\na: " + b"b" * 200_000, "Weird server reply"),
    "bad chunks": (lambda request: chunked(part(request.first, request.last, SIZE)) + b"zz\r\n", "transfer closed|Weird server"),
    "reset": (lambda request: part(request.first, request.last, SIZE) + b"x" * 100, "Connection reset by peer|transfer closed"),
    "endless redirection": (lambda request: b"HTTP/1.1 302 x\r\nContent-Length: 0\r\nLocation: /x\r\n\r\n", "redirects followed"),
}


@pytest.mark.parametrize("kind", LIES)
def test_lies(kind: str) -> None:
    send, words = LIES[kind]

    def answer(request: Asked, connection: socket.socket) -> None:
        if request.method == "HEAD":
            connection.sendall(head(SIZE, 'Accept-Ranges: bytes\r\nETag: "1"\r\nLast-Modified: then\r\n'))
            return
        connection.sendall(send(request))
        if kind == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(connection.detach())
        elif kind != "endless redirection":
            connection.shutdown(socket.SHUT_RDWR)

    with http_server(answer) as port, Graph().open_spec(spec(url(port)), OpenFlags()) as node:
        with pytest.raises(ProtocolError, match=words) as caught:
            node.pread(0, SIZE)
        assert caught.value.errno == 5


# What is sent for a HEAD, and for a GET after it.
OPENINGS = {
    "a size beyond all": (head(1 << 64), "Server reported a file size that is too large"),
    "a size that is none": (head(5).replace(b": 5", b": 5x"), "Server didn't report file size|does not support 'range'"),
    "a negative size": (head(5).replace(b": 5", b": -5"), "Server didn't report file size|does not support 'range'"),
    "no size": (b"HTTP/1.1 200 OK\r\nAccept-Ranges: bytes\r\n\r\n", "Server didn't report file size"),
    "garbage": (b"\x00" * 1000, "Received HTTP/0.9|Weird server reply|Empty reply"),
    "nothing": (b"", "Empty reply from server"),
    "an error": (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "The requested URL returned error: 500"),
}


@pytest.mark.parametrize("kind", OPENINGS)
def test_lies_at_the_beginning(kind: str) -> None:
    data, words = OPENINGS[kind]

    def answer(request: Asked, connection: socket.socket) -> None:
        connection.sendall(data if request.method == "HEAD" else b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        if not data or b"HTTP" not in data:
            connection.shutdown(socket.SHUT_RDWR)

    with http_server(answer) as port, pytest.raises(Error, match="CURL: Error opening file: (%s)" % words):
        open_image(url(port))


def drip(connection: socket.socket, data: bytes) -> None:
    while True:
        connection.sendall(data)
        time.sleep(0.05)


def silence(request: Asked, connection: socket.socket) -> None:
    connection.recv(1)


def dripping_headers(request: Asked, connection: socket.socket) -> None:
    drip(connection, b"H")


def dripping_body(request: Asked, connection: socket.socket) -> None:
    connection.sendall(part(request.first, request.last, SIZE))
    drip(connection, b"x")


def go_on(request: Asked, connection: socket.socket) -> None:
    drip(connection, b"HTTP/1.1 100 Continue\r\n\r\n" * 50)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_longer_than_the_timeout(scheme: str) -> None:
    """All at once: it takes a second each."""
    slow = [silence, dripping_headers, dripping_body, go_on] if scheme == "http" else [silence]

    def attempt(way: Callable[[Asked, socket.socket], None]) -> float:
        def answer(request: Asked, connection: socket.socket) -> None:
            if request.method == "HEAD":
                connection.sendall(head(SIZE))
            else:
                way(request, connection)

        with http_server(answer) as port:
            started = time.monotonic()
            with pytest.raises(Error, match="Operation timed out after 1000 milliseconds"):
                read("%s://%s:%d/x" % (scheme, HOST, port), timeout=1)
            return time.monotonic() - started

    with ThreadPoolExecutor(len(slow)) as pool:
        assert all(0.9 < spent < 5 for spent in pool.map(attempt, slow))


def test_a_file_that_changes_is_an_error(web: Nginx) -> None:
    """With nginx: its tag has the date and the length; If-Range makes it send the new one whole."""
    path = web.root / "changing"
    path.write_bytes(CONTENT)
    with Graph().open_spec(spec(web.url("changing"), readahead=0), OpenFlags()) as node:
        assert node.pread(0, 512) == CONTENT[:512]
        path.write_bytes(CONTENT[:-1])
        with pytest.raises(ProtocolError, match="The file on the server has changed while it was read"):
            node.pread(512, 512)


def test_connections_that_the_server_gave_up_are_replaced() -> None:
    asked: list[Asked] = []

    def answer(request: Asked, connection: socket.socket) -> None:
        honest(CONTENT, asked)(request, connection)
        connection.shutdown(socket.SHUT_RDWR)  # without a word

    with http_server(answer) as port, Graph().open_spec(spec(url(port), readahead=0), OpenFlags()) as node:
        for offset in range(0, 5120, 512):
            assert node.pread(offset, 512) == CONTENT[offset : offset + 512]


def test_no_message_has_a_secret(web: Nginx) -> None:
    for cookie in ("token=sesame\r\nX: y", "sesame=\u20ac"):
        with pytest.raises(Error, match="A header cannot be sent") as caught:
            Graph().open_spec(spec(web.url("r.raw"), cookie=cookie), OpenFlags())
        assert "sesame" not in str(caught.value)


def test_convert_says_why(tmp_path: Path) -> None:
    def answer(request: Asked, connection: socket.socket) -> None:
        if request.method == "HEAD":
            connection.sendall(head(SIZE))
        else:
            connection.shutdown(socket.SHUT_RDWR)

    with http_server(answer) as port:
        outcome = ours(["convert", "-f", "raw", "-O", "raw", url(port), "out"], tmp_path)
    assert outcome.code == 1 and "error while reading at byte 0: Input/output error" in outcome.err
    assert "127.0.0.1:%d/x: Empty reply from server" % port in outcome.err


# -- stored names ----------------------------------------------------------------------------------------------------------

NAMES = [
    "{url}",
    'json:{{"driver":"raw","file":{{"driver":"http","url":"{url}"}}}}',
    'json:{{"driver":"http","url":"{url}"}}',
    "ssh://127.0.0.1:{port}/x",
    'json:{{"driver":"ssh","server":{{"host":"127.0.0.1","port":"{port}"}},"path":"/x"}}',
    'json:{{"driver":"raw","file":{{"driver":"ssh","server":{{"host":"127.0.0.1","port":"{port}"}},"path":"/x","host-key-check":{{"mode":"none"}}}}}}',
    "ftp://127.0.0.1:{port}/x",
]


POLICIES = [OpenPolicy("same_directory"), OpenPolicy("none"), OpenPolicy("any", protocols=("file",)), OpenPolicy("listed", allowed=["/"])]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_refuses_before_anybody_is_asked(tmp_path: Path, policy: OpenPolicy) -> None:
    connections: list[Asked] = []
    with http_server(lambda request, connection: connections.append(request)) as port:
        for name in NAMES:
            name = name.format(url=url(port), port=port)
            format = json.loads(name[5:])["driver"] if name.startswith("json:") else "raw"
            subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", format, tmp_path / "i", "1M"], check=True)
            with pytest.raises(Denied, match="which the open policy refuses"):
                open_image(str(tmp_path / "i"), policy=policy)
    assert not connections


def test_an_image_on_a_server_names_no_local_file(web: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(b"x" * 512)
    for name in (str(tmp_path / "secret"), "json:" + '{"driver":"file","filename":"secret"}'):
        subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", web.root / "thief", "1M"], check=True)
        with pytest.raises(Denied):
            open_image(web.url("thief"), policy=OpenPolicy("same_directory"))
