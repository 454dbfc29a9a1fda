# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Check of a qcow2 image: count what its tables refer to and compare with the stored refcounts
(https://www.qemu.org/docs/master/interop/qcow2.html#host-cluster-management)."""

from __future__ import annotations

import errno
import sys
from struct import unpack

from ... import kernels
from ...tally import MESSAGES_MAX, CheckResult, Tally
from ...errors import Error
from ...kernels.contract import COPIED as COPIED_KIND
from ...kernels.contract import NORMAL, ZERO_ALLOC
from .header import (
    COMPRESSED,
    COPIED,
    DATA_FILE,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    REFCOUNT_TABLE_MASK,
    REFCOUNT_TABLE_RESERVED,
    ZERO,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from typing import Iterator, Optional, Sequence, Union

    from .image import Qcow2
    from .mend import BlockEditor, Metadata
    from .references import Bitmap, Snapshot

MAX_FILE_OFFSET = 0x7FFFFFFFC0000000  # bytes; QEMU refuses I/O beyond
MAX_CLUSTERS = (1 << 31) - 1  # clusters of a file that can be checked
REPEATED_MAX = 128 << 20  # bytes of L2 tables that L1 tables name more than once, before the check is given up
FINDINGS_MAX = 1000000  # damaged entries of mapping tables before the check is given up
_CHUNK = 64 << 10  # bytes of a table that are looked at in one go
_COMPARE = 32768  # refcounts that are compared in one go; a multiple of 8
_BLOCKS_MAX = 4  # refcount blocks that are kept
_HAS_OFFSET = NORMAL & ZERO_ALLOC
_ZEROES = bytes(_CHUNK)
_OVERFLOW_HINT = "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be opened for writing"


def big_words(raw: Union[bytes, bytearray]) -> Sequence[int]:
    """Big-endian u64 entries as integers."""
    if len(raw) <= _CHUNK:
        return unpack(">%dQ" % (len(raw) // 8), raw)
    from array import array  # costs the import of collections, so only where memory matters

    entries = array("Q", raw)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


class GiveUp(Error):
    """The check cannot go on; becomes CheckResult.failure."""


def failed(state: Check) -> GiveUp:
    """The reason of a repair that cannot go on; what is wrong was said before."""
    return GiveUp("Input/output error", filename=state.image.filename, errno=errno.EIO)


class Check:
    """One check of `image`; `repair` is "", "leaks" or "all".

    References are counted by `walk`, the stored refcounts compared by `compare`; repair.py says in which order. Tables are
    read from the file, whatever the image may have cached.
    """

    def __init__(self, image: Qcow2, repair: str, result: CheckResult) -> None:
        self.image = image
        self.file = image.file
        header = self.header = image.header
        self.repair = repair
        self.result = result
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.order = header.refcount_order
        self.extended = header.extended_l2
        self.data_file = bool(header.incompatible_features & DATA_FILE)
        self.per_block = self.cluster_size * 8 >> self.order
        self.rebuild = False  # the refcount structures cannot be mended in place
        self.copied_certain = True  # every entry of the active tables has COPIED
        self.corruptions = self.leaks = 0  # what the comparison found; the result has the rest until it is over
        self.mismatches = 0
        self.snapshots: list[Snapshot] = []
        self.bitmaps: list[Bitmap] = []
        self.snapshots_size = 0  # bytes of the snapshot table
        self.snapshots_damaged = 0
        self.highest = 0  # the last cluster that is in use
        self.first = True  # this is the walk that reports; those for further windows of the tally only count
        self.guard: Optional[Metadata] = None  # of what a repair writes
        self.quiet = False  # nothing is reported: it was before
        self.signalled = False
        self.findings = self.repeated = self.l2_tables = 0
        self.measure_file()
        self.read_refcount_table()
        self.tally = self.new_tally()
        odd = L2_RESERVED | COMPRESSED | OFFSET_MASK & (self.cluster_size - 1) | (ZERO if self.extended else 0)
        self._plain = [  # (number of a byte of an L2 entry, values in which no bit is odd)
            (byte, bytes(value for value in range(256) if not value & mask)) for byte, mask in enumerate(odd.to_bytes(8, "big")) if mask
        ]
        self._buffer = bytearray(self.cluster_size)
        self._blocks: dict[int, bytes] = {}

    # -- the file ------------------------------------------------------------------------------------------------

    def measure_file(self) -> None:
        """Take the length of the file, as QEMU does: in whole sectors of 512 bytes."""
        self.size = self.file.size
        self.length = self.size + 511 & ~511
        clusters = -(-self.length // self.cluster_size)
        if clusters > MAX_CLUSTERS:
            raise GiveUp("File too large", filename=self.image.filename, errno=errno.EFBIG)
        self.clusters = clusters

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file, zeroes beyond its end. Raises OSError, also for offsets that no file has."""
        if offset + length > MAX_FILE_OFFSET:
            raise OSError(errno.EIO, "Input/output error")
        inside = max(0, min(length, self.size - offset))
        data = self.file.pread(offset, inside) if inside else b""
        return data if inside == length else data.ljust(length, b"\0")

    def read_cluster(self, offset: int) -> bytearray:
        """Like `read`, for one cluster, in a buffer that the next call reuses."""
        buffer = self._buffer
        if offset + self.cluster_size > self.size:
            buffer[:] = self.read(offset, self.cluster_size)
        else:
            self.file.pread_into(offset, buffer)
        return buffer

    def write(self, offset: int, data: bytes, new: bool = False) -> None:
        """Write to a place that the image has for it; only what is `new` may lie behind the end of the file."""
        if not new and offset >= self.size:
            raise GiveUp("Input/output error", filename=self.image.filename, errno=errno.EIO)
        self.file.write_hosted(offset, memoryview(data))

    def read_refcount_table(self) -> None:
        """Read the refcount table, without the zeroes at its end."""
        header = self.header
        raw = self.read(header.refcount_table_offset, header.refcount_table_clusters * self.cluster_size)
        end = len(raw)
        while end and not raw[end - 1]:
            step = min(4096, end)
            if any(raw[end - step : end]):
                end = len(raw[:end].rstrip(b"\0"))
                break
            end -= step
        self.reftable = big_words(raw[: end + 7 & ~7])
        self._blocks = {}

    def new_tally(self) -> Tally:
        """An empty tally of the clusters of the file."""
        return Tally(self.clusters, (1 << (1 << self.order)) - 1)

    # -- findings ------------------------------------------------------------------------------------------------

    def corruption(self, message: str) -> None:
        """Report damage in a table, once."""
        self.copied_certain = False
        if self.first and not self.quiet:
            self.found(message)

    def found(self, message: str) -> None:
        """Report damage that is seen in one window of the tally only."""
        if self.quiet:
            return
        self.result.say(message)
        self.result.corruptions += 1
        self.findings += 1
        if self.findings > FINDINGS_MAX:
            raise GiveUp("Too many damaged table entries", filename=self.image.filename, errno=errno.EIO)

    def signal(self, message: str) -> None:
        """Say once that the image is corrupt, as an access to it would, and mark it if it is being repaired."""
        if not self.signalled:
            self.signalled = True
            self.result.say(str(self.image.corrupt(message, fatal=bool(self.repair))))

    # -- counting ------------------------------------------------------------------------------------------------

    def count(self, offset: int, size: int) -> None:
        """Count references to the clusters that hold `size` bytes at `offset`."""
        if size <= 0:
            return
        if offset + size - self.length >= self.cluster_size:
            self.corruption("ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x%x size 0x%x" % (offset, size))
            return
        start = offset >> self.cluster_bits
        self.count_clusters(start, (offset + size - 1 >> self.cluster_bits) - start + 1)

    def count_clusters(self, start: int, count: int) -> None:
        """Count references to clusters that are known to lie in the file."""
        for cluster in self.tally.add(start, count):
            self.found("ERROR: overflow cluster offset=0x%x" % (cluster << self.cluster_bits))
            if not self.quiet:
                self.result.say(_OVERFLOW_HINT)

    def walk(self) -> None:
        """Count everything that the image refers to, in QEMU's order; the first walk also reports damage and counts clusters."""
        header = self.header
        if self.first:
            self.result.total_clusters = -(-(header.size & ~511) // self.cluster_size)
            self.result.allocated_clusters = self.result.fragmented_clusters = self.result.compressed_clusters = 0
        self.count(0, self.cluster_size)
        self.walk_l1(header.l1_table_offset, header.l1_size, True)
        if self.snapshots or self.bitmaps or header.crypt_method:
            from .references import walk_bitmaps, walk_encryption, walk_snapshots

            walk_snapshots(self)
            walk_encryption(self)
            walk_bitmaps(self)
        self.count(header.refcount_table_offset, header.refcount_table_clusters * self.cluster_size)
        self.walk_refcount_blocks()

    def walk_l1(self, offset: int, size: int, active: bool) -> None:
        """Count an L1 table of `size` entries and all below it."""
        self.count(offset, size * 8)
        seen: set[int] = set()
        for _index, entry in self.l1_entries(offset, size):
            if entry & L1_RESERVED:
                self.corruption("ERROR found L1 entry with reserved bits set: %x" % entry)
            l2_offset = entry & OFFSET_MASK
            self.count(l2_offset, self.cluster_size)
            if l2_offset & (self.cluster_size - 1):
                self.corruption("ERROR l2_offset=%x: Table is not cluster aligned; L1 entry corrupted" % l2_offset)
            if active and not entry & COPIED:
                self.copied_certain = False
            if l2_offset in seen and l2_offset < self.length:
                self._allow_repeat()
            elif len(seen) < 65536:
                seen.add(l2_offset)
            self.walk_l2(l2_offset, active)

    def _allow_repeat(self) -> None:
        """An L1 table names an L2 table again: that is damage, and only so much work is spent on it."""
        self.repeated += self.cluster_size
        if self.repeated > REPEATED_MAX:
            raise GiveUp("L2 tables are in use too often", filename=self.image.filename, errno=errno.EIO)

    def l1_entries(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """(index, entry) of the entries of an L1 table that are not zero."""
        for start in range(0, size * 8, _CHUNK):
            raw = self.read(offset + start, min(_CHUNK, size * 8 - start))
            if not is_zero(raw):
                for index, entry in enumerate(big_words(raw), start // 8):
                    if entry:
                        yield index, entry

    def walk_l2(self, offset: int, active: bool) -> None:
        """Count what an L2 table refers to."""
        raw = self.read_cluster(offset)
        if is_zero(raw):
            return
        self.l2_tables += 1
        entries, bitmaps = self.split(raw)
        if self.walk_l2_runs(entries, bitmaps, active):
            return
        from .references import walk_l2_entries

        walk_l2_entries(self, offset, big_words(entries), big_words(bitmaps), active)

    def split(self, raw: Union[bytes, bytearray]) -> tuple[Union[bytes, bytearray], bytes]:
        """The entries and, apart from them, the bitmaps of an L2 table."""
        if not self.extended:
            return raw, b""
        from array import array

        words = array("Q", raw)
        return words[0::2].tobytes(), words[1::2].tobytes()

    def walk_l2_runs(self, entries: Union[bytes, bytearray], bitmaps: bytes, active: bool) -> bool:
        """Count a table in which nothing is odd, by runs; False, and nothing done, if something is."""
        for byte, plain in self._plain:
            if entries[byte::8].translate(None, plain):
                return False
        total = len(entries) // 8
        runs = kernels.l2_runs(entries, 0, total, self.cluster_size, self.data_file, total)
        for index, count, kind, value in runs:
            if kind & _HAS_OFFSET and value + (count - 1) * self.cluster_size >= self.length:
                return False
            if bitmaps and odd_bitmaps(bitmaps[index * 8 : (index + count) * 8], bool(kind & _HAS_OFFSET)):
                return False
        clusters = fragments = following = 0
        for index, count, kind, value in runs:
            if kind & _HAS_OFFSET:
                if not kind & COPIED_KIND:
                    self.copied_certain = self.copied_certain and not active
                clusters += count
                if following and following != value:
                    fragments += 1
                following = value + count * self.cluster_size
                if not self.data_file:
                    self.count_clusters(value >> self.cluster_bits, count)
        if active and self.first:
            self.result.allocated_clusters += clusters
            self.result.fragmented_clusters += fragments
        return True

    def walk_refcount_blocks(self) -> None:
        """Count the refcount blocks."""
        for index, entry in enumerate(self.reftable):
            if not entry:
                continue
            offset = entry & REFCOUNT_TABLE_MASK
            if entry & REFCOUNT_TABLE_RESERVED:
                self.corruption("ERROR refcount table entry %d has reserved bits set" % index)
                self.rebuild = True
            elif offset & (self.cluster_size - 1):
                self.corruption("ERROR refcount block %d is not cluster aligned; refcount table entry corrupted" % index)
                self.rebuild = True
            elif offset >> self.cluster_bits >= max(self.clusters, self.tally.total):
                self._outside(index, offset)
            else:
                self.count_block(index, offset)

    def _outside(self, index: int, offset: int) -> None:
        if self.repair != "all":
            self.corruption("ERROR refcount block %d is outside image" % index)
        elif self.first:
            from .mend import grow_to_block

            grow_to_block(self, index, offset)

    def count_block(self, index: int, offset: int) -> None:
        """Count a refcount block that lies in the file."""
        self.count(offset, self.cluster_size)
        cluster = offset >> self.cluster_bits
        if self.tally.inside(cluster) and self.tally.count(cluster) != 1:
            self.found("ERROR refcount block %d refcount=%d" % (index, self.tally.count(cluster)))
            self.rebuild = True

    # -- comparing -----------------------------------------------------------------------------------------------

    def block(self, index: int) -> Optional[bytes]:
        """A refcount block as stored, None where there is none. Raises OSError where it cannot be read."""
        entry = self.reftable[index] if index < len(self.reftable) else 0
        offset = entry & REFCOUNT_TABLE_MASK
        if not offset:
            return None
        found = self._blocks.get(index)
        if found is None:
            if offset & (self.cluster_size - 1):
                self.signal("Refblock offset %#x unaligned (reftable index: %s)" % (offset, "%#x" % index if index else "0"))
                raise OSError(errno.EIO, "Input/output error")
            found = self.read(offset, self.cluster_size)
            while len(self._blocks) >= _BLOCKS_MAX:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[index] = found
        return found

    def forget_blocks(self) -> None:
        """Refcount blocks were written."""
        self._blocks = {}

    def refcounts(self, start: int, count: int) -> array[int]:
        """Stored refcounts of a range of clusters. Raises OSError where they cannot be read."""
        from array import array

        values = array("Q")
        while count:
            index, skip = divmod(start, self.per_block)
            step = min(count, self.per_block - skip)
            block = self.block(index)
            values.extend(array("Q", bytes(8 * step)) if block is None else kernels.refcounts_unpack(block, self.order, skip, step))
            start += step
            count -= step
        return values

    def compare(self, edit: Optional[BlockEditor] = None) -> None:
        """Compare the counts of the tally's window with the stored refcounts; `edit` mends what self.repair allows."""
        tally = self.tally
        high = tally.total if tally.high is None else min(tally.high, tally.total)
        indices = {index for index, entry in enumerate(self.reftable) if entry & REFCOUNT_TABLE_MASK}
        for start, count in tally.touched():
            indices.update(range(start // self.per_block, -(-min(start + count, high) // self.per_block)))
        last = -1
        unreadable: set[int] = set()
        for index in sorted(indices):
            low = max(index * self.per_block, tally.low)
            end = min((index + 1) * self.per_block, high)
            if low >= end:
                continue
            try:
                block = self.block(index)
            except OSError as exc:
                self._unreadable(low, end, exc)
                unreadable.add(index)
                continue
            last = index
            if block is not None or tally.is_touched(low, end - low):
                self._compare_block(index, block, low, end, edit)
        self._find_highest(indices - unreadable, last, high)

    def _unreadable(self, low: int, end: int, exc: OSError) -> None:
        for cluster in range(low, min(end, low + MESSAGES_MAX)):
            self.result.say("Can't get refcount for cluster %d: %s" % (cluster, exc.strerror))
        self.result.omitted += max(0, end - low - MESSAGES_MAX)
        self.result.check_errors += end - low

    def _compare_block(self, index: int, block: Optional[bytes], low: int, end: int, edit: Optional[BlockEditor]) -> None:
        base = index * self.per_block
        view = memoryview(block if block is not None else bytes(self.cluster_size))
        for first in range(low, end, _COMPARE):
            for start, counters in self.tally.counters(first, min(_COMPARE, end - first)):
                count = len(counters)
                at = start - base << self.order
                if not self.l2_tables and same_refcounts(view[at >> 3 :], self.order, counters):
                    continue  # an empty image is checked without loading any kernel
                found = kernels.refcount_mismatches(view[at >> 3 :], self.order, counters, 0, count, count)
                for item, stored, counted in found:
                    self._mismatch(start + item, stored, counted, edit)
        if edit is not None:
            edit.finish(index)

    def _mismatch(self, cluster: int, stored: int, counted: int, edit: Optional[BlockEditor]) -> None:
        result = self.result
        self.mismatches += 1
        if not stored:
            self.rebuild = True
        leak = stored > counted
        if edit is not None and stored and (leak or edit.all):
            result.say("Repairing cluster %d refcount=%d reference=%d" % (cluster, stored, counted))
            edit.set(cluster, counted)
            if leak:
                result.leaks_fixed += 1
            else:
                result.corruptions_fixed += 1
            return
        result.say("%s cluster %d refcount=%d reference=%d" % ("Leaked" if leak else "ERROR", cluster, stored, counted))
        if leak:
            self.leaks += 1
        else:
            self.corruptions += 1

    def _find_highest(self, indices: set[int], last: int, high: int) -> None:
        """Note the last cluster of the window that is in use or said to be."""
        for index in sorted(indices, reverse=True):
            low = max(index * self.per_block, self.tally.low)
            end = min((index + 1) * self.per_block, high)
            if low >= end or index > last:
                continue
            block = self.block(index)
            for first in range(low + (end - 1 - low) // _COMPARE * _COMPARE, low - 1, -_COMPARE):
                count = min(_COMPARE, end - first)
                used = -1 if block is None else last_refcount(block, self.order, first - index * self.per_block, count)
                for start, counters in self.tally.counters(first, count):
                    at = last_nonzero(counters, counters.itemsize)
                    used = max(used, start - first + at) if at >= 0 else used
                if used >= 0:
                    self.highest = max(self.highest, first + used)
                    return


def is_zero(raw: Union[bytes, bytearray, memoryview]) -> bool:
    """Whether all bytes are zero."""
    view = memoryview(raw)
    return all(_ZEROES.startswith(view[start : start + _CHUNK]) for start in range(0, len(view), _CHUNK))


def last_nonzero(items: Union[bytes, memoryview], width: int) -> int:
    """The index of the last item of `width` bytes that is not zero, -1 if there is none."""
    return -(-len(bytes(items).rstrip(b"\0")) // width) - 1


def last_refcount(block: bytes, order: int, start: int, count: int) -> int:
    """The last of `count` refcounts of a block that is not zero, counted from `start`, a multiple of 8; -1 if there is none."""
    low = start << order >> 3
    part = block[low : low + (count << order >> 3)]
    if order >= 3:
        return last_nonzero(part, 1 << order - 3)
    part = block[low : low - (-(count << order) >> 3)]
    at = last_nonzero(part, 1)
    while at >= 0:
        last = (at << 3 >> order) + (part[at].bit_length() - 1 >> order)
        if last < count:
            return last
        # the byte also has refcounts of clusters behind the range
        kept = part[at] & (1 << (count - (at << 3 >> order) << order)) - 1
        part = part[:at] + bytes((kept,))
        at = last_nonzero(part, 1)
    return -1


def same_refcounts(stored: memoryview, order: int, counters: memoryview) -> bool:
    """Whether refcounts are what was counted; False also where that takes a kernel to tell."""
    if order < 3:
        return False
    width, counter_width = 1 << order - 3, counters.itemsize
    left, right = bytes(stored[: len(counters) * width]), bytes(counters)
    for byte in range(max(width, counter_width)):
        one = left[width - 1 - byte :: width] if byte < width else b""
        other = right[byte if sys.byteorder == "little" else counter_width - 1 - byte :: counter_width] if byte < counter_width else b""
        if one != other if one and other else any(one or other):
            return False
    return True


def odd_bitmaps(bitmaps: bytes, hosted: bool) -> bool:
    """Whether the subcluster bitmaps of neighbouring extended L2 entries contradict themselves or, with no cluster behind them, claim data."""
    number = int.from_bytes(bitmaps, "big")
    data = number & int.from_bytes(b"\0\0\0\0\xff\xff\xff\xff" * (len(bitmaps) // 8), "big")
    return bool(data & number >> 32) if hosted else bool(data)
