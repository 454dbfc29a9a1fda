# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""TableCache: metadata tables of one size, kept in memory and written back in an order that survives a crash.

A table that points at something is written after what it points at: `before` is called ahead of a write, to bring that to
the disk first (https://www.qemu.org/docs/master/devel/qcow2-cache.html has the same idea for reading).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Iterable, Optional

    from .node import Node

BATCH = 1 << 20  # bytes; neighbouring tables are written together, up to this much at a time


class TableCache:
    """Tables of `table_size` bytes by their byte offset in `file`; at most `capacity` of them stay once written.

    `before` is called before dirty tables are written to make room. What a table has behind the byte `end` of the file is not
    in the file: it reads as zeroes. The caller holds the node's lock throughout.
    """

    __slots__ = ("file", "table_size", "capacity", "before", "end", "dirty", "events", "_tables")

    def __init__(
        self, file: Node, table_size: int, capacity: int, before: Optional[Callable[[], None]] = None, end: Optional[int] = None
    ) -> None:
        self.file = file
        self.table_size = table_size
        self.capacity = max(2, capacity)
        self.before = before
        self.end = end
        self.dirty: set[int] = set()
        self.events: Optional[tuple[Callable[[str], None], str, str]] = None  # whom to tell of a table that is read, or written: see Hooks.mention
        self._tables: dict[int, bytearray] = {}  # in order of their last use

    def __len__(self) -> int:
        return len(self._tables)

    def __contains__(self, offset: int) -> bool:
        return offset in self._tables

    def get(self, offset: int) -> bytearray:
        """The table at `offset`, read if it is not here; to be changed only together with a `mark`."""
        tables = self._tables
        table = tables.pop(offset, None)
        if table is None:
            if len(tables) >= self.capacity:
                self._make_room()
            if self.events is not None:
                self.events[0](self.events[1])
            table = bytearray(self.table_size)
            read_padded(self.file, offset, memoryview(table)[: self._inside(offset, self.table_size)])
        tables[offset] = table
        return table

    def put(self, offset: int, table: bytearray) -> None:
        """Take a table that is not in the file yet; it is dirty."""
        self._tables.pop(offset, None)
        if len(self._tables) >= self.capacity:
            self._make_room()
        self._tables[offset] = table
        self.dirty.add(offset)

    def mark(self, offset: int) -> None:
        """The table at `offset` was changed."""
        self.dirty.add(offset)

    def forget(self, offset: int) -> None:
        """The table at `offset` is no table any more."""
        self._tables.pop(offset, None)
        self.dirty.discard(offset)

    def clear(self) -> None:
        """Forget all tables; what was not written is lost."""
        self._tables.clear()
        self.dirty.clear()

    def write(self, offsets: Optional[Iterable[int]] = None) -> None:
        """Write the dirty tables, or those of `offsets` that are dirty, neighbours in one piece. Raises OSError or Error;
        what was not written stays dirty."""
        chosen = sorted(self.dirty if offsets is None else self.dirty.intersection(offsets))
        most = max(1, BATCH // self.table_size)
        at = 0
        while at < len(chosen):
            stop = at + 1
            while stop < len(chosen) and stop - at < most and chosen[stop] == chosen[at] + (stop - at) * self.table_size:
                stop += 1
            group = chosen[at:stop]
            if self.events is not None:
                self.events[0](self.events[2])
            data = self._tables[group[0]] if len(group) == 1 else bytearray().join([self._tables[offset] for offset in group])
            self.file.write_hosted(group[0], memoryview(data)[: self._inside(group[0], len(data))])
            self.dirty.difference_update(group)
            at = stop

    def _inside(self, offset: int, length: int) -> int:
        return length if self.end is None else min(length, self.end - offset)

    def _make_room(self) -> None:
        """Drop the quarter of the tables that was not used for longest, after writing them where they are dirty."""
        oldest = [offset for offset, _table in zip(self._tables, range(max(1, self.capacity // 4)))]
        if self.dirty.intersection(oldest) and self.before is not None:
            self.before()
        if self.dirty.intersection(oldest):
            self.write(oldest)
        for offset in oldest:
            self._tables.pop(offset, None)


def read_padded(file: Node, offset: int, view: memoryview) -> None:
    """Read into `view`; what lies beyond the end of `file` is zero (an image may name any offset)."""
    from .node import fill_zeroes

    inside = max(0, min(len(view), file.size - offset))
    if inside:
        file.pread_into(offset, view[:inside])
    if inside < len(view):
        fill_zeroes(view[inside:])
