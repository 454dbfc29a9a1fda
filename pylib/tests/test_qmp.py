# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""QMP: the same script of commands is given to qemu-storage-daemon and to us; clients that behave, and clients that do not."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional, Union

import pytest
from qemu.qmp import ConnectError, EventListener, QMPClient
from qemu.qmp.error import QMPError

from diskwright.errors import OptionError
from diskwright.graph import Graph
from diskwright.jobs.live import Live
from diskwright.qmp import codec
from diskwright.qmp.monitor import MAX_CLIENTS, Monitor, parse_address

PATIENCE = 20  # seconds
SIZE = 1 << 20
CLUSTER = 64 << 10

Step = Union[str, bytes, tuple[str, dict[str, Any]], tuple[str, str, str]]


def qemu_img(*args: object) -> None:
    subprocess.run(["qemu-img", *map(str, args)], check=True, capture_output=True)


class Client:
    """A QMP client that does what it is told, and notes what it hears."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.01)
        self._data = b""
        self.events: list[dict[str, Any]] = []
        self.greeting = self.message()

    def message(self) -> dict[str, Any]:
        """The next one; {} at the end."""
        end = time.monotonic() + PATIENCE
        while b"\n" not in self._data:
            ready = select.select([self.socket], [], [], max(0, end - time.monotonic()))[0]
            assert ready, "no answer"
            data = self.socket.recv(1 << 16)
            if not data:
                return {}
            self._data += data
        line, self._data = self._data.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def raw(self, data: bytes) -> dict[str, Any]:
        self.socket.sendall(data)
        while True:
            found = self.message()
            if "event" not in found:
                return found
            self.events.append(found)

    def command(self, name: str, **arguments: Any) -> dict[str, Any]:
        return self.raw(json.dumps({"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}).encode())

    def wait(self, job: str, status: str) -> None:
        """Until the job came to the state, since it was created the last time."""
        while True:
            seen = [event["data"] for event in self.events if event["event"] == "JOB_STATUS_CHANGE" and event["data"]["id"] == job]
            begun = max((place for place, one in enumerate(seen) if one["status"] == "created"), default=0)
            if any(one["status"] == status for one in seen[begun:]):
                return
            found = self.message()
            assert "event" in found, found
            self.events.append(found)

    def run(self, script: list[Step]) -> list[Any]:
        """The answers to a script."""
        self.command("qmp_capabilities")
        answers: list[Any] = []
        for step in script:
            if isinstance(step, bytes):
                answers.append(self.raw(step))
            elif isinstance(step, str):
                answers.append(self.command(step))
            elif step[0] == "wait":
                self.wait(*step[1:])  # type: ignore[arg-type]
            else:
                answers.append(self.raw(json.dumps({"execute": step[0], "arguments": step[1]}).encode()))
        return answers

    def close(self) -> None:
        self.socket.close()


def of_qemu(directory: Path, script: list[Step]) -> tuple[list[Any], list[dict[str, Any]]]:
    path = directory / "qemu.sock"
    command = ["qemu-storage-daemon", "--chardev", "socket,path=%s,server=on,wait=off,id=c" % path, "--monitor", "chardev=c"]
    with subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL) as daemon:
        try:
            client = Client(path)
            answers = client.run(script)
            client.close()
        finally:
            daemon.terminate()
    return answers, client.events


def of_ours(directory: Path, script: list[Step]) -> tuple[list[Any], list[dict[str, Any]]]:
    graph = Graph()
    live = Live(graph)
    monitor = Monitor(live)
    monitor.listen({"type": "unix", "path": str(directory / "ours.sock")})
    monitor.start()
    here = os.getcwd()
    os.chdir(directory)
    try:
        client = Client(directory / "ours.sock")
        answers = client.run(script)
        client.close()
    finally:
        monitor.stop()
        live.close()
        graph.close()
        os.chdir(here)
    return answers, client.events


def simplified(answer: Any) -> Any:
    """What of an answer must be the same."""
    found = answer.get("return")
    if isinstance(found, dict) and "qemu" in found:
        del found["package"]
    if isinstance(found, dict) and "date-sec" in found:
        return sorted(found)
    if isinstance(found, list) and found and "drv" in found[0]:
        shown = []
        for node in found:
            if not node["node-name"].startswith("#"):
                bitmaps = sorted((bitmap for bitmap in node.get("dirty-bitmaps", ()) if "name" in bitmap), key=lambda bitmap: bitmap["name"])
                shown.append((node["node-name"], node["drv"], bitmaps, node["image"]["virtual-size"], node.get("backing_file")))
        return shown
    return answer


def by_job(events: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What was told of each job, in order."""
    found: dict[str, list[Any]] = {}
    for event in events:
        data = dict(event["data"])
        name = data.pop("id", None) or data.pop("device", None)
        if data.get("speed"):
            data.pop("offset")
        found.setdefault(name, []).append((event["event"], data))
    return found


