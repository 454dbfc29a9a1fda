# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The option matrix of the commands against qemu-img: every option alone and beside every other one, in both spellings, right and
wrong values; every kind of image, and what is none.

What differs on purpose is in docs/differences.md, and in matrix.known.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import Iterator

import pytest

from effort import BRIEF
from matrix import GALLERY, Matrix, known

OBJECT = "--object secret,id=s0,data=hello"

# What each command is run on, and its options with values that are right, and wrong; both spellings of each.
OPTIONS = {
    "amend": (
        "q",
        "-o size=3M|-o compat=0.10|-o lazy_refcounts=on|-o bad=1|-o help|--options refcount_bits=8|-f qcow2|--format raw|-f nope|-t none|--cache bad|"
        "-p|--progress|-q|--quiet|--object|--image-opts|--force",
    ),
    "bench": (
        "q",
        "-c 5|--count 0|-d 3|--depth 0|-f qcow2|--format raw|-n|--native|-i threads|--aio native|-i io_uring|-i x|-o 64k|--offset 5x|-s 1k|--buffer-size 0|"
        "-S 0|--step-size 100|-t none|--cache bad|-w|--write|--flush-interval 4|--flush-interval 64|--flush-interval 0|--pattern 5|--pattern 256|"
        "--no-drain|--image-opts|-U|--force-share",
    ),
    "bitmap": (
        "q x",
        "--add|--remove|--clear|--enable|--disable|--merge y|-b bm|--source-file bm --merge a|-F qcow2|--source-format raw|-f qcow2|-f raw|-g 4k|"
        "--granularity 1|--object|--image-opts",
    ),
    "bitmap ": ("bm a", "--add|--remove|--clear|--enable|--disable|--merge b|--source-file q --merge a|-F qcow2|-f qcow2|-g 4k|--merge nope|--object"),
    "commit": (
        "top",
        "-f qcow2|--format raw|-t none|--cache bad|-b base|--base over|-b nope|-d|--drop|-p|--progress|-q|--quiet|-r 1G|--rate bad|-r 0|--object|--image-opts",
    ),
    "convert": (
        "top x",
        "-f qcow2|--source-format raw|-O qcow2|--output-format raw|-B base|--backing over|-F raw|--backing-format qcow2|-c|-o cluster_size=4k|"
        "--options backing_file=base|-o bad=1|-l one|--snapshot snapshot.id=1|-S 0|--sparse-size 64k|-p|-q|--quiet|-t none|-T none|--source-cache bad|-n|-m 1|"
        "--parallel 17|-W|--oob-writes|-r 1G|--rate x|--target-image-opts|--salvage|--target-is-zero|--bitmaps|--skip-broken-bitmaps|-C|"
        "--copy-range-offloading|--object|--image-opts|--source-image-opts|-U|--force-share",
    ),
    "map": (
        "top",
        "-f qcow2|--format nope|-f raw|--output json|--output human|--output x|-s 64k|--start-offset 1M|-l 1M|--max-length 0|-s x|-U|--force-share|--object|"
        "--image-opts",
    ),
    "measure": (
        "top",
        "-f qcow2|--format nope|-f raw|-O qcow2|--target-format raw|-O luks|-O nope|-o cluster_size=4k|--options help|-o bad=1|-l one|-l snapshot.id=1|"
        "--snapshot snapshot.bad=1|--size 1M|--size x|--output json|--output x|-U|--force-share|--object|--image-opts|-o key-secret=s0",
    ),
    "rebase": (
        "top",
        "-f qcow2|--format raw|-F raw|--backing-format qcow2|-F nope|-b base|--backing over|-b ''|-b nope|-u|--backing-unsafe|-p|--progress|-q|--quiet|-t none|"
        "--cache bad|-T none|--backing-cache bad|-c|--compress|--object|--image-opts|-U|--force-share",
    ),
    "snapshot": (
        "snap",
        "-l|--list|-a one|-c new|-d one|-a nope|-q|--quiet|--object|--image-opts|-U|--force-share|-f qcow2|--format raw|-f nope",
    ),
}

