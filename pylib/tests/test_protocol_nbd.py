# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""nbd: as qemu-img works over qemu-nbd, nbdkit and nbd-server; and what servers that lie, stall and go away cannot do to us."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from diskwright.errors import Denied, Error, OptionError, ProtocolError, Unsupported
from diskwright.extent import ALLOCATED, DATA, OFFSET_VALID, ZERO
from diskwright.graph import Graph, OpenPolicy, open_image
from diskwright.hooks import OpenFlags
from diskwright.node import Node
from diskwright.objects import add_object
from diskwright.protocols.nbd import codec as nbd
from diskwright.protocols.nbd import driver
from diskwright.protocols.nbd.codec_server import Request

from servers import HOST, free_port
from servers_nbd import FLAGS, Connected, credentials, liar, listening, nbd_server, nbdkit, qemu_nbd, uri
from side_by_side import difference, ours, same, theirs

K = 1024
M = 1024 * K
SIZE = 8 * M
WRITABLE = OpenFlags(writable=True, resize=True, unmap=True)
HELD = DATA | OFFSET_VALID | ALLOCATED
NOTHING = ZERO | OFFSET_VALID | ALLOCATED


def spec(path: Path, export: str = "", **more: Any) -> dict[str, Any]:
    return {"driver": "nbd", "server.type": "unix", "server.path": str(path), "export": export, **more}