def same(tmp_path: Path, images: dict[str, tuple[str, ...]], script: list[Step]) -> None:
    """Both give the same answers and tell the same of each job."""
    results = []
    for run in (of_qemu, of_ours):
        directory = tmp_path / run.__name__
        directory.mkdir()
        for name, options in images.items():
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, name, str(SIZE)], cwd=directory, check=True)
        results.append(run(directory, script))
    for step, theirs, ours in zip([step for step in script if step[0] != "wait"], results[0][0], results[1][0]):
        assert simplified(ours) == simplified(theirs), step
    assert by_job(results[1][1]) == by_job(results[0][1])


def node(name: str, **options: Any) -> Step:
    return ("blockdev-add", {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "node-name": name + "f", "filename": name}, **options})


def mirror(**options: Any) -> Step:
    return ("blockdev-mirror", {"job-id": "m0", "device": "a", "target": "t1", "sync": "full", **options})


def backup(**options: Any) -> Step:
    return ("blockdev-backup", {"job-id": "b0", "device": "a", "target": "t1", "sync": "full", **options})


def bitmap(verb: str, node: str = "a", **options: Any) -> Step:
    return ("block-dirty-bitmap-" + verb, {"node": node, **options})


def transaction(*actions: tuple[str, dict[str, Any]], **options: Any) -> Step:
    return ("transaction", {"actions": [{"type": kind, "data": data} for kind, data in actions], **options})


WIRE: list[Step] = [
    "query-version",
    "nonsense",
    ("query-version", {"a": 1}),
    b'{"execute": "query-version", "id": 5}',
    b'{"execute": "query-version", "id": {"a": [1]}, "arguments": []}',
    b"garbage\n",
    b"{}\n",
    b"[]\n",
    b'{"execute": 3}\n',
    b'{"execute": "query-version", "foo": 1}\n',
    b"{'execute': 'query-version'}\n",
    b'{"exec-oob": "query-version"}\n',
    b'"abc"\n',
    b'{"a":}\n',
    b"\xff\n",
    ("qmp_capabilities", {}),
    ("human-monitor-command", {"command-line": "info"}),
    "query-jobs",
    "query-block",
    "query-block-jobs",
    "query-named-block-nodes",
    "query-blockstats",
    "query-block-exports",
]

NODES: list[Step] = [
    ("blockdev-add", {"driver": "null-co"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "n0", "size": 65536}),
    ("blockdev-add", {"driver": "null-co", "node-name": "n0"}),
    ("blockdev-add", {"driver": "nope", "node-name": "n1"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "1n"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "n2", "xx": 1}),
    ("blockdev-add", {"driver": "null-co", "node-name": "n2", "size": "1M"}),
    ("blockdev-add", {"driver": "null-co", "node-name": 7}),
    ("blockdev-add", {}),
    ("blockdev-add", {"driver": "raw", "node-name": "r0", "file": "n9"}),
    ("blockdev-add", {"driver": "raw", "node-name": "r0", "file": "n0"}),
    ("blockdev-del", {"node-name": "n0"}),
    ("blockdev-del", {"node-name": "zz"}),
    ("blockdev-del", {"nodename": "zz"}),
    "query-named-block-nodes",
    ("query-blockstats", {"query-nodes": True}),
    ("blockdev-del", {"node-name": "r0"}),
    ("blockdev-del", {"node-name": "n0"}),
    node("t1"),
    ("block_resize", {"node-name": "t1", "size": 2 * SIZE}),
    ("block_resize", {"node-name": "t1", "size": -1}),
    ("block_resize", {"size": 1}),
    ("block_resize", {"node-name": "t1", "size": 1000}),
    ("block-set-write-threshold", {"node-name": "t1f", "write-threshold": 1000}),
    ("block-set-write-threshold", {"node-name": "zz", "write-threshold": 1000}),
    ("object-add", {"qom-type": "secret", "id": "se", "data": "abc"}),
    ("object-add", {"qom-type": "secret", "id": "se", "data": "abc"}),
    ("object-add", {"qom-type": "nope", "id": "se"}),
    ("object-add", {"qom-type": "secret", "id": "s2"}),
    ("object-del", {"id": "se"}),
    ("object-del", {"id": "se"}),
    ("object-add", {"qom-type": "throttle-group", "id": "tg", "limits": {"iops-total": 10}}),
    ("blockdev-add", {"driver": "throttle", "node-name": "th", "throttle-group": "tg", "file": {"driver": "null-co"}}),
    ("object-del", {"id": "tg"}),
    ("blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": "t1", "file": "t1f", "lazy-refcounts": True}]}),
    ("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "t1", "file": "t1f"}]}),
    ("blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": "zz", "file": "t1f"}]}),
    ("blockdev-reopen", {"options": [{"driver": "qcow2", "file": "t1f"}]}),
    ("blockdev-reopen", {"options": [{"driver": "file", "node-name": "t1f", "filename": "other"}]}),
    ("blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": "t1", "file": "nofile"}]}),
    ("x-blockdev-change", {"parent": "t1", "node": "th"}),
    ("x-blockdev-change", {"parent": "t1"}),
    ("x-blockdev-change", {"parent": "zz", "node": "th"}),
    *[("blockdev-add", {"driver": "null-co", "node-name": "c%d" % number}) for number in range(4)],
    ("blockdev-add", {"driver": "quorum", "node-name": "q", "children": ["c0", "c1", "c2"], "vote-threshold": 2}),
    ("x-blockdev-change", {"parent": "q", "node": "c3"}),
    ("x-blockdev-change", {"parent": "q", "node": "c3"}),
    ("x-blockdev-change", {"parent": "q", "child": "children.0"}),
    ("x-blockdev-change", {"parent": "q", "child": "children.7"}),
    ("x-blockdev-change", {"parent": "q", "child": "children.1"}),
    ("x-blockdev-change", {"parent": "q", "child": "children.2"}),
    "query-named-block-nodes",
]

