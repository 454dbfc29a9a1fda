# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Random requests against a model, with the image's file behind an NBD server: qemu-nbd, and nbdkit with blocks of several sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diskwright.node import Node

from servers_nbd import nbdkit, qemu_nbd
from subjects import SUBJECTS, Image, K, M, Subject
from test_model import STEPS, Model

UNIT = 24 * M  # bytes of an export

NAMED = {subject.name: subject for subject in SUBJECTS}
SERVERS: dict[str, list[str]] = {
    "qemu-nbd": [],
    "nbdkit": ["file", "IMAGE"],
    "nbdkit-4k": ["--filter=blocksize-policy", "file", "IMAGE", "blocksize-minimum=4096", "blocksize-error-policy=error"],
    "nbdkit-plain": ["--no-sr", "--filter=noextents", "--filter=nozero", "file", "IMAGE"],
}

# What does not make its file shorter or longer than an export can be.
MATRIX = [
    ("qemu-nbd", NAMED["qcow2-v3-4k"]),
    ("qemu-nbd", NAMED["raw-window"]),
    ("nbdkit", NAMED["qcow2-sub-16k"]),
    ("nbdkit", NAMED["qcow2-lazy"]),
    ("nbdkit", NAMED["qcow2-luks"]),
    ("nbdkit", NAMED["vdi-static"]),
    ("nbdkit-4k", Subject("qcow2-1k", "qcow2", {"cluster_size": K})),
    ("nbdkit-4k", NAMED["raw-window"]),
    ("nbdkit-plain", NAMED["qcow2-v3"]),
]


class Exported(Image):
    """An image whose file is opened through a server."""

    def __init__(self, subject: Subject, directory: Path, socket: Path) -> None:
        self.reached: Any = None
        super().__init__(subject, directory)
        self.reached = {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}}

    def open(self, file: Any = None, **flags: Any) -> Node:
        return super().open(file if file is not None else self.reached, **flags)


@pytest.mark.parametrize("server, subject", MATRIX, ids=["%s-%s" % (server, subject.name) for server, subject in MATRIX])
def test_random_requests_over_nbd(tmp_path: Path, server: str, subject: Subject) -> None:
    socket = tmp_path / "s"
    image = Exported(subject, tmp_path, socket)
    with image.path.open("r+b") as file:
        file.truncate(max(UNIT, image.path.stat().st_size))
    if server == "qemu-nbd":  # without locks, so that the tests can look into the image too
        running = qemu_nbd(socket, "--discard=unmap", "--image-opts", "driver=raw,file.driver=file,file.locking=off,file.filename=%s" % image.path)
    else:
        running = nbdkit(socket, *(word.replace("IMAGE", str(image.path)) for word in SERVERS[server]))
    with running:
        model = Model(image, subject.name + server)
        for _step in range(STEPS):
            model.step()
        model.compare()
        model.node.close()
        image.check()
        assert image.read_by_qemu()[: len(model.content)] == model.content
