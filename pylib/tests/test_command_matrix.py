# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The option matrix of the commands against qemu-img: every option alone and beside every other one, in both spellings, right and
wrong values; every kind of image, and what is none; objects; images in use, and in places where nothing can be written.

What differs on purpose is in docs/differences.md, and named in `known`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

from locks import stranger
from matrix import Matrix
from side_by_side import Outcome, difference

GALLERY = r"""
qemu-img create -f raw base 1M; qemu-io -f raw -c 'write -P 1 0 1M' base
qemu-img create -f raw r 1M; qemu-io -f raw -c 'write -P 5 0 100k' r
c() { qemu-img create -f qcow2 -o cluster_size=${3:-4k}$4 $5 $1 $2; }
c q 2M; qemu-io -c 'write -P 3 1M 64k' -c 'write -z 200k 300k' q
c over 2M 4k '' '-b base -F raw'; qemu-io -c 'write -P 3 1M 64k' -c 'write -z 200k 300k' over
c top 2M 64k '' '-b over -F qcow2'; qemu-io -c 'write -P 6 500k 64k' top
c snap 1M; qemu-io -c 'write -P 3 100k 64k' snap; qemu-img snapshot -c one snap; qemu-io -c 'write -P 4 100k 164k' snap
qemu-img snapshot -c two snap; qemu-io -c 'write -P 5 10k 64k' snap; cp snap both; qemu-img bitmap --add both x
c bm 2M; qemu-img bitmap --add bm a; qemu-img bitmap --add --disable -g 8k bm b; qemu-io -c 'write 100k 64k' bm
cp bm broken; printf '\1' | dd of=broken bs=1 seek=$(grep -obUa 'a' broken | tail -1 | cut -d: -f1) count=0 conv=notrunc
c v2 1M 4k ,compat=0.10; qemu-io -c 'write -P 3 100k 64k' v2
c ext 1M 16k ,extended_l2=on; qemu-io -c 'write -P 3 100k 64k' -c 'write -z 300k 5k' ext
c df 1M 4k ,data_file=df.raw; qemu-io -c 'write -P 3 100k 64k' df
c dr 1M 4k ,data_file=dr.raw,data_file_raw=on; qemu-io -c 'write -P 3 100k 64k' dr
c lost 1M 4k '' '-u -b nowhere -F qcow2'
c comp 1M; qemu-io -c 'write -P 3 0 128k' -c 'write -c -P 4 128k 4k' comp
c lazy 1M 4k ,lazy_refcounts=on; qemu-io -c 'write -P 3 100k 64k' lazy
cp q corrupt; printf '\x02' | dd of=corrupt bs=1 seek=79 conv=notrunc status=none
mkdir sub
"""

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


def known(line: str, expected: Outcome, found: Outcome) -> bool:
    """Whether two outcomes may differ: docs/differences.md says why."""
    words = shlex.split(line)
    silent = any(word in ("-q", "--quiet") for word in words)
    return (
        words[0] == "bench" and silent and expected.code == found.code and not found.out
        or words[0] == "bitmap" and "#block" in expected.err and expected.code == found.code
        or words[0] == "bitmap" and "-b bm" in line and line.endswith(("bm z", "bm a"))
        or words[0] == "bitmap" and "-b both both" in line
        or words[0] == "rebase" and "Assertion" in expected.err
        or words[0] == "rebase" and "could not get block driver info" in expected.err
        or words[:2] == ["snapshot", "-a"] and expected.err.count("WARNING") == 2 and found.err.count("WARNING") == 1
        or words[0] == "rebase" and PROGRESS_AND_REFUSAL.search(expected.out + expected.err) is not None and found.err == expected.err
    )


PROGRESS_AND_REFUSAL = re.compile(r"Could not change the backing file|\(N/100%\)")

# Lines whose outcome is the same and whose files are not, on purpose.
APART = re.compile(r"convert .*(-t bad|null-co)|rebase .*over.* -F raw|rebase .*-F raw.* over|bench .*-w .*-o 5M|measure .*null-co")


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
        if chance.random() > SHARE.get(command, 0.6):
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


KEY, VECTOR = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", "AAECAwQFBgcICQoLDA0ODw=="
WRAPPED = "f9Etr7fpWZ0LhJrYwuPCHw=="  # hello, by AES-256-CBC with these two

OBJECTS = [
    "secret,id=s0,data=hello",
    "secret,id=s0,file=pw",
    "secret,id=s0,data=aGVsbG8=,format=base64",
    "secret,id=s0,file=pw64,format=base64",
    "secret,id=k,data=%s,format=base64 --object secret,id=s0,keyid=k,iv=%s,data=%s,format=base64" % (KEY, VECTOR, WRAPPED),
    "secret,id=k,data=%s,format=base64 --object secret,id=s0,keyid=k,iv=%s,data=AAAA,format=base64" % (KEY, VECTOR),
    "secret,id=k,data=short --object secret,id=s0,keyid=k,iv=%s,data=%s,format=base64" % (VECTOR, WRAPPED),
    "secret,id=s0,data=wrong",
    "secret,id=s9,data=hello",
    "secret,id=s0,file=none",
    "secret,id=s0,file=sub",
    "secret,id=s0,data=%%%,format=base64",
    "secret,id=s0,data=hello,keyid=k",
    "secret,id=s0,data=hello,keyid=k,iv=x",
    "secret,id=s0",
    "secret",
    "foo,id=s0",
    "secret_keyring,id=s0,serial=1",
    "secret_keyring,id=s0",
    "throttle-group,id=s0,x-bps-total=100M",
    "throttle-group,id=s0,limits.iops-total=1000000,limits.iops-total-max=2000000",
    "tls-creds-x509,id=s0",
    "tls-creds-x509,id=s0,endpoint=client,dir=none",
    "tls-creds-psk,id=s0,endpoint=server,dir=sub",
    "tls-creds-psk,id=s0,endpoint=client,dir=keys",
    "tls-creds-anon,id=s0,endpoint=client",
    "authz-simple,id=s0,identity=x",
    "authz-list-file,id=s0,filename=none",
    "main-loop,id=s0,thread-pool-min=5,thread-pool-max=3",
    """'{"qom-type":"secret","id":"s0","data":"hello"}'""",
    """'{"qom-type":"secret","id":"s0","file":"pw64","format":"base64"}'""",
    """'{"qom-type":"secret","id":"s0","data":"hello","format":"xx"}'""",
    """'{"qom-type":"secret","id":"s0","data":5}'""",
    """'{"qom-type":"throttle-group","id":"s0","limits":{"bps-total":1000000}}'""",
    """'{"qom-type":"tls-creds-psk","id":"s0","dir":"keys"}'""",
]