JOBS: list[Step] = [
    node("a"),
    node("t1"),
    node("t2"),
    mirror(sync="bitmap"),
    mirror(granularity=100),
    mirror(granularity=513),
    mirror(**{"buf-size": -1}),
    mirror(target="a"),
    mirror(replaces="xx"),
    mirror(device="xx"),
    mirror(target="xx"),
    mirror(**{"on-source-error": "zz"}),
    ("blockdev-mirror", {"device": "a", "target": "t1", "sync": "full"}),
    mirror(**{"filter-node-name": "mf", "copy-mode": "write-blocking", "auto-finalize": False, "auto-dismiss": False}),
    ("wait", "m0", "ready"),
    "query-jobs",
    "query-block-jobs",
    ("block-job-change", {"id": "m0", "type": "mirror", "copy-mode": "background"}),
    ("block-job-change", {"id": "m0", "type": "mirror", "copy-mode": "write-blocking"}),
    ("blockdev-del", {"node-name": "t1"}),
    ("blockdev-del", {"node-name": "a"}),
    mirror(target="t2", **{"job-id": "m1"}),
    ("job-pause", {"id": "m0"}),
    ("job-pause", {"id": "m0"}),
    ("block-job-pause", {"device": "m0"}),
    "query-jobs",
    ("job-resume", {"id": "m0"}),
    ("job-resume", {"id": "m0"}),
    ("block-job-set-speed", {"device": "m0", "speed": -1}),
    ("block-job-complete", {"device": "m0"}),
    ("wait", "m0", "pending"),
    ("job-dismiss", {"id": "m0"}),
    ("job-cancel", {"id": "m0"}),
    ("wait", "m0", "concluded"),
    "query-jobs",
    ("job-dismiss", {"id": "m0"}),
    mirror(),
    ("wait", "m0", "ready"),
    ("block-job-cancel", {"device": "m0"}),
    ("wait", "m0", "null"),
    mirror(),
    ("wait", "m0", "ready"),
    ("job-cancel", {"id": "m0"}),
    ("wait", "m0", "null"),
    backup(sync="incremental"),
    backup(sync="bitmap", bitmap="x"),
    backup(sync="incremental", bitmap="x", **{"bitmap-mode": "always"}),
    backup(target="a"),
    backup(**{"bitmap-mode": "always"}),
    backup(**{"auto-finalize": False}),
    ("wait", "b0", "pending"),
    "query-jobs",
    "query-block-jobs",
    ("block-job-finalize", {"id": "b0"}),
    ("wait", "b0", "null"),
    backup(sync="none"),
    ("block-job-cancel", {"device": "b0"}),
    ("wait", "b0", "null"),
    ("job-pause", {"id": "q"}),
    ("block-job-pause", {"device": "q"}),
    ("block-job-dismiss", {"id": "q"}),
    ("blockdev-create", {"job-id": "c0", "options": {"driver": "file", "filename": "new", "size": 0}}),
    ("wait", "c0", "concluded"),
    "query-jobs",
    ("job-cancel", {"id": "c0"}),
    ("job-resume", {"id": "c0"}),
    ("job-finalize", {"id": "c0"}),
    ("block-job-cancel", {"device": "c0"}),
    ("blockdev-create", {"job-id": "c0", "options": {"driver": "file", "filename": "new", "size": 0}}),
    ("job-dismiss", {"id": "c0"}),
    ("blockdev-create", {"job-id": "c0", "options": {"driver": "qcow2", "file": "nofile", "size": SIZE}}),
    ("wait", "c0", "concluded"),
    "query-jobs",
    ("job-dismiss", {"id": "c0"}),
    ("blockdev-create", {"job-id": "c0", "options": {"driver": "qcow2"}}),
    ("blockdev-create", {"job-id": "c0", "options": {"driver": "nope"}}),
    ("blockdev-create", {"job-id": "1c", "options": {"driver": "file", "filename": "x", "size": 0}}),
    ("blockdev-create", {"job-id": "c0", "options": {"driver": "null-co"}}),
]

