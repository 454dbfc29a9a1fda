# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`diskwright serve`: its options, signals, systemd, TLS, and the files that it leaves or does not leave behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from diskwright.protocols.nbd import codec as nbd
from serving import PATIENCE, Client, command, run, wait_for

SERVE = (sys.executable, "-m", "diskwright", "serve")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A qcow2 image of 1 MiB with an internal snapshot of other content."""
    path = tmp_path_factory.mktemp("made") / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M")
    run("qemu-io", "-c", "write -P 1 0 1M", str(path))
    run("qemu-img", "snapshot", "-c", "old", str(path))
    run("qemu-io", "-c", "write -P 2 0 512k", str(path))
    return path.read_bytes()


@pytest.fixture
def image(tmp_path: Path, made: bytes) -> Path:
    """The same, in the test's own directory."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(made)
    return path


def test_one_image_and_a_clean_end(tmp_path: Path, image: Path) -> None:
    path, pid = tmp_path / "s.sock", tmp_path / "pid"
    with command("-k", str(path), "-p", "0", "-x", "a b", "--pid-file", str(pid), "disk.qcow2", place=tmp_path) as (process, uris):
        uris.append(process.stdout.readline().strip())
        assert uris[0] == "nbd+unix:///a%20b?socket=" + str(path) and uris[1].startswith("nbd://127.0.0.1:")
        assert pid.read_text() == "%d\n" % process.pid
        assert run("nbdinfo", "--size", uris[0]) == run("nbdinfo", "--size", uris[1]) == "1048576\n"
        client = Client(str(path)).go("a b")
        client.write(0, b"x" * 512)
    assert client.gone() and not path.exists() and not pid.exists()
    client.socket.close()
    assert "failed" not in run("qemu-io", "-r", "-c", "read -P 0x78 0 512", str(image))
    run("qemu-img", "check", str(image))


def test_requests_under_way_are_finished(tmp_path: Path, image: Path) -> None:
    """The server is told to end while a client has much to get, and the client gets it all."""
    path = tmp_path / "s.sock"
    with command("-k", str(path), "-f", "raw", "disk.qcow2", place=tmp_path) as (process, _uris):
        size = image.stat().st_size
        with Client(str(path)).go() as client:
            client.send(nbd.CMD_READ, 0, size)
            client.socket.recv(1, socket.MSG_PEEK)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: not path.exists(), "the socket stays")
            assert client.finish(0, size)[1] == image.read_bytes()
            assert client.gone()


