# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Watching and placing image locks: what this process asks the kernel for, byte by byte, and a stranger that holds some."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Iterator, Optional

FLOCK = "hhqqi4x"
BYTES = (100, 101, 102, 103, 200, 201, 202, 203)

_watchers: list[Watcher] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "fcntl.fcntl" and _watchers:
        for watcher in _watchers:
            watcher.note(*arguments)


sys.addaudithook(_hook)


class Watcher:
    """Records the lock requests of this process on one file: `held`, `most` (the bytes ever held) and `checked`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.most: set[int] = set()
        self.checked: set[int] = set()
        self.requests: list[str] = []  # "+100" taken, "?200" checked, "-100" dropped

    def note(self, fd: int, command: int, argument: Any) -> None:
        if command not in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK) or not self.is_of(fd):
            return
        kind, whence, start, length, _pid = struct.unpack(FLOCK, argument)
        assert (whence, length) == (os.SEEK_SET, 1)
        if command == fcntl.F_OFD_GETLK:
            assert kind == fcntl.F_WRLCK
            self.checked.add(start)
        elif kind == fcntl.F_RDLCK:
            self.most.add(start)
        else:
            assert kind == fcntl.F_UNLCK
        self.requests.append("%s%d" % ("?" if command == fcntl.F_OFD_GETLK else "+" if kind == fcntl.F_RDLCK else "-", start))

    def is_of(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def __enter__(self) -> Watcher:
        _watchers.append(self)
        return self

    def __exit__(self, kind: Optional[type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]) -> None:
        _watchers.remove(self)


@contextmanager
def stranger(path: Path, *held: int, kind: int = fcntl.F_RDLCK) -> Iterator[None]:
    """Another open file description that holds `held` bytes of the file."""
    fd = os.open(path, os.O_RDWR)
    try:
        for byte in held:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(FLOCK, kind, os.SEEK_SET, byte, 1, 0))
        yield
    finally:
        os.close(fd)


def held_by_others(path: Path) -> set[int]:
    """The bytes of the file on which anybody holds a lock."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found = set()
        for byte in BYTES:
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
            if struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK:
                found.add(byte)
        return found
    finally:
        os.close(fd)
