# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A `diskwright serve` that is kept running: as a unit where systemd is, else as a process of its own with a record of it beside its pid."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from ._plan import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    State = Mapping[str, Any]

UNITS = "/etc/systemd/system"
UNIT = """\
# Made by the Ansible module diskwright.images.blockdev_graph.
[Unit]
Description=Diskwright serves the graph {name}
Documentation=file://{graph}
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart={command}
Restart=on-failure
TimeoutStopSec={seconds}

[Install]
WantedBy=multi-user.target

# what it serves
[X-Diskwright]
Digest={digest}
"""
STARTING = 60.0  # seconds until it must be ready
HURRIED = 10.0  # seconds that it has once it was told twice to end
STEP = 0.02


class Service:
    """The service `name`: `digest` tells what it serves from anything else, `command` starts it in the foreground."""

    def __init__(self, name: str, runtime: str, systemd: bool, seconds: int) -> None:
        self.name = name
        self.runtime = runtime
        self.systemd = systemd
        self.seconds = seconds
        self.unit = os.path.join(UNITS, "diskwright-%s.service" % name)
        self.pid_file = os.path.join(runtime, name + ".pid")
        self.record = os.path.join(runtime, name + ".serving")

    # -- what is ---------------------------------------------------------------------------------------------------

    def observe(self) -> dict[str, Any]:
        """Whether it runs, and the digest of what it serves, None where nobody knows."""
        if self.systemd:
            active = subprocess.run(["systemctl", "is-active", "--quiet", self._unit_name()], check=False).returncode == 0
            return {"running": active, "digest": _last_word(self.unit, "Digest="), "installed": os.path.exists(self.unit)}
        pid = self.pid()
        return {"running": pid is not None, "digest": _last_word(self.record, "digest=") if pid else None, "installed": pid is not None}

    def pid(self) -> Optional[int]:
        """The process, if it is still the one that was started."""
        started = _last_word(self.record, "started=")
        text = _last_word(self.pid_file, "")
        if text is None or not text.isdigit() or started is None or started_at(int(text)) != started:
            return None
        return int(text)

    def _unit_name(self) -> str:
        return os.path.basename(self.unit)

    # -- what is done ----------------------------------------------------------------------------------------------

    def start(self, command: list[str], graph: str, digest: str) -> None:
        """Start it, or let it begin anew where it runs. Raises Refusal with what it says if it does not become ready."""
        if self.systemd:
            self._start_unit(command, graph, digest)
            return
        if self.pid() is not None:
            self.stop()
        os.makedirs(self.runtime, mode=0o755, exist_ok=True)
        for path in (self.pid_file, self.record):
            _remove(path)
        self._run([*command, "--fork", "--pid-file", self.pid_file])
        text = _last_word(self.pid_file, "")
        if text is None:
            raise Refusal("%s has started, but there is no %s" % (self.name, self.pid_file))
        with open(self.record, "w", encoding="utf-8") as stream:
            stream.write("digest=%s\nstarted=%s\n" % (digest, started_at(int(text))))

    def _start_unit(self, command: list[str], graph: str, digest: str) -> None:
        words = " ".join('"%s"' % word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$") for word in command)
        with open(self.unit, "w", encoding="utf-8") as stream:
            stream.write(UNIT.format(name=self.name, graph=graph, command=words, digest=digest, seconds=self.seconds))
        self._run(["systemctl", "daemon-reload"])
        self._run(["systemctl", "enable", "--quiet", self._unit_name()])
        self._run(["systemctl", "restart", self._unit_name()])

    def stop(self) -> None:
        """Let it finish what its clients have asked for, and end; tell it again where that takes longer than it may. Raises Refusal."""
        if self.systemd:
            self._run(["systemctl", "disable", "--quiet", "--now", self._unit_name()])
            _remove(self.unit)
            self._run(["systemctl", "daemon-reload"])
            return
        pid = self.pid()
        if pid is not None:
            for seconds in (float(self.seconds), HURRIED):
                os.kill(pid, signal.SIGTERM)
                if self._ended(seconds):
                    break
            else:
                raise Refusal("the process %d that serves %s does not end" % (pid, self.name))
        for path in (self.pid_file, self.record):
            _remove(path)

    def _ended(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.pid() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(STEP)
        return True

    def _run(self, words: list[str]) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=STARTING, cwd="/", check=False
            )
        except subprocess.TimeoutExpired as exc:
            raise Refusal("%s is not ready after %d seconds" % (self.name, STARTING)) from exc
        if done.returncode:
            said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
            raise Refusal("%s: %s" % (self.name, said or "%s ends with %d" % (words[0], done.returncode)))


def has_systemd() -> bool:
    """Whether systemd runs this machine."""
    return os.path.isdir("/run/systemd/system")


def started_at(pid: int) -> Optional[str]:
    """When a process was started, in clock ticks since the boot; None if there is none, or it has ended and nobody has asked how."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _last_word(path: str, key: str) -> Optional[str]:
    """What follows `key` in a line of a small file; None where there is no such line or no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            for line in stream.read(1 << 16).splitlines():
                if line.startswith(key):
                    return line[len(key) :].strip()
    except OSError:
        pass
    return None


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
