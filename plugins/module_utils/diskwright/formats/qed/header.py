# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The header of a qed image and its limits (https://www.qemu.org/docs/master/interop/qed_spec.html#header)."""

from __future__ import annotations

import errno
import os

from ...errors import Corrupt, Error, OptionError, Unsupported, WrongFormat
from ...ondisk import Struct
from ...options import Options, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...ondisk import u32, u64
    from ...options import NodeRef

MAGIC = 0x00444551  # "QED\0"
MAGIC_BYTES = b"QED\0"
SECTOR = 512
MIN_CLUSTER = 4 << 10
MAX_CLUSTER = 64 << 20
MAX_TABLE = 16  # clusters
MAX_BACKING_NAME = 4095  # bytes

# features: an image with others than these cannot be understood
BACKING_FILE = 1
NEED_CHECK = 2  # was not closed properly
BACKING_FORMAT_NO_PROBE = 4  # the backing file is raw
KNOWN_FEATURES = BACKING_FILE | NEED_CHECK | BACKING_FORMAT_NO_PROBE


class Header(Struct):
    """The header."""

    ORDER = "<"

    magic: u32 = MAGIC
    cluster_size: u32
    table_size: u32  # of L1 and L2 tables, in clusters
    header_size: u32 = 1  # in clusters
    features: u64 = 0
    compat_features: u64 = 0
    autoclear_features: u64 = 0
    l1_table_offset: u64
    image_size: u64  # bytes
    backing_filename_offset: u32 = 0  # from the start of the header
    backing_filename_size: u32 = 0

    @property
    def table_bytes(self) -> int:
        """The length of an L1 or L2 table in bytes."""
        return self.table_size * self.cluster_size

    @property
    def reach(self) -> int:
        """The guest bytes that an L2 table maps."""
        return self.table_bytes // 8 * self.cluster_size


class QedOptions(Options):
    """Runtime options of qed."""

    backing: Optional[NodeRef] = opt(None, help="takes the place of the backing file that the image names")
    file: NodeRef = opt(help="the node that holds the image")


class QedCreateOptions(Options):
    """Creation options of qed."""

    DASHES = False
    SHOWN = ("cluster_size",)

    size: Size = opt(0, help="size of the disk")
    backing_file: Optional[str] = opt(None, help="image that is read where nothing was written")
    backing_fmt: Optional[str] = opt(None, help="format of that image")
    cluster_size: Size = opt(65536, help="size of a cluster, 4K to 64M")
    table_size: Size = opt(4, help="size of L1 and L2 tables in clusters: 1, 2, 4, 8 or 16")


def is_cluster_size(size: int) -> bool:
    return MIN_CLUSTER <= size <= MAX_CLUSTER and not size & (size - 1)


def is_table_size(size: int) -> bool:
    return 1 <= size <= MAX_TABLE and not size & (size - 1)


def most(cluster_size: int, table_size: int) -> int:
    """The largest size of a disk, in bytes; 0 where QEMU's 64 bits do not hold it."""
    entries = table_size * cluster_size // 8
    return entries * entries * cluster_size & (1 << 64) - 1


def whole_clusters(file_size: int, cluster_size: int) -> int:
    """The end of the last cluster that lies in a file as a whole; of a sector the part that is there does."""
    return -(-file_size // SECTOR) * SECTOR // cluster_size * cluster_size


def read_header(head: bytes, file_size: int) -> Header:
    """The header at the start of a file of `file_size` bytes. Raises WrongFormat, Unsupported or Corrupt in QEMU's words."""
    head = head.ljust(Header.SIZE, b"\0")  # what lies beyond the end of a file reads as zeroes
    if not head.startswith(MAGIC_BYTES):
        raise WrongFormat("Image not in QED format")
    header = Header.unpack(head)
    unknown = header.features & ~KNOWN_FEATURES
    if unknown:
        raise Unsupported("Unsupported QED features: %x" % unknown, errno=errno.ENOTSUP)
    if not is_cluster_size(header.cluster_size):
        raise Corrupt("QED cluster size is invalid")
    if not is_table_size(header.table_size):
        raise Corrupt("QED table size is invalid")
    if header.image_size % SECTOR or header.image_size > most(header.cluster_size, header.table_size) or header.image_size >> 63:
        raise Corrupt("QED image size is invalid")
    end = whole_clusters(file_size, header.cluster_size)
    last = header.l1_table_offset + header.table_bytes - header.cluster_size
    if header.l1_table_offset % header.cluster_size or header.l1_table_offset < header.header_size * header.cluster_size or last >= end:
        raise Corrupt("QED table offset is invalid")
    if header.header_size * header.cluster_size >> 32:
        raise Corrupt("QED header size is too large")
    return header


def check_name(header: Header) -> None:
    """Raise Corrupt unless the backing file's name lies in the header, behind its fields, and is not too long."""
    end = header.backing_filename_offset + header.backing_filename_size
    if end > header.header_size * header.cluster_size or header.backing_filename_size > MAX_BACKING_NAME:
        raise Corrupt("the backing file name does not fit into the header", errno=errno.EINVAL)


def plan_header(options: QedCreateOptions) -> tuple[Header, bytes]:
    """The header that creation options ask for, and the backing file's name. Raises OptionError or Error in QEMU's words."""
    if not is_cluster_size(options.cluster_size):
        raise OptionError("QED cluster size must be within range [%d, %d] and power of 2" % (MIN_CLUSTER, MAX_CLUSTER))
    if not is_table_size(options.table_size):
        raise OptionError("QED table size must be within range [1, %d] and power of 2" % MAX_TABLE)
    limit = most(options.cluster_size, options.table_size)
    if options.size % SECTOR or options.size > limit:
        raise OptionError("QED image size must be a non-zero multiple of cluster size and less than %d bytes" % limit)
    header = Header(cluster_size=options.cluster_size, table_size=options.table_size, l1_table_offset=options.cluster_size, image_size=options.size)
    return header, set_backing(header, options.backing_file, options.backing_fmt)


def set_backing(header: Header, name: Optional[str], format: Optional[str]) -> bytes:
    """Make the header name a backing file (None: none); what is to be stored behind it. Raises Error where that does not fit."""
    header.features &= ~(BACKING_FILE | BACKING_FORMAT_NO_PROBE)
    header.backing_filename_offset = header.backing_filename_size = 0
    if not name:
        return b""
    stored = os.fsencode(name)
    if len(stored) > MAX_BACKING_NAME or Header.SIZE + len(stored) > header.header_size * header.cluster_size:
        raise Error("Could not change the backing file to '%s': backing file name too long" % name, errno=errno.ENOSPC)
    header.features |= BACKING_FILE | (BACKING_FORMAT_NO_PROBE if format == "raw" else 0)
    header.backing_filename_offset, header.backing_filename_size = Header.SIZE, len(stored)
    return stored
