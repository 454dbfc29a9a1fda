# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`info` against qemu-img."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import diskwright
from diskwright.commands.info import human, info
from diskwright.node import Snapshot
from side_by_side import same, setup, theirs

GALLERY = r"""
qemu-img create -f raw a.raw 1M
truncate -s 1000 odd.raw
: > empty
truncate -s 3M sparse.raw; dd if=/dev/urandom of=sparse.raw bs=64k count=1 seek=5 conv=notrunc status=none
cp sparse.raw 'odd "name\'; cp a.raw $'n\xc3\xa9\x7f\x01\t<\xf0\x9f\x98\x80'; cp a.raw 'a,b'; cp a.raw ./co:lon
head -c 600 /dev/urandom > noise
qemu-img create -f qcow2 plain.qcow2 1M
qemu-img create -f qcow2 -o compat=0.10 v2.qcow2 1M
qemu-img create -f qcow2 -o cluster_size=512,refcount_bits=1 tiny.qcow2 1M
qemu-img create -f qcow2 -o cluster_size=2M,lazy_refcounts=on,compression_type=zstd,extended_l2=on big.qcow2 1G
qemu-img create -f qcow2 -b a.raw -F raw over.qcow2
qemu-img create -f qcow2 -b over.qcow2 -F qcow2 over2.qcow2 5M
mkdir sub; qemu-img create -f qcow2 -u -b ../sparse.raw -F raw sub/up.qcow2 4M
qemu-img create -f qcow2 -u -b "$PWD/sparse.raw" -F raw abs.qcow2 4M
qemu-img create -f qcow2 -u -b gone -F raw gone.qcow2 4M
qemu-img create -f qcow2 -u -b nbd://localhost/x -F raw nbd.qcow2 4M
qemu-img create -f qcow2 -u -b foo:x -F raw foo.qcow2 4M
qemu-img create -f qcow2 -u -b 'json:{"driver":"raw","file":{"driver":"file","filename":"a.raw"}}' -F raw json.qcow2 4M
qemu-img create -f qcow2 loop1 1M; qemu-img create -f qcow2 -b loop1 -F qcow2 loop2; qemu-img rebase -u -b loop2 -F qcow2 loop1
qemu-img create -f qcow2 self 1M; qemu-img rebase -u -b self -F qcow2 self
qemu-img create -f qcow2 -o lazy_refcounts=on dirty.qcow2 1M
(qemu-io -c 'write 0 64k' -c abort dirty.qcow2 || true) 2>/dev/null
qemu-img create -f qcow2 snap.qcow2 1M
qemu-img snapshot -c one snap.qcow2; qemu-img snapshot -c 'a very long snapshot name indeed' snap.qcow2
qemu-img create -f qcow2 wrote.qcow2 10M; qemu-io -c 'write 0 3M' -c 'write -c 4M 64k' wrote.qcow2
head -c 100 plain.qcow2 > cut100; head -c 70 plain.qcow2 > cut70; head -c 4 plain.qcow2 > cut4
printf '\xff' | dd of=feature.qcow2 bs=1 status=none; cp plain.qcow2 feature.qcow2
printf '\x80' | dd of=feature.qcow2 bs=1 seek=72 conv=notrunc status=none
cp plain.qcow2 corrupt.qcow2; printf '\x02' | dd of=corrupt.qcow2 bs=1 seek=79 conv=notrunc status=none
ln -s over.qcow2 link.qcow2; ln -s nowhere dangling
qemu-img create -f qcow2 -o data_file=ext.raw,data_file_raw=on ext.qcow2 1M
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("info")
    setup(GALLERY, path)
    return path


IMAGES = (
    "a.raw odd.raw empty sparse.raw a,b ./co:lon noise plain.qcow2 v2.qcow2 tiny.qcow2 big.qcow2 over.qcow2 over2.qcow2 sub/up.qcow2 abs.qcow2 "
    "gone.qcow2 nbd.qcow2 json.qcow2 loop1 self dirty.qcow2 wrote.qcow2 cut100 cut70 cut4 feature.qcow2 corrupt.qcow2 link.qcow2 dangling "
    "file:a.raw file:over.qcow2 null-co:// null-aio:// /dev/null /dev/zero nosuch / sub foo:bar co:lon nosuch/x a.raw/x"
).split() + [r"'odd \"name\\'", "''", "'n\u00e9\x7f\x01\t<\U0001f600'", "foo.qcow2", "snap.qcow2", "ext.qcow2"]

OTHERS = [
    "-f qcow2 a.raw",
    "-f raw plain.qcow2",
    "-f nosuch a.raw",
    "-f file a.raw",
    "-f file plain.qcow2",
    "-f null-co null-co://",
    "-f null-co a.raw",
    "-f host_device a.raw",
    "-f raw nosuch",
    "-f qcow2 empty",
    "-U plain.qcow2",
    "-U --backing-chain over2.qcow2",
    "--image-opts driver=qcow2,file.driver=file,file.filename=plain.qcow2,lazy-refcounts=on",
    "--image-opts driver=raw,file.driver=file,file.filename=plain.qcow2,offset=512,size=1024",
    "--image-opts driver=raw,file.filename=plain.qcow2,offset=0",
    "--image-opts driver=raw,file.filename=plain.qcow2,size=1024,cache.direct=on",
    "--image-opts driver=raw,file.driver=raw,file.file.filename=a.raw",
    "--image-opts a.raw",
    "--image-opts driver=raw,file=foo",
    "--image-opts file.filename=a.raw",
    "--image-opts file.filename=/dev/null",
    "--image-opts driver=raw,file.filename=/dev/null",
    "--image-opts file.filename=over.qcow2,backing=",
    "--image-opts file.filename=over.qcow2,backing.driver=raw",
    "--image-opts file.filename=over.qcow2,backing=foo",
    "--image-opts driver=raw,file.filename=a.raw,backing=",
    "--image-opts driver=qcow2,file.filename=nosuch",
    "--image-opts driver=nosuch,file.filename=a.raw",
    "--image-opts driver=raw,file.filename=a.raw,nosuch=1",
    "--image-opts driver=qcow2,file.filename=plain.qcow2,nosuch=1",
    "--image-opts driver=raw,file.filename=a.raw,file.nosuch=1",
    "--image-opts driver=raw,file.filename=a.raw,size=1000",
    "--image-opts driver=raw,file.filename=a.raw,size=2M",
    "--image-opts driver=raw,file.filename=a.raw,offset=2M",
    "--image-opts driver=raw,file.filename=a.raw,offset=abc",
    "--image-opts driver=raw,file.filename=a.raw,read-only=on",
    "--image-opts driver=raw,file.filename=a.raw,discard=bad",
    "json:{}",
    "'json:{'",
    "json:5",
    """'json:{"driver":"raw"}'""",
    """'json:{"driver":"raw","file":5}'""",
    """'json:{"driver":"raw","file":"foo"}'""",
    """'json:{"driver":"qcow2","file":{"driver":"file","filename":"over.qcow2"}}'""",
    """'json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"over.qcow2"}}'""",
    """-b 'json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"over.qcow2"}}'""",
    """'json:{"driver":"qcow2","backing":{"driver":"null-co"},"file":{"driver":"file","filename":"over.qcow2"}}'""",
    """'json:{"file":{"driver":"file","filename":"plain.qcow2"}}'""",
    """'json:{"file.filename":"plain.qcow2"}'""",
    """'json:{"driver":"file","filename":"plain.qcow2"}'""",
    """'json:{"driver":"raw","file":{"driver":"null-co","size":12345}}'""",
    """'json:{"driver":"raw","offset":0,"file":{"driver":"file","filename":"a.raw"}}'""",
    """'json:{"driver":"raw","offset":"0","file.driver":"file","file.filename":"a.raw"}'""",
    """'json:{"driver":"raw","size":512,"file":{"driver":"null-co"}}'""",
    """'json:{"driver":"null-co","latency-ns":5}'""",
    """'json:{"driver":"null-co","size":"10M","read-zeroes":"on"}'""",
    """'json:{"driver":"raw","file":{"driver":"null-co","read-zeroes":true}}'""",
    """'json:{"driver":"raw","file":{"driver":"file","filename":"a.raw","aio":"threads","locking":"off"}}'""",
    """'json:{"driver":"qcow2","node-name":"x","discard":"unmap","file":{"driver":"raw","offset":0,"file":{"driver":"file","filename":"sub/up.qcow2"}}}'""",
    """-b 'json:{"driver":"qcow2","file":{"driver":"raw","offset":0,"file":{"driver":"file","filename":"sub/up.qcow2"}}}'""",
    r"""'json:{"driver":"raw","offset":0,"file":{"driver":"file","filename":"odd \"name\\"}}'""",
]


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("options", ["", "--backing-chain"])
@pytest.mark.parametrize("image", IMAGES)
def test_images(place: Path, image: str, options: str, output: str) -> None:
    if image == "nbd.qcow2" and options:
        return  # would need the network
    same("info --output %s %s %s" % (output, options, image), place)


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("line", OTHERS)
def test_others(place: Path, line: str, output: str) -> None:
    same("info --output %s %s" % (output, line), place)


def test_names_that_are_no_utf8(place: Path) -> None:
    """In a process of its own: only there the streams take bytes."""
    name = os.fsencode(place) + b"/raw\xff\xe3\x81x"
    Path(os.fsdecode(name)).write_bytes(b"x")
    program = "import sys; sys.argv[0] = 'qemu-img'; from diskwright.cli import main; sys.exit(main())"
    for output in ("human", "json"):
        args = ["info", "--output", output, name]
        expected = subprocess.run(["qemu-img", *args], capture_output=True, check=True)
        found = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, check=True)
        assert found.stdout == expected.stdout


def test_no_permission(place: Path, tmp_path: Path) -> None:
    """As another user, who may not read the file."""
    secret = place / "secret.raw"
    secret.write_bytes(b"x" * 512)
    secret.chmod(0)
    if os.access(secret, os.R_OK):  # we are root: be nobody, in a child
        pid = os.fork()
        if not pid:
            try:
                os.setgid(65534)
                os.setuid(65534)
                with pytest.raises(diskwright.Error) as caught:
                    info(str(secret))
                expected = "Could not open '%s': Could not open '%s': Permission denied" % (secret, secret)
                os._exit(0 if str(caught.value) in (expected,) else 1)
            except BaseException:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    else:
        same("info secret.raw", place)


def test_in_use(place: Path) -> None:
    """An image that another process writes to: refused with the same words, shown with -U."""
    holder = subprocess.Popen(["qemu-io", "-f", "qcow2", "plain.qcow2"], cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdin and holder.stdout
        holder.stdin.write("length\n")
        holder.stdin.flush()
        while "1 MiB" not in holder.stdout.readline():
            pass
        assert same("info plain.qcow2", place).code == 1
        assert same("info --backing-chain plain.qcow2", place).code == 1
        assert same("info -U plain.qcow2", place).code == 0
    finally:
        holder.communicate("quit\n")


def test_records(place: Path) -> None:
    """The typed results."""
    chain = info(str(place / "over2.qcow2"), backing_chain=True)
    assert [record.format for record in chain] == ["qcow2", "qcow2", "raw"]
    top = chain[0]
    assert (top.virtual_size, top.cluster_size, top.dirty, top.encrypted) == (5 << 20, 65536, False, False)
    assert top.backing_filename == "over.qcow2" and top.full_backing_filename == str(place / "over.qcow2")
    assert top.format_specific and top.format_specific["compat"] == "1.1"
    assert [name for name, _child in top.children] == ["file"]
    assert top.children[0][1].format == "file"


def test_policy_of_the_chain(place: Path) -> None:
    """The chain is followed only as far as the caller admits."""
    with pytest.raises(diskwright.Denied):
        info(str(place / "sub/up.qcow2"), backing_chain=True, policy=diskwright.OpenPolicy("same_directory"))
    assert len(info(str(place / "over2.qcow2"), backing_chain=True, policy=diskwright.OpenPolicy("same_directory"))) == 3
    with pytest.raises(diskwright.Denied):
        info(str(place / "over2.qcow2"), backing_chain=True, policy=diskwright.OpenPolicy("none"))


def test_a_chain_that_only_grows(tmp_path: Path) -> None:
    """A loop whose names never repeat: qemu-img goes on until the name is too long."""
    (tmp_path / "d").mkdir()
    setup("qemu-img create -f qcow2 -u -b d/../x -F qcow2 x 1M", tmp_path)
    with pytest.raises(diskwright.Error, match="creates an infinite loop"):
        info(str(tmp_path / "x"), backing_chain=True)


def test_snapshot_table(place: Path) -> None:
    """The layout of the table, also for values that qemu-img snapshot never makes."""
    record = info(str(place / "plain.qcow2"))[0]
    record.snapshots = [Snapshot("1", "one", 5 << 30, 0, 0, (100000 * 3600 + 61) * 10**9 + 5 * 10**6)]
    line = [line for line in human(record).splitlines() if line.startswith("1  ")][0]
    assert line.split()[-2:] == ["100000:01:01.005", "--"]
    assert "   5 GiB " in line


def test_setup_is_what_it_claims(place: Path) -> None:
    """The gallery has the states that the cases are about."""
    assert "cleanly shut down: no" in theirs(["info", "dirty.qcow2"], place).out
    assert "corrupt: true" in theirs(["info", "corrupt.qcow2"], place).out
    assert "infinite loop" in theirs(shlex.split("info -b loop1"), place).err
