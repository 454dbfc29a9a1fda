# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Storage servers on loopback that the tests talk to: tgt for iSCSI and NFS-Ganesha for NFS, with configurations of their own.

Both need root. tgt is started by each process that runs tests; Ganesha, which must be known to the one port mapper of the
machine, by the first of them, for all.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from servers import HOST, PATIENCE, free_port, program

IQN = "iqn.2026-11.example.diskwright:%s"
USER, PASSWORD = "joe", "a password of CHAP"
ENVIRONMENT_OF_TGT = "TGT_IPC_SOCKET"


class Targets:
    """A running tgtd and its targets: "open" for all, "chap" for who knows the password."""

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self.directory = directory
        self._count = {"open": 0, "chap": 0}
        for number, name in enumerate(self._count, 1):
            self._admin("target", "new", "--tid", str(number), "--targetname", IQN % name)
            self._admin("target", "bind", "--tid", str(number), "--initiator-address", "ALL")
        self._admin("account", "new", "--user", USER, "--password", PASSWORD)
        self._admin("account", "bind", "--tid", "2", "--user", USER)

    def _admin(self, mode: str, verb: str, *options: str) -> None:
        line = [program("tgtadm"), "-C", "1", "--lld", "iscsi", "--mode", mode, "--op", verb, *options]
        subprocess.run(line, env={**os.environ, ENVIRONMENT_OF_TGT: str(self.directory / "ipc")}, timeout=PATIENCE, check=True)

    def portal(self) -> str:
        """ADDRESS:PORT."""
        return "%s:%d" % (HOST, self.port)

    def unit(self, path: Path, target: str = "open", block_size: int = 512, parameters: str = "thin_provisioning=1", kind: str = "disk") -> str:
        """Make the file `path` a logical unit. Returns its name, iscsi://PORTAL/TARGET/LUN."""
        self._count[target] += 1
        number = str(self._count[target])
        where = ("--tid", str(list(self._count).index(target) + 1), "--lun", number)
        self._admin("logicalunit", "new", *where, "--backing-store", str(path), "--blocksize", str(block_size), "--device-type", kind)
        if parameters:
            self._admin("logicalunit", "update", *where, "--params", parameters)
        return "iscsi://%s/%s/%s" % (self.portal(), IQN % target, number)

    def drop_connections(self, target: str = "open") -> None:
        """Close all connections to a target, as a failing network would."""
        number = str(list(self._count).index(target) + 1)
        line = [program("tgtadm"), "-C", "1", "--lld", "iscsi", "--mode", "conn", "--op", "show", "--tid", number]
        environment = {**os.environ, ENVIRONMENT_OF_TGT: str(self.directory / "ipc")}
        shown = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        session = ""
        for words in (text.split() for text in shown.splitlines()):
            if words[:1] == ["Session:"]:
                session = words[1]
            elif words[:1] == ["Connection:"]:
                self._admin("conn", "delete", "--tid", number, "--sid", session, "--cid", words[1])


@contextmanager
def tgt(directory: Path) -> Iterator[Targets]:
    """tgtd with its sockets in `directory`."""
    port = free_port()
    line = [program("tgtd"), "-f", "-C", "1", "--iscsi", "portal=%s:%d" % (HOST, port)]
    with (directory / "log").open("wb") as log:
        server = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, ENVIRONMENT_OF_TGT: str(directory / "ipc")})
    try:
        end = time.monotonic() + PATIENCE
        while not (_listens(port) and (directory / "ipc.1").exists()):
            assert server.poll() is None and time.monotonic() < end, _tail(directory / "log")
            time.sleep(0.01)
        yield Targets(directory, port)
    finally:
        server.kill()  # it does not end on SIGTERM while there are sessions
        server.wait()


GANESHA = """
NFS_CORE_PARAM {{ Protocols = 3; Bind_addr = 127.0.0.1; NFS_Port = {nfs}; MNT_Port = {mount}; Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }}
NFSv4 {{ Graceless = true; RecoveryRoot = "{place}/recovery"; RecoveryBackend = "fs"; Only_Numeric_Owners = true; }}
EXPORT {{ Export_Id = 77; Path = "{place}/export"; Pseudo = "/export"; Access_Type = RW; Squash = No_Root_Squash; SecType = sys;
         PrivilegedPort = false; Protocols = 3; FSAL {{ Name = VFS; }} }}
"""

# Runs the servers until nobody holds a lock on the file "users" any more, not even a process that was killed.
KEEPER = """
import fcntl, signal, subprocess, sys, time
place, commands = sys.argv[1], [line.split("\\t") for line in sys.argv[2:]]
log = open(place + "/log", "ab")
servers = [subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log) for line in commands if not time.sleep(0.1)]
with open(place + "/users", "a") as users:
    while True:
        time.sleep(0.3)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            pass
    for server in reversed(servers):
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
    import shutil
    shutil.rmtree(place)
"""


@contextmanager
def ganesha() -> Iterator[Path]:
    """The directory that NFS-Ganesha exports on 127.0.0.1 under the same path; all who run tests at the time share it."""
    place = Path(tempfile.gettempdir()) / ("diskwright-nfs-%s" % os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())))
    with _joined(place):
        yield place / "export"


@contextmanager
def _joined(place: Path) -> Iterator[None]:
    while True:
        place.mkdir(exist_ok=True)
        with suppress(FileNotFoundError), (place / "users").open("a") as users:
            fcntl.flock(users, fcntl.LOCK_SH)
            if not (place / "users").exists():
                continue  # the last of those before us is just leaving
            with (place / "start").open("a") as start:
                fcntl.flock(start, fcntl.LOCK_EX)
                if not (place / "export").exists():
                    _start_ganesha(place)
            yield
            return


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection((HOST, port), 1):
        return True
    return False


def _start_ganesha(place: Path) -> None:
    ports = {"nfs": free_port(), "mount": free_port()}
    (place / "recovery").mkdir(exist_ok=True)
    (place / "export").mkdir()
    (place / "ganesha.conf").write_text(GANESHA.format(place=place, **ports))
    commands = [[program("ganesha.nfsd"), "-F", "-L", str(place / "ganesha.log"), "-f", str(place / "ganesha.conf"), "-p", str(place / "pid")]]
    if not _listens(111):
        commands.insert(0, [program("rpcbind"), "-f"])
    with (place / "keeper.log").open("wb") as log:
        line = [sys.executable, "-c", KEEPER, str(place), *("\t".join(command) for command in commands)]
        subprocess.run([program("setsid"), "--fork", *line], stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=PATIENCE, check=True)
    end = time.monotonic() + PATIENCE
    while not (_listens(ports["mount"]) and _listens(ports["nfs"])):
        assert time.monotonic() < end, _tail(place / "ganesha.log")
        time.sleep(0.02)


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-3000:] if path.exists() else "no log"


class Stall:
    """A server of one port that accepts connections, and never answers."""

    def __init__(self) -> None:
        self._socket = socket.create_server((HOST, 0))
        self.port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Stall:
        return self

    def __exit__(self, *_rest: object) -> None:
        self._socket.close()


__all__ = ["IQN", "PASSWORD", "USER", "Stall", "Targets", "ganesha", "tgt"]