CHAIN: list[Step] = [
    node("base"),
    node("mid", backing="base"),
    node("top", backing="mid"),
    node("t1"),
    ("block-commit", {"device": "top"}),
    ("block-commit", {"job-id": "k1", "device": "top", "base-node": "t1"}),
    ("block-commit", {"job-id": "k1", "device": "base"}),
    ("block-stream", {"job-id": "s0", "device": "top", "base": "x"}),
    ("block-stream", {"job-id": "s0", "device": "nope"}),
    ("block-commit", {"job-id": "k0", "device": "top", "top-node": "mid", "base-node": "base", "auto-dismiss": False, "auto-finalize": False}),
    ("wait", "k0", "pending"),
    "query-jobs",
    "query-block-jobs",
    ("job-cancel", {"id": "k0"}),
    ("wait", "k0", "concluded"),
    "query-jobs",
    ("job-dismiss", {"id": "k0"}),
    ("block-stream", {"job-id": "s0", "device": "mid"}),
    ("wait", "s0", "null"),
    ("block-commit", {"job-id": "k1", "device": "top"}),
    ("wait", "k1", "ready"),
    ("job-complete", {"id": "k1"}),
    ("wait", "k1", "null"),
    "query-named-block-nodes",
    ("blockdev-del", {"node-name": "mid"}),
]

BITMAPS: list[Step] = [
    node("a"),
    node("t1"),
    bitmap("add", name="b0"),
    bitmap("add", name="b0"),
    bitmap("add", name="", granularity=7),
    bitmap("add", name="b1", granularity=7),
    bitmap("add", node="x", name="b1"),
    bitmap("add", name="b1", persistent=True, disabled=True, granularity=4096),
    bitmap("remove", name="zz"),
    bitmap("clear", name="zz"),
    bitmap("disable", name="b0"),
    bitmap("disable", name="b0"),
    bitmap("enable", name="b0"),
    bitmap("merge", target="b1", bitmaps=["b0", {"node": "a", "name": "b0"}]),
    bitmap("merge", target="b1", bitmaps=["zz"]),
    bitmap("merge", target="b1", bitmaps=[{"node": "x", "name": "b0"}]),
    ("x-debug-block-dirty-bitmap-sha256", {"node": "a", "name": "b0"}),
    ("x-debug-block-dirty-bitmap-sha256", {"node": "a", "name": "b1"}),
    backup(sync="incremental", bitmap="b0"),
    ("wait", "b0", "null"),
    backup(sync="bitmap", bitmap="b0", **{"bitmap-mode": "never", "auto-finalize": False}),
    ("wait", "b0", "pending"),
    "query-block-jobs",
    bitmap("remove", name="b0"),
    backup(sync="bitmap", bitmap="b0", target="t1", **{"bitmap-mode": "never", "job-id": "b1"}),
    ("job-finalize", {"id": "b0"}),
    ("wait", "b0", "null"),
    backup(bitmap="b0"),
    backup(sync="none", bitmap="b0", **{"bitmap-mode": "always"}),
    "query-named-block-nodes",
    transaction(("abort", {})),
    transaction(("abort", {"x": 1})),
    transaction(("nope", {})),
    transaction(("block-dirty-bitmap-add", {"node": "a", "name": "x0"}), ("abort", {})),
    transaction(("block-dirty-bitmap-add", {"node": "a", "name": "x0"}), ("block-dirty-bitmap-add", {"node": "a", "name": "x1"})),
    transaction(("block-dirty-bitmap-remove", {"node": "a", "name": "x1"}), ("block-dirty-bitmap-remove", {"node": "a", "name": "zz"})),
    transaction(),
    ("transaction", {}),
    transaction(properties={"completion-mode": "x"}),
    transaction(
        ("blockdev-backup", {"job-id": "g0", "device": "a", "target": "t1", "sync": "full"}),
        ("blockdev-backup", {"job-id": "g1", "device": "t1", "target": "a", "sync": "full"}),
        properties={"completion-mode": "grouped"},
    ),
]

