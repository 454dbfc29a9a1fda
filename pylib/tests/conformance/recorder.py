# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A file that writes down its requests, and what is on the disk after a crash at any point of that log."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from diskwright.hooks import OpenFlags
from diskwright.protocols.file import File, FileOptions


SECTOR = 512


class Request(NamedTuple):
    """One request: verb is read, write, zero, discard, truncate or flush."""

    verb: str
    offset: int = 0
    length: int = 0
    data: bytes = b""


class Recorder(File):
    """The file protocol; `log` is what it was asked for. Nothing goes past it, since it has no descriptor to show."""

    def __init__(self, path: Path, **flags: bool) -> None:
        self.log: list[Request] = []
        super().__init__(FileOptions.from_mapping({"filename": str(path)}), OpenFlags(**{"writable": True, "resize": True, "unmap": True, **flags}))
        self.filename = str(path)

    def fileno(self) -> int:
        return -1

    def count(self, *verbs: str) -> int:
        return sum(request.verb in verbs for request in self.log)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        self.log.append(Request("read", host_offset, len(view)))
        super()._pread_into(host_offset, view)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self.log.append(Request("write", host_offset, len(view), bytes(view)))
        super()._pwrite(host_offset, view)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        start, count = super()._zero(offset, length, unmap)
        if count:
            self.log.append(Request("zero", start, count))
        return start, count

    def _discard(self, offset: int, length: int) -> None:
        self.log.append(Request("discard", offset, length))
        super()._discard(offset, length)

    def _truncate(self, size: int, preallocation: str) -> None:
        self.log.append(Request("truncate", size))
        super()._truncate(size, preallocation)

    def _flush(self) -> None:
        self.log.append(Request("flush"))


def apply(content: bytearray, request: Request) -> None:
    """Do to `content` what the request did to the file."""
    end = request.offset + request.length
    if request.verb in ("write", "zero"):
        content.extend(bytes(max(0, end - len(content))))
        content[request.offset : end] = request.data or bytes(request.length)
    elif request.verb == "discard":
        end = min(end, len(content))
        content[request.offset : end] = bytes(max(0, end - request.offset))
    elif request.verb == "truncate":
        del content[request.offset :]
        content.extend(bytes(request.offset - len(content)))


def after_crash(before: bytes, log: list[Request], position: int, chance: random.Random, orderly: bool) -> bytearray:
    """The file if the machine stops after `position` requests of `log`.

    What was flushed is there. Of what came later, `orderly`: all of it, in order; otherwise some of it, as a disk with a
    cache may have written it: whole sectors, as they were when they were written (changes of size, which the file system
    orders, among them).
    """
    flushed = max((i + 1 for i in range(position) if log[i].verb == "flush"), default=0)
    cached = bytearray(before)
    for request in log[:flushed]:
        apply(cached, request)
    content = bytearray(cached)
    for request in log[flushed:position]:
        apply(cached, request)
        if not orderly and chance.random() < 0.5:
            continue
        if request.verb != "write":
            apply(content, request)
            continue
        start = request.offset // SECTOR * SECTOR
        end = min(len(cached), -(-(request.offset + request.length) // SECTOR) * SECTOR)
        content.extend(bytes(max(0, end - len(content))))
        content[start:end] = cached[start:end]
    return content
