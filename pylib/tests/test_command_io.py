# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`io`: scripts run by qemu-io and by us print the same, end with the same exit code, and leave the same content."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import diskwright
from effort import BRIEF
from io_side_by_side import masked, our_io, same_io, their_io
from side_by_side import setup, theirs, twins

SECRET = "--object secret,id=s,data=x "

GALLERY = r"""
qemu-img create -q -f qcow2 img 1M
qemu-img create -q -f raw raw 1M
qemu-img create -q -f raw empty 0
qemu-io -c 'write -P 1 0 300k' img > /dev/null
qemu-img create -q -f qcow2 -b img -F qcow2 overlay 3M
printf 'twelve bytes' > twelve
qemu-img create -q -f qcow2 target 1M
"""

WRONG = "x 4k|0 4x|0 3G|0 9E|0 99999999999999999999|0|2M 4k|1M 4k|1020k 8k|2M 0|-1 4|0 -1".split("|")
SCRIPTS: dict[str, tuple[str, list[str]]] = {
    "read": (
        "img",
        ["read 0 4k", "read -P 1 0 4k", "read -P 2 0 4k", "read -P 2 -s 100 -l 50 0 4k", "read -s 1k -l 1k -P 2 0 4k", "read -l 4 -P 2 0 16"]
        + ["read -s 8 -P 2 0 16", "read -C 0 4k", "read -q 0 4k", "read -v 0 40", "read -v 307195 20", "read -qv 0 16", "read -Cv 0 16", "read 0 0"]
        + ["read -q -P 3 0 4k", "read -P 0x1 0 8", "read -P 01 0 8", "read -r 0 4k", "read -p 0 4k", "r 0 4k", "read  0   4k"],
    ),
    "read-refused": (
        "img",
        ["read " + words for words in WRONG]
        + ["read -P", "read -P 256 0 4", "read -P x 0 4", "read -P 0x 0 4", "read -P -1 0 4", "read -z 0 4", "read -s 1 0 4", "read -l 1 0 4"]
        + ["read -P 0 -s 5000 0 4k", "read -P 0 -s 5 -l 5000 0 4k", "read -P 0 -s x 0 4k", "read -P 0 -l x 0 4k", "read -a 0 4k", "read 0 4k 4k"],
    ),
    "dump": ("img", ["write -P 65 0 8", "write -P 32 8 2", "write -P 95 9 2", "write -P 0xe9 11 2", "write -P 0x7e 13 2", "write -P 0 14 2", "read -v 0 17"]),
    "write": (
        "img",
        [
            "write 0 4k",
            "write -C 0 8k",
            "write -q 0 4k",
            "write -P 7 100 100",
            "write 0 1",
            "write -f 0 4k",
            "write 0 0",
            "write 1M 0",
            "write -s twelve 4k 100",
        ]
        + ["read -v 4k 112", "write -r 0 4k", "write -p 0 4k", "w 0 4k", "write -s /dev/null 0 4k", "write -s nope 0 4k"],
    ),
    "write-refused": (
        "img",
        ["write " + words for words in WRONG]
        + ["write -u 0 64k", "write -z -P 1 0 64k", "write -n 0 64k", "write -bz 0 4k", "write -cf 0 64k", "write -bf 0 4k", "write -fc 128k 64k"]
        + ["write -s raw -P 1 0 4k", "write -s raw -z 0 4k", "write -P x 0 4k", "write -x", "write 0 4k 4k"],
    ),
    "zeroes": (
        "img",
        ["write -z 0 64k", "write -z -u 64k 64k", "write -z -n 0 64k", "write -z -n 0 1k", "write -P 7 200k 1", "write -zn 200k 4k", "write -zf 300k 4k", "map"]
        + ["write -z 1M 4k", "write -zq 0 4k", "write -zC 0 4k"],
    ),
    "compressed": (
        "img",
        ["write -c 512k 64k", "write -c 640k 128k", "write -c 0 4k", "write -c 1 5", "write -c 512 512", "read -P 0xcd 512k 64k", "write -zc 0 64k"],
    ),
    "vm-state": (
        "img",
        [
            "write -b 0 4k",
            "read -bP 0xcd 0 4k",
            "write -bP 9 1M 64k",
            "read -bP 9 1M 64k",
            "read -bP 0 4k 4k",
            "read -b 1 4k",
            "read -b 0 5",
            "write -b 1 4k",
            "info",
        ]
        + ["write -b 0 5", "write -bc 0 4k", "read -bv 0 512", "length"],
    ),
    "vm-state-of-others": ("-f raw raw", ["write -b 0 512", "read -b 0 512"]),
    "vectors": (
        "img",
        ["writev 0 4k 4k", "writev 0 4k 5", "writev 0", "writev 0 4k x", "readv 0 4k 8k", "readv -v 0 16 16", "readv -P 0 0 4k 4k", "readv -P 0xcd 0 4k 4k"]
        + ["writev -z 0 4k", "writev -f 0 4k 512", "writev -P 3 0 4k 512", "writev 1M 4k", "readv 0 4k 0", "readv 0 4k -1", "writev -qP 3 0 4k"]
        + ["writev -CP 3 0 4k 8k", "readv x 4k", "readv 0 3G", "readv 0 1G 1G", "readv 1M 4k", "readv -P x 0 4k"],
    ),
    "background": (
        "img",
        [
            "aio_write 0 4k",
            "aio_flush",
            "aio_read 0 4k",
            "aio_flush",
            "aio_read -P 1 0 4k 4k",
            "aio_flush",
            "aio_read -v 0 16",
            "aio_flush",
            "aio_write -z 0 4k",
        ]
        + [
            "aio_flush",
            "aio_write -z 0 4k 4k",
            "aio_write -u 0 4k",
            "aio_write -i 0 4k",
            "aio_read -i 0 4k",
            "aio_write 1M 4k",
            "aio_flush",
            "aio_write -C 0 4k",
        ]
        + ["aio_flush", "aio_read -C 0 4k", "aio_flush", "aio_read -q 0 4k", "aio_flush", "aio_write -f 0 4k", "aio_flush", "aio_read x 4k", "aio_read 0"]
        + ["aio_write 0 x", "aio_flush x", "aio_read 1M 4k", "aio_flush", "aio_write -zP 1 0 4k", "aio_flush", "aio_read -P 0 0 4k"],
    ),
    "background-failures-count-not": ("img", ["aio_write 1M 4k", "aio_flush", "aio_read -P 9 0 4k", "aio_flush"]),
    "discard": (
        "img",
        ["discard 0 64k", "discard -q 0 64k", "discard -C 0 64k", "discard 1 1", "discard 0 0", "d 0 4k", "map", "discard 0", "discard 0 4k 4k"]
        + ["discard " + words for words in WRONG],
    ),
    "ignored": ("-d ignore img", ["discard 0 64k", "write -zu 128k 64k", "map", "read -P 1 0 64k"]),
    "unmap": ("-d unmap img", ["discard 0 64k", "map", "discard 64k 100k", "map", "read -P 0 0 64k", "write -zu 128k 64k", "map"]),
    "map": (
        "overlay",
        ["map", "write 64k 64k", "map", "alloc 0 1M", "write -z 1M 1M", "map", "alloc 0", "alloc 64k 128k", "alloc 1M", "alloc 4M 4k", "alloc 2500k 1M"]
        + ["alloc 100 100", "alloc 0 4G", "alloc -1", "alloc x", "alloc 0 x", "alloc", "alloc 0 4k 1", "a 64k 1", "map x"],
    ),
    "truncate": (
        "img",
        [
            "truncate 2M",
            "length",
            "truncate 1M",
            "length",
            "truncate -m full 2M",
            "truncate -m x 1M",
            "truncate x",
            "truncate",
            "truncate -m off 1M",
            "truncate -1",
        ]
        + ["truncate 1000", "length", "truncate 9E", "truncate 1 2", "truncate -m falloc 1M", "truncate -m falloc 512k", "map", "t 1M", "l", "length 1"],
    ),
    "raw": (
        "-f raw raw",
        [
            "info",
            "truncate 2M",
            "length",
            "map",
            "alloc 0 4k",
            "truncate 1M",
            "write -c 0 64k",
            "truncate 1001",
            "length",
            "read 0 1001",
            "read 0 1024",
            "read 0 1100",
        ]
        + ["write 1000 1", "write 1000 24", "write -z 0 1024", "discard 0 1024", "map", "alloc 0 1M", "truncate -m metadata 3M", "length"],
    ),
    "empty": ("-f raw empty", ["map", "alloc 0", "write 0 4k", "length", "read 0 512", "read 0 0", "truncate 1k", "write 0 1k", "length"]),
    "probed-raw": ("raw", ["length"]),
    "numbers": (
        "img",
        ["read -P %s 0 4k" % text for text in "0 0x1 01 08 0b1 0o1 1_0 0XF +1 -1 -0 0x100 0xg 1.".split()]
        + ["sleep 0x5", "sleep 1_0", "sleep +5", "sleep 1k", "sigraise -1", "truncate 1.5M", "length", "read 0.5k 1k", "read 0 1.5", "read 0x200 0x200"]
        + ["alloc 0x1000"],
    ),
    "options": (
        "img",
        ["open", "reopen -c", "truncate -m", "write -s", "write -s raw -s img 0 4k", "read -vvv 0 4", "read -Pq 0 4", "read -- 0 4", "read 0 4 --"]
        + ["read -qP0 0 4k", "aio_read -v 0 32 16", "aio_flush", "aio_write -P x 0 4"]
        + ["aio_read -z 0 4", "aio_write -n 0 4", "discard -z 0 4", "map -v", "info -v", "alloc -v"],
    ),
    "direct": ("-n -f raw raw", ["write 1 3", "read -v 0 16", "write -z 5 3", "aio_write 7 900", "aio_flush", "read 1 1"]),
    "directsync": ("-t directsync img", ["write 0 64k", "write -f 0 1", "flush"]),
    "others": (
        "img",
        [
            "sleep 10",
            "sleep x",
            "sleep",
            "sigraise",
            "sigraise x",
            "sigraise 0",
            "sigraise 99",
            "nope",
            "help nope",
            "",
            " ",
            "s",
            "i",
            "f",
            "flush",
            "flush x",
            "info x",
        ]
        + ["q", "length"],
    ),
    "open": (
        "",
        [
            "read 0 4k",
            "info",
            "open img",
            "length",
            "open img",
            "close",
            "close",
            "open -r img",
            "write 0 4k",
            "close",
            "open -o driver=raw img",
            "length",
            "close",
            "open",
        ]
        + ["open -o driver=qcow2,file.filename=img", "length", "close", "open nope", "open -x", "open a b", "open -rU img", "close", "open -n img", "close"]
        + [
            "open -t none -d unmap img",
            "close",
            "open -t x img",
            "open -d x img",
            "open -i x img",
            "open -o driver=nope img",
            "open -U img",
            "open -C img",
            "read 0 4k",
        ],
    ),
    "snapshot": ("-s img", ["write -P 7 0 4k", "read -P 7 0 4k", "read -P 1 4k 4k", "info", "length", "map", "truncate 2M", "length"]),
    "snapshot-opened": ("", ["open -s img", "write -P 7 0 4k", "read -P 7 0 4k", "close", "open -r img", "read -P 1 0 4k"]),
    "read-only": (
        "-r img",
        [
            "write 0 4k",
            "read 0 4k",
            "discard 0 4k",
            "truncate 2M",
            "writev 0 4k",
            "aio_write 0 4k",
            "reopen -w",
            "write 0 4k",
            "reopen -r",
            "write 0 4k",
            "read 0 4k",
        ],
    ),
    "reopen": (
        "img",
        [
            "reopen -r -w",
            "reopen x",
            "reopen -c nope",
            "reopen -c none",
            "write 0 4k",
            "reopen -o lazy-refcounts=on",
            "reopen -o bogus=1",
            "reopen -o driver=raw",
        ]
        + ["reopen -o file.filename=x", "reopen -c unsafe", "reopen -c none -o cache.direct=on", "reopen -r -o read-only=on"]
        + ["reopen -o", "reopen", "read 0 4k", "info"],
    ),
    "copy-on-read": ("-C overlay", ["map", "read 0 4k", "map", "read -P 1 0 200k", "map"]),
    "without-blkdebug": ("img", ["break write_aio A", "remove_break A", "resume A", "break", "break x"]),
}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("io") / "gallery"
    place.mkdir()
    setup(GALLERY, place)
    return place


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_scripts(gallery: Path, name: str) -> None:
    line, commands = SCRIPTS[name]
    same_io(gallery, line, *commands)
    ours, theirs_ = gallery.with_name("gallery.ours"), gallery.with_name("gallery.theirs")
    for image in ("img", "overlay", "raw"):
        format = "raw" if image == "raw" else "qcow2"
        with diskwright.open(ours / image, format=format) as left, diskwright.open(theirs_ / image, format=format) as right:
            assert left.pread(0, left.size) == right.pread(0, right.size)
        if format == "qcow2":
            assert theirs(["check", "-q", image], ours).code == 0


