# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Random requests against a model, with the image behind a real server: NFS-Ganesha exports its directory, and tgt its file."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from diskwright.node import Node
from servers_storage import Targets, ganesha, tgt
from subjects import ODD, SECTOR, SUBJECTS, Image, K, M, Subject, patches
from test_model import STEPS, Model

NAMED = {subject.name: subject for subject in SUBJECTS}
OVER_NFS = [
    NAMED[name]
    for name in (
        "raw raw-window qcow2-v3-4k qcow2-lazy qcow2-sub-shorter qcow2-luks luks vdi vmdk vmdk-zero-longer vpc vhdx parallels qed-4k qcow".split()
    )
]
# What does not make its file shorter or longer than a unit can be.
OVER_ISCSI = [
    (NAMED["raw-window"], 512),
    (NAMED["qcow2-v3-4k"], 512),
    (Subject("qcow2-4k-blocks", "qcow2", {"cluster_size": 16 * K}), 4096),
    (NAMED["qcow2-sub-16k"], 512),
    (NAMED["qcow2-luks"], 512),
    (NAMED["vdi-static"], 4096),
]
UNIT = 24 * M  # bytes of a logical unit


class Served(Image):
    """An image whose file is opened through a server."""

    def __init__(self, subject: Subject, directory: Path) -> None:
        self.reached: Any = None
        super().__init__(subject, directory)

    def open(self, file: Any = None, **flags: Any) -> Node:
        return super().open(file if file is not None else self.reached, **flags)


@pytest.fixture(scope="module")
def export() -> Iterator[Path]:
    with ganesha() as place:
        yield place


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Targets]:
    with tgt(tmp_path_factory.mktemp("tgt")) as running:
        yield running


def over_nfs(subject: Subject, export: Path, directory: Path) -> Served:
    place = export / ("%s-%d" % (directory.name, os.getpid()))
    place.mkdir()
    image = Served(subject, place)
    image.reached = {"driver": "nfs", "server": {"type": "inet", "host": "127.0.0.1"}, "path": str(image.path)}
    return image


def over_iscsi(subject: Subject, block_size: int, targets: Targets, directory: Path) -> Served:
    image = Served(subject, directory)
    os.truncate(image.path, UNIT)
    portal, target, lun = targets.unit(image.path, block_size=block_size)[len("iscsi://") :].split("/")
    image.reached = {"driver": "iscsi", "transport": "tcp", "portal": portal, "target": target, "lun": int(lun)}
    return image


def walk(image: Served, seed: str) -> None:
    """A random walk, and the image afterwards in qemu-img's eyes."""
    model = Model(image, seed)
    model.compare()
    for _step in range(STEPS):
        model.step()
    model.compare()
    model.node.close()
    image.check()
    assert image.read_by_qemu() == model.content


@pytest.mark.parametrize("subject", OVER_NFS, ids=[subject.name for subject in OVER_NFS])
def test_random_requests_over_nfs(export: Path, tmp_path: Path, subject: Subject) -> None:
    walk(over_nfs(subject, export, tmp_path), subject.name + "nfs")


@pytest.mark.parametrize(("subject", "block_size"), OVER_ISCSI, ids=[subject.name for subject, _size in OVER_ISCSI])
def test_random_requests_over_iscsi(targets: Targets, tmp_path: Path, subject: Subject, block_size: int) -> None:
    walk(over_iscsi(subject, block_size, targets, tmp_path), subject.name + "iscsi")


@pytest.mark.parametrize("server", ["nfs", "iscsi"])
def test_eight_threads(export: Path, targets: Targets, tmp_path: Path, server: str) -> None:
    subject = Subject("threads", "qcow2", {"cluster_size": 4 * K}, size=ODD)
    image = over_nfs(subject, export, tmp_path) if server == "nfs" else over_iscsi(subject, 512, targets, tmp_path)
    content = bytearray(image.new)
    failures: list[BaseException] = []
    with image.open() as node:

        def work(number: int) -> None:
            chance = Random(number)
            try:
                for _round in range(20):
                    offset = (chance.randrange(len(content) // SECTOR) // 8 * 8 + number) * SECTOR
                    data = patches(chance, max(min(SECTOR, len(content) - offset), 0))
                    if data:
                        node.pwrite(offset, data)
                        content[offset : offset + len(data)] = data
            except BaseException as exc:  # noqa: BLE001
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert node.pread(0, node.size) == content
    image.check()
    assert image.read_by_qemu() == content
