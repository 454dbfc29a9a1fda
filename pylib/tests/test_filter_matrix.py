# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Every filter over every writable format, and below it, over a file and over an NBD server: requests against a model, and qemu-img's judgement."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diskwright import drivers
from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags
from diskwright.node import Node
from diskwright.objects import add_object
from effort import BRIEF
from servers import program
from servers_nbd import listening
from side_by_side import theirs

K = 1024
M = K * K
SIZE = M  # of the disks; vpc makes it a little more
ROOM = 32 * M  # of an export, which cannot grow
STEPS = 12
FORMATS = ("raw", "qcow2", "qcow", "qed", "luks", "vdi", "vmdk", "vpc", "vhdx", "parallels")
CREATION: dict[str, dict[str, Any]] = {
    "luks": {"key-secret": "s", "iter-time": 10},
    "qcow2": {"cluster_size": 4 * K},
    "vhdx": {"block_size": M},
    "parallels": {"cluster_size": 64 * K},
}
APPENDING = ("qcow", "qed", "vmdk", "parallels")  # new clusters go to the end of the file, so that an export has no room for any
COMPRESSING = ("qcow2", "qcow")
CHECKED = ("qcow2", "vdi", "vmdk", "vhdx", "qed", "parallels")
WRITABLE = OpenFlags(writable=True, resize=True, unmap=True)


class Place(NamedTuple):
    """Where the images are: files, and the same files as exports of one server; `protocol` says which of the two is opened."""

    directory: Path
    protocol: str

    def file(self, format: str) -> dict[str, Any]:
        if self.protocol == "file":
            return {"driver": "file", "filename": str(self.directory / format)}
        return {"driver": "nbd", "export": format, "server": {"type": "unix", "path": str(self.directory / "socket")}}


def flat(name: str, size: int) -> dict[str, Any]:
    """A new file of zeroes."""
    with open(name, "wb") as file:
        file.truncate(size)
    return {"driver": "file", "filename": name}


