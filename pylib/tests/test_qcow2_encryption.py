# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Encrypted qcow2 images beside qemu-img: what is made, read, written and changed, key slots, damaged headers, and what is never told."""

from __future__ import annotations

import json
import random
import shlex
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

import diskwright
from conformance.recorder import Recorder, after_crash
from diskwright.crypto import luks as volumes
from diskwright.errors import Corrupt, Error
from diskwright.formats.qcow2 import Qcow2
from diskwright.formats.qcow2.options import Qcow2AmendOptions
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags
from diskwright.objects import add_object
from side_by_side import Outcome, difference, ours, same, setup, theirs, twins

K = 1024
M = 1024 * K
SECRETS = shlex.split(
    "--object secret,id=s,data=abc --object secret,id=n,data=new --object secret,id=w,data=wrong --object secret,id=e,data= "
    "--object secret,id=l,data=0123456789abcdefXYZ --object secret,id=b,data=/w==,format=base64 --object tls-creds-anon,id=t"
)
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
AES = "encrypt.format=aes,encrypt.key-secret=s"
METHODS = pytest.mark.parametrize("method", [LUKS, AES], ids=["luks", "aes"])


def objects() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in SECRETS[1::2]:
        add_object(found, text)
    return found


def with_secrets(line: str) -> list[str]:
    """A command line, with the secrets after the command."""
    command, *rest = shlex.split(line)
    return [command, *SECRETS, *rest]


def spec(name: str, key: str = "s", **more: str) -> str:
    """What --image-opts takes for an encrypted image."""
    return "driver=qcow2,encrypt.key-secret=%s,file.filename=%s%s" % (key, name, "".join(",%s=%s" % pair for pair in more.items()))


def opened(path: Path, key: str = "s", writable: bool = False, **more: Any) -> Qcow2:
    described = {"driver": "qcow2", "encrypt": {"key-secret": key}, "file": {"driver": "file", "filename": str(path)}, **more}
    node = Graph(objects=objects()).open_spec(described, OpenFlags(writable=writable, resize=writable))
    assert isinstance(node, Qcow2)
    return node


def content(seed: object, size: int) -> bytes:
    """Bytes with holes in them."""
    chance = random.Random(seed)
    parts = []
    while size > 0:
        count = min(size, chance.randrange(1, 100) * K)
        parts.append(chance.choice((bytes(count), chance.randbytes(count))))
        size -= count
    return b"".join(parts)


def both(line: str, place: Path) -> Outcome:
    """`same`, for a line without the secrets."""
    args = with_secrets(line)
    expected, found = theirs(args, place), ours(args, place)
    assert found == expected, difference(line, found, expected)
    return found


def read(run: Any, place: Path, described: str, options: str = "") -> bytes:
    """What one of the two reads."""
    done = run(with_secrets("convert --image-opts %s %s -O raw read" % (options, described)), place)
    assert done == (0, "", ""), done
    return (place / "read").read_bytes()


# -- making images -------------------------------------------------------------------------------------------------

# qemu-img takes seconds to find out how many iterations a LUKS key slot should have, so it makes few of these images.
MADE = [
    LUKS,
    LUKS + ",extended_l2=on,cluster_size=16k,data_file=d,backing_file=base,backing_fmt=raw",
    AES,
    AES + ",compat=0.10",
    AES + ",cluster_size=512",
    AES + ",cluster_size=2M",
    AES + ",cluster_size=4k,refcount_bits=64",
    AES + ",extended_l2=on,cluster_size=16k",
    AES + ",preallocation=metadata",
    AES + ",preallocation=full",
    AES + ",data_file=d,data_file_raw=on",
    AES + ",lazy_refcounts=on,backing_file=base,backing_fmt=raw",
    "encryption=on,encrypt.key-secret=s,compression_type=zstd",
    "encrypt.format=qcow,encrypt.key-secret=s",
    "encryption=off,encrypt.format=aes,encrypt.key-secret=e",
]


