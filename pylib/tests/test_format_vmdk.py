# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""vmdk beside qemu-img: every subformat both ways, words, descriptors of other products, backing files, streams, damage."""

from __future__ import annotations

import os
import random
import re
import shlex
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from damage import attempt, edges, little_memory, with_field
from samples import sample
from side_by_side import ours, same, setup, theirs, same_space
from vmdk_images import (
    COWD_FIELDS,
    FIELDS,
    GRAIN,
    SECTOR,
    SESPARSE_FIELDS,
    cowd,
    descriptor,
    hosted,
    sesparse,
    sesparse_grain,
    squeezed,
    stream,
)

from diskwright.errors import Denied, Error
from diskwright.graph import Graph, OpenPolicy
from diskwright.hooks import OpenFlags

K = 1024
M = 1024 * K
SUBFORMATS = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized")
CID = re.compile(rb"^(parent)?CID=[0-9a-f]{1,8}\n", re.MULTILINE)


def content(size: int) -> bytes:
    """Data with holes: whole grains, and parts of them."""
    chance = random.Random(3)
    data = bytearray(size)
    for _time in range(7):
        at = chance.randrange(size // SECTOR) * SECTOR
        noise = chance.randbytes(chance.randrange(1, 300) * SECTOR)[: size - at]
        data[at : at + len(noise)] = noise
    return bytes(data)


def split_source(place: Path) -> None:
    """A disk whose data lies on both sides of the border between two extents of 2 GiB."""
    with open(place / "raw", "wb") as file:
        file.truncate(2050 * M + SECTOR)
        for offset in (70 * K, 2047 * M, 2048 * M - 100 * K, 2050 * M):
            file.seek(offset)
            file.write(content(200 * K)[: 2050 * M + SECTOR - offset])


@pytest.mark.parametrize("options", [*("subformat=" + name for name in SUBFORMATS), "zeroed_grain=on,adapter_type=legacyESX"])
def test_both_ways(tmp_path: Path, options: str) -> None:
    for size in (SECTOR, 3 * M + 5 * SECTOR):
        (tmp_path / "raw").write_bytes(content(size))
        for make, read in ((theirs, ours), (ours, theirs)):
            assert make(["convert", "-f", "raw", "-O", "vmdk", "-o", options, "raw", "image.vmdk"], tmp_path).code == 0
            for line in ("check", "info", "info --output=json", "map --output=json", "map"):
                same(line + " image.vmdk", tmp_path)
            same("compare -f raw -F vmdk raw image.vmdk", tmp_path)
            assert read(["convert", "-O", "raw", "image.vmdk", "back"], tmp_path) == (0, "", "")
            assert (tmp_path / "back").read_bytes() == (tmp_path / "raw").read_bytes()


@pytest.mark.parametrize("options", ["subformat=twoGbMaxExtentSparse", "subformat=twoGbMaxExtentFlat"])
def test_split_disks_both_ways(tmp_path: Path, options: str) -> None:
    split_source(tmp_path)
    for make in (theirs, ours):
        assert make(["convert", "-f", "raw", "-O", "vmdk", "-o", options, "raw", "image.vmdk"], tmp_path).code == 0
        for line in ("check", "info", "map --output=json", "map"):
            same(line + " image.vmdk", tmp_path)
        assert same("compare -f raw -F vmdk raw image.vmdk", tmp_path).out == "Images are identical.\n"


def normal(path: Path) -> bytes:
    """The beginning of a file, whatever its CIDs are; the zeroes behind the descriptor do not count."""
    with open(path, "rb") as file:
        head = file.read(256 * K)
    text = CID.sub(b"CID\n", head[: 21 * SECTOR]).rstrip(b"\0")
    return text.ljust(21 * SECTOR, b"\0") + head[21 * SECTOR :]


@pytest.mark.parametrize(
    "options", [*("subformat=" + name for name in SUBFORMATS), "compat6=on", "hwversion=9,toolsversion=7", "zeroed_grain=on", "adapter_type=lsilogic"]
)
def test_new_images_are_the_same(tmp_path: Path, options: str) -> None:
    """Byte for byte, but for the CIDs."""
    names = (tmp_path / "ours", tmp_path / "theirs")
    for place in names:
        place.mkdir()
    for name, size in (("a.vmdk", "0"), ("b", "1"), ("c.d.vmdk", "1536000"), ("e.x", "5G")):
        line = ["create", "-f", "vmdk", "-o", options, name, size]
        assert ours(line, names[0]) == theirs(line, names[1])
    assert sorted(os.listdir(names[0])) == sorted(os.listdir(names[1]))
    for name in os.listdir(names[0]):
        left, right = (place / name for place in names)
        assert normal(left) == normal(right), name
        # a CID is a random number without leading zeroes
        assert abs(left.stat().st_size - right.stat().st_size) <= 7 and same_space(left, right)


REFUSED = [
    "check -r all image",
    "resize -f vmdk image 9M",
    "measure -O vmdk --size 1M",
    "amend -f vmdk -o compat6=on image",
    "snapshot -c x image",
    "rebase -u -b '' image",
    "create -f vmdk -o adapter_type=scsi new 1M",
    "create -f vmdk -o subformat=flat new 1M",
    "create -f vmdk -o hwversion=9,compat6=on new 1M",
    "create -f vmdk -o subformat=monolithicFlat,zeroed_grain=on new 1M",
    "create -f vmdk -b image -F vmdk -o subformat=twoGbMaxExtentFlat new",
    "create -f vmdk -b raw -F raw new",
    "create -f vmdk -b raw -F vmdk new",
    "create -f vmdk -b nothing -F vmdk new",
    "create -f vmdk -b image new",
    "create -f vmdk -o preallocation=metadata new 1M",
    "create -f vmdk new 8E",
    "info -f vmdk raw",
    "info --image-opts driver=vmdk,file.filename=image,subformat=x",
    "info extent-s001.vmdk",
]


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(hosted([]))
    (tmp_path / "raw").write_bytes(bytes(70 * K))
    setup("qemu-img create -f vmdk -o subformat=twoGbMaxExtentSparse extent.vmdk 1M", tmp_path)
    for line in REFUSED:
        same(line, tmp_path)
    rows = [[row.split(" - ")[0] for row in run("create -f vmdk -o help new".split(), tmp_path).out.split("\n")] for run in (ours, theirs)]
    assert rows[0] == rows[1]
    for line in ("-c -O vmdk", "-c -O vmdk -o subformat=monolithicFlat"):
        assert ours(["convert", "-f", "raw", *line.split(), "raw", "none"], tmp_path).err == "qemu-img: Compression not supported for this file format\n"
    assert not (tmp_path / "none").exists()


def test_tables_of_any_kind(tmp_path: Path) -> None:
    """Grains in any order, twice, outside, at 1 with and without zero grains; tables that are missing, shared or outside."""
    path = tmp_path / "image"
    for entries in ([32, 40, 0, 48], [48, 40, 32], [32, 32, 32, 40], [1, 1, 40, 1], [32, 9999, 40], [0] * 15 + [32], [33, 41, 49], [8, 16, 24]):
        for flags in (3, 7):
            path.write_bytes(hosted(entries, flags=flags))
            for line in ("check image", "map --output=json image"):
                same(line, tmp_path)
            theirs(["convert", "-f", "vmdk", "-O", "raw", "image", "raw"], tmp_path)
            assert ours(["compare", "-f", "vmdk", "-F", "raw", "image", "raw"], tmp_path).code == 0
    for directory in ((0, 0), (0, 27), (27, 27), (9999, 27), (0xFFFFFFFF, 0)):
        path.write_bytes(hosted([32, 0, 40], directory))
        same("map --output=json image", tmp_path)
    for grains in (1, 3, 16):
        path.write_bytes(hosted([32, 40], grainSize=grains))
        same("map --output=json image", tmp_path)


def test_writing_where_there_is_no_table(tmp_path: Path) -> None:
    """Other products leave tables out while they are empty (QEMU cannot write such images)."""
    for directory in ((27, 0), (0, 0)):
        path = tmp_path / "image"
        path.write_bytes(hosted([32, 0, 40] if directory[0] else [], directory))
        with Graph().open(str(path), "vmdk", OpenFlags(writable=True)) as node:
            data = bytearray(node.pread(0, node.size))
            for offset in (5000, 20 * GRAIN * SECTOR, node.size - 700):
                node.pwrite(offset, b"new" * 100)
                data[offset : offset + 300] = b"new" * 100
            assert node.pread(0, node.size) == data
        same("check image", tmp_path)
        assert theirs(["convert", "-f", "vmdk", "-O", "raw", "image", "raw"], tmp_path).code == 0
        assert (tmp_path / "raw").read_bytes() == data
        # the redundant directory tells the same
        whole = path.read_bytes()
        path.write_bytes(with_field(whole, *FIELDS["gdOffset"], struct.unpack_from("<Q", whole, FIELDS["rgdOffset"][0])[0]))
        with Graph().open(str(path), "vmdk") as node:
            assert node.pread(0, node.size) == data


def test_a_table_outside_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for directory in ((9999, 27), (0xFFFFFFFF, 27)):
        path.write_bytes(hosted([], directory))
        with pytest.raises(Error, match="not inside the file"), Graph().open(str(path), "vmdk", OpenFlags(writable=True)) as node:
            node.pwrite(0, b"x")
        assert path.stat().st_size < 1 << 20


# -- descriptors ------------------------------------------------------------------------------------------------------


def test_extent_lines(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(content(M))
    (tmp_path / "a b").write_bytes(content(M))
    (tmp_path / "sparse").write_bytes(hosted([32, 0, 40]))
    (tmp_path / "cowd").write_bytes(cowd([37, 38, 0, 40, 1]))
    (tmp_path / "se").write_bytes(sesparse([sesparse_grain(0), sesparse_grain(1), 1 << 60, 2 << 60, 0, sesparse_grain(5)]))
    for kind, lines in (
        ("monolithicFlat", 'RW 2048 FLAT "flat" 0'),
        ("monolithicFlat", 'RW 2048 FLAT "a b" 0'),
        ("monolithicFlat", 'RW 1000 FLAT "flat" 7'),
        ("monolithicFlat", 'RW 4096 FLAT "flat" 0'),
        ("vmfs", 'RW 2048 VMFS "flat"'),
        ("vmfs", 'RW 2048 VMFS "flat" 0'),
        ("twoGbMaxExtentFlat", 'RW 10 FLAT "flat" 3\nRW 20 FLAT "flat" 1\nRW 30 FLAT "flat" 0'),
        ("twoGbMaxExtentSparse", 'RW 256 SPARSE "sparse"\nRW 256 SPARSE "sparse"'),
        ("twoGbMaxExtentSparse", 'RW 256 SPARSE "sparse"\nRW 70 FLAT "flat" 0'),
        ("vmfsSparse", 'RW 8192 VMFSSPARSE "cowd"'),
        ("seSparse", 'RW 65536 SESPARSE "se"'),
        ("monolithicFlat", 'RW 2048 FLAT "flat"'),
        ("monolithicFlat", 'RW 2048 FLAT "flat" -1'),
        ("monolithicFlat", 'RW 2048 VMFS "flat" 5'),
        ("monolithicFlat", 'RW 2048 SPARSE "flat" 5'),
        ("monolithicFlat", 'RW 2048 SPARSE "flat"'),
        ("monolithicFlat", 'RW 2048 SESPARSE "flat"'),
        ("monolithicFlat", 'RW 2048 SPARSE "image"'),
        ("monolithicFlat", 'RW 2048 FLAT "nothing" 0'),
        ("monolithicFlat", 'RW 2048 FLAT "nbd:x" 0'),
        ("monolithicFlat", 'RW 2048 FLAT "." 0'),
        ("monolithicFlat", 'RW 9223372036854775807 FLAT "flat" 0'),
        ("custom", 'RW 2048 FLAT "flat" 0'),
        ("fullDevice", 'RW 2048 FLAT "flat" 0'),
    ):
        (tmp_path / "image").write_text(descriptor(lines, kind))
        if same("info image", tmp_path).code == 0:
            same("map --output=json image", tmp_path)
            same("check image", tmp_path)
            theirs(["convert", "-O", "raw", "image", "raw"], tmp_path)
            assert ours(["compare", "-F", "raw", "image", "raw"], tmp_path).code == 0, lines
    for damaged in (dict(cid="x y"), dict(more='parentFileNameHint="flat\n'), dict(parent="zz")):
        (tmp_path / "image").write_text(descriptor('RW 2048 FLAT "flat" 0', "monolithicFlat", **damaged))
        assert ours(["info", "--backing-chain", "image"], tmp_path).code in (0, 1)


def test_options_of_extents(tmp_path: Path) -> None:
    """They add to how an extent is opened, and put no other file in its place."""
    setup(
        "qemu-img create -q -f vmdk -o subformat=monolithicFlat a.vmdk 1M; qemu-io -f vmdk -c 'write -P 5 4k 8k' a.vmdk; qemu-img create -q -f vmdk b.vmdk 1M",
        tmp_path,
    )
    for line, code in (
        ("extents.0.locking=off", 0),
        ("extents.0.driver=file,extents.0.locking=auto", 0),
        ("extents.0.driver=raw", 0),
        ("extents.0.driver=raw,extents.0.file.locking=off", 0),
        ("extents.0.driver=raw,extents.0.offset=4k,extents.0.size=1M", 1),
        ("extents.0.node-name=x,extents.0.read-only=on,extents.0.cache.direct=off", 0),
        ("extents.0.filename=b.vmdk", 1),
        ("extents.0.driver=file,extents.0.filename=b.vmdk", 1),
        ("extents.0.driver=raw,extents.0.file.filename=b.vmdk", 1),
        ("extents.0=x", 1),
        ("extents.0.bogus=1", 1),
        ("extents.0.driver=bogus", 1),
        ("extents.0.driver=qcow2", 1),
        ("extents.1.locking=off", 1),
        ("extents.0.locking=off,extents.1.locking=off", 1),
        ("extents.x=off", 1),
        ("extents=off", 1),
    ):
        assert same("map --output=json --image-opts driver=vmdk,file.filename=a.vmdk," + line, tmp_path).code == code
    assert same("map --image-opts driver=vmdk,file.filename=b.vmdk,extents.0.locking=off", tmp_path).code == 1
    for extents in (
        '"extents": [{"locking": "off"}]',
        '"extents.0": {"driver": "raw"}',
        '"extents.0": "x"',
        '"extents": [{"filename": "b.vmdk"}]',
        '"extents": []',
    ):
        same("map --output=json " + shlex.quote('json:{"driver": "vmdk", "file.filename": "a.vmdk", %s}' % extents), tmp_path)


def test_descriptors_of_other_products(tmp_path: Path) -> None:
    """Spaces, carriage returns, a byte order mark, code pages, empty lines, paths of Windows."""
    data = content(M)
    plain = descriptor('RW 2048 FLAT "flat" 0', "monolithicFlat")
    name = "Festplatte \xfc.vmdk"
    for number, text in enumerate(
        (
            plain.encode(),
            plain.replace("=", " = ").encode(),
            plain.replace("\n", "\r\n").encode(),
            plain.replace("\n", " \r\n").replace("=", " = ").encode(),
            b"\xef\xbb\xbf" + plain.encode(),
            plain.replace("version=1", 'version=1\nencoding="windows-1252"').replace('"flat"', '"%s"' % name).encode("cp1252"),
            plain.replace("version=1", 'version=1\nencoding="UTF-8"').replace('"flat"', '"%s"' % name).encode(),
            plain.replace("# Extent description\n", "\n\n").encode(),  # QEMU takes the extent twice
            plain.replace('"flat"', '"C:\\\\disks\\flat"').encode(),
            plain.encode() + b"\0" * 700,
        )
    ):
        (tmp_path / "flat").write_bytes(data)
        (tmp_path / name).write_bytes(data)
        (tmp_path / "image").write_bytes(text)
        with Graph().open(str(tmp_path / "image")) as node:
            assert (node.driver, node.size, node.pread(0, M)) == ("vmdk", M, data), number
        with Graph().open(str(tmp_path / "image"), flags=OpenFlags(writable=True)) as node:
            node.pwrite(5, b"new")
        changed = (tmp_path / "image").read_bytes()
        assert len(changed) == len(text) and re.sub(rb"(?<=CID)( ?= ?)[0-9a-f]{8}", b"", changed) == re.sub(rb"(?<=CID)( ?= ?)[0-9a-f]{8}", b"", text)
        assert changed != text


def test_extents_that_are_not_written(tmp_path: Path) -> None:
    """QEMU passes over all of them, so that everything behind is somewhere else."""
    data = content(M)
    (tmp_path / "flat").write_bytes(data)
    for lines, expected in (
        ('RW 2048 FLAT "flat" 0\nRDONLY 10 FLAT "flat" 3\nRW 1 FLAT "flat" 1', data + data[3 * SECTOR : 13 * SECTOR] + data[SECTOR : 2 * SECTOR]),
        ('RW 10 ZERO\nRW 5 FLAT "flat" 300\nRW 7 ZERO\nRW 9 ZERO', bytes(10 * SECTOR) + data[300 * SECTOR : 305 * SECTOR] + bytes(16 * SECTOR)),
        ("RW 3 ZERO", bytes(3 * SECTOR)),
    ):
        (tmp_path / "image").write_text(descriptor(lines, "monolithicFlat"))
        with Graph().open(str(tmp_path / "image")) as node:
            assert node.pread(0, node.size) == expected
        assert ours(["info", "image"], tmp_path).code == 0
        with pytest.raises(Error), Graph().open(str(tmp_path / "image"), flags=OpenFlags(writable=True)) as node:
            node.pwrite(0, b"x")
    (tmp_path / "image").write_text(descriptor('RW 2048 FLAT "flat" 0\nNOACCESS 10 FLAT "flat" 0', "monolithicFlat"))
    with pytest.raises(Error, match="may not be accessed"):
        Graph().open(str(tmp_path / "image"))


def test_what_is_no_descriptor(tmp_path: Path) -> None:
    for text in ("#!/bin/sh\nversion=1\n", "# foo\n\n# bar\n  \nversion=3\nx\n", "#\nversion=4\n", "#\nversion=1", "version=1\nx\n", "#\nCID=1\nversion=1\n"):
        (tmp_path / "image").write_text(text)
        same("info image", tmp_path)


def test_extents_stay_where_the_policy_wants_them(tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    outside.write_bytes(bytes(M))
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    for name in ("../secret", str(outside), "link", "x/../../secret"):
        (inside / "image").write_text(descriptor('RW 2048 FLAT "%s" 0' % name, "monolithicFlat"))
        with pytest.raises(Denied, match="extents.0"):
            Graph(OpenPolicy("same_directory")).open(str(inside / "image"))
        with pytest.raises(Denied):
            Graph(OpenPolicy("none")).open(str(inside / "image"))
    (inside / "flat").write_bytes(bytes(M))
    (inside / "image").write_text(descriptor('RW 2048 FLAT "flat" 0', "monolithicFlat"))
    Graph(OpenPolicy("same_directory")).open(str(inside / "image")).close()


# -- backing files ----------------------------------------------------------------------------------------------------


def test_overlays(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(content(3 * M))
    setup("qemu-img convert -f raw -O vmdk raw base.vmdk", tmp_path)
    for number, (make, options) in enumerate(((theirs, ""), (ours, ""), (ours, "-o subformat=twoGbMaxExtentSparse,zeroed_grain=on"))):
        name = "top%d.vmdk" % number
        assert make(["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", *options.split(), name], tmp_path).code == 0
        setup("qemu-io -f vmdk -c 'write -P 5 100k 70k' %s" % name, tmp_path)
        with Graph().open(str(tmp_path / name), "vmdk", OpenFlags(writable=True)) as node:
            node.pwrite(M + 7, b"new")
            node.pwrite_zeroes(2 * M, 200 * K)
        for line in ("info", "info --backing-chain", "check", "map", "map --output=json"):
            same("%s %s" % (line, name), tmp_path)
        theirs(["convert", "-O", "raw", name, "raw"], tmp_path)
        assert ours(["compare", "-F", "raw", name, "raw"], tmp_path).code == 0
    assert ours(["convert", "-O", "vmdk", "-B", "base.vmdk", "-F", "vmdk", "top0.vmdk", "again.vmdk"], tmp_path).code == 0
    same("compare top0.vmdk again.vmdk", tmp_path)
    # a base that changed is no base any more
    with Graph().open(str(tmp_path / "base.vmdk"), "vmdk", OpenFlags(writable=True)) as node:
        node.pwrite(0, b"changed")
    for line in ("check top0.vmdk", "info --backing-chain top0.vmdk"):
        same(line, tmp_path)
    for line in ("convert -O raw top0.vmdk out", "compare base.vmdk top0.vmdk"):
        assert ours(line.split(), tmp_path).err.startswith(theirs(line.split(), tmp_path).err)  # we say why


def test_a_stale_parent_is_not_written_over(tmp_path: Path) -> None:
    setup("qemu-img create -f vmdk base.vmdk 1M; qemu-img create -f vmdk -b base.vmdk -F vmdk top.vmdk; qemu-io -c 'write 0 1k' base.vmdk", tmp_path)
    with Graph().open(str(tmp_path / "top.vmdk"), "vmdk", OpenFlags(writable=True)) as node:
        with pytest.raises(Error, match="parentCID"):
            node.pwrite(5, b"x")


def test_a_loop_of_parents(tmp_path: Path) -> None:
    for name, parent in (("a", "b"), ("b", "a"), ("c", "c")):
        text = descriptor('RW 2048 FLAT "flat" 0', "monolithicFlat", parent="1234abcd", more='parentFileNameHint="%s"\n' % parent)
        (tmp_path / name).write_text(text)
    (tmp_path / "flat").write_bytes(bytes(M))
    for name in "abc":
        assert "infinite loop" in ours(["map", name], tmp_path).err


# -- streams ----------------------------------------------------------------------------------------------------------


def test_the_sample(tmp_path: Path) -> None:
    path = sample("iotest-version3.vmdk", tmp_path)
    for line in ("info", "info --output=json", "check", "map --output=json", "measure -O qcow2"):
        same("%s %s" % (line, path.name), tmp_path)
    theirs(["convert", "-O", "qcow2", path.name, "qcow2"], tmp_path)
    assert ours(["compare", path.name, "qcow2"], tmp_path).code == 0
    with Graph().open(str(path), flags=OpenFlags(writable=True)) as node:
        with pytest.raises(Error, match="footer"):
            node.write_compressed(15 << 30, b"x" * 65536)


def test_streams_of_other_products(tmp_path: Path) -> None:
    grains = {0: squeezed(7), 1: squeezed(8), 5: squeezed(9), 16: zlib.compress(random.Random(1).randbytes(3000) + bytes(1096)), 31: squeezed(1)}
    for markers in (True, False):
        for footer in (True, False):
            (tmp_path / "image").write_bytes(stream(grains, markers, footer))
            for line in ("info", "check", "map --output=json"):
                same(line + " image", tmp_path)
            theirs(["convert", "-O", "raw", "image", "raw"], tmp_path)
            assert ours(["compare", "-F", "raw", "image", "raw"], tmp_path).code == 0


def test_streams_into_pipes(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(content(40 * M + SECTOR))
    (tmp_path / "empty").write_bytes(b"")
    program = "import sys; from diskwright.cli import main; sys.argv[0] = 'diskwright'; sys.exit(main())"
    for name, size in (("raw", 40 * M + SECTOR), ("empty", 0)):
        line = [sys.executable, "-c", program, "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", name, "-"]
        done = subprocess.run(line, cwd=tmp_path, stdout=subprocess.PIPE, timeout=60, check=True)
        (tmp_path / "image").write_bytes(done.stdout)
        with Graph().open(str(tmp_path / "image")) as node:
            assert node.size == size
        if size:
            same("info image", tmp_path)
            same("check image", tmp_path)
            assert same("compare -F raw image raw", tmp_path).out == "Images are identical.\n"


def test_streams_take_grains_once(tmp_path: Path) -> None:
    setup("qemu-img create -f vmdk -o subformat=streamOptimized image 1M", tmp_path)
    chance = random.Random(2)
    data = bytearray(M)
    with Graph().open(str(tmp_path / "image"), "vmdk", OpenFlags(writable=True)) as node:
        for number in (3, 0, 9, 15):
            data[number << 16 : number + 1 << 16] = chance.randbytes(30000) + bytes(35536)
            node.write_compressed(number << 16, data[number << 16 : number + 1 << 16])
            assert node.pread(0, M) == data
        node.pwrite(4 << 16, b"d" * 131072)
        data[4 << 16 : 6 << 16] = b"d" * 131072
        for offset, length in ((0, 65536), (70000, 5), (1 << 16, 100)):
            with pytest.raises(Error):
                node.pwrite(offset, b"x" * length)
        assert node.pread(0, M) == data
    same("check image", tmp_path)
    theirs(["convert", "-f", "vmdk", "-O", "raw", "image", "raw"], tmp_path)
    assert (tmp_path / "raw").read_bytes() == data


def test_a_converted_image_is_written_in_few_requests(tmp_path: Path) -> None:
    """Neither a grain nor a table entry is written by itself."""
    from diskwright.commands.convert import convert
    from diskwright.protocols.file import File

    (tmp_path / "raw").write_bytes(random.Random(1).randbytes(8 * M))
    written: list[int] = []
    plain = File._pwrite

    def counted(self: File, offset: int, view: memoryview) -> None:
        written.append(len(view))
        plain(self, offset, view)

    try:
        File._pwrite = counted  # type: ignore[method-assign]
        for options in ("subformat=monolithicSparse", "subformat=streamOptimized"):
            written.clear()
            convert([str(tmp_path / "raw")], str(tmp_path / "image"), format="raw", target_format="vmdk", options=options)
            assert len(written) < 20, written
    finally:
        File._pwrite = plain  # type: ignore[method-assign]
    assert theirs(["compare", "raw", "image"], tmp_path).code == 0


# -- damage -----------------------------------------------------------------------------------------------------------

WHOLE = hosted([32, 0, 40, 48])
STREAM = stream({0: squeezed(7), 1: squeezed(8), 20: squeezed(9)})


def test_damaged_headers(tmp_path: Path) -> None:
    """Each number at its edges, in QEMU's words; where we refuse more, a compressed grain would not fit into memory."""
    for whole in (WHOLE, STREAM):
        for name, (offset, code) in FIELDS.items():
            for value in edges(code, struct.unpack_from(code, whole, offset)[0])[:: 3 if whole is WHOLE else 4]:
                (tmp_path / "image").write_bytes(with_field(whole, offset, code, value))
                if name in ("gdOffset", "rgdOffset", "capacity") and (value >> 50 or not value) or name in ("descriptorOffset", "grainSize"):
                    continue  # numbers that QEMU lets wrap, and what docs/differences.md has
                same("check -f vmdk image", tmp_path)


def test_hostile_images(tmp_path: Path) -> None:
    refused = set()
    path = tmp_path / "image"
    with little_memory():
        for whole in (WHOLE, STREAM):
            for name, (offset, code) in FIELDS.items():
                for value in edges(code, struct.unpack_from(code, whole, offset)[0]):
                    if attempt(path, "vmdk", with_field(whole, offset, code, value)):
                        refused.add(name)
            for length in [*range(0, 90, 2), *range(90, len(whole), 997)]:
                attempt(path, "vmdk", whole[:length])
        for entries in ([1] * 16, [0xFFFFFFFF] * 16, [27] * 16, [22, 24, 21], [32, 33, 34, 35]):
            attempt(path, "vmdk", hosted(entries, flags=7))
            attempt(path, "vmdk", hosted(entries, (22, 22)))
            attempt(path, "vmdk", hosted(entries, (0, 1)))
    assert {"version", "capacity", "grainSize", "descriptorOffset", "numGTEsPerGT", "overHead", "gdOffset", "magicNumber"} - refused == {"magicNumber"}


def test_hostile_extents(tmp_path: Path) -> None:
    """COWD and seSparse extents with each number at its edges, and descriptors without end."""
    image, extent = tmp_path / "image", tmp_path / "extent"
    makers = (
        ("vmfsSparse", "VMFSSPARSE", cowd([37, 38]), COWD_FIELDS),
        ("seSparse", "SESPARSE", sesparse([sesparse_grain(1), 1 << 60, 0xFFFFFFFFFFFFFFFF, 0x3FFF << 48, 0x3FFF << 48 | 5]), SESPARSE_FIELDS),
    )
    with little_memory():
        for kind, word, whole, fields in makers:
            image.write_text(descriptor('RW 8192 %s "extent"' % word, kind))
            for offset, code in fields.values():
                for value in edges(code, struct.unpack_from(code, whole, offset)[0])[::2]:
                    extent.write_bytes(with_field(whole, offset, code, value))
                    attempt(image, "vmdk")
            for length in range(0, 1024, 79):
                extent.write_bytes(whole[:length])
                attempt(image, "vmdk")
        extent.write_bytes(bytes(M))
        line = 'RW 1 FLAT "extent" 0\n'
        for text in (
            descriptor(line * 5000, "monolithicFlat"),
            descriptor('RW 9007199254740992 FLAT "extent" 0\n' * 1100, "monolithicFlat"),
            descriptor(line, "monolithicFlat") + "x" * (3 << 20),
            descriptor(line, "monolithicFlat") + "a=b\n" * (1 << 18),
            descriptor('RW 1 FLAT "%s" 0' % ("x" * 5000), "monolithicFlat"),
            descriptor('RW 1 FLAT "a\0b" 0', "monolithicFlat"),
            descriptor(line, "monolithicFlat", cid="f" * 5000),
            descriptor(line, "monolithicFlat", more='parentFileNameHint="%s"\n' % ("x" * 70000)),
            descriptor('RW %s FLAT "extent" 0' % ("9" * 6000), "monolithicFlat"),
            "# Disk DescriptorFile\nversion=1\n" + '"' * 100000,
        ):
            image.write_text(text)
            attempt(image, "vmdk")


def test_dirty_sesparse_extents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_text(descriptor('RW 65536 SESPARSE "se"', "seSparse"))
    for fields in (dict(dirty=1), dict(version=1), dict(grain_size=16), dict(grain_table_size=32), dict(flags=1), dict(reserved3=1), dict(magic=5)):
        (tmp_path / "se").write_bytes(sesparse([], **fields))
        assert ours(["info", "image"], tmp_path).code == theirs(["info", "image"], tmp_path).code == 1, fields


def test_bombs(tmp_path: Path) -> None:
    """Grains that promise more than they are, or are not what they promise."""
    zeroes = zlib.compress(bytes(200 << 20), 9)
    path = tmp_path / "image"
    grains = (zeroes, squeezed(1)[:-9], b"", b"\0" * 50, zlib.compress(b"short"), squeezed(1)[:3] + b"\xff" * 40)
    with little_memory():
        for grain in grains:
            path.write_bytes(stream({0: squeezed(5), 1: grain, 2: squeezed(6)}))
            attempt(path, "vmdk")
            with Graph().open(str(path), "vmdk") as node:
                assert node.pread(0, 4096) == b"\5" * 4096 and node.pread(8192, 4096) == b"\6" * 4096
                with pytest.raises(Error, match="grain at 0x1000"):
                    node.pread(4096, 10)
        huge = stream({0: zeroes}, grainSize=1 << 21, capacity=1 << 30, numGTEsPerGT=1)
        path.write_bytes(huge)
        assert attempt(path, "vmdk")
        path.write_bytes(stream({number: squeezed(5) for number in range(32)}).replace(struct.pack("<I", len(squeezed(5))), struct.pack("<I", 1 << 31)))
        attempt(path, "vmdk")


def test_a_disk_without_end_takes_no_time(tmp_path: Path) -> None:
    """256 TiB of holes."""
    path = tmp_path / "image"
    with little_memory():
        path.write_bytes(hosted([], (0, 0), gtes=512, capacity=1 << 39, grainSize=128))
        assert attempt(path, "vmdk") is not None  # its directory would not fit into the file, so it cannot be written
        with Graph().open(str(path), "vmdk") as node:
            assert node.size == 1 << 48
            assert len(node.block_status(0, node.size)) == 1
            node.check()
        assert ours(["create", "-q", "-f", "vmdk", "image", "60T"], tmp_path).code == 0  # with room for all tables
        with Graph().open(str(path), "vmdk", OpenFlags(writable=True)) as node:
            node.pwrite(30 << 40, b"x")
        with Graph().open(str(path), "vmdk") as node:
            assert len(node.block_status(0, node.size)) == 3
            node.check()
