# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Extended L2 entries: what qemu-img makes of the same requests, what is read for copy-on-write, threads and crashes inside clusters."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diskwright.errors import Corrupt
from diskwright.formats.qcow2 import Qcow2
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags

from qcow2_images import check_theirs, make, make_theirs, open_image, open_over, qemu_io, read_theirs, tool
from side_by_side import difference, ours, setup, theirs, twins

sys.path.insert(0, str(Path(__file__).parent / "conformance"))

from recorder import Recorder, after_crash  # noqa: E402

K = 1024
M = 1024 * K
RW = OpenFlags(writable=True, resize=True, unmap=True)


class Step(NamedTuple):
    """A request: verb is write, zero, unmap, discard, compressed or snapshot."""

    verb: str
    offset: int = 0
    length: int = 0
    value: int = 0


def plan(chance: random.Random, cluster: int, size: int, kinds: list[str]) -> list[Step]:
    """Random requests, compressed ones first: qemu-img compresses into clusters that are not there yet."""
    steps = []
    if "compressed" in kinds:
        steps = [Step("compressed", at * cluster, cluster, 99) for at in chance.sample(range(size // cluster), 2)]
    for turn in range(chance.randrange(4, 13)):
        verb = chance.choice(kinds)
        grain = chance.choice((512, cluster // 32, cluster))
        offset = chance.randrange(size // grain) * grain
        length = min(size - offset, chance.choice((grain * chance.randrange(1, 5), 512 * chance.randrange(1, 3 * cluster // 512))))
        if verb != "compressed":
            steps.append(Step(verb, offset, length, turn + 1))
    return steps


def do_theirs(path: Path, steps: list[Step]) -> None:
    commands: list[str] = []
    for step in [*steps, Step("snapshot")]:
        if step.verb != "snapshot":
            words = {"write": "write -P %d" % step.value, "zero": "write -z", "unmap": "write -z -u", "discard": "discard", "compressed": "write -c -P 99"}
            commands.append("%s %d %d" % (words[step.verb], step.offset, step.length))
            continue
        if commands:
            qemu_io(path, *commands, discard="unmap")
            commands = []
        if step.value:
            tool("qemu-img", "snapshot", "-c", "s", path)


def do_ours(path: Path, steps: list[Step]) -> None:
    node = Graph().open(str(path), "qcow2", RW)
    for step in steps:
        if step.verb == "write":
            node.pwrite(step.offset, bytes([step.value]) * step.length)
        elif step.verb in ("zero", "unmap"):
            node.pwrite_zeroes(step.offset, step.length, step.verb == "unmap")
        elif step.verb == "discard":
            node.pdiscard(step.offset, step.length)
        elif step.verb == "compressed":
            node.write_compressed(step.offset, b"\x63" * step.length)
        else:
            node.create_snapshot("s")
    node.close()


def their_map(path: Path) -> list[dict[str, Any]]:
    """What qemu-img map says, but for places: neighbours that differ in nothing else are one."""
    joined: list[dict[str, Any]] = []
    for entry in json.loads(tool("qemu-img", "map", "--output=json", "-f", "qcow2", path)):
        entry.pop("offset", None)
        last = joined[-1] if joined else None
        if last and all(last[key] == entry[key] for key in entry if key not in ("start", "length")):
            last["length"] += entry["length"]
        else:
            joined.append(entry)
    return joined


CASES = [
    ("16k", "cluster_size=16k", None, ["write", "write", "zero", "unmap", "discard"]),
    ("compressed", "cluster_size=16k", None, ["write", "write", "zero", "unmap", "compressed"]),
    ("64k-shorter", "cluster_size=64k", "shorter", ["write", "write", "zero", "unmap", "discard"]),
    ("32k-longer", "cluster_size=32k", "longer", ["write", "write", "write", "zero", "compressed", "snapshot"]),
    ("metadata", "cluster_size=32k,preallocation=metadata", None, ["write", "write", "zero", "unmap", "discard"]),
    ("metadata-longer", "cluster_size=128k,preallocation=metadata", "longer", ["write", "write", "zero", "discard"]),
    ("data-file", "cluster_size=16k,data_file=%s", None, ["write", "write", "zero", "unmap", "discard"]),
    ("raw-data-file", "cluster_size=16k,data_file=%s,data_file_raw=on", None, ["write", "write", "zero", "unmap", "discard"]),
    ("snapshots", "cluster_size=16k", "shorter", ["write", "write", "zero", "unmap", "snapshot", "discard"]),
]


@pytest.mark.parametrize(("options", "backing", "kinds"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("seed", ["a", "b"])
def test_the_same_requests_give_the_same_map(tmp_path: Path, options: str, backing: str, kinds: list[str], seed: str) -> None:
    chance = random.Random(options + seed)
    cluster = int(options.split("k")[0].split("=")[1]) * K
    size = cluster * 9 + chance.choice((0, 7 * 512))
    if backing:
        length = size // 2 // 512 * 512 if backing == "shorter" else size + cluster
        (tmp_path / "base").write_bytes(chance.randbytes(length))
    steps = plan(chance, cluster, size, kinds)
    for name in ("theirs", "ours"):
        own = "extended_l2=on," + (options % (tmp_path / (name + ".data")) if "%" in options else options)
        own += ",backing_file=base,backing_fmt=raw" if backing else ""
        make_theirs(tmp_path / name, size, own)
    do_theirs(tmp_path / "theirs", steps)
    do_ours(tmp_path / "ours", steps)
    assert tool("qemu-img", "compare", tmp_path / "theirs", tmp_path / "ours") == "Images are identical.\n", steps
    assert their_map(tmp_path / "ours") == their_map(tmp_path / "theirs"), steps
    for line in ("check -f qcow2 ours", "map -f qcow2 --output=json ours"):
        found, expected = ours(shlex.split(line), tmp_path), theirs(shlex.split(line), tmp_path)
        assert found == expected and not found.code, difference(line, found, expected)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "cluster_size=16k",
        "cluster_size=2M",
        "preallocation=metadata",
        "cluster_size=16k,preallocation=metadata",
        "lazy_refcounts=on,refcount_bits=64",
        "compression_type=zstd,preallocation=metadata,cluster_size=32k",
    ],
)
def test_a_new_image_is_the_same_byte_for_byte(tmp_path: Path, options: str) -> None:
    for size in (0, M, 3 * M + 512, 40 * M):
        text = "extended_l2=on," + options
        make_theirs(tmp_path / "theirs", size, text.strip(","))
        make(tmp_path / "ours", size, text.strip(","))
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


COMMANDS = """
qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=32k base 1M
qemu-io -c 'write -P 1 5k 100k' -c 'write -P 2 300k 1k' -c 'write -z 310k 9k' -c 'write -c -P 3 640k 32k' base
qemu-img create -q -f qcow2 -o extended_l2=on -b base -F qcow2 top 1500k
qemu-io -c 'write -P 9 6k 3k' -c 'write -P 8 305k 10k' -c 'write -z 645k 4k' -c 'write -P 4 1300k 10k' top
qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=16k other 1M
qemu-io -c 'write -P 1 5k 60k' -c 'write -P 7 900k 20k' other
qemu-img create -q -f qcow2 -o extended_l2=on snap 1M
qemu-io -c 'write -P 1 5k 60k' -c 'write -P 7 900k 20k' -c 'write -z 200k 4k' -c 'write -c -P 3 640k 64k' snap
qemu-img snapshot -c one snap
qemu-io -c 'write -P 6 9k 6k' -c 'write -P 5 901k 2k' -c 'write -z 10k 4k' snap
"""
# Lines that change something; those marked with a star leave another map than qemu-img does, of the same content.
LINES = """
*rebase -b other -F qcow2 top
rebase -b '' top
*commit top
resize top 3M
resize --preallocation=metadata top 3M
resize --preallocation=falloc top 3M
resize --shrink top 400k
resize --shrink base 5k
resize base 5M
snapshot -a one snap
snapshot -d one snap
snapshot -c two snap
amend -o compat=0.10 snap
amend -o refcount_bits=32 snap
amend -o size=2M snap
*convert -O qcow2 snap out
convert -l one -O raw snap out
*convert -O qcow2 -o extended_l2=on,cluster_size=16k top out
convert -O qcow2 -c -o extended_l2=on,cluster_size=16k top out
convert -O qcow2 -n top base
check -r all snap
measure -O qcow2 -o extended_l2=on top
measure -O qcow2 -o extended_l2=on,cluster_size=2M top
map --output=json snap
""".strip().splitlines()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("subclusters") / "images"
    place.mkdir()
    setup(COMMANDS, place)
    return place


@pytest.mark.parametrize("line", LINES)
def test_commands(images: Path, line: str) -> None:
    left, right = twins(images)
    args = shlex.split(line.lstrip("*"))
    expected, found = theirs(args, left), ours(args, right)
    assert found == expected, difference(line, found, expected)
    if args[0] in ("measure", "map"):
        return
    for name in ("base", "top", "snap", "out"):
        if name not in args and not (args[0] == "commit" and name == "base"):
            continue
        form = "raw" if "raw" in args and name == "out" else "qcow2"
        assert tool("qemu-img", "compare", "-f", form, "-F", form, left / name, right / name) == "Images are identical.\n"
        if form == "qcow2":
            assert check_theirs(right / name) == 0
            if not line.startswith("*"):
                assert their_map(right / name) == their_map(left / name)


def test_rebase_compresses_whole_clusters_only(images: Path) -> None:
    """qemu-img aborts here: the overlay holds some subclusters of a cluster that is to be compressed."""
    _theirs, place = twins(images)
    before = read_theirs(place / "top")
    assert ours(["rebase", "-c", "-b", "", "top"], place).code == 0
    assert read_theirs(place / "top") == before and check_theirs(place / "top") == 0


# -- what is read ----------------------------------------------------------------------------------------------------------


def recorded(path: Path, backing: Path) -> tuple[Qcow2, Recorder, Recorder]:
    """An image over a raw backing file; the logs of both files."""
    top, base = Recorder(path), Recorder(backing, writable=False, resize=False)
    node = open_over(top)
    node.attach("backing", Graph().open_spec({"driver": "raw", "file": base}, OpenFlags()))
    return node, top, base


def reads(file: Recorder) -> list[tuple[int, int]]:
    return [(request.offset, request.length) for request in file.log if request.verb == "read"]


def test_only_subclusters_that_are_touched_are_copied(tmp_path: Path) -> None:
    content = random.Random("base").randbytes(M)
    (tmp_path / "base").write_bytes(content)
    make(tmp_path / "top", M, "extended_l2=on,backing_file=%s,backing_fmt=raw" % (tmp_path / "base"))
    node, top, base = recorded(tmp_path / "top", tmp_path / "base")
    unit = 2 * K
    node.pwrite(64 * K + 5 * unit + 100, b"x" * 50)
    assert sorted(reads(base)) == [(64 * K + 5 * unit, 100), (64 * K + 5 * unit + 150, unit - 150)]
    assert [(request.length) for request in top.log if request.verb == "write"] == [unit]
    base.log.clear()
    node.pwrite(64 * K + 6 * unit, b"y" * unit)  # a whole one, in the room that the cluster has
    node.pwrite(64 * K + 5 * unit, b"z")  # one that is there
    node.pwrite_zeroes(64 * K + 8 * unit, 2 * unit)
    assert not reads(base)
    node.pwrite(64 * K + 9 * unit - 10, b"w" * 20)  # both are zero
    assert not reads(base)
    expected = bytearray(content)
    for at, data in ((5 * unit + 100, b"x" * 50), (6 * unit, b"y" * unit), (5 * unit, b"z"), (8 * unit, bytes(2 * unit)), (9 * unit - 10, b"w" * 20)):
        expected[64 * K + at : 64 * K + at + len(data)] = data
    assert node.pread(0, M) == expected
    node.close()
    assert read_theirs(tmp_path / "top") == expected and check_theirs(tmp_path / "top") == 0
    allocated = sum(entry["length"] for entry in their_map(tmp_path / "top") if entry["depth"] == 0)
    assert allocated == 5 * unit - unit


def test_a_shared_cluster_is_moved_with_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * M)
    make(tmp_path / "top", M, "extended_l2=on,backing_file=%s,backing_fmt=raw" % (tmp_path / "base"))
    node, top, base = recorded(tmp_path / "top", tmp_path / "base")
    unit = 2 * K
    node.pwrite(3 * unit, b"1" * 2 * unit)
    node.create_snapshot("s")
    node.pread(0, 1)
    top.log.clear()
    base.log.clear()
    node.pwrite(4 * unit, b"2" * 10)
    assert [length for offset, length in reads(top) if unit <= length < 64 * K] == [2 * unit]
    assert not reads(base)
    top.log.clear()
    node.pwrite(0, b"3" * 64 * K)  # ours alone by now
    node.create_snapshot("t")
    top.log.clear()
    node.pwrite(0, b"4" * 64 * K)  # nothing of it stays: nothing is read
    assert not [length for offset, length in reads(top) if unit <= length < 64 * K]
    node.close()
    assert check_theirs(tmp_path / "top") == 0
    for name, expected in (("s", b"b" * 3 * unit + b"1" * 2 * unit), ("t", b"3" * 5 * unit)):
        tool("qemu-img", "convert", "-l", name, "-O", "raw", tmp_path / "top", tmp_path / "out")
        assert (tmp_path / "out").read_bytes()[: 5 * unit] == expected


# -- threads and crashes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["snapshot", "compressed", "new", "metadata"])
def test_threads_in_one_cluster(tmp_path: Path, kind: str) -> None:
    """Eight threads write subclusters of the same clusters, which must be moved or made once and for all of them."""
    make(tmp_path / "x", M, "extended_l2=on" + (",preallocation=metadata" if kind == "metadata" else ""))
    content = bytearray(M)
    unit = 2 * K
    with open_image(tmp_path / "x") as node:
        if kind in ("snapshot", "compressed"):
            for cluster in range(0, M, 64 * K):
                if kind == "compressed":
                    node.write_compressed(cluster, b"c" * 64 * K)
                else:
                    node.pwrite(cluster + unit, b"c" * 30 * unit)
                first = 0 if kind == "compressed" else unit
                content[cluster + first : cluster + 64 * K - first] = b"c" * (64 * K - 2 * first)
        if kind == "snapshot":
            node.create_snapshot("s")
        failures: list[BaseException] = []

        def work(own: int) -> None:
            try:
                for at in range(own * unit, M, 8 * unit):
                    node.pwrite(at + 7, b"%d" % own * (unit - 20))
                    assert node.pread(at + 7, unit - 20) == b"%d" % own * (unit - 20)
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(own,), daemon=True) for own in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not failures, failures
        assert not node.tables.pending and not node.tables.moves
        for own in range(8):
            for at in range(own * unit, M, 8 * unit):
                content[at + 7 : at + unit - 13] = b"%d" % own * (unit - 20)
        assert node.pread(0, M) == content
    assert check_theirs(tmp_path / "x") == 0 and read_theirs(tmp_path / "x") == content


def test_a_failing_write_gives_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "x", M, "extended_l2=on")
    with open_image(tmp_path / "x") as node:

        def fail(*_args: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(node.file, "_pwrite", fail)
            with pytest.raises(OSError, match="No space"):
                node.pwrite(70 * K, b"x" * 100 * K)
        assert not node.tables.pending
        node.pwrite(300 * K, b"y")
    assert check_theirs(tmp_path / "x") == 0


@pytest.mark.parametrize("orderly", [True, False], ids=["prefix", "subset"])
def test_a_crash_while_clusters_are_moved(tmp_path: Path, orderly: bool) -> None:
    path = tmp_path / "x"
    make(path, 256 * K, "extended_l2=on,cluster_size=16k")
    with open_image(path) as node:
        node.pwrite(0, b"1" * 100 * K)
        node.write_compressed(160 * K, b"1" * 16 * K)
        node.create_snapshot("s")
        node.write_compressed(112 * K, b"1" * 16 * K)
    before = path.read_bytes()
    old = read_theirs(path)
    file = Recorder(path)
    node = open_over(file)
    new = bytearray(old)
    for at in (512, 20 * K, 41 * K + 5, 115 * K, 120 * K, 161 * K, 175 * K):
        node.pwrite(at, b"2" * 700)
        new[at : at + 700] = b"2" * 700
    node.close()
    chance = random.Random("moved")
    points = [at for at, request in enumerate(file.log) if request.verb != "read"]
    for position in sorted(chance.sample(points, min(14, len(points)))):
        path.write_bytes(after_crash(before, file.log, position, chance, orderly))
        assert check_theirs(path) in (0, 3), position
        found = read_theirs(path)
        for at in range(0, len(found), 512):
            assert found[at : at + 512] in (old[at : at + 512], bytes(new[at : at + 512])), (position, at)


# -- entries that contradict themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "bitmap"),
    [
        (0, 1),  # data without a cluster
        (1 << 63 | 0x50000, 1 << 32 | 1),  # data and zero at once
        (1 << 63 | 0x50200, 0xFFFFFFFF),  # unaligned
        (1 << 63 | 0x10000, 0xFFFFFFFF),  # on the refcount table
    ],
)
def test_entries_that_cannot_be(tmp_path: Path, entry: int, bitmap: int) -> None:
    path = tmp_path / "x"
    make(path, M, "extended_l2=on")
    with open_image(path) as node:
        node.pwrite(0, b"x")
        table = node.tables.l2_offset(0)
    raw = bytearray(path.read_bytes())
    raw[table : table + 16] = entry.to_bytes(8, "big") + bitmap.to_bytes(8, "big")
    path.write_bytes(raw)
    command = ["qemu-io", "-c", "read 0 512", "-c", "write 100 200", "-f", "qcow2", str(path)]
    assert "failed" in subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    path.write_bytes(raw)
    if entry & 0xFFFF0000 != 0x10000:
        with open_image(path, writable=False) as node, pytest.raises(Corrupt, match="qcow2: Image is corrupt: "):
            node.pread(0, 512)
    for call in ("pwrite", "pwrite_zeroes"):
        path.write_bytes(raw)
        node = open_image(path)
        try:
            with pytest.raises(Corrupt, match="qcow2: Marking image as corrupt: "):
                if call == "pwrite":
                    node.pwrite(0, b"y" * 2 * K)
                else:
                    node.pwrite_zeroes(100, 200)
        finally:
            node.abandon()
