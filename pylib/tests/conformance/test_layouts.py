# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Clusters in any order in the file: reversed, scattered, in place; and maps that agree with qemu-img's entry by entry."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from diskwright.extent import DATA, OFFSET_VALID, ZERO
from diskwright.node import Node

from subjects import SUBJECTS, Image, Subject


def our_map(node: Node) -> list[dict[str, Any]]:
    """What qemu-img map prints of an image without backing file, made from block_status."""
    entries: list[dict[str, Any]] = []
    for offset, length, status, _host, host_offset in node.block_status(0, node.size):
        entry = {"start": offset, "length": length, "zero": not status & DATA or bool(status & ZERO), "data": bool(status & DATA)}
        if status & OFFSET_VALID:
            entry["offset"] = host_offset
        entries.append(entry)
    return entries


def their_map(path: Path, driver: str) -> list[dict[str, Any]]:
    done = subprocess.run(["qemu-img", "map", "--output=json", "-f", driver, str(path)], capture_output=True, timeout=60, check=True)
    return [{key: entry[key] for key in ("start", "length", "zero", "data", "offset") if key in entry} for entry in json.loads(done.stdout)]


def joined(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries with neighbours of one kind made one, as printing does."""
    result: list[dict[str, Any]] = []
    for entry in entries:
        last = result[-1] if result else None
        if last and (last["zero"], last["data"], "offset" in last) == (entry["zero"], entry["data"], "offset" in entry):
            if "offset" not in entry or last["offset"] + last["length"] == entry["offset"]:
                last["length"] += entry["length"]
                continue
        result.append(dict(entry))
    return result


LAYERLESS = [subject for subject in SUBJECTS if not subject.backing and not subject.runtime]


@pytest.mark.parametrize("subject", LAYERLESS, ids=[subject.name for subject in LAYERLESS])
@pytest.mark.parametrize("order", ["ascending", "reversed", "scattered", "every second"])
def test_clusters_in_any_order(tmp_path: Path, subject: Subject, order: str) -> None:
    image = Image(subject, tmp_path)
    content = bytearray(image.new)
    with image.open() as node:
        unit = node.cluster_size or 4096
        clusters = list(range(min(160, -(-node.size // unit))))
        if order == "reversed":
            clusters.reverse()
        elif order == "scattered":
            random.Random(subject.name).shuffle(clusters)
        elif order == "every second":
            clusters = clusters[::2]
        for turn, cluster in enumerate(clusters):
            data = bytes([cluster % 255 + 1]) * min(unit, len(content) - cluster * unit)
            node.pwrite(cluster * unit, data)
            content[cluster * unit : cluster * unit + len(data)] = data
            if turn % 7 == 0:
                node.flush()
        assert node.pread(0, node.size) == content
        ours = joined(our_map(node))
        if order == "ascending" and subject.driver == "qcow2":
            # tables come between, but data is not torn apart without need
            assert len(node.resolve(0, len(clusters) * unit)) <= 2 + len(clusters) * unit // (unit * unit // 8) * 2
    image.check()
    assert ours == joined(their_map(image.path, subject.driver))
    with image.open(writable=False, resize=False) as node:
        assert joined(our_map(node)) == ours and node.pread(0, node.size) == content


@pytest.mark.parametrize("subject", LAYERLESS, ids=[subject.name for subject in LAYERLESS])
def test_maps_of_zeroes_and_discards(tmp_path: Path, subject: Subject) -> None:
    image = Image(subject, tmp_path)
    chance = random.Random(subject.name)
    with image.open() as node:
        unit = node.cluster_size or 4096
        for _turn in range(40):
            cluster = chance.randrange(node.size // unit)
            length = min(chance.randrange(1, 4) * unit, node.size - cluster * unit)
            kind = chance.randrange(4)
            if kind == 0:
                node.pwrite_zeroes(cluster * unit, length)
            elif kind == 1:
                node.pwrite_zeroes(cluster * unit, length, unmap=True)
            elif kind == 2:
                node.pdiscard(cluster * unit, length)
            else:
                node.pwrite(cluster * unit, b"d" * length)
        ours = joined(our_map(node))
    image.check()
    assert ours == joined(their_map(image.path, subject.driver))