WITH_OBJECTS = """
amend %s -o size=3M q
bitmap %s --add q x
commit %s -d over
convert %s -O qcow2 q x
map %s q
measure %s -O qcow2 q
rebase %s -u -b base -F raw over
snapshot %s -l q
convert %s --image-opts driver=luks,key-secret=s0,file.filename=luks -O raw x
map %s --output json 'json:{"driver":"luks","key-secret":"s0","file":{"driver":"file","filename":"luks"}}'
measure %s -O luks -o key-secret=s0,iter-time=10 q
""".strip().splitlines()

LUKS = r"""
qemu-img create -f luks --object secret,id=s0,data=hello -o key-secret=s0,iter-time=10 luks 512k
mkdir keys; printf 'qemu:00112233445566778899aabbccddeeff\n' > keys/keys.psk; printf hello > pw; printf aGVsbG8= > pw64
"""


def test_objects(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path, GALLERY + LUKS)
    failures = matrix.failures([line % ("--object " + text) for line in WITH_OBJECTS for text in OBJECTS], known)
    assert not failures, "\n\n".join(failures)


HELD = {
    "q": "amend -o size=3M q|bitmap --add q x|snapshot -l q|snapshot -U -l q|snapshot -c x q|map q|map -U q|measure q|bench -c 3 q|bench -U -c 3 q|"
    "bench -w -c 3 q|convert -n -O qcow2 base q|convert q x|rebase -u -b base -F raw q",
    "over": "commit over|commit -b base top|rebase -b base -F raw top|rebase -b '' top|rebase -u top|map top",
    "base": "commit over|rebase -b base -F raw q|rebase -U -b base -F raw q|rebase -b '' over|convert -n -f raw -O raw r base|bench -w -c 1 -f raw base",
    "bm": "bitmap --add --merge a -b bm q x|bitmap --clear bm a|convert --bitmaps -O qcow2 bm x",
}


@pytest.mark.parametrize("name", sorted(HELD))
def test_images_in_use(matrix: Matrix, name: str) -> None:
    failures = []
    for byte in (100, 101, 103, 200, 201, 203):
        with stranger(matrix.left / name, byte), stranger(matrix.right / name, byte):
            failures += matrix.failures(HELD[name].split("|"), known)
    assert not failures, "\n\n".join(failures)


PLACES = r"""
mkdir shut; cp q over base r snap bm shut; chmod 444 shut/*; chmod 555 shut
c above 2M 64k '' '-b shut/over -F qcow2'; qemu-io -c 'write -P 6 500k 64k' above; cp q hidden; chmod 0 hidden
"""

IN_PLACES = """
amend -o size=3M shut/q
bitmap --add shut/q x
bitmap --add --merge a -b shut/bm q x
commit shut/over
commit above
commit -b base above
commit -d -b shut/over above
rebase -b '' shut/over
rebase -u shut/over
rebase -b shut/q -F qcow2 above
rebase -b base -F raw above
snapshot -l shut/snap
snapshot -c x shut/snap
snapshot -a one shut/snap
map shut/over
measure -O qcow2 shut/over
convert shut/q shut/x
convert -O qcow2 shut/q x
convert -n -f raw -O raw base shut/r
convert -f raw -O raw base shut/r
convert -f raw -O qcow2 -B shut/base -F raw base shut/q
bench -c 3 shut/q
bench -w -c 3 shut/q
amend -o size=3M hidden
bitmap --add hidden x
bitmap --add --merge a -b hidden q x
snapshot -l hidden
map hidden
measure hidden
convert hidden x
convert -n q hidden
convert q hidden
rebase -b hidden -F qcow2 above
bench -c 3 hidden
""".strip().splitlines()

IN_A_CHILD = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from matrix import plain
from side_by_side import ours, theirs
import shlex
left, right = Path(sys.argv[2]), Path(sys.argv[3])
print(json.dumps([[line, plain(theirs(shlex.split(line), left)), plain(ours(shlex.split(line), right))] for line in json.load(sys.stdin)]))
"""


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    """As a user whom permissions bind; root is one without its privilege to pass them by."""
    matrix = Matrix(tmp_path, GALLERY + PLACES)
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    arguments = [sys.executable, "-c", IN_A_CHILD, str(Path(__file__).parent), str(matrix.left), str(matrix.right)]
    done = subprocess.run([*bound, *arguments], input=json.dumps(IN_PLACES), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    failures = [difference(line, Outcome(*found), Outcome(*expected)) for line, expected, found in json.loads(done.stdout) if expected != found]
    failures += matrix.differences()
    for place in (matrix.left, matrix.right):
        os.chmod(place / "shut", 0o755)
    assert not failures, "\n\n".join(failures)
