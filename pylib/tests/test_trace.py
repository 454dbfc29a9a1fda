# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`-T`: the grammar and its refusals beside qemu-img's, the events, and that all is as before when the trace has ended."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diskwright.trace import EVENTS, names
from side_by_side import Outcome, difference, ours, setup, theirs

PAGE = Path(__file__).parents[2] / "docs" / "tracing.md"

GALLERY = r"""
qemu-img create -f qcow2 q 2M; qemu-io -c 'write -P 3 0 300k' q
printf 'bdrv_open_nothing\n# remark\n\n-nosuch\nbdrv*\n-bdrv*\n  x\n' > events
mkdir sub
"""

LINES = """
-T nosuch
-T 'nosuch*'
-T enable=nosuch
-T ''
-T events=none
-T events=sub
-T events=
-T events=events
-T file=/nonexistent/x,enable=bdrv*
-T file=x
-T file=
-T bdrv_open_common,foo=1
-T enable
-T '-bdrv*'
-T ,file=x
-T =x
-T foo -T bar=1
-T file=a,,b,enable=x,,y
-T 'bdrv[_]open_common'
--trace=
--trac nosuch
""".strip().splitlines()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace")
    setup(GALLERY, path)
    return path


@pytest.mark.parametrize("line", [line + " check q" for line in LINES] + ["-T file=/nonexistent/x nope", "-T file=/nonexistent/x", "-T nope nope", "-T a=1 -h"])
def test_grammar(place: Path, line: str) -> None:
    args = shlex.split(line)
    expected, found = theirs(args, place), ours(args, place)
    assert found == expected, difference(line, found, expected)


def test_help_is_the_list_of_the_page(place: Path) -> None:
    assert ours(["-T", "help", "nope"], place) == Outcome(0, names(), "")
    listed = [name for line in PAGE.read_text().splitlines() if line.startswith("| `") for name in re.findall("`([a-z0-9_]+)`", line.split("|")[1])]
    assert [name for name in listed if name in EVENTS] == list(EVENTS)
    ours_alone = {name for name in EVENTS if name not in theirs(["-T", "help"], place).out.splitlines()}
    marked = {name for line in PAGE.read_text().splitlines() if line.endswith("| |") for name in re.findall("`([a-z0-9_]+)`", line.split("|")[1])}
    assert ours_alone == marked


@pytest.mark.parametrize("event", ["bdrv_open_common", "bdrv_co_preadv_part", "bdrv_co_pwritev_part", "bdrv_co_pwrite_zeroes", "qcow2_cluster_link_l2"])
def test_a_line_is_laid_out_as_by_qemu_img(place: Path, tmp_path: Path, event: str) -> None:
    """Both make the same image; of the same event the first line has the same names in it."""
    layouts = []
    for call, name in ((theirs, "a"), (ours, "b")):
        setup("qemu-img create -q -f qcow2 %s 1M" % name, tmp_path)
        args = ["-T", event, "bench", "-f", "qcow2", "-w", "-c", "1", name]
        if event == "bdrv_co_pwrite_zeroes":
            args = ["-T", event, "convert", "-n", "-f", "raw", "-O", "raw", "zeroes", name]
            setup("truncate -s 64k zeroes", tmp_path)
        found = call(args, tmp_path)
        assert found.code == 0 and found.err.startswith(event + " "), found
        line = found.err.splitlines()[0]
        layouts.append(re.sub(r'"[^"]*"|0x[0-9a-f]+|\d+', "N", line.split(" ", 1)[1]))
    assert layouts[0] == layouts[1]


def test_everything_is_traced_and_nothing_stays(place: Path, tmp_path: Path) -> None:
    before = {name: getattr(find(), attribute, None) for name, (find, attribute, _layout, _values) in EVENTS.items()}
    quiet = ours(["convert", "-O", "qcow2", "q", str(tmp_path / "quiet")], place)
    loud = ours(["-T", "*", "convert", "-O", "qcow2", "q", str(tmp_path / "loud")], place)
    assert (loud.code, loud.out) == (quiet.code, quiet.out) and not quiet.err
    assert (tmp_path / "loud").read_bytes() == (tmp_path / "quiet").read_bytes()
    seen = {line.split()[0] for line in loud.err.splitlines()}
    assert seen <= set(EVENTS) and {"bdrv_open_common", "file_pwrite", "qcow2_map", "copy_start", "table_cache_flush"} <= seen
    for line in ("snapshot -c x t", "snapshot -a x t", "snapshot -d x t", "amend -o refcount_bits=8 t", "resize t 1M", "bench -w -c 3 t"):
        if line.startswith("snapshot -c"):
            setup("qemu-img create -q -f qcow2 t 512k", tmp_path)
        found = ours(["-T", "*,file=log", *line.split()], tmp_path)
        assert found.code == 0 and not found.err, found
        seen |= {line.split()[0] for line in (tmp_path / "log").read_text().splitlines()}
    assert {"qcow2_snapshot_create", "qcow2_snapshot_apply", "qcow2_snapshot_delete", "qcow2_amend", "bdrv_co_truncate", "qcow2_alloc_clusters_offset"} <= seen
    assert {name: getattr(find(), attribute, None) for name, (find, attribute, _layout, _values) in EVENTS.items()} == before


def test_the_trace_ends_with_a_failure(place: Path) -> None:
    found = ours(["-T", "bdrv_open_common", "check", "-f", "raw", "q"], place)
    assert found.code == 63 and "bdrv_open_common" in found.err
    assert "bdrv_open_common" not in ours(["check", "-f", "raw", "q"], place).err


def test_off_means_not_even_imported() -> None:
    program = "import sys, diskwright.cli; diskwright.cli.main(['x', 'info', 'none']); sys.exit('diskwright.trace' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