SNAPSHOTS: list[Step] = [
    node("a"),
    node("s", backing=None),
    node("t1"),
    ("blockdev-snapshot-internal-sync", {"device": "t1", "name": "i1"}),
    ("blockdev-snapshot-internal-sync", {"device": "t1", "name": "i1"}),
    ("blockdev-snapshot-internal-sync", {"device": "t1", "name": ""}),
    ("blockdev-snapshot-internal-sync", {"device": "zz", "name": "i1"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "t1", "name": "i2"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "t1", "name": "i1"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "t1"}),
    ("block-export-add", {"type": "nbd", "id": "e0", "node-name": "a"}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}),
    ("block-export-add", {"type": "nbd", "id": "e0", "node-name": "a", "writable": True}),
    ("block-export-add", {"type": "nbd", "id": "e0", "node-name": "a"}),
    ("block-export-add", {"type": "nbd", "id": "e1", "node-name": "a"}),
    ("block-export-add", {"type": "nbd", "id": "e1", "node-name": "zz", "name": "q"}),
    ("block-export-add", {"type": "nbd", "id": "1e", "node-name": "a", "name": "q"}),
    ("block-export-add", {"type": "nbd", "id": "e2", "node-name": "a", "name": "q", "bitmaps": ["zz"]}),
    ("block-export-add", {"type": "vv", "id": "e2", "node-name": "a"}),
    "query-block-exports",
    ("nbd-server-add", {"device": "zz"}),
    ("nbd-server-remove", {"name": "zz"}),
    ("block-export-del", {"id": "zz"}),
    ("blockdev-del", {"node-name": "a"}),
    ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-file": "ss", "snapshot-node-name": "ss"}),
    "query-block-exports",
    ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-file": "s2", "snapshot-node-name": "s2"}),
    ("blockdev-snapshot-sync", {"node-name": "ss", "snapshot-file": "s2", "format": "nope", "snapshot-node-name": "s3"}),
    ("blockdev-snapshot-sync", {"node-name": "ss", "snapshot-file": "/nope/s2", "snapshot-node-name": "s3"}),
    ("blockdev-snapshot-sync", {"node-name": "ss", "snapshot-file": "s3", "mode": "existing", "snapshot-node-name": "s3"}),
    ("blockdev-snapshot-sync", {"node-name": "ss", "snapshot-file": "s3", "snapshot-node-name": "t1"}),
    ("blockdev-snapshot-sync", {"node-name": "ss", "snapshot-file": "s3"}),
    ("blockdev-snapshot-sync", {"device": "zz", "snapshot-file": "s3"}),
    ("change-backing-file", {"device": "ss", "image-node-name": "ss", "backing-file": "xyz"}),
    ("change-backing-file", {"device": "t1", "image-node-name": "t1", "backing-file": "xyz"}),
    ("blockdev-snapshot", {"node": "ss", "overlay": "s"}),
    ("blockdev-snapshot", {"node": "ss", "overlay": "t1"}),
    ("blockdev-snapshot", {"node": "x", "overlay": "s"}),
    "query-block-exports",
    transaction(("blockdev-snapshot", {"node": "s", "overlay": "t1"}), ("abort", {})),
    "query-block-exports",
    ("block-export-del", {"id": "e0"}),
    "nbd-server-stop",
    "nbd-server-stop",
    "query-block-exports",
]

DRIVES: list[Step] = [
    node("a"),
    *[
        step
        for options in ({}, {"sync": "top"}, {"mode": "existing"})
        for step in (("drive-backup", {"job-id": "b", "device": "a", "target": "d", "sync": "full", **options}), ("wait", "b", "null"))
    ],
    ("drive-backup", {"job-id": "b", "device": "a", "target": "e", "sync": "none", "format": "raw"}),
    ("drive-backup", {"job-id": "b", "device": "a", "target": "nope", "sync": "full", "mode": "existing"}),
    ("drive-backup", {"job-id": "b", "device": "a", "target": "d", "sync": "full", "format": "nope"}),
    ("drive-backup", {"job-id": "b", "device": "zz", "target": "d", "sync": "full"}),
    ("drive-backup", {"job-id": "b", "device": "a", "target": "/nope/x", "sync": "full"}),
    transaction(("drive-backup", {"job-id": "b", "device": "a", "target": "d", "sync": "full", "mode": "existing"})),
    ("wait", "b", "null"),
    ("drive-mirror", {"job-id": "m", "device": "a", "target": "m", "sync": "full"}),
    ("wait", "m", "ready"),
    ("job-complete", {"id": "m"}),
    ("wait", "m", "null"),
    ("drive-mirror", {"job-id": "m", "device": "a", "target": "nope", "sync": "full", "mode": "existing"}),
    "query-named-block-nodes",
]