SHARE = {"convert": 0.28, "bench": 0.4}  # of the pairs of options that are tried, where there are many of them

KINDS = "r q top snap both bm v2 ext df dr lost comp lazy corrupt none sub null-co://".split()

# What each kind of image is put through.
DEEDS = [
    "amend -o %s KIND" % options
    for options in "size=3M compat=0.10 refcount_bits=32 lazy_refcounts=on data_file=x data_file_raw=on data_file_raw=off backing_file=base".split()
] + """
amend -o encrypt.state=active KIND
bitmap --add KIND z
bitmap --add --disable -g 1M KIND z
bitmap --remove KIND a
bitmap --clear --enable KIND b
bitmap --merge b KIND a
bitmap --add --merge a -b bm KIND z
bitmap --add --merge x -b both KIND z
commit KIND
commit -d -t none KIND
commit -b base -r 1G KIND
rebase -b '' KIND
rebase -c -b '' KIND
rebase -b base -F raw KIND
rebase -b snap -F qcow2 KIND
rebase -u KIND
rebase -u -b over -F qcow2 KIND
rebase -b lost -F qcow2 KIND
rebase -b df -F qcow2 KIND
snapshot KIND
snapshot -c new KIND
snapshot -a one KIND
snapshot -d two KIND
map KIND
map -s 100k -l 300k --output json KIND
measure -O qcow2 KIND
measure -O qcow2 -l one KIND
measure -O qcow2 -o data_file=zz,extended_l2=on --output json KIND
measure -O luks KIND
convert KIND x
convert -O qcow2 --bitmaps KIND x
convert -O qcow2 -B base -F raw KIND x
convert -C -r 1G KIND x
convert --salvage -S 0 -O qcow2 KIND x
convert -c -O qcow2 KIND x
convert -l one KIND x
convert -l snapshot.id=2,snapshot.name=two -O qcow2 KIND x
convert -O qcow2 -o data_file=y,data_file_raw=on KIND x
convert -n -O qcow2 --bitmaps KIND bm
convert -n --target-is-zero -O qcow2 KIND q
bench -c 9 -w --pattern 3 -o 64k KIND
bench -c 9 -i io_uring KIND
""".strip().splitlines()


# Lines whose outcome is the same and whose files are not, on purpose.
APART = re.compile(
    r"convert .*(-t bad|null-co)|bench .*-w .*-o 5M|measure .*null-co|"
    r"rebase (?=.*(-b|--backing) over)(?=.*(-F|--backing-format) raw)|rebase (?=.*(-b|--backing) base)(?=.*(-F|--backing-format) qcow2)"
)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"), GALLERY)


def pairs(command: str) -> Iterator[str]:
    """Each option alone, then two at a time in either order, some behind the operand."""
    operands, text = OPTIONS[command]
    options = [OBJECT if option == "--object" else option for option in text.split("|")]
    chance = random.Random(command)
    ending = " -c 9" if command == "bench" else ""
    for option in options:
        yield "%s %s %s%s" % (command.strip(), option, operands, ending if "-c" not in option else "")
    for one, other in itertools.combinations(options, 2):
        if chance.random() > SHARE.get(command, 0.45) * (0.3 if BRIEF else 1):
            continue
        if chance.random() < 0.5:
            one, other = other, one
        behind = chance.random() < 0.3
        words = [command.strip(), one, operands, other] if behind else [command.strip(), one, other, operands]
        yield " ".join(words) + ("" if "-c " in one + other + " " else ending)


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_options_beside_one_another(matrix: Matrix, command: str) -> None:
    lines = [line for line in pairs(command) if not APART.match(line)]
    failures = matrix.failures(lines, known)
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(matrix: Matrix, kind: str) -> None:
    lines = [deed.replace("KIND", kind) for deed in DEEDS]
    failures = matrix.failures([line for line in lines if not APART.match(line)], known)
    assert not failures, "\n\n".join(failures)
