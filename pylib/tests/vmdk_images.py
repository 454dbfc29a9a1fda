# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Vmdk images put together by hand: what other products write, and what nobody should."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from diskwright.formats.vmdk.header import GD_AT_END, CowdHeader, SeSparseHeader, SeSparseVolatile, SparseHeader

SECTOR = 512
GRAIN = 8  # sectors
CODES = {"u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"}
FIELDS = {name: (SparseHeader.OFFSETS[name], CODES[kind]) for name, kind in SparseHeader.__annotations__.items() if kind in CODES}
COWD_FIELDS = {name: (CowdHeader.OFFSETS[name], CODES[kind]) for name, kind in CowdHeader.__annotations__.items() if kind in CODES}
SESPARSE_FIELDS = {name: (SeSparseHeader.OFFSETS[name], CODES[kind]) for name, kind in SeSparseHeader.__annotations__.items() if kind in CODES}


def descriptor(lines: str, kind: str, cid: str = "1234abcd", parent: str = "ffffffff", more: str = "") -> str:
    """A descriptor with these extent lines."""
    return '# Disk DescriptorFile\nversion=1\nCID=%s\nparentCID=%s\ncreateType="%s"\n%s# Extent description\n%s\n# end\n' % (cid, parent, kind, more, lines)


def hosted(entries: list[int], directory: tuple[int, ...] = (27, 0), kind: str = "monolithicSparse", gtes: int = 16, **fields: int) -> bytes:
    """A hosted sparse extent with two tables of `gtes` grains, of which the first has these entries.

    Its directories are in sectors 21 and 22, the redundant table in 24, the table in 27; grain N is full of the byte N from sector 32 on.
    """
    values: dict[str, Any] = {
        "flags": 3,
        "capacity": 2 * gtes * GRAIN,
        "grainSize": GRAIN,
        "descriptorOffset": 1,
        "descriptorSize": 20,
        "numGTEsPerGT": gtes,
        "rgdOffset": 21,
        "gdOffset": 22,
        "overHead": 32,
        **fields,
    }
    text = descriptor('RW %d SPARSE "image"' % min(values["capacity"], 1 << 60), kind).encode()
    image = bytearray(SparseHeader(**values).pack() + text)
    image += bytes(32 * SECTOR - len(image))
    struct.pack_into("<2I", image, 21 * SECTOR, 24, 0)
    struct.pack_into("<%dI" % len(directory), image, 22 * SECTOR, *directory)
    for place in (24, 27):
        struct.pack_into("<%dI" % len(entries), image, place * SECTOR, *entries)
    highest = max((entry for entry in entries if entry < 4096), default=0)
    number = 0
    while len(image) < (highest + GRAIN) * SECTOR:
        number += 1
        image += bytes((number,)) * GRAIN * SECTOR
    return bytes(image)


def stream(grains: dict[int, bytes], markers: bool = True, footer: bool = True, **fields: int) -> bytes:
    """A streamOptimized image of 32 grains with these grains, compressed already; tables and directory at the end."""
    header = SparseHeader(
        version=3,
        flags=1 | 0x10000 | (0x20000 if markers else 0),
        capacity=32 * GRAIN,
        grainSize=GRAIN,
        descriptorOffset=1,
        descriptorSize=1,
        numGTEsPerGT=16,
        gdOffset=GD_AT_END,
        overHead=4,
        compressAlgorithm=1,
    )
    for name, value in fields.items():
        setattr(header, name, value)
    text = descriptor('RW 256 SPARSE "image"', "streamOptimized").encode()
    image = bytearray((header.pack() + text).ljust(4 * SECTOR, b"\0"))
    tables = [[0] * 16, [0] * 16]
    for number, data in sorted(grains.items()):
        tables[number // 16][number % 16] = len(image) // SECTOR
        record = struct.pack("<QI", number * GRAIN, len(data)) + data if markers else data
        image += record + bytes(-len(record) % SECTOR)
    places = []
    for table in tables:
        places.append(len(image) // SECTOR + 1)
        image += struct.pack("<QII", 1, 0, 1).ljust(SECTOR, b"\0") + struct.pack("<16I", *table).ljust(SECTOR, b"\0")
    header.gdOffset = len(image) // SECTOR + 1
    image += struct.pack("<QII", 1, 0, 2).ljust(SECTOR, b"\0") + struct.pack("<2I", *places).ljust(SECTOR, b"\0")
    if footer:
        image += struct.pack("<QII", 1, 0, 3).ljust(SECTOR, b"\0") + header.pack() + bytes(SECTOR)
    else:
        image[: SparseHeader.SIZE] = header.pack()
    return bytes(image)


def squeezed(byte: int) -> bytes:
    """A grain full of one byte, compressed."""
    return zlib.compress(bytes((byte,)) * GRAIN * SECTOR)


def cowd(entries: list[int], **fields: int) -> bytes:
    """A COWD extent of 4 MiB, with grains of one sector and these entries in its first table; sector 37 + N is full of the byte N + 1."""
    values = {"version": 1, "flags": 3, "numSectors": 8192, "grainSize": 1, "gdOffset": 4, "numGDEntries": 2, "freeSector": 40, **fields}
    image = CowdHeader(magicNumber=b"COWD", **values).pack().ljust(4 * SECTOR, b"\0") + struct.pack("<2I", 5, 0).ljust(SECTOR, b"\0")
    image += struct.pack("<%dI" % len(entries), *entries).ljust(32 * SECTOR, b"\0")
    return image + b"".join(bytes((number + 1,)) * SECTOR for number in range(4))


def sesparse(entries: list[int], dirty: int = 0, **fields: int) -> bytes:
    """A space-efficient sparse extent of 32 MiB with these entries in table 1, which is the first of the disk; grain N is full of the byte N + 1."""
    values = {name: 0 for name in SeSparseHeader.FIELDS}
    values.update(magic=0xCAFEBABE, version=0x200000001, capacity=65536, grain_size=8, grain_table_size=64, volatile_header_offset=1)
    values.update(volatile_header_size=1, grain_dir_offset=4, grain_dir_size=1, grain_tables_offset=8, grain_tables_size=128, grains_offset=256, grains_size=64)
    values.update(fields)
    image = bytearray(256 * SECTOR)
    image[: SeSparseHeader.SIZE] = SeSparseHeader(**values).pack()
    image[SECTOR : SECTOR + SeSparseVolatile.SIZE] = SeSparseVolatile(magic=0xCAFECAFE, free_gt_number=0, next_txn_seq_number=0, replay_journal=dirty).pack()
    struct.pack_into("<2Q", image, 4 * SECTOR, 0x1000000000000001, 0)
    struct.pack_into("<%dQ" % len(entries), image, (8 + 64) * SECTOR, *entries)
    return bytes(image) + b"".join(bytes((number + 1,)) * 4096 for number in range(8))


def sesparse_grain(number: int) -> int:
    """The table entry of grain `number` of the file."""
    return 0x3000000000000000 | (number & 0xFFF) << 48 | number >> 12
