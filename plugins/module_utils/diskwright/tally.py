# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What a check finds, and the reference tally that the formats' checks share
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, ImageCheck)."""

from __future__ import annotations

import sys

from . import kernels

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Optional, Sequence

    from .errors import Error

MESSAGES_MAX = 100000  # lines that a result keeps; a damaged table may cause one for each of its entries

_PAGE_BYTES = 512 << 10  # of counters; a page is the unit in which they come and go
_PAGES_MAX = 80  # counters that are in memory at a time: 40 MiB
_ZEROES = bytes(_PAGE_BYTES)


class CheckResult:
    """The counts of QEMU's ImageCheck; `check_errors` are those that kept the check from finishing.

    `messages` are the lines for a person, in order and without line ends; QEMU prints every one of them to standard error, before
    anything else. Lines beyond MESSAGES_MAX are only counted, in `omitted`. `failure` is the reason why the check (or the
    repair) was given up: then the counts mean nothing, and QEMU prints "Check failed: " and exits with 1.
    Offsets in bytes; counts in clusters of the format.
    """

    __slots__ = (
        "check_errors",
        "image_end_offset",
        "corruptions",
        "leaks",
        "corruptions_fixed",
        "leaks_fixed",
        "total_clusters",
        "allocated_clusters",
        "fragmented_clusters",
        "compressed_clusters",
        "messages",
        "omitted",
        "failure",
    )

    def __init__(self) -> None:
        self.check_errors = 0
        self.image_end_offset = 0
        self.corruptions = 0
        self.leaks = 0
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        self.total_clusters = 0
        self.allocated_clusters = 0
        self.fragmented_clusters = 0
        self.compressed_clusters = 0
        self.messages: list[str] = []
        self.omitted = 0
        self.failure: Optional[Error] = None

    @property
    def clean(self) -> bool:
        """Nothing is wrong (any more)."""
        return not (self.check_errors or self.corruptions or self.leaks or self.failure)

    def say(self, message: str, count: int = 1) -> None:
        """Add a line for a person, or the same one `count` times."""
        room = min(count, max(0, MESSAGES_MAX - len(self.messages)))
        self.messages += [message] * room
        self.omitted += count - room


class Tally:
    """How often each of `total` clusters is referred to; no count exceeds `most`.

    Counters exist for pages of clusters that are touched, and for so many pages only as memory allows: a tally sees the
    clusters `low` to `high` (None: all). If `high` is not None after everything was added, call `advance` and add everything
    again for the next window. `shared` says that some cluster was counted more than once.
    """

    def __init__(self, total: int, most: int) -> None:
        self.total = total
        self.low = 0
        self.high: Optional[int] = None
        self.shared = False
        self._code = "H" if most < 1 << 16 else "I"
        self._width = 2 if most < 1 << 16 else 4
        self._most = min(most, (1 << 8 * self._width) - 1)
        self._exact = most == self._most  # otherwise counters are so wide that they never overflow
        self._per_page = _PAGE_BYTES // self._width
        self._pages: dict[int, memoryview] = {}
        self._nothing = memoryview(_ZEROES).cast(self._code)  # type: ignore[call-overload]
        self._ones = b""
        self._end_page = 1 << 63  # pages from here on are for later windows

    def advance(self) -> bool:
        """Go on to the next window, empty; False if this was the last one."""
        if self.high is None:
            return False
        self.low, self.high = self.high, None
        self._pages.clear()
        self._end_page = 1 << 63
        return True

    def add(self, start: int, count: int) -> Sequence[int]:
        """Count `count` clusters from `start` on once more; the clusters whose count was at its largest value already.

        A range that ends beyond `total` makes that larger.
        """
        end = start + count
        if end > self.total:
            self.total = end
        lost: Sequence[int] = ()
        start = max(start, self.low)
        while start < end:
            index = start // self._per_page
            base = index * self._per_page
            stop = min(end, base + self._per_page)
            if index >= self._end_page:
                break
            page = self._pages.get(index)
            if page is None:
                page = self._new_page(index)
            if page is not None:
                more = self._add_to_page(page, start - base, stop - base)
                if more:
                    lost = [*lost, *(base + item for item in more)]
            start = stop
        return lost

    def _new_page(self, index: int) -> Optional[memoryview]:
        """Make room for a page, if need be by leaving the highest one to the next window; None if that is this one."""
        if len(self._pages) >= _PAGES_MAX:
            highest = max(self._pages)
            if index < highest:
                del self._pages[highest]
            self._end_page = max(index, highest)
            self.high = self._end_page * self._per_page
            if index == self._end_page:
                return None
        page: memoryview = memoryview(bytearray(_PAGE_BYTES)).cast(self._code)  # type: ignore[call-overload]
        self._pages[index] = page
        return page

    def _add_to_page(self, page: memoryview, start: int, stop: int) -> Sequence[int]:
        part = page[start:stop]
        if _ZEROES.startswith(part.cast("B")):
            if stop - start == 1:
                page[start] = 1
                return ()
            if not self._ones:
                self._ones = (1).to_bytes(self._width, sys.byteorder) * self._per_page
            part.cast("B")[:] = memoryview(self._ones)[: (stop - start) * self._width]
            return ()
        self.shared = True
        if self._exact and max(part) >= self._most:
            lost = []
            for index in range(start, stop):
                if page[index] >= self._most:
                    lost.append(index)
                else:
                    page[index] += 1
            return lost
        kernels.tally(page, [(start, stop - start)])
        return ()

    def count(self, cluster: int) -> int:
        """The count of a cluster inside the window."""
        page = self._pages.get(cluster // self._per_page)
        return 0 if page is None else int(page[cluster % self._per_page])

    def inside(self, cluster: int) -> bool:
        """Whether the window has the cluster."""
        return self.low <= cluster and (self.high is None or cluster < self.high)

    def counters(self, start: int, count: int) -> Iterator[tuple[int, memoryview]]:
        """(start, counters) that cover a range inside the window."""
        end = start + count
        while start < end:
            index = start // self._per_page
            base = index * self._per_page
            stop = min(end, base + self._per_page)
            page = self._pages.get(index)
            yield start, (page if page is not None else self._nothing)[start - base : stop - base]
            start = stop

    def is_touched(self, start: int, count: int) -> bool:
        """Whether a range inside the window lies in pages of which at least one is in use."""
        return any(index in self._pages for index in range(start // self._per_page, (start + count - 1) // self._per_page + 1))

    def touched(self) -> list[tuple[int, int]]:
        """(start, count) of the pages in use, ascending."""
        return [(index * self._per_page, self._per_page) for index in sorted(self._pages)]
