# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A ring of requests that one thread has under way in the kernel (https://man7.org/linux/man-pages/man7/io_uring.7.html)."""

from __future__ import annotations

import ctypes
import mmap
import os
from struct import pack_into, unpack_from

from .errors import Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_ENTRIES = 1024  # requests under way at a time

READ, WRITE = 22, 23  # operations, since Linux 5.6
EINTR = 4

_SETUP, _ENTER = 425, 426  # system calls; the same on every architecture
_SUBMISSIONS, _COMPLETIONS, _ENTRIES = 0, 0x8000000, 0x10000000  # what is mapped, by offset
_GETEVENTS = 1
_PARAMETERS = 120  # bytes, as are the following
_ENTRY, _COMPLETION = 64, 16
_SUBMISSION_OFFSETS, _COMPLETION_OFFSETS = 40, 80  # in the parameters


class Ring:
    """Up to `entries` reads and writes under way at once. For one thread.

    Raises Unsupported where the kernel offers no io_uring, or forbids it.
    """

    def __init__(self, entries: int) -> None:
        parameters = ctypes.create_string_buffer(_PARAMETERS)
        self._call: Any = ctypes.CDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        self._fd = self._call(ctypes.c_long(_SETUP), ctypes.c_uint(entries), parameters)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise Unsupported("Unable to use io_uring: failed to init linux io_uring ring: %s" % os.strerror(number), errno=number)
        self.entries, completions = unpack_from("=II", parameters, 0)
        self._head, self._tail, self._mask, _count, _flags, _dropped, array = unpack_from("=7I", parameters, _SUBMISSION_OFFSETS)
        self._done_head, self._done_tail, self._done_mask, _count, _overflow, self._results = unpack_from("=6I", parameters, _COMPLETION_OFFSETS)
        self._submissions = self._map(array + self.entries * 4, _SUBMISSIONS)
        self._completions = self._map(self._results + completions * _COMPLETION, _COMPLETIONS)
        self._entries = self._map(self.entries * _ENTRY, _ENTRIES)
        for index in range(self.entries):
            pack_into("=I", self._submissions, array + index * 4, index)
        self._next = self._number(self._submissions, self._tail)
        self._mask = self._number(self._submissions, self._mask)
        self._done_mask = self._number(self._completions, self._done_mask)
        self._waiting = 0  # entries that the kernel has not been told of

    def _map(self, length: int, offset: int) -> mmap.mmap:
        return mmap.mmap(self._fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)

    @staticmethod
    def _number(area: mmap.mmap, offset: int) -> int:
        number: int = unpack_from("=I", area, offset)[0]
        return number

    def add(self, operation: int, fd: int, address: int, length: int, offset: int, tag: int) -> None:
        """Queue a READ or WRITE of `length` bytes of memory at `address`, which must stay; `tag` comes back with its result.

        No more may be under way than `entries`.
        """
        place = (self._next & self._mask) * _ENTRY
        pack_into("=BBHiQQIIQQQQ", self._entries, place, operation, 0, 0, fd, offset, address, length, 0, tag, 0, 0, 0)
        self._next = self._next + 1 & 0xFFFFFFFF
        pack_into("=I", self._submissions, self._tail, self._next)
        self._waiting += 1

    def wait(self) -> list[tuple[int, int]]:
        """Send what is queued, wait for one result at least; (tag, bytes or a negative errno) of each. Raises OSError."""
        head, tail = self._number(self._completions, self._done_head), self._number(self._completions, self._done_tail)
        if self._waiting or head == tail:
            self._enter(int(head == tail))
            tail = self._number(self._completions, self._done_tail)
        found: list[tuple[int, int]] = []
        while head != tail:
            found.append(unpack_from("=Qi", self._completions, self._results + (head & self._done_mask) * _COMPLETION))
            head = head + 1 & 0xFFFFFFFF
        pack_into("=I", self._completions, self._done_head, head)
        return found

    def _enter(self, least: int) -> None:
        while True:
            sent = self._call(
                ctypes.c_long(_ENTER), ctypes.c_uint(self._fd), ctypes.c_uint(self._waiting), ctypes.c_uint(least), ctypes.c_uint(_GETEVENTS), None, 0
            )
            if sent >= 0:
                self._waiting -= sent
                return
            number = ctypes.get_errno()
            if number != EINTR:
                raise OSError(number, os.strerror(number))

    def close(self) -> None:
        """Give the ring back; nothing may be under way."""
        if self._fd >= 0:
            for area in (self._submissions, self._completions, self._entries):
                area.close()
            os.close(self._fd)
            self._fd = -1
