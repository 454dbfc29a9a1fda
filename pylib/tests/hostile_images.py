# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""One tiny image for each known attack on a reader of raw and qcow2 (https://www.qemu.org/docs/master/interop/qcow2.html).

An attack is a function of a path: it writes its image there (and what belongs to it beside it).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

COPIED = 1 << 63
COMPRESSED = 1 << 62

Attack = Callable[[Path], None]
ATTACKS: dict[str, Attack] = {}

# name -> (offset, struct code)
FIELDS = {
    "magic": (0, ">I"),
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible_features": (72, ">Q"),
    "compatible_features": (80, ">Q"),
    "autoclear_features": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression_type": (104, ">B"),
}

BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS = 0x23852875


class Draft:
    """An image under construction: header, refcount table, one block, L1, one L2 and one data cluster, in clusters 0 to 5."""

    def __init__(self, cluster_bits: int = 12, size: int = 1 << 20, **fields: int) -> None:
        self.cluster = cluster = 1 << cluster_bits
        self.pieces: dict[int, bytes] = {}
        self.table, self.block, self.l1, self.l2, self.data = (cluster * number for number in range(1, 6))
        reach = cluster * (cluster // 8)
        self.fields: dict[str, int] = {
            "magic": 0x514649FB,
            "version": 3,
            "cluster_bits": cluster_bits,
            "size": size,
            "l1_size": -(-size // reach),
            "l1_table_offset": self.l1,
            "refcount_table_offset": self.table,
            "refcount_table_clusters": 1,
            "refcount_order": 4,
            "header_length": 112,
            **fields,
        }
        self.extensions = b""
        self.put(self.table, u64(self.block))
        self.put(self.block, struct.pack(">6H", 1, 1, 1, 1, 1, 1))
        self.put(self.l1, u64(self.l2 | COPIED))
        self.put(self.l2, u64(self.data | COPIED))
        self.put(self.data, b"data" * (cluster // 4))

    def put(self, offset: int, data: bytes) -> None:
        self.pieces[offset] = data

    def extension(self, kind: int, data: bytes, length: int | None = None) -> None:
        self.extensions += struct.pack(">II", kind, len(data) if length is None else length) + data + bytes(-len(data) % 8)

    def backing(self, name: str | bytes, kind: str = "") -> None:
        if kind:
            self.extension(BACKING_FORMAT, kind.encode())
        raw = os.fsencode(name)
        self.fields.update(backing_file_offset=112 + len(self.extensions) + 8, backing_file_size=len(raw))
        self.name = raw

    def save(self, path: Path, length: int = 0) -> None:
        """Write it, and make the file `length` bytes long if that is more."""
        header = bytearray(112)
        for name, value in self.fields.items():
            offset, code = FIELDS[name]
            struct.pack_into(code, header, offset, value)
        if self.fields["version"] < 3:
            header = header[:72]
        with open(path, "wb") as file:
            for offset, data in self.pieces.items():
                file.seek(offset)
                file.write(data)
            file.seek(0)
            file.write(bytes(header) + self.extensions + bytes(8) + getattr(self, "name", b""))
            if length > file.seek(0, 2):
                file.truncate(length)


def u64(*values: int) -> bytes:
    return struct.pack(">%dQ" % len(values), *values)


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__.replace("_", "-")] = function
    return function


def header(name: str, **fields: int) -> None:
    """An attack that is nothing but numbers in the header."""

    def write(path: Path) -> None:
        draft = Draft()
        draft.fields.update(fields)
        draft.save(path)

    ATTACKS["header-" + name] = write


def add(name: str, write: Attack) -> None:
    ATTACKS[name] = write


# -- numbers of the header -------------------------------------------------------------------------------------------

MAX32, MAX64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF

for bits in (0, 8, 22, 31, 63, MAX32):
    header("cluster-bits-%d" % bits, cluster_bits=bits)
for order in (7, 64, MAX32):
    header("refcount-order-%d" % order, refcount_order=order)
for length in (0, 103, 4097, MAX32):
    header("length-%d" % length, header_length=length)
header("l1-huge", l1_size=MAX32)
header("l1-above-limit", l1_size=(4 << 20) + 1)
header("l1-at-limit", l1_size=4 << 20)
header("l1-too-small", l1_size=0)
header("refcount-table-huge", refcount_table_clusters=MAX32)
header("refcount-table-above-limit", refcount_table_clusters=2049)
header("refcount-table-at-limit", refcount_table_clusters=2048)
header("refcount-table-none", refcount_table_clusters=0)
for field in ("l1_table_offset", "refcount_table_offset", "snapshots_offset"):
    for value in (1, 0x800, 1 << 56, 1 << 62, 1 << 63, MAX64 - 4095, MAX64):
        header("%s-%#x" % (field.replace("_", "-"), value), **{field: value})
for size in (1, 511, (1 << 56) + 1, 1 << 63, MAX64):
    header("size-%#x" % size, size=size)
header("backing-offset-max", backing_file_offset=MAX64, backing_file_size=10)
header("backing-offset-behind-cluster", backing_file_offset=4097, backing_file_size=10)
header("backing-offset-in-record", backing_file_offset=8, backing_file_size=8)
header("backing-name-long", backing_file_offset=200, backing_file_size=1024)
header("backing-name-huge", backing_file_offset=200, backing_file_size=MAX32)
header("backing-name-across-cluster", backing_file_offset=4090, backing_file_size=10)
header("snapshots-too-many", nb_snapshots=65537, snapshots_offset=4096)
header("snapshots-huge", nb_snapshots=MAX32, snapshots_offset=4096)
header("snapshots-are-header", nb_snapshots=3, snapshots_offset=0)
for version in (0, 1, 4, MAX32):
    header("version-%d" % version, version=version)
for method in (1, 3, MAX32):
    header("crypt-%d" % method, crypt_method=method)
header("compression-255", compression_type=255, incompatible_features=8)
header("features-all", incompatible_features=MAX64, compatible_features=MAX64, autoclear_features=MAX64)
header("features-unknown", incompatible_features=1 << 63 | 1 << 5)
header("autoclear-all", autoclear_features=MAX64)
header("corrupt", incompatible_features=2)
header("dirty", incompatible_features=1)
header("data-file-without-name", incompatible_features=4)
header("extended-l2-small-clusters", incompatible_features=16)


@attack
def extension_length_huge(path: Path) -> None:
    draft = Draft()
    draft.extension(0x12345678, b"", MAX32)
    draft.save(path)


@attack
def extension_behind_cluster(path: Path) -> None:
    draft = Draft()
    draft.extension(0x12345678, bytes(3900), 3980)
    draft.save(path)


@attack
def extensions_many(path: Path) -> None:
    draft = Draft(21, 1 << 30)
    draft.extensions = struct.pack(">II", 0x12345678, 0) * ((draft.cluster - 112) // 8 - 1)
    draft.save(path)


@attack
def extension_backing_format_long(path: Path) -> None:
    draft = Draft()
    draft.extension(BACKING_FORMAT, b"x" * 16)
    draft.save(path)


@attack
def feature_names_hostile(path: Path) -> None:
    draft = Draft(incompatible_features=0xF << 40)
    names = [b"\x1b[2J\x1b[31m", b"new\nline", b"\xff\xfe\x80", b"x" * 46]
    draft.extension(FEATURE_NAMES, b"".join(bytes((0, 40 + bit)) + name.ljust(46, b"\0") for bit, name in enumerate(names)))
    draft.save(path)


def luks_header(**slot: int) -> bytes:
    """A LUKS header that is whole, but for what `slot` says of key slot 0."""
    fields = (b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256", 4040, 64, bytes(20), bytes(32), 1000, b"uuid")
    header = struct.pack(">6sH32s32s32sII20s32sI40s", *fields)
    for number in range(8):
        values = {"active": 0xDEAD if number else 0xAC71F3, "iterations": 1000, "offset": 8 + 504 * number, "stripes": 4000, **(slot if not number else {})}
        header += struct.pack(">II32sII", values["active"], values["iterations"], bytes(32), values["offset"], values["stripes"])
    return header


def encrypted(name: str, header: bytes, offset: int = 6 * 4096, length: int = 4040 * 512) -> None:
    """An image with a LUKS header at `offset`, `length` bytes long as the image has it."""

    def make(path: Path) -> None:
        draft = Draft(crypt_method=2)
        draft.extension(0x0537BE77, struct.pack(">QQ", offset, length))
        draft.put(6 * 4096, header)
        draft.save(path)

    ATTACKS["luks-" + name] = make


encrypted("endless", luks_header(), length=MAX64)
encrypted("behind-the-end", luks_header(), offset=1 << 62)
encrypted("negative", luks_header(), offset=MAX64 - 4095)
encrypted("iterations", luks_header(iterations=MAX32))
encrypted("material-far-away", luks_header(offset=MAX32))
encrypted("stripes", luks_header(stripes=MAX32))


@attack
def data_file_hostile_name(path: Path) -> None:
    draft = Draft(incompatible_features=4)
    draft.extension(0x44415441, b"nbd://127.0.0.1:1/\xff\n")
    draft.save(path)


@attack
def snapshot_extra_data_huge(path: Path) -> None:
    draft = Draft(nb_snapshots=1, snapshots_offset=6 << 12)
    draft.put(6 << 12, struct.pack(">QIHHIIQII", 0, 0, 1, 1, 0, 0, 0, 0, MAX32))
    draft.save(path)


@attack
def snapshot_table_oversize(path: Path) -> None:
    draft = Draft(nb_snapshots=600, snapshots_offset=1 << 20)
    for number in range(600):
        draft.put((1 << 20) + number * 131128, struct.pack(">QIHHIIQII", 0, 0, 65535, 65535, 0, 0, 0, 0, 16))
    draft.save(path)


@attack
def snapshot_l1_huge(path: Path) -> None:
    draft = Draft(nb_snapshots=1, snapshots_offset=6 << 12)
    draft.put(6 << 12, struct.pack(">QIHHIIQII", 0, 1 << 24, 1, 1, 0, 0, 0, 0, 24) + bytes(24) + b"1a")
    draft.save(path)


@attack
def snapshot_hostile_name(path: Path) -> None:
    draft = Draft(nb_snapshots=1, snapshots_offset=6 << 12)
    name = b"\x1b[2J\n\xff\xfe\0hidden"
    fixed = struct.pack(">QIHHIIQII", 3 << 12, 1, 2, len(name), MAX32, MAX32, MAX64, MAX32, 24)
    draft.put(6 << 12, fixed + u64(MAX64, MAX64, MAX64) + b"\xff1" + name)
    draft.save(path)


for label, values in {
    "too-many": (65536, 0, 64, 6 << 12),
    "huge": (MAX32, 0, MAX64, 6 << 12),
    "directory-oversize": (1, 0, 1024 * 65535 + 1, 6 << 12),
    "none": (0, 0, 0, 6 << 12),
    "reserved": (1, 1, 64, 6 << 12),
    "unaligned": (1, 0, 64, 1),
}.items():

    def write_bitmaps(path: Path, values: tuple[int, ...] = values) -> None:
        draft = Draft(autoclear_features=1)
        draft.extension(BITMAPS, struct.pack(">IIQQ", *values))
        draft.save(path)

    add("bitmaps-" + label, write_bitmaps)


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(name: str, **places: int) -> None:
    """An attack in which a table has an entry that it should not have: the keyword names the table, the value is the entry."""

    def write(path: Path) -> None:
        draft = Draft()
        for table, entry in places.items():
            draft.put(getattr(draft, table), u64(entry))
        draft.save(path)

    ATTACKS["tables-" + name] = write


TABLE, BLOCK, L1, L2, DATA = (4096 * number for number in range(1, 6))
tables("l1-to-header", l1=COPIED)
tables("l1-to-itself", l1=COPIED | L1)
tables("l1-to-refcount-table", l1=COPIED | TABLE)
tables("l1-to-refcount-block", l1=COPIED | BLOCK)
tables("l1-unaligned", l1=COPIED | L2 | 512)
tables("l1-behind-end", l1=COPIED | 1 << 40)
tables("l1-far", l1=COPIED | (1 << 56) - 4096)
tables("l1-reserved", l1=L2 | 0x7F000000000001FF)
tables("l2-to-itself", l2=COPIED | L2)
tables("l2-to-l1", l2=COPIED | L1)
tables("l2-to-refcount-block", l2=COPIED | BLOCK)
tables("l2-unaligned", l2=COPIED | DATA | 512)
tables("l2-behind-end", l2=COPIED | 1 << 40)
tables("l2-far", l2=COPIED | (1 << 56) - 4096)
tables("l2-copied-zero", l2=COPIED)
tables("l2-zero-with-offset", l2=COPIED | L2 | 1)
tables("refcounts-table-in-itself", table=TABLE)
tables("refcounts-block-is-header", table=4096 * 16)
tables("refcounts-block-is-l1", table=L1)
tables("refcounts-block-far", table=1 << 55)
tables("refcounts-block-very-far", table=(1 << 64) - 4096)
tables("refcounts-block-unaligned", table=BLOCK | 512)
tables("refcounts-none", table=0)
tables("compressed-far", l2=COMPRESSED | (1 << 58) - 512)
tables("compressed-longest", l2=COMPRESSED | (1 << 62) - 1)
tables("compressed-of-header", l2=COMPRESSED)
tables("compressed-copied", l2=COMPRESSED | COPIED | DATA)


PLACE = 5 << 14  # of the data, with clusters of 16 KiB


def extended(name: str, entry: int, bitmap: int) -> None:
    """An attack that is one extended L2 entry."""

    def write(path: Path) -> None:
        draft = Draft(14, incompatible_features=16)
        draft.put(draft.l2, u64(entry, bitmap))
        draft.save(path)

    ATTACKS["extended-" + name] = write


extended("contradiction", COPIED | PLACE, MAX64)
extended("data-nowhere", 0, MAX32)
extended("far", COPIED | (1 << 56) - (1 << 14), MAX32)
extended("header", COPIED | 1 << 60, MAX32)
extended("compressed-bitmap", COMPRESSED | PLACE, MAX64)


@attack
def extended_shared(path: Path) -> None:
    """All entries lead to one cluster, with every second subcluster in it: as many extents as there can be."""
    draft = Draft(14, 64 << 20, incompatible_features=16, l1_size=4)
    draft.put(draft.l1, u64(draft.l2) * draft.fields["l1_size"])
    draft.put(draft.l2, u64(draft.data, 0x55555555 | 0xAAAAAAAA << 32) * 1024)
    draft.save(path)


@attack
def tables_shared_l2(path: Path) -> None:
    """All L1 entries lead to one L2 table, all its entries to one cluster: 64 MiB from 24 KiB."""
    draft = Draft(size=64 << 20)
    draft.put(draft.l1, u64(draft.l2) * draft.fields["l1_size"])
    draft.put(draft.l2, u64(draft.data) * 512)
    draft.save(path)


@attack
def bomb_shared_compressed(path: Path) -> None:
    """All entries lead to one compressed cluster."""
    draft = Draft(size=64 << 20)
    codec = zlib.compressobj(9, zlib.DEFLATED, -12)
    stored = codec.compress(b"bomb" * 1024) + codec.flush()
    draft.put(draft.l1, u64(draft.l2) * draft.fields["l1_size"])
    draft.put(draft.l2, u64(COMPRESSED | draft.data) * 512)
    draft.put(draft.data, stored.ljust(4096, b"\0"))
    draft.save(path)


@attack
def bomb_long_stream(path: Path) -> None:
    """A compressed cluster whose stream goes on for a hundred times its size."""
    draft = Draft(21, 4 << 20)
    codec = zlib.compressobj(9, zlib.DEFLATED, -15)
    stored = codec.compress(bytes(400 << 20)) + codec.flush()
    draft.put(draft.l2, u64(COMPRESSED | ((len(stored) - 1) // 512) << (62 - 13) | draft.data))
    draft.put(draft.data, stored)
    draft.save(path)


@attack
def bomb_zstd_window(path: Path) -> None:
    """A zstd frame that wants a window of 3.75 TiB."""
    draft = Draft(incompatible_features=8, compression_type=1)
    draft.put(draft.l2, u64(COMPRESSED | draft.data))
    draft.put(draft.data, b"\x28\xb5\x2f\xfd\x00\xff" + b"\x4b\x00\x00a".ljust(4000, b"a"))
    draft.save(path)


@attack
def bomb_zstd_content_size(path: Path) -> None:
    """A zstd frame that claims 2^63 bytes."""
    draft = Draft(incompatible_features=8, compression_type=1)
    draft.put(draft.l2, u64(COMPRESSED | draft.data))
    draft.put(draft.data, b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 63) + b"\x4b\x00\x00a".ljust(4000, b"a"))
    draft.save(path)


@attack
def compressed_at_end_of_file(path: Path) -> None:
    draft = Draft()
    draft.put(draft.l2, u64(COMPRESSED | (9 << 58) | draft.data))
    draft.put(draft.data, b"\x4b\x4c")
    draft.save(path)


@attack
def compressed_garbage(path: Path) -> None:
    draft = Draft()
    draft.put(draft.l2, u64(COMPRESSED | (7 << 58) | draft.data))
    draft.put(draft.data, b"\xff" * 4096)
    draft.save(path)


# -- sizes ------------------------------------------------------------------------------------------------------------


@attack
def size_one_exbibyte(path: Path) -> None:
    """The largest disk that qcow2 can have: 16 MiB of L1 table, none of it there."""
    draft = Draft(21, 1 << 60)
    for name in ("l2", "data"):
        del draft.pieces[getattr(draft, name)]
    draft.fields.update(l1_size=(1 << 60) // ((1 << 21) * (1 << 18)), l1_table_offset=4 << 21)
    draft.put(draft.l1, bytes(8))
    draft.save(path, 12 << 21)


@attack
def size_sparse_file(path: Path) -> None:
    """A host file of absurd length behind a small image."""
    Draft().save(path)
    absurd(path)


@attack
def size_sparse_refcounts(path: Path) -> None:
    """The same, with all entries of a large refcount table leading to one empty block."""
    draft = Draft(16, refcount_table_clusters=128, refcount_table_offset=1 << 20, refcount_order=6)
    draft.put(1 << 20, u64(2 << 20) * (1 << 20))
    draft.save(path)
    absurd(path)


@attack
def raw_sparse_file(path: Path) -> None:
    path.write_bytes(b"raw")
    absurd(path)


def absurd(path: Path) -> None:
    """Make a file as long as its file system lets it be."""
    for bits in (62, 58, 54, 50, 44, 43, 42, 41, 40):
        try:
            os.truncate(path, (1 << bits) - 65536)
            return
        except OSError:
            continue
    raise RuntimeError("no large files here")


@attack
def raw_empty(path: Path) -> None:
    path.write_bytes(b"")


@attack
def raw_magic_only(path: Path) -> None:
    path.write_bytes(b"QFI\xfb")


@attack
def raw_one_byte(path: Path) -> None:
    path.write_bytes(b"Q")


# -- names that an image stores ---------------------------------------------------------------------------------------


def backing(label: str, name: str | bytes, kind: str = "") -> None:
    def write(path: Path) -> None:
        draft = Draft()
        draft.backing(name, kind)
        draft.save(path)

    ATTACKS["backing-" + label] = write


def nested(depth: int) -> str:
    text: Any = "x"
    for _level in range(depth):
        text = {"file": text}
    return "json:" + json.dumps(text, separators=(",", ":"))


backing("missing", "nothing-here")
backing("missing-format", "nothing-here", "qcow2")
backing("itself", "image", "qcow2")
backing("itself-probed", "image")
backing("itself-dotted", "././image", "qcow2")
backing("itself-as-raw", "image", "raw")
backing("itself-json", 'json:{"driver":"qcow2","file":{"driver":"file","filename":"image"}}')
backing("itself-json-dotted", 'json:{"driver":"qcow2","file.driver":"file","file.filename":"image"}')
backing("itself-protocol", "file:image", "qcow2")
backing("directory", ".", "qcow2")
backing("directory-raw", "/", "raw")
backing("zero-device", "/dev/zero", "raw")
backing("null-device", "/dev/null", "raw")
backing("shadow", "/etc/shadow", "raw")
backing("unknown-protocol", "gopher://127.0.0.1/x")
backing("unknown-protocol-hostile", b"a\x1b[2J\xff:x")
backing("nbd", "nbd://127.0.0.1:1/x", "raw")
backing("unknown-format", "other", "zzz")
backing("format-is-protocol", "other", "file")
backing("format-hostile", "other", "\x1b[2J\n")
backing("long", "x" * 1023)
backing("long-json", "json:" + "[" * 1018)
backing("json-nested", nested(110))
backing("json-broken", "json:{")
backing("json-empty", "json:")
backing("json-list", "json:[]")
backing("json-scalar", "json:1")
backing("json-no-driver", "json:{}")
backing("json-number", 'json:{"driver":"file","filename":1' + "0" * 900 + "}")
backing("json-deep-key", 'json:{"' + "a." * 490 + 'a":1}')
backing("json-deep-file-key", 'json:{"' + "file." * 195 + 'filename":"x"}')
backing("json-driver-object", 'json:{"driver":{"driver":"file"},"file":[1]}')
backing("json-driver-number", 'json:{"driver":1,"file":"x"}')
backing("json-file-list", 'json:{"driver":"raw","file":[1,2]}')
backing("json-filename-object", 'json:{"driver":"raw","file":{"driver":"file","filename":{"a":1}}}')
backing("json-filename-number", 'json:{"driver":"raw","file":{"driver":"file","filename":1}}')
backing("json-backing-nested", 'json:{"driver":"qcow2","file.filename":"image","backing":' * 15 + '{"driver":"null-co"}' + "}" * 15)
backing("json-null-huge", 'json:{"driver":"null-co","size":9223372036854775807}')
backing("json-null-beyond", 'json:{"driver":"null-co","size":18446744073709551615}')
backing("json-surrogate", 'json:{"driver":"file","filename":"\\ud800"}')
backing("json-nul", 'json:{"driver":"file","filename":"a\\u0000b"}')
backing("json-control", 'json:{"driver":"file","filename":"\\u001b[2J\\n"}')
backing("json-raw-offset", 'json:{"driver":"raw","offset":9223372036854775807,"file":{"driver":"file","filename":"image"}}')
backing("json-raw-size", 'json:{"driver":"raw","size":18446744073709551104,"file":{"driver":"file","filename":"image"}}')
backing("json-generic", 'json:{"driver":"file","filename":"image","read-only":{"a":1},"cache":[1],"node-name":7,"discard":3}')
backing("json-node-name", 'json:{"driver":"raw","file":"no-such-node"}')
backing("control", b"\x01\x1b[2J\r\n\x7f")
backing("newline", "a\nb")
backing("not-utf8", b"\xff\xfe\x80.img")
backing("not-utf8-relative", b"d\xff/\xe9.img", "raw")
backing("nul", b"nothing\0hidden")
backing("nul-first", b"\0hidden")
backing("colon", ":")
backing("empty-path", "file:")


@attack
def backing_loop_of_two(path: Path) -> None:
    for name, other in ((path.name, "other"), ("other", path.name)):
        draft = Draft()
        draft.backing(other, "qcow2")
        draft.save(path.parent / name)


@attack
def backing_loop_by_link(path: Path) -> None:
    draft = Draft()
    draft.backing("link", "qcow2")
    draft.save(path)
    os.symlink(path.name, path.parent / "link")


@attack
def backing_loop_of_links(path: Path) -> None:
    draft = Draft()
    draft.backing("link")
    draft.save(path)
    os.symlink("link", path.parent / "link")


@attack
def backing_chain_too_deep(path: Path) -> None:
    for number in range(210):
        draft = Draft(9, 65536)
        if number < 209:
            draft.backing("link%d" % (number + 1), "qcow2")
        draft.save(path if not number else path.parent / ("link%d" % number))


@attack
def backing_fifo(path: Path) -> None:
    os.mkfifo(path.parent / "fifo")
    draft = Draft()
    draft.backing("fifo", "raw")
    draft.save(path)
