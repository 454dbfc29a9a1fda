# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Named nodes and their users: sharing, permissions, replacement, and Roots while the graph changes; against qemu-storage-daemon."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diskwright.errors import Denied, Error, OptionError, ReadOnly, Unsupported
from diskwright.extent import ZERO
from diskwright.graph import Graph
from diskwright.node import ALL, CONSISTENT_READ, RESIZE, WRITE
from diskwright.objects import parse_object
from diskwright.root import Root

MIB = 1 << 20


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """a.raw, b.raw, a.q and b.q of a MiB each; the working directory is theirs."""
    for name in ("a", "b"):
        (tmp_path / (name + ".raw")).write_bytes(bytes(MIB))
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / (name + ".q"), "1M"], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def graph() -> Iterator[Graph]:
    made = Graph(objects={"tg0": parse_object("throttle-group,id=tg0")})
    yield made
    made.close()


FILE = {"driver": "file", "filename": "a.raw", "node-name": "f"}
QCOW2 = {"driver": "file", "filename": "a.q", "node-name": "fq"}


def add(**spec: Any) -> tuple[str, dict[str, Any]]:
    return "blockdev-add", {key.replace("_", "-"): value for key, value in spec.items()}


def delete(name: str) -> tuple[str, dict[str, Any]]:
    return "blockdev-del", {"node-name": name}


# What is asked of both, in this order; the texts of all refusals must be the same.
SCENE: list[tuple[str, dict[str, Any]]] = [
    ("blockdev-add", FILE),
    add(driver="raw", file="f", node_name="r1"),
    add(driver="raw", file="f", node_name="r2"),
    ("blockdev-add", FILE),
    add(driver="file", filename="b.raw", node_name="1f"),
    add(driver="file", filename="b.raw", node_name=""),
    add(driver="file", filename="b.raw", node_name="x" * 32),
    add(driver="file", filename="b.raw", node_name="x" * 31),
    delete("x" * 31),
    add(driver="file", filename="b.raw"),
    add(driver="raw", file="nope", node_name="r3"),
    add(driver="raw", file="r3", node_name="r3"),
    ("blockdev-add", QCOW2),
    add(driver="qcow2", file="fq", node_name="q1"),
    add(driver="qcow2", file="fq", node_name="q2"),
    add(driver="qcow2", file="fq", node_name="q2", read_only=True),
    add(driver="raw", file="fq", node_name="q3", read_only=True),
    add(driver="raw", file="fq", node_name="q4"),
    add(driver="throttle", file="q1", throttle_group="tg0", node_name="t"),
    add(driver="throttle", file="q1", throttle_group="tg1", node_name="t1"),
    delete("f"),
    delete("q1"),
    delete("nope"),
    delete("r1"),
    delete("t"),
    add(driver="file", filename="b.q", node_name="fro", read_only=True),
    add(driver="qcow2", file="fro", node_name="qro"),
    add(driver="qcow2", file="fro", node_name="qro", read_only=True),
    add(driver="qcow2", file={"driver": "file", "filename": "b.q", "node-name": "inner"}, node_name="qi"),
    delete("inner"),
    delete("#block000"),
    delete("qro"),
    delete("fro"),
    add(driver="qcow2", file={"driver": "file", "filename": "b.q", "node-name": "inner"}, node_name="qi", backing=None),
    delete("inner"),
    add(driver="raw", file="inner", node_name="over-inner"),
    delete("qi"),
    add(driver="raw", file="inner", node_name="over-too"),
    delete("over-inner"),
    delete("over-too"),
    add(driver="raw", file="inner", node_name="late"),
    ("writable-export", {"id": "e1", "node-name": "q1"}),
    ("writable-export", {"id": "e2", "node-name": "q1"}),
    ("writable-export", {"id": "e3", "node-name": "r2"}),
    ("writable-export", {"id": "e4", "node-name": "f"}),
    delete("q1"),
    add(driver="qcow2", file="f", node_name="q5"),
]


