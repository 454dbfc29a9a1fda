# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Writing qcow2 images: snapshots, compressed clusters, discards, resizing, the overlap guard, caches and their order."""

from __future__ import annotations

import json
import os
import random
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from conformance.recorder import Recorder, after_crash
from qcow2_images import check_theirs, make, make_theirs, open_image, open_over, qemu_io, read_theirs, tool

from diskwright.errors import Corrupt, Error, ReadOnly, Unsupported
from diskwright.formats.qcow2 import Qcow2

K, M = 1 << 10, 1 << 20


def noise(seed: object, length: int) -> bytes:
    return random.Random(str(seed)).randbytes(length)


# -- snapshots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "compat=0.10", "cluster_size=512", "refcount_bits=2,cluster_size=4k"])
def test_a_snapshot_keeps_what_it_had(tmp_path: Path, options: str) -> None:
    """Clusters and L2 tables that a snapshot shares are copied before they change, and given back right."""
    path = tmp_path / "image"
    make(path, 3 * M, options)
    old = bytearray(noise(1, 3 * M))
    with open_image(path) as node:
        node.pwrite(0, old[: 2 * M])
        node.write_compressed(2 * M, (bytes(64) + noise(2, 64)) * (node.cluster_size // 128))
        old[2 * M :] = node.pread(2 * M, M)
    tool("qemu-img", "snapshot", "-c", "one", path)
    new = bytearray(old)
    chance = random.Random(options)
    with open_image(path) as node:
        assert [snapshot.name for snapshot in node.snapshots()] == ["one"]
        for _turn in range(30):
            offset = chance.randrange(3 * M - 70000)
            length = chance.randrange(1, 70000)
            kind = chance.choice(("write", "zero", "discard", "compress"))
            if kind == "write":
                new[offset : offset + length] = data = chance.randbytes(length)
                node.pwrite(offset, data)
            elif kind == "zero":
                new[offset : offset + length] = bytes(length)
                node.pwrite_zeroes(offset, length, chance.random() < 0.5)
            elif kind == "discard":
                node.pdiscard(offset, length)
                new[offset : offset + length] = node.pread(offset, length)
            else:
                size = node.cluster_size
                offset = offset // size * size
                new[offset : offset + size] = data = bytes([chance.randrange(256)]) * size
                node.write_compressed(offset, data)
        assert node.pread(0, node.size) == new
    assert check_theirs(path) == 0
    assert read_theirs(path) == new
    tool("qemu-img", "snapshot", "-a", "one", path)
    assert read_theirs(path) == old
    tool("qemu-img", "snapshot", "-d", "one", path)
    assert check_theirs(path) == 0


def test_resizing_with_a_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, 4 * M, "cluster_size=512")
    with open_image(path) as node:
        node.pwrite(0, noise(3, 4 * M))
    tool("qemu-img", "snapshot", "-c", "one", path)
    with open_image(path) as node:
        node.truncate(M + 512)
        assert node.pread(0, node.size) == noise(3, 4 * M)[: M + 512]
    assert check_theirs(path) == 0
    with open_image(path) as node:
        node.truncate(8 * M)
        assert node.pread(0, node.size) == noise(3, 4 * M)[: M + 512].ljust(8 * M, b"\0")
    assert check_theirs(path) == 0
    make(path, 4 * M, "compat=0.10")
    tool("qemu-img", "snapshot", "-c", "one", path)
    with open_image(path) as node:
        for size in (M, 8 * M):
            with pytest.raises(Unsupported, match="^Can't resize a v2 image which has snapshots$"):
                node.truncate(size)


# -- compressed clusters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "compression_type=zstd", "cluster_size=512", "cluster_size=2M", "refcount_bits=1", "refcount_bits=2,cluster_size=4k"])
def test_compressed_clusters_share_host_clusters(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    make(path, 6 * M - 1536, options)
    content = b"".join(noise(i, 300) * 7 + bytes(1996) for i in range(6 * M // 4096 + 1))[: 6 * M - 1536]
    with open_image(path) as node:
        size = node.cluster_size
        for offset in range(0, node.size, size):
            node.write_compressed(offset, content[offset : offset + size])
        with pytest.raises(Error):
            node.write_compressed(size // 2, content[:size])
        with pytest.raises(Error):
            node.write_compressed(0, content[: size - 1])
        assert node.pread(0, node.size) == content
        statuses = {extent.status for extent in node.block_status(0, node.size)}
        if size > 512:
            assert len(statuses) == 1
    assert check_theirs(path) == 0
    assert read_theirs(path) == content
    if "512" not in options and "refcount_bits" not in options and "2M" not in options:
        assert os.stat(path).st_size < 3 * M
    with open_image(path) as node:
        node.pwrite(0, b"x" * node.size)
    assert check_theirs(path) == 0
    assert read_theirs(path) == b"x" * (6 * M - 1536)


@pytest.mark.parametrize("options", ["", "compression_type=zstd", "cluster_size=512"])
def test_their_compressed_clusters(tmp_path: Path, options: str) -> None:
    source, path = tmp_path / "source", tmp_path / "image"
    content = b"".join(noise(i, 500) * 3 for i in range(1400))[: 2 * M]
    source.write_bytes(content)
    tool("qemu-img", "convert", "-c", "-O", "qcow2", *(("-o", options) if options else ()), source, path)
    with open_image(path, writable=False) as node:
        assert node.pread(0, 2 * M) == content
        assert node.pread(70001, 3000) == content[70001:73001]


def test_what_does_not_shrink_is_stored_plain(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, M)
    with open_image(path) as node:
        node.write_compressed(0, noise(1, 64 * K))
        assert [hex(extent.status) for extent in node.block_status(0, 64 * K, want_zero=False)] == ["0x15"]
    assert read_theirs(path)[: 64 * K] == noise(1, 64 * K)


def test_many_threads_compress(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, 16 * M)
    blocks = [noise(i, 200) * 327 + bytes(136) for i in range(256)]
    with open_image(path) as node:

        def work(own: int) -> None:
            for index in range(own, 256, 8):
                node.write_compressed(index * 64 * K, blocks[index])

        threads = [threading.Thread(target=work, args=(own,)) for own in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert check_theirs(path) == 0
    assert read_theirs(path) == b"".join(blocks)


# -- zeroes and discards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.10", "1.1"])
@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("before", ["", "write -P 1 0 1M", "write -c -P 1 0 64k"])
@pytest.mark.parametrize("request_", ["write -z 0 1M", "write -z -u 0 1M", "discard 0 1M", "write -z 100k 500k", "discard 3000k 1096k"])
def test_the_map_afterwards_is_qemus(tmp_path: Path, version: str, backed: bool, before: str, request_: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    make_theirs(tmp_path / "base", 4 * M)
    qemu_io(tmp_path / "base", "write -P 7 0 4M")
    make_theirs(theirs, 4 * M, "compat=" + version + (",backing_file=base,backing_fmt=qcow2" if backed else ""))
    if before:
        qemu_io(theirs, before)
    ours.write_bytes(theirs.read_bytes())
    qemu_io(theirs, request_)
    words = request_.split()
    start, length = (int(word[:-1]) * (M if word.endswith("M") else K) if word != "0" else 0 for word in words[-2:])
    with open_image(ours) as node:
        if words[0] == "discard":
            node.pdiscard(start, length)
        else:
            node.pwrite_zeroes(start, length, "-u" in words)
    assert check_theirs(ours) == 0
    assert read_theirs(ours) == read_theirs(theirs)
    maps = [json.loads(tool("qemu-img", "map", "--output=json", path)) for path in (ours, theirs)]
    for entry in maps[0] + maps[1]:
        entry.pop("offset", None)
        entry.pop("filename", None)
    if version == "1.1" or not backed:  # elsewhere QEMU writes zeroes in pieces of its own
        assert maps[0] == maps[1]


def test_discard_keeps_the_place_if_told(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, 4 * M)
    options = {"discard-no-unref": True, "pass-discard-request": True}
    with open_image(path, **options) as node:
        node.pwrite(0, noise(1, 2 * M))
        node.flush()
        used = os.stat(path).st_blocks
        places = [extent.host_offset for extent in node.block_status(0, M, want_zero=False)]
        node.pdiscard(0, M)
        assert [extent.host_offset for extent in node.block_status(0, M, want_zero=False)] == places
        assert node.pread(0, M) == bytes(M)
        assert os.stat(path).st_blocks < used
        node.pwrite(0, b"again")
    assert check_theirs(path) == 0


def test_discarded_clusters_are_used_again(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, 64 * M)
    with open_image(path) as node:
        for turn in range(20):
            node.pwrite(0, noise(turn, 4 * M))
            node.pdiscard(0, 4 * M)
            node.flush()
    assert os.stat(path).st_size < 6 * M
    assert check_theirs(path) == 0


def test_discard_reaches_the_file_with_unmap(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, 4 * M)
    with open_image(path, discard="unmap") as node:
        node.pwrite(0, noise(1, 4 * M))
        node.flush()
        used = os.stat(path).st_blocks
        node.pdiscard(0, 4 * M)
        node.flush()
        assert os.stat(path).st_blocks < used / 4


# -- resizing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "compat=0.10", "cluster_size=512", "cluster_size=2M", "refcount_bits=1", "refcount_bits=64,cluster_size=1k"])
def test_resizing(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    make(path, 5 * M, options)
    content = bytearray(5 * M)
    chance = random.Random(options)
    node = open_image(path)
    for size in (20 * M + 512, 7 * M - 1024, 3 * M + 3072, 40 * M, 512, 0, 12 * M):
        node.truncate(size, chance.choice(("off", "metadata", "falloc", "full")) if size > node.size else "off")
        del content[size:]
        content.extend(bytes(size - len(content)))
        assert node.size == size and node.pread(0, size) == content
        if size > M:
            for _turn in range(6):
                offset = chance.randrange(size - M)
                content[offset : offset + 100000] = data = chance.randbytes(100000)
                node.pwrite(offset, data)
            content[size - 700 :] = data = chance.randbytes(700)
            node.pwrite(size - 700, data)
        if chance.random() < 0.5:
            node.close()
            assert check_theirs(path) == 0
            assert read_theirs(path) == content
            node = open_image(path)
    node.close()
    assert check_theirs(path) == 0
    assert read_theirs(path) == content


@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_growing_hides_a_longer_backing_file(tmp_path: Path, version: str) -> None:
    path = tmp_path / "image"
    (tmp_path / "base").write_bytes(noise(0, 4 * M))
    make(path, M + 512, "backing_file=base,backing_fmt=raw,compat=" + version)
    with open_image(path) as node:
        node.truncate(6 * M)
        assert node.pread(0, node.size) == noise(0, 4 * M)[: M + 512].ljust(6 * M, b"\0")
    assert check_theirs(path) == 0
    assert read_theirs(path) == noise(0, 4 * M)[: M + 512].ljust(6 * M, b"\0")


def test_shrinking_shortens_the_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, 8 << 30, "preallocation=metadata")
    with open_image(path) as node:
        node.truncate(10 * M)
    assert os.stat(path).st_size < 12 * M
    assert check_theirs(path) == 0


def test_refused_sizes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, M)
    with open_image(path) as node:
        for size, mode, words in (
            (1000, "off", "The new size must be a multiple of 512"),
            (7 << 60, "off", "Failed to grow the L1 table: File too large"),
            (M // 2, "metadata", "Preallocation can't be used for shrinking an image"),
            (2 * M, "foo", "Invalid preallocation mode 'foo'"),
        ):
            with pytest.raises(Error) as caught:
                node.truncate(size, mode)
            assert str(caught.value) == words
    assert check_theirs(path) == 0


# -- what must not be overwritten ----------------------------------------------------------------------------------------

STRUCTURES = {
    0x00000: "qcow2_header",
    0x10000: "refcount table",
    0x20000: "refcount block",
    0x30000: "active L1 table",
    0x40000: "active L2 table",
}


def patched(path: Path, *edits: tuple[int, str, int]) -> None:
    with path.open("r+b") as file:
        for offset, code, value in edits:
            file.seek(offset)
            file.write(struct.pack(">" + code, value))


def two_clusters(path: Path) -> None:
    make_theirs(path, 10 * M)
    qemu_io(path, "write -P 1 0 128k")


@pytest.mark.parametrize("place", STRUCTURES)
@pytest.mark.parametrize("by", ["data", "refcount"])
def test_overlaps(tmp_path: Path, place: int, by: str) -> None:
    """A data cluster, or a new cluster, that a damaged image places over metadata."""
    path = tmp_path / "image"
    two_clusters(path)
    if by == "data":
        if not place:
            return  # offset 0 is none
        patched(path, (0x40000, "Q", 1 << 63 | place))
    else:
        patched(path, (0x20000 + 2 * (place >> 16), "H", 0))
    node = open_image(path)
    with pytest.raises(Corrupt) as caught:
        node.pwrite(0 if by == "data" else 4 * M, b"x" * 65536)
    words = "qcow2: Marking image as corrupt: Preventing invalid write on metadata (overlaps with %s); further corruption events will be suppressed"
    assert str(caught.value) == words % STRUCTURES[place]
    node.abandon()
    with pytest.raises(ReadOnly, match="^qcow2: Image is corrupt; cannot be opened read/write$"):
        open_image(path)
    with open_image(path, writable=False) as node:
        assert node.format_specific()["corrupt"] is True
    tool("qemu-io", "-f", "qcow2", "-c", "write 0 1", path, fails=True)


@pytest.mark.parametrize("option", [{"overlap-check": "none"}, {"overlap-check.template": "all", "overlap-check.active-l1": "off"}])
def test_overlaps_are_let_pass_if_told(tmp_path: Path, option: dict[str, Any]) -> None:
    path = tmp_path / "image"
    two_clusters(path)
    patched(path, (0x40000, "Q", 1 << 63 | 0x30000))
    node = open_image(path, **option)
    node.pwrite(0, b"x" * 65536)
    node.abandon()


def test_overlaps_with_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "image"
    two_clusters(path)
    tool("qemu-img", "snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 0 64k")
    with open_image(path, writable=False) as node:
        table = node.header.snapshots_offset
        from diskwright.formats.qcow2.snapshots import read_snapshots

        l1 = read_snapshots(node)[0][0].l1_table_offset
    image = path.read_bytes()
    for place, name in ((table, "snapshot table"), (l1, "inactive L1 table")):
        path.write_bytes(image)
        patched(path, (0x20000 + 2 * (place >> 16), "H", 0))
        node = open_image(path)
        with pytest.raises(Corrupt, match="overlaps with %s" % name):
            node.pwrite(8 * M, b"x" * 65536)
        node.abandon()


# -- the order of writes -------------------------------------------------------------------------------------------------


def busy(node: Qcow2, chance: random.Random, size: int, versions: list[set[bytes]]) -> None:
    """Random requests; `versions` collects what each sector may hold."""
    for _turn in range(40):
        offset = chance.randrange(size // 512) * 512
        length = min(size - offset, chance.randrange(1, 60) * 512)
        kind = chance.choice(("write", "write", "zero", "discard", "compress", "flush"))
        data = bytes(length)
        if kind == "flush":
            node.flush()
            continue
        if kind == "compress":
            unit = node.cluster_size
            offset = offset // unit * unit
            length = min(unit, size - offset)
        if kind in ("write", "compress"):
            data = bytes([chance.randrange(1, 256)]) * length
        for sector in range(offset // 512, (offset + length) // 512):
            versions[sector].add(data[:512])
        if kind == "write":
            node.pwrite(offset, data)
        elif kind == "zero":
            node.pwrite_zeroes(offset, length, chance.random() < 0.5)
        elif kind == "discard":
            node.pdiscard(offset, length)
        else:
            node.write_compressed(offset, data)


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=4k,compat=0.10", "refcount_bits=64,cluster_size=1k"])
@pytest.mark.parametrize("snapshot", [False, True])
def test_a_crash_leaves_at_most_leaks(tmp_path: Path, options: str, snapshot: bool) -> None:
    """After any prefix of the log, or of some of what came after the last flush, the image is clean or leaks, and each
    sector reads as it was written at some time."""
    path, size = tmp_path / "image", M
    make(path, size, options)
    first = noise(1, 512) * 1024
    with open_image(path) as node:
        node.pwrite(0, first)
    if snapshot:
        tool("qemu-img", "snapshot", "-c", "one", path)
    before = path.read_bytes()
    versions = [{(first[at : at + 512] or bytes(512)), bytes(512)} for at in range(0, size, 512)]
    chance = random.Random(options + str(snapshot))
    file = Recorder(path)
    node = open_over(file, **{"l2-cache-size": 4096, "refcount-cache-size": 4096})
    busy(node, chance, size, versions)
    if not snapshot or "0.10" not in options:
        node.truncate(size + 3 * M, "metadata")
        node.truncate(size)
    node.close()
    cut = tmp_path / "cut"
    for turn in range(16):
        position = chance.randrange(len(file.log) + 1)
        cut.write_bytes(after_crash(before, file.log, position, chance, turn % 2 == 0))
        assert check_theirs(cut) in (0, 3), (turn, position)
        found = read_theirs(cut)
        for sector in range(size // 512):
            assert found[sector * 512 : sector * 512 + 512] in versions[sector], (turn, position, sector)


class Full(Recorder):
    """A file on a disk that is full after `left` more writes."""

    left = 1 << 30

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        super()._pwrite(host_offset, view)


@pytest.mark.parametrize("options", ["cluster_size=512", "refcount_bits=64,cluster_size=512", "cluster_size=4k,compat=0.10"])
def test_a_full_disk(tmp_path: Path, options: str) -> None:
    """Whatever write fails, and whatever is tried after that, what is in the file is clean or leaks."""
    path = tmp_path / "image"
    for left in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233):
        make(path, M, options)
        file = Full(path)
        node = open_over(file, **{"l2-cache-size": 4096, "refcount-cache-size": 4096})
        file.left = left
        chance = random.Random(left)
        for turn in range(12):
            try:
                busy(node, chance, M, [set() for _sector in range(M // 512)])
                node.truncate((turn + 2) * 4 * M, "metadata")
            except OSError as exc:
                assert exc.errno == 28
                file.left = chance.choice((0, 3, 50))
            except Error:
                pass
        node.abandon()
        assert check_theirs(path) in (0, 3), left


def test_the_caches_stay_small(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, 64 * M, "cluster_size=512")
    with open_image(path, **{"l2-cache-size": 16384, "refcount-cache-size": 4096}) as node:
        chance = random.Random(1)
        for _turn in range(400):
            node.pwrite(chance.randrange(64 * M - 2000), chance.randbytes(1999))
        assert len(node.tables.cache) <= 32 and len(node.refcounts.cache) <= 8
    assert check_theirs(path) == 0


def test_copies_take_few_requests(tmp_path: Path) -> None:
    """Sequential allocation: no metadata request before the flush, and few in it."""
    path = tmp_path / "image"
    make(path, 256 * M)
    file = Recorder(path)
    node = open_over(file)
    for offset in range(0, 256 * M, 2 * M):
        allocs = node.reserve(offset, 2 * M)
        assert len(allocs) == 1 and allocs[0].fresh
        node.publish(allocs)
    assert file.count("write", "flush") == 0
    node.flush()
    assert file.count("write") <= 4 and file.count("flush") <= 3
    assert len(node.block_status(0, 256 * M, want_zero=False)) == 1
    node.close()
    os.truncate(path, 300 * M)  # the data that was not written
    assert check_theirs(path) == 0


def test_aborted_allocations_leave_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, 16 * M, "cluster_size=4k")
    with open_image(path) as node:
        for offset in range(0, 16 * M, M):
            node.withdraw(node.reserve(offset, M))
        node.pwrite(M, b"x" * M)
        assert node.pread(0, 3 * M) == bytes(M) + b"x" * M + bytes(M)
    assert check_theirs(path) == 0


def test_writes_through(tmp_path: Path) -> None:
    path, copy = tmp_path / "image", tmp_path / "copy"
    make(path, M)
    file = Recorder(path)
    node = open_over(file)
    node.flags = node.flags.but(writethrough=True)
    node.pwrite(1000, b"there")
    copy.write_bytes(path.read_bytes())
    assert file.log[-1].verb == "flush"
    assert read_theirs(copy)[1000:1005] == b"there"
    node.close()
