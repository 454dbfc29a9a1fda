# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Servers on loopback that the tests talk to: nginx, vsftpd and sshd, each with a configuration of its own in a directory
that is given, on free ports, as the user who runs the tests; and a TCP server whose manners a test decides.

Each is a context manager: it yields once the server answers, and always stops it.
"""

from __future__ import annotations

import datetime
import getpass
import ipaddress
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

HOST = "127.0.0.1"
PATIENCE = 20.0  # seconds until a server must answer
PROGRAMS = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def program(name: str) -> str:
    """The path of a program that the tests need. Its absence is a failure."""
    path = shutil.which(name, path=PROGRAMS)
    assert path is not None, "%s is not installed; see .ci/packages" % name
    return path


@contextmanager
def running(command: Sequence[str], ports: Sequence[int], log: Path, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """`command`, from when all of `ports` accept connections until the block, or the thread, ends; what it says goes to `log`."""
    mortal = [program("setpriv"), "--no-new-privs", "--pdeathsig", "TERM", "--", *command]
    with log.open("wb") as stream:
        process = subprocess.Popen(mortal, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, **options)  # type: ignore[call-overload]
    try:
        for port in ports:
            _wait_for(port, process, log)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        with suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")
        time.sleep(0.01)


class Certificates(NamedTuple):
    """Paths: an authority made for one run, and the server's certificate for 127.0.0.1 and localhost with its key."""

    authority: Path
    certificate: Path
    key: Path


