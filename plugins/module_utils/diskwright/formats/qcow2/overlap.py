# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Overlap: no write may hit metadata that it does not mean (overlap-check in QEMU's block driver reference).

It guards what a damaged image says is free or data. The names of the structures are QEMU's.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort

from .header import BITMAPS, EXT_BITMAPS, EXT_ENCRYPTION, OFFSET_MASK, REFCOUNT_TABLE_MASK, BitmapsExtension, EncryptionExtension

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .image import Qcow2

HEADER, ACTIVE_L1, ACTIVE_L2, REFCOUNT_TABLE, REFCOUNT_BLOCK, SNAPSHOT_TABLE, INACTIVE_L1, INACTIVE_L2, BITMAP_DIRECTORY, ENCRYPTION = (
    1 << bit for bit in range(10)
)
CONSTANT = HEADER | ACTIVE_L1 | REFCOUNT_TABLE | SNAPSHOT_TABLE | BITMAP_DIRECTORY | ENCRYPTION
CACHED = CONSTANT | ACTIVE_L2 | REFCOUNT_BLOCK | INACTIVE_L1
TEMPLATES = {"none": 0, "constant": CONSTANT, "cached": CACHED, "all": CACHED | INACTIVE_L2}
NAMES = {
    HEADER: "qcow2_header",
    ACTIVE_L1: "active L1 table",
    ACTIVE_L2: "active L2 table",
    REFCOUNT_TABLE: "refcount table",
    REFCOUNT_BLOCK: "refcount block",
    SNAPSHOT_TABLE: "snapshot table",
    INACTIVE_L1: "inactive L1 table",
    INACTIVE_L2: "inactive L2 table",
    BITMAP_DIRECTORY: "bitmap directory",
    ENCRYPTION: "encryption header",
}
_OPTIONS = (
    (HEADER, "overlap_check_main_header"),
    (ACTIVE_L1, "overlap_check_active_l1"),
    (ACTIVE_L2, "overlap_check_active_l2"),
    (REFCOUNT_TABLE, "overlap_check_refcount_table"),
    (REFCOUNT_BLOCK, "overlap_check_refcount_block"),
    (SNAPSHOT_TABLE, "overlap_check_snapshot_table"),
    (INACTIVE_L1, "overlap_check_inactive_l1"),
    (INACTIVE_L2, "overlap_check_inactive_l2"),
    (BITMAP_DIRECTORY, "overlap_check_bitmap_directory"),
)


class Overlap:
    """The places of an image's metadata, learnt at the first write and kept up to date by who moves them."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        options = image.options
        mask = TEMPLATES[options.overlap_check or options.overlap_check_template or "cached"]
        for bit, name in _OPTIONS:
            wanted = getattr(options, name)
            if wanted is not None:
                mask = mask | bit if wanted else mask & ~bit
        self.mask = mask
        self._ranges: list[tuple[int, int, int]] = []  # (start, end, structure)
        self._tables: list[tuple[int, array[int]]] = []  # (structure, sorted offsets of single clusters)
        self._end = -1  # no metadata from here on; -1: nothing is known yet

    def forget(self) -> None:
        """Some structure moved; learn all places again."""
        self._end = -1

    def _learn(self) -> None:
        image = self.image
        header, size = image.header, image.cluster_size
        ranges = [
            (0, size, HEADER),
            (header.l1_table_offset, header.l1_table_offset + header.l1_size * 8, ACTIVE_L1),
            (header.refcount_table_offset, header.refcount_table_offset + header.refcount_table_clusters * size, REFCOUNT_TABLE),
        ]
        l2 = array("Q", sorted({entry & OFFSET_MASK for entry in image.tables.l1} - {0}))
        blocks = array("Q", sorted({entry & REFCOUNT_TABLE_MASK for entry in image.refcounts.table} - {0}))
        tables = [(ACTIVE_L2, l2), (REFCOUNT_BLOCK, blocks)]
        if header.nb_snapshots and self.mask & (SNAPSHOT_TABLE | INACTIVE_L1 | INACTIVE_L2):
            from .snapshots import read_snapshots, snapshot_l2_offsets

            snapshots, length = read_snapshots(image)
            ranges.append((header.snapshots_offset, header.snapshots_offset + length, SNAPSHOT_TABLE))
            for snapshot in snapshots:
                ranges.append((snapshot.l1_table_offset, snapshot.l1_table_offset + snapshot.l1_size * 8, INACTIVE_L1))
            if self.mask & INACTIVE_L2:
                tables.append((INACTIVE_L2, array("Q", sorted(snapshot_l2_offsets(image, snapshots)))))
        bitmaps = header.extension(EXT_BITMAPS) if header.autoclear_features & BITMAPS else None
        if bitmaps is not None and self.mask & BITMAP_DIRECTORY:
            found = BitmapsExtension.unpack(bitmaps)
            start = found.bitmap_directory_offset
            ranges.append((start, start + found.bitmap_directory_size, BITMAP_DIRECTORY))
        encryption = header.extension(EXT_ENCRYPTION)
        if encryption is not None:
            luks = EncryptionExtension.unpack(encryption)
            ranges.append((luks.offset, luks.offset + luks.length, ENCRYPTION))
        self._ranges = [(start, end, kind) for start, end, kind in ranges if start < end and self.mask & kind]
        self._tables = [(kind, offsets) for kind, offsets in tables if self.mask & kind]
        ends = [end for _start, end, _kind in self._ranges] + [offsets[-1] + size for _kind, offsets in self._tables if offsets]
        self._end = max(ends, default=0)

    def find(self, offset: int, length: int, ignore: int = 0) -> int:
        """The first structure, not in the mask `ignore`, that the range overlaps; 0 for none."""
        if self._end < 0:
            self._learn()
        if offset >= self._end or not length:
            return 0
        end = offset + length
        for low, high, kind in self._ranges:
            if low < end and offset < high and not kind & ignore:
                return kind
        size = self.image.cluster_size
        for kind, offsets in self._tables:
            at = bisect_left(offsets, offset - size + 1)
            if not kind & ignore and at < len(offsets) and offsets[at] < end:
                return kind
        return 0

    def check(self, offset: int, length: int, ignore: int = 0, what: str = "metadata") -> None:
        """Raise Corrupt, and mark the image, where a write of the range would hit metadata. `what` is being written."""
        kind = self.find(offset, length, ignore)
        if kind:
            raise self.image.corrupt("Preventing invalid write on %s (overlaps with %s)" % (what, NAMES[kind]))

    def add_table(self, offset: int) -> None:
        """There is a new active L2 table at `offset`."""
        self._add(ACTIVE_L2, offset)

    def add_block(self, offset: int) -> None:
        """There is a new refcount block at `offset`."""
        self._add(REFCOUNT_BLOCK, offset)

    def remove_table(self, offset: int) -> None:
        """What was at `offset` is no active L2 table any more."""
        for kind, offsets in self._tables if self._end >= 0 else ():
            if kind == ACTIVE_L2:
                at = bisect_left(offsets, offset)
                if at < len(offsets) and offsets[at] == offset:
                    del offsets[at]

    def _add(self, kind: int, offset: int) -> None:
        if self._end < 0:
            return
        for known, offsets in self._tables:
            if known == kind:
                insort(offsets, offset)
                self._end = max(self._end, offset + self.image.cluster_size)
