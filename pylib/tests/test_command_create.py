# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`create` against qemu-img: the texts, and the images that come out."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

import diskwright
from side_by_side import difference, ours, setup, theirs, twins

GALLERY = r"""
qemu-img create -f raw a.raw 1M
head -c 3M /dev/urandom > data.raw
head -c 1000 /dev/urandom > odd.raw
cp a.raw 'a b,c'
qemu-img create -f qcow2 plain.qcow2 2M
qemu-img create -f qcow2 -b data.raw -F raw over.qcow2; qemu-io -c 'write 1M 64k' over.qcow2
qemu-img create -f qcow2 -u -b gone -F raw gone.qcow2 1M
mkdir sub dir; qemu-img create -f qcow2 -b ../data.raw -F raw sub/up.qcow2
head -c 2M /dev/urandom > old; ln -s old link; ln -s new dangling
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("create") / "gallery"
    path.mkdir()
    setup(GALLERY, path)
    return twins(path)


LINES = [
    "x",
    "-f raw x",
    "-f qcow2 x",
    *(
        "-f %s x %s" % (format, size)
        for format in ("raw", "qcow2")
        for size in ("0 1 512 1000 1M 1000000 1.5G 2G 7.9E 1E 8E 9223372036854775807 9223372036854775296 -1 abc 1.5 0x10000 1P 32T 64T".split())
    ),
    *(
        "-f %s -o size=%s x" % (format, size)
        for format in ("raw", "qcow2")
        for size in ("0 1000 1M 1.5 -1 18446744073709551615 9223372036854775808 20E".split())
    ),
    *(
        "-f raw -o %s x 1M" % options
        for options in (
            "preallocation=off preallocation=falloc preallocation=full preallocation=metadata preallocation=bad preallocation nocow=on nocow=off "
            "nonocow nocow nocow=bad extent_size_hint=0 preallocation=falloc,nocow=on,extent_size_hint=0 nosuch=1 nosuch size=2M "
            "preallocation=falloc,preallocation=off cluster_size=64k backing_file=a.raw backing_fmt=raw"
        ).split()
    ),
    *(
        "-f qcow2 -o %s x 3M" % options
        for options in (
            "cluster_size=512 cluster_size=1k,cluster_size=2k cluster_size=2M cluster_size=4M cluster_size=3k cluster_size=abc cluster_size=256 "
            "cluster_size=0 compat=0.10 compat=v2 compat=v3 compat=1.1 compat=9 compat= lazy_refcounts=on lazy_refcounts=yes lazy_refcounts "
            "nolazy_refcounts lazy_refcounts=maybe lazy_refcounts=on,compat=0.10 refcount_bits=1 refcount_bits=64 refcount_bits=3 refcount_bits=128 "
            "refcount_bits=abc refcount_bits=0 refcount_bits=-1 refcount_bits=8,compat=0.10 preallocation=off preallocation=metadata "
            "preallocation=falloc preallocation=full preallocation=bad preallocation=metadata,cluster_size=512 compression_type=zlib "
            "compression_type=zstd compression_type=x compression_type=zstd,compat=0.10 extended_l2=on,cluster_size=4k extended_l2=on,compat=0.10 "
            "data_file_raw=on nocow=on,preallocation=metadata,extent_size_hint=0 backing_fmt=raw backing_file= nosuch=1 size=1M "
            "size=1M,nosuch=1 ,cluster_size=1k cluster_size=1k, encrypt.format=bad encryption=off encrypt.format=luks"
        ).split()
    ),
    "-f qcow2 -o compat=1.1 -o cluster_size=128k -o refcount_bits=8 x 5M",
    "-f nosuch x 1M",
    "-f file x 1M",
    "-f file -o preallocation=full x 1M",
    "-f null-co x 1M",
    "-f qcow2 foo:bar 1M",
    "-f raw null-co:// 1M",
    "-f raw file:x 1M",
    "-f qcow2 file:x 1M",
    "-f qcow2 '' 1M",
    "-f raw '' 1M",
    "-f raw nosuch/x 1M",
    "-f qcow2 nosuch/x 1M",
    "-f raw dir 1M",
    "-f qcow2 dir 1M",
    "-f qcow2 / 1M",
    "-f raw a.raw/x 1M",
    "-f raw old 1M",
    "-f raw -o preallocation=bad old 1M",
    "-f qcow2 old 1M",
    "-f qcow2 link 1M",
    "-f raw dangling 1M",
    "-f qcow2 dangling 1M",
    "-f raw /dev/null 0",
    "-f raw /dev/null 1M",
    "-f qcow2 'x y,z' 1M",
    """-f qcow2 'json:{"driver":"qcow2"}' 1M""",
    "-q -f qcow2 x 1M",
    "-q -f raw x 1M",
    "-q x",
    "-f raw -b a.raw x 1M",
    "-f raw -b a.raw -F raw x 1M",
    "-f raw -F raw x 1M",
    *(
        "-f qcow2 %s" % options
        for options in (
            "-b a.raw x",
            "-b a.raw x 1M",
            "-b a.raw -F raw x",
            "-b a.raw -F raw x 5M",
            "-b a.raw -F raw x 1k",
            "-b odd.raw -F raw x",
            "-b plain.qcow2 -F qcow2 x",
            "-b plain.qcow2 -F raw x",
            "-b plain.qcow2 x",
            "-b over.qcow2 -F qcow2 x",
            "-b over.qcow2 -F qcow2 -o compat=0.10 x",
            "-F raw x 1M",
            "-b nosuch -F raw x",
            "-b nosuch -F raw x 1M",
            "-b nosuch x 1M",
            "-u -b nosuch -F raw x",
            "-u -b nosuch -F raw x 1M",
            "-u -b nosuch x 1M",
            "-u -b nosuch -F nosuch x 1M",
            "-u -b plain.qcow2 -F qcow2 x",
            "-b x -F qcow2 x",
            "-u -b x -F qcow2 x 1M",
            "-b a.raw -F nosuch x",
            "-b a.raw -F '' x",
            "-b a.raw -F qcow2 x",
            "-b a.raw -F file x",
            "-b a.raw -F null-co x",
            "-b '' -F raw x 1M",
            "-b '' x 1M",
            "-b gone.qcow2 -F qcow2 x",
            "-b gone.qcow2 -F qcow2 x 1M",
            "-b null-co:// -F raw x",
            "-b foo:x -F raw x",
            "-b dir -F raw x",
            "-b 'a b,c' -F raw x",
            "-b ../a.raw -F raw sub/x",
            "-b a.raw -F raw sub/x",
            "-b up.qcow2 -F qcow2 sub/x",
            "-b file:a.raw -F raw x",
            "-b sub/up.qcow2 -F qcow2 x",
            "-o backing_file=a.raw,backing_fmt=raw x",
            "-o backing_file=a.raw x",
            "-o backing_file=nosuch,backing_fmt=raw -b a.raw x",
            "-o backing_file=nosuch -b a.raw -F raw x",
            "-F raw -o backing_file=a.raw x",
            "-F raw -o backing_file=a.raw,backing_fmt=qcow2 x",
            "-o backing_file='a b,,c',backing_fmt=raw x",
            "-b a.raw -F raw -o preallocation=full x",
            "-b a.raw -F raw -o preallocation=metadata x",
            "-b a.raw -F raw -o cluster_size=512 x",
            "-b a.raw -F raw -o data_file_raw=on x",
            """-b 'json:{"driver":"raw","file":{"driver":"file","filename":"a.raw"}}' -F raw x""",
            """-b 'json:{"driver":"raw","file":{"driver":"file","filename":"a.raw"}}' x""",
            """-b 'json:{"driver":"raw","offset":512,"size":1024,"file":{"driver":"file","filename":"a.raw"}}' -F raw x""",
            "-b %s -F raw x" % ("d/" * 600 + "a.raw"),
            "-u -b %s -F raw x 1M" % ("n" * 1023),
            "-u -b %s -F raw x 1M" % ("n" * 1024),
            "-u -b n -F %s x 1M" % ("n" * 300),
        )
    ),
]

# Where an existing file is destroyed by qemu-img for a mistake in the options, ours survives (docs: deliberate differences).
SAFER = ["-f qcow2 -o cluster_size=3k old 1M", "-f qcow2 -o refcount_bits=3 old 1M", "-f qcow2 old 7.9E"]


def listing(place: Path) -> dict[str, int]:
    return {str(path.relative_to(place)): path.stat().st_size for path in place.rglob("*") if path.is_file() and not path.is_symlink()}


@pytest.mark.parametrize("line", LINES)
def test_lines(pair: tuple[Path, Path], line: str) -> None:
    args = ["create", *shlex.split(line)]
    source = pair[0].with_name("gallery")
    expected = theirs(args, pair[0])
    found = ours(args, pair[1])
    try:
        assert found == expected, difference(line, found, expected)
        left, right = (listing(place) for place in pair)
        # what it could not make, qemu-img does not always take away
        assert set(left) == set(right) or expected.code and set(right) < set(left)
        for name in set(right) - set(listing(source)) | {"old"}:
            compare(name, *pair, exact="preallocation=f" not in line)
    finally:
        for copy in pair:
            for name in set(listing(copy)) - set(listing(source)):
                (copy / name).unlink()
            subprocess.run(["cp", "-a", str(source / "old"), str(copy)], check=True)


def compare(name: str, left: Path, right: Path, exact: bool) -> None:
    """Both are the same image: by info and check, and byte for byte; without `exact` metadata may lie elsewhere."""
    described = [theirs(["info", "--output=json", name], place).out for place in (left, right)]
    without_disk_size = ["\n".join(row for row in text.splitlines() if '"actual-size"' not in row) for text in described]
    assert without_disk_size[0] == without_disk_size[1]
    assert theirs(["check", name], right) == theirs(["check", name], left)
    if not exact:
        assert theirs(["compare", str(left / name), str(right / name)], left).code == 0
    elif (left / name).stat().st_size < 1 << 30:
        assert (left / name).read_bytes() == (right / name).read_bytes()
    assert abs((left / name).stat().st_blocks - (right / name).stat().st_blocks) <= 160


@pytest.mark.parametrize("line", SAFER)
def test_a_mistake_in_the_options_destroys_nothing(pair: tuple[Path, Path], line: str) -> None:
    """The texts are qemu-img's; the file that was there still is."""
    args = ["create", *shlex.split(line)]
    source = pair[0].with_name("gallery")
    expected = theirs(args, pair[0])
    try:
        found = ours(args, pair[1])
        assert found == expected, difference(line, found, expected)
        assert (pair[1] / "old").read_bytes() == (source / "old").read_bytes()
    finally:
        subprocess.run(["cp", "-a", str(source / "old"), str(pair[0])], check=True)


