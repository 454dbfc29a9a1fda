# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""vvfat: sizes and words beside qemu-img's, file systems that fsck.fat and mtools accept, and what they write back in the directory."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from side_by_side import ours, same, setup

from diskwright.errors import Error
from diskwright.graph import Graph, open_image
from diskwright.node import Node, OpenFlags

K = 1024
PARTITION = 63 * 512
KINDS = ["", "12:", "16:", "32:", "floppy:", "12:floppy:", "floppy:16:"]


def run(*args: Any, code: int = 0) -> str:
    """Run a program, which must end with `code`; what it says."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    env = {**os.environ, "PATH": path, "MTOOLS_SKIP_CHECK": "0", "LC_ALL": "C.UTF-8"}
    done = subprocess.run([str(arg) for arg in args], capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.returncode == code, (args, done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with names and sizes of every kind."""
    place = tmp_path / "tree"
    (place / "sub" / "deep" / "deeper").mkdir(parents=True)
    (place / "EMPTY").mkdir()
    chance = random.Random(1)
    for name, size in {
        "HELLO.TXT": 6,
        "a long name, with spaces.text": 5,
        "lower.txt": 513,
        "zero": 0,
        "umlaut \u00e4\u00f6.c": 2,
        "two.dots.tar": 4096,
        ".hidden": 3,
        "trailing.": 1,
        "NOEXT": 1,
        "exactly thirteen"[:13]: 7,
        "x" * 200: 100,
        "sub/Data.bin": 100 * K,
        "sub/cluster": 8 * K,
        "sub/deep/deeper/file": 20,
    }.items():
        (place / name).write_bytes(chance.randbytes(size))
    for number in range(30):
        (place / "sub" / "deep" / ("many files like this %d" % number)).write_bytes(b"%d" % number)
    os.utime(place / "HELLO.TXT", (1e9, 1e9))
    os.utime(place / "zero", (0, 0))
    return place


def volume(path: Path, kind: str) -> str:
    """The volume in an image, as mtools name it."""
    return "%s@@%d" % (path, 0 if "floppy" in kind else PARTITION)


@pytest.mark.parametrize("kind", KINDS)
def test_file_systems(tmp_path: Path, tree: Path, kind: str) -> None:
    """Other programs find no fault with it, and the same files in it."""
    image = tmp_path / "image"
    assert ours(["convert", "-O", "raw", "fat:%s%s" % (kind, tree), str(image)], tmp_path).code == 0
    part, start = tmp_path / "part", 0 if "floppy" in kind else PARTITION
    with image.open("rb") as stream, part.open("wb") as copy:
        head = stream.read(8 << 20)  # behind it is nothing
        copy.write(head[start:])
        copy.truncate(image.stat().st_size - start)
    assert "FAT" not in run("fsck.fat", "-n", part).replace("fsck.fat", "")
    out = tmp_path / "out"
    out.mkdir()
    run("mcopy", "-s", "-n", "-m", "-i", volume(image, kind), "::*", out)
    (tree / "trailing.").rename(tree / "trailing_")  # a name in FAT does not end in a dot
    run("diff", "-r", tree, out)
    assert int((out / "HELLO.TXT").stat().st_mtime) == 1000000000
    assert "QEMU VVFAT" in run("mlabel", "-s", "-i", volume(image, kind), "::")
    if "floppy" not in kind:
        first, length = struct.unpack_from("<II", head, 446 + 8)
        assert first == 63 and (first + length) * 512 == image.stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_words_and_sizes(tmp_path: Path, tree: Path, kind: str) -> None:
    for line in ("info", "info --output=json", "map", "map --output=json", "measure -O qcow2", "check", "snapshot -l", "resize"):
        operand = "1G" if line == "resize" else ""
        if kind != "32:":  # which QEMU warns of
            same("%s fat:%s%s %s" % (line, kind, tree.name, operand), tmp_path)


