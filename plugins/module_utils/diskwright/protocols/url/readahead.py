# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Reads that ask for more than they need, and share what came (https://www.qemu.org/docs/master/system/qemu-block-drivers.html, readahead)."""

from __future__ import annotations

import threading
from typing import Callable, Optional

SEGMENTS = 8  # kept at most
MOST_AHEAD = 16 << 20  # bytes; a larger readahead is not asked for


class Segment:
    """A run of bytes from `start` on that is kept, or on its way."""

    __slots__ = ("start", "data", "arrived", "failure")

    def __init__(self, start: int, length: int) -> None:
        self.start = start
        self.data = bytearray(length)
        self.arrived = threading.Event()
        self.failure: Optional[BaseException] = None


class Readahead:
    """Small reads of something `size` bytes long by `fetch(offset, view)`, each with `ahead` bytes more than it needs."""

    def __init__(self, fetch: Callable[[int, memoryview], None], size: int, ahead: int) -> None:
        self._fetch = fetch
        self._size = size
        self._ahead = min(ahead, MOST_AHEAD)
        self._segments: list[Segment] = []  # the one that was asked for last is at the end
        self._lock = threading.Lock()

    def read(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`, all of them inside. Raises what `fetch` does."""
        while len(view):
            if len(view) >= self._ahead:
                self._fetch(offset, view)
                return
            segment, own = self._segment(offset, len(view))
            if own:
                self._fill(segment)
            segment.arrived.wait()
            if segment.failure is not None:
                raise segment.failure
            skip = offset - segment.start
            count = min(len(view), len(segment.data) - skip)
            view[:count] = memoryview(segment.data)[skip : skip + count]
            offset += count
            view = view[count:]

    def _segment(self, offset: int, length: int) -> tuple[Segment, bool]:
        """The segment that has `offset`, and whether the caller has to fill it."""
        with self._lock:
            for segment in self._segments:
                if segment.start <= offset < segment.start + len(segment.data):
                    self._segments.remove(segment)
                    self._segments.append(segment)
                    return segment, False
            end = min(self._size, offset + length + self._ahead)
            for segment in self._segments:
                if offset + length <= segment.start < end:
                    end = segment.start  # what is there already need not come again
            segment = Segment(offset, end - offset)
            self._segments.append(segment)
            del self._segments[:-SEGMENTS]
            return segment, True

    def _fill(self, segment: Segment) -> None:
        try:
            self._fetch(segment.start, memoryview(segment.data))
        except BaseException as exc:
            segment.failure = exc
            with self._lock:
                if segment in self._segments:
                    self._segments.remove(segment)
            raise
        finally:
            segment.arrived.set()
