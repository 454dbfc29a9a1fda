# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Images that qemu-img made, and a catalogue of ways to damage them (https://www.qemu.org/docs/master/interop/qcow2.html)."""

from __future__ import annotations

import os
import struct
import subprocess

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET = 0x00FFFFFFFFFFFE00
K = 1024

# Option sets; every damage runs on those that it names.
VARIANTS = {
    "v3": "compat=1.1",
    "v2": "compat=0.10",
    "c512": "cluster_size=512",
    "c4k": "cluster_size=4k",
    "c2m": "cluster_size=2M",
    "r1": "refcount_bits=1,cluster_size=4k",
    "r2": "refcount_bits=2,cluster_size=4k",
    "r4": "refcount_bits=4,cluster_size=512",
    "r8": "refcount_bits=8,cluster_size=4k",
    "r32": "refcount_bits=32,cluster_size=4k",
    "r64": "refcount_bits=64,cluster_size=1k",
    "ext": "extended_l2=on,cluster_size=16k",
    "meta": "preallocation=metadata,cluster_size=4k",
    "lazy": "lazy_refcounts=on,cluster_size=4k",
}


def run(*argv):
    """Run a program that must succeed."""
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def make(path, variant, snapshots=True, bitmaps=False):
    """A small image with data, zeroes and compressed clusters and, as asked and possible, a snapshot or bitmaps.

    Not both: qemu-img check -r forgets the snapshots of an image that has bitmaps.
    """
    options = VARIANTS[variant]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M" if variant != "c2m" else "9M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 20k", "-c", "write -P 2 128k 70k", "-c", "write -P 3 512k 64k", path)
    step = {"v3": 64, "v2": 64, "c2m": 2048, "ext": 16, "c512": 4, "r4": 4, "r64": 4}.get(variant, 4)
    base = 320 if variant != "c2m" else 2048
    for index in range(0 if variant == "meta" else 3 if variant != "v2" else 2):
        run("qemu-io", "-f", "qcow2", "-c", "write -c -P %d %dk %dk" % (9 + index, base + index * step, step), path)
    if variant != "v2":
        run("qemu-io", "-f", "qcow2", "-c", "write -z 640k 64k", path)
    if snapshots and variant not in ("r1", "r4"):
        run("qemu-img", "snapshot", "-c", "first", path)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 4 0 5k", "-c", "write -P 5 768k 9k", path)
    if bitmaps and variant != "v2":
        run("qemu-img", "bitmap", "--add", path, "b0")
        run("qemu-img", "bitmap", "--add", "-g", "64k", path, "b1")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 6 900k 4k", path)