def target(name: str, size: int) -> dict[str, Any]:
    spec = {"driver": "qcow2", "file": flat(name, 0)}
    cls = drivers.lookup_format("qcow2")
    with Graph().open_spec(spec["file"], WRITABLE) as file:
        cls.create(file, cls.create_options.from_mapping({"size": -(-size // 512) * 512}))
    return spec


def filtered(name: str, child: dict[str, Any], size: int, side: str) -> dict[str, Any]:
    """The filter over `child`, of `size` bytes; files that it needs besides begin with `side`."""
    if name in ("throttle", "copy-on-read", "compress", "preallocate"):
        return {"driver": name, "file": child, **({"throttle-group": "g"} if name == "throttle" else {})}
    if name == "copy-before-write":
        return {"driver": name, "file": child, "target": target(side + "target", size)}
    if name == "blkdebug":
        return {"driver": name, "image": child, "align": 512, "max-transfer": 128 * K}
    if name == "blkverify":
        return {"driver": name, "test": child, "raw": flat(side + "raw", size)}
    if name == "blklogwrites":
        return {"driver": name, "file": child, "log": flat(side + "log", 0)}
    if name == "quorum":
        return {"driver": name, "children": [child, flat(side + "raw", size)], "vote-threshold": 2}
    return {"driver": "raw", "size": size, "file": child}


ABOVE = ("throttle", "copy-on-read", "compress", "preallocate", "copy-before-write", "blkdebug", "blkverify", "blklogwrites", "quorum", "raw")
BELOW = ("throttle", "copy-before-write", "blkdebug", "blklogwrites", "preallocate")  # those that can grow with a file, or do not mind
ORDERS = [("above", name) for name in ABOVE] + [("below", name) for name in BELOW]
CASES = [(protocol, where, name, format) for protocol in ("file", "nbd") for where, name in ORDERS for format in FORMATS]
CASES.remove(("nbd", "above", "compress", "qcow"))  # where even what is overwritten goes to the end of the file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One process that exports a file for each format."""
    place = tmp_path_factory.mktemp("matrix")
    words = [program("qemu-storage-daemon"), "--nbd-server", "addr.type=unix,addr.path=%s,max-connections=0" % (place / "socket")]
    for format in FORMATS:
        (place / format).write_bytes(b"")
        os.truncate(place / format, ROOM)
        words += ["--blockdev", "file,node-name=%s,filename=%s,discard=unmap" % (format, place / format)]
        words += ["--export", "nbd,id=%s,node-name=%s,name=%s,writable=on" % (format, format, format)]
    with listening(words, place / "socket"):
        yield place


def objects() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in ("throttle-group,id=g,x-iops-total=1000000", "secret,id=s,data=abc"):
        add_object(found, text)
    return found


def make(place: Place, format: str) -> dict[str, Any]:
    """A new image in an empty file; its description."""
    path = place.directory / format
    path.write_bytes(b"")
    os.truncate(path, ROOM if place.protocol == "nbd" else SIZE if format == "raw" else 0)
    cls = drivers.lookup_format(format)
    record = cls.create_options.from_mapping({"size": SIZE, **CREATION.get(format, {})}).bind(objects())
    full = place.protocol == "nbd" and format in APPENDING
    below = {"driver": "file", "filename": str(path), "locking": "off"} if full else place.file(format)
    if full:
        path.write_bytes(b"")
    with Graph(objects=objects()).open_spec(below, WRITABLE) as file:
        cls.create(file, record)
    if full:  # all clusters are there
        with Graph().open_spec({"driver": format, "file": below}, WRITABLE) as node:
            node.pwrite(0, b"\1" * node.size)
        os.truncate(path, ROOM)
    runtime = {"key-secret": "s"} if format == "luks" else {"size": SIZE} if format == "raw" and place.protocol == "nbd" else {}
    return {"driver": format, **runtime}


def exercise(node: Node, model: bytearray, chance: random.Random, zeroes: bool) -> None:
    """Random requests; those to write zeroes as such with `zeroes` only."""
    for _step in range(STEPS):
        offset = chance.randrange(len(model))
        length = min(chance.choice((1, 512, 4096, 50 * K, 200 * K)), len(model) - offset)
        kind = chance.randrange(6)
        if kind < 3:
            data = chance.choice((chance.randbytes(length), bytes(length), b"\7" * length))
            node.pwrite(offset, data)
            model[offset : offset + length] = data
        elif kind == 3 and zeroes:
            node.pwrite_zeroes(offset, length, chance.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif kind <= 4:
            assert node.pread(offset, length) == model[offset : offset + length]
        else:
            assert sum(extent.length for extent in node.block_status(offset, length)) == length
            node.flush()


def sampled(protocol: str, where: str, name: str, format: str) -> bool:
    """Whether a brief run has this case: of each pair some."""
    order = CASES.index((protocol, where, name, format))
    return not BRIEF or order % 7 == 0


@pytest.mark.parametrize("protocol,where,name,format", [case for case in CASES if sampled(*case)])
def test_a_filter_is_no_obstacle(server: Path, tmp_path: Path, protocol: str, where: str, name: str, format: str) -> None:
    place = Place(server if protocol == "nbd" else tmp_path, protocol)
    image, side = make(place, format), str(tmp_path) + "/"
    below = place.file(format)
    spec: dict[str, Any] = {**image, "file": below}
    with Graph(objects=objects()).open_spec(spec, OpenFlags()) as node:
        model = bytearray(node.pread(0, node.size))
    if where == "below":
        spec["file"] = filtered(name, below, os.stat(place.directory / format).st_size, side)
    if where == "above":
        spec = filtered(name, spec, len(model), side)
        if name in ("blkverify", "quorum"):
            (tmp_path / "raw").write_bytes(model)
    if where == "above" and name == "compress" and format not in COMPRESSING:
        with pytest.raises(Error, match="Compression is not supported for underlying format: " + format):
            Graph(objects=objects()).open_spec(spec, WRITABLE)
        return
    before, zeroes, chance = bytes(model), protocol == "file" or format not in APPENDING, random.Random(name + format)
    kept = name == "copy-before-write" and where == "above"
    with Graph(objects=objects()).open_spec({"driver": "snapshot-access", "file": spec} if kept else spec, WRITABLE) as top:
        node = top.children["file"] if kept else top
        assert node.size == len(model)
        exercise(node, model, chance, zeroes)
        assert node.pread(0, node.size) == model
        assert not kept or top.pread(0, top.size) == before
    judge(place, tmp_path, format, model)


def judge(place: Place, scratch: Path, format: str, model: bytearray) -> None:
    """qemu-img finds the same content, and nothing wrong."""
    (scratch / "expected").write_bytes(model)
    options = "driver=%s,%sfile.driver=file,file.filename=%s" % (format, "key-secret=s," if format == "luks" else "", place.directory / format)
    if format == "raw":
        options += ",size=%d" % len(model)
    line = [
        "compare",
        "--object",
        "secret,id=s,data=abc",
        "-U",
        "--image-opts",
        "driver=raw,file.driver=file,file.filename=%s" % (scratch / "expected"),
        options,
    ]
    assert theirs(line, scratch).code == 0, theirs(line, scratch)
    if format in CHECKED and (place.protocol == "file" or format not in APPENDING):  # what is behind the image is taken for a leak
        assert theirs(["check", "-U", "-f", format, str(place.directory / format)], scratch).code == 0
