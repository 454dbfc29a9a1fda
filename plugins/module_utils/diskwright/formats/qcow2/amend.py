# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Changing options of an image that exists (https://www.qemu.org/docs/master/tools/qemu-img.html, amend).

Every step leaves an image that is whole: new structures are on the disk before the one write of the header that turns to them.
"""

from __future__ import annotations

import errno
import os

from ...errors import OptionError, Unsupported
from ...extent import ZERO as STATUS_ZERO
from . import header as layout
from .create import FEATURE_NAMES_ABOVE, VERSIONS


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional

    from .image import Qcow2
    from .options import Qcow2AmendOptions

    Progress = Callable[[int, int], None]

NEWER = "compatibility level 1.1 %s above (use compat=1.1 or greater)"
PIECE = 1 << 20  # bytes of zeroes that become data at a time


def amend(image: Qcow2, options: Qcow2AmendOptions, force: bool, progress: Optional[Progress]) -> None:
    """Change what `options` say; see Node.amend. Raises OptionError in QEMU's words."""
    values = {key: value for key, value in options.given().items() if value is not None}
    _check_values(image, values)
    header = image.header
    version = VERSIONS[values["compat"]] if "compat" in values else header.version
    tell = progress or (lambda _done, _total: None)
    if version > header.version:
        _upgrade(image)
        tell(1, 2)
    slots = {key: value for key, value in values.items() if key.startswith("encrypt.")}
    if slots and image.encryption is not None:
        image.encryption.amend(slots, force)
    order = values["refcount_bits"].bit_length() - 1 if "refcount_bits" in values else header.refcount_order
    if order != header.refcount_order:
        if version < 3 and order != 4:
            raise OptionError("Refcount widths other than 16 bits require " + NEWER % "or")
        from .widths import change_refcount_order

        change_refcount_order(image, order, tell)
    _amend_data_file(image, values)
    _compare_backing(image, values)
    if "lazy_refcounts" in values:
        _set_lazy(image, values["lazy_refcounts"], version)
    size = values.get("size", 0)
    if size and size != image.size:
        image.truncate(size)
    if version < header.version:
        _downgrade(image, tell)


def _check_values(image: Qcow2, values: Mapping[str, Any]) -> None:
    """Refuse values that mean nothing, in QEMU's order."""
    if values.get("compat", "v3") not in VERSIONS:
        raise OptionError("Unknown compatibility level %s" % values["compat"])
    if any(key.startswith("encrypt.") for key in values) and not image.header.crypt_method:
        raise OptionError("Can't amend encryption options - encryption not present")
    external = bool(image.header.incompatible_features & layout.DATA_FILE)
    if "data_file" in values and not external:
        raise OptionError("data-file can only be set for images that use an external data file")
    if values.get("data_file_raw") and not image.header.autoclear_features & layout.RAW_DATA_FILE:
        raise OptionError("data-file-raw cannot be set on existing images")
    bits = values.get("refcount_bits", 16)
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise OptionError("Refcount width must be a power of two and may not exceed 64 bits")


def _amend_data_file(image: Qcow2, values: Mapping[str, Any]) -> None:
    header = image.header
    if "data_file_raw" in values and not values["data_file_raw"] and header.autoclear_features & layout.RAW_DATA_FILE:
        image.change_record(autoclear_features=header.autoclear_features & ~layout.RAW_DATA_FILE)
    if "data_file" in values and header.incompatible_features & layout.DATA_FILE:
        name = os.fsencode(values["data_file"]) or None
        if name != header.extension(layout.EXT_DATA_FILE):
            _rewrite_header(image, lambda: header.set_extension(layout.EXT_DATA_FILE, name))


def _compare_backing(image: Qcow2, values: Mapping[str, Any]) -> None:
    if "backing_file" in values or "backing_fmt" in values:
        if (values.get("backing_file"), values.get("backing_fmt")) != (image.backing_filename, image.backing_format):
            raise OptionError("Cannot amend the backing file", errno=errno.EINVAL, hint="You can use 'qemu-img rebase' instead.")


def _set_lazy(image: Qcow2, wanted: bool, version: int) -> None:
    header = image.header
    if wanted == bool(header.compatible_features & layout.LAZY_REFCOUNTS):
        return
    if wanted and version < 3:
        raise OptionError("Lazy refcounts only supported with " + NEWER % "and")
    image.mark_clean()
    image.lazy = wanted
    image.change_record(compatible_features=header.compatible_features ^ layout.LAZY_REFCOUNTS)