def theirs(directory: Path) -> list[str]:
    """What qemu-storage-daemon answers to SCENE: "" or its complaint."""
    lines = [{"execute": "qmp_capabilities"}, {"execute": "object-add", "arguments": {"qom-type": "throttle-group", "id": "tg0"}}]
    lines.append({"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": str(directory / "s")}}}})
    for command, arguments in SCENE:
        if command == "writable-export":
            arguments = {**arguments, "type": "nbd", "name": arguments["id"], "writable": True}
            command = "block-export-add"
        lines.append({"execute": command, "arguments": arguments})
    lines.append({"execute": "quit"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    argv = ["qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "m"]
    done = subprocess.run(argv, input=text, stdout=subprocess.PIPE, check=True, text=True, timeout=60)
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    replies = [reply for reply in replies if "event" not in reply and "QMP" not in reply]
    return [reply["error"]["desc"] if "error" in reply else "" for reply in replies[3:-1]]


def ours(graph: Graph) -> Iterator[str]:
    """What our graph says to SCENE."""
    for command, arguments in SCENE:
        try:
            if command == "blockdev-add":
                graph.add(arguments)
            elif command == "blockdev-del":
                graph.remove(arguments["node-name"])
            else:
                root = Root(graph, arguments["node-name"], CONSISTENT_READ)
                root.change_permissions(CONSISTENT_READ | WRITE, ALL & ~RESIZE)
            yield ""
        except Error as error:
            yield str(error)


def test_nodes_are_added_shared_and_refused_as_qemu_does(images: Path, graph: Graph) -> None:
    expected = theirs(images)
    assert len(expected) == len(SCENE)
    for asked, theirs_, ours_ in zip(SCENE, expected, ours(graph)):
        assert ours_ == theirs_, asked


def test_an_inline_child_closes_with_its_last_user(images: Path, graph: Graph) -> None:
    inner = {**QCOW2, "node-name": "inner"}
    top = graph.add({"driver": "qcow2", "node-name": "q", "file": inner})
    file = graph.find("inner")
    graph.add({"driver": "raw", "node-name": "r", "file": "inner"})
    graph.remove("q")
    assert top._closed and not file._closed and "q" not in graph.named
    graph.remove("r")
    assert file._closed and not graph.named


def test_a_shared_child_outlives_its_parents_and_its_locks_follow_them(images: Path, graph: Graph) -> None:
    file = graph.add(QCOW2)
    assert file.flags.permissions() == (0, ALL)
    graph.add({"driver": "qcow2", "node-name": "q", "file": "fq"})
    assert file.flags.permissions() == (CONSISTENT_READ | WRITE | RESIZE, ALL & ~(WRITE | RESIZE))
    with pytest.raises(Error, match="lock"):
        Graph().add({"driver": "qcow2", "node-name": "other", "file": {"driver": "file", "filename": "a.q"}})
    graph.remove("q")
    assert file.flags.permissions() == (0, ALL) and not file._closed
    other = Graph()
    other.add({"driver": "qcow2", "node-name": "other", "file": {"driver": "file", "filename": "a.q"}})
    other.close()


def test_a_child_that_fails_leaves_nothing_behind(images: Path, graph: Graph) -> None:
    file = graph.add(FILE)
    with pytest.raises(Error, match="not in qcow2 format"):
        graph.add({"driver": "qcow2", "node-name": "q", "file": "f"})
    assert file.parents == [] and file.flags.permissions() == (0, ALL) and list(graph.named) == ["f"]
    with pytest.raises(OptionError, match="Duplicate"):
        graph.add({"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "b.raw", "node-name": "r"}})
    graph.add({"driver": "raw", "node-name": "r", "file": "f"})


def test_a_filter_goes_in_and_out_below_a_writer(images: Path, graph: Graph) -> None:
    graph.add({"driver": "qcow2", "node-name": "q", "file": QCOW2})
    node = graph.find("q")
    with Root(graph, "q", CONSISTENT_READ | WRITE, ALL & ~RESIZE) as root:
        ended = threading.Event()
        failures: list[BaseException] = []

        def write(part: int) -> None:
            data = bytes([part + 1]) * 512
            try:
                while not ended.is_set():
                    for offset in range(part * 512, MIB, 64 * 512):
                        root.pwrite(offset, data)
            except BaseException as error:
                failures.append(error)

        writers = [threading.Thread(target=write, args=(part,)) for part in range(4)]
        for writer in writers:
            writer.start()
        for _turn in range(20):
            top = graph.add({"driver": "throttle", "node-name": "t", "throttle-group": "tg0", "file": "q"})
            with graph.drained():
                graph.replace(node, top)
            assert root.node is top and [edge.user for edge in node.parents] == [top]
            with pytest.raises(Error, match="Block device q is in use"):
                graph.remove("q")
            with graph.drained():
                graph.replace(top, node)
            assert root.node is node
            graph.remove("t")
        ended.set()
        for writer in writers:
            writer.join()
        assert not failures and root.counters["wr"].operations and root.counters["wr"].bytes == 512 * root.counters["wr"].operations
        for part in range(4):
            assert root.pread(part * 512, 512) == bytes([part + 1]) * 512
    graph.remove("q")
    assert subprocess.run(["qemu-img", "check", "-q", "a.q"], check=False).returncode == 0


def test_a_replacement_that_permissions_forbid_changes_nothing(images: Path, graph: Graph) -> None:
    graph.add(QCOW2)
    graph.add({"driver": "qcow2", "node-name": "q", "file": "fq"})
    graph.add({"driver": "null-co", "node-name": "n", "size": MIB})
    with Root(graph, "n", CONSISTENT_READ | WRITE, ALL & ~RESIZE) as root:
        with graph.drained(), pytest.raises(Error, match="Permission conflict on node 'fq'"):
            graph.replace(graph.find("n"), graph.find("fq"))
        assert root.node is graph.find("n") and len(graph.find("fq").parents) == 1
        with graph.drained(), pytest.raises(Error, match="Making 'q' a backing child of 'q' would create a cycle"):
            graph.set_child(graph.find("q"), "backing", graph.find("q"))
    vdi = images / "x.vdi"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vdi", vdi, "1M"], check=True)
    graph.add({"driver": "file", "node-name": "fv", "filename": str(vdi)})
    graph.add({"driver": "vdi", "node-name": "v", "file": "fv"})
    graph.add({"driver": "raw", "node-name": "r", "file": "fv"})
    with graph.drained(), pytest.raises(Unsupported, match="the vdi node 'v' cannot be replaced"):
        graph.set_child(graph.find("v"), "file", graph.find("r"))


def test_the_file_of_an_open_qcow2_can_be_another_node(images: Path, graph: Graph) -> None:
    """Metadata that is cached goes to the new one."""
    graph.add(QCOW2)
    node = graph.add({"driver": "qcow2", "node-name": "q", "file": "fq"})
    node.pwrite(0, b"before")
    top = graph.add({"driver": "throttle", "node-name": "t", "throttle-group": "tg0", "file": "fq"})
    with graph.drained():
        graph.set_child(node, "file", top)
    node.pwrite(500_000, b"after")
    assert node.children["file"] is top and node.pread(0, 6) + node.pread(500_000, 5) == b"beforeafter"
    graph.close()
    done = subprocess.run(["qemu-io", "-r", "-c", "read -v 500000 5", "a.q"], check=True, stdout=subprocess.PIPE, text=True)
    assert "after" in done.stdout


def test_a_backing_node_is_set_and_taken_away(images: Path, graph: Graph) -> None:
    base = graph.add({"driver": "raw", "node-name": "base", "file": FILE})
    base.pwrite(0, b"base")
    over = graph.add({"driver": "qcow2", "node-name": "over", "file": QCOW2})
    assert over.pread(0, 4) == bytes(4)
    with graph.drained():
        graph.set_child(over, "backing", base)
    assert over.pread(0, 4) == b"base" and [layer.name for layer in over.layers()] == ["over", "base"]
    with pytest.raises(Error, match="Block device base is in use"):
        graph.remove("base")
    with graph.drained():
        graph.set_child(over, "backing", None)
    assert over.pread(0, 4) == bytes(4) and over.backing is None
    graph.remove("base")


def test_a_node_made_by_hand_is_adopted(images: Path, graph: Graph) -> None:
    from diskwright.filters.compress import Compress

    graph.add({"driver": "qcow2", "node-name": "q", "file": QCOW2})
    made = Compress(Compress.options_class(file=graph.find("q")), graph.find("q").flags)
    graph.adopt(made)
    assert made.name.startswith("#block") and graph.named[made.name] is made and made.filename.startswith("json:")
    with graph.drained():
        graph.replace(graph.find("q"), made)
        graph.replace(made, graph.find("q"))
    assert made._closed and made.name not in graph.named and not graph.find("q")._closed


def test_a_root_does_what_it_may(images: Path, graph: Graph) -> None:
    graph.add({"driver": "qcow2", "node-name": "q", "file": QCOW2})
    with Root(graph, "q") as root:
        with pytest.raises(Denied, match="an unnamed block device does not write to node 'q'"):
            root.pwrite(0, b"x")
        root.change_permissions(CONSISTENT_READ | WRITE, ALL)
        root.pwrite(4096, b"x", fua=True)
        root.pwrite_zeroes(0, 4096)
        root.pdiscard(0, 65536)
        assert root.highest_write == 4097 and root.size == MIB
        counted = {kind: counter.operations for kind, counter in root.counters.items()}
        assert counted == {"rd": 0, "wr": 1, "flush": 1, "unmap": 1, "zero": 1}
        with pytest.raises(Error, match="beyond the end"):
            root.pread(MIB, 1)
        assert root.counters["rd"].failed == 1
        with pytest.raises(Error, match="Node q is in use"):
            graph.remove("q")
    graph.add({"driver": "file", "node-name": "ro", "filename": "a.raw", "read-only": True})
    with pytest.raises(ReadOnly, match="Block node is read-only"):
        Root(graph, "ro", WRITE)
    assert graph.find("ro").parents == []


def test_drained_waits_and_holds_back(images: Path, graph: Graph) -> None:
    graph.add({"driver": "raw", "node-name": "r", "file": FILE})
    with Root(graph, "r", CONSISTENT_READ | WRITE) as root:
        inside, let_go, order = threading.Event(), threading.Event(), []

        def slow() -> None:
            with root.request() as node:
                inside.set()
                let_go.wait(30)
                order.append("request")
                assert root.pread(0, 1) == b"\0" and node.name == "r"  # a thread that is inside is not held back
            root.pwrite(0, b"late")
            order.append("late")

        thread = threading.Thread(target=slow)
        thread.start()
        inside.wait(30)
        with root.request(), pytest.raises(RuntimeError, match="from within a request"), graph.drained():
            pass
        threading.Timer(0.05, let_go.set).start()
        with graph.drained():
            order.append("drained")
            with graph.drained():
                assert root.pread(0, 4) == bytes(4)  # the thread that drained goes on
            order.append("changed")
        thread.join()
        assert order == ["request", "drained", "changed", "late"] and root.pread(0, 4) == b"late"


def test_close_closes_users_first(images: Path) -> None:
    graph = Graph()
    graph.add(QCOW2)
    graph.add({"driver": "qcow2", "node-name": "q", "file": "fq"})
    graph.add({"driver": "compress", "node-name": "c", "file": "q"})
    root = Root(graph, "c", CONSISTENT_READ | WRITE)
    root.pwrite(0, b"written" * 10_000)
    nodes = list(graph.named.values())
    graph.close()
    assert all(node._closed for node in nodes) and not graph.named
    assert subprocess.run(["qemu-img", "check", "-q", "a.q"], check=False).returncode == 0


def test_what_a_description_says_of_a_node_stays_said(images: Path, graph: Graph) -> None:
    """read-only and cache.direct of a child are no affair of its parent, whatever becomes of that."""
    inner = {"driver": "file", "filename": "a.raw", "read-only": True, "cache": {"direct": True}}
    node = graph.add({"driver": "raw", "node-name": "r", "file": inner})
    assert not node.read_only and node.children["file"].read_only
    with pytest.raises(ReadOnly, match="Block node is read-only"):
        Root(graph, "r", WRITE)
    with Root(graph, "r") as root:
        assert root.pread(0, 1) == b"\0"
    flags = node.children["file"].flags
    assert not flags.writable and flags.direct and not node.flags.direct
    with pytest.raises(ReadOnly, match="Block node is read-only"):
        graph.add({"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "a.q", "read-only": True}})
    assert list(graph.named) == ["#block000", "r"]


def test_auto_read_only(images: Path, graph: Graph) -> None:
    (images / "a.raw").chmod(0o444)
    images.chmod(0o755)
    program = (
        "import os\n"
        "from diskwright.graph import Graph\n"
        "g = Graph()\n"
        "g.add({'driver': 'file', 'node-name': 'b', 'filename': 'b.raw', 'auto-read-only': True})\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "g.add({'driver': 'file', 'node-name': 'f', 'filename': 'a.raw', 'auto-read-only': True})\n"
        "print(g.find('b').read_only, g.find('f').read_only)\n"
        "try:\n"
        "    g.add({'driver': 'file', 'node-name': 'g', 'filename': 'a.raw'})\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "False True\nCould not open 'a.raw': Permission denied\n"


def test_detect_zeroes(images: Path, graph: Graph) -> None:
    with pytest.raises(OptionError, match="setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"):
        graph.add({"driver": "raw", "node-name": "r", "file": FILE, "detect-zeroes": "unmap"})
    node = graph.add({"driver": "qcow2", "node-name": "q", "file": QCOW2, "detect-zeroes": "on"})
    with Root(graph, "q", CONSISTENT_READ | WRITE) as root:
        root.pwrite(0, b"\1" * MIB)
        root.pwrite(65536, bytes(65536))
        assert root.counters["wr"].operations == root.counters["zero"].operations == 1
    assert [extent.status & ZERO for extent in node.block_status(0, MIB)] == [0, ZERO, 0] and node.children["file"].flags.detect_zeroes == ""


def test_no_node_is_its_own_backing_node(images: Path, graph: Graph) -> None:
    for backing in ("q", {"driver": "raw", "file": "q"}):
        with pytest.raises(OptionError, match="Cannot find device='q' nor node-name='q'"):
            graph.add({"driver": "qcow2", "node-name": "q", "file": QCOW2, "backing": backing})
    assert not graph.named


@pytest.mark.parametrize("name", ["#block000", "#block001", "#block002", "f"])
def test_what_an_image_stores_names_no_nodes(images: Path, graph: Graph, name: str) -> None:
    """Neither those of the user nor, which would never end, the image's own."""
    graph.add(FILE)
    for stored in ('json:{"driver": "raw", "file": "%s"}', 'json:{"file": "%s"}', 'json:{"driver": "raw", "file": {"driver": "raw", "file": "%s"}}'):
        subprocess.run(["qemu-img", "rebase", "-u", "-b", stored % name, "-F", "raw" if "driver" in stored else "qcow2", "a.q"], check=True)
        with pytest.raises(Denied, match="refers to the node '%s'" % name):
            graph.open("a.q")
    assert list(graph.named) == ["f"]
