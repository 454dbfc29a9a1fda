# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Every command on every hostile image: a documented exit code, a message, and little time and memory; what qemu-img says, where it says something."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import diskwright
from effort import BRIEF
from hostile_images import ATTACKS

SECONDS = 15  # of the processor, for one command; enough on any machine, and no hang
MEMORY = 64 << 20  # bytes that a command may need beyond what it needs for a harmless image of the same kind
ADDRESS_SPACE = 6 << 30

# A process that has the program loaded and forks for each line [directory, arguments]: starting Python anew would take most of
# the time. Answers with the exit code (or minus the signal) and the peak of the memory.
SERVER = """
import json, os, resource, sys
sys.path[:] = %r
import diskwright.cli
from diskwright.commands import check, compare, convert, create, dd, info, map, measure, resize
for line in sys.stdin:
    directory, args = json.loads(line)
    child = os.fork()
    if not child:
        status = 70
        try:
            os.chdir(directory)
            for number, name in enumerate((os.devnull, ".out", ".err")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
            resource.setrlimit(resource.RLIMIT_CPU, (%d, %d))
            resource.setrlimit(resource.RLIMIT_AS, (%d, %d))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.stdin = open(0)
            status = diskwright.cli.main(["/usr/bin/qemu-img", *args])
            sys.stdout.flush()
            with open("/proc/self/status") as own, open(".peak", "w") as peak:
                peak.write([line for line in own if line.startswith("VmHWM")][0])
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    _child, status = os.waitpid(child, 0)
    print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
""" % ([str(Path(diskwright.__file__).parents[1]), *filter(None, sys.path)], SECONDS, SECONDS + 5, ADDRESS_SPACE, ADDRESS_SPACE)

COMMANDS = {
    "info": "info image",
    "info-json": "info --output=json image",
    "info-chain": "info --backing-chain image",
    "check": "check -f qcow2 image",
    "check-json": "check --output=json image",
    "repair": "check -r all copy",
    "map": "map image",
    "map-json": "map --output=json image",
    "measure": "measure -O qcow2 image",
    "compare": "compare image image",
    "convert": "convert -O raw image out.raw",
    "convert-qcow2": "convert -O qcow2 image out.qcow2",
    "resize": "resize copy +1M",
    "dd": "dd bs=64k count=4 if=image of=out.dd",
    "create": "create -q -f qcow2 -b image -F qcow2 out.overlay",
}
EXIT_CODES = {"check": (0, 1, 2, 3, 63), "compare": (0, 1, 2, 3, 4)}
ORACLE = ("info", "info-json", "info-chain", "check", "map-json", "convert")

WRITES = ("repair", "resize")

# Attacks on which qemu-img runs for minutes, takes gigabytes or recurses until it is killed.
HANGS = ("size-", "raw-sparse", "extensions-many", "backing-itself", "backing-loop", "backing-fifo")
# Attacks with another outcome, and why.
DIFFERENT = {
    "header-version-1": "there is no driver for the first qcow yet, so it is raw",
    "backing-chain-too-deep": "chains have a limit",
    "luks-material-far-away": "qemu-img's sum of sectors wraps around",
}
# What comes on top of MEMORY: tables within their limits of 32 MiB (L1) and 64 MiB (snapshots), once for each time that the image is open.
MORE_MEMORY = {("header-l1-at-limit", "compare"): 32 << 20, ("extensions-many", "compare"): 32 << 20, ("snapshot-table-oversize", "repair"): 128 << 20}
MORE_MEMORY.update({("snapshot-table-oversize", command): 64 << 20 for command in COMMANDS if command != "repair"})


class Result(NamedTuple):
    code: int
    out: bytes
    err: bytes
    memory: int


class Server:
    """Runs diskwright under limits."""

    def __init__(self) -> None:
        line = [sys.executable, "-I", "-S", "-c", SERVER]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, directory: Path, *args: str) -> Result:
        """Run one command; of what it prints only the first megabyte is kept."""
        peak = directory / ".peak"
        peak.unlink(missing_ok=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(directory), args]) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        parts = []
        for name in (".out", ".err"):
            with open(directory / name, "rb") as file:
                parts.append(file.read(1 << 20))
        return Result(code, parts[0], parts[1], int(peak.read_text().split()[1]) << 10 if peak.exists() else 0)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    started = Server()
    with started.process:
        yield started
        assert started.process.stdin is not None
        started.process.stdin.close()


