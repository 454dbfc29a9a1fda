# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Writing and zeroing with extended L2 entries: each has two bitmaps of 32 subclusters, those with data and those that are zero
(https://www.qemu.org/docs/master/interop/qcow2.html#extended-l2-entries).

Subclusters are what is allocated, and what writes are serialised by; so several writes may be under way in one cluster. The first
of them takes the host cluster, and those that come before it is linked get their share of it: see Pending. A cluster that is
compressed, or shared with a snapshot and not to be overwritten as a whole, is moved first, with its content, into a place of its own.
"""

from __future__ import annotations

from _thread import allocate_lock
from array import array

from ... import kernels
from ...extent import OFFSET_VALID, Extent, clip
from ...kernels import contract as kinds
from ...node import Alloc
from .header import COMPRESSED, COPIED, OFFSET_MASK, SUBCLUSTERS
from .tables import big_array, big_bytes, c_hex
from .write import REUSED, entry_column, free_entries, table_parts, trim_freed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from typing import Iterator, Optional, Sequence

    from .image import Qcow2
    from .tables import Tables

ALL_DATA = (1 << SUBCLUSTERS) - 1  # a bitmap: all subclusters have data
ALL_ZERO = ALL_DATA << SUBCLUSTERS  # all read as zeroes
ZERO_CLUSTER = bytes(8) + ALL_ZERO.to_bytes(8, "big")  # an entry without a host cluster that is all zeroes
PIECE = 1 << 20  # bytes that are moved at a time


class Pending:
    """A host cluster, at byte `place`, which is not linked yet, and how many allocations are in it."""

    __slots__ = ("place", "users", "linked")

    def __init__(self, place: int) -> None:
        self.place = place
        self.users = 0
        self.linked = False


def mask(first: int, end: int) -> int:
    """The bitmap of the subclusters first..end of a cluster."""
    return (1 << end) - (1 << first)


def read_entry(image: Qcow2, offset: int) -> tuple[int, int, int, int]:
    """(L2 table offset, index, entry, bitmap) of the cluster at guest `offset`; all 0 where there is no table."""
    index, rest = divmod(offset, image.tables.reach)
    l2_offset = image.tables.l2_offset(index)
    if not l2_offset:
        return 0, 0, 0, 0
    number = rest // image.cluster_size
    raw = image.tables.cache.get(l2_offset)[number * 16 : number * 16 + 16]
    return l2_offset, number, int.from_bytes(raw[:8], "big"), int.from_bytes(raw[8:], "big")


def _store(image: Qcow2, l2_offset: int, first: int, entries: bytes | bytearray, freed: bytes | bytearray, discard: bool = False) -> None:
    """Write entries (as stored) into a table from `first` on, and note what the entries `freed` point at as free; see free_entries."""
    cache = image.tables.cache
    cache.get(l2_offset)[first * 16 : first * 16 + len(entries)] = entries
    cache.mark(l2_offset)
    if freed:
        free_entries(image, freed, discard)


def with_room(tables: Tables, extents: list[Extent], base: int, table: bytearray) -> list[Extent]:
    """Extents of an L2 table that begins at guest offset `base`; those of status 0 are told apart by the room that their clusters have."""
    size = tables.cluster_size
    found: list[Extent] = []
    for extent in extents:
        if extent[2]:
            found.append(extent)
            continue
        start, end = extent[0], extent[0] + extent[1]
        first = (start - base) // size
        count = -(-(end - base) // size) - first
        for index, run, kind, value in kernels.l2_runs(entry_column(table, first, count), 0, count, size, tables.external, count):
            low = base + (first + index) * size
            part = Extent(low, run * size, OFFSET_VALID, None, value) if kind & kinds.NORMAL & kinds.ZERO_ALLOC else Extent(low, run * size, 0)
            found.append(clip(part, start, end))
    return found


# -- reserving -----------------------------------------------------------------------------------------------------


def reserve(image: Qcow2, offset: int, length: int) -> list[Alloc]:
    """Where to write a range: in place where a subcluster is ours alone, else in room that is new to it."""
    unit, size = image.allocation_unit, image.cluster_size
    start, end = offset // unit * unit, -(-(offset + length) // unit) * unit
    partial = []  # clusters of which something stays
    if start % size:
        partial.append(start // size * size)
    if end % size and end < image.size and end // size * size not in partial:
        partial.append(end // size * size)
    while True:
        with image._lock:
            for cluster in partial:
                busy = _begin_move(image, cluster)
                if busy is not None:
                    break
            else:
                return _reserve(image, start, end)
        if isinstance(busy, Move):
            busy.run()
        else:
            with busy:
                pass


def _reserve(image: Qcow2, start: int, end: int) -> list[Alloc]:
    size = image.cluster_size
    allocs: list[Alloc] = []
    try:
        for position, l2_offset, first, count in table_parts(image, start // size * size, -(-end // size) * size, create=True):
            table = image.tables.cache.get(l2_offset)
            entries = entry_column(table, first, count)
            bitmaps = big_array(table[first * 16 : (first + count) * 16])[1::2]
            _check_bitmaps(image, l2_offset, first, entries, bitmaps)
            for index, run, kind, value in kernels.l2_runs(entries, 0, count, size, image.tables.external, count):
                low = position + index * size
                span = max(start, low), min(end, low + run * size)
                if image.tables.external:
                    _reserve_hosted(image, allocs, span, low, low, bitmaps[index : index + run])
                elif kind & kinds.NORMAL & kinds.ZERO_ALLOC and value & size - 1:
                    raise image.corrupt("Data cluster offset %#x unaligned (guest offset: %s)" % (value, c_hex(low)))
                elif kind & kinds.COPIED:
                    image.overlap.check(value, run * size)
                    _reserve_hosted(image, allocs, span, low, value, bitmaps[index : index + run])
                else:
                    _reserve_new(image, allocs, span)
    except BaseException:
        withdraw(image, [alloc for alloc in allocs if alloc.fresh])
        raise
    return allocs


def _check_bitmaps(image: Qcow2, l2_offset: int, first: int, entries: bytes, bitmaps: array[int]) -> None:
    """Raise Corrupt, and mark the image, where entries (from number `first` of a table on) contradict themselves."""
    for index, (entry, bitmap) in enumerate(zip(big_array(entries), bitmaps)):
        hosted = entry & OFFSET_MASK or image.tables.external and entry & COPIED
        if not entry & COMPRESSED and bitmap & ALL_DATA and (not hosted or bitmap & bitmap >> SUBCLUSTERS & ALL_DATA):
            raise image.corrupt("Invalid cluster entry found (L2 offset: %#x, L2 index: %s)" % (l2_offset, c_hex(first + index)))


def _reserve_hosted(image: Qcow2, allocs: list[Alloc], span: tuple[int, int], low: int, place: int, bitmaps: array[int]) -> None:
    """Room in clusters, from guest offset `low` on, that are ours alone and lie at `place`: what has data is written in place."""
    unit, host = image.allocation_unit, image.data_file
    position, end = span
    while position < end:
        cluster, at = divmod((position - low) // unit, SUBCLUSTERS)
        data = bitmaps[cluster] & ALL_DATA
        has_data = data >> at & 1
        while at < SUBCLUSTERS and data >> at & 1 == has_data:
            at += 1
        stop = min(end, low + (cluster * SUBCLUSTERS + at) * unit)
        last = allocs[-1] if allocs else None
        token = None if has_data else REUSED
        host_offset = place + position - low
        fits = last is not None and last.token == token and last.offset + last.length == position and last.host_offset + last.length == host_offset
        if last is not None and fits and last.fresh != bool(has_data):
            last.length += stop - position
        else:
            allocs.append(Alloc(position, stop - position, host, host_offset, not has_data, token))
        position = stop


def _reserve_new(image: Qcow2, allocs: list[Alloc], span: tuple[int, int]) -> None:
    """Room in new clusters, for subclusters of one that is shared, compressed or not there at all."""
    size, host, pending = image.cluster_size, image.data_file, image.tables.pending
    position, end = span
    while position < end:
        if not position % size and end - position >= size:
            untouched = image.refcounts.untouched
            cluster, taken = image.refcounts.allocate((end - position) // size)
            allocs.append(Alloc(position, taken * size, host, cluster * size, True, None, cluster >= untouched))
            position += taken * size
            continue
        low = position // size * size
        stop = min(end, low + size)
        found = pending.get(low)
        if found is None:
            found = pending[low] = Pending(image.refcounts.allocate(1)[0] * size)
        found.users += 1
        allocs.append(Alloc(position, stop - position, host, found.place + position - low, True, found))
        position = stop


# -- publishing ----------------------------------------------------------------------------------------------------


def publish(image: Qcow2, allocs: Sequence[Alloc]) -> None:
    """Enter allocations, whose data is written, into the L2 tables, and note what they replace as free."""
    with image._lock:
        for alloc in allocs:
            _link(image, alloc)
            if isinstance(alloc.token, Pending):
                alloc.token.linked = True
                _drop_user(image, alloc)
        trim_freed(image)


def _link(image: Qcow2, alloc: Alloc) -> None:
    size, unit = image.cluster_size, image.allocation_unit
    stop = alloc.offset + alloc.length
    for position, l2_offset, first, count in table_parts(image, alloc.offset // size * size, -(-stop // size) * size, create=True):
        table = image.tables.cache.get(l2_offset)
        words = big_array(table[first * 16 : (first + count) * 16])
        freed = bytearray()
        for index in range(count):
            low = position + index * size
            entry, bitmap = words[2 * index], words[2 * index + 1]
            written = mask(max(0, alloc.offset - low) // unit, (min(size, stop - low)) // unit)
            place = alloc.host_offset + low - alloc.offset
            if alloc.token == REUSED:
                place = low if image.tables.external else entry & OFFSET_MASK
            elif entry & COMPRESSED or entry & OFFSET_MASK not in (0, place):
                freed += table[(first + index) * 16 : (first + index) * 16 + 16]
                bitmap = 0 if entry & COMPRESSED else bitmap & ALL_ZERO
            words[2 * index] = place | COPIED
            words[2 * index + 1] = bitmap & ~(written << SUBCLUSTERS) | written
        _store(image, l2_offset, first, big_bytes(words), freed)


def withdraw(image: Qcow2, allocs: Sequence[Alloc]) -> None:
    """Give back allocations that will not be linked."""
    with image._lock:
        for alloc in allocs:
            if isinstance(alloc.token, Pending):
                _drop_user(image, alloc)
            elif alloc.token != REUSED and not image.tables.external:
                image.refcounts.give_back(alloc.host_offset // image.cluster_size, alloc.length // image.cluster_size)


def _drop_user(image: Qcow2, alloc: Alloc) -> None:
    found: Pending = alloc.token
    found.users -= 1
    if not found.users:
        del image.tables.pending[alloc.offset // image.cluster_size * image.cluster_size]
        if not found.linked:
            image.refcounts.give_back(found.place // image.cluster_size, 1)


# -- moving --------------------------------------------------------------------------------------------------------


class Move:
    """A cluster on its way to a place of its own, with what it holds; `lock` is held until it is there."""

    def __init__(self, image: Qcow2, cluster: int, entry: int, bitmap: int, lock: LockType) -> None:
        self.image = image
        self.cluster = cluster  # guest offset
        self.entry = entry
        self.data = ALL_DATA if entry & COMPRESSED else bitmap & ALL_DATA
        self.lock = lock
        self.place = image.refcounts.allocate(1)[0] * image.cluster_size

    def run(self) -> None:
        """Copy the content, without the image's lock, then link it."""
        image = self.image
        linked = False
        try:
            for first, end in bit_spans(self.data):
                self._copy(first * image.allocation_unit, end * image.allocation_unit)
            with image._lock:
                linked = self._link()
        finally:
            with image._lock:
                del image.tables.moves[self.cluster]
                if not linked:
                    image.refcounts.give_back(self.place // image.cluster_size, 1)
            self.lock.release()

    def _copy(self, start: int, end: int) -> None:
        image = self.image
        for low in range(start, end, PIECE):
            piece = bytearray(min(PIECE, end - low))
            inside = min(len(piece), image.size - self.cluster - low)
            if inside > 0:
                image.pread_into(self.cluster + low, memoryview(piece)[:inside])
            image.write_clusters(self.place + low, self.cluster + low, memoryview(piece))

    def _link(self) -> bool:
        """Have the entry point at the new place; False where it has become another one meanwhile."""
        image = self.image
        if read_entry(image, self.cluster)[2] != self.entry:
            return False
        for _position, l2_offset, first, _count in table_parts(image, self.cluster, self.cluster + image.cluster_size, create=True):
            old = image.tables.cache.get(l2_offset)[first * 16 : first * 16 + 16]
            bitmap = ALL_DATA if self.entry & COMPRESSED else int.from_bytes(old[8:], "big")
            _store(image, l2_offset, first, (self.place | COPIED).to_bytes(8, "big") + bitmap.to_bytes(8, "big"), old)
        trim_freed(image)
        return True


def _begin_move(image: Qcow2, cluster: int) -> Optional[Move | LockType]:
    """What must be run, or waited for, before a part of the cluster at guest offset `cluster` can be written; None for nothing."""
    moves = image.tables.moves
    if cluster in moves:
        return moves[cluster]
    _table, _index, entry, bitmap = read_entry(image, cluster)
    shared = entry & OFFSET_MASK and not entry & COPIED and bitmap & ALL_DATA
    if image.tables.external or not (entry & COMPRESSED or shared):
        return None
    lock = allocate_lock()
    lock.acquire()
    move = Move(image, cluster, entry, bitmap, lock)
    moves[cluster] = lock
    return move


def bit_spans(bits: int) -> Iterator[tuple[int, int]]:
    """(first, end) of the runs of bits that are set in a bitmap of subclusters."""
    at = 0
    while bits >> at:
        while not bits >> at & 1:
            at += 1
        first = at
        while bits >> at & 1:
            at += 1
        yield first, at


# -- zeroing -------------------------------------------------------------------------------------------------------


def zero_range(image: Qcow2, start: int, end: int, unmap: bool) -> tuple[int, int]:
    """Make the subclusters of a range read as zeroes; returns the part (start, end) that was done: where only a part of a compressed
    cluster is meant, that has to be written."""
    size = image.cluster_size
    if end >= image.size:
        end = max(end, -(-image.size // size) * size)
    first, last = -(-start // size) * size, end // size * size
    if first > last:  # inside one cluster
        return (start, end) if _zero_part(image, start, end) else (start, start)
    if start < first and not _zero_part(image, start, first):
        start = first
    zero_clusters(image, first, last, unmap, True)
    if last < end and not _zero_part(image, last, end):
        end = last
    return start, end


def _zero_part(image: Qcow2, start: int, end: int) -> bool:
    """Zero some subclusters of one cluster; False if it is compressed."""
    size, unit = image.cluster_size, image.allocation_unit
    cluster = start // size * size
    if cluster in image.tables.moves or read_entry(image, cluster)[2] & COMPRESSED:
        return False
    for _position, l2_offset, first, _count in table_parts(image, cluster, cluster + size, create=True):
        raw = image.tables.cache.get(l2_offset)[first * 16 : first * 16 + 16]
        zeroed = mask((start - cluster) // unit, (end - cluster) // unit)
        bitmap = (int.from_bytes(raw[8:], "big") | zeroed << SUBCLUSTERS) & ~zeroed
        _store(image, l2_offset, first, bytes(raw[:8]) + bitmap.to_bytes(8, "big"), b"")
    return True


def zero_clusters(image: Qcow2, start: int, end: int, unmap: bool, absent: bool) -> None:
    """Have whole clusters (those that are not there too if `absent`) read as zeroes; compressed ones, and with `unmap` all, lose their room."""
    from .discard import passes_request

    for _position, l2_offset, first, count in table_parts(image, start, end, create=absent):
        if not l2_offset:
            continue
        old = image.tables.cache.get(l2_offset)[first * 16 : (first + count) * 16]
        new = bytearray(old)
        freed = bytearray()
        for index, run, kind, _value in kernels.l2_runs(entry_column(old, 0, count), 0, count, image.cluster_size, image.tables.external, count):
            plain = kind & 7
            low, high = index * 16, (index + run) * 16
            if plain in (kinds.UNALLOCATED, kinds.ZERO_PLAIN):
                if absent:
                    new[low:high] = ZERO_CLUSTER * run
            elif unmap or plain == kinds.COMPRESSED:
                new[low:high] = ZERO_CLUSTER * run
                freed += old[low:high]
            else:
                words = array("Q", old[low:high])
                words[1::2] = array("Q", ZERO_CLUSTER[8:] * run)
                new[low:high] = words.tobytes()
        if new != old:
            _store(image, l2_offset, first, new, freed, passes_request(image))


__all__ = ["publish", "reserve", "withdraw", "zero_clusters", "zero_range"]
