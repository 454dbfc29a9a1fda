# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The options of the commands against qemu-img: which spellings are taken, and what is said about a bad command line.

Everything here is decided before an image is opened. What differs on purpose is in docs/differences.md.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diskwright import cli
from diskwright.commands.help import EXAMPLES
from diskwright.commands.ui import UI

# The spellings that qemu-img 10.0.2 takes, as Debian builds it; a colon marks those that need an argument.
QEMU_IMG = {
    "amend": "-h --help -o: --options: -f: --format: -t: --cache: -p --progress -q --quiet --object: --image-opts --force",
    "bench": "-h --help -c: --count: -d: --depth: -f: --format: -n --native -i: --aio: -o: --offset: -q -s: --buffer-size: -S: --step-size: "
    "-t: --cache: -w --write --flush-interval: --pattern: --no-drain --image-opts -U --force-share",
    "bitmap": "-h --help -b: --source-file: -F: --source-format: -f: -g: --granularity: --add --remove --clear --enable --disable --merge: "
    "--object: --image-opts",
    "check": "-h --help -q --quiet -f: --format: -T: --cache: -r: --repair: --output: --object: --image-opts -U --force-share",
    "commit": "-h --help -f: --format: -t: --cache: -b: --base: -d --drop -p --progress -q --quiet -r: --rate: --object: --image-opts",
    "compare": "-h --help -q --quiet --object: -T: --cache: --image-opts -f: --a-format: --left-format: -F: --b-format: --right-format: "
    "-U --force-share -s --strict -p --progress",
    "convert": "-h --help -q --quiet --object: --image-opts --source-image-opts -f: --source-format: -T: --source-cache: -l: --snapshot: "
    "-S: --sparse-size: -O: --output-format: -o: --options: -t: --output-cache: -B: --backing: -F: --backing-format: -U --force-share "
    "--target-image-opts --salvage --target-is-zero --bitmaps --skip-broken-bitmaps -r: --rate: -m: --parallel: -W --oob-writes "
    "-C --copy-range-offloading -c -n -p",
    "create": "-h --help -q --quiet --object: -f: --format: -b: --backing: -F: --backing-format: -u --backing-unsafe -o: --options:",
    "dd": "-h --help --object: -f: --format: -O: --output-format: --image-opts -U --force-share",
    "info": "-h --help -f: --format: --output: -b --backing-chain --object: --image-opts -U --force-share",
    "map": "-h --help -f: --format: --output: --object: --image-opts -U --force-share -s: --start-offset: -l: --max-length:",
    "measure": "-h --help -O: --target-format: -f: --format: --image-opts -o: --options: -l: --snapshot: --object: --output: --size: "
    "-U --force-share",
    "rebase": "-h --help -f: --format: -F: --backing-format: -b: --backing: -u --backing-unsafe -p --progress -q --quiet -t: --cache: "
    "-T: --backing-cache: -c --compress --object: --image-opts -U --force-share",
    "resize": "-h --help -q --quiet --object: -f: --format: --image-opts --preallocation: --shrink",
    "snapshot": "-h --help -q --quiet --object: -f: --format: --image-opts -U --force-share -l --list -a: -c: -d:",
}

# Those that only other dialects have, or that qemu-img's help promises and its parser refuses.
OTHERS = {
    "bench": "--quiet",
    "commit": "--rate-limit:",
    "rebase": "-B:",
    "bitmap": "--format:",
    "compare": "",
    "convert": "--progress --compress --no-create --target-format: --target-options: --target-cache: --source-snapshot: -b: --format: "
    "--target-format-options: --rate-limit:",
    "create": "-B:",
    "measure": "-s:",
    "snapshot": "--apply: --create: --delete:",
}

# A value that each option takes; everything else takes "raw".
VALUES = {
    **dict.fromkeys(("-T", "-t", "--cache", "--source-cache", "--output-cache", "--target-cache"), "none"),
    **dict.fromkeys(("-m", "--parallel"), "8"),
    **dict.fromkeys(("-S", "--sparse-size", "-s", "--start-offset", "--max-length", "--size", "--rate", "--rate-limit", "-r", "-g", "--granularity"), "4k"),
    "--repair": "all",
    "--output": "json",
    "--object": "secret,id=s,data=x",
    "--preallocation": "off",
}


