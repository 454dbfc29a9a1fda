# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Lazy refcounts: what is written when, images that nobody closed, and what opening them does; beside qemu-img."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diskwright.errors import OptionError
from diskwright.formats.qcow2 import Qcow2
from diskwright.hooks import OpenFlags

from qcow2_images import check_theirs, make, make_theirs, open_image, open_over, read_theirs, tool
from side_by_side import difference, ours, theirs

sys.path.insert(0, str(Path(__file__).parent / "conformance"))

from recorder import Recorder  # noqa: E402

K = 1024
M = 1024 * K
OPTIONS = "lazy_refcounts=on,cluster_size=4k"


def is_dirty(path: Path) -> bool:
    return bool(path.read_bytes()[79] & 1)


def refcounts(path: Path) -> bytes:
    """The first refcount block."""
    raw = path.read_bytes()
    table = int.from_bytes(raw[48:56], "big")
    block = int.from_bytes(raw[table : table + 8], "big")
    return raw[block : block + 4 * K]


def fill(node: Qcow2) -> bytes:
    """Write here and there, flushing; what the image holds then."""
    content = bytearray(M)
    for number in range(40):
        at = number * 7919 % 250 * 4 * K + 100
        node.pwrite(at, bytes([number + 1]) * 5000)
        content[at : at + 5000] = bytes([number + 1]) * 5000
        if number % 7 == 0:
            node.flush()
    node.pwrite_zeroes(64 * K, 32 * K, True)
    content[64 * K : 96 * K] = bytes(32 * K)
    node.flush()
    return bytes(content)


@pytest.mark.parametrize(("options", "runtime"), [("lazy_refcounts=on,", None), ("", True), ("lazy_refcounts=on,extended_l2=on,", None), ("", False)])
def test_counts_are_written_when_it_is_closed(tmp_path: Path, options: str, runtime: object) -> None:
    path = tmp_path / "x"
    make(path, M, options + "cluster_size=" + ("16k" if "extended" in options else "4k"))
    lazy = runtime is not False
    with open_image(path, **({} if runtime is None else {"lazy-refcounts": runtime})) as node:
        assert not is_dirty(path)
        node.flush()
        node.pread(0, M)
        assert not is_dirty(path)
        before = refcounts(path)
        content = fill(node)
        assert is_dirty(path) == lazy and (refcounts(path) == before) == lazy
        assert node.pread(0, M) == content
    assert not is_dirty(path) and check_theirs(path) == 0 and read_theirs(path) == content


def test_flushes_write_no_counts(tmp_path: Path) -> None:
    """Each flush costs one table less to write."""
    writes = []
    for options in ("lazy_refcounts=on", "lazy_refcounts=off"):
        make(tmp_path / "x", M, options)
        file = Recorder(tmp_path / "x")
        node = open_over(file)
        node.pwrite(0, b"x")
        node.flush()
        file.log.clear()
        node.pwrite(100 * K, b"y" * 64 * K)
        node.flush()
        writes.append(file.count("write"))
        node.close()
    assert writes == [2, 3]  # the data, the L2 table; and the refcount block