def _rewrite_header(image: Qcow2, change: Callable[[], object]) -> None:
    """Change the header's record and extensions, in one write of the first cluster; nothing is changed if it does not fit."""
    header = image.header
    before = dict(header.__dict__)
    extensions = list(header.extensions)
    try:
        change()
        packed = header.pack()
    except BaseException:
        header.__dict__.clear()
        header.__dict__.update(before)
        header.extensions = extensions
        raise
    image.flush()
    image.file.write_hosted(0, memoryview(packed))
    image.barrier()


def _upgrade(image: Qcow2) -> None:
    """Version 2 to 3."""
    header = image.header
    old = header.snapshots_offset
    snapshots_offset, clusters = _complete_snapshots(image)

    def change() -> None:
        header.version = 3
        header.snapshots_offset = snapshots_offset
        header.header_length = 112
        header.additional = bytes(8)
        if header.cluster_size > FEATURE_NAMES_ABOVE:
            header.set_extension(layout.EXT_FEATURE_NAMES, layout.feature_name_table())

    _rewrite_header(image, change)
    if snapshots_offset != old:
        image.overlap.forget()
        image.refcounts.give_back(old // image.cluster_size, clusters)


def _complete_snapshots(image: Qcow2) -> tuple[int, int]:
    """Write the snapshot table at another place if entries lack what version 3 demands; its offset, and the clusters of the old one."""
    from .snapshot_changes import pack_table
    from .snapshots import read_snapshots

    header, size = image.header, image.cluster_size
    snapshots, length = read_snapshots(image) if header.nb_snapshots else ([], 0)
    if all(len(entry.extra) >= 16 for entry in snapshots):
        return header.snapshots_offset, 0
    table = pack_table(image, snapshots)
    with image._lock:
        offset = image.refcounts.allocate_whole(-(-len(table) // size)) * size
        image.refcounts.write_back()
        image.barrier()
        image.file.write_hosted(offset, memoryview(table.ljust(-(-len(table) // size) * size, b"\0")))
        image.barrier()
    return offset, -(-length // size)


def _downgrade(image: Qcow2, tell: Progress) -> None:
    """Version 3 to 2."""
    header = image.header
    if header.refcount_order != 4:
        raise OptionError("compat=0.10 requires refcount_bits=16")
    if header.incompatible_features & layout.DATA_FILE:
        raise Unsupported("Cannot downgrade an image with a data file", errno=errno.ENOTSUP)
    if header.nb_snapshots and any(entry.vm_state_size >> 32 or entry.disk_size not in (None, image.size) for entry in image.snapshots()):
        raise Unsupported("Internal snapshots prevent downgrade of image", errno=errno.ENOTSUP)
    image.mark_clean()
    if header.incompatible_features & ~layout.COMPRESSION_TYPE:
        raise Unsupported(
            "Cannot downgrade an image with incompatible features 0x%x set" % (header.incompatible_features & ~layout.COMPRESSION_TYPE),
            errno=errno.ENOTSUP,
        )
    if header.compression_type != layout.ZLIB and _has_compressed(image):
        raise Unsupported("Cannot downgrade an image with zstd compression type and existing compressed clusters", errno=errno.ENOTSUP)
    _expand_zeroes(image, tell)
    if header.nb_snapshots:
        from .widths import expand_snapshots

        expand_snapshots(image)

    def change() -> None:
        header.version = 2
        header.header_length = layout.HeaderV2.SIZE
        header.additional = b""
        header.incompatible_features = header.compatible_features = header.autoclear_features = 0
        header.set_extension(layout.EXT_FEATURE_NAMES, None)

    _rewrite_header(image, change)
    image.lazy = False
    image.forget_bitmaps()


def _has_compressed(image: Qcow2) -> bool:
    from ...extent import COMPRESSED

    return any(extent.status & COMPRESSED for extent in image.tables.map(0, image.size))


def _expand_zeroes(image: Qcow2, tell: Progress) -> None:
    """Turn zero clusters into unallocated ones, where those read as zeroes too, or into clusters full of zeroes."""
    size, position = image.cluster_size, 0
    backed = image.backing_filename is not None
    while position < image.size:
        for start, count, status, _host, _host_offset in image.block_status(position, image.size - position, False, 1024):
            position = start + count
            if not status & STATUS_ZERO:
                continue
            if not backed:
                from .discard import forget_zeroes

                forget_zeroes(image, start, -(-position // size) * size)
                continue
            for at in range(start, position, PIECE):
                image.pwrite(at, bytes(min(PIECE, position - at)))
        tell(position, image.size)
    image.flush()