class Editor:
    """Reads and changes the tables of an image in memory; `save` writes them back."""

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            self.data = bytearray(file.read())
        self.cluster_bits = self.u32(20)
        self.cluster = 1 << self.cluster_bits
        self.size = self.u64(24)
        self.l1_size = self.u32(36)
        self.l1_offset = self.u64(40)
        self.reftable = self.u64(48)
        self.reftable_clusters = self.u32(56)
        self.snapshots = self.u32(60)
        self.snapshots_offset = self.u64(64)
        self.version = self.u32(4)
        self.order = self.u32(96) if self.version == 3 else 4
        self.extended = self.version == 3 and bool(self.u64(72) & 16)
        self.entry_size = 16 if self.extended else 8

    def save(self):
        with open(self.path, "wb") as file:
            file.write(self.data)

    def u16(self, at):
        return struct.unpack_from(">H", self.data, at)[0]

    def u32(self, at):
        return struct.unpack_from(">I", self.data, at)[0]

    def u64(self, at):
        return struct.unpack_from(">Q", self.data, at)[0]

    def put16(self, at, value):
        struct.pack_into(">H", self.data, at, value)

    def put32(self, at, value):
        struct.pack_into(">I", self.data, at, value)

    def put64(self, at, value):
        self.grow(at + 8)
        struct.pack_into(">Q", self.data, at, value)

    def grow(self, size):
        if len(self.data) < size:
            self.data.extend(bytes(size - len(self.data)))

    @property
    def end(self):
        """The first cluster beyond the file."""
        return -(-len(self.data) // self.cluster)

    def append(self, count=1):
        """Add zeroed clusters at the end; the first one's index."""
        first = self.end
        self.grow((first + count) * self.cluster)
        return first

    def refblocks(self):
        """(index, offset) of the refcount blocks."""
        count = self.reftable_clusters * self.cluster // 8
        return [(i, self.u64(self.reftable + 8 * i)) for i in range(count) if self.u64(self.reftable + 8 * i)]

    def place(self, cluster):
        """(byte offset, bit shift) of a cluster's refcount."""
        per_block = self.cluster * 8 >> self.order
        block = self.u64(self.reftable + 8 * (cluster // per_block)) & ~511
        bit = (cluster % per_block) << self.order
        return block + bit // 8, bit % 8

    def refcount(self, cluster):
        at, shift = self.place(cluster)
        if self.order < 3:
            return self.data[at] >> shift & ((1 << (1 << self.order)) - 1)
        return int.from_bytes(self.data[at : at + (1 << self.order) // 8], "big")

    def set_refcount(self, cluster, value):
        at, shift = self.place(cluster)
        mask = (1 << (1 << self.order)) - 1
        value &= mask
        if self.order < 3:
            self.data[at] = self.data[at] & ~(mask << shift) | value << shift
        else:
            width = (1 << self.order) // 8
            self.data[at : at + width] = value.to_bytes(width, "big")

    def l1(self, table=None, size=None):
        """(position in the file, entry) of the used L1 entries."""
        table, size = table or self.l1_offset, size or self.l1_size
        return [(table + 8 * i, self.u64(table + 8 * i)) for i in range(size) if self.u64(table + 8 * i)]

    def l2(self, table=None, size=None):
        """(position, entry) of all L2 entries that are not zero."""
        found = []
        for _at, entry in self.l1(table, size):
            base = entry & OFFSET
            for at in range(base, base + self.cluster, self.entry_size):
                if self.u64(at) or (self.extended and self.u64(at + 8)):
                    found.append((at, self.u64(at)))
        return found

    def normal(self, table=None, size=None):
        return [(at, entry) for at, entry in self.l2(table, size) if entry & OFFSET and not entry & (COMPRESSED | 1)]

    def compressed(self):
        return [(at, entry) for at, entry in self.l2() if entry & COMPRESSED]

    def zeroes(self):
        return [(at, entry) for at, entry in self.l2() if not entry & COMPRESSED and entry & 1]

    def snapshot_l1(self):
        """(L1 offset, L1 entries) of the first snapshot."""
        return self.u64(self.snapshots_offset), self.u32(self.snapshots_offset + 8)

    def extension(self, magic):
        """Offset of a header extension's data."""
        at = self.u32(100)
        while True:
            kind, length = self.u32(at), self.u32(at + 4)
            if kind == magic:
                return at + 8
            if not kind:
                raise LookupError(hex(magic))
            at += 8 + (length + 7) // 8 * 8

    @property
    def bitmaps(self):
        """Offset of the bitmaps extension's data."""
        return self.extension(0x23852875)

    @property
    def bitmap_directory(self):
        return self.u64(self.bitmaps + 16)


DAMAGES = {}


def damage(*variants, **recipe):
    """Register a function that damages an image; it runs on all of the named variants."""

    def register(function):
        for variant in variants or ("v3",):
            DAMAGES["%s-%s" % (function.__name__, variant)] = (variant, recipe, function)
        return function

    return register


EVERY = tuple(VARIANTS)
SOME = ("v3", "v2", "c512", "r1", "r2", "r64", "ext")


@damage(*EVERY)
def clean(image):
    pass


@damage(*EVERY, snapshots=False)
def plain_clean(image):
    pass


@damage("v3", "c512", "c4k", "r1", "ext", snapshots=False, bitmaps=True)
def bitmap_clean(image):
    pass


@damage(*SOME)
def leak_at_end(image):
    image.set_refcount(image.append(), 1)


@damage("v3", "c4k", "r8", "r64")
def leak_high_refcount(image):
    cluster = image.append(3)
    image.set_refcount(cluster, 5)
    image.set_refcount(cluster + 2, 200)


@damage(*SOME, snapshots=False)
def leak_behind_end_of_file(image):
    image.set_refcount(image.end + 3, 1)


@damage("v3", "c4k", "r8")
def data_refcount_too_high(image):
    image.set_refcount((image.normal()[-1][1] & OFFSET) >> image.cluster_bits, 7)


@damage(*SOME, snapshots=False)
def data_refcount_zero(image):
    image.set_refcount((image.normal()[0][1] & OFFSET) >> image.cluster_bits, 0)


@damage("v3", "c4k", "r2")
def shared_refcount_too_low(image):
    at, _entry = [item for item in image.normal() if not item[1] & COPIED][0]
    image.set_refcount((image.u64(at) & OFFSET) >> image.cluster_bits, 1)


@damage("v3", "c4k", "r32")
def header_refcount_zero(image):
    image.set_refcount(0, 0)


@damage("v3", "c4k", "r4")
def refblock_refcount_two(image):
    image.set_refcount(image.refblocks()[0][1] >> image.cluster_bits, 2)


@damage("v3", "c4k")
def refblock_refcount_zero(image):
    image.set_refcount(image.refblocks()[0][1] >> image.cluster_bits, 0)


@damage("v3", "c4k", "v2")
def l1_refcount_zero(image):
    image.set_refcount(image.l1_offset >> image.cluster_bits, 0)


@damage("v3", "c4k", "v2")
def l2_refcount_zero(image):
    image.set_refcount((image.l1()[0][1] & OFFSET) >> image.cluster_bits, 0)


@damage("v3", "c4k", "v2", "ext")
def l2_entry_copied_lost(image):
    at, entry = [item for item in image.normal() if item[1] & COPIED][0]
    image.put64(at, entry & ~COPIED)


@damage("v3", "c4k", "v2", "ext")
def l2_entry_copied_wrong(image):
    at, entry = [item for item in image.normal() if not item[1] & COPIED][0]
    image.put64(at, entry | COPIED)


@damage("v3", "c4k", "v2", snapshots=False)
def l1_entry_copied_lost(image):
    at, entry = image.l1()[0]
    image.put64(at, entry & ~COPIED)


@damage("v3", "c4k", snapshots=False)
def l1_and_l2_copied_lost(image):
    at, entry = image.l1()[0]
    image.put64(at, entry & ~COPIED)
    for at, entry in image.normal()[1:4]:
        image.put64(at, entry & ~COPIED)


@damage("v3", "c4k")
def snapshot_l1_copied_wrong(image):
    at, entry = image.l1(*image.snapshot_l1())[0]
    image.put64(at, entry | COPIED)


@damage("v3", "c512", "ext", "v2", "meta")
def l2_entry_unaligned(image):
    at, entry = image.normal()[1]
    image.put64(at, entry + (0x200 if image.cluster > 512 else 0))


@damage("v3", "c512", "ext", "v2")
def l2_entry_behind_end_of_file(image):
    at, _entry = image.normal()[1]
    image.put64(at, COPIED | (image.end + 1) << image.cluster_bits)


@damage("v3", "c512", "v2")
def l2_entry_at_end_of_file(image):
    at, _entry = image.normal()[1]
    image.put64(at, COPIED | image.end << image.cluster_bits)


@damage("v3", "c4k", "ext")
def l2_entry_far_behind_end_of_file(image):
    at, _entry = image.normal()[1]
    image.put64(at, COPIED | 0x00FFFFFFFFF00000 >> image.cluster_bits << image.cluster_bits)


@damage(*SOME)
def l2_entry_duplicate(image):
    (at, _one), (_at, other) = image.normal()[:2]
    image.put64(at, other)


@damage(*SOME, snapshots=False)
def l2_entry_duplicate_plain(image):
    (at, _one), (_at, other) = image.normal()[:2]
    image.put64(at, other)


@damage("v3", "c4k", "c512", "v2")
def l2_entry_reserved_bits(image):
    at, entry = image.normal()[0]
    image.put64(at, entry | 1 << 57 | 4)


@damage("v3", "c4k", "ext", "v2")
def l2_entry_at_header(image):
    image.put64(image.normal()[0][0], COPIED)


@damage("v3", "c4k", "ext", "v2")
def l2_entry_cleared(image):
    image.put64(image.normal()[0][0], 0)


@damage("v3", "c4k", "ext", snapshots=False)
def l2_entry_cleared_plain(image):
    image.put64(image.normal()[0][0], 0)


@damage("v3", "c4k", "r1")
def l2_entry_points_at_l2(image):
    image.put64(image.normal()[0][0], image.l1()[0][1])


@damage("v3", "c4k", "r1")
def l2_entry_points_at_refblock(image):
    image.put64(image.normal()[0][0], COPIED | image.refblocks()[0][1])


@damage("v3", "c4k")
def l2_entry_points_at_reftable(image):
    image.put64(image.normal()[0][0], COPIED | image.reftable)


@damage("v3", "c4k", "meta")
def zero_alloc(image):
    for at, entry in image.normal()[:2]:
        image.put64(at, entry | 1)


@damage("v3", "c4k")
def zero_alloc_unaligned(image):
    at, entry = image.normal()[0]
    image.put64(at, entry | 1 | 0x400)


@damage("v3", "c4k", "ext")
def zero_alloc_behind_end_of_file(image):
    at, entry = image.normal()[0]
    image.put64(at, COPIED | (image.end + 5) << image.cluster_bits | 1)


@damage("v2")
def zero_flag_in_v2(image):
    at, entry = image.normal()[0]
    image.put64(at, entry | 1)


@damage("ext")
def extended_bitmap_contradiction(image):
    at, _entry = image.normal()[0]
    image.put64(at + 8, (1 << 64) - 1)


@damage("ext")
def extended_bitmap_without_offset(image):
    at, _entry = image.normal()[0]
    image.put64(at, 0)
    image.put64(at + 8, 5)


@damage("ext")
def extended_zero_bit(image):
    at, entry = image.normal()[0]
    image.put64(at, entry | 1)


@damage("ext")
def extended_compressed_bitmap(image):
    at, _entry = image.compressed()[0]
    image.put64(at + 8, 1)


@damage("ext")
def extended_unaligned_data(image):
    at, entry = image.normal()[0]
    image.put64(at, entry + 512)


@damage("ext")
def extended_unaligned_zero(image):
    """The only one of the entries that do not fit their place which can be mended: nothing is lost with it."""
    at, entry = image.normal()[0]
    image.put64(at, entry + 512)
    image.put64(at + 8, 0xFF << 32)


@damage("ext")
def extended_room_without_data(image):
    at, _entry = image.normal()[0]
    image.put64(at + 8, 0)


@damage("ext")
def extended_both_without_offset(image):
    at, _entry = image.normal()[0]
    image.put64(at, 0)
    image.put64(at + 8, 1 << 32 | 1)


@damage("ext")
def extended_copied_without_offset(image):
    at, _entry = image.normal()[0]
    image.put64(at, COPIED)
    image.put64(at + 8, 7)


@damage("ext")
def extended_reserved_and_contradiction(image):
    at, entry = image.normal()[0]
    image.put64(at, entry | 1 << 58)
    image.put64(at + 8, 1 << 32 | 1)


@damage("ext")
def extended_contradiction_in_a_snapshot(image):
    at, _entry = image.normal(*image.snapshot_l1())[0]
    image.put64(at + 8, (1 << 64) - 1)


@damage("ext")
def extended_used_twice(image):
    image.put64(image.normal()[1][0], image.normal()[0][1])


@damage("ext", "lazy")
def dirty_bit_and_counts_of_tables_lost(image):
    image.put64(72, image.u64(72) | 1)
    for _at, entry in image.l1():
        image.set_refcount((entry & OFFSET) >> image.cluster_bits, 0)


@damage("v3", "c4k", "ext", "v2", "c512")
def compressed_copied(image):
    at, entry = image.compressed()[0]
    image.put64(at, entry | COPIED)


@damage("v3", "c4k", "ext", "v2", "r2")
def compressed_behind_end_of_file(image):
    at, _entry = image.compressed()[0]
    image.put64(at, COMPRESSED | 1 << 62 - (image.cluster_bits - 8) | (image.end + 2) << image.cluster_bits)


@damage("v3", "c4k", "ext")
def compressed_across_end_of_file(image):
    at, _entry = image.compressed()[0]
    image.put64(at, COMPRESSED | 7 << 62 - (image.cluster_bits - 8) | (image.end << image.cluster_bits) - 700)


@damage("v3", "c4k", "c512", "r1", "r8")
def compressed_longer(image):
    at, entry = image.compressed()[0]
    image.put64(at, entry | ((1 << (image.cluster_bits - 8)) - 1) << 62 - (image.cluster_bits - 8))


@damage("v3", "c4k", "r1", "r2", "r4", "r8")
def compressed_cluster_shared_often(image):
    at, entry = image.compressed()[0]
    base = (image.l1()[-1][1] & OFFSET) + image.entry_size * 4
    for index in range(40):
        image.put64(base + image.entry_size * index, entry)


@damage("v3", "c4k", "v2", "c512")
def l1_entry_unaligned(image):
    at, entry = image.l1()[0]
    image.put64(at, entry + 0x200 if image.cluster > 512 else entry | 0x10)


@damage("v3", "c4k", "v2")
def l1_entry_behind_end_of_file(image):
    image.put64(image.l1()[0][0], COPIED | (image.end + 2) << image.cluster_bits)


@damage("v3", "c4k", "v2")
def l1_entry_at_end_of_file(image):
    image.put64(image.l1()[0][0], COPIED | image.end << image.cluster_bits)


@damage("v3", "c4k")
def l1_entry_huge(image):
    image.put64(image.l1()[0][0], COPIED | 0x00FFFFFFFFF00000)


@damage("v3", "c4k", "v2")
def l1_entry_reserved_bits(image):
    at, entry = image.l1()[0]
    image.put64(at, entry | 1 << 60 | 2)


@damage("c4k", "c512", "r1")
def l1_entry_duplicate(image):
    entries = image.l1()
    image.put64(entries[0][0], entries[-1][1])


@damage("v3", "c4k")
def l1_entry_zero(image):
    image.put64(image.l1()[0][0], 0)


@damage("v3", "c4k")
def l1_entry_at_itself(image):
    image.put64(image.l1()[0][0], COPIED | image.l1_offset)


@damage("v3", "c4k")
def l1_entry_at_header(image):
    image.put64(image.l1()[0][0], 1 << image.cluster_bits - 1 if image.cluster_bits > 9 else 512)


@damage("v3", "c4k", "v2")
def refblock_unaligned(image):
    image.put64(image.reftable, image.u64(image.reftable) + 0x200)


@damage("v3", "c4k", "v2", "r1")
def refblock_behind_end_of_file(image):
    image.put64(image.reftable + 8, (image.end + 4) << image.cluster_bits)


@damage("v3", "c4k", "v2", "r64")
def refblock_only_one_behind_end_of_file(image):
    image.put64(image.reftable, (image.end + 4) << image.cluster_bits)


@damage("v3", "c4k")
def refblock_huge(image):
    image.put64(image.reftable + 16, 0x7FFFFFFFFFF00000)


@damage("v3", "c4k")
def refblock_very_far(image):
    image.put64(image.reftable + 16, 0x00000FFFFFF00000)


@damage("v3", "c4k")
def refblock_reserved_bits(image):
    image.put64(image.reftable, image.u64(image.reftable) | 6)


@damage("v3", "c4k", "v2", "r1", "r64", "c512", "ext")
def refblock_missing(image):
    image.put64(image.reftable, 0)


@damage("v3", "c4k", "v2", "c512", snapshots=False)
def refblock_missing_plain(image):
    image.put64(image.reftable, 0)


@damage("v3", "c4k", "c512", "r1")
def refblock_double(image):
    image.put64(image.reftable + 8, image.u64(image.reftable))


@damage("v3", "c4k", "r2")
def refblock_is_data(image):
    image.put64(image.reftable, image.normal()[0][1] & OFFSET)


@damage("v3", "c4k")
def refblock_is_header(image):
    image.put64(image.reftable + 8, image.l1_offset)


@damage("v3", "c4k", "r1", "r64", "c512")
def refblock_zeroed(image):
    offset = image.u64(image.reftable)
    image.data[offset : offset + image.cluster] = bytes(image.cluster)


@damage("v3", "c4k", "r1", "r32")
def refblock_of_ones(image):
    offset = image.u64(image.reftable)
    image.data[offset : offset + min(image.cluster, 2048)] = b"\xff" * min(image.cluster, 2048)


@damage("v3", "c4k", "v2")
def reftable_moved_far(image):
    image.put64(48, (image.end + 7) << image.cluster_bits)


@damage("v3", "c4k")
def reftable_unaligned(image):
    image.put64(48, image.reftable + 512)


@damage("v3", "c4k", "v2")
def reftable_empty(image):
    image.put32(56, 0)


@damage("v3", "c4k")
def reftable_larger(image):
    image.put32(56, image.reftable_clusters + 1)


@damage("v3", "c4k")
def reftable_too_large(image):
    image.put32(56, 1 << 20)


@damage("v3", "c4k")
def reftable_is_l1(image):
    image.put64(48, image.l1_offset)


@damage("v3", "c4k")
def l1_table_moved_far(image):
    image.put64(40, (image.end + 7) << image.cluster_bits)


@damage("v3", "c4k")
def l1_table_unaligned(image):
    image.put64(40, image.l1_offset + 8)


@damage("c512", "c4k")
def l1_table_too_small(image):
    image.put32(36, 0)


@damage("v3", "c4k")
def l1_table_larger(image):
    image.put32(36, image.l1_size + 900)


@damage("v3", "c4k", "r4")
def snapshot_l1_unaligned(image):
    image.put64(image.snapshots_offset, image.snapshot_l1()[0] + 8)


@damage("v3", "c4k")
def snapshot_l1_behind_end_of_file(image):
    image.put64(image.snapshots_offset, (image.end + 9) << image.cluster_bits)


@damage("v3", "c4k")
def snapshot_l1_too_large(image):
    image.put32(image.snapshots_offset + 8, 0x7FFFFFFF)


@damage("v3", "c4k")
def snapshot_l1_entry_unaligned(image):
    at, entry = image.l1(*image.snapshot_l1())[0]
    image.put64(at, entry + 512)


@damage("v3", "c4k")
def snapshot_l2_entry_unaligned(image):
    at, entry = image.normal(*image.snapshot_l1())[0]
    image.put64(at, entry + 512)


@damage("v3", "c4k", "v2")
def snapshot_count_zero(image):
    image.put32(60, 0)


@damage("v3", "c4k")
def snapshot_count_too_high(image):
    image.put32(60, 3)


@damage("v3", "c4k")
def snapshot_count_absurd(image):
    image.put32(60, 70000)


@damage("v3", "c4k")
def snapshot_table_unaligned(image):
    image.put64(64, image.snapshots_offset + 8)


@damage("v3", "c4k")
def snapshot_table_behind_end_of_file(image):
    image.put64(64, (image.end + 9) << image.cluster_bits)


@damage("v3", "c4k")
def snapshot_extra_data_short(image):
    image.put32(image.snapshots_offset + 36, 8)


@damage("v3", "c4k")
def snapshot_extra_data_long(image):
    image.put32(image.snapshots_offset + 36, 2000)


@damage("v3", "c4k")
def snapshot_extra_data_odd(image):
    image.put32(image.snapshots_offset + 36, 12)


@damage("v3", "c4k")
def snapshot_name_is_cut(image):
    """A NUL byte ends it."""
    at = image.snapshots_offset + 40 + image.u32(image.snapshots_offset + 36)
    image.data[at + 2] = 0


@damage("v3", "c4k")
def snapshot_table_on_data(image):
    image.put64(64, image.normal()[0][1] & OFFSET)


@damage("v3", "c4k", "ext")
def snapshot_l1_is_the_active_one(image):
    image.put64(image.snapshots_offset, image.l1_offset)


@damage("v3", "c4k")
def snapshot_name_long(image):
    image.put16(image.snapshots_offset + 14, 65535)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_directory_unaligned(image):
    image.put64(image.bitmaps + 16, image.bitmap_directory + 8)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_directory_behind_end_of_file(image):
    image.put64(image.bitmaps + 16, (image.end + 8) << image.cluster_bits)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_directory_size_zero(image):
    image.put64(image.bitmaps + 8, 0)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_directory_size_wrong(image):
    image.put64(image.bitmaps + 8, image.u64(image.bitmaps + 8) + 8)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_count_zero(image):
    image.put32(image.bitmaps, 0)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_count_wrong(image):
    image.put32(image.bitmaps, 3)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_table_unaligned(image):
    image.put64(image.bitmap_directory, image.u64(image.bitmap_directory) + 8)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_table_behind_end_of_file(image):
    image.put64(image.bitmap_directory, (image.end + 8) << image.cluster_bits)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_table_entry_unaligned(image):
    image.put64(image.u64(image.bitmap_directory), (3 << image.cluster_bits) + 512)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_table_entry_reserved(image):
    image.put64(image.u64(image.bitmap_directory), 3 << 57)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_table_entry_data(image):
    image.put64(image.u64(image.bitmap_directory), image.append() << image.cluster_bits)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_table_entry_data_far(image):
    image.put64(image.u64(image.bitmap_directory), (image.end + 3) << image.cluster_bits)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_flags_reserved(image):
    image.put32(image.bitmap_directory + 12, 0xFF)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_name_twice(image):
    second = image.data.index(b"b1", image.bitmap_directory)
    image.data[second + 1 : second + 2] = b"0"


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_name_empty(image):
    image.put16(image.bitmap_directory + 18, 0)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_name_too_long(image):
    image.put16(image.bitmap_directory + 18, 0xFFFF)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_type_unknown(image):
    image.data[image.bitmap_directory + 16] = 2


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_granularity_fine(image):
    image.data[image.bitmap_directory + 17] = 8


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_granularity_coarse(image):
    image.data[image.bitmap_directory + 17] = 31


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_extra_data(image):
    image.put32(image.bitmap_directory + 20, 8)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_table_longer(image):
    image.put32(image.bitmap_directory + 8, 2)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_table_enormous(image):
    image.put32(image.bitmap_directory + 8, 0x7FFFFFFF)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_table_entry_all_ones_and_offset(image):
    image.put64(image.u64(image.bitmap_directory), 3 << image.cluster_bits | 1)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_in_use_with_a_wrong_table(image):
    """Of what is in use only the place counts."""
    image.put32(image.bitmap_directory + 12, 1)
    image.put32(image.bitmap_directory + 8, 3)


@damage("v3", "c4k", snapshots=False, bitmaps=True)
def bitmap_autoclear_lost(image):
    image.put64(88, 0)


@damage("v3", "c4k")
def dirty_bit(image):
    image.put64(72, image.u64(72) | 1)


@damage("v3", "c4k", "ext")
def dirty_bit_and_leak(image):
    image.put64(72, image.u64(72) | 1)
    image.set_refcount(image.append(), 1)


@damage("lazy", "c4k")
def dirty_bit_and_refcounts_lost(image):
    image.put64(72, image.u64(72) | 1)
    for _at, entry in image.normal()[2:7]:
        image.set_refcount((entry & OFFSET) >> image.cluster_bits, 0)


@damage("v3", "c4k")
def corrupt_bit(image):
    image.put64(72, image.u64(72) | 2)


@damage("v3", "c4k")
def corrupt_bit_and_damage(image):
    image.put64(72, image.u64(72) | 2)
    at, entry = image.normal()[0]
    image.put64(at, entry + 512)


@damage("v3", "c4k")
def corrupt_bit_and_leak(image):
    image.put64(72, image.u64(72) | 2)
    image.set_refcount(image.append(), 1)


@damage("v3", "c4k", "c512", "v2")
def file_cut(image):
    del image.data[len(image.data) * 2 // 3 // 512 * 512 :]


@damage("v3", "c4k", "c512")
def file_cut_unaligned(image):
    del image.data[len(image.data) * 2 // 3 + 77 :]


@damage("v3", "c4k")
def file_cut_short(image):
    del image.data[3 * image.cluster + 100 :]


@damage("v3", "c4k")
def file_longer(image):
    image.append(5)


@damage("v3", "c4k")
def file_longer_by_bytes(image):
    image.data.extend(b"abc")


@damage("v3", "c4k", "c512", "r1")
def several(image):
    at, entry = image.normal()[0]
    image.put64(at, entry + 512 if image.cluster > 512 else entry)
    image.set_refcount(image.append(), 1)
    image.set_refcount((image.normal()[3][1] & OFFSET) >> image.cluster_bits, 0)
    at, entry = image.normal()[4]
    image.put64(at, entry ^ COPIED)


def build(name, path, cache):
    """Make the image of one case at `path`; `cache` is a folder where undamaged images are kept."""
    variant, recipe, function = DAMAGES[name]
    base = os.path.join(cache, "%s%s.qcow2" % (variant, "".join("-%s-%s" % item for item in sorted(recipe.items()))))
    if not os.path.exists(base):
        make(base, variant, **recipe)
    with open(base, "rb") as source, open(path, "wb") as target:
        target.write(source.read())
    image = Editor(path)
    function(image)
    image.save()
