# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`measure` against qemu-img."""

from __future__ import annotations

from pathlib import Path

import pytest

import diskwright
from side_by_side import same, setup

GALLERY = r"""
qemu-img create -f raw a.raw 1M
head -c 1000 /dev/urandom > odd.raw
: > empty
truncate -s 3M sparse.raw; dd if=/dev/urandom of=sparse.raw bs=64k count=1 seek=5 conv=notrunc status=none
dd if=/dev/urandom of=sparse.raw bs=1 count=100 seek=1500000 conv=notrunc status=none
qemu-img create -f qcow2 -b sparse.raw -F raw mid.qcow2 4M
qemu-io -c 'write 1M 64k' -c 'write -z 2M 128k' -c 'write -c 2560k 64k' -c 'write 384k 1k' mid.qcow2
qemu-img create -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 5M
qemu-io -c 'write 4M 64k' -c 'discard 1M 64k' -c 'write 1088k 64k' top.qcow2
qemu-img create -f qcow2 -o compat=0.10 v2.qcow2 4M; qemu-io -c 'write 1M 64k' v2.qcow2
qemu-img create -f qcow2 -o cluster_size=512 tiny.qcow2 1M; qemu-io -c 'write 511k 300k' tiny.qcow2
qemu-img create -f qcow2 -o preallocation=metadata meta.qcow2 1M
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measure")
    setup(GALLERY, path)
    return path


IMAGES = "a.raw odd.raw empty sparse.raw mid.qcow2 top.qcow2 v2.qcow2 tiny.qcow2 meta.qcow2 nosuch".split()

TARGETS = [
    "",
    "-O raw",
    "-O qcow2",
    "-O qcow2 -o cluster_size=512",
    "-O qcow2 -o cluster_size=2M,refcount_bits=64",
    "-O qcow2 -o refcount_bits=1",
    "-O qcow2 -o preallocation=metadata",
    "-O qcow2 -o preallocation=full",
    "-O qcow2 -o preallocation=falloc,lazy_refcounts=on",
    "-O qcow2 -o compat=0.10",
    "-O qcow2 -o extended_l2=on",
    "-O qcow2 -o backing_file=foo,backing_fmt=raw",
    "-O qcow2 -o size=7M",
]

SIZES = "0 1 1000 1M 1000000 64M 1G 1T 7E 9223372036854775807".split()

OTHERS = [
    "-O nosuch --size 1G",
    "-O file --size 1G",
    "-O null-co --size 1G",
    "-O nosuch nosuch",
    "-O raw null-co://",
    "-O nosuch a.raw",
    "-O qcow2 -o nosuch=1 --size 1G",
    "-O qcow2 -o size=1.5 --size 0",
    "-O qcow2 -o cluster_size=3 --size 0",
    "-O qcow2 -o cluster_size=abc --size 0",
    "-O qcow2 -o refcount_bits=64,compat=0.10 --size 1G",
    "-O qcow2 -o refcount_bits=3 --size 1G",
    "-O qcow2 -o lazy_refcounts=maybe --size 1G",
    "-O qcow2 -o preallocation=bad --size 1G",
    "-O qcow2 -o compat=9 --size 1G",
    "-O qcow2 -o compression_type=bad --size 1G",
    "-O qcow2 -o extended_l2=on,cluster_size=4k --size 1G",
    "-O qcow2 -o help --size 1",
    "-O qcow2 -o nocow=on,extent_size_hint=1M --size 1G",
    "-O raw -o nocow=on,preallocation=full --size 1G",
    "-O raw -o preallocation=bad --size 1G",
    "-O raw -o cluster_size=1k --size 1G",
    "-O qcow2 -f qcow2 a.raw",
    "-O qcow2 -f raw mid.qcow2",
    "-O qcow2 --image-opts driver=qcow2,file.filename=mid.qcow2",
    "-O qcow2 --image-opts driver=qcow2,file.filename=mid.qcow2,backing=",
    "-O qcow2 --image-opts driver=raw,file.filename=sparse.raw,offset=1M",
    "-U -O qcow2 mid.qcow2",
    "-l foo mid.qcow2",
    "-l foo a.raw",
    "-l snapshot.id=1 a.raw",
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("image", IMAGES)
def test_images(place: Path, image: str, target: str) -> None:
    same("measure %s %s" % (target, image), place)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(place: Path, size: str, target: str) -> None:
    same("measure %s --size %s" % (target, size), place)


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("line", OTHERS + ["-O qcow2 " + image for image in IMAGES] + ["--size 1M"])
def test_others(place: Path, line: str, output: str) -> None:
    same("measure --output %s %s" % (output, line), place)


def test_result(place: Path) -> None:
    """The typed result."""
    found = diskwright.measure(size=1 << 30, target_format="qcow2")
    assert (found.required, found.fully_allocated, found.bitmaps) == (393216, 1074135040, None)