KILLED = """
import os, signal, sys
sys.path[:0] = %r
from pathlib import Path
from qcow2_images import open_image
from test_qcow2_lazy import fill
fill(open_image(Path(sys.argv[1])))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that one of us was killed over, after the last flush; and one of qemu-io's."""
    place = tmp_path_factory.mktemp("killed")
    make(place / "mine", M, OPTIONS)
    done = subprocess.run([sys.executable, "-c", KILLED % sys.path, str(place / "mine")], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    make_theirs(place / "theirs", M, OPTIONS)
    tool("qemu-img", "bitmap", "--add", place / "theirs", "b")
    commands = ["write -P 5 0 128k", "write -P 6 512k 3k", "flush", "write -z 0 8k", "flush", "abort"]
    options = [arg for command in commands for arg in ("-c", command)]
    subprocess.run(["bash", "-c", 'ulimit -c 0; exec "$@"', "-", "qemu-io", *options, str(place / "theirs")], capture_output=True, timeout=60, check=False)
    assert is_dirty(place / "mine") and is_dirty(place / "theirs")
    return place


def _copy(source: Path, target: Path) -> Path:
    shutil.copy(source, target)
    return target


def content_of_mine(place: Path) -> bytes:
    make(place / "whole", M, OPTIONS)
    with open_image(place / "whole") as node:
        return fill(node)


def test_an_image_that_nobody_closed(tmp_path: Path, killed: Path) -> None:
    """Reading sees what was flushed and changes nothing; writing, and a repair by either, makes it whole."""
    content = content_of_mine(tmp_path)
    path = _copy(killed / "mine", tmp_path / "x")
    raw = path.read_bytes()
    with open_image(path, writable=False) as node:
        assert node.dirty and node.pread(0, M) == content
    assert path.read_bytes() == raw and check_theirs(path) == 2
    tool("qemu-img", "check", "-q", "-r", "all", path)
    assert check_theirs(path) == 0 and not is_dirty(path) and read_theirs(path) == content
    path.write_bytes(raw)
    assert ours(["check", "-q", "-r", "all", str(path)], tmp_path).code == 0
    assert check_theirs(path) == 0 and not is_dirty(path) and read_theirs(path) == content
    path.write_bytes(raw)
    with open_image(path) as node:
        assert not node.dirty and check_theirs_shared(path) in (0, 3)
        node.pwrite(0, b"on")
    assert check_theirs(path) == 0 and read_theirs(path) == b"on" + content[2:]


def check_theirs_shared(path: Path) -> int:
    return subprocess.run(["qemu-img", "check", "-U", "-q", "-f", "qcow2", str(path)], capture_output=True, timeout=60, check=False).returncode


LINES = [
    "info x",
    "info --output=json x",
    "check x",
    "check --output=json x",
    "check -r all x",
    "map x",
    "snapshot -l x",
    "snapshot -c s x",
    "resize x 2M",
    "amend -o lazy_refcounts=off x",
    "amend -o compat=0.10 x",
    "bitmap --add x c",
    "rebase -u -b '' x",
    "convert -O raw x out",
    "convert -n -O qcow2 x x2",
    "measure -O raw x",
]


@pytest.mark.parametrize("name", ["mine", "theirs"])
def test_commands_on_a_dirty_image(tmp_path: Path, killed: Path, name: str) -> None:
    for line in LINES:
        outcomes, states = [], []
        for run in (theirs, ours):
            place = tmp_path / run.__name__
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            shutil.copy(killed / name, place / "x")
            shutil.copy(killed / name, place / "x2")
            outcomes.append(run(shlex.split(line), place))
            states += [(is_dirty(place / file), check_theirs(place / file), read_theirs(place / file)) for file in ("x", "x2") if file in line.split()]
        if "disk size" in outcomes[0].out or "actual-size" in outcomes[0].out:
            assert outcomes[0].code == outcomes[1].code and outcomes[0].err == outcomes[1].err
        else:
            assert outcomes[0] == outcomes[1], difference(line, outcomes[1], outcomes[0])
        assert states[: len(states) // 2] == states[len(states) // 2 :], line


def test_a_repair_of_leaks_alone_leaves_it_dirty(tmp_path: Path, killed: Path) -> None:
    """qemu-img says that it could not repair the image, and clears the bit all the same."""
    path = _copy(killed / "mine", tmp_path / "x")
    expected = theirs(["check", "-r", "leaks", str(_copy(path, tmp_path / "y"))], tmp_path)
    assert ours(["check", "-r", "leaks", str(path)], tmp_path) == expected
    assert is_dirty(path)


def test_it_stays_clean_whatever_is_done_between(tmp_path: Path) -> None:
    """Snapshots, other refcounts, resizing, and going back to read-only: each leaves an image that a crash does no harm."""
    path = tmp_path / "x"
    make(path, M, OPTIONS)
    with open_image(path) as node:
        content = fill(node)
        node.create_snapshot("s")
        assert not is_dirty(path)
        node.pwrite(0, b"z" * 9000)
        node.flush()
        assert is_dirty(path)
        node.amend(Qcow2.amend_options.from_string("refcount_bits=32"))
        node.pwrite(20 * K, b"z")
        node.flush()
        node.truncate(2 * M)
        node.pwrite(M, b"n")
        node.apply_snapshot("s")
        assert node.pread(0, M) == content
        node.pwrite(7 * K, b"w")
        node.flush()
        assert is_dirty(path)
        node.change_flags(OpenFlags())
        assert not is_dirty(path)
    assert check_theirs(path) == 0


def test_version_2_cannot(tmp_path: Path) -> None:
    make(tmp_path / "x", M, "compat=0.10")
    with pytest.raises(OptionError, match="Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"):
        open_image(tmp_path / "x", **{"lazy-refcounts": True})