def opened(path: Path, export: str = "", flags: OpenFlags = WRITABLE, **more: Any) -> Node:
    return Graph().open_spec({key.replace("_", "-"): value for key, value in spec(path, export, **more).items()}, flags)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images: r.raw with holes, b.qcow2 with the bitmaps b0 and b1."""
    place = tmp_path_factory.mktemp("nbd")
    content = bytearray(SIZE)
    content[M : 2 * M] = random.Random(1).randbytes(M)
    content[5 * M : 5 * M + 64 * K] = b"x" * (64 * K)
    with (place / "r.raw").open("wb") as file:
        file.truncate(SIZE)
        for start, end in ((M, 2 * M), (5 * M, 5 * M + 64 * K)):
            file.seek(start)
            file.write(content[start:end])
    for line in (
        "create -q -f qcow2 b.qcow2 8M",
        "bitmap --add -g 64k b.qcow2 b0",
        "convert -q -f raw -O qcow2 r.raw c.qcow2",
    ):
        subprocess.run(["qemu-img", *line.split()], cwd=place, timeout=60, check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 128k", "-c", "write -z 4M 64k", "b.qcow2"], cwd=place, capture_output=True, timeout=60, check=True)
    return place


@pytest.fixture(scope="module")
def plain(place: Path) -> Iterator[Path]:
    """qemu-nbd with r.raw as "exp"."""
    with qemu_nbd(place / "plain", "-f", "raw", "-x", "exp", "-r", str(place / "r.raw")) as path:
        yield path


@pytest.fixture(scope="module")
def port(place: Path) -> Iterator[int]:
    """qemu-nbd with r.raw as "" on a TCP port."""
    number = free_port()
    pid = place / "port.pid"
    line = ["qemu-nbd", "-t", "-e", "10", "-r", "-f", "raw", "-b", HOST, "-p", str(number), "--fork", "--pid-file", str(pid), str(place / "r.raw")]
    subprocess.run(line, timeout=60, check=True)
    yield number
    process = int(pid.read_text())
    os.kill(process, 15)


# -- as qemu-img does it


NAMES = """
nbd+unix:///exp?socket=plain
nbd:unix:plain:exportname=exp
nbd:unix:plain
nbd:HOST:PORT
nbd:HOST:PORT:exportname=zz
nbd:localhost:PORT,ipv4=on
nbd:localhost:PORTx
nbd:HOST:99999
nbd:unix:
nbd:x
nbd:x:y
nbd:
nbd:/x/y
nbd:::1:PORT
nbd:localhost:PORT:exportname=
nbd://HOST:PORT
nbd://HOST:PORT/
nbd://HOST:PORT//
nbd://HOST:PORT/zz
nbd://HOST:PORT/?
nbd://HOST:PORT/#frag
nbd://u@HOST:PORT
nbd+tcp://HOST:PORT/
nbd://HOST:PORT/a?x=1
nbd://HOST:1
nbd://HOST:abc/
nbd://HOST:70000/
nbd://HOST:1:3/
nbd://[::1]:1
nbd://no.such.host.invalid:10999/
nbd:///exp
nbd://
nbds://HOST:PORT
NBD://HOST:PORT
nbd+vsock://1:3/
nbd+unix:exp?socket=plain
nbd+unix://h/exp?socket=plain
nbd+unix:///exp?socket=%70lain
nbd+unix:///exp?socket=plain#x
nbd+unix:///exp?socket=nope
nbd+unix:///exp?socket=plain&x=1
nbd+unix:///exp?socket=plain&socket=nope
nbd+unix:///exp?sock=plain
nbd+unix:///a%20b?socket=plain
nbd+unix:////a?socket=plain
nbd+unix://?socket=
nbd+unix://?
json:{"driver":"nbd","server":{"type":"inet","host":"HOST","port":"PORT"}}
json:{"driver":"nbd","server":{"type":"unix","path":"plain","host":""},"export":"exp"}
""".split()

OPTIONS = """
driver=nbd
driver=nbd,port=12
driver=nbd,host=HOST,port=PORT
driver=raw,file.driver=nbd,file.host=HOST,file.port=PORT
driver=nbd,path=plain,host=a
driver=nbd,path=plain,port=1
driver=nbd,path=plain,server.type=unix,server.path=plain
driver=nbd,path=plain,export=exp,tls-creds=x
driver=nbd,path=plain,export=exp,reconnect-delay=5,open-timeout=1
driver=nbd,path=plain,export=exp,open-timeout=x
driver=nbd,path=plain,export=exp,foo=1
driver=nbd,server.host=HOST
driver=nbd,server.type=foo
driver=nbd,server.type=inet
driver=nbd,server.type=inet,server.host=HOST
driver=nbd,server.type=inet,server.host=HOST,server.port=PORT,server.numeric=on
driver=nbd,server.type=inet,server.host=HOST,server.port=PORT,server.ipv6=maybe
driver=nbd,server.type=unix,server.path=plain,server.foo=1
driver=nbd,server.type=unix,server.path=plain,server.abstract=on
driver=nbd,server.type=fd,server.str=nope
driver=nbd,filename=nbd://HOST:PORT
""".split()


def test_names(place: Path, plain: Path, port: int) -> None:
    for name in NAMES:
        same("info '%s'" % name.replace("HOST", HOST).replace("PORT", str(port)), place)


def test_options(place: Path, plain: Path, port: int) -> None:
    for name in [*OPTIONS, "driver=nbd,path=" + "x" * 120]:
        same("info --image-opts '%s'" % name.replace("HOST", HOST).replace("PORT", str(port)), place)


@pytest.mark.parametrize(
    "line",
    [
        "info --output=json U",
        "map U",
        "map --output=json U",
        "map --output=json --start-offset 1500000 --max-length 4M U",
        "measure -O qcow2 U",
        "measure --output=json -O raw U",
        "check U",
        "compare U r.raw",
        "compare -s U c.qcow2",
        "create -f raw U 8M",
        "resize -f raw U 9M",
        "convert -n -O raw r.raw U",
        "snapshot -l U",
    ],
)
def test_commands(place: Path, plain: Path, line: str) -> None:
    same(line.replace("U", "'nbd+unix:///exp?socket=plain'"), place)


def test_creating(place: Path, tmp_path: Path) -> None:
    """Into an export: qemu-img and we leave the same bytes, and say the same."""
    lines = [
        "create -f raw U 8M",
        "create -f raw U 4M",
        "create -f raw U 9M",
        "create -f raw U 8M -o preallocation=full",
        "create -f raw -o help U",
        "create -f qcow2 U 800G",
        "info U",
        "check U",
        "resize -f raw U 9M",
        "resize -f raw --shrink U 7M",
        "resize -f raw U 8M",
        "convert -n -f raw -O raw R U",
        "convert -f raw -O raw R U",
        "convert -f raw -O qcow2 R U",
        "dd -f raw -O raw bs=1M count=3 if=R of=U",
    ]
    images = [tmp_path / "theirs", tmp_path / "ours"]
    for image in images:
        image.write_bytes(random.Random(2).randbytes(SIZE))
    name = uri(tmp_path / "s", "exp")
    for line in lines:
        outcomes = []
        for run, image in zip((theirs, ours), images):
            with qemu_nbd(tmp_path / "s", "-f", "raw", "-x", "exp", "--discard=unmap", str(image)):
                outcomes.append(run([word.replace("U", name).replace("R", str(place / "r.raw")) for word in line.split()], place))
        assert outcomes[0] == outcomes[1], difference(line, outcomes[1], outcomes[0])
        assert images[0].read_bytes() == images[1].read_bytes(), line


def test_bitmaps(place: Path) -> None:
    """A dirty bitmap as block status, as backup programs read it."""
    path = place / "bitmaps"
    with qemu_nbd(path, "-f", "qcow2", "-x", "exp", "-r", "-B", "b0", "-A", str(place / "b.qcow2")):
        for context in ("qemu:dirty-bitmap:b0", "qemu:allocation-depth"):
            same("map --output=json --image-opts driver=nbd,path=bitmaps,export=exp,x-dirty-bitmap=%s" % context, place)
        same("map --output=json --image-opts driver=nbd,path=bitmaps,export=exp", place)
        with pytest.raises(Error, match="^Could not open image: Invalid argument$") as caught:
            opened(path, "exp", OpenFlags(), x_dirty_bitmap="qemu:dirty-bitmap:nope")
        assert caught.value.hint == "requested x-dirty-bitmap qemu:dirty-bitmap:nope not found"


# -- real servers


def exercise(node: Node, seed: int, steps: int = 120) -> None:
    """Random requests against a model; in the end all of it."""
    rng = random.Random(seed)
    content = bytearray(node.pread(0, node.size))
    for _step in range(steps):
        length = min(rng.choice((1, 100, 512, 4096, 70_000, 600_000)) + rng.randrange(3), node.size)
        offset = rng.choice((rng.randrange(node.size - length + 1), node.size - length, rng.randrange(node.size - length + 1) // 4096 * 4096))
        verb = rng.choice(("write", "write", "read", "zero", "unmap", "discard", "flush", "status"))
        span = slice(offset, offset + length)
        if verb == "write":
            content[span] = data = rng.randbytes(length)
            node.pwrite(offset, data)
        elif verb == "read":
            assert node.pread(offset, length) == content[span]
        elif verb in ("zero", "unmap"):
            node.pwrite_zeroes(offset, length, verb == "unmap")
            content[span] = bytes(length)
        elif verb == "discard":
            node.pdiscard(offset, length)
            content[span] = node.pread(offset, length)
        elif verb == "flush":
            node.flush()
        else:
            end = offset
            for start, count, status, _host, _place in node.block_status(offset, length):
                assert start == end and (not status & ZERO or not any(content[start : start + count]))
                end += count
            assert end == offset + length
    assert node.pread(0, node.size) == content


NBDKITS = {
    "memory": ["memory", "3000001"],
    "simple replies": ["--no-sr", "memory", "3M"],
    "blocks": ["--filter=blocksize-policy", "memory", "3M", "blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-error-policy=error"],
    "small payloads": ["--filter=blocksize-policy", "memory", "3M", "blocksize-maximum=65536", "blocksize-error-policy=error"],
    "no zeroes, no trim": ["--filter=nozero", "--filter=noextents", "--filter=fua", "memory", "3M", "fuamode=emulate"],
    "slow": ["--filter=delay", "memory", "3M", "rdelay=1ms", "wdelay=1ms"],
    "one at a time": ["--filter=multi-conn", "--filter=noparallel", "memory", "3M", "multi-conn-mode=disable", "serialize=connections"],
}


@pytest.mark.parametrize("words", NBDKITS.values(), ids=NBDKITS)
def test_nbdkit(tmp_path: Path, words: list[str]) -> None:
    with nbdkit(tmp_path / "s", *words), opened(tmp_path / "s") as node:
        exercise(node, 3)


def test_oldstyle(tmp_path: Path) -> None:
    """Only read: nbdkit announces there what it refuses then."""
    with nbdkit(tmp_path / "s", "-o", "pattern", "3000001"):
        with opened(tmp_path / "s", flags=OpenFlags()) as node:
            content = b"".join(number.to_bytes(8, "big") for number in range(0, 3_000_008, 8))
            assert node.pread(0, node.size) == content[:3_000_001]
        with pytest.raises(Error, match="^Server does not support non-empty export names$"):
            opened(tmp_path / "s", "name")
        same("info --image-opts driver=nbd,path=s,export=name", tmp_path)


def test_threads(tmp_path: Path) -> None:
    """Eight threads, over several connections; the same file read afterwards."""
    (tmp_path / "image").write_bytes(bytes(4 * M))
    with nbdkit(tmp_path / "s", "file", str(tmp_path / "image")):
        node = opened(tmp_path / "s")
        assert node._may_grow

        def work(number: int) -> None:
            rng = random.Random(number)
            for step in range(60):
                offset = number * 512 * K + rng.randrange(500) * K
                data = bytes([number + 1]) * rng.randrange(1, 12 * K)
                node.pwrite(offset, data)
                assert node.pread(offset, len(data)) == data, step

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert 1 < len(node._connections) <= driver.MAX_CONNECTIONS
        content = node.pread(0, node.size)
        node.close()
    assert (tmp_path / "image").read_bytes() == content


def test_nbd_server(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"z" * (2 * M))
    with nbd_server(tmp_path / "s", tmp_path / "image"):
        with opened(tmp_path / "s", "disk") as node:
            exercise(node, 4)
            content = node.pread(0, node.size)
        with pytest.raises(Error):
            opened(tmp_path / "s", "nope")
    assert (tmp_path / "image").read_bytes() == content


def test_a_daemon_with_several_exports(place: Path, tmp_path: Path) -> None:
    """qemu-storage-daemon; a node-name per export."""
    path = tmp_path / "s"
    words = []
    for name in ("r.raw", "c.qcow2"):
        words += ["--blockdev", "driver=%s,node-name=%s,read-only=on,file.driver=file,file.filename=%s" % (name[2:], name[0], place / name)]
        words += ["--export", "type=nbd,id=e%s,node-name=%s,name=%s" % (name[0], name[0], name)]
    line = ["qemu-storage-daemon", "--nbd-server", "addr.type=unix,addr.path=%s" % path, *words]
    with listening(line, path):
        while True:  # the exports come after the socket
            try:
                with opened(path, "c.qcow2", OpenFlags()) as second, opened(path, "r.raw", OpenFlags()) as first:
                    assert first.pread(0, SIZE) == second.pread(0, SIZE) == (place / "r.raw").read_bytes()
                break
            except Error as exc:
                assert "not available" in str(exc)
                time.sleep(0.01)


def test_errors_of_the_server(tmp_path: Path) -> None:
    """They are the system's own, with the server's words."""
    with nbdkit(tmp_path / "s", "--filter=error", "memory", "1M", "error=EPERM", "error-rate=100%"), opened(tmp_path / "s") as node:
        for request in (lambda: node.pread(0, 512), lambda: node.pwrite(0, b"x"), lambda: node.pwrite_zeroes(0, 512)):
            with pytest.raises(OSError) as caught:
                request()
            assert caught.value.errno == errno.EPERM
    with nbdkit(tmp_path / "s", "-r", "memory", "1M"), pytest.raises(Error, match="Could not open image: Permission denied"):
        opened(tmp_path / "s")


def test_conversions(place: Path, tmp_path: Path) -> None:
    """Over the wire in both directions; holes stay holes."""
    with nbdkit(tmp_path / "s", "file", str(place / "c.qcow2")):
        assert ours(["convert", "-O", "raw", uri(tmp_path / "s"), "out.raw"], tmp_path) == (0, "", "")
        assert ours(["convert", "-O", "raw", "json:" + json.dumps({"driver": "qcow2", "file": spec(tmp_path / "s")}), "out2.raw"], tmp_path) == (0, "", "")
    assert (tmp_path / "out.raw").read_bytes() == (tmp_path / "out2.raw").read_bytes() == (place / "r.raw").read_bytes()
    assert (tmp_path / "out.raw").stat().st_blocks * 512 < 2 * M
    (tmp_path / "to").write_bytes(b"\xaa" * SIZE)
    with qemu_nbd(tmp_path / "s", "-f", "raw", "--discard=unmap", str(tmp_path / "to")):
        assert ours(["convert", "-n", "-O", "raw", str(place / "c.qcow2"), uri(tmp_path / "s")], tmp_path) == (0, "", "")
        assert theirs(["compare", uri(tmp_path / "s"), str(place / "r.raw")], tmp_path).code == 0
    assert (tmp_path / "to").read_bytes() == (place / "r.raw").read_bytes()
    assert (tmp_path / "to").stat().st_blocks * 512 < 2 * M


def test_a_backing_image(place: Path, plain: Path, tmp_path: Path) -> None:
    """By any name; but not where the policy wants files."""
    name = uri(plain, "exp")
    described = "json:" + json.dumps({"driver": "raw", "file": {"driver": "nbd", "server": {"type": "unix", "path": str(plain)}, "export": "exp"}})
    for number, backing in enumerate((name, described)):
        overlay = tmp_path / ("%d.qcow2" % number)
        subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, overlay, "8M"], timeout=60, check=True)
        same("info --backing-chain %s" % overlay, place)
        same("map --output=json %s" % overlay, place)
        with open_image(str(overlay)) as node:
            assert node.pread(0, SIZE) == (place / "r.raw").read_bytes()
        for policy in (OpenPolicy("same_directory"), OpenPolicy("listed", allowed=["/"]), OpenPolicy("none"), OpenPolicy("any", protocols=["file"])):
            with pytest.raises(Denied):
                open_image(str(overlay), policy=policy)


# -- TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return credentials(tmp_path_factory.mktemp("tls") / "dir")


def secured(path: Path, tls: Path, line: str, **more: Any) -> Node:
    objects: dict[str, Any] = {}
    add_object(objects, line.replace("DIR", str(tls)))
    return Graph(objects=objects).open_spec(spec(path, "exp", **{"tls-creds": "t", **more}), WRITABLE)


@pytest.mark.parametrize("kind", ["x509", "psk", "anon"])
def test_tls(place: Path, tmp_path: Path, tls: Path, kind: str) -> None:
    """Against qemu-nbd: several threads over one connection."""
    (tmp_path / "image").write_bytes(bytes(2 * M))
    server = "tls-creds-%s,id=t,endpoint=server" % kind + (",dir=%s" % tls if kind != "anon" else "")
    client = "tls-creds-%s,id=t,endpoint=client" % kind + (",dir=%s" % tls if kind != "anon" else "")
    more = {"tls-hostname": "localhost"} if kind == "x509" else {}
    with qemu_nbd(tmp_path / "s", "-f", "raw", "-x", "exp", "--object", server, "--tls-creds", "t", str(tmp_path / "image")):
        with secured(tmp_path / "s", tls, client, **more) as node:
            exercise(node, 5, 60)
            with ThreadPoolExecutor(4) as pool:
                assert len({bytes(data) for data in pool.map(lambda _number: node.pread(0, 2 * M), range(8))}) == 1
        options = "driver=nbd,path=s,export=exp,tls-creds=t" + (",tls-hostname=localhost" if more else "")
        same("info --object %s --image-opts %s" % (client, options), tmp_path)
        same("info --image-opts driver=nbd,path=s,export=exp", tmp_path)
        same("info --object %s --image-opts driver=nbd,path=s,export=no,tls-creds=t%s" % (client, ",tls-hostname=localhost" if more else ""), tmp_path)
        if kind == "x509":
            same("info --object %s --image-opts driver=nbd,path=s,export=exp,tls-creds=t" % client, tmp_path)
            same("info --object %s --image-opts driver=nbd,path=s,export=exp,tls-creds=t,tls-hostname=zz" % client, tmp_path)
            other = credentials(tmp_path / "other")
            with pytest.raises(Error, match="^Verify failed: "):
                secured(tmp_path / "s", other, client.replace(str(tls), str(other)), **more)
            with pytest.raises(Error):
                secured(tmp_path / "s", tls, "tls-creds-anon,id=t,endpoint=client")
            with secured(tmp_path / "s", tls, client + ",priority=NORMAL:-VERS-TLS1.3", **more) as node:
                assert node._connections[0]._channel.session.version() == "TLSv1.2"
        if kind == "psk":
            with secured(tmp_path / "s", tls, client + ",username=joe") as node:
                assert not any(node.pread(0, 512)[:0])


@pytest.mark.parametrize(
    "line",
    [
        "tls-creds-x509,id=t,endpoint=server,dir=DIR",
        "tls-creds-x509,id=t,endpoint=client,dir=none",
        "tls-creds-x509,id=t,endpoint=client,dir=bad",
        "tls-creds-psk,id=t,endpoint=client,dir=DIR,username=nobody",
        "tls-creds-x509,id=t,endpoint=client",
        "secret,id=t,data=x",
        "secret,id=s,data=x",
    ],
)
def test_credentials(place: Path, plain: Path, tls: Path, line: str) -> None:
    (place / "bad").mkdir(exist_ok=True)
    (place / "bad" / "ca-cert.pem").write_text("x")
    options = "driver=nbd,path=plain,export=exp,tls-creds=t,tls-hostname=localhost"
    same("info --object '%s' --image-opts %s" % (line.replace("DIR", str(tls)), options), place)


def test_a_server_without_tls(place: Path, plain: Path, tls: Path) -> None:
    same("info --object tls-creds-x509,id=t,endpoint=client,dir=%s --image-opts driver=nbd,path=plain,tls-creds=t" % tls, place)


def test_priorities(plain: Path, tls: Path) -> None:
    for priority, word in (("FOO", "'FOO' has no counterpart"), ("-VERS-ALL:+VERS-TLS1.0", "no version of TLS that is secure")):
        with pytest.raises(OptionError, match=word):
            secured(plain, tls, "tls-creds-x509,id=t,endpoint=client,dir=DIR,priority=%s" % priority)


# -- servers that lie


def raises_at_open(path: Path, script: Any, text: str, kind: type[Error] = Error, **more: Any) -> Error:
    with liar(path, script), pytest.raises(kind, match=text) as caught:
        opened(path, **more)
    return caught.value


def say(words: bytes) -> Any:
    """A script: say this, then listen until the client goes."""

    def script(connection: Connected) -> None:
        connection.send(words)
        while connection.sock.recv(4096):
            pass

    return script


GREETINGS = {
    "nothing": (b"", "^Failed to read initial magic: the server does not answer$"),
    "half": (b"NBDMAG", "^Failed to read initial magic: the server does not answer$"),
    "http": (b"HTTP/1.1 400 Bad Request\r\n", "^Bad initial magic received: 0x485454502f312e31$"),
    "zeroes": (bytes(200), "^Bad initial magic received: 0x0000000000000000$"),
    "other magic": (b"NBDMAGIC" + b"x" * 8, "^Bad server magic received: 0x7878787878787878$"),
    "no more": (b"NBDMAGICIHAVEOPT\0\3", "^Failed to read option reply: the server does not answer$"),
    "unasked reply": (b"NBDMAGICIHAVEOPT\0\3" + nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, 3, 1, 0), "^Unexpected option type 3 expected"),
    "garbage": (b"NBDMAGICIHAVEOPT\0\3" + b"garbage " * 20, "^Unexpected option reply magic$"),
    "oldstyle, huge": (b"NBDMAGIC" + (nbd.OLDSTYLE_MAGIC).to_bytes(8, "big") + b"\xff" * 8 + bytes(128), "^the server says that the export has 184467"),
}


@pytest.mark.parametrize("words, text", GREETINGS.values(), ids=GREETINGS)
def test_greetings(tmp_path: Path, words: bytes, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "HANDSHAKE_TIMEOUT", 0.2)
    raises_at_open(tmp_path / "s", say(words), text)


def test_hanging_up(tmp_path: Path) -> None:
    """In QEMU's words."""
    for words in (b"", b"NBDMAG", b"NBDMAGICIHAVEOPT\0\3"):
        with liar(tmp_path / "s", lambda connection, words=words: connection.send(words)):  # type: ignore[misc]
            with pytest.raises(Error, match="^Failed to (read|send) .*(Unexpected end-of-file|Unable to (read|write))"):
                opened(tmp_path / "s")


