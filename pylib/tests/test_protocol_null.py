# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""null-co and null-aio: names and options as qemu-img has them, and what they do with data."""

from __future__ import annotations

import subprocess

import pytest

from diskwright.errors import Error
from diskwright.graph import open_image
from diskwright.node import OpenFlags

G = 1 << 30


def info(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", "info", *args], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "name",
    [
        "null-co://",
        "null-aio://",
        'json:{"driver":"raw","file":{"driver":"null-co"}}',
        'json:{"driver":"raw","file":{"driver":"null-co","size":"1M"}}',
        'json:{"driver":"raw","file":{"driver":"null-aio","size":65536,"read-zeroes":true}}',
        'json:{"driver":"raw","file.driver":"null-co","file.latency-ns":"5"}',
        'json:{"driver":"null-co"}',
        'json:{"driver":"null-co","read-zeroes":"on"}',
        "driver=null-co,size=1M",
        "driver=raw,file.driver=null-aio,file.size=64k",
    ],
)
def test_names_and_sizes(name: str) -> None:
    image_opts = name.startswith("driver=")
    theirs = info(*(["--image-opts"] if image_opts else []), name).stdout.splitlines()
    with open_image(name, image_opts=image_opts) as node:
        assert theirs[0] == "image: " + node.filename
        assert theirs[1] == "file format: " + node.driver
        assert theirs[2].endswith("(%d bytes)" % node.size)
        assert theirs[3] == "disk size: 0 B" and node.disk_size() == 0


@pytest.mark.parametrize(
    "name",
    ["null-co://x", "null-co:", "null-aio:/", "null-cox://", 'json:{"driver":"null-co","foo":1}', 'json:{"driver":"null-co","latency-ns":"-1"}'],
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(Error) as caught:
        open_image(name)
    assert info(name).stderr == "qemu-img: %s\n" % caught.value


@pytest.mark.parametrize("option", ["size=1Mx", "size=-1", "read-zeroes=x", "latency-ns=x"])
def test_values_that_are_none(option: str) -> None:
    """(Where qemu-img aborts.)"""
    with pytest.raises(Error, match="arameter '%s'" % option.split("=")[0]):
        open_image("driver=null-co," + option, image_opts=True)


@pytest.mark.parametrize("driver", ["null-co", "null-aio"])
def test_reading_and_writing(driver: str) -> None:
    name = 'json:{"driver":"raw","file":{"driver":"%s","read-zeroes":%s}}'
    with open_image(name % (driver, "true"), None, OpenFlags(writable=True)) as node:
        node.pwrite(0, b"gone")
        assert node.pread(0, 4) == bytes(4)
        node.pwrite_zeroes(0, G)
        node.pdiscard(0, G)
        buffer = bytearray(b"dirty")
        node.pread_into(G - 5, buffer)
        assert buffer == bytes(5)
        for call in (lambda: node.pwrite(G - 1, b"xy"), lambda: node.pread(G - 1, 2)):
            with pytest.raises(Error):
                call()
        with pytest.raises(Error, match="^Image format driver does not support resize$"):
            node.truncate(2 * G)
        assert [extent[0:2] for extent in node.block_status(0, G)] == [(0, G)]
    with open_image(name % (driver, "false")) as node:
        buffer = bytearray(b"as it was")
        node.pread_into(0, buffer)
        assert buffer == b"as it was"
