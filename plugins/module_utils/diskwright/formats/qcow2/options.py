# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The options of qcow2, at run time and for creation (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, BlockdevOptionsQcow2)."""

from __future__ import annotations

from ...errors import OptionError
from ...options import Options, SecretRef, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...options import NodeRef, Size
    from .header import Header

METHODS = ("none", "aes", "luks")  # of encryption, by their number in the header
MAX_L2_CACHE = 32 << 20  # bytes, unless an option says otherwise
MIN_REFCOUNT_TABLES = 4
_MODEST = 1 << 30  # bytes of caches that any machine has
OVERLAP_TEMPLATES = ("none", "constant", "cached", "all")


class Qcow2Options(Options):
    """Runtime options of qcow2."""

    file: NodeRef = opt(help="the node that holds the image")
    backing: Optional[NodeRef] = opt(None, help="the node that holds what the image does not")
    data_file: Optional[NodeRef] = opt(None, help="the node that holds the guest's data, where the image wants one")
    lazy_refcounts: Optional[bool] = opt(None, help="postpone refcount updates (default: as the image says)")
    pass_discard_request: Optional[bool] = opt(None, help="pass guest discard requests to the file (default: with discard=unmap)")
    pass_discard_snapshot: Optional[bool] = opt(None, help="discard what a deleted snapshot gave back (default: on)")
    pass_discard_other: Optional[bool] = opt(None, help="discard whatever else is given back (default: off)")
    discard_no_unref: Optional[bool] = opt(None, help="discarded clusters keep their place in the file")
    overlap_check: Optional[str] = opt(None, help="writes to check for overlap with metadata: none, constant, cached (default), all")
    overlap_check_template: Optional[str] = opt(None, key="overlap-check.template", help="the same, as the base of the following")
    overlap_check_main_header: Optional[bool] = opt(None, key="overlap-check.main-header", help="check for overlap with the header")
    overlap_check_active_l1: Optional[bool] = opt(None, key="overlap-check.active-l1", help="... with the active L1 table")
    overlap_check_active_l2: Optional[bool] = opt(None, key="overlap-check.active-l2", help="... with active L2 tables")
    overlap_check_refcount_table: Optional[bool] = opt(None, key="overlap-check.refcount-table", help="... with the refcount table")
    overlap_check_refcount_block: Optional[bool] = opt(None, key="overlap-check.refcount-block", help="... with refcount blocks")
    overlap_check_snapshot_table: Optional[bool] = opt(None, key="overlap-check.snapshot-table", help="... with the snapshot table")
    overlap_check_inactive_l1: Optional[bool] = opt(None, key="overlap-check.inactive-l1", help="... with the L1 tables of snapshots")
    overlap_check_inactive_l2: Optional[bool] = opt(None, key="overlap-check.inactive-l2", help="... with the L2 tables of snapshots")
    overlap_check_bitmap_directory: Optional[bool] = opt(None, key="overlap-check.bitmap-directory", help="... with the bitmap directory")
    cache_size: Optional[Size] = opt(None, help="bytes for both metadata caches")
    l2_cache_size: Optional[Size] = opt(None, help="bytes for L2 tables (default: what the image needs, at most 32 MiB)")
    l2_cache_entry_size: Optional[Size] = opt(None, help="bytes of an L2 table read at a time")
    refcount_cache_size: Optional[Size] = opt(None, help="bytes for refcount blocks (default: 4 clusters, at least 1 MiB)")
    cache_clean_interval: Optional[int] = opt(None, help="seconds after which unused cache entries may go")
    encrypt_format: Optional[str] = opt(None, key="encrypt.format", help="encryption of the image: aes or luks")
    encrypt_key_secret: Optional[SecretRef] = opt(None, key="encrypt.key-secret", help="the secret that decrypts it")


class Qcow2CreateOptions(Options):
    """Creation options of qcow2."""

    DASHES = False
    SHOWN = ("cluster_size", "extended_l2", "compression_type", "lazy_refcounts", "refcount_bits")

    encryption: Optional[bool] = opt(None, help="Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)")
    encrypt_format: Optional[str] = opt(None, key="encrypt.format", help="Encrypt the image, format choices: 'aes', 'luks'")
    encrypt_key_secret: Optional[SecretRef] = opt(None, key="encrypt.key-secret", help="ID of secret providing qcow AES key or LUKS passphrase")
    encrypt_cipher_alg: Optional[str] = opt(None, key="encrypt.cipher-alg", help="Name of encryption cipher algorithm")
    encrypt_cipher_mode: Optional[str] = opt(None, key="encrypt.cipher-mode", help="Name of encryption cipher mode")
    encrypt_ivgen_alg: Optional[str] = opt(None, key="encrypt.ivgen-alg", help="Name of IV generator algorithm")
    encrypt_ivgen_hash_alg: Optional[str] = opt(None, key="encrypt.ivgen-hash-alg", help="Name of IV generator hash algorithm")
    encrypt_hash_alg: Optional[str] = opt(None, key="encrypt.hash-alg", help="Name of encryption hash algorithm")
    encrypt_iter_time: Optional[int] = opt(None, key="encrypt.iter-time", help="Time to spend in PBKDF in milliseconds")
    cluster_size: Size = opt(65536, help="qcow2 cluster size")
    extended_l2: bool = opt(False, help="Extended L2 tables")
    preallocation: str = opt("off", help="Preallocation mode (allowed values: off, metadata, falloc, full)")
    compression_type: str = opt("zlib", help="Compression method used for image cluster compression")
    size: Size = opt(0, help="Virtual disk size")
    compat: str = opt("1.1", help="Compatibility level (v2 [0.10] or v3 [1.1])")
    backing_file: Optional[str] = opt(None, help="File name of a base image")
    backing_fmt: Optional[str] = opt(None, help="Image format of the base image")
    data_file: Optional[str] = opt(None, help="File name of an external data file")
    data_file_raw: bool = opt(False, help="The external data file must stay valid as a raw image")
    lazy_refcounts: bool = opt(False, help="Postpone refcount updates")
    refcount_bits: int = opt(16, help="Width of a reference count entry in bits")

    def wants_encryption(self) -> bool:
        """Whether any of the options is about encryption."""
        return any(key.startswith("encrypt") for key in self.given())