def theirs(directory: Path, *args: str) -> tuple[int, bytes, bytes]:
    """The same of qemu-img; code -1 where it takes too long or is killed."""
    line = ["prlimit", "--cpu=5", "--as=%d" % ADDRESS_SPACE, "--core=0", "qemu-img", *args]
    try:
        done = subprocess.run(line, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return -1, b"", b""
    return min(done.returncode, 1000) if done.returncode >= 0 else -1, done.stdout, done.stderr


@pytest.fixture(scope="session")
def harmless(tmp_path_factory: pytest.TempPathFactory, server: Server) -> dict[str, int]:
    """The memory that each command needs for an image that means well."""
    directory = tmp_path_factory.mktemp("harmless")
    for name in ("image", "copy"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", directory / name, "64M"], check=True)
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 20M", directory / name], check=True, stdout=subprocess.DEVNULL)
    found = {}
    for name, line in COMMANDS.items():
        result = server.run(directory, *line.split())
        assert result.code == 0 and result.memory, (name, result)
        found[name] = result.memory
    return found


def digest(path: Path) -> str:
    """What tells whether a file was changed; holes are skipped."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        position = 0
        while position < end:
            try:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            stop = os.lseek(file.fileno(), position, os.SEEK_HOLE)
            while position < stop:
                data = os.pread(file.fileno(), min(1 << 20, stop - position), position)
                found.update(b"%d " % position + data)
                position += len(data)
    return found.hexdigest() + " %d" % end


def judge(name: str, result: Result, memory: int) -> list[str]:
    """What is wrong with how a command ended."""
    found = []
    verb = COMMANDS[name].split(" ", 1)[0]
    if result.code not in EXIT_CODES.get(verb, (0, 1)):
        found.append("exit code %d%s" % (result.code, " (too much time)" if result.code in (-signal.SIGXCPU, -signal.SIGKILL) else ""))
    if b"Traceback" in result.err or b"Exception ignored" in result.err:
        found.append("a traceback")
    if result.code == 1 and verb not in ("check", "compare") and b"\nqemu-img: " not in b"\n" + result.err:
        found.append("no message")
    if result.memory > memory:
        found.append("%d MiB of memory" % (result.memory >> 20))
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_image(name: str, tmp_path: Path, harmless: dict[str, int], server: Server) -> None:
    image = tmp_path / "image"
    ATTACKS[name](image)
    before = digest(image)
    findings = []
    for number, (command, line) in enumerate(COMMANDS.items(), len(name)):
        if BRIEF and number % 3:
            continue
        args = line.split()
        if command in WRITES:
            subprocess.run(["cp", "--sparse=always", "image", "copy"], cwd=tmp_path, check=True)
        result = server.run(tmp_path, *args)
        memory = harmless[command] + MEMORY + MORE_MEMORY.get((name, command), 0)
        findings += ["%s: %s: %s" % (command, text, result) for text in judge(command, result, memory)]
        if digest(image) != before:
            findings.append("%s changed its source" % command)
            ATTACKS[name](image)
        if command in ORACLE and name not in DIFFERENT and not name.startswith(HANGS):
            for out in tmp_path.glob("out.*"):
                out.unlink()
            code, out_text, err = theirs(tmp_path, *args)
            if code == -1:
                continue
            if code != result.code or command == "info" and err != result.err:
                findings.append("%s: %s %s, but qemu-img %s %s" % (command, result.code, text_of(result.err), code, text_of(err)))
            elif command.startswith("info") and out_text != result.out:
                findings.append("%s prints %s, but qemu-img %s" % (command, text_of(result.out), text_of(out_text)))
    assert not findings, "\n".join(findings)


def text_of(data: bytes) -> str:
    return ascii(data[:1000].decode("utf-8", "surrogateescape"))
