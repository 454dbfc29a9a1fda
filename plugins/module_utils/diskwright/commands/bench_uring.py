# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`bench -i io_uring`: the requests that go straight to a file are under way in the kernel
(https://man7.org/linux/man-pages/man7/io_uring.7.html)."""

from __future__ import annotations

import os
from time import monotonic

from ..node import aligned_buffer
from ..uring import MAX_ENTRIES, READ, WRITE, Ring
from .bench import Requests

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

    from ..node import Node


class RingRequests(Requests):
    """Requests by a ring.

    A piece of a request that is plain bytes of a file is the kernel's to do. All others (compressed and encrypted
    clusters, writes that allocate, files that need an alignment which the request has not) are done here, one by one.
    """

    def __init__(self, node: Node, *rest: Any) -> None:
        from ctypes import addressof, c_char

        super().__init__(node, *rest)
        self._buffer = aligned_buffer(self.size)  # of all requests: nobody looks at what was read
        if self.data:
            self._buffer[:] = self.data
        self._address = addressof(c_char.from_buffer(self._buffer))
        self._ring = Ring(1)  # it shows whether there can be one
        self._ring.close()
        self._left: dict[int, int] = {}  # pieces under way, by request

    def time(self, depth: int) -> float:
        self._ring = Ring(min(depth, MAX_ENTRIES))
        try:
            return self._time(min(depth, self._ring.entries))
        finally:
            while self._left:
                self._collect(False)
            self._ring.close()

    def _time(self, depth: int) -> float:
        start = monotonic()
        under_way = 0
        for number, (offset, flush) in enumerate(self.offsets(self.count), 1):
            pieces = self._pieces(offset)
            if pieces is None or len(pieces) > depth:
                if self.data:
                    self.node.pwrite(offset, self.data)
                else:
                    self.node.pread_into(offset, self._buffer)
            else:
                while under_way + len(pieces) > depth:
                    under_way -= self._collect()
                self._left[number] = len(pieces)
                for fd, host_offset, place, length in pieces:
                    self._ring.add(WRITE if self.data else READ, fd, self._address + place, length, host_offset, number)
                under_way += len(pieces)
            last = self.drain and self.flush_interval and not number % self.flush_interval
            while last and self._left:
                under_way -= self._collect()
            if flush or last:
                self.node.flush()
        while self._left:
            self._collect()
        return monotonic() - start

    def _collect(self, fail: bool = True) -> int:
        """Take results; how many there were. Raises OSError for a failure if `fail` is set."""
        results = self._ring.wait()
        failure = 0
        for number, result in results:
            self._left[number] -= 1
            if not self._left[number]:
                del self._left[number]
            failure = failure or min(0, result)
        if failure and fail:
            raise OSError(-failure, os.strerror(-failure))
        return len(results)

    def _pieces(self, offset: int) -> Optional[list[tuple[int, int, int, int]]]:
        """(descriptor, offset in its file, offset in the buffer, length) of each piece; None if not all are a file's."""
        node = self.node
        if offset + self.size > node.size:
            return None  # and the usual way says why
        found: list[tuple[int, int, int, int]] = []
        if not self.data:
            for start, length, _status, host, host_offset in node.resolve(offset, self.size):
                if host is None:
                    continue
                if not self._direct(host, host_offset, start - offset, length):
                    return None
                found.append((host.fileno(), host_offset, start - offset, length))
            return found or None
        if node.allocation_unit or node.flags.writethrough:
            return None
        for alloc in node.reserve(offset, self.size):
            if alloc.fresh or not self._direct(alloc.host, alloc.host_offset, alloc.offset - offset, alloc.length):
                return None
            found.append((alloc.host.fileno(), alloc.host_offset, alloc.offset - offset, alloc.length))
        return found

    @staticmethod
    def _direct(host: Node, host_offset: int, place: int, length: int) -> bool:
        align = host.request_alignment
        return host.leaf and host.fileno() >= 0 and not (host_offset % align or place % align or length % align)