def export_of(size: int, block: tuple[int, int, int] | None = None, mode: str = "extended") -> Any:
    def script(connection: Connected) -> None:
        connection.negotiate(size, block=block, mode=mode)
        connection.serve(bytearray(1 << 20))

    return script


@pytest.mark.parametrize(
    "size, block, text",
    [
        (1 << 63, None, "the server says that the export has 9223372036854775808 bytes"),
        (1000, (512, 512, 512), "export size 1000 is not multiple of minimum block size 512"),
        (1 << 20, (3, 3, 3), "server minimum block size 3 is not a power of two"),
        (1 << 26, (1 << 26, 1 << 26, 1 << 26), "the server insists on blocks of 67108864 bytes"),
    ],
)
def test_exports_that_cannot_be(tmp_path: Path, size: int, block: tuple[int, int, int] | None, text: str) -> None:
    raises_at_open(tmp_path / "s", export_of(size, block), text, ProtocolError)


def refusing(code: int, text: str) -> Any:
    def script(connection: Connected) -> None:
        connection.greet()
        while True:
            option, _payload = connection.next()
            connection.send(connection.codec.refuse(option, code, text))

    return script


@pytest.mark.parametrize(
    "code, text",
    [
        (nbd.REP_ERR_POLICY, r"^Denied by server for option 7 \(go\)$"),
        (nbd.REP_ERR_INVALID, r"^Invalid parameters for option 7 \(go\)$"),
        (nbd.REP_ERR_PLATFORM, r"^Server lacks support for option 7 \(go\)$"),
        (nbd.REP_ERR_TLS_REQD, r"^TLS negotiation required before option 7 \(go\)$"),
        (nbd.REP_ERR_UNKNOWN, "^Requested export not available$"),
        (nbd.REP_ERR_SHUTDOWN, r"^Server shutting down before option 7 \(go\)$"),
        (nbd.REP_ERR_BLOCK_SIZE_REQD, r"^Server requires INFO_BLOCK_SIZE for option 7 \(go\)$"),
        (nbd.REP_ERROR + 77, r"^Unknown error code when asking for option 7 \(go\)$"),
    ],
)
def test_refusals(tmp_path: Path, code: int, text: str) -> None:
    """As qemu-img puts it, byte for byte, with what the server says."""
    assert "server reported: no way" in (raises_at_open(tmp_path / "s", refusing(code, "no way"), text).hint or "")
    if code != nbd.REP_ERROR + 77:
        with liar(tmp_path / "s", refusing(code, "no way")):
            same("info --image-opts driver=nbd,path=s", tmp_path)