def test_a_second_signal_does_not_wait_for_clients(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "s.sock"
    with command("-k", str(path), "-f", "raw", "disk.qcow2", place=tmp_path) as (process, _uris):
        with Client(str(path)).go() as client:
            for _number in range(32):
                client.send(nbd.CMD_READ, 0, image.stat().st_size)
            client.socket.recv(1, socket.MSG_PEEK)
            process.send_signal(signal.SIGINT)
            wait_for(lambda: not path.exists(), "the socket stays")
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0


def test_ways_to_look_at_an_image(tmp_path: Path, image: Path) -> None:
    """A snapshot, what is behind an offset, a copy that is forgotten, and the end after the last client."""
    path = tmp_path / "s.sock"

    def first_bytes(*options: str) -> bytes:
        with command("--until-idle", "-k", str(path), *options, "disk.qcow2", place=tmp_path) as (process, _uris):
            with Client(str(path)).go() as client:
                data = client.read(0, 4)
                if "-r" not in options:
                    client.do(nbd.CMD_WRITE, 0, 4, payload=b"gone")
            assert process.wait(PATIENCE) == 0
        return data

    before = image.read_bytes()
    assert first_bytes("-r") == b"\2" * 4
    assert first_bytes("-r", "-l", "old") == first_bytes("-r", "-l", "snapshot.name=old") == b"\1" * 4
    assert first_bytes("-r", "-o", "512k") == b"\1" * 4
    assert first_bytes("-s") == b"\2" * 4
    assert image.read_bytes() == before
    assert first_bytes("--cache=none", "--discard=ignore", "--detect-zeroes=on", "-o", "512k") == b"\1" * 4
    assert first_bytes("-r", "-o", "512k") == b"gone"
    with command("-k", str(path), "--detect-zeroes=unmap", "disk.qcow2", place=tmp_path):
        with Client(str(path)).go() as client:
            client.write(0, bytes(1 << 20))
    assert json.loads(run("qemu-img", "map", "--output=json", str(image)))[0]["zero"]


def test_in_the_background(tmp_path: Path, image: Path) -> None:
    path, pid = tmp_path / "s.sock", tmp_path / "pid"
    out = run(*SERVE, "--fork", "--pid-file", str(pid), "-k", str(path), str(image), place=tmp_path)
    assert out == "nbd+unix:///?socket=%s\n" % path
    number = int(pid.read_text())
    with Client(str(path)).go() as client:
        assert client.read(0, 1) == b"\2"
        failed = run(*SERVE, "--fork", "-k", str(path) + "2", str(image), code=1)
        assert "Failed to get" in failed and "lock" in failed
        os.kill(number, signal.SIGTERM)
        assert client.gone()
    wait_for(lambda: not pid.exists() and not path.exists(), "it stays")


def test_sockets_of_systemd(tmp_path: Path, image: Path) -> None:
    path, notes = tmp_path / "given.sock", socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notes.bind(str(tmp_path / "notify"))
    notes.settimeout(PATIENCE)
    given = socket.socket(socket.AF_UNIX)
    given.bind(str(path))
    given.listen(5)
    saved = os.dup(given.fileno())
    environment = {"LISTEN_FDS": "1", "NOTIFY_SOCKET": str(tmp_path / "notify")}
    first = "import os; os.dup2(%d, 3); os.environ['LISTEN_PID'] = str(os.getpid())" % saved
    with command("disk.qcow2", place=tmp_path, environment=environment, first=first, fds=(saved,)) as (_process, uris):
        assert uris == ["nbd+unix:///?socket=%s" % path]
        assert notes.recv(1000).startswith(b"READY=1\n")
        with Client(str(path)).go() as client:
            assert client.read(0, 1) == b"\2"
    assert notes.recv(1000) == b"STOPPING=1"
    assert path.exists()  # it is systemd's
    for sock in (notes, given):
        sock.close()
    os.close(saved)


def test_many_exports_from_options_and_a_graph_file(tmp_path: Path, image: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"B" * 65536)
    graph = {
        "blockdevs": [
            {"driver": "raw", "node-name": "base", "read-only": True, "file": {"driver": "file", "filename": "base.raw"}},
            {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": "disk.qcow2"}},
        ],
        "exports": [
            {"type": "nbd", "id": "e0", "node-name": "base"},
            {"type": "nbd", "id": "e1", "node-name": "disk", "name": "d", "writable": True, "description": "the disk"},
        ],
        "nbd-server": {"addr": {"type": "unix", "path": str(tmp_path / "g.sock")}, "max-connections": 3},
    }
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    options = [
        "--blockdev=file,node-name=f,filename=base.raw,read-only=on",
        "--blockdev=raw,node-name=base,file=f,offset=512",
        "--blockdev",
        json.dumps({"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": "disk.qcow2"}}),
        "--export=nbd,id=e0,node-name=base",
        "--export=type=nbd,id=e1,node-name=disk,name=d,writable=on,description=the disk",
        "--nbd-server=addr.type=unix,addr.path=%s/g.sock,max-connections=3" % tmp_path,
    ]
    for words in (["--graph", "graph.json"], options):
        with command(*words, place=tmp_path):
            listed = json.loads(run("nbdinfo", "--list", "--json", "nbd+unix:///?socket=%s/g.sock" % tmp_path))
            found = {export["export-name"]: (export["is_read_only"], export.get("description")) for export in listed["exports"]}
            assert found == {"base": (True, None), "d": (False, "the disk")}
            assert run("nbdinfo", "--size", "nbd+unix:///base?socket=%s/g.sock" % tmp_path).strip() == str(65536 - 512 * (words is options))


def certificates(place: Path) -> None:
    """An authority, and certificates of a server and a client, by GnuTLS's certtool."""

    def certtool(*words: str) -> None:
        run("certtool", *words, place=place)

    texts = {
        "ca": "cn = Test CA\nca\ncert_signing_key\n",
        "server": "cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\nencryption_key\nsigning_key\n",
        "client": 'country = GB\norganization = "Example, Org"\ncn = laptop\ntls_www_client\nencryption_key\nsigning_key\n',
    }
    for name, text in texts.items():
        (place / (name + ".info")).write_text(text)
        certtool("--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", name + "-key.pem")
        kind = "--generate-self-signed" if name == "ca" else "--generate-certificate"
        signer = [] if name == "ca" else ["--load-ca-certificate", "ca-cert.pem", "--load-ca-privkey", "ca-key.pem"]
        certtool(kind, *signer, "--load-privkey", name + "-key.pem", "--template", name + ".info", "--outfile", name + "-cert.pem")


def test_tls_with_certificates_and_who_may_come_in(tmp_path: Path, image: Path) -> None:
    certificates(tmp_path)
    server = "tls-creds-x509,id=t,endpoint=server,dir=."
    client = ["--object", "tls-creds-x509,id=t,endpoint=client,dir=%s" % tmp_path, "--image-opts"]
    rules = {
        "qom-type": "authz-list",
        "id": "z",
        "policy": "deny",
        "rules": [{"match": "C=GB,O=Example\\, Org,CN=lap*", "policy": "allow", "format": "glob"}],
    }
    for authz, allowed in (([], True), (["authz-simple,id=z,identity=CN=nobody"], False), ([json.dumps(rules)], True)):
        words = ["--object", server, "--tls-creds=t", *(["--object", authz[0], "--tls-authz=z"] if authz else [])]
        with command(*words, "-r", "-p", "0", "disk.qcow2", place=tmp_path) as (_process, uris):
            port = uris[0].split(":")[2].rstrip("/")
            said = run("qemu-img", "info", *client, "driver=nbd,host=localhost,port=%s,tls-creds=t" % port, code=0 if allowed else 1)
            assert ("virtual size: 1 MiB" in said) == allowed
            assert "TLS negotiation required" in run("qemu-img", "info", uris[0], code=1)
            if allowed:
                run("nbdcopy", "nbds://localhost:%s/?tls-certificates=%s" % (port, tmp_path), str(tmp_path / "copy.raw"))
                assert (tmp_path / "copy.raw").read_bytes() == b"\2" * 524288 + b"\1" * 524288
    message = run(*SERVE, "--tls-authz=z", str(image), code=1)
    assert "--tls-authz is not permitted without --tls-creds" in message


def test_tls_with_a_shared_key(tmp_path: Path, image: Path) -> None:
    (tmp_path / "keys.psk").write_text("alice:%s\n" % ("ab" * 32))
    words = ["--object", "tls-creds-psk,id=t,endpoint=server,dir=.", "--tls-creds=t", "-k", str(tmp_path / "s.sock")]
    with command(*words, "disk.qcow2", place=tmp_path):
        uri = "nbds+unix://alice@/?socket=%s/s.sock&tls-psk-file=%s/keys.psk" % (tmp_path, tmp_path)
        run("nbdcopy", uri, str(tmp_path / "copy.raw"))
        assert (tmp_path / "copy.raw").read_bytes()[:3] == b"\2\2\2"
        run("nbdcopy", str(tmp_path / "copy.raw"), uri)
        creds = "tls-creds-psk,id=c,endpoint=client,username=alice,dir=%s" % tmp_path
        listed = run(*SERVE, "-L", "-k", str(tmp_path / "s.sock"), "--tls-creds=c", "--object", creds)
        assert "size:  1048576" in listed


def test_lists_another_server_as_qemu_nbd_does(tmp_path: Path, image: Path) -> None:
    with command("-r", "-A", "-D", "some text", "-x", "one", "-k", str(tmp_path / "s.sock"), "disk.qcow2", place=tmp_path):
        assert run(*SERVE, "-L", "-k", str(tmp_path / "s.sock")) == run("qemu-nbd", "-L", "-k", str(tmp_path / "s.sock"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Invalid number of arguments"),
        (["a", "b"], "Invalid number of arguments"),
        (["-k", "relative", "disk.qcow2"], "socket path must be absolute"),
        (["-s", "-r", "disk.qcow2"], "--snapshot and --read-only are mutually exclusive"),
        (["-e", "-1", "disk.qcow2"], "Invalid shared device number '-1'"),
        (["--cache=x", "disk.qcow2"], "Invalid cache mode `x'"),
        (["--discard=x", "disk.qcow2"], "Invalid discard mode `x'"),
        (["--aio=x", "disk.qcow2"], "Invalid aio mode 'x'"),
        (["--detect-zeroes=x", "disk.qcow2"], "Failed to parse detect_zeroes mode: invalid parameter value: x"),
        (["-o", "x", "disk.qcow2"], "Invalid offset 'x'"),
        (["-o", "1G", "disk.qcow2"], "Offset (1073741824) has to be smaller than the image size (1048576)"),
        (["-l", "none", "disk.qcow2"], "Failed to load snapshot: Can't find snapshot"),
        (["-B", "none", "disk.qcow2"], "Bitmap 'none' is not found"),
        (["-f", "bogus", "disk.qcow2"], "Unknown driver 'bogus'"),
        (["--tls-creds=x", "-k", "/s", "disk.qcow2"], "No TLS credentials with id 'x'"),
        (["--export", "nbd,id=e,node-name=x", "-k", "/s"], "Cannot find device='' nor node-name='x'"),
        (["--export", "nbd,id=1,node-name=d", "--blockdev=null-co,node-name=d"], "Invalid block export id"),
        (["--nbd-server", "addr.type=unix", "disk.qcow2"], "Parameter 'addr.path' is missing"),
        (["-p", "0", "-b", "256.1.1.1", "disk.qcow2"], "address resolution failed for 256.1.1.1:0"),
        (["--graph", "none.json"], "No such file or directory"),
    ],
)
def test_what_is_refused_is_said(image: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from diskwright.cli import main

    monkeypatch.chdir(image.parent)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["diskwright", "serve", *words]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert message in capsys.readouterr().err


def test_a_client_that_stops_in_the_tls_handshake(tmp_path: Path, image: Path) -> None:
    """It is sent away when its time is up, and disturbs nobody before that."""
    (tmp_path / "keys.psk").write_text("qemu:%s\n" % ("ab" * 32))
    words = ["--object", "tls-creds-psk,id=t,endpoint=server,dir=.", "--tls-creds=t", "-k", str(tmp_path / "s.sock"), "--handshake-limit=1"]
    with command(*words, "disk.qcow2", place=tmp_path):
        stalled = Client(str(tmp_path / "s.sock"))
        stalled.greet()
        assert stalled.ask(stalled.codec.go("")).code == nbd.REP_ERR_TLS_REQD
        assert stalled.ask(stalled.codec.start_tls()).accepted
        garbage = Client(str(tmp_path / "s.sock"))
        garbage.greet()
        assert garbage.ask(garbage.codec.start_tls()).accepted
        garbage.socket.sendall(b"no TLS at all" * 10)
        uri = "nbds+unix://qemu@/?socket=%s/s.sock&tls-psk-file=%s/keys.psk" % (tmp_path, tmp_path)
        assert run("nbdinfo", "--size", uri) == "1048576\n"
        for client in (stalled, garbage):
            while not client.gone():
                pass
            client.socket.close()


def test_what_cannot_be_flushed_in_the_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(65536))
    words = "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=disk.raw"
    words += ",file.inject-error.0.event=flush_to_disk,file.inject-error.0.iotype=flush,file.inject-error.0.errno=28"
    with pytest.raises(AssertionError, match="No space left on device"):
        with command("-k", str(tmp_path / "s.sock"), "--image-opts", words, place=tmp_path):
            with Client(str(tmp_path / "s.sock")).go() as client:
                client.write(0, b"x")
                assert client.do(nbd.CMD_FLUSH) == nbd.ENOSPC
                assert client.read(0, 1) == b"x"
