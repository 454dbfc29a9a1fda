# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Images on servers: what the suite asks of writable ones, over ssh; and reading, over http and ftp."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest

from diskwright.node import Node

from servers import HOST, Nginx, Sshd, Vsftpd, nginx, sshd, vsftpd
from subjects import K, M, SECTOR, Image, Subject, patches
from test_model import STEPS, Model, check_status


class Servers(NamedTuple):
    http: Nginx
    ftp: Vsftpd
    ssh: Sshd


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    place = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        found = Servers(*(stack.enter_context(start(place / start.__name__)) for start in (nginx, vsftpd, sshd)))  # type: ignore[arg-type]
        patch.setenv("SSH_AUTH_SOCK", str(found.ssh.agent))
        yield found


class Remote(Image):
    """An image that is opened by what `file` describes, its path being where that leads."""

    file: dict[str, Any]

    def open(self, file: Optional[Node] = None, **flags: Any) -> Node:
        return super().open(dict(self.file), **flags)  # type: ignore[arg-type]


SUBJECTS = [
    Subject("raw", "raw"),
    Subject("qcow2-v3-4k", "qcow2", {"cluster_size": 4 * K}),
    Subject("vhdx", "vhdx", {"block_size": M}, size=3 * M + SECTOR),
    Subject("vdi", "vdi", size=3 * M + 5 * SECTOR),
]


@pytest.mark.parametrize("subject", SUBJECTS[:2], ids=["raw", "qcow2"])
def test_random_requests_over_ssh(servers: Servers, tmp_path: Path, subject: Subject) -> None:
    image = Remote(subject, tmp_path)
    image.file = {"driver": "ssh", "server.host": HOST, "server.port": servers.ssh.port, "path": str(image.path), "host-key-check.mode": "none"}
    model = Model(image, subject.name)
    for _step in range(STEPS):
        model.step()
    model.compare()
    model.node.close()
    image.check()
    assert image.read_by_qemu() == model.content


@pytest.mark.parametrize("subject", SUBJECTS, ids=[subject.name for subject in SUBJECTS])
@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "ftps"])
def test_reading(servers: Servers, subject: Subject, scheme: str) -> None:
    server = servers.http if scheme.startswith("http") else servers.ftp
    directory = server.root / (subject.name + scheme)
    directory.mkdir()
    image = Remote(subject, directory)
    chance = random.Random(subject.name + scheme)
    content = bytearray(image.new)
    with Image.open(image) as node:
        for _round in range(10):
            offset = chance.randrange(len(content))
            data = patches(chance, min(chance.randrange(1, 100 * K), len(content) - offset))
            node.pwrite(offset, data)
            content[offset : offset + len(data)] = data
    image.file = {"driver": scheme, "url": server.url("%s/image" % directory.name, scheme), "readahead": chance.choice((0, 64 * K)), "sslverify": False}
    with image.open(writable=False, resize=False) as node:
        assert node.size == len(content) and node.pread(0, node.size) == content
        check_status(node, content, image)
        for _round in range(20):
            offset = chance.randrange(len(content))
            length = min(chance.randrange(1, 50 * K), len(content) - offset)
            assert node.pread(offset, length) == content[offset : offset + length]
