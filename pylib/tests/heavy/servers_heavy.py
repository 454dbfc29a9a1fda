# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Ceph, in the memory of one monitor and one OSD, and GlusterFS with one brick, on loopback. Both need root."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from servers import HOST, free_port, program

PATIENCE = 60.0  # seconds that a command, or the start of a server, may take

CEPH = """
[global]
fsid = {fsid}
mon host = [v1:{host}:{port}]
keyring = {place}/admin.keyring
run dir = {place}
admin socket = {place}/$cluster-$name.asok
log file = {place}/$name.log
mon cluster log file = {place}/cluster.log
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data avail crit = 1
mon data avail warn = 1
ms bind msgr2 = false
auth allow insecure global id reclaim = false
[mon]
mon data = {place}/mon
public addr = {host}:{port}
keyring = {place}/mon.keyring
[osd]
public addr = {host}
cluster addr = {host}
osd objectstore = memstore
memstore device bytes = 1073741824
osd data = {place}/osd
keyring = {place}/osd.keyring
"""


class Ceph:
    """A running cluster with the pool "rbd"; `conf` is its configuration file."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.conf = place / "ceph.conf"

    def run(self, *words: str) -> str:
        """What a command of Ceph's prints."""
        line = [program(words[0]), "-c", str(self.conf), *words[1:]]
        done = subprocess.run(line, cwd=self.place, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tool(self, *words: str) -> None:
        """Run a program that knows no configuration."""
        subprocess.run([program(words[0]), *words[1:]], cwd=self.place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=PATIENCE, check=True)

    def key(self) -> str:
        """The key of client.admin, in base64."""
        line = [program("ceph-authtool"), "-p", "-n", "client.admin", str(self.place / "admin.keyring")]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        return done.stdout.strip()


@contextmanager
def server(line: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs until the block ends."""
    with log.open("wb") as stream:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def ceph(place: Path) -> Iterator[Ceph]:
    """A cluster with its files in `place`."""
    fsid, osd, port = str(uuid.uuid4()), str(uuid.uuid4()), free_port()
    cluster = Ceph(place)
    cluster.conf.write_text(CEPH.format(place=place, fsid=fsid, host=HOST, port=port))
    everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
    cluster.tool("ceph-authtool", "--create-keyring", "mon.keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    cluster.tool("ceph-authtool", "--create-keyring", "admin.keyring", "--gen-key", "-n", "client.admin", *everything)
    cluster.tool("ceph-authtool", "--create-keyring", "osd.keyring", "--gen-key", "-n", "osd.0", "--cap", "mon", "allow profile osd", "--cap", "osd", "allow *")
    for name in ("admin", "osd"):
        cluster.tool("ceph-authtool", "mon.keyring", "--import-keyring", name + ".keyring")
    cluster.tool("monmaptool", "--create", "--addv", "a", "[v1:%s:%d]" % (HOST, port), "--fsid", fsid, "monmap")
    for name in ("mon", "osd"):
        (place / name).mkdir()
    cluster.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "mon.keyring")
    with ExitStack() as stack:
        stack.enter_context(server([program("ceph-mon"), "-c", str(cluster.conf), "-i", "a", "-f"], place / "mon.out"))
        cluster.run("ceph", "osd", "new", osd)
        cluster.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        stack.enter_context(server([program("ceph-osd"), "-c", str(cluster.conf), "-i", "0", "-f"], place / "osd.out"))
        cluster.run("ceph", "osd", "pool", "create", "rbd", "8")
        cluster.run("ceph", "osd", "pool", "application", "enable", "rbd", "rbd")
        yield cluster


GLUSTERD = """
volume management
    type mgmt/glusterd
    option working-directory {place}/work
    option run-directory {place}/run
    option glusterd-sockfile {place}/socket
    option transport-type socket
    option transport.socket.listen-port 24007
    option event-threads 1
    option ping-timeout 0
end-volume
"""


@contextmanager
def gluster(place: Path) -> Iterator[str]:
    """GlusterFS with the volume "disks"; the beginning of its files' names, gluster://HOST/disks/.

    glusterd has its port for itself, since its bricks look for it there; and takes no brick at a loopback address, but one at the name of
    the machine.
    """
    for name in ("work", "run", "brick"):
        (place / name).mkdir()
    (place / "glusterd.vol").write_text(GLUSTERD.format(place=place))

    def run(*words: str) -> None:
        line = [program("gluster"), "--mode=script", "--glusterd-sock=%s/socket" % place, *words]
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    line = [program("glusterd"), "-N", "-f", str(place / "glusterd.vol"), "-p", str(place / "pid"), "-l", str(place / "log")]
    with server(line, place / "out") as process:
        end = time.monotonic() + PATIENCE
        while not (place / "socket").exists():
            assert process.poll() is None and time.monotonic() < end, (place / "log").read_text()[-2000:]
            time.sleep(0.05)
        time.sleep(1)
        run("volume", "create", "disks", "%s:%s/brick" % (socket.gethostname(), place), "force")
        run("volume", "set", "disks", "server.allow-insecure", "on")
        run("volume", "start", "disks")
        try:
            yield "gluster://%s/disks/" % HOST
        finally:
            with suppress(AssertionError, subprocess.TimeoutExpired):
                run("volume", "stop", "disks", "force")
            for path in (place / "run").glob("vols/disks/*.pid"):  # of a brick that was not told to stop
                with suppress(OSError, ValueError):
                    os.kill(int(path.read_text()), signal.SIGTERM)


__all__ = ["Ceph", "ceph", "gluster"]