COMMAND_LINES = [
    "-c length nope",
    "-c length -f nope img",
    "-c length -f qcow2 raw",
    "-c length -t nope img",
    "-c length -d nope img",
    "-c length -i nope img",
    "-c length -i threads img",
    "-c length --image-opts -f raw img",
    "-c length -n -t none img",
    "-c length -t none -t unsafe img",
    "-c info -f raw -f qcow2 img",
    "-c length -U img",
    "-c length -r -U img",
    "-c length -U -r -s img",
    "-c 'write 0 4k' -r -s img",
    "-c 'read 1 4k' -m -n img",
    "-c length -k img",
    "-c length -k -n img",
    "--cmd length img",
    SECRET + "-c length img",
    "--object secret,id=a -c length img",
    "--object nope -c length img",
    "-c length --image-opts driver=qcow2,file.filename=img",
    "-c length --image-opts driver=qcow2,bogus=1,file.filename=img",
    """-c length 'json:{"driver":"qcow2","file":{"driver":"file","filename":"img"}}'""",
]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines(gallery: Path, line: str) -> None:
    import shlex

    args = shlex.split(line)
    assert our_io(args, gallery) == their_io(args, gallery)


FORMATS = ("qcow", "qed", "vdi", "vmdk", "vpc", "vhdx", "parallels")
# where we can write zeroes cheaply and QEMU cannot, or compress, the scripts leave it out
FORMAT_SCRIPT = [
    "map",
    "write 0 4k",
    "map",
    "alloc 0 3M",
    "write -b 0 512",
    "read -b 0 512",
    "length",
    "read -P 0xcd 0 4k",
    "read -P 0 4k 4k",
    "discard 0 1M",
    "truncate 16M",
    "info",
]


