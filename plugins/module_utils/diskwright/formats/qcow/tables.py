# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The L1 table: it may be of any size and lie at any place, so that only its own bytes are ever written
(https://github.com/libyal/libqcow/blob/main/documentation/QEMU%20Copy-On-Write%20file%20format.asciidoc)."""

from __future__ import annotations

from ...cache import read_padded
from ...extent import ZERO
from ...node import CHUNK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...node import Node

PAGE = 4096  # entries that are read at a time
PAGES = 256  # that are kept although nothing changed in them


class L1Table:
    """`count` big-endian entries at `offset` of `file`. The caller holds the image's lock."""

    __slots__ = ("file", "offset", "count", "_pages", "_dirty")

    def __init__(self, file: Node, offset: int, count: int) -> None:
        self.file = file
        self.offset = offset
        self.count = count
        self._pages: dict[int, bytearray] = {}
        self._dirty: dict[int, tuple[int, int]] = {}  # the entries that changed, from and to

    def _page(self, number: int) -> bytearray:
        page = self._pages.get(number)
        if page is None:
            if len(self._pages) - len(self._dirty) >= PAGES:
                for old in [old for old in self._pages if old not in self._dirty]:
                    del self._pages[old]
            page = bytearray(min(PAGE, self.count - number * PAGE) * 8)
            read_padded(self.file, self.offset + number * PAGE * 8, memoryview(page))
            self._pages[number] = page
        return page

    def get(self, index: int) -> int:
        number, rest = divmod(index, PAGE)
        return int.from_bytes(self._page(number)[rest * 8 : rest * 8 + 8], "big")

    def set(self, index: int, value: int) -> None:
        number, rest = divmod(index, PAGE)
        self._page(number)[rest * 8 : rest * 8 + 8] = value.to_bytes(8, "big")
        low, high = self._dirty.get(number, (rest, rest + 1))
        self._dirty[number] = min(low, rest), max(high, rest + 1)

    def next_used(self, index: int, stop: int) -> int:
        """The first entry from `index` on that is not empty, or `stop`. Holes of the file are not read."""
        while index < stop:
            number, rest = divmod(index, PAGE)
            skipped = 0 if rest or number in self._pages else self._hole(number)
            if skipped:
                index += skipped * PAGE
                continue
            part = bytes(memoryview(self._page(number))[rest * 8 :])
            filled = part.lstrip(b"\0")
            if filled:
                return min(stop, index + (len(part) - len(filled)) // 8)
            index = (number + 1) * PAGE
        return stop

    def _hole(self, number: int) -> int:
        """How many pages from one on, none of which was read, lie in a hole of the file or behind its end."""
        last = min([-(-self.count // PAGE), *(page for page in self._pages if page > number)])
        start = self.offset + number * PAGE * 8
        if start >= self.file.size:
            return last - number
        end = min(self.offset + last * PAGE * 8, self.file.size)
        first = self.file.resolve(start, end - start, True, 1)[0]
        if not first.status & ZERO:
            return 0
        if first.length == end - start and end == self.file.size:
            return last - number
        return min(last - number, first.length // (PAGE * 8))

    @property
    def dirty(self) -> bool:
        return bool(self._dirty)

    def write(self) -> None:
        """Write what changed."""
        for number, (low, high) in sorted(self._dirty.items()):
            part = memoryview(self._pages[number])[low * 8 : high * 8]
            self.file.write_hosted(self.offset + (number * PAGE + low) * 8, part)
        self._dirty.clear()

    def clear(self) -> None:
        """Empty the table, in the file too."""
        self._pages.clear()
        self._dirty.clear()
        end = min(self.offset + self.count * 8, self.file.size)  # behind the end of the file it is empty
        for start in range(self.offset, end, CHUNK):
            self.file.write_hosted(start, memoryview(bytes(min(CHUNK, end - start))))
