# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Connections to a storage server through a C library whose contexts are for one thread at a time.

A pool lets several threads work, each over a connection of its own; `serve` is the event loop of one of them.
"""

from __future__ import annotations

import select
from contextlib import contextmanager
from threading import Condition
from time import monotonic, sleep

from ..errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, Protocol

    class Connection(Protocol):
        """What a pool keeps: `lost` says that it is of no use any more."""

        lost: bool

        def close(self) -> None:
            """Give everything back; raises nothing."""


RECONNECT_TIME = 5.0  # seconds for which a lost connection is tried again
RECONNECT_PAUSE = 0.25  # seconds between two of these
NAP = 1.0  # seconds after which a library gets a look at its own clocks


class Lost(Error):
    """The connection broke before the answer was there; the request may be made again over another."""


class Pool:
    """At most `most` connections, made by `connect` when all others are at work. One that was lost is replaced."""

    def __init__(self, connect: Callable[[], Any], most: int) -> None:
        """The first connection is made at once. Raises what `connect` raises."""
        self._connect = connect
        self._most = most
        self._idle: list[Any] = [connect()]
        self._count = 1
        self._changed = Condition()
        self._closed = False
        self.losses = 0  # connections that broke so far

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """A connection that nobody else uses meanwhile."""
        taken = self._take()
        try:
            yield taken
        finally:
            self._give(taken)

    def run(self, request: Callable[..., Any], *arguments: Any) -> Any:
        """What `request(connection, *arguments)` returns. Where the connection is lost, it is made again over a new one; it must bear that.

        Raises Error once RECONNECT_TIME is over, and at once what else is wrong.
        """
        until = monotonic() + RECONNECT_TIME
        while True:
            try:
                with self.connection() as taken:
                    return request(taken, *arguments)
            except Lost as exc:
                if monotonic() >= until or self._closed:
                    raise Error(str(exc), filename=exc.filename, errno=exc.errno) from exc
            sleep(RECONNECT_PAUSE)

    def close(self) -> None:
        """Close all connections. Nothing may be under way."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> Any:
        with self._changed:
            while True:
                if self._closed:
                    raise Error("The connection is closed")
                if self._idle:
                    return self._idle.pop()
                if self._count < self._most:
                    self._count += 1
                    break
                self._changed.wait()
        try:
            return self._connect()
        except BaseException:
            with self._changed:
                self._count -= 1
                alone = not self._count
                if not alone:
                    self._most = self._count  # the server gives no more
                self._changed.notify()
            if alone:
                raise
        return self._take()

    def _give(self, connection: Any) -> None:
        with self._changed:
            drop = connection.lost or self._closed
            if drop:
                self._count -= 1
                self.losses += connection.lost
            else:
                self._idle.append(connection)
            self._changed.notify()
        if drop:
            connection.close()


def serve(
    context: Any,
    descriptor: Callable[[Any], int],
    events: Callable[[Any], int],
    service: Callable[[Any, int], int],
    done: Callable[[], int],
    patience: float,
) -> str:
    """Let the library work on `context` until `done()` is not 0: "" then, "lost" if it gives up, "late" after `patience` seconds."""
    until = monotonic() + patience
    while not done():
        left = until - monotonic()
        if left <= 0:
            return "late"
        fd = descriptor(context)
        ready = 0
        if fd >= 0:
            poller = select.poll()
            poller.register(fd, events(context))
            for _fd, happened in poller.poll(min(left, NAP) * 1000):
                ready = happened
        else:
            sleep(min(left, 0.05))
        if service(context, ready) < 0:
            return "" if done() else "lost"
    return ""