@pytest.mark.parametrize("options", MADE)
def test_made_like_qemu_img(tmp_path: Path, options: str) -> None:
    places = tmp_path / "theirs", tmp_path / "ours"
    line = "create -f qcow2 -o %s x 1234k" % options
    outcomes = []
    for run, place in zip((theirs, ours), places):
        place.mkdir()
        (place / "base").write_bytes(content(0, M))
        outcomes.append(run(with_secrets(line), place))
    assert outcomes[0] == outcomes[1] and outcomes[0].code == 0, difference(line, outcomes[1], outcomes[0])
    first = [(place / "x").read_bytes()[:512] for place in places]
    if "full" not in options:  # for which qemu-img lays tables out otherwise
        assert first[0] == first[1]
    same("info x", places[1])
    same("info --output=json x", places[1])
    told = [json.loads(theirs(["info", "--output=json", "x"], place).out)["format-specific"]["data"] for place in places]
    for data in told:
        data["encrypt"].update(uuid="", slots=[slot["key-offset"] for slot in data["encrypt"].get("slots", [])], **{"master-key-iters": 0})
    assert told[0] == told[1]
    key = options.split("key-secret=")[1][0]
    both("check --image-opts " + spec("x", key), places[1])
    both("map --output=json --image-opts " + spec("x", key), places[1])
    maps = [theirs(with_secrets("map --output=json --image-opts " + spec("x", key)), place).out for place in places]
    assert maps[0] == maps[1]
    assert read(theirs, places[1], spec("x", key)) == read(ours, places[1], spec("x", key))


CIPHERS = [
    "encrypt.cipher-alg=aes-128,encrypt.hash-alg=sha512",
    "encrypt.cipher-alg=aes-192,encrypt.ivgen-alg=plain",
    "encrypt.cipher-alg=aes-256,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,encrypt.hash-alg=sha1",
    "encrypt.cipher-alg=serpent-256",
    "encrypt.cipher-alg=twofish-128,encrypt.cipher-mode=cbc",
    "encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain64",
    "encrypt.cipher-mode=ctr,encrypt.hash-alg=ripemd160",
    "encrypt.cipher-mode=ecb",
]
COPIED = [
    *(LUKS + "," + cipher for cipher in CIPHERS),
    *(
        method + more
        for method in (LUKS, AES)
        for more in ("", ",cluster_size=512", ",compat=0.10", ",extended_l2=on,cluster_size=16k", ",data_file=d", ",preallocation=metadata", ",cluster_size=2M")
    ),
    "encryption=on,encrypt.key-secret=s",
    "encrypt.format=aes,encrypt.key-secret=l",
    "encrypt.format=aes,encrypt.key-secret=e",
]


@pytest.mark.parametrize("options", COPIED)
def test_content_both_ways(tmp_path: Path, options: str) -> None:
    size = 700 * K + 512
    key = options.split("key-secret=")[1][0]
    image = spec("x", key)
    data = [content(options + str(turn), size) for turn in range(2)]
    (tmp_path / "raw").write_bytes(data[0])
    (tmp_path / "other").write_bytes(data[1])
    assert ours(with_secrets("convert -O qcow2 -o %s raw x" % options), tmp_path) == (0, "", "")
    assert read(theirs, tmp_path, image) == data[0] == read(ours, tmp_path, image)
    both("check --image-opts " + image, tmp_path)
    both("compare --image-opts driver=raw,file.filename=raw " + image, tmp_path)
    both("map --image-opts " + image, tmp_path)
    stored = (tmp_path / "x").read_bytes() + ((tmp_path / "d").read_bytes() if "data_file" in options else b"")
    assert not any(data[0][at : at + 16] in stored for at in range(0, size, 4 * K) if any(data[0][at : at + 16]))
    assert theirs(with_secrets("convert -n --target-image-opts -f raw other " + image), tmp_path) == (0, "", "")
    assert read(ours, tmp_path, image) == data[1]
    both("check --image-opts " + image, tmp_path)


# Words and exit codes of create and measure; nothing is made.
REFUSED = [
    "encryption=on",
    "encryption=off,encrypt.key-secret=s",
    "encryption=off,encrypt.iter-time=3",
    "encryption=on,encrypt.format=aes,encrypt.key-secret=s",
    "encryption=maybe",
    "encryption=on,encrypt.key-secret=s,encrypt.iter-time=5",
    "encrypt.key-secret=s",
    "encrypt.cipher-alg=aes-256",
    "encrypt.iter-time=5",
    "encrypt.format=luks",
    "encrypt.format=aes",
    "encrypt.format=foo,encrypt.key-secret=s",
    "encrypt.format=,encrypt.key-secret=s",
    "encrypt.format=LUKS,encrypt.key-secret=s",
    "encrypt.format=aes,encrypt.key-secret=zz",
    "encrypt.format=luks,encrypt.key-secret=zz",
    "encrypt.format=luks,encrypt.key-secret=t",
    "encrypt.format=luks,encrypt.key-secret=b",
    "encrypt.format=aes,encrypt.key-secret=b",
    "encrypt.format=aes,encrypt.key-secret=s,encrypt.cipher-alg=aes-256",
    "encrypt.format=aes,encrypt.key-secret=s,encrypt.iter-time=3,encrypt.cipher-alg=zz",
    LUKS + ",encrypt.cipher-alg=bogus",
    LUKS + ",encrypt.cipher-alg=des",
    LUKS + ",encrypt.cipher-alg=sm4",
    LUKS + ",encrypt.cipher-mode=bogus",
    LUKS + ",encrypt.ivgen-alg=bogus",
    LUKS + ",encrypt.ivgen-hash-alg=bogus",
    LUKS + ",encrypt.hash-alg=bogus",
    LUKS + ",encrypt.cipher-alg=cast5-128",
    LUKS + ",encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha1",
    LUKS + ",encrypt.detached-header=on",
    LUKS + ",encrypt.bogus=1",
    LUKS + ",encrypt.iter-time=x",
    "encrypt.format=luks,encrypt.key-secret=zz,cluster_size=3k",
    "encrypt.format=luks,encrypt.cipher-alg=bogus,cluster_size=3k",
    "encrypt.format=luks,encrypt.cipher-alg=des,encrypt.key-secret=s,cluster_size=3k",
    "encrypt.format=luks,encrypt.key-secret=zz,lazy_refcounts=on,compat=0.10",
    "encrypt.format=luks,compat=4",
]


