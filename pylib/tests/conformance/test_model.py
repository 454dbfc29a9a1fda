# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Random requests against a model, with statuses that tell the truth; and the same image in qemu-img's eyes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diskwright.errors import Error
from diskwright.extent import ALLOCATED, COMPRESSED, DATA, OFFSET_VALID, ZERO
from diskwright.node import Node

from subjects import SECTOR, Image, Subject, every_subject, patches

STEPS = 60


class Model:
    """What the image reads as, changed along with it."""

    def __init__(self, image: Image, seed: str) -> None:
        self.image = image
        self.chance = random.Random(seed)
        self.content = bytearray(image.new)
        self.node = image.open()

    def span(self) -> tuple[int, int]:
        """An (offset, length) inside the image: on and off cluster boundaries, short and long."""
        chance, size, unit = self.chance, len(self.content), self.node.cluster_size or 4096
        kind = chance.randrange(5)
        if kind == 0:
            offset, length = chance.randrange(size), chance.randrange(1, 3000)
        elif kind == 1:
            offset, length = chance.randrange(size // SECTOR) * SECTOR, chance.randrange(1, 40) * SECTOR
        elif kind == 2:
            offset, length = chance.randrange(-(-size // unit)) * unit, chance.randrange(1, 5) * unit
        elif kind == 3:
            offset, length = chance.randrange(size), chance.randrange(1, 4 * unit)
        else:
            offset, length = size - min(size, chance.randrange(1, 2 * unit)), 1 << 40
        return offset, min(length, size - offset)

    def step(self) -> None:
        """One random request."""
        verbs = ["write"] * 5 + ["read"] * 2 + ["zero", "unmap", "discard", "compressed", "flush", "truncate", "reopen"]
        getattr(self, self.chance.choice(verbs))()

    def write(self) -> None:
        offset, length = self.span()
        data = patches(self.chance, length)
        self.node.pwrite(offset, data)
        self.content[offset : offset + length] = data

    def read(self) -> None:
        offset, length = self.span()
        assert self.node.pread(offset, length) == self.content[offset : offset + length]

    def zero(self, unmap: bool = False) -> None:
        offset, length = self.span()
        self.node.pwrite_zeroes(offset, length, unmap)
        self.content[offset : offset + length] = bytes(length)

    def unmap(self) -> None:
        self.zero(True)

    def discard(self) -> None:
        """Each sector reads as it did, as zeroes, or as what is below."""
        offset, length = self.span()
        self.node.pdiscard(offset, length)
        found = self.node.pread(offset, length)
        below = self.image.below(len(self.content))[offset : offset + length]
        old = self.content[offset : offset + length]
        start = 0
        while start < length:
            end = min(length, (offset + start) // SECTOR * SECTOR + SECTOR - offset)
            assert found[start:end] in (old[start:end], bytes(end - start), below[start:end])
            start = end
        self.content[offset : offset + length] = found

    def compressed(self) -> None:
        unit = self.node.cluster_size
        if self.node.supports_compression and "data_file" not in self.image.subject.options:
            offset = self.chance.randrange(-(-len(self.content) // unit)) * unit
            data = patches(self.chance, min(unit, len(self.content) - offset))
            self.node.write_compressed(offset, data)
            self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.node.flush()

    def truncate(self) -> None:
        """To a size about as large; what is new reads as zeroes, and never as the backing image."""
        old, image = len(self.content), self.image
        size = max(SECTOR, old + self.chance.randrange(-300, 300) * SECTOR)
        try:
            self.node.truncate(size)
        except Error as exc:
            assert not image.subject.is_resizable(size > old) and ("resize" in str(exc) or "Shrinking" in str(exc))
            return
        del self.content[size:]
        if size > old:
            self.content.extend(self.node.pread(old, size - old) if image.subject.driver == "luks" else bytes(size - old))
        assert self.node.size == size

    def reopen(self) -> None:
        self.node.close()
        self.image.check()
        self.node = self.image.open(writable=False, resize=False)
        self.compare()
        self.node.close()
        self.node = self.image.open()
        self.compare()

    def compare(self) -> None:
        assert self.node.size == len(self.content)
        assert self.node.pread(0, self.node.size) == self.content
        check_status(self.node, self.content, self.image)


def check_status(node: Node, content: bytearray, image: Image) -> None:
    """What block_status and resolve say of the whole image is true."""
    below = image.below(len(content))
    end = 0
    for offset, length, status, host, host_offset in node.block_status(0, len(content)):
        assert offset == end and length > 0
        end = offset + length
        part = content[offset:end]
        if status & ZERO:
            assert not any(part)
        if status & OFFSET_VALID and status & DATA and not status & COMPRESSED:
            assert host is not None and bytes(part).startswith(host.pread(host_offset, length).rstrip(b"\0"))
        if not status & ALLOCATED:
            assert not status & (DATA | ZERO) and part == below[offset:end]
    assert end == len(content)
    end = 0
    for offset, length, status, host, host_offset in node.resolve(0, len(content), True):
        assert offset == end and length > 0
        end = offset + length
        if status & ZERO:
            assert host is None and not any(content[offset:end])
        else:
            assert host is not None
            found = bytearray(length)
            host.read_own(host_offset, memoryview(found))
            assert found == content[offset:end]
    assert end == len(content)


@every_subject
@pytest.mark.parametrize("seed", ["a", "b"])
def test_random_requests(tmp_path: Path, subject: Subject, seed: str) -> None:
    image = Image(subject, tmp_path)
    model = Model(image, subject.name + seed)
    model.compare()
    for _step in range(STEPS):
        model.step()
    model.compare()
    model.node.close()
    image.check()
    assert image.read_by_qemu() == model.content
    if subject.is_fixed():
        around = image.path.read_bytes()
        start = subject.runtime["offset"]
        del model.content[subject.size :]
        assert around == b"\xee" * start + model.content + b"\xee" * (len(around) - start - subject.size)


@every_subject
def test_a_new_image(tmp_path: Path, subject: Subject) -> None:
    image = Image(subject, tmp_path)
    image.check()
    assert image.read_by_qemu() == image.new
    with image.open(writable=False, resize=False) as node:
        assert node.size == subject.size and node.pread(0, node.size) == image.new
        assert node.size == image.created_size or subject.is_fixed()
        check_status(node, bytearray(image.new), image)
        for offset, length in ((0, node.size + 1), (node.size, 1), (-1, 2)):
            with pytest.raises(Error):
                node.pread(offset, length)
        for call in (lambda: node.pwrite(0, b"x"), lambda: node.pwrite_zeroes(0, 512), lambda: node.truncate(512), lambda: node.pdiscard(0, 512)):
            with pytest.raises(Error):
                call()


@every_subject
def test_the_edges_of_the_image(tmp_path: Path, subject: Subject) -> None:
    image = Image(subject, tmp_path)
    content = bytearray(image.new)
    with image.open() as node:
        unit = node.cluster_size or 4096
        for offset in (0, unit - 1, unit, len(content) - 1, len(content) // unit * unit - 1):
            if 0 <= offset < len(content):
                node.pwrite(offset, b"e")
                content[offset : offset + 1] = b"e"
        node.pwrite(5, b"")
        assert node.pread(5, 0) == b""
        if not node.growable:
            for call in (lambda: node.pwrite(len(content) - 1, b"xy"), lambda: node.pwrite_zeroes(len(content), 1), lambda: node.pwrite(1 << 62, b"x")):
                with pytest.raises(Error):
                    call()
        assert node.pread(0, node.size) == content
    image.check()
    assert image.read_by_qemu() == content
