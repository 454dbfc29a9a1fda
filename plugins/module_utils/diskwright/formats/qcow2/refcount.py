# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Refcounts, and with them the allocation of host clusters (https://www.qemu.org/docs/master/interop/qcow2.html#host-cluster-management).

Room is taken from holes first and then from the end of the file. A cluster that is given back keeps its refcount, and so its
content, until no pointer in the file leads to it any more: `free` only notes it, `apply_freed` comes after the pointers.
"""

from __future__ import annotations

import errno
from array import array

from ... import kernels
from ...cache import TableCache
from ...errors import Error
from .header import MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_SIZE, REFCOUNT_TABLE_MASK
from .options import cache_sizes
from .tables import big_bytes, c_hex, read_entries

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterable, Iterator, Optional

    from .image import Qcow2

DEFAULT_CACHE = 1 << 20  # bytes; never less than 4 clusters
RUNS = 4096  # holes asked for at a time
MOVING_CACHE = 8 << 20  # bytes of refcount blocks that are kept while all of them change
MAX_REFCOUNT = (1 << 63) - 1  # with 64 bits a refcount is still a signed number to QEMU


class RefcountOverflow(Error):
    """A cluster would have more users than its refcount can tell."""


class Refcounts:
    """The refcount table, whole and in native form, a cache of refcount blocks, and the allocator. Counts and indexes are clusters."""

    def __init__(self, image: Qcow2) -> None:
        header = image.header
        self.image = image
        self.cluster_size = header.cluster_size
        self.order = header.refcount_order
        self.most = min((1 << header.refcount_bits) - 1, MAX_REFCOUNT)
        self.per_block = (self.cluster_size * 8) >> self.order
        image.mention("reftable_load")
        self.table = read_entries(image.file, header.refcount_table_offset, header.refcount_table_clusters * self.cluster_size // 8)
        self.table_dirty: set[int] = set()
        options = image.options
        size = cache_sizes(options, header)[1]
        if options.cache_size is None and options.refcount_cache_size is None:
            size = max(DEFAULT_CACHE, size)
        self.cache = TableCache(image.file, self.cluster_size, max(4, size // self.cluster_size))
        if image.tell is not None:
            self.cache.events = (image.tell, "refblock_load", "refblock_update_part")
        self.freed: list[tuple[int, int, bool]] = []  # see free
        self.byte_offset = 0  # where the next compressed cluster goes, 0: into a new cluster
        self._holes: list[tuple[int, int]] = []  # free runs below _scan, first come first served
        self._scan = 0  # holes from here on up to _tail are not known yet
        self._tail = self._find_tail()  # from here on all clusters are free
        # From here on no cluster has ever been written: they read as zeroes.
        self.untouched = -(-image.file.size // self.cluster_size) if image.file.zero_initialized else MAX_HOST_OFFSET
        self._moved: Optional[list[int]] = None  # while a new set of blocks is made (move_away): where the old ones are

    # -- looking up ----------------------------------------------------------------------------------------------

    def block_offset(self, index: int) -> int:
        """Where the refcount block of table entry `index` is, 0 for none. Raises Corrupt."""
        offset = self.table[index] & REFCOUNT_TABLE_MASK if index < len(self.table) else 0
        if offset & (self.cluster_size - 1):
            raise self.image.corrupt("Refblock offset %#x unaligned (reftable index: %s)" % (offset, c_hex(index)))
        return offset

    def get(self, cluster: int) -> int:
        """The refcount of a cluster."""
        index, entry = divmod(cluster, self.per_block)
        offset = self.block_offset(index)
        return kernels.refcounts_unpack(self.cache.get(offset), self.order, entry, 1)[0] if offset else 0

    def _find_tail(self) -> int:
        """One past the last cluster that has a refcount."""
        empty: set[int] = set()
        used = -(-len(self.table.tobytes().rstrip(b"\0")) // 8)
        for index in range(used - 1, -1, -1):
            offset = self.block_offset(index) if self.table[index] else 0
            if not offset or offset in empty:
                continue
            block = bytes(self.cache.get(offset)).rstrip(b"\0") if offset < self.image.file.size else b""
            if block:
                bits = len(block) * 8 if self.order >= 3 else (len(block) - 1) * 8 + block[-1].bit_length()
                return index * self.per_block + -(-bits >> self.order)
            empty.add(offset)
        return 0

    # -- changing refcounts --------------------------------------------------------------------------------------

    def _parts(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(table index, first entry, count) of the blocks that a run of clusters touches."""
        while count:
            index, entry = divmod(first, self.per_block)
            part = min(count, self.per_block - entry)
            yield index, entry, part
            first += part
            count -= part

    def _set_one(self, first: int, count: int) -> None:
        """Give free clusters, whose blocks exist, the refcount 1."""
        for index, entry, part in self._parts(first, count):
            offset = self.block_offset(index)
            block = self.cache.get(offset)
            if self.order >= 3:
                width = 1 << self.order - 3
                block[entry * width : (entry + part) * width] = ONES[self.order] * part
            else:
                self._add_in_block(block, entry, part, 1)
            self.cache.mark(offset)

    def add(self, first: int, count: int, step: int) -> list[tuple[int, int]]:
        """Add `step` (1 or -1) to the refcounts of a run whose blocks exist; returns the runs that fell to 0.

        A refcount of 0 stays 0. Raises Error where one would exceed its width; nothing of that block is changed then.
        """
        zeroed: list[tuple[int, int]] = []
        for index, entry, part in self._parts(first, count):
            offset = self.block_offset(index)
            if not offset:
                continue
            block = self.cache.get(offset)
            for start, length in self._add_in_block(block, entry, part, step):
                zeroed.append((index * self.per_block + start, length))
            self.cache.mark(offset)
        return zeroed

    def _add_in_block(self, block: bytearray, entry: int, count: int, step: int) -> list[tuple[int, int]]:
        """Add `step` to refcounts of a block; returns the runs (in entries of the block) that fell to 0."""
        done = self._add_to_equal(block, entry, count, step) if self.order >= 3 else None
        if done is not None:
            return done
        per_byte = max(1, 8 >> self.order)
        low = entry // per_byte * per_byte
        high = -(-(entry + count) // per_byte) * per_byte
        values = kernels.refcounts_unpack(block, self.order, low, high - low)
        changed = values[entry - low : entry - low + count]
        if max(changed) + step > self.most:
            raise RefcountOverflow("refcount of a cluster exceeds its width of %d bits" % (1 << self.order), errno=errno.EINVAL)
        start = low << self.order >> 3
        fallen: set[int] = set()
        if self.order >= 3 and min(changed) + step >= 0:  # then no entry borrows from its neighbour: add to all at once
            width = 1 << self.order - 3
            total = int.from_bytes(block[start : start + count * width], "big")
            total += step * int.from_bytes(ONES[self.order] * count, "big")
            block[start : start + count * width] = total.to_bytes(count * width, "big")
            if step > 0 or 1 not in changed:
                return []
            fallen.update(at for at, value in enumerate(changed) if value == 1)
        else:
            for at, value in enumerate(changed):
                if value + step >= 0:
                    values[entry - low + at] = value + step
                    if value + step == 0:
                        fallen.add(at)
            packed = kernels.refcounts_pack(values, self.order)
            block[start : start + len(packed)] = packed
        return joined((entry + at, 1) for at in sorted(fallen))

    def _add_to_equal(self, block: bytearray, entry: int, count: int, step: int) -> Optional[list[tuple[int, int]]]:
        """_add_in_block where all refcounts are the same, as they are nearly everywhere; None if they are not."""
        width = 1 << self.order - 3
        low, high = entry * width, (entry + count) * width
        first = bytes(block[low : low + width])
        if count > 1 and block[low:high] != first * count:
            return None
        value = int.from_bytes(first, "big") + step
        if not 0 <= value <= self.most:
            return None
        block[low:high] = value.to_bytes(width, "big") * count
        return [(entry, count)] if not value else []

    def hold(self, first: int, count: int) -> None:
        """Add 1 to the refcounts of clusters that are in use. Raises Corrupt where one of them is said to be free."""
        for index, entry, part in self._parts(first, count):
            offset = self.block_offset(index)
            block = self.cache.get(offset) if offset else bytearray(self.cluster_size)
            if self.order >= 3:
                width = 1 << self.order - 3
                raw = block[entry * width : (entry + part) * width]
                if raw[:width].count(0) < width and raw == raw[:width] * part:
                    continue
            if 0 in kernels.refcounts_unpack(block, self.order, entry, part):
                raise self.image.corrupt("A cluster in use has the refcount 0 (refcount block: %s)" % c_hex(index), fatal=False)
        self.add(first, count, 1)

    def values(self, first: int, count: int) -> array[int]:
        """The refcounts of a run of clusters, as native numbers."""
        found = array("Q")
        for index, entry, part in self._parts(first, count):
            offset = self.block_offset(index)
            found.extend(kernels.refcounts_unpack(self.cache.get(offset), self.order, entry, part) if offset else array("Q", bytes(8 * part)))
        return found

    # -- allocating ----------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> tuple[int, int]:
        """Take up to `count` free clusters that follow one another; returns (first, how many), with refcount 1."""
        self.image.mention("cluster_alloc", "refblock_alloc")
        while self._holes or self._scan < self._tail:
            if not self._holes:
                self._look_for_holes()
                continue
            first, room = self._holes[0]
            index, entry = divmod(first, self.per_block)
            if not self.block_offset(index):
                self._drop_from_hole(0, 1)
                self._install_block(index, first)
                self._set_one(first, 1)
                continue
            taken = min(count, room, self.per_block - entry)
            self.image.overlap.check(first * self.cluster_size, taken * self.cluster_size)
            self._drop_from_hole(0, taken)
            self._set_one(first, taken)
            return first, taken
        return self.take_tail(count), count

    def allocate_whole(self, count: int) -> int:
        """Take `count` free clusters that follow one another; returns the first. They have refcount 1."""
        if count == 1:
            return self.allocate(1)[0]
        at = self._find_hole(count)
        if at < 0:
            return self.take_tail(count)
        first = self._holes[at][0]
        self.image.overlap.check(first * self.cluster_size, count * self.cluster_size)
        self._drop_from_hole(at, count)
        self._set_one(first, count)
        return first

    def _find_hole(self, count: int) -> int:
        """The index of the first known hole that has room for `count` clusters, -1 for none; its refcount blocks exist."""
        for at, (first, room) in enumerate(self._holes):
            if room >= count > 0 and all(self.block_offset(index) for index, _entry, _part in self._parts(first, count)):
                return at
        return -1

    def _drop_from_hole(self, at: int, count: int) -> None:
        first, room = self._holes[at]
        if room > count:
            self._holes[at] = (first + count, room - count)
        else:
            del self._holes[at]

    def _look_for_holes(self) -> None:
        """Look at the next block for holes."""
        index, entry = divmod(self._scan, self.per_block)
        stop = min(self.per_block, self._tail - index * self.per_block)
        offset = self.block_offset(index)
        if offset:
            runs = kernels.refcount_free_runs(self.cache.get(offset), self.order, entry, stop - entry, RUNS)
        else:
            runs = [(entry, stop - entry)]
        base = index * self.per_block
        self._holes.extend((base + start, length) for start, length in runs)
        self._scan = base + (sum(runs[-1]) if len(runs) == RUNS else stop)

    def take_tail(self, count: int) -> int:
        """Take `count` clusters at the end; returns the first. New refcount blocks that this needs follow them."""
        first, overlap, size = self._tail, self.image.overlap, self.cluster_size
        if (first + count + 2) // self.per_block + 1 >= len(self.table):
            self._grow_table(first, count)
            first = self._tail
        self._move_tail(count)
        index = first // self.per_block
        while index * self.per_block < self._tail:
            if not self.block_offset(index):
                overlap.check(self._tail * size, size)
                self._install_block(index, self._tail)
                self._move_tail(1)
            index += 1
        overlap.check(first * size, count * size)
        self._set_one(first, self._tail - first)
        return first

    def room_in_block(self) -> int:
        """How many clusters can be taken at the end without a new refcount block."""
        return self.per_block - self._tail % self.per_block if self.block_offset(self._tail // self.per_block) else 0

    def _move_tail(self, count: int) -> None:
        if (self._tail + count) * self.cluster_size > MAX_HOST_OFFSET:
            raise Error("The image file cannot grow any further", filename=self.image.filename, errno=errno.EFBIG)
        if self._scan == self._tail:
            self._scan += count
        self._tail += count
        self.untouched = max(self.untouched, self._tail)

    def _install_block(self, index: int, cluster: int) -> None:
        """Make `cluster`, which is being taken, the refcount block of table entry `index`."""
        offset = cluster * self.cluster_size
        self.image.mention("refblock_alloc_write", "refblock_alloc_hookup")
        self.cache.put(offset, bytearray(self.cluster_size))
        self.table[index] = offset
        self.table_dirty.add(index)
        self.image.overlap.add_block(offset)

    def _grow_table(self, first: int, count: int) -> None:
        """Make sure that the refcount table reaches past clusters first..first+count and what comes with them; if it does
        not, move it to a larger place and tell the header at once."""
        image, size = self.image, self.cluster_size
        per_cluster = size // 8
        clusters = len(self.table) // per_cluster

        def reaches(clusters: int, extra: int) -> bool:
            entries = clusters * per_cluster
            last = first + count + extra
            return last + last // self.per_block + 4 <= entries * self.per_block

        if reaches(clusters, 0):
            return
        if self._moved is not None:  # the table gets a new place anyhow
            while not reaches(clusters, clusters):
                clusters += 1
            if clusters * size > MAX_REFCOUNT_TABLE_SIZE:
                raise Error("The refcount table cannot grow any further: File too large", filename=image.filename, errno=errno.EFBIG)
            self.table.extend(array("Q", bytes(clusters * size - len(self.table) * 8)))
            return
        old_offset, old_clusters = image.header.refcount_table_offset, image.header.refcount_table_clusters
        clusters = max(clusters + 1, clusters * 3 // 2)
        while not reaches(clusters, clusters):
            clusters += 1
        if clusters * size > MAX_REFCOUNT_TABLE_SIZE:
            raise Error("The refcount table cannot grow any further: File too large", filename=image.filename, errno=errno.EFBIG)
        self.table.extend(array("Q", bytes(clusters * size - len(self.table) * 8)))
        image.mention("reftable_grow", "refblock_alloc_write_blocks")
        offset = self.take_tail(clusters) * size
        self.cache.write()
        image.barrier()
        image.mention("refblock_alloc_write_table")
        image.file.write_hosted(offset, memoryview(big_bytes(self.table)))
        image.barrier()
        image.mention("refblock_alloc_switch_table")
        image.change_record(refcount_table_offset=offset, refcount_table_clusters=clusters)
        self.table_dirty.clear()
        image.overlap.forget()
        self.give_back(old_offset // size, old_clusters)

    def allocate_bytes(self, length: int) -> int:
        """Room for a compressed cluster of `length` bytes, less than a cluster, in clusters that others may share."""
        self.image.mention("cluster_alloc_bytes")
        size = self.cluster_size
        offset = self.byte_offset
        room = -offset % size
        if room and self.get(offset // size) >= self.most:
            room = 0
        if room < length:
            first = self.allocate(1)[0] * size
            if not room or offset + room != first:
                offset = first
            elif self.get(offset // size):
                self.add(offset // size, 1, 1)
        else:
            self.add(offset // size, 1, 1)
        self.byte_offset = offset + length if (offset + length) % size else 0
        return offset

    # -- giving back ---------------------------------------------------------------------------------------------

    def give_back(self, first: int, count: int) -> list[tuple[int, int]]:
        """Take 1 from the refcounts of clusters that no pointer in the file leads to; returns the runs that became free."""
        zeroed = self.add(first, count, -1)
        for start, length in zeroed:
            if self.byte_offset and start <= self.byte_offset // self.cluster_size < start + length:
                self.byte_offset = 0
            below = min(start + length, self._scan) - start
            if below > 0:
                self._holes.append((start, below))
        return zeroed

    def free(self, first: int, count: int, discard: bool = False) -> None:
        """Note clusters whose pointers were changed in memory; apply_freed goes on once that is in the file. With `discard`
        the file loses them too, if nothing else uses them."""
        self.image.mention("cluster_free")
        if self.freed:
            start, length, same = self.freed[-1]
            if start + length == first and same == discard:
                self.freed[-1] = (start, length + count, discard)
                return
        self.freed.append((first, count, discard))

    def apply_freed(self) -> None:
        """Give back what `free` noted."""
        freed, self.freed = self.freed, []
        for first, count, discard in freed:
            for start, length in self.give_back(first, count):
                if discard:
                    self.image.file.pdiscard(start * self.cluster_size, length * self.cluster_size)

    # -- making the file shorter ---------------------------------------------------------------------------------

    def drop_empty_blocks(self) -> None:
        """Give back refcount blocks that count nothing but themselves; all changes must have been written before."""
        dropped = []
        for index in range(len(self.table)):
            offset = self.block_offset(index)
            if not offset:
                continue
            block = bytearray(self.cache.get(offset))
            own, entry = divmod(offset // self.cluster_size, self.per_block)
            if own == index:
                self._add_in_block(block, entry, 1, -1)
            if block.count(0) == len(block):
                self.table[index] = 0
                self.table_dirty.add(index)
                self.cache.forget(offset)
                dropped.append(offset)
        if dropped:
            self.write_back()
            for offset in dropped:
                self.add(offset // self.cluster_size, 1, -1)
            self.cache.write()
            self.image.overlap.forget()

    def cut_tail(self) -> int:
        """Find the end of what is in use again; returns it in bytes."""
        self._tail = self._find_tail()
        self._scan = 0
        self._holes = []
        return self._tail * self.cluster_size

    def end_of_use(self) -> int:
        """One past the last byte in use."""
        return self._tail * self.cluster_size

    def skip_to(self, offset: int) -> None:
        """Take what follows from byte `offset` on, where that is beyond the end of what is in use."""
        self._tail = max(self._tail, -(-offset // self.cluster_size))

    # -- a new set of refcounts beside the old one ------------------------------------------------------------------

    def move_away(self) -> None:
        """Give every block a new place, in memory: what follows changes copies, and the file keeps counting what it holds
        until the header names the table that move_in writes. All changes must have been written before.

        Room is taken from what is free now. What falls to 0 from here on is found free only by whoever reads the new table.
        """
        while self._scan < self._tail and len(self._holes) < RUNS:
            self._look_for_holes()
        self._scan = self._tail
        size = self.cluster_size
        self.image.overlap.find(0, 1)  # learns where things are while the table still says so
        indexes = [index for index, entry in enumerate(self.table) if entry]
        old = [self.block_offset(index) for index in indexes]
        hole = self._find_hole(len(indexes))
        first = self._tail if hole < 0 else self._holes[hole][0]
        self.cache.capacity = max(self.cache.capacity, min(len(indexes), MOVING_CACHE // size))
        self._moved = old
        for number, index in enumerate(indexes):
            block = bytearray(self.cache.get(old[number]))
            self.cache.forget(old[number])
            self.table[index] = (first + number) * size
            self.cache.put((first + number) * size, block)
        if hole >= 0:
            self._drop_from_hole(hole, len(indexes))
            self._set_one(first, len(indexes))
        elif indexes:
            self.take_tail(len(indexes))

    def move_in(self) -> tuple[int, int]:
        """Write the new blocks and a table that names them; returns the table's offset and its clusters.

        The clusters of the old ones are free from then on, in the new count. The header must name the new table next.
        """
        image, size = self.image, self.cluster_size
        header = image.header
        offset, clusters = 0, -1
        while clusters != len(self.table) * 8 // size:  # taking the room may make the table longer
            if clusters > 0:
                self.add(offset // size, clusters, -1)
            clusters = len(self.table) * 8 // size
            offset = self.allocate_whole(clusters) * size
        for old in self._moved or ():
            self.add(old // size, 1, -1)
        self.add(header.refcount_table_offset // size, header.refcount_table_clusters, -1)
        self.cache.write()
        image.file.write_hosted(offset, memoryview(big_bytes(self.table)))
        self.table_dirty.clear()
        return offset, clusters

    # -- writing back --------------------------------------------------------------------------------------------

    def is_dirty(self) -> bool:
        """Whether something is not in the file."""
        return bool(self.cache.dirty or self.table_dirty)

    def write_back(self) -> None:
        """Write changed blocks, and then the table entries that lead to new ones."""
        self.cache.write()
        if not self.table_dirty:
            return
        header = self.image.header
        if max(self.table_dirty) * 8 >= header.refcount_table_clusters * self.cluster_size:  # moving it failed
            raise Error("The refcount table could not grow", filename=self.image.filename, errno=errno.EIO)
        self.image.barrier()
        base = header.refcount_table_offset
        self.image.mention("reftable_update")
        for low, high in dirty_sectors(self.table_dirty, header.refcount_table_clusters * self.cluster_size // 8):
            self.image.file.write_hosted(base + low * 8, memoryview(big_bytes(self.table[low:high])))
        self.table_dirty.clear()
        self.image.barrier()


def joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending (start, count) runs, neighbours joined."""
    found: list[tuple[int, int]] = []
    for start, count in runs:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((start, count))
    return found


ONES = {order: (1).to_bytes(1 << order - 3, "big") for order in range(3, 7)}  # the refcount 1, as stored


def dirty_sectors(dirty: set[int], total: int) -> list[tuple[int, int]]:
    """(start, end) runs of u64 entries that cover `dirty` in units of 512 bytes, so that no write tears a sector."""
    unit = 64
    runs: list[tuple[int, int]] = []
    for sector in sorted({index // unit for index in dirty}):
        start, end = sector * unit, min(total, (sector + 1) * unit)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def looks_preallocated(image: Qcow2) -> bool:
    """Whether the image has clearly more clusters in use than its file takes room on the disk."""
    import os

    descriptor = image.file.fileno()
    if descriptor < 0:
        return False
    size = image.cluster_size
    on_disk = os.fstat(descriptor).st_blocks * 512 // size
    threshold = max(on_disk * 10 // 9, on_disk + 2)
    total = -(-image.file.size // size)
    if total < threshold:
        return False
    refcounts = image.refcounts
    used = 0
    for index in range(min(len(refcounts.table), -(-total // refcounts.per_block))):
        offset = refcounts.block_offset(index)
        count = min(refcounts.per_block, total - index * refcounts.per_block)
        if offset:
            used += count
            position = 0
            while position < count:
                runs = kernels.refcount_free_runs(refcounts.cache.get(offset), refcounts.order, position, count - position, RUNS)
                used -= sum(length for _start, length in runs)
                position = sum(runs[-1]) if len(runs) == RUNS else count
            if used >= threshold:
                return True
    return False