@pytest.mark.parametrize("options", REFUSED)
def test_words_of_creation(tmp_path: Path, options: str) -> None:
    assert both("create -f qcow2 -o %s x 1M" % options, tmp_path).code == 1
    assert not list(tmp_path.iterdir())
    both("measure -O qcow2 -o %s --size 1M" % options, tmp_path)


def test_measure(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(content(3, 3 * M))
    assert ours(with_secrets("convert -O qcow2 -o %s raw x" % AES), tmp_path).code == 0
    for more in ("", ",cluster_size=512", ",cluster_size=2M,refcount_bits=1", ",preallocation=full", ",compat=0.10", ",extended_l2=on"):
        for rest in ("--size 1M", "--size 10G", "raw", "--image-opts " + spec("x")):
            both("measure -O qcow2 -o %s%s %s" % (AES, more, rest), tmp_path)
    for rest in ("-O raw --image-opts " + spec("x"), "-O qcow2 --image-opts " + spec("x"), "-O qcow2 x"):
        both("measure " + rest, tmp_path)
    both("measure -O qcow2 -o %s,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encryption=on,cluster_size=512 raw" % LUKS, tmp_path)


# -- commands ------------------------------------------------------------------------------------------------------

LOOKS = [
    "info x",
    "info --image-opts {x}",
    "info --output=json --image-opts {x},encrypt.format={method}",
    "info --image-opts driver=qcow2,encrypt.key-secret=zz,file.filename=x",
    "info --image-opts driver=qcow2,encrypt.format=bogus,file.filename=x",
    "info --image-opts driver=qcow2,encrypt.format=luks,file.filename=x",
    "info --image-opts driver=qcow2,encrypt.format=aes,file.filename=x",
    "info --backing-chain top",
    "check x",
    "check --image-opts {x}",
    "check --output=json --image-opts {x}",
    "check --image-opts driver=qcow2,encrypt.key-secret=w,file.filename=x",
    "check --image-opts driver=qcow2,encrypt.key-secret=zz,file.filename=x",
    "check --image-opts driver=qcow2,encrypt.key-secret=t,file.filename=x",
    "check --image-opts driver=qcow2,encrypt.key-secret=b,file.filename=x",
    "check --image-opts driver=qcow2,encrypt.key-secret=e,file.filename=x",
    "check -r all --image-opts {x}",
    "map x",
    "map --image-opts {x}",
    "map --output=json --image-opts {x},encrypt.format={method}",
    "map --image-opts driver=qcow2,encrypt.key-secret=s,encrypt.format=luks,file.filename=x",
    "map --image-opts driver=qcow2,encrypt.key-secret=s,encrypt.format=aes,file.filename=x",
    "map --image-opts driver=qcow2,encrypt.key-secret=s,encrypt.format=bogus,file.filename=x",
    "map --image-opts driver=qcow2,encrypt.format=luks,file.filename=plain",
    "map --image-opts driver=qcow2,encrypt.key-secret=zz,file.filename=plain",
    "map --output=json --image-opts {top}",
    "map --output=json --image-opts {top},backing.encrypt.key-secret=s",
    "map --output=json --image-opts {top},backing.driver=qcow2,backing.encrypt.key-secret=s",
    "map --output=json --image-opts {top},backing.driver=raw",
    "map --output=json --image-opts {top},backing.driver=qcow2,backing.file.filename=x",
    "map --output=json --image-opts {top},backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename=x",
    "snapshot -l x",
    "snapshot -l --image-opts {x}",
    "convert x y",
    "convert --image-opts {x},encrypt.bogus.x=1 y",
    "convert -c -O qcow2 -o {create} raw y",
    "dd if=x of=y",
    "compare raw x",
    "compare --image-opts driver=raw,file.filename=raw {x}",
    "compare -s --image-opts {x} {x}",
    "compare --image-opts {x} {top}",
    "measure -O qcow2 x",
    "rebase -u -b raw -F raw x",
    "commit x",
    "commit --image-opts {x}",
    "resize x 5M",
    "snapshot -c a x",
    "bitmap --add x b",
    "amend -o size=2M x",
    "amend -o encrypt.state=active,encrypt.new-secret=n x",
]


@METHODS
def test_words(tmp_path: Path, method: str) -> None:
    """Lines that change nothing."""
    (tmp_path / "raw").write_bytes(content(1, 300 * K))
    setup("qemu-img create -f qcow2 plain 1M", tmp_path)
    for line in ("convert -O qcow2 -o %s raw x" % method, "create -f qcow2 -o %s -b x -F qcow2 top" % method):
        assert ours(with_secrets(line), tmp_path).code == 0
    for line in LOOKS:
        if "encrypt.bogus" not in line:
            both(line.format(x=spec("x"), top=spec("top"), method="luks" if method == LUKS else "aes", create=method), tmp_path)
    assert read(theirs, tmp_path, spec("x")) == (tmp_path / "raw").read_bytes()


GALLERY = """
qemu-io {secrets} --image-opts {base} -c 'write -P 1 0 600k'
qemu-io {secrets} --image-opts {top} -c 'write -P 2 50k 33k' -c 'write -z 100k 50k' -c 'write -P 3 690k 10k' -c 'discard 300k 64k'
qemu-io {secrets} --image-opts {alone} -c 'write -P 4 0 1M' -c 'write -z 512k 100k' -c 'write -c -P 5 2M 64k'
qemu-img snapshot {secrets} -c one --image-opts {alone}
qemu-io {secrets} --image-opts {alone} -c 'write -P 6 100k 300k' -c 'write -P 7 2M 1k'
cp base other
"""

CHANGES = [
    "resize --image-opts {alone} 5M",
    "resize --image-opts --preallocation=metadata {alone} 5M",
    "resize --image-opts --shrink {alone} 333k",
    "snapshot -c two --image-opts {alone}",
    "snapshot -a one --image-opts {alone}",
    "snapshot -d one --image-opts {alone}",
    "bitmap --image-opts --add {alone} b",
    "convert --image-opts -n --target-image-opts {alone} {base}",
    "convert -c -n --image-opts --target-image-opts {base} {fresh}",
    "convert -n --target-is-zero --image-opts --target-image-opts {base} {alone}",
    "convert --image-opts -l one -O qcow2 -o {method} {alone} new",
    "convert --image-opts -O qcow2 -o {method},preallocation=metadata {alone} new",
    "convert --image-opts -O qcow2 -o {method},backing_file=other,backing_fmt=qcow2 -B other -F qcow2 {top} new",
    "dd --image-opts -O qcow2 bs=4k count=30 skip=3 if={alone} of=new",
    "rebase --image-opts -u -b other -F qcow2 {top}",
    "rebase --image-opts -b '' {top}",
    "rebase --image-opts -c -b '' {top}",
    "commit --image-opts {top}",
    "commit --image-opts -d {top}",
    "amend --image-opts -o size=4M {alone}",
    "amend --image-opts -o compat=0.10 {alone}",
    "amend --image-opts -o compat=0.10 {top}",
    "amend --image-opts -o refcount_bits=64 {alone}",
    "check --image-opts -r all {alone}",
]


@pytest.fixture(scope="module", params=[LUKS, AES], ids=["luks", "aes"])
def gallery(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A directory of encrypted images, and the words for them."""
    place = tmp_path_factory.mktemp("encrypted") / "gallery"
    place.mkdir()
    words = {"secrets": shlex.join(SECRETS), "method": request.param, **{name: spec(name) for name in ("base", "alone", "other", "new", "fresh")}}
    words["top"] = spec("top") + ",backing.encrypt.key-secret=s"
    for rest in ("cluster_size=4k base 600k", "cluster_size=4k -b base -F qcow2 top 700k", "lazy_refcounts=on alone 3M", "cluster_size=64k fresh 600k"):
        assert ours(with_secrets("create -q -f qcow2 -o %s,%s" % (request.param, rest)), place) == (0, "", "")
    setup(GALLERY.format(**words), place)
    return place, words


@pytest.mark.parametrize("line", CHANGES)
def test_changes(gallery: tuple[Path, dict[str, str]], line: str) -> None:
    place, words = gallery
    if "{method}" in line and "luks" in words["method"]:
        line = line.replace("{method}", AES)  # qemu-img would take its time
    full = line.format(**words)
    pair = twins(place)
    expected, found = theirs(with_secrets(full), pair[0]), ours(with_secrets(full), pair[1])
    assert found == expected, difference(full, found, expected)
    if "compat=0.10" in line:  # qemu-img leaves zeroes behind that it does not encrypt
        pair = (place, pair[1])
    for name in ("alone", "top", "base", "new", "fresh"):
        changed = name == "new" and (pair[0] / name).exists() or "{%s}" % name in line and "-O qcow2" not in line or name == "base" and "commit" in line
        if not changed:
            continue
        image = words[name]
        if name == "top" and "rebase" in line and "-u" not in line:
            image = spec(name)
        elif name == "new" and "dd " in line:
            image = "driver=qcow2,file.filename=new"
        elif name == "new" and "-B" in line:
            image += ",backing.encrypt.key-secret=s"
        left = read(theirs, pair[0], image)
        assert read(theirs, pair[1], image) == left and read(ours, pair[1], image) == left, name
        if name == "alone" and "-d one" not in line:
            kept = read(theirs, place, image, "-l one")  # qemu-img shows as much of it as the disk has
            assert kept[: len(left)].ljust(len(left), b"\0") == read(theirs, pair[1], image, "-l one")
        both("check --image-opts " + image.replace(",backing.encrypt.key-secret=s", ""), pair[1])
        both("map --output=json --image-opts " + image, pair[1])


def test_any_requests(tmp_path: Path) -> None:
    """What is neither a whole cluster nor a whole sector, over compressed and zero clusters, and a backing file."""
    chance = random.Random(8)
    data_file = "data_file=%s" % (tmp_path / "d")
    for method, more in ((LUKS, "cluster_size=4k"), (AES, "cluster_size=4k"), (LUKS, "extended_l2=on,cluster_size=16k"), (AES, data_file)):
        (tmp_path / "base").write_bytes(content(method, 150 * K))
        line = "create -q -f qcow2 -o %s,%s,backing_file=base,backing_fmt=raw x 200k" % (method, more)
        assert ours(with_secrets(line), tmp_path) == (0, "", "")
        model = bytearray((tmp_path / "base").read_bytes().ljust(200 * K, b"\0"))
        with opened(tmp_path / "x", writable=True) as node:
            for _turn in range(80):
                offset = chance.randrange(200 * K)
                length = min(200 * K - offset, chance.choice((1, 511, 512, 3000, 4096, 20000)))
                kind = chance.randrange(6)
                if kind == 0:
                    node.pwrite_zeroes(offset, length, chance.random() < 0.5)
                    model[offset : offset + length] = bytes(length)
                elif kind == 1 and "data_file" not in more:
                    offset = offset // node.cluster_size * node.cluster_size
                    data = bytes([chance.randrange(256)]) * min(node.cluster_size, 200 * K - offset)
                    node.write_compressed(offset, data)
                    model[offset : offset + len(data)] = data
                else:
                    data = chance.randbytes(length)
                    node.pwrite(offset, data)
                    model[offset : offset + length] = data
                assert node.pread(0, 200 * K) == model
        assert read(theirs, tmp_path, spec("x")) == model
        both("check --image-opts " + spec("x"), tmp_path)


# -- key slots -----------------------------------------------------------------------------------------------------

AMENDS = [
    "encrypt.state=active",
    "encrypt.new-secret=n",
    "encrypt.keyslot=1",
    "encrypt.keyslot=a",
    "encrypt.state=bogus",
    "encrypt.state=active,encrypt.new-secret=zz",
    "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=9",
    "encrypt.state=active,encrypt.new-secret=n,encrypt.old-secret=s",
    "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=0",
    "encrypt.state=inactive",
    "encrypt.state=inactive,encrypt.keyslot=3",
    "encrypt.state=inactive,encrypt.old-secret=w",
    "encrypt.state=inactive,encrypt.old-secret=s",
    "encrypt.state=inactive,encrypt.keyslot=0",
    "encrypt.state=inactive,encrypt.keyslot=0,encrypt.iter-time=10",
    "encrypt.format=luks",
    "encrypt.key-secret=s",
    "encrypt.cipher-alg=aes-256",
    "encrypt.bogus=1",
    "encryption=on",
]


def test_words_of_amend(tmp_path: Path) -> None:
    setup("qemu-img create -f qcow2 plain 1M", tmp_path)
    for name, method in (("luks", LUKS), ("aes", AES)):
        assert ours(with_secrets("create -f qcow2 -o %s %s 1M" % (method, name)), tmp_path).code == 0
    for options in AMENDS:
        for name in ("luks", "aes", "plain"):
            assert both("amend --image-opts -o %s %s" % (options, spec(name)), tmp_path).code == 1


STEPS = [
    "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10",
    "encrypt.state=active,encrypt.new-secret=w,encrypt.iter-time=10,encrypt.keyslot=7",
    "--force encrypt.state=active,encrypt.new-secret=w,encrypt.iter-time=10,encrypt.keyslot=0",
    "encrypt.state=inactive,encrypt.keyslot=1",
    "encrypt.state=inactive,encrypt.old-secret=w,encrypt.keyslot=0",
]


def test_key_slots(tmp_path: Path) -> None:
    """Slots are added and erased by both in turn; the content stays, and only the right passphrases open it."""
    data = content(2, M)
    (tmp_path / "raw").write_bytes(data)
    assert ours(with_secrets("convert -O qcow2 -o %s raw x" % LUKS), tmp_path).code == 0
    keys = "s"
    for step, after, run in zip(STEPS, ("sn", "snw", "nw", "w", "w"), (ours, theirs, ours, theirs, ours)):
        force, _space, options = step.rpartition(" ")
        line = "amend --image-opts %s -o %s %s" % (force, options, spec("x", keys[-1]))
        assert run(with_secrets(line), tmp_path) == (0, "", ""), line
        keys = after
        for key in "snw":
            if key in keys:
                with opened(tmp_path / "x", key) as node:
                    assert node.pread(0, M) == data
            assert theirs(with_secrets("check --image-opts " + spec("x", key)), tmp_path).code == (0 if key in keys else 1)
        same("info x", tmp_path)
    assert read(theirs, tmp_path, spec("x", "w")) == data
    with opened(tmp_path / "x", "w", writable=True) as node:
        options = Qcow2AmendOptions.from_string("encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10").bind(objects())
        for _slot in range(7):
            node.amend(options)
        with pytest.raises(Error, match="Can't add a keyslot - all keyslots are in use"):
            node.amend(options)
        node.amend(Qcow2AmendOptions.from_string("encrypt.state=inactive,encrypt.old-secret=n").bind(objects()))
        with pytest.raises(Error, match="refusing operation"):
            node.amend(Qcow2AmendOptions.from_string("encrypt.state=inactive,encrypt.old-secret=w").bind(objects()))
        node.amend(Qcow2AmendOptions.from_string("encrypt.state=inactive,encrypt.keyslot=7").bind(objects()), force=True)
    with pytest.raises(Error, match="cannot unlock any keyslot"):
        opened(tmp_path / "x", "w")


@pytest.mark.parametrize("step", [STEPS[0], STEPS[2], "encrypt.state=inactive,encrypt.keyslot=1", "--force encrypt.state=inactive,encrypt.keyslot=0"])
def test_a_crash_leaves_old_slots_or_new_ones(tmp_path: Path, step: str) -> None:
    path = tmp_path / "x"
    assert ours(with_secrets("create -f qcow2 -o %s x 1M" % LUKS), tmp_path).code == 0
    with opened(path, writable=True) as node:
        node.pwrite(0, b"content" * 1000)
        if "keyslot=1" in step:
            node.amend(Qcow2AmendOptions.from_string(STEPS[0]).bind(objects()))
    before = path.read_bytes()
    force, _space, options = step.rpartition(" ")
    with Recorder(path) as file:
        described = {"driver": "qcow2", "encrypt": {"key-secret": "s"}, "file": file}
        with Graph(objects=objects()).open_spec(described, OpenFlags(writable=True, resize=True)) as node:
            node.amend(Qcow2AmendOptions.from_string(options).bind(objects()), bool(force))
    after = path.read_bytes()
    states = [_keys(path, before), _keys(path, after)]
    assert states[0] != states[1]
    chance = random.Random(step)
    for position in range(len(file.log) + 1):
        for orderly in (True, False):
            found = _keys(path, after_crash(before, file.log, position, chance, orderly))
            assert found in states, (position, found, states)


def _keys(path: Path, image: bytes) -> list[str]:
    """The secrets that open an image."""
    path.write_bytes(image)
    volumes._opened.clear()
    found = []
    for key in "snw":
        try:
            with opened(path, key) as node:
                assert node.pread(0, 7000) == b"content" * 1000
            found.append(key)
        except Error as error:
            assert "cannot unlock any keyslot" in str(error)
    return found


# -- damaged headers -----------------------------------------------------------------------------------------------


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


EXTENSION = 112  # of a new image: type, length, offset, length of the LUKS header
HEADER = 0x40000
DAMAGES = {
    "unaligned": (EXTENSION + 8, u64(0x40200)),
    "at the image's header": (EXTENSION + 8, u64(0)),
    "at the L1 table": (EXTENSION + 8, u64(0x30000)),
    "behind the end": (EXTENSION + 8, u64(1 << 40)),
    "far behind the end": (EXTENSION + 8, u64((1 << 64) - 65536)),
    "negative": (EXTENSION + 8, u64(1 << 63)),
    "empty": (EXTENSION + 16, u64(0)),
    "without key slots": (EXTENSION + 16, u64(592)),
    "cut in a key slot": (EXTENSION + 16, u64(5000)),
    "one slot": (EXTENSION + 16, u64(262144)),
    "endless": (EXTENSION + 16, u64((1 << 64) - 1)),
    "short extension": (EXTENSION + 4, u32(8)),
    "long extension": (EXTENSION + 4, u32(24)),
    "not encrypted": (32, u32(0)),
    "aes": (32, u32(1)),
    "method 3": (32, u32(3)),
    "method -1": (32, u32(0xFFFFFFFF)),
    "no extension": (EXTENSION, u32(0x12345678)),
    "no extensions": (EXTENSION, u32(0)),
    "no LUKS": (HEADER, b"X"),
    "LUKS 2": (HEADER + 6, b"\0\2"),
    "payload in the header": (HEADER + 104, u32(0)),
    "overlapping slots": (HEADER + 248, u32(512)),
    "no cipher": (HEADER + 8, b"bogus\0"),
}


def test_damaged_headers(tmp_path: Path) -> None:
    assert ours(with_secrets("create -f qcow2 -o %s whole 1M" % LUKS), tmp_path).code == 0
    whole = (tmp_path / "whole").read_bytes()
    for name, (offset, data) in DAMAGES.items():
        (tmp_path / "x").write_bytes(whole[:offset] + data + whole[offset + len(data) :])
        volumes._opened.clear()
        both("info x", tmp_path)
        if name == "endless":
            continue
        both("check --image-opts " + spec("x"), tmp_path)
        if name == "one slot":
            line = with_secrets("amend --image-opts -o encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10 " + spec("x"))
            assert ours(line, tmp_path) == (1, "", "qemu-img: Request for data outside of extension header\n")
    volumes._opened.clear()
    for length in (HEADER, HEADER + 3000, HEADER + 300000):
        (tmp_path / "x").write_bytes(whole[:length])
        both("check --image-opts " + spec("x"), tmp_path)


def test_an_endless_header_is_counted_in_no_time(tmp_path: Path) -> None:
    assert ours(with_secrets("create -f qcow2 -o %s x 1M" % LUKS), tmp_path).code == 0
    with open(tmp_path / "x", "r+b") as file:
        file.seek(EXTENSION + 16)
        file.write(u64((1 << 64) - 1))
    assert ours(with_secrets("check --image-opts " + spec("x")), tmp_path).code in (1, 2)


def test_key_slots_are_not_written_over_tables(tmp_path: Path) -> None:
    """A header that claims the clusters of tables: they stay as they are."""
    assert ours(with_secrets("create -f qcow2 -o %s x 1M" % LUKS), tmp_path).code == 0
    whole = bytearray((tmp_path / "x").read_bytes())
    whole[40:48] = u64(HEADER + 0x40000)  # the L1 table, where key slot 1 has its material
    (tmp_path / "x").write_bytes(whole)
    with opened(tmp_path / "x", writable=True) as node:
        with pytest.raises(Corrupt, match="overlaps with active L1 table"):
            node.amend(Qcow2AmendOptions.from_string(STEPS[0]).bind(objects()))


def test_the_header_is_not_written_over(tmp_path: Path) -> None:
    """Refcounts say that the clusters of the LUKS header are free: they are not taken for data."""
    assert ours(with_secrets("create -f qcow2 -o %s x 1M" % LUKS), tmp_path).code == 0
    whole = bytearray((tmp_path / "x").read_bytes())
    whole[0x20008:0x20048] = bytes(64)
    (tmp_path / "x").write_bytes(whole)
    with opened(tmp_path / "x", writable=True) as node, pytest.raises(Corrupt, match="overlaps with encryption header"):
        for offset in range(0, M, 64 * K):
            node.pwrite(offset, bytes(64 * K))


# -- secrets -------------------------------------------------------------------------------------------------------

CANARY = "Xyzzy-4711-plugh"


def test_secrets_are_told_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(content(5, 200 * K))
    (tmp_path / "key").write_text(CANARY)
    secrets = ["--object", "secret,id=s,data=" + CANARY, "--object", "secret,id=f,file=key", "--object", "secret,id=w,data=not-" + CANARY]
    told = []
    for method in (LUKS, AES):
        for line in (
            "create -f qcow2 -o %s empty 1M" % method,
            "convert -O qcow2 -o %s raw x" % method,
            "convert -O qcow2 -o %s,encrypt.cipher-alg=bogus raw y" % method,
            "info x",
            "info --output=json --image-opts " + spec("x"),
            "check --image-opts " + spec("x"),
            "check --image-opts " + spec("x", "w"),
            "map --image-opts " + spec("x", "f"),
            "amend --image-opts -o encrypt.state=inactive,encrypt.old-secret=s " + spec("x"),
            "amend --image-opts -o encrypt.state=active,encrypt.new-secret=w,encrypt.iter-time=10 " + spec("x"),
            "rebase --image-opts -u -b raw -F raw " + spec("x"),
            "convert --image-opts driver=qcow2,encrypt.key-secret=s,encrypt.bogus=1,file.filename=x z",
            "measure -O qcow2 -o %s raw" % method,
            "compare --image-opts driver=raw,file.filename=raw " + spec("x", "f"),
        ):
            command, *rest = shlex.split(line)
            told.append(ours(["-T", "enable=*", command, *secrets, *rest], tmp_path))
        known: dict[str, Any] = {}
        for text in secrets[1::2]:
            add_object(known, text.replace("file=key", "file=%s" % (tmp_path / "key")))
        with Graph(objects=known).open(spec(str(tmp_path / "x")), image_opts=True) as node:
            assert isinstance(node, Qcow2) and node.encryption is not None
            parts = [node, node.options, node.encryption, node.encryption.cipher, node.encryption.volume, node.format_specific(), node.full_options, known]
            told.append([repr(part) for part in parts] + [node.filename])
        with pytest.raises(Error) as caught:
            Graph(objects=known).open(spec(str(tmp_path / "x"), "b"), image_opts=True)
        told.append((str(caught.value), repr(caught.value.__dict__)))
    assert CANARY not in repr(told)
    assert not any(CANARY.encode() in path.read_bytes() for path in tmp_path.iterdir() if path.name != "key")


def test_a_file_is_read_with_the_object(tmp_path: Path) -> None:
    """The file of a secret may go once the command has begun."""
    (tmp_path / "key").write_text("abc")
    line = ["--object", "secret,id=f,file=key"]
    assert ours(["create", "-q", "-f", "qcow2", *line, "-o", AES.replace("=s", "=f"), "x", "1M"], tmp_path) == (0, "", "")
    same(shlex.join(["map", *line, "--image-opts", spec("x", "f")]), tmp_path)
    (tmp_path / "key").unlink()
    for command in ("info", "map"):
        assert same(shlex.join([command, *line, "--image-opts", spec("x", "f")]), tmp_path).code == 1


def test_python_opens_encrypted_images(tmp_path: Path) -> None:
    assert ours(with_secrets("create -q -f qcow2 -o %s x 1M" % LUKS), tmp_path) == (0, "", "")
    described = spec(str(tmp_path / "x"))
    with diskwright.open(described, "r+", image_opts=True, objects=objects()) as node:
        node.pwrite(100, b"content")
    with diskwright.open(described, image_opts=True, objects=objects()) as node:
        assert node.pread(100, 7) == b"content"
    with Graph().open(str(tmp_path / "x"), flags=OpenFlags(no_io=True)) as node:
        with pytest.raises(Error, match="^Parameter 'encrypt.key-secret' is required for cipher$"):
            node.pread(0, 512)
    assert diskwright.info(str(tmp_path / "x"))[0].encrypted


def test_a_wrong_password_of_aes_is_not_noticed(tmp_path: Path) -> None:
    """Nothing in the image tells: as with qemu-img, what is read is noise."""
    (tmp_path / "raw").write_bytes(bytes(range(256)) * 64)
    assert ours(with_secrets("convert -O qcow2 -o %s raw x" % AES), tmp_path) == (0, "", "")
    assert read(ours, tmp_path, spec("x", "w")) == read(theirs, tmp_path, spec("x", "w")) != (tmp_path / "raw").read_bytes()


def test_cryptsetup_opens_the_header(tmp_path: Path) -> None:
    """The LUKS header in an image is one that cryptsetup knows."""
    assert ours(with_secrets("create -q -f qcow2 -o %s,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv x 1M" % LUKS), tmp_path) == (0, "", "")
    (tmp_path / "header").write_bytes((tmp_path / "x").read_bytes()[HEADER:])
    command = ["cryptsetup", "--key-file=-", "luksOpen", "--test-passphrase", "header"]
    for key, code in ((b"abc", 0), (b"abd", 2)):
        assert subprocess.run(command, input=key, cwd=tmp_path, capture_output=True, check=False).returncode == code
