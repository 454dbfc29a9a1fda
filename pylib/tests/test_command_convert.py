# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`convert` against qemu-img: what is printed, the exit codes, and the image that is made."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diskwright
import pytest
from side_by_side import difference, ours, same, setup, theirs, twins

GALLERY = r"""
qemu-img create -f raw some.raw 3M
qemu-io -f raw -c 'write -P 1 0 4k' -c 'write -P 1 64k 64k' -c 'write -P 2 1000k 99k' -c 'write -z 200k 100k' -c 'write -P 3 3071k 1k' some.raw
head -c 200000 /dev/urandom > noise; truncate -s 1234567 odd.raw; dd if=noise of=odd.raw bs=1000 seek=700 conv=notrunc status=none
truncate -s 0 empty; qemu-img create -f raw small.raw 64k; qemu-img create -f raw base.raw 3M
qemu-io -f raw -c 'write -P 9 0 3M' base.raw; cp base.raw larger.raw; truncate -s 5M larger.raw
qemu-img convert -O qcow2 some.raw some.qcow2; qemu-img convert -c -O qcow2 some.raw c.qcow2
qemu-img convert -c -O qcow2 -o compression_type=zstd some.raw z.qcow2; qemu-img convert -O qcow2 -o compat=0.10,cluster_size=4k some.raw v2.qcow2
qemu-img create -f qcow2 -F raw -b base.raw over.qcow2
qemu-io -c 'write -P 4 100k 300k' -c 'write -z 1M 128k' -c 'write -P 5 2900k 10k' over.qcow2
qemu-img create -f qcow2 -F qcow2 -b over.qcow2 top.qcow2 4M; qemu-io -c 'write -P 6 3500k 10k' -c 'write -P 7 0 1k' top.qcow2
qemu-img create -f qcow2 -F raw -b small.raw short.qcow2 1M; qemu-io -c 'write -P 4 500k 3k' short.qcow2
qemu-img create -f qcow2 old.qcow2 5M; qemu-io -c 'write -P 8 0 5M' old.qcow2
qemu-img create -f qcow2 -o cluster_size=2M wide.qcow2 5M; qemu-io -c 'write -P 8 1M 2M' wide.qcow2
mkdir folder
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("convert")
    setup(GALLERY, path)
    return path


def read(path: Path) -> Any:
    """What an image is to whoever reads it, qemu-img being the judge."""
    if not path.exists():
        return None
    info = json.loads(subprocess.run(["qemu-img", "info", "--output=json", path.name], cwd=path.parent, capture_output=True, check=True).stdout)
    check = subprocess.run(["qemu-img", "check", "-q", path.name], cwd=path.parent, capture_output=True, check=False)
    assert check.returncode in (0, 63), check.stderr
    with diskwright.open(str(path)) as node:
        content = node.pread(0, node.size)
    return info["format"], info["virtual-size"], info.get("backing-filename"), info.get("format-specific"), content


def check(line: str, place: Path) -> tuple[Path, Path]:
    """Both do the same to the image `out`; the two directories."""
    pair = twins(place)
    expected = theirs(shlex.split("convert " + line), pair[0])
    found = ours(shlex.split("convert " + line), pair[1])
    assert found == expected, difference(line, found, expected)
    name = shlex.split(line)[-1]
    name = name if (pair[0] / name).is_file() else "out"
    assert read(pair[0] / name) == read(pair[1] / name), line
    return pair


GOOD = [
    "some.raw out",
    "odd.raw out",
    "empty out",
    "-O qcow2 some.raw out",
    "-O qcow2 odd.raw out",
    "-O qcow2 empty out",
    "-O qcow2 -o cluster_size=512 some.raw out",
    "-O qcow2 -o cluster_size=2M some.raw out",
    "-O qcow2 -o compat=0.10 odd.raw out",
    "-O qcow2 -o refcount_bits=1,lazy_refcounts=on some.raw out",
    "-O qcow2 -o preallocation=metadata some.raw out",
    "-O qcow2 -o preallocation=full some.raw out",
    "-o preallocation=full some.raw out",
    "-o preallocation=falloc some.raw out",
    "some.qcow2 out",
    "c.qcow2 out",
    "z.qcow2 out",
    "v2.qcow2 out",
    "over.qcow2 out",
    "top.qcow2 out",
    "short.qcow2 out",
    "-O qcow2 top.qcow2 out",
    "-f raw some.qcow2 out",
    "-c -O qcow2 some.raw out",
    "-c -O qcow2 odd.raw out",
    "-c -O qcow2 noise out",
    "-c -O qcow2 -o cluster_size=4k top.qcow2 out",
    "-c -O qcow2 -o compression_type=zstd some.raw out",
    "-c -m 16 -W -O qcow2 some.raw out",
    "some.raw odd.raw empty c.qcow2 out",
    "-O qcow2 odd.raw some.qcow2 out",
    "-c -O qcow2 odd.raw some.qcow2 out",
    "-S 0 some.raw out",
    "-S 0 -O qcow2 some.raw out",
    "-S 512 -O qcow2 some.raw out",
    "-S 1M -O qcow2 some.raw out",
    "-m 1 some.raw out",
    "-m 16 -W -O qcow2 some.raw out",
    "-C some.raw out",
    "-C -O qcow2 some.qcow2 out",
    "-r 100M some.raw out",
    "--salvage some.raw out",
    "-T none -t none some.raw out",
    "-t writethrough -O qcow2 some.raw out",
    "-t directsync -T directsync odd.raw out",
    "-U some.raw out",
    "--image-opts driver=raw,offset=65536,size=65536,file.filename=some.raw out",
    "-B base.raw -F raw -O qcow2 over.qcow2 out",
    "-B base.raw -F raw -O qcow2 some.raw out",
    "-B over.qcow2 -F qcow2 -O qcow2 top.qcow2 out",
    "-B small.raw -F raw -O qcow2 short.qcow2 out",
    "-o backing_file=base.raw,backing_fmt=raw -O qcow2 over.qcow2 out",
    "-c -B base.raw -F raw -O qcow2 over.qcow2 out",
    "-n some.raw larger.raw",
    "-n odd.raw base.raw",
    "-n -O qcow2 some.raw old.qcow2",
    "-n -O qcow2 odd.raw old.qcow2",
    "-n -O qcow2 odd.raw wide.qcow2",
    "-n -S 0 -O qcow2 some.raw old.qcow2",
    "-n --target-image-opts some.raw driver=qcow2,file.filename=old.qcow2",
    "-n -B base.raw -F raw -O qcow2 over.qcow2 top.qcow2",
    "-q some.raw out",
    "-p some.raw out",
    "-p -q some.raw out",
    "-o size=64k some.raw out",
    "some.raw file:out",
]


@pytest.mark.parametrize("line", GOOD)
def test_images(place: Path, line: str) -> None:
    if " -p " in " " + line and "-q" not in line:  # where the steps fall is each program's own affair
        pair = twins(place)
        found = ours(shlex.split("convert " + line), pair[1])
        assert found.code == 0 and found.out.startswith("    (0.00/100%)\r") and found.out.endswith("    (100.00/100%)\r\n")
        return
    check(line, place)


BAD = [
    "gone out",
    "-f qcow2 some.raw out",
    "-O nix some.raw out",
    "-O qcow2 some.raw gone/out",
    "some.raw folder",
    "folder out",
    "-O qcow2 -o cluster_size=3 some.raw out",
    "-O qcow2 -o nix=3 some.raw out",
    "-o cluster_size=3 some.raw out",
    "-n some.raw gone",
    "-n some.raw small.raw",
    "-n -o size=3 some.raw small.raw",
    "-n -O qcow2 some.raw base.raw",
    "-c some.raw out",
    "-n -c some.raw base.raw",
    "-B base.raw -O qcow2 some.raw out",
    "-B base.raw -F raw some.raw out",
    "-B gone -F raw -O qcow2 some.raw out",
    "-B base.raw -F raw -O qcow2 some.raw some.raw out",
    "-o backing_file=base.raw,backing_fmt=raw -O qcow2 some.raw some.raw out",
    "-B base.raw -F nix -O qcow2 some.raw out",
    "-F raw -O qcow2 some.raw out",
    "-l snap some.raw out",
    "-l a some.raw base.raw out",
    "--bitmaps some.raw out",
    "--bitmaps some.raw base.raw out",
    "-c -o preallocation=metadata -O qcow2 some.raw out",
    "-O qcow2 -o preallocation=nix some.raw out",
    "-T nix some.raw out",
    "-t nix some.raw out",
    "some.raw some.raw",
    "-O qcow2 some.raw ./some.raw",
    "over.qcow2 base.raw",
    "some.raw nix:out",
    "some.raw ''",
    "'' out",
    "-C -S 4k some.raw out",
    "-C -c some.raw out",
    "-C --salvage some.raw out",
    "--target-is-zero some.raw out",
    "-S 511 some.raw out",
    "-m 17 some.raw out",
    "some.raw",
]


@pytest.mark.parametrize("line", BAD)
def test_errors(place: Path, line: str) -> None:
    pair = twins(place)
    expected = theirs(shlex.split("convert " + line), pair[0])
    found = ours(shlex.split("convert " + line), pair[1])
    assert found == expected, difference(line, found, expected)
    for path in place.iterdir():
        if path.is_file():
            assert (pair[1] / path.name).read_bytes() == path.read_bytes(), path.name


def test_target_is_zero(place: Path) -> None:
    """Zeroes are not written; with a backing file it is an error, and qemu-img's exit code 0 a bug."""
    check("-n --target-is-zero some.raw larger.raw", place)
    pair = twins(place)
    found = ours(shlex.split("convert -n --target-is-zero -B base.raw -F raw -O qcow2 some.raw old.qcow2"), pair[1])
    assert (found.code, found.err) == (1, "qemu-img: Cannot use --target-is-zero when the destination image has a backing file\n")


