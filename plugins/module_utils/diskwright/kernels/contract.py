# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What every kernel promises, whichever twin answers (https://www.qemu.org/docs/master/interop/qcow2.html for the qcow2 tables).

A kernel takes buffers, file descriptors and integers, and returns integers, arrays or lists of tuples of integers. Rules for all:

* `buffer`, `table`, `block`, `bitmap`, `a`, `b`: any C-contiguous buffer object, seen as bytes. Nobody else may write to it during the call.
* Offsets and lengths are bytes; `start`, `count` and a returned `index` count entries from the beginning of the table.
* Arguments outside their range are a ValueError, checked before any work is done; arguments of a wrong type are a TypeError.
* `limit` bounds the length of a returned list: the kernel stops after that many runs, and its caller goes on from the end of the last.
* The native twin releases the GIL while it works.

gather(reads, buffer) -> None
    `reads` are tuples (fd, file_offset, buffer_offset, length). Each is read in full; what lies past the end of its file becomes zero bytes.
    OSError with its errno if a read fails.
scatter(writes, buffer) -> None
    The same tuples, written in full and in their order. OSError with its errno if a write fails.
nonzero_runs(buffer, offset, length, unit) -> list[(offset, length)]
    The maximal runs of units (counted from `offset`; the last may be short) that hold a byte other than zero. Returned offsets count from the
    beginning of the buffer.
first_difference(a, b) -> int
    The index of the first byte that differs, -1 if there is none. The lengths must be equal.
difference_runs(a, b, unit) -> list[(offset, length)]
    The maximal runs of units in which the buffers differ. The lengths must be equal.
table_runs(table, width, big_endian, start, count, step, limit) -> list[(index, count, value, step_used)]
    Entries of `width` 4 or 8 bytes, taken greedily: equal ones (step_used 0), or ones that ascend by `step` (step_used = step). A single entry has
    step_used 0. `value` is the first entry's.
l2_runs(table, start, count, cluster_size, data_file, limit) -> list[(index, count, kind, value)]
    Standard qcow2 L2 entries. The kinds are constants below; COPIED is added to ZERO_ALLOC and NORMAL. `value` is the first host offset of
    ZERO_ALLOC and NORMAL, whose runs ascend by `cluster_size`; bits 0..61 of the entry of COMPRESSED, which is one run per entry; else 0.
    With `data_file`, a COPIED entry at host offset 0 is NORMAL.
l2_runs_extended(table, start, count, cluster_size, data_file, limit) -> list[(index, count, kind, value)]
    Extended L2 entries of 16 bytes. `start` and `count` are entries; the returned index and count are subclusters, 32 for each entry, and a COMPRESSED run
    is one whole entry. UNALLOCATED includes subclusters that have room in the file but no data. INVALID, value 0: the bitmap contradicts itself or its entry.
refcounts_unpack(block, order, start, count) -> array('Q')
    Refcounts of 2**order bits, order 0..6: below 8 bits packed from the least significant bit of each byte on, above in big-endian order.
refcounts_pack(values, order) -> bytes
    The inverse, of any sequence of ints. OverflowError if one does not fit; ValueError unless they fill whole bytes.
refcount_free_runs(block, order, start, count, limit) -> list[(index, count)]
    The maximal runs of refcounts that are zero.
tally(counts, ranges) -> int
    `counts` is a writable buffer of native H, I or Q items, `ranges` tuples (start, count) in items: each item of each range goes up by one and
    stops at its largest value; what lies outside `counts` is ignored. Returns the number of increments that were lost to that.
refcount_mismatches(block, order, counts, start, count, limit) -> list[(index, stored, counted)]
    Refcounts 0..count of a block that differ from counts[start : start + count]; `counts` as for tally.
bit_runs(bitmap, start, count, limit) -> list[(start, count)]
    The maximal runs of bits that are set; bit 0 is the least significant one of byte 0.
crc32c(buffer, crc=0) -> int
    CRC-32C (Castagnoli), https://www.rfc-editor.org/rfc/rfc3720#appendix-B.4; `crc` is the result over what came before.
"""

from __future__ import annotations

ABI = 2  # goes up whenever a signature, a result or an error of any kernel changes

KERNELS = (
    "gather",
    "scatter",
    "nonzero_runs",
    "first_difference",
    "difference_runs",
    "table_runs",
    "l2_runs",
    "l2_runs_extended",
    "refcounts_unpack",
    "refcounts_pack",
    "refcount_free_runs",
    "tally",
    "refcount_mismatches",
    "bit_runs",
    "crc32c",
)

# What the native module has in addition; compression.py knows who stands in for them.
#
# deflate(buffer, level, window_bits) -> bytes
#     One stream with the bytes of the buffer; `level` 0..9, `window_bits` as zlib's: -15..-9 bare, 9..15 in a zlib wrapper. ValueError beyond those.
# inflate(buffer, limit, window_bits) -> bytes
#     The first bytes, `limit` at most, of a stream: fewer where it ends or is cut off before. ValueError if it is damaged.
CODECS = ("deflate", "inflate", "zstd_compress", "zstd_decompress")

# And these; crypto/ciphers.py and crypto/hashes.py know who stands in for them.
#
# sectors_crypt(buffer, cipher, mode, key, ivgen, iv_key, sector, encrypt) -> None
#     Encrypt or decrypt whole sectors of 512 bytes in place; the first has the number `sector`. `cipher` is aes, serpent, twofish or cast5, `mode` ecb,
#     cbc, ctr or xts (whose key is two keys), `ivgen` plain, plain64 or essiv (with its key, of the same cipher). ValueError for what does not go together.
# pbkdf2(hash, password, salt, iterations, length) -> bytes
#     As hashlib.pbkdf2_hmac, for sha1 and sha256; it uses a processor for each block of the key.
CIPHERS = ("sectors_crypt", "pbkdf2")

# Kinds of l2_runs and l2_runs_extended.
UNALLOCATED = 0
ZERO_PLAIN = 1
ZERO_ALLOC = 2
NORMAL = 3
COMPRESSED = 4
INVALID = 5
COPIED = 8
