# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Files cut at any field: a named error or the right bytes, at once."""

from __future__ import annotations

import random
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest

from diskwright.errors import Error

from subjects import SUBJECTS, Image, Subject, patches

HEADER = 120  # bytes; every field of every header ends before
LEAST = {"qcow": 48}  # bytes without which there is no header; of others at least 60
FORMATS = [subject for subject in SUBJECTS if subject.driver != "raw" and not subject.backing]


@contextmanager
def at_once(seconds: int = 10) -> Iterator[None]:
    """Ends a test that hangs."""

    def late(_number: int, _frame: object) -> None:
        raise TimeoutError("not done after %d seconds" % seconds)

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=FORMATS, ids=[subject.name for subject in FORMATS])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    """An image with some data in it, whole."""
    subject: Subject = request.param
    made = Image(subject, tmp_path)
    with made.open() as node:
        node.pwrite(3000, patches(random.Random(subject.name), min(60000, subject.size - 3000)))
    return made


def test_headers_cut_anywhere(image: Image) -> None:
    whole = image.path.read_bytes()
    least = LEAST.get(image.subject.driver, 60)
    for length in range(HEADER):
        image.path.write_bytes(whole[:length])
        for writable in (False, True):
            with at_once():
                try:
                    node = image.open(writable=writable, resize=writable)
                except Error as exc:
                    assert str(exc)
                else:
                    node.abandon()
                    # (QEMU takes what lies beyond the end for zeroes, and so do we: the last fields of version 2 are)
                    assert length >= least, "a header of %d bytes is none" % length
        if length < least:
            assert image.path.read_bytes() == whole[:length]


def test_files_cut_anywhere(image: Image) -> None:
    """What lies in the missing part reads as zeroes (decrypted ones, if encrypted) or fails; what does not is right. Nothing else is ever raised."""
    whole = image.path.read_bytes()
    with image.open(writable=False, resize=False) as node:
        content = node.pread(0, node.size)
    chance = random.Random(1)
    unit = max(512, node.cluster_size)
    cuts = sorted({min(len(whole), cut + shift) for cut in range(0, len(whole), unit) for shift in (0, 1, 8, 104)})
    for length in chance.sample(cuts, min(len(cuts), 24)):
        image.path.write_bytes(whole[:length])
        with at_once():
            try:
                with image.open(writable=False, resize=False) as node:
                    for offset in range(0, node.size, 65536):
                        part = content[offset : offset + 65536]
                        try:
                            found = node.pread(offset, len(part))
                        except (Error, OSError) as exc:
                            assert str(exc)
                        else:
                            assert all(b in (0, part[i]) for i, b in enumerate(found)) if found != part and not node.encrypted else True
                    node.check()
            except (Error, OSError) as exc:
                assert str(exc)


def test_writing_to_a_cut_file_never_crashes(image: Image) -> None:
    whole = image.path.read_bytes()
    unit = max(512, node_unit(image))
    for length in range(unit, min(len(whole), 12 * unit), max(unit // 2, 256)):
        image.path.write_bytes(whole[:length])
        with at_once():
            try:
                node = image.open()
            except (Error, OSError):
                continue
            try:
                node.pwrite(5000, b"x" * 3000)
                node.pwrite_zeroes(0, node.size // 2)
                node.flush()
            except (Error, OSError) as exc:
                assert str(exc)
            finally:
                node.abandon()


def node_unit(image: Image) -> int:
    with image.open(writable=False, resize=False) as node:
        return node.cluster_size