def test_another_context_than_was_asked_for(tmp_path: Path) -> None:
    def script(connection: Connected) -> None:
        connection.greet()
        while True:
            option, _payload = connection.next()
            if option.option == nbd.OPT_SET_META_CONTEXT:
                connection.send(connection.codec.meta_context(option, 1, "other:context"))
            connection.send(connection.codec.accept(option))

    raises_at_open(tmp_path / "s", script, "server answered with different context 'other:context'", ProtocolError)


def transmission(hook: Any, mode: str = "structured") -> Any:
    def script(connection: Connected) -> None:
        connection.negotiate(mode=mode)
        connection.serve(bytearray(1 << 20), hook)

    return script


def sending(*parts: Any) -> Any:
    """A hook that answers the first read with these bytes, and goes then."""

    def hook(connection: Connected, request: Request) -> bool:
        if request.command != nbd.CMD_READ:
            return False
        connection.send(*(part(connection.codec, request) if callable(part) else part for part in parts))
        raise EOFError

    return hook


def of_another(codec: Any, request: Request) -> bytes:
    other = Request(request.command, 0, request.handle + 7, request.offset, request.length)
    return bytes(codec.reply_data(other, request.offset, request.length) + bytes(request.length))


REPLIES = {
    "garbage": ([b"garbage " * 9], ProtocolError, "invalid magic"),
    "cut in the header": ([lambda codec, r: codec.reply_data(r, r.offset, r.length)[:9]], Error, "The server closed the connection"),
    "cut in the data": ([lambda codec, r: codec.reply_data(r, r.offset, r.length) + bytes(100)], Error, "in the middle of a reply"),
    "unknown handle": ([of_another], ProtocolError, "answers a request that nobody made"),
    "twice": ([lambda codec, r: (codec.reply_data(r, r.offset, 512, False) + bytes(512)) * 2], ProtocolError, "twice"),
    "elsewhere": ([lambda codec, r: codec.reply_data(r, r.offset + 512, r.length) + bytes(r.length)], ProtocolError, "which nobody asked for"),
    "too little": ([lambda codec, r: codec.reply_data(r, r.offset, 512) + bytes(512)], ProtocolError, "left 3584 bytes of a read out"),
    "closed": ([], Error, "The server closed the connection"),
}


