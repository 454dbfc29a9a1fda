# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""New qcow2 images: the same bytes, the same refusals and the same sizes as qemu-img's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from qcow2_images import check_theirs, make, make_theirs, open_image, read_theirs, tool

from diskwright.errors import Error
from diskwright.formats.qcow2 import Qcow2
from diskwright.units import parse_size

M = 1 << 20
BACKED = "backing_file=base.raw,backing_fmt=raw"


@pytest.mark.parametrize("size", [0, 512, 10 * M, 5 * M + 512, 1 << 30, 100 << 40])
@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10",
        "cluster_size=4k",
        "cluster_size=8k",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "lazy_refcounts=on,compression_type=zstd",
        BACKED,
        "compat=0.10," + BACKED,
    ],
)
def test_same_bytes(tmp_path: Path, options: str, size: int) -> None:
    if size > 1 << 40 and "4k" in options or size > 1 << 40 and "8k" in options:
        size >>= 12
    make_theirs(tmp_path / "theirs", size, options)
    make(tmp_path / "ours", size, options)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("cluster_size=512", 10 * M),
        ("cluster_size=1k,refcount_bits=2", 10 * M),
        ("preallocation=metadata", 10 * M),
        ("preallocation=metadata", 512),
        ("preallocation=metadata", 20 << 30),
        ("preallocation=metadata,cluster_size=2M", 3 << 40),
        ("preallocation=metadata,cluster_size=512", 2 * M),
        ("preallocation=metadata,cluster_size=4k,refcount_bits=64", 10 * M),
    ],
)
def test_same_layout(tmp_path: Path, options: str, size: int) -> None:
    """Sparse files, compared by the tool that skips holes."""
    make_theirs(tmp_path / "theirs", size, options)
    make(tmp_path / "ours", size, options)
    assert os.stat(tmp_path / "ours").st_size == os.stat(tmp_path / "theirs").st_size
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("options", ["cluster_size=512", "", "refcount_bits=64,cluster_size=1k"])
@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_preallocated_blocks(tmp_path: Path, options: str, mode: str) -> None:
    path = tmp_path / "image"
    make(path, 6 * M + 512, "preallocation=%s,%s" % (mode, options) if options else "preallocation=" + mode)
    assert check_theirs(path) == 0
    assert os.stat(path).st_blocks * 512 >= os.stat(path).st_size - 65536
    with open_image(path) as node:
        before = os.stat(path).st_size
        for extent in node.block_status(0, node.size, want_zero=False):
            assert extent.host is node.file
        node.pwrite(0, b"x" * node.size)
        node.flush()
        assert os.stat(path).st_size == before
    assert read_theirs(path) == b"x" * (6 * M + 512)


@pytest.mark.parametrize("options", ["refcount_bits=64,cluster_size=512", "cluster_size=1k", "refcount_bits=2,cluster_size=1k"])
def test_the_refcount_table_grows(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    make(path, 80 * M, "preallocation=metadata," + options)
    assert check_theirs(path) == 0
    with open_image(path) as node:
        assert node.header.refcount_table_clusters > 1 or node.header.refcount_order < 4


@pytest.mark.parametrize(
    "options",
    [
        *("cluster_size=%s" % size for size in ("1000", "256", "4M", "513")),
        *("refcount_bits=%d" % bits for bits in (0, 3, 128)),
        *("compat=0.10," + more for more in ("refcount_bits=8", "lazy_refcounts=on", "compression_type=zstd", "extended_l2=on", "data_file=x")),
        "compat=0.9",
        "compat=0.10,refcount_bits=3",
        "compression_type=lz4",
        "preallocation=foo",
        "preallocation=foo,compression_type=bar",
        "extended_l2=on,cluster_size=8k",
        "data_file_raw=on",
        "data_file_raw=on,data_file=x," + BACKED,
        "preallocation=metadata," + BACKED,
        "backing_fmt=raw",
        "encryption=on",
        "encrypt.format=luks",
        "encrypt.format=foo",
        "encrypt.key-secret=s",
        "encrypt.format=luks,encrypt.key-secret=s",
        "encrypt.format=aes,encrypt.key-secret=s,size=1T",
        "encryption=on,encrypt.format=luks",
        "cluster_size=512,size=1T",
        "backing_fmt=raw,backing_file=" + 1100 * "b",
        "backing_fmt=raw,cluster_size=512,backing_file=" + 500 * "b",
    ],
)
def test_refusals(tmp_path: Path, options: str) -> None:
    size = 10 * M
    if "size=1T" in options:
        options, size = options.replace(",size=1T", ""), 1 << 40
    said = make_theirs(tmp_path / "theirs", size, options, fails=True)
    with pytest.raises(Error) as caught:
        make(tmp_path / "ours", size, options)
    assert str(caught.value) == said


SIZES = ["0", "512", "1M", "1G", "100G", "10T", "100P"]
OPTIONS = [
    "",
    "cluster_size=512",
    "cluster_size=2M",
    "refcount_bits=64,cluster_size=512",
    "preallocation=metadata",
    "preallocation=full",
    "compat=0.10",
    "extended_l2=on",
    "extended_l2=on,cluster_size=4k",
    "compat=0.10,refcount_bits=8",
    "compat=0.9",
    "preallocation=foo",
]


def compare_measures(options: str, source: Path | None, size: str = "") -> None:
    where = [str(source)] if source else ["--size", size]
    command = ["qemu-img", "measure", "--output=json", "-O", "qcow2", *(("-o", options) if options else ()), *where]
    record = Qcow2.create_options.from_string(options)
    record.size = parse_size(size) if size else 0
    node = open_image(source, writable=False) if source else None
    try:
        found = Qcow2.measure(record, node)
    except Error as exc:
        assert tool(*command, fails=True).strip() == "qemu-img: %s" % exc
    else:
        values = {"required": found.required, "fully-allocated": found.fully_allocated}
        if found.bitmaps is not None:
            values["bitmaps"] = found.bitmaps
        assert values == json.loads(tool(*command)), options
    finally:
        if node:
            node.close()


@pytest.mark.parametrize("options", OPTIONS)
def test_measure_a_size(options: str) -> None:
    for size in SIZES:
        compare_measures(options, None, size)


def test_measure_an_image(tmp_path: Path) -> None:
    path, overlay = tmp_path / "image", tmp_path / "overlay"
    make_theirs(path, 1 << 30)
    tool("qemu-io", "-c", "write 0 100k", "-c", "write 10M 1M", "-c", "write -z 20M 5M", "-c", "write -c 30M 1M", path)
    make_theirs(overlay, 1 << 30, "backing_file=image,backing_fmt=qcow2")
    tool("qemu-io", "-c", "write 3M 1k", "-c", "write -z 10M 100k", overlay)
    for source in (path, overlay):
        for options in ("", "cluster_size=512", "cluster_size=2M", "preallocation=full", "compat=0.10", "backing_file=image"):
            compare_measures(options, source)
    tool("qemu-img", "bitmap", "--add", path, "b")
    tool("qemu-img", "bitmap", "--add", "-g", "512", path, "finer")
    for options in ("", "cluster_size=512", "compat=0.10"):
        compare_measures(options, path)