def certificates(directory: Path) -> Certificates:
    """Make them in `directory`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime(2020, 1, 1)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _number in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("Test authority", "localhost")]

    def certificate(number: int) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder(names[0], names[number], keys[number].public_key(), x509.random_serial_number())
        return builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=365 * 60))

    own = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    authority = certificate(0).add_extension(x509.BasicConstraints(True, None), True).add_extension(usage, True)
    authority = authority.add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[0].public_key()), False)
    places = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName("localhost")])
    server = certificate(1).add_extension(places, False).add_extension(own, False)
    made = Certificates(directory / "ca.pem", directory / "server.pem", directory / "server.key")
    for builder, path in ((authority, made.authority), (server, made.certificate)):
        path.write_bytes(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    made.key.write_bytes(keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    made.key.chmod(0o600)
    return made


# -- nginx -----------------------------------------------------------------------------------------------------------------


class Nginx(NamedTuple):
    """`root` is what both ports serve, under these prefixes too: /auth/ (user "me", password "let me in"), /cookie/ (wants
    the cookie token=abc), /moved/ (redirects to /), /round/ (redirects to itself), /whole/ (knows no ranges), /plain/
    (HEAD is refused). `https` is encrypted."""

    root: Path
    http: int
    https: int
    certificates: Certificates

    def url(self, name: str, scheme: str = "http") -> str:
        return "%s://%s:%d/%s" % (scheme, HOST, self.https if scheme == "https" else self.http, name)


NGINX = """
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/error.log;
{user}
events {{ worker_connections 256; }}
http {{
    access_log {directory}/access.log;
    {paths}
    keepalive_requests 20;
    root {root};
    server {{
        listen 127.0.0.1:{http};
        listen 127.0.0.1:{https} ssl;
        ssl_certificate {certificates.certificate};
        ssl_certificate_key {certificates.key};
        location /auth/ {{ alias {root}/; auth_basic "images"; auth_basic_user_file {directory}/passwords; }}
        location /cookie/ {{ alias {root}/; if ($cookie_token != "abc") {{ return 403; }} }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
        location /round/ {{ rewrite ^(.*)$ $1 redirect; }}
        location /whole/ {{ alias {root}/; max_ranges 0; }}
        location /plain/ {{ alias {root}/; if ($request_method = HEAD) {{ return 405; }} }}
    }}
}}
"""


@contextmanager
def nginx(directory: Path) -> Iterator[Nginx]:
    """nginx (Debian's nginx-light), for files below `directory`/root."""
    root = directory / "root"
    root.mkdir(parents=True)
    server = Nginx(root, free_port(), free_port(), certificates(directory))
    (directory / "passwords").write_text("me:{PLAIN}let me in\n")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    values = {
        **server._asdict(),
        "directory": directory,
        "user": "user %s;" % getpass.getuser() if os.geteuid() == 0 else "",
        "paths": " ".join("%s_temp_path %s/%s;" % (kind, directory, kind) for kind in kinds),
    }
    (directory / "nginx.conf").write_text(NGINX.format(**values))
    command = [program("nginx"), "-e", str(directory / "error.log"), "-c", str(directory / "nginx.conf")]
    with running(command, (server.http, server.https), directory / "log"):
        yield server


# -- vsftpd ----------------------------------------------------------------------------------------------------------------


class Vsftpd(NamedTuple):
    """`root` is what both ports serve to anybody; `ftps` is encrypted from the first byte on."""

    root: Path
    ftp: int
    ftps: int
    certificates: Certificates

    def url(self, name: str, scheme: str = "ftp") -> str:
        return "%s://%s:%d/%s" % (scheme, HOST, self.ftps if scheme == "ftps" else self.ftp, name)


VSFTPD = """
listen=YES
background=NO
listen_address=127.0.0.1
listen_port={port}
anonymous_enable=YES
no_anon_password=YES
anon_root={root}
run_as_launching_user=YES
anon_world_readable_only=NO
xferlog_enable=NO
syslog_enable=NO
vsftpd_log_file={directory}/vsftpd.log
secure_chroot_dir={directory}/empty
seccomp_sandbox=NO
isolate=NO
isolate_network=NO
"""

VSFTPD_TLS = """
ssl_enable=YES
implicit_ssl=YES
allow_anon_ssl=YES
force_anon_logins_ssl=YES
force_anon_data_ssl=YES
require_ssl_reuse=YES
ssl_ciphers=HIGH
rsa_cert_file={certificates.certificate}
rsa_private_key_file={certificates.key}
"""


@contextmanager
def vsftpd(directory: Path) -> Iterator[Vsftpd]:
    """vsftpd, for files below `directory`/root."""
    root = directory / "root"
    root.mkdir(parents=True)
    (directory / "empty").mkdir()
    server = Vsftpd(root, free_port(), free_port(), certificates(directory))
    for port, text in ((server.ftp, VSFTPD), (server.ftps, VSFTPD + VSFTPD_TLS)):
        path = directory / ("%d.conf" % port)
        path.write_text(text.format(**server._asdict(), directory=directory, port=port).lstrip())
    first, second = ([program("vsftpd"), str(directory / ("%d.conf" % port))] for port in (server.ftp, server.ftps))
    with running(first, [server.ftp], directory / "ftp.log"), running(second, [server.ftps], directory / "ftps.log"):
        yield server


# -- sshd ------------------------------------------------------------------------------------------------------------------


class Sshd(NamedTuple):
    """An SSH server with SFTP. The user `user` may log in with the private key `key`, and with the one of the agent that
    listens on the socket `agent`; `host_key` is the server's public key, a line as in known_hosts without the host."""

    directory: Path
    port: int
    user: str
    key: Path
    host_key: str
    agent: Path

    def url(self, path: Path, query: str = "") -> str:
        return "ssh://%s@%s:%d%s%s" % (self.user, HOST, self.port, path, "?" + query if query else "")


SSHD = """
ListenAddress 127.0.0.1:{port}
HostKey {directory}/host_key
PidFile {directory}/pid
AuthorizedKeysFile {directory}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding yes
MaxStartups 100
Subsystem sftp internal-sftp
"""


@contextmanager
def sshd(directory: Path) -> Iterator[Sshd]:
    """OpenSSH's server, and an agent that holds a key for it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("host_key", "user_key"):
        subprocess.run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", directory / name], timeout=60, check=True)
    (directory / "user_key.pub").rename(directory / "authorized_keys")
    host_key = (directory / "host_key.pub").read_text().strip()
    server = Sshd(directory, free_port(), getpass.getuser(), directory / "user_key", host_key, directory / "agent")
    (directory / "sshd_config").write_text(SSHD.format(**server._asdict()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it wants to be without privileges
    command = [program("sshd"), "-D", "-e", "-f", str(directory / "sshd_config")]
    agent = [program("ssh-agent"), "-D", "-a", str(server.agent)]
    with running(command, [server.port], directory / "sshd.log"), running(agent, [], directory / "agent.log") as process:
        end = time.monotonic() + PATIENCE
        while not server.agent.exists():
            assert process.poll() is None and time.monotonic() < end, (directory / "agent.log").read_text()
            time.sleep(0.01)
        environment = {**os.environ, "SSH_AUTH_SOCK": str(server.agent)}
        subprocess.run([program("ssh-add"), "-q", server.key], env=environment, stderr=subprocess.DEVNULL, timeout=60, check=True)
        yield server


# -- servers with manners of their own -------------------------------------------------------------------------------------


@contextmanager
def tcp_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port on which each connection is given to `serve`, in a thread of its own; what it raises ends the connection.

    At the end all connections are closed under it.
    """
    listener = socket.create_server((HOST, 0))
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def talk(connection: socket.socket) -> None:
        with suppress(OSError, EOFError, ValueError), connection:
            serve(connection)

    def accept() -> None:
        while True:
            try:
                connection, _address = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threads.append(threading.Thread(target=talk, args=(connection,), daemon=True))
            threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        listener.close()
        acceptor.join(PATIENCE)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(PATIENCE)


class Asked(NamedTuple):
    """An HTTP request: method, target and headers by lower-case name; `first` and `last` byte of its range, -1 without."""

    method: str
    target: str
    headers: dict[str, str]
    first: int
    last: int


def read_request(stream: socket.SocketIO) -> Asked:
    """The next request on a connection. Raises EOFError at its end."""
    lines: list[str] = []
    while not lines or lines[-1]:
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = stream.read(1)
            if not byte:
                raise EOFError
            line += byte
        lines.append(line.decode("latin-1").rstrip("\r\n"))
    method, target, _version = lines[0].split(" ")
    headers = {name.lower(): value.strip() for name, _colon, value in (line.partition(":") for line in lines[1:-1])}
    span = headers.get("range", "bytes=-1--1").partition("=")[2]
    first, _dash, last = span.partition("-") if not span.startswith("-") else ("-1", "", "-1")
    return Asked(method, target, headers, int(first), int(last))


@contextmanager
def http_server(answer: Callable[[Asked, socket.socket], None]) -> Iterator[int]:
    """An HTTP server whose answers, whole with status line and headers, are what `answer` sends; see tcp_server."""

    def serve(connection: socket.socket) -> None:
        with connection.makefile("rb", buffering=0) as stream:
            while True:
                answer(read_request(stream), connection)

    with tcp_server(serve) as port:
        yield port


@contextmanager
def http_proxy(asked: list[Asked]) -> Iterator[int]:
    """A proxy for HTTP, and for anything by CONNECT, that notes in `asked` what it was asked for."""

    def relay(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve(connection: socket.socket) -> None:
        with connection.makefile("rb", buffering=0) as stream:
            request = read_request(stream)
        asked.append(request)
        if request.method == "CONNECT":
            place, head = request.target, b""
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            place, _slash, path = request.target[len("http://") :].partition("/")
            lines = ["%s /%s HTTP/1.1" % (request.method, path), "Connection: close"]
            lines += ["%s: %s" % item for item in request.headers.items() if not item[0].startswith("proxy-")]
            head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        host, _colon, port = place.rpartition(":")
        with socket.create_connection((host, int(port)), PATIENCE) as target:
            target.sendall(head)
            there = threading.Thread(target=relay, args=(connection, target), daemon=True)
            there.start()
            relay(target, connection)
            there.join(PATIENCE)

    with tcp_server(serve) as port:
        yield port