STREAM = {"job-id": "s", "device": "a"}
REFUSALS: list[Step] = [
    node("a"),
    node("b"),
    ("blockdev-add", {"driver": "raw", "node-name": "r", "file": {"driver": "null-co", "size": SIZE}}),
    node("v2"),
    node("ro", **{"read-only": True}),
    bitmap("add", node="r", name="x", persistent=True),
    bitmap("add", node="v2", name="x", persistent=True),
    bitmap("add", node="ro", name="y"),
    bitmap("add", name="p", persistent=True),
    bitmap("add", name="n" * 1024),
    bitmap("add", name="n" * 1024, persistent=True),
    bitmap("add", name="big", granularity=1 << 32),
    bitmap("add", name="zero", granularity=0),
    bitmap("remove", name="p"),
    bitmap("add", name="p", persistent=True),
    bitmap("add", name="p2", persistent=True, granularity=512),
    ("block_resize", {"node-name": "a", "size": 2 * SIZE}),
    "query-named-block-nodes",
    bitmap("merge", target="p", bitmaps=["p2"]),
    bitmap("merge", target="p"),
    bitmap("merge", target="zz", bitmaps=["p"]),
    ("blockdev-del", {"node-name": "a"}),
    node("a"),
    "query-named-block-nodes",
    ("block-stream", {**STREAM, "base": "x", "base-node": "y"}),
    ("block-stream", {**STREAM, "base-node": "r"}),
    ("block-stream", {**STREAM, "bottom": "r"}),
    ("block-stream", {**STREAM, "backing-file": "r"}),
    ("block-stream", {"device": "a"}),
    ("block-commit", STREAM),
    ("block-commit", {**STREAM, "base": "x", "base-node": "y"}),
    ("block-commit", {**STREAM, "top": "x", "top-node": "y"}),
    ("block-commit", {**STREAM, "top": "x"}),
    ("block-commit", {**STREAM, "base": "x"}),
    ("block-commit", {**STREAM, "device": "zz"}),
    backup(device="b", target="r", compress=True),
    backup(device="b", target="ro"),
    ("blockdev-snapshot", {"node": "ro", "overlay": "r"}),
    ("blockdev-snapshot", {"node": "b", "overlay": "ro"}),
    ("change-backing-file", {"device": "b", "image-node-name": "zz", "backing-file": "q"}),
]


def creation(driver: str, **options: Any) -> list[Step]:
    return [
        ("blockdev-create", {"job-id": driver, "options": {"driver": "file", "filename": driver, "size": 0}}),
        ("wait", driver, "concluded"),
        ("job-dismiss", {"id": driver}),
        ("blockdev-add", {"driver": "file", "node-name": driver, "filename": driver}),
        ("blockdev-create", {"job-id": driver, "options": {"driver": driver, "file": driver, "size": SIZE, **options}}),
        ("wait", driver, "concluded"),
        "query-jobs",
        ("job-dismiss", {"id": driver}),
        ("blockdev-add", {"driver": driver, "node-name": driver + "-image", "file": driver}),
    ]


CREATION: list[Step] = [
    *creation("qcow2", **{"extended-l2": True, "version": "v3", "preallocation": "metadata", "lazy-refcounts": True, "refcount-bits": 8}),
    *creation("qed", **{"cluster-size": 65536, "table-size": 4}),
    *creation("vdi", preallocation="metadata"),
    *creation("vmdk", **{"subformat": "monolithicSparse", "adapter-type": "ide", "zeroed-grain": True}),
    *creation("vhdx", **{"log-size": 1 << 20, "block-size": 1 << 20, "subformat": "dynamic", "block-state-zero": True}),
    *creation("vpc", **{"subformat": "dynamic", "force-size": True}),
    *creation("parallels", **{"cluster-size": 1 << 20}),
    *creation("qcow"),
    "query-named-block-nodes",
    ("blockdev-create", {"job-id": "c", "options": {"driver": "qcow2", "file": "qcow2", "size": "x"}}),
    ("blockdev-create", {"job-id": "c", "options": {"driver": "qcow2", "file": "qcow2", "size": SIZE, "foo": 3}}),
    ("blockdev-create", {"job-id": "c", "options": {"driver": "qcow2", "file": "qcow2", "size": SIZE, "version": "v9"}}),
]

EMPTY: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("images", "script"),
    [
        ({}, WIRE),
        ({"t1": EMPTY}, NODES),
        ({"a": EMPTY, "t1": EMPTY, "t2": EMPTY}, JOBS),
        ({"base": EMPTY, "mid": ("-b", "base", "-F", "qcow2"), "top": ("-b", "mid", "-F", "qcow2"), "t1": EMPTY}, CHAIN),
        ({"a": EMPTY, "t1": EMPTY}, BITMAPS),
        ({"a": EMPTY, "s": EMPTY, "t1": EMPTY}, SNAPSHOTS),
        ({}, CREATION),
        ({"a": EMPTY}, DRIVES),
        ({"a": EMPTY, "b": EMPTY, "v2": ("-o", "compat=0.10"), "ro": EMPTY}, REFUSALS),
    ],
    ids=["wire", "nodes", "jobs", "chain", "bitmaps", "snapshots", "creation", "drives", "refusals"],
)
def test_the_same_as_qemu_storage_daemon(tmp_path: Path, images: dict[str, tuple[str, ...]], script: list[Step]) -> None:
    same(tmp_path, images, script)


# -- the wire --------------------------------------------------------------------------------------------------------


def requests(data: bytes, step: int) -> list[Any]:
    decoder = codec.Decoder()
    return [found for at in range(0, len(data), step) for found in decoder.feed(data[at : at + step])]