def value_of(command: str, name: str) -> str:
    if command == "check" and name == "-r":
        return "leaks"
    if command == "bench" and name in ("-c", "--count", "-d", "--depth", "--pattern", "--flush-interval"):
        return "70"
    if command == "bench" and name in ("-o", "--offset", "--buffer-size", "-S", "--step-size"):
        return "4k"
    if command == "bench" and name in ("-i", "--aio"):
        return "threads"
    if command == "amend" and name in ("-o", "--options"):
        return "size=1M"
    if command == "map" and name == "-l":
        return "1"
    return VALUES.get(name, "raw")


def run_ours(args: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    status = cli.run(args, UI("qemu-img", out, err))
    return status, out.getvalue(), err.getvalue()


def run_theirs(args: list[str], directory: Path) -> tuple[int, str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "POSIXLY_CORRECT"}
    run = subprocess.run(["qemu-img", *args], cwd=directory, capture_output=True, env={**environment, "LC_ALL": "C.UTF-8"}, check=False)
    return run.returncode, run.stdout.decode(), run.stderr.decode()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with no images in it: a command line that opens one fails."""
    return tmp_path_factory.mktemp("options")


@pytest.mark.parametrize("command", sorted(QEMU_IMG))
def test_every_spelling_is_taken(command: str, directory: Path) -> None:
    """-h at the end answers at once, if all that stands before it was taken."""
    both = [(spelling, True) for spelling in QEMU_IMG[command].split()]
    both += [(spelling, False) for spelling in OTHERS.get(command, "").split()]
    for spelling, known in both:
        name = spelling.rstrip(":")
        args = [command, name, *([value_of(command, name)] if spelling.endswith(":") else []), "-h"]
        status, out, err = run_ours(args)
        assert (status, err) == (0, ""), args
        assert "Usage: qemu-img %s " % command in out
        if (command, known) != ("snapshot", False):  # these it takes without an argument, and then fails
            assert (run_theirs(args, directory)[0] == 0) == known, args
        if spelling.endswith(":"):
            status, out, err = run_ours([command, name])
            assert status == 1 and "requires an argument" in err
            if known:
                assert (status, out, err) == run_theirs([command, name], directory)


@pytest.mark.parametrize("command", sorted(QEMU_IMG))
def test_help_shows_every_option(command: str) -> None:
    text = run_ours([command, "--help"])[1]
    words = text.replace(",", " ").replace("[", " ").split()
    for spelling in QEMU_IMG[command].split():
        assert spelling.rstrip(":") in words, spelling
    assert max(map(len, text.splitlines())) <= 100
    assert text.endswith("\n") and "  \n" not in text


@pytest.mark.parametrize("command", sorted(QEMU_IMG))
def test_the_examples_in_help_are_command_lines(command: str) -> None:
    module = cli.load(command)
    for _text, example in EXAMPLES[command]:
        module.COMMAND.read(example.split(" | ")[0].split(), UI("qemu-img", None, None))


@pytest.mark.parametrize("command", sorted(QEMU_IMG))
def test_prefixes_are_those_of_qemu_img(command: str, directory: Path) -> None:
    """Every prefix of every long option, down to the dashes: taken, ambiguous or unknown."""
    names = {spelling.rstrip(":") for spelling in QEMU_IMG[command].split() if spelling.startswith("--")}
    prefixes = sorted({name[:length] for name in names for length in range(3, len(name) + 1)})
    lines = [[command, prefix + "=raw"] for prefix in prefixes] + [[command, "--=x"]]
    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(lambda args: run_theirs(args, directory), lines))
    for args, (status, out, err) in zip(lines, expected):
        if "--progress".startswith(args[1].split("=")[0]) and args[1] != "--=x":
            continue  # takes an argument here (docs/differences.md)
        assert run_ours(args) == (status, out, err), args


# Command lines that are refused, or answered, before any image is opened.
LINES = """
create
create -q
create -f raw
create x 1x
create x ''
create x 1.5
create x -1
create x -- -1
create -- x -1
create x 8E
create x 1M 2M
create x 1x 2M
create -o '' x 1M
create -o ,a x 1M
create -o a, x 1M
create -o ,,a x 1M
create -o a,,, x 1M
create -o ,, x 1M
create -o a -o '' x 1M
create -o help, x
create -o help
create -f raw -o help
create -o '?'
create -o size=1,help
create -o help -o size=1
create -o help -f raw
create -o a,,help
create -o help,,
create -f nope -o help
create -o help foo:bar
create --object foo x 1M
create --object '' x 1M
create --object secret x 1M
create --object secret,id=s x 1M
create --object secret,id=s,data x 1M
create --object secret,id=s,data=x,foo x 1M
create --object secret,id=s,data=x,file=y x 1M
create --object secret,id=s,data=x,format=foo x 1M
create --object secret,id=s,data=x,bogus=1 x 1M
create --object secret,id=1x,data=x x 1M
create --object secret,id=,data=x x 1M
create --object secret,id=s,,data=x x 1M
create --object secret,id=s,=x x 1M
create --object ,id=s x 1M
create --object id=x x 1M
create --object secret,id=s,data=x --object secret,id=s,data=y x 1M
create --object '{"qom-type":"secret"' x
create --object '{' x
create --object '{}' x
create --object '{"a":1}}' x
create --object '{"qom-type":"secret","id":"s","data":1}' x 1M
create --object '{"qom-type":1,"id":"s"}' x 1M
create --object '{"qom-type":"secret","data":"1"}' x 1M
create --object '{"qom-type":"secret","id":"s","foo":"1"}' x 1M
create --object '{"qom-type":"throttle-group","id":"t","limits":{"iops-total":"1"}}' x 1M
create --object throttle-group,id=t,bogus=1 x 1M
create --object throttle-group,id=t,limits.iops-total=1k x 1M
create --object throttle-group,id=t,limits.iops-total=-1 x 1M
create --object throttle-group,id=t,limits.iops-total-max=1 x 1M
create --object throttle-group,id=t,limits.foo=1 x 1M
create --object throttle-group,id=t,limits=1 x 1M
create --object throttle-group,id=t,x-iops-total=1,x-iops-read=1 x 1M
create --object throttle-group,id=t,limits.iops-total=1,limits.iops-read=1 x 1M
create --object throttle-group,id=t,limits.bps-total-max=1,limits.bps-write-max=1 x 1M
create --object throttle-group,id=t,limits.iops-total-max-length=0 x 1M
create --object throttle-group,id=t,limits.iops-total-max-length=2 x 1M
create --object throttle-group,id=t,limits.iops-total=5,limits.iops-total-max=2 x 1M
create --object throttle-group,id=t,limits.iops-total=9999999999999999 x 1M
create --object authz-simple,id=m x 1M
create --object help x
create --object nope,help x
create --object secret,? x
create --object secret,id=s,help x
create --object throttle-group,help x
create --object tls-creds-x509,help
create --object tls-creds-psk,help
create --object tls-creds-anon,help
create --object authz-list,help
create --object authz-list-file,help
create --object authz-simple,help
create --object pr-manager-helper,help
create --object main-loop,help
create --object thread-context,help
create --object secret_keyring,help
create --backing
create -Z
create -qZ
create --quiet=1
create x 1M -Z
create -T none x
create -t none x
create -p x
create -U x
info
info a b
info --output x a
info --output= a
info --output JSON a
info --output x --badopt a
info -f nope --output x
info --image-opts -f raw a
info -f raw --image-opts
info --object foo,id=x a
info --object foo,id=x --output x
info --output x --object foo,id=x
info a -s
info -q a
info -p a
info -c
check
check a b
check --output x a
check -r x a
check -r '' a
check -r leaks,all a
check -r x --output y
check --output y -r x
check -T bogus a
check -T '' a
check -T bogus -U -r all a
check -f nope -T bogus a
check --image-opts -f raw -T bogus a
check --image-opts -f raw a
check --object foo,id=x -T bogus a
check -t none a
check -p a
check -u a
check --help=1
check --quiet=1 a
check --o=json a
map
map a b
map --output x a
map -s x a
map -s 1x a
map -s -1 a
map -s 8E a
map -s ''
map -l x -s x a
map -s x -l x
map -l -1
map -l 9223372036854775808 a
map --start-offset 1y a
map --max-length=1.5
map --object foo,id=x a
map -p a
map -s
map --image-opts -f raw a
measure
measure -O qcow2
measure --size 1M a
measure --size 1M a b
measure a b
measure --size x
measure --size ''
measure --size 1x -O nope
measure --size -1
measure --size 8E
measure --output x --size 1M
measure -o '' --size 1M
measure -O qcow2 -o ,a --size 1M
measure -f raw --size 1M
measure -f raw
measure -l foo --size 1M
measure --image-opts --size 1M
measure --image-opts
measure -l snapshot.x=1 none
measure -l snapshot.x=1
measure -l snapshot.x=1 --size x
measure --size x -l snapshot.x=1
measure --object foo,id=x --size 1M
measure -q --size 1M
measure -o help
measure -o help a b
measure --image-opts -f raw a
resize
resize a
resize -5
resize -5 a
resize -f -5
resize -- -5
resize a 1 2
resize a 1 2 3
resize a 1 2 --object foo
resize a 1 -f
resize -- a 1 2
resize a 1 -- 2
resize a -- 1 2
resize -- a 1 -q
resize a -x
resize a -.5k
resize a --shrink -5
resize a -f qcow2 -5
resize -512M a
resize a 1x
resize a ''
resize a +
resize a +x
resize a -- -
resize a +-1
resize a -1x
resize a -1.5
resize a 16E
resize a 18446744073709551616
resize -f nope a 2x
resize --preallocation x a 2M
resize --preallocation '' a 2M
resize --preallocation help a 2M
resize --preallocation x --object foo a
resize --object foo,id=x a 2M
resize --object foo,id=x --preallocation zz a 2x
resize --image-opts -f raw a 2M
resize --image-opts -f raw a 2x
resize -U a 1M
resize --shrink a +
compare
compare a
compare a b c
compare -T bogus a b
compare -f nope -T bogus a b
compare --object foo,id=x -T bogus a b
compare --object foo,id=x
compare --image-opts -f raw a b
compare --image-opts -f raw -T bogus a b
compare -r a b
compare -O raw a b
compare --output json a b
compare --f
compare -p
compare -p -T bogus a b
compare -p --image-opts -f raw a b
compare -p -q -T bogus a b
compare --progress
dd
dd if=a
dd of=x
dd if=
dd foo=1
dd foo
dd ''
dd =x
dd if=a of=x foo=1
dd if=a of=x foo
dd conv=notrunc if=a of=b
dd seek=1 if=a of=b
dd bs=
dd bs=0
dd bs=-1
dd bs=1x
dd bs=1.5
dd bs=2G
dd bs=2147483648
dd bs=x if=a of=x
dd bs=0 foo=1
dd foo=1 bs=0
dd count=1k
dd count=x
dd count=-1
dd count=
dd count=08
dd count=99999999999999999999
dd count=99999999999999999999x
dd skip=x
dd skip=1k
dd skip=-1
dd --object foo,id=x if=a of=x
dd --object foo,id=x foo=1
dd --image-opts -f raw if=a of=x
dd --image-opts -f raw
dd -n if=a of=x
dd -p if=a of=x
dd -q if=a of=x
convert
convert a
convert -p a
convert -p
convert -O nope a
convert -T bogus a x
convert -T '' a x
convert -T bogus -t bogus2 a x
convert --image-opts -f raw -T bogus a x
convert -S x a x
convert -S '' a x
convert -S 1 a x
convert -S 511 a x
convert -S 513 a x
convert -S 32M a x
convert -S 16777728 a x
convert -S -1 a x
convert -S 8E a x
convert -S 1x --badopt
convert -m 0 a x
convert -m 17 a x
convert -m x a x
convert -m 1k a x
convert -m '' a x
convert -m 0 -S x
convert -r x a x
convert -r -1 a x
convert -r 8E a x
convert -o '' a x
convert -o ,x a x
convert -o x, a x
convert -o help -o ,x a x
convert -o help
convert -o help a
convert -O raw -o help,size=5 a
convert -O nope -o help
convert -o help a foo:bar
convert -o help -T bogus
convert -c -C a x
convert -C -S 4k a x
convert -C -S 0 a x
convert -C -S 4k -c a x
convert -C --salvage a x
convert -C --salvage -S 4k a x
convert -C -c -o help a x
convert --salvage -C -c
convert --skip-broken-bitmaps
convert --skip-broken-bitmaps -C -c
convert --skip-broken-bitmaps -T bogus a x
convert --skip-broken-bitmaps --image-opts -f raw
convert --target-image-opts
convert --target-is-zero
convert --target-is-zero --target-image-opts
convert --target-is-zero --target-image-opts -C -c
convert --target-is-zero -o help
convert --target-is-zero -C -c
convert --target-image-opts a x
convert --target-is-zero a x
convert -n -o foo=1
convert -n -o foo=1 a x
convert -n -o help a x
convert -n -o foo=1 --target-image-opts -C -c
convert -n -o foo=1 --target-is-zero -B x
convert -n -o foo=1 --image-opts -f raw
convert --image-opts -f raw
convert --image-opts -f raw --target-is-zero
convert --image-opts -f raw -C -c
convert --image-opts -f raw a x
convert -p --image-opts -f raw a x
convert -q -p --image-opts -f raw a x
convert -p -T bogus a x
convert --target-image-opts -O raw -n
convert -l snapshot.x=1 none x
convert -l snapshot.x=1
convert -l snapshot.x=1 -T bogus none x
convert -l snapshot.x=1 -C -c none x
convert -C -l snapshot.id=1,snapshot.x=2 -c
convert --object foo,id=x a x
convert --object foo,id=x -O nope
convert --object foo,id=x
convert -s foo a x
convert -6 a x
convert -e a x
convert -u a x
convert --target=1
convert --s=1
convert --so=1
convert --b=x
convert --ba=x
convert --bitmaps=1
frob
''
-x
--=
--vers=1
-T
--trace
--trac
-x create
-q create
-- create
"""

# Command lines that find out with their first image, or while they make one, what is wrong. a.qcow2 and b.raw are empty
# images of 1 MiB; x and none do not exist.
OPENING_LINES = """
info none
info -f raw none
info -f nope a.qcow2
info -f qcow2 b.raw
info --image-opts a.qcow2
info --image-opts driver=qcow2
info --image-opts ''
info --image-opts driver=nope,file.filename=a.qcow2
info --image-opts driver=qcow2,file.filename=a.qcow2,foo=bar
info 'json:{'
info 'json:[1]'
info 'json:{"driver":"nope"}'
check none
check -f nope a.qcow2
check -r leaks none
check -r leaks -U a.qcow2
check -q a.qcow2
check b.raw
check -q b.raw
check --output json b.raw
check -f raw a.qcow2
check a.qcow2
check -r all a.qcow2
check -T none a.qcow2
map none
map -f nope a.qcow2
map -s 2M a.qcow2
map -l 0 a.qcow2
map --output json b.raw
map -s 64k -l 64k --output json b.raw
measure none
measure -f nope a.qcow2
measure -O nope none
measure -O nope a.qcow2
measure -O nope --size 1M
measure -O raw --size 1M
measure -O raw --size 1000 --output json
measure -U --size 1M
measure -o foo=1 --size 1M
measure -o foo=1 none
measure -o help --size 1M
measure -O qcow2 -o cluster_size=x --size 1M
measure -O qcow2 -o size=x --size 1M
measure -O qcow2 -o size=2M --size 1M
measure -O qcow2 -o help a.qcow2
measure -l foo a.qcow2
measure -l foo b.raw
measure -l snapshot.id=1 a.qcow2
resize none 1M
resize x -5
resize -f nope a.qcow2 2M
resize a.qcow2 512k
resize a.qcow2 -1k
resize -- a.qcow2 -1k
resize a.qcow2 0
resize a.qcow2 8E
resize a.qcow2 +8E
resize --shrink a.qcow2 -2M
resize a.qcow2 +0
resize a.qcow2 -5 --shrink
resize --preallocation full a.qcow2 512k --shrink
resize --preallocation full b.raw 512k --shrink
resize --preallocation metadata b.raw 2M
resize -q a.qcow2 2M
resize a.qcow2 --shrink 512k -q
resize --preallocation=off b.raw -0
resize b.raw 1M
compare none b.raw
compare a.qcow2 none
compare -f nope a.qcow2 b.raw
compare -F nope a.qcow2 b.raw
compare --image-opts -F raw a.qcow2 b.raw
compare a.qcow2 b.raw
compare -p none b.raw
compare -p a.qcow2 b.raw
compare -p -q a.qcow2 b.raw
compare -s a.qcow2 b.raw
compare -q -s a.qcow2 b.raw
compare -f raw --left-format qcow2 a.qcow2 b.raw
dd if=none of=x
dd if= of=x
dd if=a.qcow2 if= of=x
dd -f nope if=a.qcow2 of=x
dd -f nope -O nope if=none of=x
dd -O nope if=a.qcow2 of=x
dd -O nope if=none of=x
dd if=a.qcow2 of=x
dd if=a.qcow2 of=x skip=5000
dd if=a.qcow2 of=x bs=2147483647
dd if=b.raw of=x count=1 skip=1
create x
create -f raw x
create -f nope x 1M
create -f nope x
create -f qcow2 -b b.raw x 1M
create -f qcow2 -b b.raw -F nope x 1M
create -f qcow2 -b b.raw -F raw -b a.qcow2 x 1M
create -f qcow2 -b none -F raw x
create -f qcow2 -b none -F raw x 1M
create -f qcow2 -b x -F raw x 1M
create -f qcow2 -b '' x 1M
create -f qcow2 -u -b none x 1M
create -f qcow2 -u -b none -F raw x
create -f qcow2 -F raw x 1M
create -F raw x 1M
create -F raw -b b.raw x 1M
create -f qcow2 -o backing_file=b.raw x 1M
create -f qcow2 -o backing_file=b.raw,backing_fmt=raw x 1M
create -f qcow2 -o backing_fmt=raw -F raw -b b.raw x 1M
create -o size=1M x 1M
create -o size=1M x
create -o size=1x x
create -o size=16E x
create -o size=-1 x
create -o foo=1 x 1M
create -o foo x 1M
create -o =1 x 1M
create -o x=help x 1M
create -o help=on x 1M
create -f qcow2 -o cluster_size=1x x 1M
create -f qcow2 -o cluster_size=1000 x 1M
create -f qcow2 -o lazy_refcounts=maybe x 1M
create -f qcow2 -o preallocation=xx x 1M
create -f qcow2 -o refcount_bits=1x x 1M
create -f qcow2 -o refcount_bits=99999999999999999999 x 1M
create -o size=1M -o preallocation=off x
create -q x 1M
create x 1M
create x 1000
create -f qcow2 x 1M
create foo:bar 1M
create '' 1M
create /nonexistent/x 1M
create -o help x
create -f qcow2 -o help x
create -f qcow2 -o help
create -o help nope/x
create -o help /dev/null
create --object secret,id=s,data=x x 1M
create --object secret,id=s,data=eA==,format=base64 x 1M
create --object '{"qom-type":"secret","id":"s","data":"x"}' x 1M
create --object throttle-group,id=t,x-bps-total=1 x 1M
convert none x
convert a b c
convert -f nope a.qcow2 x
convert -f nope -O nope a.qcow2 x
convert -O nope none x
convert -O nope a.qcow2 x
convert -p -O nope a.qcow2 x
convert -p none x
convert -t bogus none x
convert -t bogus a.qcow2 x
convert -t bogus -O nope a.qcow2 x
convert -t bogus -c a.qcow2 x
convert -t bogus -n a.qcow2 x
convert -t bogus -o foo=1 a.qcow2 x
convert -t bogus -B foo a.qcow2 x
convert -t bogus -O qcow2 -o backing_file=foo a.qcow2 x
convert --image-opts a.qcow2 x
convert --target-image-opts -n a.qcow2 b.raw
convert --target-image-opts -O raw -n a.qcow2 file.filename=b.raw
convert --target-image-opts -O raw -n none none
convert -o foo=1 none x
convert -o foo=1 a.qcow2 x
convert -o x=help a.qcow2 x
convert -o help a.qcow2 x
convert -o cluster_size=4k -O qcow2 -o size=5,help a.qcow2 x
convert -c a.qcow2 x
convert -c -O qcow2 a.qcow2 x -o preallocation=metadata
convert -B b.raw a.qcow2 x
convert -O qcow2 -B b.raw a.qcow2 x
convert -O qcow2 -B b.raw -F nope a.qcow2 x
convert -O qcow2 -B none -F raw a.qcow2 x
convert -O qcow2 -F raw a.qcow2 x
convert -O qcow2 -B b.raw -F raw a.qcow2 a.qcow2 x
convert -O raw -B b.raw -F raw a.qcow2 x
convert -B foo none none x
convert -l foo a.qcow2 x
convert -l foo b.raw x
convert -l foo none none x
convert -l foo a.qcow2 a.qcow2 x
convert -l snapshot.id=1 a.qcow2 x
convert -l foo -B foo a.qcow2 a.qcow2 x
convert --bitmaps a.qcow2 x
convert --bitmaps a.qcow2 a.qcow2 x
convert --bitmaps none none x
convert -T writeback --bitmaps -O qcow2 b.raw x
convert -n a.qcow2 none
convert -n -c -O qcow2 a.qcow2 none
convert -n -B foo a.qcow2 b.raw
convert a.qcow2 a.qcow2
convert -p a.qcow2 x
convert -q -p a.qcow2 x
convert -W -m 1 a.qcow2 x
convert -r 0 a.qcow2 x
convert -S 16M a.qcow2 x
convert a.qcow2 /nonexistent/x
convert -p a.qcow2 /nonexistent/x
convert a.qcow2 /dev/null
"""


def words(line: str) -> list[str]:
    """Split like a shell, as far as the lines above need it."""
    found: list[str] = []
    quoted = False
    word: list[str] = []
    begun = False
    for character in line + " ":
        if character == "'":
            quoted = not quoted
            begun = True
        elif character == " " and not quoted:
            if begun:
                found.append("".join(word))
            word, begun = [], False
        else:
            word.append(character)
            begun = True
    return found


@pytest.fixture(scope="module")
def expected(directory: Path) -> dict[str, tuple[int, str, str]]:
    lines = [line for line in LINES.splitlines() if line]
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(lines, pool.map(lambda line: run_theirs(words(line), directory), lines)))


@pytest.mark.parametrize("line", [line for line in LINES.splitlines() if line])
def test_refused_and_answered_like_qemu_img(line: str, expected: dict[str, tuple[int, str, str]]) -> None:
    assert run_ours(words(line)) == expected[line]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two empty images."""
    directory = tmp_path_factory.mktemp("images")
    for name, format in (("a.qcow2", "qcow2"), ("b.raw", "raw")):
        subprocess.run(["qemu-img", "create", "-q", "-f", format, directory / name, "1M"], check=True)
    return directory


@pytest.mark.parametrize("line", [line for line in OPENING_LINES.splitlines() if line])
def test_fails_and_ends_like_qemu_img(line: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    results = []
    for side in (lambda args: run_theirs(args, tmp_path), run_ours):
        for name in os.listdir(tmp_path):
            os.unlink(tmp_path / name)
        for name in os.listdir(images):
            shutil.copy(images / name, tmp_path)
        monkeypatch.chdir(tmp_path)
        results.append(side(words(line)))
        made.append(sorted(os.listdir()))
    if results[0][1].startswith("Supported"):  # the words about each option are our own
        results = [(status, [row.split(" - ")[0] for row in out.splitlines()], err) for status, out, err in results]
    assert results[1] == results[0]
    assert made[1] == made[0]


def random_lines(count: int) -> list[list[str]]:
    """Command lines full of contradictions, of the commands that make no file."""
    rng = random.Random(50)
    values = ["raw", "qcow2", "nope", "none", "1M", "1x", "-1", "0", "17", "json", "human", "x", "", "help", "all", "leaks", "a=1", "off"]
    values += ["snapshot.id=1", "snapshot.x=1", "secret,id=s,data=x", "foo", "4k", "full"]
    lines = []
    while len(lines) < count:
        command = rng.choice(["check", "compare", "info", "map", "measure", "resize"])
        line = [command]
        for _word in range(rng.randrange(6)):
            spelling = rng.choice(QEMU_IMG[command].split())
            name = spelling.rstrip(":")
            if rng.random() < 0.35:
                line.append(rng.choice(["none", "none2", "1M", "-5", "+1", "--", "-", ""]))
            elif not spelling.endswith(":"):
                line += [name] if name not in ("-h", "--help") else []
            else:
                value = rng.choice(values) if rng.random() < 0.6 else value_of(command, name)
                line += [name + "=" + value] if name.startswith("--") and rng.random() < 0.5 else [name, value]
        lines.append(line)
    return lines


def test_random_command_lines(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    lines = random_lines(500)
    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(lambda args: run_theirs(args, directory), lines))
    assert [(args, run_ours(args)) for args in lines] == list(zip(lines, expected))
    assert not os.listdir(directory)