@pytest.mark.parametrize("mode", ["structured", "extended"])
@pytest.mark.parametrize("parts, kind, text", REPLIES.values(), ids=REPLIES)
def test_replies(tmp_path: Path, parts: list[Any], kind: type[Error], text: str, mode: str) -> None:
    with liar(tmp_path / "s", transmission(sending(*parts), mode)):
        node = opened(tmp_path / "s")
        with pytest.raises(kind, match=text) as caught:
            node.pread(4096, 4096)
        assert caught.value.errno == errno.EIO
        node.abandon()


def test_a_stall(tmp_path: Path) -> None:
    """A server that says nothing more is waited for no longer than the option says; all who wait are told."""

    def hook(connection: Connected, request: Request) -> bool:
        return True

    with liar(tmp_path / "s", transmission(hook)):
        node = opened(tmp_path / "s", timeout=1)
        begun = time.monotonic()

        def read(number: int) -> str:
            with pytest.raises(Error) as caught:
                node.pread(number * 4096, 4096)
            return str(caught.value)

        with ThreadPoolExecutor(3) as pool:
            assert set(pool.map(read, range(3))) == {"The server has been silent for 1 seconds"}
        assert time.monotonic() - begun < 10
        node.abandon()


def test_answers_out_of_order(tmp_path: Path) -> None:
    """Eight threads; the server answers once all have asked, the last one first."""
    content = bytearray(random.Random(6).randbytes(1 << 20))
    waiting: list[Request] = []

    def hook(connection: Connected, request: Request) -> bool:
        if request.command != nbd.CMD_READ:
            return False
        waiting.append(request)
        if len(waiting) == 8:
            half = [(r, r.offset + r.length // 2) for r in reversed(waiting)]
            for known, middle in half:  # a piece of each, then the other pieces, backwards
                end = known.offset + known.length
                connection.send(connection.codec.reply_data(known, middle, end - middle, False), bytes(content[middle:end]))
            for known, middle in half:
                connection.send(connection.codec.reply_data(known, known.offset, middle - known.offset), bytes(content[known.offset : middle]))
            waiting.clear()
        return True

    def lie(connection: Any) -> None:
        connection.negotiate(mode="structured")
        connection.serve(content, hook)

    with liar(tmp_path / "s", lie):
        with opened(tmp_path / "s") as node, ThreadPoolExecutor(8) as pool:
            for _round in range(5):
                found = list(pool.map(lambda number: node.pread(number * 70_000, 65536), range(8)))
                assert found == [bytes(content[n * 70_000 : n * 70_000 + 65536]) for n in range(8)]


def accepting_tls(words: bytes) -> Any:
    """A script that agrees to TLS and says something else then."""

    def script(connection: Connected) -> None:
        connection.codec.tls = True
        connection.greet()
        option, _payload = connection.next()
        connection.send(connection.codec.accept(option))
        connection.send(words)
        while connection.sock.recv(4096):
            pass

    return script


@pytest.mark.parametrize("kind", ["x509", "psk", "anon"])
@pytest.mark.parametrize(
    "words, text",
    [(b"", "^TLS handshake failed: the peer does not answer$"), (b"garbage " * 99, "^TLS handshake failed: |^server sent unencrypted data")],
    ids=["nothing", "garbage"],
)
def test_tls_that_is_none(tmp_path: Path, tls: Path, kind: str, words: bytes, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "HANDSHAKE_TIMEOUT", 0.3)
    with liar(tmp_path / "s", accepting_tls(words)), pytest.raises(Error, match=text):
        secured(tmp_path / "s", tls, "tls-creds-%s,id=t,endpoint=client" % kind + (",dir=DIR" if kind != "anon" else ""), **{"tls-hostname": "localhost"})


def elderly(fixed: bool, names: list[str]) -> Any:
    """A script of a server from before GO; one that is not even `fixed` knows no options."""

    def script(connection: Connected) -> None:
        connection.send(nbd.INIT_MAGIC + nbd.OPTION_MAGIC + (b"\0\1" if fixed else b"\0\0"))
        while not connection.codec.transmission:
            option, _payload = connection.next()
            if option.option == nbd.OPT_EXPORT_NAME:
                if option.name not in names:
                    return
                connection.send(connection.codec.export_name(1 << 20, FLAGS & ~nbd.SEND_DF))
            elif option.option == nbd.OPT_LIST:
                connection.send(*(connection.codec.listed(option, name) for name in names), connection.codec.accept(option))
            else:
                connection.send(connection.codec.refuse(option, nbd.REP_ERR_UNSUP, ""))
        connection.serve(CONTENT)

    return script


@pytest.mark.parametrize("fixed", [True, False])
def test_elderly_servers(tmp_path: Path, fixed: bool) -> None:
    with liar(tmp_path / "s", elderly(fixed, ["disk"])):
        with opened(tmp_path / "s", "disk") as node:
            assert node.pread(0, node.size) == CONTENT
            assert [tuple(extent[:3]) for extent in node.block_status(0, 1 << 20)] == [(0, 1 << 20, HELD)]
        with pytest.raises(Error, match="No export with name 'other' available" if fixed else "^Failed to read export length: "):
            opened(tmp_path / "s", "other")
        same("info --image-opts driver=nbd,path=s,export=disk", tmp_path)
        if fixed:
            same("info --image-opts driver=nbd,path=s,export=other", tmp_path)


# -- connections that come and go


CONTENT = bytearray(random.Random(7).randbytes(1 << 20))


def losing(after: int) -> Any:
    """A script that serves so many requests and hangs up."""

    def script(connection: Connected) -> None:
        left = [after]

        def hook(_connection: Connected, _request: Request) -> bool:
            left[0] -= 1
            if left[0] < 0:
                raise EOFError
            return False

        connection.negotiate()
        connection.serve(CONTENT, hook)

    return script


def test_reconnection(tmp_path: Path) -> None:
    with liar(tmp_path / "s", losing(2), losing(0), losing(1000)), opened(tmp_path / "s", reconnect_delay=20) as node:
        for offset in range(0, 1 << 20, 1 << 17):
            assert node.pread(offset, 1 << 17) == CONTENT[offset : offset + (1 << 17)]


def test_a_server_that_is_killed(tmp_path: Path) -> None:
    """And started again, while four threads write and read: nothing gets lost."""
    (tmp_path / "image").write_bytes(bytes(4 * M))
    over = threading.Event()

    def serve(seconds: float) -> None:
        with listening(["nbdkit", "-f", "-U", str(tmp_path / "s"), "file", str(tmp_path / "image")], tmp_path / "s") as process:
            over.wait(seconds)
            process.kill()

    def work(number: int) -> int:
        rng, model, done = random.Random(number), bytearray(M), 0
        while not over.is_set():
            offset = rng.randrange(M - 50_000)
            data = rng.randbytes(rng.randrange(1, 50_000))
            node.pwrite(number * M + offset, data)
            model[offset : offset + len(data)] = data
            offset = rng.randrange(M - 50_000)
            assert node.pread(number * M + offset, 50_000) == model[offset : offset + 50_000]
            done += 1
        assert node.pread(number * M, M) == model
        return done

    last = threading.Event()
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(serve, 0.5)
        node = opened(tmp_path / "s", open_timeout=20, reconnect_delay=20)
        working = [pool.submit(work, number) for number in range(4)]
        first.result()
        serve(0.5)
        with nbdkit(tmp_path / "s", "file", str(tmp_path / "image")):
            last.wait(0.3)
            over.set()
            assert all(future.result() for future in working)
            node.close()


def test_without_reconnection(tmp_path: Path) -> None:
    """The request fails, and the next one finds a new connection."""
    with liar(tmp_path / "s", losing(1), losing(1000)), opened(tmp_path / "s") as node:
        node.pread(0, 512)
        with pytest.raises(Error, match="The server closed the connection|The connection failed"):
            node.pread(0, 512)
        assert node.pread(0, 512) == CONTENT[:512]


def test_reconnection_in_vain(tmp_path: Path) -> None:
    with liar(tmp_path / "s", losing(0)):
        node = opened(tmp_path / "s", reconnect_delay=1)
    begun = time.monotonic()
    with pytest.raises(Error, match="Failed to connect to"):
        node.pread(0, 512)
    assert 0.5 < time.monotonic() - begun < 10
    node.abandon()


def test_another_export_comes_back(tmp_path: Path) -> None:
    with liar(tmp_path / "s", losing(0), export_of(1 << 19)):
        node = opened(tmp_path / "s", reconnect_delay=20)
        with pytest.raises(ProtocolError, match="The export is another one than before"):
            node.pread(0, 512)
        node.abandon()


def test_open_timeout(tmp_path: Path) -> None:
    """A server that comes late; and one that does not."""
    path = tmp_path / "s"
    with pytest.raises(Error, match="Failed to connect to"):
        opened(path, open_timeout=1)
    ready = threading.Event()

    def start() -> None:
        time.sleep(0.3)
        with nbdkit(path, "memory", "1M"):
            ready.wait(20)

    thread = threading.Thread(target=start)
    thread.start()
    try:
        with opened(path, open_timeout=20) as node:
            assert node.size == M
    finally:
        ready.set()
        thread.join()


def test_a_server_that_has_enough_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it takes several, and takes one: the others are done without."""
    monkeypatch.setattr(driver, "EXTRA_TIMEOUT", 0.2)

    def first(connection: Connected) -> None:
        connection.negotiate(flags=FLAGS | nbd.CAN_MULTI_CONN)
        connection.serve(CONTENT)

    with liar(tmp_path / "s", first, say(b"")), opened(tmp_path / "s") as node, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: node.pread(number * 4096, 1 << 18), range(32)))
        assert found == [CONTENT[n * 4096 : n * 4096 + (1 << 18)] for n in range(32)]
        assert len(node._connections) == 1


def test_odd_text(plain: Path, tls: Path) -> None:
    """Text that no file name, host or export can be is an error of ours."""
    objects: dict[str, Any] = {}
    add_object(objects, "tls-creds-x509,id=t,endpoint=client,dir=%s" % tls)
    unix = {"server.type": "unix", "server.path": str(plain)}
    for text in ("\0", "a\0b", "\ud800", "\udcff", "x" * 5000, "", "\xe9" * 3000, "\n", "."):
        for values in (
            {**unix, "server.path": text},
            {"server.type": "inet", "server.host": text, "server.port": "1"},
            {"server.type": "inet", "server.host": HOST, "server.port": text},
            {"server.type": "fd", "server.str": text},
            {"server.type": "vsock", "server.cid": text, "server.port": text},
            {**unix, "export": text},
            {**unix, "export": "exp", "x-dirty-bitmap": text},
            {**unix, "export": "exp", "tls-creds": "t", "tls-hostname": text},
        ):
            with pytest.raises(Error):
                Graph(objects=objects).open_spec({"driver": "nbd", **values}, OpenFlags())


def test_a_socket_that_is_there_already(place: Path, plain: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(plain))
        with Graph().open_spec({"driver": "nbd", "server.type": "fd", "server.str": str(sock.fileno()), "export": "exp"}, OpenFlags()) as node:
            assert node.pread(0, SIZE) == (place / "r.raw").read_bytes()


def test_nothing_is_left_open(plain: Path, tmp_path: Path) -> None:
    """No ResourceWarning, and no descriptor, whether it went well or not."""
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(uri(plain, "exp")).close()
        for wrong in (uri(plain, "nope"), uri(tmp_path / "nope"), "nbd:%s:1" % HOST):
            with pytest.raises(Error):
                open_image(wrong)
        with liar(tmp_path / "s", losing(0)):
            node = opened(tmp_path / "s")
            with pytest.raises(Error):
                node.pread(0, 512)
            node.abandon()
        import gc

        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# -- block status


def test_statuses(tmp_path: Path) -> None:
    """What is asked for and what is made of it: one question for a range, also with extents that reach beyond it."""
    asked: list[tuple[int, int]] = []

    def hook(connection: Connected, request: Request) -> bool:
        if request.command != nbd.CMD_BLOCK_STATUS:
            return False
        asked.append((request.offset, request.length))
        extents = [(4096, 0), (4096, 3), (4096, 1), (1 << 40, 2)]
        connection.send(connection.codec.reply_status(request, 5, extents))
        return True

    with liar(tmp_path / "s", transmission(hook, "extended")), opened(tmp_path / "s") as node:
        found = [tuple(extent[:3]) for extent in node.block_status(0, 1 << 20)]
    assert found == [(0, 4096, HELD), (4096, 4096, NOTHING), (8192, 4096, OFFSET_VALID), (12288, (1 << 20) - 12288, HELD | ZERO)]
    assert asked == [(0, 1 << 20)]


def test_statuses_of_a_disk_in_pieces(tmp_path: Path) -> None:
    """Where there are many extents, shorter ranges are asked for."""
    counts: list[int] = []

    def hook(connection: Connected, request: Request) -> bool:
        if request.command != nbd.CMD_BLOCK_STATUS:
            return False
        extents = [(512, number % 2 * 3) for number in range(request.offset // 512, (request.offset + request.length) // 512)]
        counts.append(len(extents))
        connection.send(connection.codec.reply_status(request, 5, extents))
        return True

    def script(connection: Connected) -> None:
        connection.negotiate(32 * M, block=(512, 512, 65536))
        connection.serve(bytearray(), hook)

    with liar(tmp_path / "s", script), opened(tmp_path / "s") as node:
        first = node.block_status(0, 32 * M, limit=100)
        assert len(first) == 100 and first[99].status == NOTHING
        found = node.block_status(0, 32 * M)
    assert [extent.status for extent in found] == [HELD, NOTHING] * 32768
    assert counts[0] == 65536 and set(counts[1:]) == {driver.STATUS_GOAL}


def test_requests(tmp_path: Path) -> None:
    """What goes over the wire: sizes, flags."""
    log: list[tuple[int, int, int, int]] = []

    def hook(_connection: Connected, request: Request) -> bool:
        log.append((request.command, request.offset, request.length, request.flags & ~nbd.FLAG_PAYLOAD_LEN))
        return False

    def script(connection: Connected) -> None:
        connection.negotiate(block=(512, 4096, 65536), mode="structured")
        connection.serve(bytearray(1 << 20), hook)

    with liar(tmp_path / "s", script), opened(tmp_path / "s", flags=WRITABLE.but(writethrough=True)) as node:
        node.pread(0, 150_016)
        node.pwrite(512, bytes(512))
        log.append((99, 0, 0, 0))
        node.pwrite_zeroes(0, 4096)
        node.pwrite_zeroes(512, 512, True)
        node.pdiscard(100, 4096)
        assert node.zero_range(0, 512, False, fast=True) == (0, 512)
    assert log[:4] == [(nbd.CMD_READ, 0, 65536, 0), (nbd.CMD_READ, 65536, 65536, 0), (nbd.CMD_READ, 131072, 18944, 0), (nbd.CMD_WRITE, 512, 512, nbd.FLAG_FUA)]
    assert [entry for entry in log if entry[0] not in (nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_FLUSH, 99)] == [
        (nbd.CMD_WRITE_ZEROES, 0, 4096, nbd.FLAG_FUA | nbd.FLAG_NO_HOLE),
        (nbd.CMD_WRITE_ZEROES, 512, 512, nbd.FLAG_FUA),
        (nbd.CMD_TRIM, 512, 3584, 0),
        (nbd.CMD_WRITE_ZEROES, 0, 512, nbd.FLAG_FUA | nbd.FLAG_NO_HOLE | nbd.FLAG_FAST_ZERO),
    ]


def test_zeroes_that_would_not_be_fast(tmp_path: Path) -> None:
    def hook(connection: Connected, request: Request) -> bool:
        if request.flags & nbd.FLAG_FAST_ZERO:
            connection.send(connection.codec.reply_error(request, nbd.ENOTSUP, "that would be slow"))
            return True
        return False

    with liar(tmp_path / "s", transmission(hook)), opened(tmp_path / "s") as node:
        assert node.zero_range(0, 4096, False, fast=True) == (0, 0)
        assert node.zero_range(0, 4096, False) == (0, 4096)


def test_psk_without_the_right_python(monkeypatch: pytest.MonkeyPatch, plain: Path, tls: Path) -> None:
    """An ssl module that cannot, and an OpenSSL that cannot be reached: what is needed is said."""
    from diskwright.crypto import psk

    if hasattr(__import__("ssl").SSLContext, "set_psk_client_callback"):
        return
    monkeypatch.setattr(psk.ctypes, "CDLL", lambda _name: object())
    with pytest.raises(Unsupported, match=r"tls-creds-psk\) needs Python 3.13"):
        secured(plain, tls, "tls-creds-psk,id=t,endpoint=client,dir=DIR")