def test_a_stream_may_be_cut_anywhere() -> None:
    text = rb'{"execute": "a\"}{", "id": "\\"} {"execute":"b","arguments":{"x":[{"y":"]}"}]}}' + b"\n[1] 'x' word {}"
    whole = requests(text, len(text))
    assert [found.command for found in whole[:2]] == ['a"}{', "b"] and whole[0].id == "\\"
    for step in range(1, len(text)):
        again = requests(text, step)
        assert [type(found) for found in again] == [type(found) for found in whole], step


def test_what_is_too_much_is_refused() -> None:
    decoder = codec.Decoder()
    found = [one for _part in range(20) for one in decoder.feed(b'{"execute": "' + b"x" * 100000)][0]
    assert isinstance(found, codec.Refused) and found.fatal
    nested = requests(b"[" * 5000 + b"]" * 5000, 1000)[0]
    assert "nesting" in nested.reply["error"]["desc"]
    replies = requests(b"nonsense " * (codec.MAX_ERRORS + 5), 1 << 16)
    assert replies[-1].fatal and len(replies) == codec.MAX_ERRORS


def test_any_bytes_are_answered() -> None:
    rng = random.Random(5)
    words = [b"{", b"}", b"[", b"]", b'"', b"'", b"\\", b",", b":", b"execute", b" ", b"\n", b"1", b"\xff", b"null"]
    for _round in range(300):
        for found in requests(b"".join(rng.choice(words) for _word in range(60)), rng.randrange(1, 50)):
            assert isinstance(found, (codec.Request, codec.Refused))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:a", {"type": "unix", "path": "a"}),
        ("./a,server=on,wait=off", {"type": "unix", "path": "./a"}),
        ("localhost:4444", {"type": "inet", "host": "localhost", "port": "4444"}),
        ("tcp:[::1]:0", {"type": "inet", "host": "::1", "port": "0"}),
        ("nonsense", None),
        ("a:70000", None),
        ("unix:a,server=off", None),
    ],
)
def test_addresses(text: str, address: Optional[dict[str, str]]) -> None:
    if address is None:
        with pytest.raises(OptionError):
            parse_address(text)
    else:
        assert parse_address(text) == address


# -- monitors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    graph = Graph()
    made = Monitor(Live(graph))
    made.listen({"type": "unix", "path": str(tmp_path / "qmp")})
    made.start()
    yield made
    made.stop()
    made.live.close()
    graph.close()


def test_several_clients_hear_of_everything(monitor: Monitor) -> None:
    path = Path(monitor.addresses[0]["path"])
    clients = [Client(path) for _client in range(3)]
    assert clients[0].command("query-jobs")["error"]["class"] == "CommandNotFound"
    for client in clients:
        assert client.command("qmp_capabilities") == {"return": {}}
    for number in range(2):
        clients[0].command("blockdev-add", driver="null-co", node_name="n%d" % number, size=SIZE)
    clients[1].command("blockdev-mirror", job_id="j", device="n0", target="n1", sync="full")
    clients[2].wait("j", "ready")
    clients[2].command("job-cancel", id="j")
    for client in clients:
        client.wait("j", "null")
    sequences = [[(event["event"], event["data"].get("status")) for event in client.events] for client in clients]
    assert sequences[0] == sequences[1] == sequences[2]
    assert all({"seconds", "microseconds"} == set(event["timestamp"]) for event in clients[0].events)
    for client in clients:
        client.close()


def test_a_client_that_does_not_read_keeps_nobody_waiting(monitor: Monitor) -> None:
    path = Path(monitor.addresses[0]["path"])
    lazy = Client(path)
    lazy.command("qmp_capabilities")
    for _event in range(2000):
        monitor.live.events.emit("BLOCK_JOB_ERROR", device="x" * 10000)
    with Monitorable(path) as other:
        assert "return" in other.command("query-version")
    lazy.close()


class Monitorable(Client):
    """A client that has agreed."""

    def __enter__(self) -> Monitorable:
        self.command("qmp_capabilities")
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()


def test_clients_that_talk_nonsense_or_are_too_many_are_sent_away(monitor: Monitor) -> None:
    path = Path(monitor.addresses[0]["path"])
    noisy = Client(path)
    noisy.socket.sendall(b"nonsense " * 1000)
    while noisy.message():
        pass
    noisy.close()
    clients = [Client(path) for _client in range(MAX_CLIENTS)]
    with socket.socket(socket.AF_UNIX) as one_more:
        one_more.connect(str(path))
        assert one_more.recv(1) == b""
    clients[0].socket.sendall(b'{"execute":')  # half a request, and gone
    for client in clients:
        client.close()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as one_more:
            one_more.connect(str(path))
            if one_more.recv(1):
                return
    raise AssertionError("no room for a new client")


