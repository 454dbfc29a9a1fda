# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A process that goes on in the background, and tells by a file who it is (https://man7.org/linux/man-pages/man7/daemon.7.html)."""

from __future__ import annotations

import os
import select
import signal
import socket
from typing import Any, Optional

from ..errors import Error


class Background:
    """The two processes that `fork` makes of one. In the parent `code` is its exit code, once the child is ready or has failed."""

    def __init__(self) -> None:
        reading, self._ready = os.pipe()
        child = os.fork()
        self.code: Optional[int] = None
        if child:
            os.close(self._ready)
            with open(reading, "rb") as pipe:
                self.code = 0 if pipe.read(1) else 1
            return
        os.close(reading)
        os.setsid()

    def ready(self) -> None:
        """In the child: let the parent end, and leave its terminal."""
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.write(self._ready, b"r")
        os.close(self._ready)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """Notes signals that ask the process to end, whichever thread they come to. For a `with` in the main thread."""

    def __init__(self) -> None:
        self._noted, self._writes = socket.socketpair()
        self._noted.setblocking(False)
        self._writes.setblocking(False)
        self._before: list[Any] = []
        self._fd = -1

    def __enter__(self) -> Signals:
        self._fd = signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        self._before = [signal.signal(number, _note) for number in SIGNALS]
        return self

    def __exit__(self, *_details: object) -> None:
        for number, before in zip(SIGNALS, self._before):
            signal.signal(number, before)
        signal.set_wakeup_fd(self._fd)
        self._noted.close()
        self._writes.close()

    def wait(self, seconds: Optional[float] = None) -> bool:
        """Wait for one, at most so many seconds; whether one came."""
        if not select.select([self._noted], [], [], seconds)[0]:
            return False
        return any(number in SIGNALS for number in self._noted.recv(1))

    def release(self) -> None:
        """Let the next one end the process, as if nobody were listening."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def _note(_number: int, _frame: Any) -> None:
    """What Python calls in the main thread; the wake-up descriptor has told already."""


class PidFile:
    """A file that holds the number of this process as long as it runs."""

    def __init__(self, path: str) -> None:
        """Raises Error where it cannot be written."""
        self._path = path
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            with open(fd, "wb", buffering=0) as stream:
                stream.truncate(0)
                stream.write(b"%d\n" % os.getpid())
                self._file = os.fstat(fd)
        except OSError as exc:
            raise Error("cannot create PID file '%s': %s" % (path, exc.strerror), filename=path, errno=exc.errno) from exc

    def remove(self) -> None:
        """Remove it, unless somebody put another one there."""
        try:
            there = os.stat(self._path)
            if (there.st_dev, there.st_ino) == (self._file.st_dev, self._file.st_ino):
                os.unlink(self._path)
        except OSError:
            return
