# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Switch: a new L1 table, with new refcounts, beside the present ones, made current by one write of the header
(https://www.qemu.org/docs/master/interop/qcow2.html#header).

Snapshots share clusters, and the COPIED flag of an entry must agree with a refcount that is stored elsewhere: no order of
writes keeps the two in step. So nothing that the file refers to is changed. Tables that have to change get a copy; the
header, whose numbers lie in one sector, then names the new L1 table, refcount table and snapshot table at once. A crash
leaves the image as it was before, or as it is afterwards.
"""

from __future__ import annotations

from array import array

from ... import kernels
from ...cache import read_padded
from ...kernels import contract as kinds
from .compressed import stored_range
from .header import COPIED, MAX_L1_SIZE, OFFSET_MASK
from .refcount import joined
from .tables import RUNS, big_bytes, read_entries

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Union

    from .image import Qcow2

    Run = tuple[int, int, int, int]

_CLEAR = bytes(value & 0x7F for value in range(256))  # a translation that takes COPIED away from an entry's first byte
_SET = bytes(value | 0x80 for value in range(256))


class Switch:
    """One change of what the header names; a context manager that holds the image's lock, lets no write in, and puts all
    back as it was unless `commit` was called. Offsets are bytes, lengths entries."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.size = image.cluster_size
        self.width = image.header.l2_entry_size
        self.released: list[tuple[int, int]] = []  # runs of clusters that nothing uses any more
        self._turned = False

    def __enter__(self) -> Switch:
        image = self.image
        self._entry = image.serialise(0, 1 << 62)  # no write is under way, and none will be
        image._lock.acquire()
        try:
            image.mark_clean()  # what follows may have to forget all that is in memory
            self._end = image.file.size
            image.refcounts.move_away()
        except BaseException:
            self.__exit__(True)
            raise
        return self

    def __exit__(self, failed: object, *_rest: object) -> None:
        image = self.image
        try:
            if not self._turned:
                image.forget_metadata()
                if failed is not True and image.file.size > self._end:
                    image.file.truncate(self._end, exact=False)
        finally:
            image._lock.release()
            image.release(self._entry)

    # -- reading -------------------------------------------------------------------------------------------------

    def l1_table(self, offset: int, entries: int) -> array[int]:
        """The entries of an L1 table in the file. Raises Corrupt."""
        if entries > MAX_L1_SIZE // 8 or offset & self.size - 1:
            raise self.image.corrupt("L1 table at %#x with %d entries" % (offset, entries), fatal=False)
        return read_entries(self.image.file, offset, entries)

    def _l2_table(self, offset: int) -> bytearray:
        if offset & self.size - 1:
            raise self.image.corrupt("L2 table offset %#x unaligned" % offset, fatal=False)
        table = bytearray(self.size)
        read_padded(self.image.file, offset, memoryview(table))
        return table

    def _runs(self, table: bytearray, offset: int) -> Iterator[Run]:
        """The runs of an L2 table, whole clusters also where entries have subclusters. Raises Corrupt."""
        entries: Union[bytes, bytearray] = table
        if self.width == 16:
            entries = b"".join([table[at : at + 8] for at in range(0, len(table), 16)])
        count, at = len(entries) // 8, 0
        while at < count:
            runs = kernels.l2_runs(entries, at, count - at, self.size, False, RUNS)
            for run in runs:
                if run[2] & kinds.NORMAL & kinds.ZERO_ALLOC and run[3] & self.size - 1:
                    raise self.image.corrupt("Cluster allocation offset %#x unaligned (L2 offset: %#x)" % (run[3], offset), fatal=False)
            yield from runs
            at = runs[-1][0] + runs[-1][1]

    def _clusters(self, table: bytearray, offset: int) -> Iterator[tuple[int, int]]:
        """(first, count) of the host clusters that an L2 table refers to."""
        size, bits = self.size, self.image.header.cluster_bits
        for _index, count, kind, value in self._runs(table, offset):
            kind &= 7
            if kind == kinds.COMPRESSED:
                start, length = stored_range(value, bits)
                yield start // size, (start + length - 1) // size - start // size + 1
            elif kind in (kinds.NORMAL, kinds.ZERO_ALLOC):
                yield value // size, count

    # -- changing references -------------------------------------------------------------------------------------

    def adopt(self, l1: array[int]) -> array[int]:
        """Refer to all that the L1 table `l1` refers to once more; the entries of an L1 table that does so.

        An L2 table is shared, or copied if it has COPIED flags, which none of its clusters may have any more. Raises
        RefcountOverflow where a cluster would have more users than its refcount can tell.
        """
        refcounts = self.image.refcounts
        adopted = array("Q", bytes(len(l1) * 8))
        for index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            table = self._l2_table(offset)
            for first, count in self._clusters(table, offset):
                refcounts.hold(first, count)
            flags = table[0 :: self.width]
            cleared = flags.translate(_CLEAR)
            if cleared == flags:
                refcounts.hold(offset // self.size, 1)
                adopted[index] = offset
            else:
                table[0 :: self.width] = cleared
                adopted[index] = self._place(table) | COPIED
        return adopted

    def release(self, l1: array[int], l1_offset: int) -> None:
        """Give up all that an L1 table at `l1_offset` refers to, and the table."""
        for entry in l1:
            offset = entry & OFFSET_MASK
            if offset:
                for first, count in self._clusters(self._l2_table(offset), offset):
                    self.give_up(first, count)
                self.give_up(offset // self.size, 1)
        self.give_up(l1_offset // self.size, -(-len(l1) * 8 // self.size))

    def give_up(self, first: int, count: int) -> None:
        """Take 1 from the refcounts of clusters."""
        self.released += self.image.refcounts.add(first, count, -1)

    def flag(self, l1: array[int]) -> array[int]:
        """An L1 table that refers to what `l1` does, with COPIED flags that agree with the refcounts, in it and below."""
        refcounts = self.image.refcounts
        flagged = array("Q", bytes(len(l1) * 8))
        for index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            flagged[index] = offset
            if refcounts.get(offset // self.size) != 1:
                continue  # what is below is shared too, and has no flags
            table = self._l2_table(offset)
            flags = self._flags(table, offset)
            if flags != table[0 :: self.width]:
                table[0 :: self.width] = flags
                self.give_up(offset // self.size, 1)
                flagged[index] = self._place(table)
            flagged[index] |= COPIED
        return flagged

    def _flags(self, table: bytearray, offset: int) -> bytearray:
        """The first bytes of all entries of an L2 table, with the COPIED flags that they should have."""
        flags = table[0 :: self.width]
        one = array("Q", [1])
        for index, count, kind, value in self._runs(table, offset):
            if kind & 7 not in (kinds.NORMAL, kinds.ZERO_ALLOC):
                continue
            refcounts = self.image.refcounts.values(value // self.size, count)
            part = flags[index : index + count]
            if refcounts == one * count:
                part = part.translate(_SET)
            else:
                part = part.translate(_CLEAR)
                if 1 in refcounts:
                    for at, refcount in enumerate(refcounts):
                        if refcount == 1:
                            part[at] |= 0x80
            flags[index : index + count] = part
        return flags

    # -- writing -------------------------------------------------------------------------------------------------

    def _place(self, table: bytearray) -> int:
        offset = self.image.refcounts.allocate(1)[0] * self.size
        self.image.file.write_hosted(offset, memoryview(table))
        return offset

    def store(self, data: bytes) -> int:
        """Write a table that follows no other's layout, in clusters of its own; its offset, 0 for an empty one."""
        if not data:
            return 0
        offset = self.image.refcounts.allocate_whole(-(-len(data) // self.size)) * self.size
        self.image.file.write_hosted(offset, memoryview(data + bytes(-len(data) % self.size)))
        return offset

    def store_l1(self, l1: array[int]) -> int:
        """Write an L1 table; its offset."""
        return self.store(big_bytes(l1))

    def commit(self, **values: int) -> None:
        """Turn the header to what was written, together with `values` of it; then discard what nothing uses any more."""
        image, refcounts = self.image, self.image.refcounts
        offset, clusters = refcounts.move_in()
        image.barrier()
        self._turned = True  # from here on the file may have grown for good
        try:
            image.change_record(refcount_table_offset=offset, refcount_table_clusters=clusters, **values)
        finally:
            image.forget_metadata()
        if image.options.pass_discard_snapshot is not False:
            for first, count in joined(sorted(self.released)):
                image.file.pdiscard(first * self.size, count * self.size)