@pytest.mark.parametrize("format", FORMATS[:: 3 if BRIEF else 1])
def test_other_formats(tmp_path: Path, format: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    setup("qemu-img create -q -f %s image 8M" % format, place)
    script = [command for command in FORMAT_SCRIPT if (format, command) != ("vmdk", "info")]  # which has another CID after each write
    same_io(place, "-f %s image" % format, *script)


QCOW2_FILE = "file.driver=qcow2,file.file.driver=file,file.file.filename=img"
FILTERS = {
    "file": ("driver=file,filename=img", ["info", "map", "read 0 512"]),
    "null": ("driver=null-co", ["info", "map", "alloc 0 4k", "length", "read 0 4k", "write 0 4k"]),
    "null-zeroes": ("driver=null-co,read-zeroes=on", ["map", "read -P 0 0 4k"]),
    "throttle": ("driver=throttle,throttle-group=g," + QCOW2_FILE, ["info", "map", "write 0 4k"]),
    "copy-on-read": ("driver=copy-on-read," + QCOW2_FILE, ["info", "map", "read 0 4k"]),
    "compress": ("driver=compress," + QCOW2_FILE, ["info", "map", "write 512k 64k", "read -P 0xcd 512k 64k"]),
    "preallocate": ("driver=preallocate,file.driver=file,file.filename=empty", ["info", "map"]),
    "quorum": ("driver=quorum,vote-threshold=1,children.0.driver=file,children.0.filename=raw", ["info", "map", "write 0 4k"]),
    "copy-before-write": (
        "driver=copy-before-write,target.driver=qcow2,target.file.driver=file,target.file.filename=target," + QCOW2_FILE,
        ["info", "map", "write 0 4k", "write -z 64k 64k", "discard 0 64k", "truncate 2M", "length"],
    ),
    "snapshot-access": (
        "driver=snapshot-access,file.driver=copy-before-write,file.target.driver=qcow2,file.target.file.driver=file,file.target.file.filename=target,"
        "file.file.driver=qcow2,file.file.file.driver=file,file.file.file.filename=img",
        ["info", "map", "write 0 4k", "write -z 0 4k", "read -P 1 0 64k", "truncate 2M", "length"],
    ),
    "snapshot-access-alone": ("driver=snapshot-access," + QCOW2_FILE, ["read 0 4k", "write 0 4k", "length", "map"]),
}


@pytest.mark.parametrize("name", list(FILTERS)[:: 3 if BRIEF else 1])
def test_filters(gallery: Path, name: str) -> None:
    options, commands = FILTERS[name]
    same_io(gallery, "--object throttle-group,id=g --image-opts " + options, *commands)


def run_program(place: Path, program: list[str], text: str = "") -> "tuple[int, str, str]":
    done = subprocess.run(program, cwd=place, input=text, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, masked(done.stdout), done.stderr


OURS = [sys.executable, "-c", "import sys; sys.argv[0] = 'qemu-io'; from diskwright.cli import main; status = main(); sys.stdout.flush(); sys.exit(status)"]


def test_commands_from_standard_input(gallery: Path) -> None:
    text = "read 0 4k\nlength\n\n  \nnope\nread -P 9 0 4k\nq\nlength\n"
    expected = run_program(gallery, ["qemu-io", "-r", "img"], text)
    assert run_program(gallery, [*OURS, "-r", "img"], text) == expected
    assert "qemu-io> " in expected[1]


@pytest.mark.parametrize("command,number", [("abort", signal.SIGABRT), ("sigraise 15", signal.SIGTERM)])
def test_the_end_of_the_process(gallery: Path, command: str, number: int) -> None:
    for program in (["qemu-io"], OURS):
        assert run_program(gallery, [*program, "-r", "-c", command, "-c", "length", "img"]) == (-number, "", "")


def test_the_place_of_temporary_files(gallery: Path) -> None:
    environment = {**os.environ, "TMPDIR": "/nowhere"}
    texts = []
    for program in (["qemu-io"], OURS):
        done = subprocess.run([*program, "-s", "-c", "length", "img"], cwd=gallery, env=environment, capture_output=True, text=True, timeout=30, check=False)
        texts.append((done.returncode, masked(done.stdout), masked(done.stderr)))
    assert texts[0] == texts[1]
    assert "Could not open temporary file '/nowhere/vl.X': No such file or directory" in texts[0][2]


def test_what_was_written_is_put_back(gallery: Path) -> None:
    place, _other = twins(gallery)
    commands = ["write -P 7 0 4k", "commit", "write -P 8 4k 4k", "read -P 8 4k 4k"]
    assert our_io(["-s", "img", *(word for command in commands for word in ("-c", command))], place).code == 0
    assert their_io(["-r", "-c", "read -P 7 0 4k", "-c", "read -P 1 4k 4k", "img"], place).code == 0
    found = our_io(["-c", "commit", "img"], place)
    assert (found.code, found.err) == (1, "qemu-io: What is written goes to the image itself: it was not opened with -s\n")


def test_version_and_trace(gallery: Path) -> None:
    assert our_io(["-V"], gallery).out.startswith("qemu-io version 10.0.2 (diskwright ")
    assert run_program(gallery, [*OURS, "--version"])[1].startswith("qemu-io version 10.0.2 (diskwright ")
    found = our_io(["-r", "-T", "bdrv_co_preadv_part", "-c", "read 0 4k", "img"], gallery)
    assert found.code == 0 and "bdrv_co_preadv_part" in found.err


def test_help(gallery: Path) -> None:
    listed = our_io(["-c", "help"], gallery).out
    for line in their_io(["-c", "help"], gallery).out.splitlines():
        if not line.startswith("zone_"):
            assert line in listed
    assert "preallocation" in our_io(["-c", "help truncate"], gallery).out
    text = our_io(["--help"], gallery).out
    assert "-c, --cmd CMD" in text and text.count("  --blockdev NODE") == 1


def test_nodes_that_are_described(gallery: Path) -> None:
    words = "--blockdev qcow2,node-name=d,read-only=on,file.driver=file,file.filename=img --blockdev copy-on-read,node-name=c,file=d --image-opts d"
    found = our_io([*words.split(), "-r", "-c", "read -P 1 0 4k"], gallery)
    assert found.code == 0, found.err
