# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Making a new image (https://www.qemu.org/docs/master/system/images.html, qcow2 options)."""

from __future__ import annotations

import os

from ... import kernels
from ...errors import Error, OptionError
from ...node import OpenFlags
from . import header as layout
from .options import Qcow2Options
from .resize import PREALLOCATION, grow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Mapping

    from ...node import Node
    from .image import Qcow2
    from .options import Qcow2CreateOptions

VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
FEATURE_NAMES_ABOVE = 4096  # bytes; smaller clusters have no room for the table


def create(cls: type[Qcow2], children: Mapping[str, Node], options: Qcow2CreateOptions) -> None:
    """Write an empty image into the empty child `file`: the smallest that can be, which then grows. Raises Error in QEMU's words."""
    header = plan_header(options)
    file, data_file = children["file"], children.get("data-file")
    size = header.cluster_size
    header.size = 0
    header.refcount_table_offset, header.refcount_table_clusters = size, 1
    block = bytearray(size)
    used = kernels.refcounts_pack([1, 1, 1, 0, 0, 0, 0, 0], header.refcount_order)
    block[: len(used)] = used
    backing, header.backing_file = header.backing_file, None
    file.write_hosted(0, memoryview(header.pack().ljust(size, b"\0") + (2 * size).to_bytes(8, "big").ljust(size, b"\0") + block))
    image = cls(Qcow2Options.from_mapping(dict(children)), OpenFlags(writable=True, resize=True))
    image.ordered = False
    grow(image, options.size, "metadata" if options.data_file_raw and options.preallocation == "off" else options.preallocation)
    if data_file is not None:
        data_file.truncate(image.size, exact=False)
    encrypted = options.wants_encryption()
    if encrypted:
        from .encryption import set_up

        set_up(image, options)
    image.write_back()
    if backing is not None or encrypted:
        image.header.backing_file = backing
        image.update_header()


def plan_header(options: Qcow2CreateOptions) -> layout.Header:
    """The header that the options ask for, without tables. Raises OptionError or Unsupported in QEMU's words."""
    version = check_values(options)
    check_combination(options, version)
    header = layout.new_header(options.size, options.cluster_size.bit_length() - 1, version)
    header.refcount_order = options.refcount_bits.bit_length() - 1
    if version >= 3 and options.cluster_size > FEATURE_NAMES_ABOVE:
        header.set_extension(layout.EXT_FEATURE_NAMES, layout.feature_name_table())
    if options.lazy_refcounts:
        header.compatible_features |= layout.LAZY_REFCOUNTS
    if options.compression_type != "zlib":
        header.incompatible_features |= layout.COMPRESSION_TYPE
        header.additional = bytes((layout.COMPRESSION_NAMES.index(options.compression_type),)) + header.additional[1:]
    if options.extended_l2:
        header.incompatible_features |= layout.EXTENDED_L2
    if options.backing_file is not None:
        _set_backing(header, options)
    if options.data_file is not None:
        header.incompatible_features |= layout.DATA_FILE
        header.autoclear_features |= layout.RAW_DATA_FILE if options.data_file_raw else 0
        header.set_extension(layout.EXT_DATA_FILE, os.fsencode(options.data_file))
    if layout.l1_entries(header, options.size) * 8 > layout.MAX_L1_SIZE:
        raise Error("The image size is too large for file format 'qcow2' (try using a larger cluster size)", errno=27)
    if options.wants_encryption():
        from .encryption import check_creation

        check_creation(options)
    return header


def _set_backing(header: layout.Header, options: Qcow2CreateOptions) -> None:
    name = os.fsencode(options.backing_file or "")
    kind = os.fsencode(options.backing_fmt) if options.backing_fmt else None
    refusal = "Could not assign backing file '%s'" % options.backing_file
    if options.backing_fmt:
        refusal += " with format '%s'" % options.backing_fmt
    if len(name) > layout.MAX_BACKING_NAME or kind is not None and len(kind) > layout.MAX_BACKING_FORMAT:
        raise OptionError(refusal + ": Invalid argument", errno=22)
    if kind is not None:
        header.set_extension(layout.EXT_BACKING_FORMAT, kind)
    header.backing_file = name or None
    try:
        header.pack()
    except Error:
        raise OptionError(refusal + ": No space left on device", errno=28) from None


def check_values(options: Qcow2CreateOptions, measuring: bool = False) -> int:
    """Refuse values that mean nothing, in the words of create or of measure; returns the version."""
    if not measuring and options.wants_encryption():
        from .encryption import chosen_format

        chosen_format(options)
    if measuring and options.compat not in VERSIONS:
        raise OptionError("Invalid compatibility level: '%s'" % options.compat)
    if measuring and options.preallocation not in PREALLOCATION:
        raise OptionError("invalid parameter value: %s" % options.preallocation)
    for name, value, allowed in (
        ("version", options.compat, tuple(VERSIONS)),
        ("preallocation", options.preallocation, PREALLOCATION),
        ("compression-type", options.compression_type, layout.COMPRESSION_NAMES),
    ):
        if value not in allowed and not measuring:
            raise OptionError("Parameter '%s' does not accept value '%s'" % (name, value))
    size = options.cluster_size
    if not 1 << layout.MIN_CLUSTER_BITS <= size <= 1 << layout.MAX_CLUSTER_BITS or size & (size - 1):
        raise OptionError("Cluster size must be a power of two between 512 and 2048k")
    return VERSIONS[options.compat]


def check_combination(options: Qcow2CreateOptions, version: int, measuring: bool = False) -> None:
    """Refuse what contradicts, in QEMU's order and in the words of create or of measure, which looks at less."""
    newer = "compatibility level 1.1 %%s above (use %s or greater)" % ("compat=1.1" if measuring else "version=v3")
    if options.extended_l2:
        if options.cluster_size < 1 << 14:
            raise OptionError("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")
        if version < 3:
            raise OptionError("Extended L2 entries are only supported with " + newer % "and")
    if not measuring:
        if options.preallocation != "off" and options.backing_file is not None and not options.extended_l2:
            raise OptionError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
        if options.backing_fmt and options.backing_file is None:
            raise OptionError("Backing format cannot be used without backing file")
        if options.lazy_refcounts and version < 3:
            raise OptionError("Lazy refcounts only supported with " + newer % "and")
    bits = options.refcount_bits
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise OptionError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and bits != 16:
        raise OptionError("Different refcount widths than 16 bits require " + newer % "or")
    if measuring:
        return
    if options.data_file_raw and options.data_file is None:
        raise OptionError("data-file-raw requires data-file")
    if options.data_file_raw and options.backing_file is not None:
        raise OptionError("Backing file and data-file-raw cannot be used at the same time")
    if options.data_file is not None and version < 3:
        raise OptionError("External data files are only supported with " + newer % "and")
    if options.compression_type != "zlib" and version < 3:
        raise OptionError("Non-zlib compression type is only supported with " + newer % "and")