def test_a_command_that_takes_its_time_does_not_keep_a_monitor_from_stopping(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diskwright.qmp.monitor.SECONDS", 0.1)
    client = Client(Path(monitor.addresses[0]["path"]))
    client.command("qmp_capabilities")
    with monitor.live.lock:
        client.socket.sendall(b'{"execute": "query-jobs"}')
        monitor.stop()
    assert client.message() == {} and not Path(monitor.addresses[0]["path"]).exists()
    client.close()


def test_what_there_is_can_be_asked_for(monitor: Monitor) -> None:
    with Monitorable(Path(monitor.addresses[0]["path"])) as client:
        names = {entry["name"] for entry in client.command("query-commands")["return"]}
        schema = client.command("query-qmp-schema")["return"]
        commands = {entry["name"]: entry for entry in schema if entry["meta-type"] == "command"}
        assert set(commands) == names and {"blockdev-add", "transaction", "job-pause", "query-qmp-schema"} <= names
        types = {entry["name"] for entry in schema}
        for entry in schema:
            for member in entry.get("members", ()):
                assert entry["meta-type"] == "enum" or member["type"] in types
            assert entry.get("arg-type", "any") in types and entry.get("ret-type", "any") in types
        theirs = of_qemu(Path(monitor.addresses[0]["path"]).parent, ["query-commands"])[0][0]["return"]
        missing = {entry["name"] for entry in theirs} - names - {"qmp_capabilities"}
        assert missing <= NOT_THERE


# what qemu-storage-daemon has besides: character devices, objects' properties, what is deprecated, and what needs a virtual machine
NOT_THERE = set(
    "add-fd blockdev-set-iothread chardev-add chardev-change chardev-remove chardev-send-break device_add device_del "
    "query-chardev query-chardev-backends qom-get qom-list qom-list-properties qom-list-types qom-set "
    "query-fdsets remove-fd replication x-blockdev-set-iothread x-nbd-server-add getfd closefd get-win32-socket query-yank yank "
    "query-iothreads ringbuf-read ringbuf-write query-block-latency-histogram block-latency-histogram-set nbd-server-list "
    "trace-event-get-state trace-event-set-state".split()
)


# -- qemu.qmp against a running server ---------------------------------------------------------------------------------


def test_a_served_disk_is_mirrored_while_a_client_writes(tmp_path: Path) -> None:
    for name in ("disk", "copy"):
        qemu_img("create", "-q", "-f", "qcow2", tmp_path / name, 8 << 20)
    node_options = "driver=qcow2,node-name=%s,file.driver=file,file.filename=%s"
    command = [sys.executable, "-m", "diskwright", "serve", "--qmp", "unix:%s" % (tmp_path / "qmp"), "-q"]
    for name in ("disk", "copy"):
        command += ["--blockdev", node_options % (name, tmp_path / name)]
    command += ["--nbd-server", "addr.type=unix,addr.path=%s" % (tmp_path / "nbd"), "--export", "nbd,id=e,node-name=disk,writable=on"]
    with subprocess.Popen(command) as server:
        try:
            model = asyncio.run(drive(tmp_path))
            assert server.wait(PATIENCE) == 0
        finally:
            server.kill()
    qemu_img("check", "-q", tmp_path / "copy")
    qemu_img("convert", "-O", "raw", tmp_path / "copy", tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == model


async def drive(directory: Path) -> bytes:
    """Mirror the disk while it is written, over qemu.qmp; what the copy should hold."""
    model = bytearray(8 << 20)
    uri = "nbd+unix:///disk?socket=%s" % (directory / "nbd")
    words = ["qemu-io", "-f", "raw", uri]
    for number in range(200):
        offset, value = number * 37 % 8000 * 1024, number % 250 + 1
        words += ["-c", "write -P %d %d 7k" % (value, offset)]
        model[offset : offset + 7168] = bytes([value]) * 7168
    client = QMPClient("test")
    for attempt in range(1000):
        try:
            await client.connect(str(directory / "qmp"))
            break
        except ConnectError:
            assert attempt < 999
            await asyncio.sleep(0.01)
    with client.listener() as listener:
        writing = await asyncio.create_subprocess_exec(*words, stdout=subprocess.DEVNULL)
        await client.execute("blockdev-mirror", {"job-id": "m", "device": "disk", "target": "copy", "sync": "full"})
        await heard(listener, "BLOCK_JOB_READY")
        await client.execute("job-complete", {"id": "m"})
        await heard(listener, "BLOCK_JOB_COMPLETED")
        assert await writing.wait() == 0
    exports = await client.execute("query-block-exports")
    assert exports == [{"node-name": "copy", "shutting-down": False, "type": "nbd", "id": "e"}]
    with pytest.raises(QMPError, match="Job not found"):
        await client.execute("job-pause", {"id": "m"})
    await client.execute("quit")
    with suppress(EOFError):  # the server may have been faster
        await client.disconnect()
    return bytes(model)


async def heard(listener: EventListener, name: str) -> None:
    async for event in listener:
        if event["event"] == name:
            return
