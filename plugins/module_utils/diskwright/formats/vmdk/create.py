# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Making a new image (https://www.qemu.org/docs/master/system/images.html, VMDK; VMware's "Virtual Disk Format 5.0").

All tables of a new sparse extent have their place, in front of the grains; while they are empty they are holes of the file.
"""

from __future__ import annotations

import os
from array import array

from ...errors import Error, OptionError
from .descriptor import NO_PARENT, ExtentLine, compose, new_cid
from .header import COMPRESSED, DEFLATE, MARKERS, MAX_DIRECTORY, MAX_TABLE_ENTRIES, REDUNDANT, VALID_NEWLINES, ZERO_GRAINS, SparseHeader
from .options import FLAT, SPLIT, VmdkCreateOptions, check_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Mapping, Optional

    from ...node import Node

SECTOR = 512
GRAIN = 65536
SPLIT_SIZE = 0x80000000  # bytes of an extent of the twoGbMaxExtent subformats
DESCRIPTOR_SECTORS = 20
DESCRIPTOR_SECTOR = 1
TABLE_SECTORS = MAX_TABLE_ENTRIES * 4 // SECTOR
EFBIG, EINVAL = 27, 22
HARDWARE, HARDWARE_6 = "4", "6"


def extent_sizes(options: VmdkCreateOptions) -> list[int]:
    """The sizes in bytes of the extents that have a file of their own."""
    size = _rounded(options.size)
    if options.subformat in SPLIT:
        return [min(SPLIT_SIZE, size - start) for start in range(0, size, SPLIT_SIZE)]
    return [size] if options.subformat in FLAT and size else []


def _rounded(size: int) -> int:
    return -(-size // SECTOR) * SECTOR


def extent_files(options: VmdkCreateOptions, filename: str) -> dict[str, str]:
    """The paths of the extents of the image `filename`, by the role of the child."""
    base, dot, suffix = filename.rpartition(".")
    if not dot or "/" in suffix:
        base, suffix = filename, ""
    letter = "f" if options.subformat in FLAT else "s"
    files = {}
    for number in range(len(extent_sizes(options))):
        word = "flat" if options.subformat == "monolithicFlat" else "%s%03d" % (letter, number + 1)
        files["extents.%d" % number] = "%s-%s%s" % (base, word, dot + suffix if suffix or dot and base != filename else "")
    return files


def create(children: Mapping[str, Node], options: VmdkCreateOptions) -> None:
    """Write a new, empty image: the extents, then the descriptor that names them. Raises OptionError, Error in QEMU's words."""
    check_options(options)
    backing = children.get("backing")
    parent_cid = _parent_cid(backing)
    size = _rounded(options.size)
    kind = "FLAT" if options.subformat in FLAT else "SPARSE"
    lines = []
    for number, length in enumerate(extent_sizes(options)):
        file = children["extents.%d" % number]
        if kind == "FLAT":
            file.truncate(length, exact=False)
        else:
            write_extent(file, length, options)
        lines.append(ExtentLine(length // SECTOR, kind, os.path.basename(file.filename)))
    file = children["file"]
    embedded = options.subformat not in (*FLAT, *SPLIT)
    if embedded:
        write_extent(file, size, options)
        lines.append(ExtentLine(size // SECTOR, kind, os.path.basename(file.filename)))
    text = describe(options, lines, parent_cid)
    if embedded and len(text) > DESCRIPTOR_SECTORS * SECTOR:
        raise OptionError("The descriptor does not fit into %d bytes" % (DESCRIPTOR_SECTORS * SECTOR), errno=EINVAL)
    file.write_hosted(DESCRIPTOR_SECTOR * SECTOR if embedded else 0, memoryview(text))


def describe(options: VmdkCreateOptions, lines: list[ExtentLine], parent_cid: int = NO_PARENT) -> bytes:
    """The descriptor of a new image. Raises OptionError for options that would break its lines."""
    for value in (options.toolsversion, options.hwversion, options.backing_file or ""):
        if "\n" in value or '"' in value or "\0" in value:
            raise OptionError("invalid parameter value: %s" % value)
    hardware = options.hwversion
    if hardware == "undefined":
        hardware = HARDWARE_6 if options.compat6 else HARDWARE
    return compose(
        options.subformat,
        new_cid(),
        lines,
        _rounded(options.size),
        options.adapter_type,
        hardware,
        options.toolsversion,
        options.backing_file,
        parent_cid,
    )


def _parent_cid(backing: Optional[Node]) -> int:
    from .image import Vmdk

    if backing is None:
        return NO_PARENT
    if not isinstance(backing, Vmdk):
        raise Error("backing_file must be a vmdk image", errno=EINVAL)
    return backing.descriptor.cid


def plan_header(options: VmdkCreateOptions, size: int) -> SparseHeader:
    """The header of a sparse extent of `size` bytes. Raises Error (EFBIG)."""
    stream = options.subformat == "streamOptimized"
    tables = -(-size // (GRAIN * MAX_TABLE_ENTRIES))
    if tables > MAX_DIRECTORY:
        raise Error("L1 size too big", errno=EFBIG)
    directory = -(-tables * 4 // SECTOR)
    first = DESCRIPTOR_SECTOR + DESCRIPTOR_SECTORS
    second = first + directory + tables * TABLE_SECTORS
    end = second + directory + tables * TABLE_SECTORS
    flags = VALID_NEWLINES | REDUNDANT
    return SparseHeader(
        version=3 if stream else 2 if options.zeroed_grain else 1,
        flags=flags | (COMPRESSED | MARKERS if stream else 0) | (ZERO_GRAINS if options.zeroed_grain else 0),
        capacity=size // SECTOR,
        grainSize=GRAIN // SECTOR,
        descriptorOffset=DESCRIPTOR_SECTOR,
        descriptorSize=DESCRIPTOR_SECTORS,
        rgdOffset=first,
        gdOffset=second,
        overHead=-(-end * SECTOR // GRAIN) * GRAIN // SECTOR,
        compressAlgorithm=DEFLATE if stream else 0,
    )


def write_extent(file: Node, size: int, options: VmdkCreateOptions) -> None:
    """Write an empty sparse extent of `size` bytes: its header and both directories, room for tables and no grains."""
    header = plan_header(options, size)
    file.write_hosted(0, memoryview(header.pack()))
    file.truncate(header.overHead * SECTOR, exact=False)
    tables = -(-size // (GRAIN * MAX_TABLE_ENTRIES))
    directory = -(-tables * 4 // SECTOR)
    for place in (header.rgdOffset, header.gdOffset):
        first = place + directory
        for start in range(0, tables, 1 << 16):
            count = min(1 << 16, tables - start)
            if first + (start + count) * TABLE_SECTORS >> 32:
                raise Error("L1 size too big", errno=EFBIG)
            data = little_endian(array("I", range(first + start * TABLE_SECTORS, first + (start + count) * TABLE_SECTORS, TABLE_SECTORS)))
            file.write_hosted(place * SECTOR + start * 4, memoryview(data))


def little_endian(values: array[int]) -> bytes:
    """Table entries as they are stored."""
    import sys

    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()