def test_names_and_options(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for line in (
        "info fat:",
        "info fat:nope",
        "info fat:file",
        "info fat:64:tree",
        "info fat:ro:tree",
        "info fat:rw:tree",
        "info vvfat:tree",
        "info -f vvfat fat:tree",
        "info -f raw fat:tree",
        "info --image-opts driver=vvfat,dir=tree,fat-type=12,floppy=on,label=HALLO",
        "info --image-opts driver=vvfat,dir=tree,fat-type=8",
        "info --image-opts driver=vvfat,dir=tree,label=123456789012",
        "info --image-opts driver=vvfat,dir=tree,foo=1",
        "info --image-opts driver=vvfat",
        "info 'json:{\"driver\":\"vvfat\",\"dir\":\"tree\",\"fat-type\":16,\"rw\":false}'",
        "info 'json:{\"driver\":\"raw\",\"file\":{\"driver\":\"vvfat\",\"dir\":\"tree\"}}'",
        "create fat:tree 1M",
        "create -f vvfat fat:tree 1M",
        "convert -n -O raw file fat:tree",
        "bench -w -c 1 -f raw fat:tree",
    ):
        same(line, tmp_path)
    image = tmp_path / "image"
    name = "driver=vvfat,dir=%s,floppy=on,label=my label" % tree
    assert ours(["convert", "--image-opts", "-O", "raw", name, str(image)], tmp_path).code == 0
    assert "my label" in run("mlabel", "-s", "-i", image, "::")


def test_what_is_no_file_of_its_own(tmp_path: Path, tree: Path) -> None:
    """Pipes and links to nowhere are left out, links to files are files, circles are refused."""
    os.mkfifo(tree / "pipe")
    (tree / "nowhere").symlink_to("nothing")
    (tree / "link").symlink_to("HELLO.TXT")
    with open_image("fat:%s" % tree) as node:
        head = node.pread(0, 1 << 20)
        assert b"LINK       " in head and b"PIPE" not in head and b"NOWHERE" not in head
    (tree / "sub" / "up").symlink_to("..")
    with pytest.raises(Error, match="in a circle"):
        open_image("fat:%s" % tree)


def test_what_does_not_fit(tmp_path: Path) -> None:
    place = tmp_path / "large"
    place.mkdir()
    with (place / "file").open("wb") as stream:
        stream.truncate(600 << 20)
    same("info fat:large", tmp_path)
    same("info fat:floppy:large", tmp_path)
    with (place / "file").open("wb") as stream:
        stream.truncate(1 << 31)
    with pytest.raises(Error, match="is larger than 2GB"):
        open_image("fat:%s" % place)
    (place / "file").unlink()
    for number in range(600):
        (place / str(number)).write_bytes(b"")
    with pytest.raises(Error, match="Too many entries in root directory"):
        open_image("fat:%s" % place)
    with open_image("fat:32:%s" % place) as node:  # whose root has no limit
        assert node.size


def test_a_file_that_changes(tree: Path) -> None:
    """What a file does not have any more is zero; a file that is gone cannot be read."""
    path = tree / "sub" / "Data.bin"
    with open_image("fat:%s" % tree) as node:
        (place,) = [region[0] for region in node.children["file"].layout.regions if getattr(region[2], "path", "") == str(path)]
        path.write_bytes(b"short")
        assert node.pread(place, 10) == b"short" + bytes(5)
    with open_image("fat:%s" % tree) as node:
        path.unlink()
        with pytest.raises(OSError):
            node.pread(place, 512)


# -- writing ------------------------------------------------------------------------------------------------------------


def state(tree: Path) -> dict[Path, tuple[int, int, int]]:
    """All files and directories, as far as a change shows."""
    return {path: (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in tree.rglob("*")}


def opened(tree: Path, kind: str = "") -> Node:
    return Graph().open("fat:%srw:%s" % (kind, tree), "raw", OpenFlags(writable=True, resize=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_mtools_did(tmp_path: Path, tree: Path, kind: str) -> None:
    """An image that mtools changed is written over the disk: the directory has the changes, and nothing else."""
    image, want = tmp_path / "image", tmp_path / "want"
    assert ours(["convert", "-O", "raw", "fat:%s%s" % (kind, tree), str(image)], tmp_path).code == 0
    new = tmp_path / "new.bin"
    new.write_bytes(random.Random(2).randbytes(30000))
    on = volume(image, kind)
    run("mcopy", "-i", on, new, "::A new file with a long name.bin")
    run("mmd", "-i", on, "::new directory")
    run("mcopy", "-i", on, new, "::new directory/x.y")
    run("mdel", "-i", on, "::HELLO.TXT")
    run("mren", "-i", on, "::lower.txt", "::Renamed.text")
    run("mdeltree", "-i", on, "::sub/deep")
    run("mcopy", "-o", "-i", on, new, "::two.dots.tar")
    want.mkdir()
    run("mcopy", "-s", "-n", "-i", on, "::*", want)
    (want / "trailing_").rename(want / "trailing.")
    untouched = (tree / "sub" / "Data.bin").stat()
    assert ours(["convert", "-n", "-O", "raw", "-f", "raw", str(image), "fat:%srw:%s" % (kind, tree)], tmp_path).code == 0
    run("diff", "-r", want, tree)
    after = (tree / "sub" / "Data.bin").stat()
    assert (after.st_ino, after.st_mtime_ns) == (untouched.st_ino, untouched.st_mtime_ns)
    assert not [name for name in os.listdir(tree) if name.startswith(".vvfat")]


def test_writing_without_a_change(tree: Path) -> None:
    before = state(tree)
    with opened(tree) as node:
        node.pwrite(0, node.pread(0, 2 << 20))
        node.flush()
        node.pwrite_zeroes(400 << 20, 1 << 20)
    assert state(tree) == before


def test_the_disk_reads_as_it_was_written(tree: Path) -> None:
    chance = random.Random(3)
    with opened(tree, "floppy:") as node:
        content = bytearray(node.pread(0, node.size))
        spare = node.size - (256 << 10)  # where no file is
        for _turn in range(40):
            offset = spare + chance.randrange(200 << 10)
            length = chance.randrange(1, 5000)
            data = chance.randbytes(length) if chance.random() < 0.7 else bytes(length)
            if any(data):
                node.pwrite(offset, data)
            else:
                node.pwrite_zeroes(offset, length)
            content[offset : offset + length] = data
        assert node.pread(0, node.size) == content


def find(node: Node, name: bytes) -> int:
    """Where an entry of the root directory is."""
    head = node.pread(0, 1 << 20)
    return head.index(name)


def test_changes_piece_by_piece(tree: Path) -> None:
    """A flush in the middle, when nothing makes sense, changes nothing; the next one that does brings the directory up to date."""
    with opened(tree, "16:") as node:
        entry = find(node, b"HELLO   TXT")
        old = node.pread(entry, 32)
        node.pwrite(entry + 28, (100000).to_bytes(4, "little"))  # longer than its clusters
        node.flush()
        assert (tree / "HELLO.TXT").stat().st_size == 6
        node.pwrite(entry + 28, (3).to_bytes(4, "little"))
        node.flush()
        assert (tree / "HELLO.TXT").stat().st_size == 3
        node.pwrite(entry, b"\xe5")
        node.flush()
        assert not (tree / "HELLO.TXT").exists()
        node.pwrite(entry, old)
        node.flush()
        assert (tree / "HELLO.TXT").stat().st_size == 6


def test_what_is_not_brought_into_the_directory(tree: Path) -> None:
    """What makes no sense in the end is an error that says so, and the directory stays as it was."""
    before = state(tree)

    def damage(position: int, data: bytes, words: str) -> None:
        node = opened(tree, "16:")
        node.pwrite(position, data)
        with pytest.raises(Error, match=words):
            node.close()
        assert state(tree) == before

    with open_image("fat:16:%s" % tree) as node:
        entry = find(node, b"HELLO   TXT")
        first = node.pread(find(node, b"NOEXT      ") + 26, 2)
    damage(entry + 26, first, "used more than once")
    damage(entry + 26, b"\xf0\xff", "which is not there")
    damage(entry, b"NOEXT      ", "there are two of")
    damage(entry, b"A/B     TXT", "no file can have")
    damage(PARTITION + 13, b"\x01", "the boot sector is another one")
    damage(PARTITION + 512, bytes(252 * 512), "which is not there")


def test_names_of_others_are_left_alone(tree: Path) -> None:
    node = opened(tree, "16:")
    entry = find(node, b"HELLO   TXT")
    (tree / "OTHER.TXT").write_bytes(b"somebody else's")
    node.pwrite(entry, b"OTHER   TXT")
    with pytest.raises(Error, match="somebody else made"):
        node.close()
    assert (tree / "OTHER.TXT").read_bytes() == b"somebody else's" and (tree / "HELLO.TXT").exists()


def test_noise(tree: Path) -> None:
    """Whatever is written into the tables, it is a named error or a change inside of the directory."""
    around = sorted(tree.parent.iterdir())
    with open_image("fat:16:%s" % tree) as node:
        start, length = PARTITION + 512, 600 * 512
    chance = random.Random(4)
    for _turn in range(25):
        node = opened(tree, "16:")
        for _change in range(chance.randrange(1, 6)):
            node.pwrite(start + chance.randrange(length), chance.randbytes(chance.choice((1, 2, 32))))
            entry = find(node, b"NOEXT      ") if b"NOEXT      " in node.pread(0, 1 << 20) else start
            node.pwrite(entry + chance.randrange(64), chance.randbytes(1))
        try:
            node.close()
        except (Error, OSError) as exc:
            assert str(exc)
        assert sorted(tree.parent.iterdir()) == around


def test_nothing_is_committed_into_a_disk_that_is_not_writable(tmp_path: Path, tree: Path) -> None:
    setup("qemu-img create -q -f qcow2 -b fat:%s -F raw top; qemu-io -f qcow2 -c 'write 0 4k' top" % tree, tmp_path)
    found = ours(["commit", "top"], tmp_path)
    assert found.code == 1 and "Block format 'vvfat' used by node" in found.err and "does not support reopening files" in found.err
