# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""rbd against Ceph and gluster against GlusterFS: side by side with qemu-img, and the conformance suite's random requests."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diskwright.errors import Error, ReadOnly
from diskwright.extent import ZERO
from diskwright.graph import Graph, parse_filename
from diskwright.hooks import OpenFlags
from diskwright.node import Node
from diskwright.objects import parse_object
from servers_heavy import Ceph, ceph, gluster
from side_by_side import Outcome, ours, same, theirs

M = 1 << 20
WRITABLE = OpenFlags(writable=True, resize=True, unmap=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    with ceph(tmp_path_factory.mktemp("ceph")) as running:
        yield running


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gluster(tmp_path_factory.mktemp("gluster")) as name:
        yield name


def spec(name: str, **more: Any) -> dict[str, Any]:
    file: dict[str, Any] = parse_filename(name)["file"]
    return {**file, **more}


def walk(make: Any, seed: str, reopens: bool = True) -> None:
    """Random requests against a model; `make(flags)` opens the image."""
    chance = random.Random(seed)
    node: Node = make(WRITABLE)
    content = bytearray(node.pread(0, node.size))
    for _step in range(120):
        offset = chance.randrange(len(content))
        length = min(chance.choice((1, 512, 4096, 70000, 300000)), len(content) - offset)
        verb = chance.choice(("write", "write", "write", "read", "zero", "unmap", "flush", "truncate", "reopen"))
        if verb == "write":
            data = chance.randbytes(length)
            node.pwrite(offset, data)
            content[offset : offset + length] = data
        elif verb == "read":
            assert node.pread(offset, length) == content[offset : offset + length]
        elif verb in ("zero", "unmap"):
            node.pwrite_zeroes(offset, length, verb == "unmap")
            content[offset : offset + length] = bytes(length)
        elif verb == "flush":
            node.flush()
        elif verb == "truncate":
            size = max(512, len(content) + chance.randrange(-300, 300) * 512)
            node.truncate(size)
            del content[size:]
            content.extend(bytes(size - len(content)))
        elif reopens:
            node.close()
            node = make(WRITABLE)
            assert node.pread(0, node.size) == content
        for start, count, status, _host, _host_offset in node.resolve(0, len(content), True):
            assert not status & ZERO or not any(content[start : start + count])
    assert node.pread(0, node.size) == content
    node.close()


def eight_threads(node: Node) -> None:
    """Writes by eight threads, each to its own places."""
    content = bytearray(node.pread(0, node.size))
    failures = []

    def work(number: int) -> None:
        chance = random.Random(number)
        try:
            for _round in range(20):
                offset = (chance.randrange(len(content) // 4096) // 8 * 8 + number) * 4096 % len(content)
                data = chance.randbytes(4096)
                node.pwrite(offset, data)
                content[offset : offset + 4096] = data
        except BaseException as exc:  # noqa: BLE001
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert node.pread(0, node.size) == content


# -- Ceph --------------------------------------------------------------------------------------------------------


def test_images_are_described_as_by_qemu_img(cluster: Ceph, tmp_path: Path) -> None:
    cluster.run("rbd", "create", "--size", "4M", "rbd/one")
    cluster.run("rbd", "create", "--size", "8M", "rbd/two")
    cluster.run("rbd", "snap", "create", "rbd/two@s1")
    cluster.run("rbd", "namespace", "create", "rbd/ns")
    cluster.run("rbd", "create", "--size", "2M", "rbd/ns/img")
    end = ":conf=%s" % cluster.conf
    for name in ("one", "two", "two@s1", "ns/img", "none", "one@none", "one@", "ns/a/b", r"o\\:ne"):
        same("info rbd:rbd/%s%s" % (name, end), tmp_path)
    for more in (":id=admin", ":id=nobody", ":bogus=1", ":bogus", ":rbd_cache=false"):
        same("info rbd:rbd/one%s%s" % (end, more), tmp_path)
    for name in ("rbd:", "rbd:rbd", "rbd:nopool/x" + end, "rbd:rbd/one:conf=/none"):
        same("info %s" % name, tmp_path)
    known = "driver=rbd,pool=rbd,image=one,conf=%s" % cluster.conf
    for more in ("", ",bogus=1", ",key-secret=t", ",auth-client-required.0=cephx", ",server.0.host=h", ",encrypt.format=luks"):
        same("info --image-opts %s" % (known + more), tmp_path)
    for line in ("create -f raw -o help %s", "info --output=json %s", "map --output=json %s", "snapshot -l %s"):
        same(line % ("rbd:rbd/two" + end), tmp_path)
    assert theirs(["bench", "-q", "-w", "-c", "1", "-s", "4k", "-f", "raw", "rbd:rbd/two" + end], tmp_path).code == 0
    same("map --output=json rbd:rbd/two%s" % end, tmp_path)


def test_images_are_created(cluster: Ceph, tmp_path: Path) -> None:
    end = ":conf=%s" % cluster.conf
    for number, option in enumerate(("", "-o cluster_size=1M", "-o cluster_size=3k", "-o encrypt.format=luks", "-o password-secret=x")):
        for who, run in (("a", theirs), ("b", ours)):
            outcome = run(["create", "-f", "raw", *option.split(), "rbd:rbd/%s%d%s" % (who, number, end), "4M"], tmp_path)
            if who == "a":
                expected = outcome
            else:
                assert outcome == Outcome(expected.code, *(text.replace("rbd/a", "rbd/b") for text in expected[1:]))
    assert "Child node" in same("info rbd:rbd/b1%s" % end, tmp_path).out
    sizes = []
    for run, name in ((theirs, "rbd:rbd/secret0" + end), (ours, "rbd:rbd/secret" + end)):
        extra = ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks2,encrypt.key-secret=s"]
        assert run(["create", "-q", "-f", "raw", *extra, name, "64M"], tmp_path) == Outcome(0, "", "")
        info = theirs(["info", name], tmp_path).out
        assert "encryption format: luks2" in info
        sizes.append([line for line in info.splitlines() if "size" in line])
    assert sizes[0] == sizes[1]
    assert ours(["info", "rbd:rbd/secret" + end], tmp_path).out == info
    for word in ("abc", "abd"):
        objects = {"s": parse_object("secret,id=s,data=%s" % word)}
        graph = Graph(objects=objects)
        given = spec("rbd:rbd/secret" + end, **{"encrypt": {"format": "luks2", "key-secret": "s"}})
        if word == "abc":
            with graph.open_spec(given, WRITABLE) as node:
                assert node.size >= 48 * M
                node.pwrite(5, b"hidden")
                assert node.pread(0, 12) == b"\0\0\0\0\0hidden\0"
        else:
            with pytest.raises(Error, match="encryption load fail"):
                graph.open_spec(given, WRITABLE)


def test_snapshots(cluster: Ceph, tmp_path: Path) -> None:
    name = "rbd:rbd/snapped:conf=%s" % cluster.conf
    for args in (["create", "-q", "-f", "raw", name, "4M"], ["snapshot", "-c", "first", name]):
        assert ours(args, tmp_path).code == 0
    with Graph().open(name, "raw", WRITABLE) as node:
        node.pwrite(0, b"later")
    same("snapshot -l %s" % name, tmp_path)
    with Graph().open(name.replace(":conf", "@first:conf"), "raw") as node:
        assert node.pread(0, 5) == bytes(5)
    with pytest.raises(ReadOnly, match="rbd snapshots are read-only"):
        Graph().open(name.replace(":conf", "@first:conf"), "raw", WRITABLE)
    assert ours(["snapshot", "-a", "first", name], tmp_path).code == 0
    with Graph().open(name, "raw") as node:
        assert node.pread(0, 5) == bytes(5)
    assert ours(["snapshot", "-d", "first", name], tmp_path).code == 0


def test_a_key_from_a_secret(cluster: Ceph) -> None:
    cluster.run("rbd", "create", "--size", "1M", "rbd/keyed")
    objects = {"k": parse_object("secret,id=k,format=base64,data=%s" % cluster.key()), "wrong": parse_object("secret,id=wrong,data=no key")}
    bare = cluster.place / "bare.conf"
    bare.write_text("".join(line + "\n" for line in cluster.conf.read_text().splitlines() if "keyring" not in line))
    name = "rbd:rbd/keyed:conf=%s" % bare
    with Graph(objects=objects).open_spec(spec(name, **{"key-secret": "k"}), WRITABLE) as node:
        node.pwrite(0, b"x")
    with pytest.raises(Error, match="error connecting"):
        Graph(objects=objects).open_spec(spec(name, **{"key-secret": "wrong"}), WRITABLE)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_random_requests_to_ceph(cluster: Ceph, tmp_path: Path, format: str) -> None:
    name = "rbd:rbd/walk-%s:conf=%s" % (format, cluster.conf)
    assert ours(["create", "-q", "-f", format, name, "3M"], tmp_path) == Outcome(0, "", "")

    def make(flags: OpenFlags) -> Node:
        return Graph().open(name, format, flags)

    walk(make, "ceph" + format)
    with make(WRITABLE) as node:
        eight_threads(node)
        content = node.pread(0, node.size)
    (tmp_path / "content").write_bytes(content)
    assert theirs(["compare", "-f", format, name, "content"], tmp_path).code == 0
    assert ours(["convert", "-f", format, "-O", "raw", name, "out"], tmp_path) == Outcome(0, "", "")
    assert (tmp_path / "out").read_bytes() == content


# -- GlusterFS ---------------------------------------------------------------------------------------------------


def without_log(outcome: Outcome) -> Outcome:
    """An outcome without what the library logs, and the warning, which we have only for what could be opened."""
    kept = [line for line in outcome.err.splitlines() if not line.startswith("[") and "deprecated" not in line and "Usage: -drive" not in line]
    return Outcome(outcome.code, outcome.out, "\n".join(kept))


def test_files_are_described_as_by_qemu_img(volume: str, tmp_path: Path) -> None:
    for line in (
        "create -f raw %sfile 4M",
        "create -f raw -o preallocation=full %sfull 1M",
        "create -f raw -o help %sfile",
        "create -f qcow2 %sq 2M",
    ):
        args = (line % volume).split()
        assert without_log(ours(args, tmp_path)) == without_log(theirs(args, tmp_path))
    servers = "driver=gluster,volume=disks,path=file,server.0.type=inet,server.0.host=127.0.0.1"
    for args in (
        ["info", volume + "file"],
        ["map", "--output=json", volume + "full"],
        ["info", volume + "none"],
        ["info", "gluster://127.0.0.1/disks"],
        ["info", "gluster+rdma://127.0.0.1/disks/file"],
        ["info", "--image-opts", servers + ",server.0.port=24007"],
        ["info", "--image-opts", servers],
        ["info", "--image-opts", "driver=gluster,volume=disks,path=file"],
        ["resize", "-f", "raw", volume + "file", "5M"],
    ):
        assert without_log(ours(args, tmp_path)) == without_log(theirs(args, tmp_path)), args


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_random_requests_to_gluster(volume: str, tmp_path: Path, format: str) -> None:
    name = "%swalk-%s" % (volume, format)
    assert ours(["create", "-q", "-f", format, name, "3M"], tmp_path).code == 0

    def make(flags: OpenFlags) -> Node:
        return Graph().open(name, format, flags)

    walk(make, "gluster" + format, reopens=False)  # libgfapi takes ten seconds to leave a volume
    with make(WRITABLE) as node:
        eight_threads(node)
        content = node.pread(0, node.size)
    (tmp_path / "content").write_bytes(content)
    assert theirs(["compare", "-f", format, name, "content"], tmp_path).code == 0


def test_a_volume_that_is_not_there(volume: str) -> None:
    with pytest.raises(Error, match="Gluster connection for volume none, path file failed to connect"):
        Graph().open(volume.replace("/disks/", "/none/file"), "raw")