def test_compress_over_old_content(place: Path) -> None:
    """qemu-img cannot ("Input/output error"); a deliberate difference."""
    folder = twins(place)[1]
    found = ours(shlex.split("convert -n -c -O qcow2 some.raw old.qcow2"), folder)
    assert found.code == 0
    image = read(folder / "old.qcow2")
    assert image[4] == (place / "some.raw").read_bytes() + b"\x08" * (2 << 20)


def test_space(place: Path) -> None:
    """What is allocated in the target is no more than where qemu-img allocates."""
    for line in ("some.raw out", "-O qcow2 some.raw out", "-S 0 some.raw out", "-S 0 -O qcow2 some.raw out", "top.qcow2 out"):
        pair = check(line, place)
        asked = [["qemu-img", "map", "--output=json", str(folder / "out")] for folder in pair]
        maps = [json.loads(subprocess.run(words, capture_output=True, check=True).stdout) for words in asked]
        if "qcow2" in line.split() or "-S" in line:
            assert clusters(maps[0]) == clusters(maps[1]), line
        else:
            assert sum(run["length"] for run in maps[1] if run["data"]) <= sum(run["length"] for run in maps[0] if run["data"]), line


def clusters(runs: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """(start, length, present, data, offset) of a map's runs. Holes in the file are not told apart: we do not write the zeroes at
    the edges of clusters."""
    found: list[tuple[Any, ...]] = []
    for run in runs:
        start, length, offset = run["start"], run["length"], run.get("offset")
        kind = (run["present"], run["data"])
        last = found[-1] if found else None
        if last and last[2:4] == kind and (offset is None or last[4] is None or last[4] + last[1] == offset):
            found[-1] = (last[0], last[1] + length, *last[2:])
        else:
            found.append((start, length, *kind, offset))
    return found


def test_compressed_images_are_the_same_bytes(place: Path) -> None:
    """The same codec, and clusters in the order of the content however many threads there are."""
    images = set()
    for _attempt in range(3):
        pair = check("-c -m 4 -O qcow2 top.qcow2 out", place)
        images.add((pair[1] / "out").read_bytes())
    assert len(images) == 1


# -- pipes ---------------------------------------------------------------------------------------------------------


def pipe(words: str, place: Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-m", "diskwright", "convert", *shlex.split(words)]
    return subprocess.run(line, cwd=place, input=data, capture_output=True, check=False, timeout=60)


def test_to_standard_output(place: Path) -> None:
    expected = (place / "some.raw").read_bytes()
    for source in ("some.raw", "c.qcow2"):
        for target in ("-", "/dev/stdout"):
            done = pipe("-p %s %s" % (source, target), place) if target == "-" else pipe("%s %s" % (source, target), place)
            assert done.returncode == 0, done.stderr
            assert done.stdout == expected
    assert pipe("-O qcow2 some.raw -", place).returncode == 1
    assert not (place / "-").exists()


def test_from_standard_input(place: Path, tmp_path: Path) -> None:
    for name in ("some.raw", "odd.raw", "empty"):
        data = (place / name).read_bytes()
        for source in ("-", "/dev/stdin"):
            for options in ("", "-O qcow2", "-c -O qcow2", "-S 0 -O qcow2"):
                target = tmp_path / "out"
                done = pipe("%s %s %s" % (options, source, target), place, data)
                assert done.returncode == 0, done.stderr
                same("compare -f raw %s %s" % (name, target), place)
                with diskwright.open(str(target)) as node:
                    assert node.size == -(-len(data) // 512) * 512
    with open(place / "c.qcow2", "rb") as file:  # a file is an image of any format
        line = [sys.executable, "-m", "diskwright", "convert", "-f", "qcow2", "-", str(tmp_path / "out")]
        subprocess.run(line, stdin=file, check=True)
    assert (tmp_path / "out").read_bytes() == (place / "some.raw").read_bytes()


@pytest.mark.parametrize("format", ["vdi", "vpc", "vhdx", "vmdk", "parallels", "qcow"])
def test_a_pipe_into_what_cannot_grow(place: Path, tmp_path: Path, format: str) -> None:
    """Its size would have to be known: nothing is made, and what is there stays. A file on standard input has one."""
    target = tmp_path / "out"
    for there in (False, True):
        if there:
            setup("qemu-img create -q -f %s out 1M" % format, tmp_path)
        before = target.read_bytes() if there else None
        for words in ("-O %s" % format, "-n -O %s" % format, "-n --target-image-opts"):
            if not there and "-n" in words:
                continue
            reader, writer = os.pipe()
            os.close(writer)
            name = "driver=%s,file.filename=%s" % (format, target) if "opts" in words else str(target)
            outcome = ours(["convert", *words.split(), "/dev/fd/%d" % reader, name], place)
            os.close(reader)
            assert outcome.code == 1 and "'%s' cannot be made from a pipe" % format in outcome.err and "raw or qcow2 first" in outcome.err
            assert (target.read_bytes() if target.exists() else None) == before
    with open(place / "some.raw", "rb") as file:
        line = [sys.executable, "-m", "diskwright", "convert", "-f", "raw", "-O", format, "-", str(target)]
        subprocess.run(line, stdin=file, check=True)
    assert theirs(["compare", "-f", "raw", "-F", format, str(place / "some.raw"), str(target)], tmp_path).out.endswith("Images are identical.\n")


def test_through_both(place: Path) -> None:
    data = (place / "odd.raw").read_bytes()
    done = pipe("- -", place, data)
    assert done.returncode == 0, done.stderr
    assert done.stdout == data + bytes(-len(data) % 512)


def test_a_reader_that_goes_away(place: Path) -> None:
    line = "%s -m diskwright convert base.raw - | head -c 1000 > /dev/null; exit ${PIPESTATUS[0]}" % shlex.quote(sys.executable)
    done = subprocess.run(["bash", "-c", line], cwd=place, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "error while writing at byte" in done.stderr and "Broken pipe" in done.stderr


# -- what goes wrong half-way --------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    """A file system of 2 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_no_space(place: Path, tiny: Path) -> None:
    before = (place / "base.raw").read_bytes()
    for options in ("", "-O qcow2", "-m 1", "-c -O qcow2"):
        source = "base.raw" if "-c" not in options else "big"
        if source == "big":
            (place / "big").write_bytes(os.urandom(3 << 20))
        found = ours(shlex.split("convert -f raw %s %s %s" % (options, source, tiny / "out")), place)
        assert found.code == 1, options
        assert found.err.startswith("qemu-img: error while writing at byte ") and found.err.endswith(": No space left on device\n"), found.err
        (tiny / "out").unlink()
    assert (place / "base.raw").read_bytes() == before
    target = tiny / "image"
    target.write_bytes(b"old")
    with pytest.raises(diskwright.Error, match="No space left on device"):
        diskwright.convert([str(place / "base.raw")], str(target), format="raw", atomic=True)
    assert target.read_bytes() == b"old" and [path.name for path in tiny.iterdir()] == ["image"]


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_signals(place: Path, tmp_path: Path, number: signal.Signals) -> None:
    line = [sys.executable, "-m", "diskwright", "convert", "-f", "raw", "-r", "100k", str(place / "base.raw"), str(tmp_path / "out")]
    before = (place / "base.raw").read_bytes()
    process = subprocess.Popen(line, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not ((tmp_path / "out").exists() and (tmp_path / "out").stat().st_blocks) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _out, err = process.communicate(timeout=30)
    assert process.returncode == -number
    assert err.decode().endswith("convert was interrupted by %s\n" % number.name)
    assert (place / "base.raw").read_bytes() == before


def test_a_damaged_source(place: Path, tmp_path: Path) -> None:
    image = bytearray((place / "c.qcow2").read_bytes())
    image[-4096 - 512 :] = b"\xff" * (4096 + 512)
    (tmp_path / "bad.qcow2").write_bytes(image)
    expected = theirs(["convert", "bad.qcow2", "out"], tmp_path)
    found = ours(["convert", "bad.qcow2", "out"], tmp_path)
    assert found.code == expected.code == 1
    assert found.err.split("\n")[0].endswith("Input/output error")
    found = ours(["convert", "--salvage", "bad.qcow2", "out"], tmp_path)
    assert found.code == 0 and "warning: error while reading offset" in found.err
    assert ours(["convert", "-q", "--salvage", "bad.qcow2", "out"], tmp_path).err == ""


# -- from Python ---------------------------------------------------------------------------------------------------


def test_atomic(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "image"
    sources = [str(place / "some.raw")]

    def stop(done: int, _total: int) -> None:
        assert not target.exists() or target.read_bytes() == b"old"
        if done:
            raise KeyError

    with pytest.raises(KeyError):
        diskwright.convert(sources, str(target), target_format="qcow2", atomic=True, progress=stop)
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"old")
    target.chmod(0o640)
    with pytest.raises(KeyError):
        diskwright.convert(sources, str(target), target_format="qcow2", atomic=True, progress=stop)
    assert target.read_bytes() == b"old"
    (tmp_path / "link").symlink_to("image")
    reports: list[tuple[int, int]] = []
    diskwright.convert(
        sources, str(tmp_path / "link"), target_format="qcow2", atomic=True, progress=lambda done, total: reports.append((done, total))
    )
    assert reports[0][0] == 0 and reports[-1] == (3 << 20, 3 << 20)
    assert (tmp_path / "link").is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "link"]
    assert diskwright.compare(str(target), sources[0]).identical
    with pytest.raises(diskwright.Error, match="^%s: error while converting qcow2: Cluster size must be" % target):
        diskwright.convert(sources, str(target), target_format="qcow2", options="cluster_size=3", atomic=True)
    assert diskwright.compare(str(target), sources[0]).identical


def test_the_policy_holds(place: Path, tmp_path: Path) -> None:
    with pytest.raises(diskwright.Denied):
        diskwright.convert([str(place / "over.qcow2")], str(tmp_path / "out"), policy=diskwright.OpenPolicy("none"))
    assert not list(tmp_path.iterdir())


SOURCE_WITH_BITMAP = """
qemu-img create -q -f qcow2 {options} s 8M
qemu-io -c 'write -P 1 0 3M' -c 'write -P 2 5M 500k' s
qemu-img convert -O qcow2 s full
qemu-img bitmap --add -g {granularity} s monday; qemu-img bitmap --add s tuesday
qemu-io -c 'write -P 3 1000k 300k' -c 'write -z 2M 100k' -c 'write -P 4 8191k 1k' -c 'discard 5M 128k' s
qemu-img bitmap --clear s tuesday
"""


@pytest.mark.parametrize("granularity", ["512", "64k", "1M"])
@pytest.mark.parametrize("options", ["", "-o cluster_size=2M", "-o extended_l2=on"])
@pytest.mark.parametrize("target", ["", "-c", "-o cluster_size=512"])
def test_an_incremental_backup_has_what_the_bitmap_marked_and_no_more(tmp_path: Path, granularity: str, options: str, target: str) -> None:
    setup(SOURCE_WITH_BITMAP.format(granularity=granularity, options=options), tmp_path)
    result = ours(shlex.split("convert --changed monday -B full -F qcow2 -O qcow2 %s s increment" % target), tmp_path)
    assert (result.code, result.err) == (0, "")
    assert theirs(["compare", "s", "increment"], tmp_path).out == "Images are identical.\n"
    own = [run for run in json.loads(theirs(["map", "--output=json", "increment"], tmp_path).out) if run["depth"] == 0]
    grain = max({"512": 512, "64k": 65536, "1M": 1 << 20}[granularity], 512 if "512" in target else 65536)
    assert sum(run["length"] for run in own) <= 4 * 2 * grain + 700 * 1024  # four places, each with two edges, and what was written


@pytest.mark.parametrize(
    "line, said",
    [
        ("--changed monday -O qcow2 s x", "What a bitmap has marked can be copied from a single source, into an overlay of a backing file"),
        ("--changed monday -B full -F qcow2 -O qcow2 s s x", "Having a backing file for the target makes no sense when concatenating multiple input images"),
        ("--changed sunday -B full -F qcow2 -O qcow2 s x", "Dirty bitmap 'sunday' not found"),
        ("--changed monday -B full -F qcow2 -O qcow2 -f raw s x", "Source lacks bitmap support"),
    ],
)
def test_an_incremental_backup_that_cannot_be(tmp_path: Path, line: str, said: str) -> None:
    setup(SOURCE_WITH_BITMAP.format(granularity="64k", options=""), tmp_path)
    result = ours(["convert", *line.split()], tmp_path)
    assert (result.code, result.out, result.err) == (1, "", "qemu-img: %s\n" % said)
    assert not (tmp_path / "x").exists()