@pytest.mark.parametrize("line", ["-f qcow2 -b ./plain.qcow2 -F qcow2 plain.qcow2", "-f qcow2 -b top.qcow2 -F qcow2 data.raw"])
def test_a_loop_is_refused(tmp_path: Path, line: str) -> None:
    """qemu-img compares names only, and destroys the backing file; here the file is what counts, wherever it is in the chain."""
    setup(GALLERY + "qemu-img create -f qcow2 -b over.qcow2 -F qcow2 top.qcow2", tmp_path)
    found = ours(["create", *shlex.split(line)], tmp_path)
    assert found.code == 1
    assert "Trying to create an image with the same filename as the backing file" in found.err
    assert theirs(["check", "plain.qcow2"], tmp_path).code == 0
    assert (tmp_path / "data.raw").stat().st_size == 3 << 20


def test_in_use(pair: tuple[Path, Path]) -> None:
    """An image that another process has open is not overwritten."""
    place = pair[1]
    setup("qemu-img create -f qcow2 held.qcow2 1M", place)
    holder = subprocess.Popen(["qemu-io", "-f", "qcow2", "held.qcow2"], cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdin and holder.stdout
        holder.stdin.write("length\n")
        holder.stdin.flush()
        while "1 MiB" not in holder.stdout.readline():
            pass
        for line in ("-f qcow2 held.qcow2 2M", "-f raw held.qcow2 2M", "-f qcow2 -b held.qcow2 -F qcow2 fresh"):
            args = ["create", *line.split()]
            expected = theirs(args, place)
            assert ours(args, place) == expected
        assert "1048576" in theirs(["info", "-U", "held.qcow2"], place).out
    finally:
        holder.communicate("quit\n")
        (place / "held.qcow2").unlink()
        (place / "fresh").unlink(missing_ok=True)


def test_function(tmp_path: Path) -> None:
    """The function prints nothing; announce gets the line."""
    said: list[str] = []
    diskwright.create(str(tmp_path / "x"), 1000, format="qcow2", options="cluster_size=4k", announce=said.append)
    assert said == [
        "Formatting '%s', fmt=qcow2 cluster_size=4096 extended_l2=off compression_type=zlib size=1000 lazy_refcounts=off refcount_bits=16\n" % (tmp_path / "x")
    ]
    assert diskwright.info(str(tmp_path / "x"))[0].virtual_size == 1024
    with pytest.raises(diskwright.OptionError, match="^%s: Invalid parameter 'nosuch'" % (tmp_path / "y")):
        diskwright.create(str(tmp_path / "y"), 512, options="nosuch=1")
    assert not (tmp_path / "y").exists()
