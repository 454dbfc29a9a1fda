# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The header of a qcow image, its options and limits
(https://github.com/libyal/libqcow/blob/main/documentation/QEMU%20Copy-On-Write%20file%20format.asciidoc, version 1)."""

from __future__ import annotations

import errno
import os

from ...errors import Corrupt, Error, OptionError, Unsupported, WrongFormat
from ...ondisk import Struct
from ...options import Options, SecretRef, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...ondisk import u8, u16, u32, u64
    from ...options import NodeRef

MAGIC = 0x514649FB  # "QFI\xfb"
VERSION = 1
SECTOR = 512
MAX_BACKING_NAME = 1023  # bytes
MAX_L1 = ((1 << 31) - 1) // 8  # entries
CRYPT_NONE, CRYPT_AES = 0, 1

CLUSTER_BITS, L2_BITS = 12, 9  # of a new image,
BACKED_CLUSTER_BITS, BACKED_L2_BITS = 9, 12  # and of one with a backing file, from which nothing needs to be copied then


class Header(Struct):
    """The header."""

    magic: u32 = MAGIC
    version: u32 = VERSION
    backing_file_offset: u64 = 0
    backing_file_size: u32 = 0
    mtime: u32 = 0
    size: u64
    cluster_bits: u8
    l2_bits: u8
    padding: u16 = 0
    crypt_method: u32 = CRYPT_NONE
    l1_table_offset: u64

    @property
    def l1_size(self) -> int:
        """The entries of the L1 table."""
        return -(-self.size >> self.cluster_bits + self.l2_bits)


class QcowOptions(Options):
    """Runtime options of qcow."""

    backing: Optional[NodeRef] = opt(None, help="takes the place of the backing file that the image names")
    file: NodeRef = opt(help="the node that holds the image")
    encrypt_format: Optional[str] = opt(None, key="encrypt.format", help="encryption of the image: aes")
    encrypt_key_secret: Optional[SecretRef] = opt(None, key="encrypt.key-secret", help="the secret that decrypts it")


class QcowCreateOptions(Options):
    """Creation options of qcow."""

    DASHES = False

    size: Size = opt(0, help="size of the disk")
    backing_file: Optional[str] = opt(None, help="image that is read where nothing was written")
    backing_fmt: Optional[str] = opt(None, help="format of that image")
    encryption: Optional[bool] = opt(None, help="older spelling of encrypt.format=aes")
    encrypt_format: Optional[str] = opt(None, key="encrypt.format", help="encrypt the data: aes")
    encrypt_key_secret: Optional[SecretRef] = opt(None, key="encrypt.key-secret", help="id of the secret object with the password")


def read_header(head: bytes) -> Header:
    """The header at the start of a file. Raises WrongFormat, Unsupported or Corrupt in QEMU's words."""
    if head[:4] != MAGIC.to_bytes(4, "big"):
        raise WrongFormat("Image not in qcow format")
    header = Header.unpack(head)
    if header.version != VERSION:
        hint = "qcow2" if header.version in (2, 3) else None
        text = "qcow (v%d) does not support qcow version %d" % (VERSION, header.version)
        raise Unsupported(text, errno=errno.ENOTSUP, hint="Try the '%s' driver instead." % hint if hint else None)
    if header.size <= 1:
        raise Corrupt("Image size is too small (must be at least 2 bytes)")
    if not 9 <= header.cluster_bits <= 16:
        raise Corrupt("Cluster size must be between 512 and 64k")
    if not 6 <= header.l2_bits <= 13:
        raise Corrupt("L2 table size must be between 512 and 64k")
    if header.crypt_method > CRYPT_AES:
        raise Corrupt("invalid encryption method in qcow header")
    if header.size > (1 << 64) - (1 << header.cluster_bits + header.l2_bits) or header.l1_size > MAX_L1:
        raise Corrupt("Image too large", errno=errno.EINVAL)
    if header.backing_file_offset and header.backing_file_size > MAX_BACKING_NAME:
        raise Corrupt("Backing file name too long", errno=errno.EINVAL)
    return header


def plan_header(options: QcowCreateOptions) -> tuple[Header, bytes]:
    """The header that creation options ask for, and the backing file's name. Raises OptionError or Error in QEMU's words."""
    format = options.encrypt_format
    if options.encryption:
        if format is not None:
            raise OptionError("'encrypt.format' and its alias 'encryption' can't be used at the same time")
        format = "aes"
    if format is None and options.encrypt_key_secret is not None:
        raise OptionError("Parameter 'encrypt.format' is missing")
    if format not in (None, "aes", "qcow", "luks"):
        raise OptionError("Parameter 'format' does not accept value '%s'" % format)
    if not options.size:
        raise OptionError("Image size is too small, cannot be zero length")
    if format == "luks":
        raise OptionError("Unsupported encryption format")
    if format is not None and options.encrypt_key_secret is None:
        raise OptionError("Parameter 'encrypt.key-secret' is required for cipher")
    name = os.fsencode(options.backing_file or "")
    if len(name) > MAX_BACKING_NAME:
        raise Error("the backing file name is longer than %d bytes" % MAX_BACKING_NAME, errno=errno.EINVAL)
    header = Header(
        size=options.size,
        cluster_bits=BACKED_CLUSTER_BITS if name else CLUSTER_BITS,
        l2_bits=BACKED_L2_BITS if name else L2_BITS,
        crypt_method=CRYPT_AES if format else CRYPT_NONE,
        l1_table_offset=-(-(Header.SIZE + len(name)) // 8) * 8,
    )
    if name:
        header.backing_file_offset, header.backing_file_size = Header.SIZE, len(name)
    if header.l1_size > MAX_L1:
        raise Error("the L1 table would be too large", errno=errno.EFBIG)
    return header, name