class Qcow2AmendOptions(Options):
    """Options that amend can change. None of them has a default: what is not given stays."""

    DASHES = False

    encrypt_state: Optional[str] = opt(None, key="encrypt.state", help="State that the key slots are to have (active/inactive)")
    encrypt_keyslot: Optional[int] = opt(None, key="encrypt.keyslot", help="The one key slot to change")
    encrypt_old_secret: Optional[SecretRef] = opt(None, key="encrypt.old-secret", help="ID of the secret whose key slots are to be changed")
    encrypt_new_secret: Optional[SecretRef] = opt(None, key="encrypt.new-secret", help="ID of the secret that the key slots are to have")
    encrypt_iter_time: Optional[int] = opt(None, key="encrypt.iter-time", help="Time to spend in PBKDF in milliseconds")
    size: Optional[Size] = opt(None, help="Virtual disk size")
    compat: Optional[str] = opt(None, help="Compatibility level (v2 [0.10] or v3 [1.1])")
    backing_file: Optional[str] = opt(None, help="File name of a base image")
    backing_fmt: Optional[str] = opt(None, help="Image format of the base image")
    data_file: Optional[str] = opt(None, help="File name of an external data file")
    data_file_raw: Optional[bool] = opt(None, help="The external data file must stay valid as a raw image")
    lazy_refcounts: Optional[bool] = opt(None, help="Postpone refcount updates")
    refcount_bits: Optional[int] = opt(None, help="Width of a reference count entry in bits")


def check_options(options: Qcow2Options, header: Header) -> None:
    """Refuse runtime options that contradict each other or the image, in QEMU's words. Raises OptionError."""
    total, l2, refcounts = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    if total is not None:
        if l2 is not None and refcounts is not None:
            raise OptionError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
        if l2 is not None and l2 > total:
            raise OptionError("l2-cache-size may not exceed cache-size")
        if refcounts is not None and refcounts > total:
            raise OptionError("refcount-cache-size may not exceed cache-size")
    entry = options.l2_cache_entry_size
    if entry is not None and (not 512 <= entry <= header.cluster_size or entry & (entry - 1)):
        raise OptionError("L2 cache entry size must be a power of two between 512 and the cluster size (%d)" % header.cluster_size)
    sizes = cache_sizes(options, header)
    if sizes[1] // header.cluster_size > 0x7FFFFFFF:
        raise OptionError("Refcount cache size too big")
    if sum(sizes) > _MODEST and sum(sizes) > _memory():
        raise OptionError("Could not allocate metadata caches")
    if options.cache_clean_interval is not None and options.cache_clean_interval > 0xFFFFFFFF:
        raise OptionError("Cache clean interval too big")
    if options.lazy_refcounts and header.version < 3:
        raise OptionError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
    _check_overlap(options)
    if options.discard_no_unref and header.version < 3:
        raise OptionError("discard-no-unref is only supported since qcow2 version 3")
    if options.encrypt_format is not None:
        if not header.crypt_method:
            raise OptionError("No encryption in image header, but options specified format '%s'" % options.encrypt_format)
        found = METHODS[header.crypt_method]
        if options.encrypt_format != found:
            raise OptionError("Header reported '%s' encryption format but options specify '%s'" % (found, options.encrypt_format))


def cache_sizes(options: Qcow2Options, header: Header) -> tuple[int, int]:
    """Bytes for L2 tables (never more than the image can have) and for refcount blocks, as QEMU takes them from the options."""
    size = header.cluster_size
    most = -(-(-(-header.size // size) * header.l2_entry_size) // size) * size
    least = MIN_REFCOUNT_TABLES * size
    total, l2, refcounts = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    if total is not None:
        if l2 is not None:
            refcounts = total - l2
        elif refcounts is not None:
            l2 = total - refcounts
        elif total >= most + least:
            l2, refcounts = most, total - most
        else:
            refcounts = min(total, least)
            l2 = total - refcounts
    l2 = min(most, MAX_L2_CACHE if l2 is None else l2)
    return max(l2, 2 * (options.l2_cache_entry_size or size)), max(least, refcounts or 0)


def _memory() -> int:
    """Bytes of memory that the machine has."""
    import os

    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62


def _check_overlap(options: Qcow2Options) -> None:
    plain, template = options.overlap_check, options.overlap_check_template
    if plain is not None and template is not None and plain != template:
        raise OptionError("Conflicting values for qcow2 options 'overlap-check' ('%s') and 'overlap-check.template' ('%s')" % (plain, template))
    chosen = template if plain is None else plain
    if chosen is not None and chosen not in OVERLAP_TEMPLATES:
        raise OptionError(
            "Unsupported value '%s' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all" % chosen
        )
