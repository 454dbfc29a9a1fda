# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""ssh: as qemu-img reads and writes over OpenSSH's server; host keys, keys and the user's configuration; servers that stall."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from diskwright.errors import Error, ProtocolError, Unsupported
from diskwright.graph import Graph, open_image
from diskwright.hooks import OpenFlags
from diskwright.node import Node
from diskwright.protocols.ssh import link

from servers import HOST, Sshd, free_port, sshd, tcp_server
from side_by_side import difference, ours, same, theirs

K = 1024
LENGTH = 3_000_000
CONTENT = random.Random("ssh").randbytes(LENGTH)
WRITABLE = OpenFlags(writable=True, resize=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(autouse=True)
def at_home(server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without keys, and the agent that has the right one."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(server.agent))
    return home


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    (place / "r.raw").write_bytes(CONTENT)
    for line in (
        "convert -f raw -O qcow2 r.raw a.qcow2",
        "create -q -f qcow2 -u -b a.qcow2 -F qcow2 over.qcow2 10M",
    ):
        subprocess.run(["qemu-img", *line.split()], cwd=place, check=True)
    return place


def spec(server: Sshd, path: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "ssh", "server.host": HOST, "server.port": server.port, "path": str(path), "host-key-check.mode": "none", **options}


def opened(server: Sshd, path: Path, flags: OpenFlags = OpenFlags(), **options: Any) -> Node:
    return Graph().open_spec(spec(server, path, **options), flags)


def fingerprint(server: Sshd, kind: str) -> str:
    return hashlib.new(kind, base64.b64decode(server.host_key.split()[1])).hexdigest()


# -- as qemu-img does ------------------------------------------------------------------------------------------------------

LINES = """
info {url}/a.qcow2?host_key_check=no
info --output=json {url}/a.qcow2?host_key_check=no
info {url}/r.raw
info {url}/r.raw?host_key_check=yes
info {url}/none?host_key_check=no
info ssh://root@127.0.0.1:{port}{place}/r.raw?host_key_check=no
info {url}/r.raw?host_key_check=sha256:{sha256}
info {url}/r.raw?host_key_check=md5:00:11:22:33
info {url}/r.raw?host_key_check=sha1:00112233
info {url}/r.raw?host_key_check=sha256:
info {url}/r.raw?host_key_check=bogus
info {url}/r.raw?host_key_check=md5
info ssh://127.0.0.1
info ssh:///x
info ssh:x
info ssh://127.0.0.1:x/y
info ssh://127.0.0.1:99999/y
info ssh://nosuch.invalid/x
info ssh://127.0.0.1:1/x
info --image-opts driver=ssh,host=127.0.0.1,port={port},path={place}/r.raw,host-key-check.mode=none
info --image-opts driver=ssh,server.host=127.0.0.1,server.port={port},path={place}/r.raw,host-key-check.mode=none,user=root
info --image-opts {inet},host-key-check.mode=hash,host-key-check.type=sha256,host-key-check.hash={sha256}
info --image-opts {inet},host-key-check.mode=hash,host-key-check.type=sha1,host-key-check.hash={sha1}
info --image-opts {inet},host-key-check.mode=hash,host-key-check.type=sha256
info --image-opts {inet},host-key-check.mode=hash
info --image-opts {inet},host-key-check.mode=bogus
info --image-opts {inet},host-key-check.mode=none,host-key-check.type=md5
info --image-opts {inet},host-key-check.type=md5
info --image-opts {inet},host_key_check=no
info --image-opts {inet},bogus=1
info --image-opts {inet},server.type=inet
info --image-opts driver=ssh,path=/x
info --image-opts driver=ssh,server.host=127.0.0.1,path=/x
info --image-opts driver=ssh,server.port=22,path=/x
info --image-opts driver=ssh,server.host=127.0.0.1,server.port=22x,path=/x
info --image-opts driver=ssh,host=127.0.0.1
info --image-opts driver=ssh,port=22,path=/x
info --image-opts driver=raw,offset=512,file.driver=ssh,file.server.host=127.0.0.1,file.server.port={port},file.path={place}/r.raw,file.host_key_check=no
info --image-opts driver=raw,offset=512,file.driver=ssh,file.host=127.0.0.1,file.port={port},file.path={place}/r.raw,file.host_key_check=no
info 'json:{{"driver":"ssh","server":{{"host":"127.0.0.1","port":{port}}},"path":"{place}/r.raw","host-key-check":{{"mode":"none"}}}}'
info 'json:{{"driver":"ssh","server":"x","path":"/x"}}'
info 'json:{{"driver":"ssh","server":{{"host":"x","port":"1"}},"path":"/x","host-key-check":"none"}}'
info 'json:{{"driver":"raw","file":{{"driver":"ssh","filename":"{url}/r.raw","host_key_check":"no"}}}}'
info {url}/over.qcow2?host_key_check=no
info --backing-chain {url}/over.qcow2?host_key_check=no
map {url}/over.qcow2?host_key_check=no
map --output=json {url}/a.qcow2?host_key_check=no
check {url}/a.qcow2?host_key_check=no
compare {url}/a.qcow2?host_key_check=no a.qcow2
create -f raw {url}/none/x?host_key_check=no 1M
create -f qcow2 {url}/none/x?host_key_check=no 1M
create -f raw -o preallocation=full {url}/x?host_key_check=no 1M
create -f raw -o help ssh://127.0.0.1/x
resize -f raw --preallocation=full {url}/r.raw?host_key_check=no 8M
"""


@pytest.mark.parametrize("line", [line for line in LINES.splitlines() if line])
def test_the_same_as_qemu_img(server: Sshd, images: Path, line: str) -> None:
    values = {kind: fingerprint(server, kind) for kind in ("sha1", "sha256")}
    inet = "driver=ssh,server.host=127.0.0.1,server.port=%d,path=%s/r.raw" % (server.port, images)
    url = "ssh://127.0.0.1:%d%s" % (server.port, images)
    same(line.format(url=url, port=server.port, place=images, inet=inet, **values), images)


CHANGES = """
create -f qcow2 -b {base} -F qcow2 {url}/a?host_key_check=no
create -f raw {url}/a?host_key_check=no 5M; resize -f raw {url}/a?host_key_check=no 7M
create -f qcow2 {url}/a?host_key_check=no 5M; resize {url}/a?host_key_check=no 7M; snapshot -c s {url}/a?host_key_check=no
convert -O qcow2 a.qcow2 {url}/a?host_key_check=no; amend -o lazy_refcounts=on {url}/a?host_key_check=no
convert -O raw a.qcow2 {url}/a?host_key_check=no
convert -c -O qcow2 a.qcow2 {url}/a?host_key_check=no
"""


@pytest.mark.parametrize("lines", [line for line in CHANGES.splitlines() if line])
def test_the_same_images(server: Sshd, images: Path, tmp_path: Path, lines: str) -> None:
    for run, name in ((theirs, "theirs"), (ours, "ours")):
        (tmp_path / name).mkdir()
        url = "ssh://127.0.0.1:%d%s" % (server.port, tmp_path / name)
        for line in lines.format(url=url, base=images / "a.qcow2").split("; "):
            outcome = run(shlex.split(line), images)
            assert outcome.code == 0, difference(line, outcome, outcome)
    first, second = ((tmp_path / name / "a") for name in ("theirs", "ours"))
    if "raw" in lines:
        assert first.read_bytes() == second.read_bytes()
        return
    compared = subprocess.run(["qemu-img", "compare", "-s", first, second], capture_output=True, text=True, check=False)
    assert compared.returncode == 0, compared.stdout
    assert subprocess.run(["qemu-img", "check", "-q", second], check=False).returncode == 0


def test_reads_and_writes_of_many_threads(server: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"")
    with opened(server, path, WRITABLE) as node, ThreadPoolExecutor(8) as pool:
        size = 300_001
        list(pool.map(lambda number: node.pwrite(number * size, bytes([number + 1]) * size), range(16)))
        node.flush()
        assert path.read_bytes() == b"".join(bytes([number + 1]) * size for number in range(16))
        assert list(pool.map(lambda number: node.pread(number * size, size), range(16))) == [bytes([number + 1]) * size for number in range(16)]
        assert node.size == 16 * size
        node.pwrite_zeroes(16 * size, 50 * K * K)  # behind the end: one byte is sent
        assert node.size == path.stat().st_size == 16 * size + 50 * K * K and path.stat().st_blocks * 512 < 10 * K * K
        node.truncate(1000)
        assert node.size == path.stat().st_size == 1000 and node.pread(0, 1000) == b"\1" * 1000


def test_a_file_of_another_user(server: Sshd, tmp_path: Path) -> None:
    """What the server answers becomes its error in our words."""
    (tmp_path / "x").write_bytes(b"x" * 512)
    with pytest.raises(Error, match="failed to open remote file '/proc/1/environ': SFTP server: Permission denied"):
        opened(server, Path("/proc/1/environ")).close()
    with opened(server, tmp_path / "x") as node:
        with pytest.raises(Error, match="read-only"):
            node.pwrite(0, b"y")
        node.change_flags(WRITABLE)  # as commit does; qemu-img refuses to
        node.pwrite(0, b"y")
    assert (tmp_path / "x").read_bytes() == b"y" + b"x" * 511


def test_commit_over_ssh(server: Sshd, images: Path, tmp_path: Path) -> None:
    """(Where qemu-img says that it cannot open the file once more.)"""
    for name in ("a.qcow2", "over.qcow2"):
        (tmp_path / name).write_bytes((images / name).read_bytes())
    subprocess.run(["qemu-io", "-c", "write -P 7 0 64k", str(tmp_path / "over.qcow2")], stdout=subprocess.DEVNULL, check=True)
    known_hosts(server, Path.home())
    outcome = ours(["commit", server.url(tmp_path / "over.qcow2")], tmp_path)
    assert outcome.code == 0, outcome.err
    assert subprocess.run(["qemu-io", "-r", "-c", "read -P 7 0 64k", str(tmp_path / "a.qcow2")], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_files_beside_an_image_are_not_made_here(server: Sshd, tmp_path: Path) -> None:
    outcome = ours(["create", "-f", "vmdk", "-o", "subformat=monolithicFlat", server.url(tmp_path / "x.vmdk", "host_key_check=no"), "1M"], tmp_path)
    assert outcome.code == 1 and "Could not create" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "x.vmdk"]


# -- who is who ------------------------------------------------------------------------------------------------------------


def known_hosts(server: Sshd, home: Path, key: str = "") -> None:
    (home / ".ssh" / "known_hosts").write_text("[%s]:%d %s\n" % (HOST, server.port, key or server.host_key))


def test_known_hosts(server: Sshd, images: Path, at_home: Path) -> None:
    name = server.url(images / "r.raw")
    known_hosts(server, at_home)
    open_image(name).close()
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
    known_hosts(server, at_home, other)
    with pytest.raises(Error, match=r"host key \(ssh-ed25519 key with fingerprint SHA256:.*\) does not match the one in known_hosts; this may be a possible"):
        open_image(name)
    known_hosts(server, at_home, asyncssh.generate_private_key("ecdsa-sha2-nistp256").export_public_key().decode().strip())
    with pytest.raises(Error, match="host key for this server not found, another type exists|failed to establish SSH session"):
        open_image(name)
    (at_home / ".ssh" / "known_hosts").unlink()
    (at_home / ".ssh" / "config").write_text("Host *\nUserKnownHostsFile none\n")
    with pytest.raises(Error, match="no host key was found in known_hosts"):
        open_image(name)


def test_keys(server: Sshd, images: Path, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK")
    with pytest.raises(Error, match="failed to authenticate using publickey authentication and the identities held by your ssh-agent"):
        opened(server, images / "r.raw")
    (at_home / ".ssh" / "id_ed25519").write_bytes(server.key.read_bytes())
    opened(server, images / "r.raw").close()


def test_the_users_configuration(server: Sshd, images: Path, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK")
    known_hosts(server, at_home)
    lines = "Host images\nHostName %s\nPort %d\nUser %s\nIdentityFile %s\n" % (HOST, server.port, server.user, server.key)
    (at_home / ".ssh" / "config").write_text(lines)
    with open_image("ssh://images%s" % (images / "r.raw")) as node:
        assert node.filename == server.url(images / "r.raw")
        assert node.pread(0, node.size).rstrip(b"\0") == CONTENT.rstrip(b"\0")
    (at_home / ".ssh" / "config").write_text(lines + "Host inner\nHostName %s\nPort %d\nProxyJump images\nIdentityFile %s\n" % (HOST, server.port, server.key))
    open_image("ssh://%s@inner%s" % (server.user, images / "r.raw")).close()
    (at_home / ".ssh" / "config").write_text("Port many\n")
    with pytest.raises(Error, match="failed to parse ~/.ssh/config: "):
        open_image("ssh://images/x")


def test_a_directory(server: Sshd, tmp_path: Path) -> None:
    with pytest.raises(Error, match="Could not read image for determining its format: Input/output error"):
        open_image(server.url(tmp_path, "host_key_check=no"))


def test_hosts_that_are_commands(at_home: Path) -> None:
    """Whoever made an image may name hosts; the user's configuration may hand them to a shell."""
    (at_home / ".ssh" / "config").write_text("Host *\nProxyCommand sh -c 'echo %%h > %s/ran'\n" % at_home)
    for host in ("$(id)", "`id`", "a;id", "-oProxyCommand=id", "a|id", "a b", "a%h", ""):
        with pytest.raises(Error, match="is no host name|missing hostname in URI"):
            open_image("ssh://%s/x" % host)
    assert not (at_home / "ran").exists()


def test_without_the_library(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    monkeypatch.delitem(sys.modules, "diskwright.protocols.ssh.link")
    with pytest.raises(Unsupported, match=r"needs the Python library asyncssh \(Debian: python3-asyncssh; PyPI: asyncssh, or diskwright\[ssh\]\)"):
        open_image("ssh://127.0.0.1/x")


# -- servers with manners of their own -------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PATIENCE", 1.0)


GREETINGS = {
    "silence": (lambda connection: connection.recv(1) and connection.recv(1 << 20) and connection.recv(1), "did not answer in 1 seconds"),
    "garbage": (lambda connection: connection.sendall(b"\xff" * 100_000), "failed to establish SSH session"),
    "closes": (lambda connection: None, "failed to establish SSH session"),
    "closes after its name": (lambda connection: connection.sendall(b"SSH-2.0-x\r\n"), "failed to establish SSH session"),
    "endless banner": (lambda connection: connection.sendall(b"x\r\n" * 1_000_000), "failed to establish SSH session|did not answer in 1 seconds"),
}


@pytest.mark.parametrize("kind", GREETINGS)
def test_servers_that_are_none(impatient: None, kind: str) -> None:
    serve, words = GREETINGS[kind]
    started = time.monotonic()
    with tcp_server(serve) as port, pytest.raises(Error, match=words):  # type: ignore[arg-type]
        open_image("ssh://127.0.0.1:%d/x?host_key_check=no" % port)
    assert time.monotonic() - started < 5


class Manners(asyncssh.SFTPServer):  # type: ignore[misc]
    """An SFTP server that lies; `kind` says how."""

    kind = ""

    def open(self, path: bytes, pflags: int, attrs: Any) -> Any:
        return object()

    def close(self, file_obj: Any) -> None:
        pass

    def fstat(self, file_obj: Any) -> Any:
        size = {"size beyond all": 1 << 63, "no size": None}.get(self.kind, LENGTH)
        return asyncssh.SFTPAttrs(size=size, permissions=0o100644)

    async def read(self, file_obj: Any, offset: int, size: int) -> bytes:
        if self.kind == "stalls":
            await asyncio.sleep(30)
        if self.kind == "fails":
            raise asyncssh.SFTPFailure("out of luck")
        if self.kind == "too much":
            return b"x" * (size + 1)
        if self.kind == "half":
            return CONTENT[offset : offset + max(1, size // 2)]
        return b""


LIES = {
    "size beyond all": "failed to read file attributes",
    "no size": "failed to read file attributes",
    "stalls": "read failed: 127.0.0.1:.* did not answer in 1 seconds",
    "fails": "read failed: SFTP server: Failure",
    "too much": "read failed: The server sent more than it was asked for|read failed: ",
    "short": "",
    "half": "",
}


@pytest.fixture(scope="module")
def liar(server: Sshd) -> Iterator[int]:
    """A server that does as Manners says."""
    port = free_port()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    class Open(asyncssh.SSHServer):  # type: ignore[misc]
        def begin_auth(self, username: str) -> bool:
            return False

    async def listen() -> Any:
        keys = [str(server.directory / "host_key")]
        return await asyncssh.create_server(Open, HOST, port, server_host_keys=keys, sftp_factory=Manners)

    listener = asyncio.run_coroutine_threadsafe(listen(), loop).result(20)
    yield port

    async def leave() -> None:
        listener.close()
        await listener.wait_closed()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    asyncio.run_coroutine_threadsafe(leave(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


@pytest.mark.parametrize("kind", LIES)
def test_lies(impatient: None, liar: int, images: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(Manners, "kind", kind)
    name = "ssh://127.0.0.1:%d%s?host_key_check=no" % (liar, images / "r.raw")
    started = time.monotonic()
    if LIES[kind]:
        with pytest.raises(Error, match=LIES[kind]):
            with open_image(name, "raw") as node:
                node.pread(0, 100 * K)
    else:
        with open_image(name, "raw") as node:
            assert node.pread(0, 2000) == (CONTENT[:2000] if kind == "half" else bytes(2000))
    assert time.monotonic() - started < 6


def test_a_server_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(tmp_path / "own") as own:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(own.agent))
        (tmp_path / "x").write_bytes(CONTENT)
        node = opened(own, tmp_path / "x", WRITABLE)
        assert node.pread(0, 512) == CONTENT[:512]
        connection = node._remote._connection  # type: ignore[attr-defined]
        connection.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        with pytest.raises(ProtocolError, match="read failed: "):
            node.pread(512, 512)
        with pytest.raises(ProtocolError, match="write failed: "):
            node.pwrite(0, b"x")
        with pytest.raises(ProtocolError, match="fsync failed: "):
            node.flush()
        node.abandon()
