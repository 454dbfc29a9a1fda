# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""check and its repair: each cluster belongs to one thing, and nothing lies outside of the file
(https://www.qemu.org/docs/master/interop/qed_spec.html#consistency-checking)."""

from __future__ import annotations

from ...errors import Corrupt
from ...tally import CheckResult, Tally
from .header import NEED_CHECK
from .image import UNALLOCATED, ZERO_CLUSTER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator

    from .image import Qed

MORE_TABLES = 1000  # L2 tables beyond those that the file has room for that are looked at before a check is given up,
MORE_RUNS = 100000  # and runs of clusters


class TooOften(Corrupt):
    """The same clusters are named again and again."""


def check(image: Qed, repair: str) -> CheckResult:
    """Count what is wrong. With `repair` entries that point outside of the file are emptied; leaks are only counted."""
    checking = Checking(image, bool(repair))
    try:
        checking.run()
    except TooOften as exc:
        checking.result.failure = exc
        return checking.result
    if repair:
        image.flush()
        result = checking.result
        if not result.corruptions and image.header.features & NEED_CHECK:
            image.header.features &= ~NEED_CHECK
            image.update_header()
    return checking.result


class Checking:
    """One check under way."""

    def __init__(self, image: Qed, repair: bool) -> None:
        self.image = image
        self.repair = repair
        self.result = CheckResult()
        self.result.total_clusters = -(-image.size // image.cluster_size)
        self.total = image.end // image.cluster_size  # clusters in the file
        self.used = Tally(self.total, 1)
        self._first = True  # the first window of the tally: what does not depend on windows is counted
        self._tables = self._data = 0  # what may still be looked at

    def run(self) -> None:
        """Go through all tables, once for each window of the tally."""
        image = self.image
        used = 0
        more = True
        while more:
            self._tables = self.total // image.header.table_size + MORE_TABLES
            self._data = self.total + MORE_RUNS
            self._add(0, image.header.header_size * image.cluster_size)
            self._add(image.header.l1_table_offset, image.header.table_bytes)
            for offset, _run in self._entries(image.header.l1_table_offset, image.header.table_bytes, UNALLOCATED):
                self._spend(tables=1)
                if not self._add(offset, image.header.table_bytes):
                    self._walk(offset)
            for start, count in self.used.touched():
                stop = min(start + count, self.total)
                for _at, counters in self.used.counters(start, stop - start):
                    used += len(counters) - counters.tolist().count(0)
            more = self.used.advance()
            self._first = False
        self.result.leaks = self.total - used

    def _spend(self, tables: int = 0, data: int = 0) -> None:
        self._tables -= tables
        self._data -= data
        if min(self._tables, self._data) < 0:
            raise TooOften("%s: clusters are in use too often" % self.image.filename, filename=self.image.filename)

    def _add(self, offset: int, length: int) -> int:
        """Note that clusters are in use; how many of them were in use already, which are corruptions."""
        size = self.image.cluster_size
        start = offset // size
        lost = len(self.used.add(start, max(0, min(length // size, self.total - start))))
        self.result.corruptions += lost
        return lost

    def _walk(self, table: int) -> None:
        """Go through one L2 table."""
        for offset, run in self._entries(table, self.image.cluster_size, ZERO_CLUSTER):
            self._add(offset, run * self.image.cluster_size)

    def _count(self, offset: int, run: int, last: int) -> int:
        """Count `run` clusters in a row from `offset` on, those before which ended at `last`, 0 for none; where these end."""
        self._spend(data=1)
        if self._first:
            self.result.fragmented_clusters += bool(last and last != offset)
            self.result.allocated_clusters += run
        return offset + run * self.image.cluster_size

    def _entries(self, table: int, length: int, empty: int) -> Iterator[tuple[int, int]]:
        """(offset, count) of runs of entries of a table that point at `length` bytes each; values up to `empty` point nowhere.

        Those that point outside of the file are counted, or emptied.
        """
        image = self.image
        last = 0
        for start in range(0, image.header.table_bytes // 8, image.page // 8):
            place, page, _at = image.get_page(table, start)
            for number, run, value in list(image.runs(page, 0, len(page) // 8)):
                if value <= empty:
                    continue
                if empty == ZERO_CLUSTER:
                    last = self._count(value, run, last)
                if run > 1 and length > image.cluster_size or not image.holds(value, (run - 1) * image.cluster_size + length):
                    yield from self._one_by_one(place, page, number, run, value, length)
                else:
                    yield value, run

    def _one_by_one(self, place: int, page: bytearray, number: int, run: int, value: int, length: int) -> Iterator[tuple[int, int]]:
        image = self.image
        step = image.cluster_size if value > ZERO_CLUSTER else 0
        for turn in range(run):
            offset = value + turn * step
            if image.holds(offset, length):
                yield offset, 1
                continue
            if self.repair:
                page[(number + turn) * 8 : (number + turn) * 8 + 8] = bytes(8)
                image.cache.mark(place)
                self.result.corruptions_fixed += 1
            elif self._first:
                self.result.corruptions += 1
