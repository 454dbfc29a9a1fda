# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What a damaged image of any format may cause: an Error or OSError with a text, in little time and memory."""

from __future__ import annotations

import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from typing import Optional

from diskwright.errors import Error
from diskwright.graph import Graph
from diskwright.hooks import OpenFlags

SECONDS = 1.0  # of the processor, for one image
MEMORY = 64 << 20  # bytes that the peak may rise by, over all images of a test
SOME = 1 << 20  # bytes read and written at either end of the disk


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails if what is done inside raises the peak of the memory by more than MEMORY."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) << 10 <= MEMORY, "%d MiB more" % ((after - before) >> 10)


def attempt(path: Path, driver: str, data: Optional[bytes] = None, repair: bool = False) -> Optional[str]:
    """Do all that can be done to an image, which is given `data` first; what it was refused with, if it was."""
    if data is not None:
        path.write_bytes(data)
    begun = process_time()
    refused = None
    for flags in (OpenFlags(), OpenFlags(writable=True, resize=True, check=True), OpenFlags(writable=True, resize=True)):
        try:
            refused = refused or _use(path, driver, flags, repair)
        except (Error, OSError) as exc:
            assert str(exc)
            refused = refused or str(exc)
    took = process_time() - begun
    assert took < SECONDS, "%.1f seconds" % took
    return refused


def _use(path: Path, driver: str, flags: OpenFlags, repair: bool) -> Optional[str]:
    """Open, look, read, check and write; what the first thing that failed said."""
    refused = None
    node = Graph().open(str(path), driver, flags)
    try:
        size = node.size
        some = min(size, SOME)
        steps = [
            lambda: (node.format_specific(), node.bitmaps()),
            lambda: node.resolve(0, size, True, 1000),
            lambda: node.block_status(0, size, True, 1000),
            lambda: node.pread(0, some),
            lambda: node.pread(size - some, some),
        ]
        if not flags.writable:
            steps.append(node.check)
        elif flags.check:
            steps = [lambda: node.check("all")] if repair else []
        else:
            steps += [lambda: node.pwrite(0, b"w" * min(some, 5000)), lambda: node.pwrite_zeroes(size - some, some), node.flush, node.close]
        for step in steps:
            try:
                step()
            except (Error, OSError) as exc:
                assert str(exc)
                refused = refused or (str(exc) if "does not support checks" not in str(exc) else None)
    finally:
        node.abandon()
    return refused


def edges(code: str, old: int) -> list[int]:
    """Values of an integer field with this struct code that somebody might not have thought of."""
    top = (1 << 8 * struct.calcsize(code)) - 1
    values = {0, 1, 2, 511, 513, old - 1 & top, old + 1 & top, old * 2 & top, top >> 1, (top >> 1) + 1, top - 1, top}
    return sorted(value for value in values if value <= top and value != old)


def with_field(data: bytes, offset: int, code: str, value: int) -> bytes:
    """`data` with one number changed."""
    return data[:offset] + struct.pack(code, value) + data[offset + struct.calcsize(code) :]
