# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Two toy drivers: a protocol in memory that records its requests, and a format that maps units anywhere in it.

They test what node.py does for every driver, apart from any real format.
"""

from __future__ import annotations

import random
from typing import Any, Iterable, Optional, Sequence

from diskwright.extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from diskwright.node import Alloc, Format, Node, OpenFlags, Protocol
from diskwright.options import NodeRef, Options, opt

WRITABLE = OpenFlags(writable=True, resize=True)


class MemoryOptions(Options):
    filename: str = opt("memory")


class Memory(Protocol):
    """Bytes in memory; `log` lists the requests as (verb, offset, length)."""

    driver = "memory"
    options_class = MemoryOptions
    growable = True

    def __init__(self, content: bytes = b"", align: int = 1) -> None:
        super().__init__(MemoryOptions(), WRITABLE)
        self.data = bytearray(content)
        self.request_alignment = align
        self.log: list[tuple[str, int, int]] = []

    @property
    def size(self) -> int:
        return len(self.data)

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, DATA | OFFSET_VALID | ALLOCATED, self, offset),)

    def _record(self, verb: str, offset: int, length: int) -> None:
        if offset % self.request_alignment or length % self.request_alignment:
            raise AssertionError("%s %#x %#x is not aligned" % (verb, offset, length))
        self.log.append((verb, offset, length))

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        self._record("read", host_offset, len(view))
        found = self.data[host_offset : host_offset + len(view)]
        view[:] = found + bytes(len(view) - len(found))

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self._record("write", host_offset, len(view))
        if len(self.data) < host_offset:
            self.data += bytes(host_offset - len(self.data))
        self.data[host_offset : host_offset + len(view)] = view

    def _trim(self, end: int) -> None:
        pass

    def _truncate(self, size: int, preallocation: str) -> None:
        self.data = self.data[:size] + bytes(max(0, size - len(self.data)))

    def _flush(self) -> None:
        self.log.append(("flush", 0, 0))


class UnitsOptions(Options):
    file: NodeRef = opt()
    backing: Optional[NodeRef] = opt(None)


class Units(Format):
    """A format whose table lives in memory: unit number -> host offset (-1: reads as zero). Allocates in random order."""

    driver = "units"
    options_class = UnitsOptions
    supports_backing = True

    def __init__(self, file: Node, size: int, unit: int, backing: Optional[Node] = None, seed: int = 0) -> None:
        super().__init__(UnitsOptions(file=file, backing=backing), WRITABLE)
        self._size = size
        self.allocation_unit = unit
        self.table: dict[int, int] = {}
        self.reserved: set[int] = set()
        self.linked = 0
        self.aborted = 0
        self._rng = random.Random(seed)

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        unit = self.allocation_unit
        for number in range(offset // unit, -(-(offset + length) // unit)):
            host = self.table.get(number)
            if host is None:
                yield Extent(number * unit, unit, 0)
            elif host < 0:
                yield Extent(number * unit, unit, ZERO | ALLOCATED)
            else:
                yield Extent(number * unit, unit, DATA | OFFSET_VALID | ALLOCATED, self.file, host)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        unit = self.allocation_unit
        allocs = []
        with self._lock:
            for number in range(offset // unit, -(-(offset + length) // unit)):
                host = self.table.get(number, -1)
                if host >= 0:
                    low, high = max(offset, number * unit), min(offset + length, (number + 1) * unit)
                    allocs.append(Alloc(low, high - low, self.file, host + low - number * unit))
                    continue
                host = self._rng.randrange(64) * unit
                while host in self.reserved:
                    host += unit
                self.reserved.add(host)
                allocs.append(Alloc(number * unit, unit, self.file, host, fresh=True))
        return allocs

    def _link(self, allocs: Sequence[Alloc]) -> None:
        with self._lock:
            for alloc in allocs:
                assert self.table.get(alloc.offset // self.allocation_unit, -1) < 0, "linked twice"
                self.table[alloc.offset // self.allocation_unit] = alloc.host_offset
                self.linked += 1

    def _abort(self, allocs: Sequence[Alloc]) -> None:
        with self._lock:
            for alloc in allocs:
                self.reserved.discard(alloc.host_offset)
                self.aborted += 1

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        unit = self.allocation_unit
        first, last = -(-offset // unit), (offset + length) // unit
        for number in range(first, last):
            self.table[number] = -1
        return (first * unit, max(0, last - first) * unit)

    def _truncate(self, size: int, preallocation: str) -> None:
        self._size = size


class Broken(Units):
    """A format whose map is wrong in the way that `extents` says."""

    def __init__(self, extents: Sequence[Any]) -> None:
        super().__init__(Memory(), 1000, 10)
        self.extents = extents

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return [Extent(*extent) for extent in self.extents]
