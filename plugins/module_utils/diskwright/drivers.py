# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""THE table: driver name -> class, as a place "module:class" that is imported when it is needed.

A new driver is one file and one line here. The imports are by name, so that Ansible, which sends what is imported statically, sends
no module all drivers: those that a module is to have are listed in bundles/.
"""

from __future__ import annotations

from .errors import OptionError
from .parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .node import Format, Node, Protocol


# name -> (place, (offset, magic)...): probing loads a class, and asks its `probe`, only where one of its magics is found. Offsets below 0 count
# from the end of the file, which is looked at (and `probe_tail` asked) only where nothing else matches.
FORMATS: dict[str, tuple[str, tuple[tuple[int, bytes], ...]]] = {
    "bochs": ("formats.bochs:Bochs", ((0, b"Bochs Virtual HD Image"),)),
    "cloop": ("formats.cloop:Cloop", ((0, b"#!/bin/sh\n#V2.0 Format\n"),)),
    "dmg": ("formats.dmg:Dmg", ((-512, b"koly"),)),
    "luks": ("formats.luks:Luks", ((0, b"LUKS\xba\xbe"),)),
    "qcow": ("formats.qcow:Qcow", ((0, b"QFI\xfb\0\0\0\1"),)),
    "parallels": ("formats.parallels:Parallels", ((0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt"))),
    "qcow2": ("formats.qcow2:Qcow2", ((0, b"QFI\xfb"),)),
    "qed": ("formats.qed:Qed", ((0, b"QED\0"),)),
    "raw": ("formats.raw:Raw", ()),
    "vdi": ("formats.vdi:Vdi", ((64, b"\x7f\x10\xda\xbe"),)),
    "vpc": ("formats.vpc:Vpc", ((0, b"conectix"),)),
    "vhdx": ("formats.vhdx:Vhdx", ((0, b"vhdxfile"),)),
    # a descriptor is text: comments or empty lines, then its version
    "bzip2": ("formats.wrapped:Bzip2", ((0, b"BZh"),)),
    "gzip": ("formats.wrapped:Gzip", ((0, b"\x1f\x8b\x08"),)),
    "xz": ("formats.wrapped:Xz", ((0, b"\xfd7zXZ\0"),)),
    "zstd": ("formats.wrapped:Zstd", ((0, b"\x28\xb5\x2f\xfd"),)),
    "ova": ("formats.ova:Ova", ((257, b"ustar"),)),
    "ovf": ("formats.ova:Ovf", ((0, b"<?xml"), (0, b"<Envelope"), (0, b"<ovf:Envelope"), (0, b"\xef\xbb\xbf<"))),
    "vmdk": ("formats.vmdk:Vmdk", ((0, b"KDMV"), (0, b"COWD"), (0, b"#"), (0, b"version"), (0, b" "), (0, b"\xef\xbb\xbf"))),
}

# what a file of such a name is, whatever it holds, if its beginning says nothing or STREAMS; as in QEMU
SUFFIXES = {".dmg": "dmg"}

# compressed streams, with which a part of an image of another format may begin as well
STREAMS = ("bzip2", "gzip", "xz", "zstd")

PROTOCOLS: dict[str, str] = {
    "file": "protocols.file:File",
    "ftp": "protocols.url:Ftp",
    "ftps": "protocols.url:Ftps",
    "gluster": "protocols.gluster:Gluster",
    "host_cdrom": "protocols.file.cdrom:HostCdrom",
    "host_device": "protocols.file.device:HostDevice",
    "http": "protocols.url:Http",
    "https": "protocols.url:Https",
    "io_uring": "protocols.blkio:IoUring",
    "iscsi": "protocols.iscsi:Iscsi",
    "nbd": "protocols.nbd.driver:Nbd",
    "nfs": "protocols.nfs:Nfs",
    "null-aio": "protocols.null:NullAio",
    "null-co": "protocols.null:NullCo",
    "nvme": "protocols.nvme:Nvme",
    "nvme-io_uring": "protocols.blkio:NvmeIoUring",
    "rbd": "protocols.rbd:Rbd",
    "ssh": "protocols.ssh:Ssh",
    "virtio-blk-vfio-pci": "protocols.blkio:VirtioBlkVfioPci",
    "virtio-blk-vhost-user": "protocols.blkio:VirtioBlkVhostUser",
    "virtio-blk-vhost-vdpa": "protocols.blkio:VirtioBlkVhostVdpa",
    "vvfat": "protocols.vvfat:Vvfat",
}

# What stands in front of a file name where it is not the driver's own name.
PREFIXES = {"fat": "vvfat", "gluster+tcp": "gluster", "gluster+unix": "gluster", "iser": "iscsi", "nbd+tcp": "nbd", "nbd+unix": "nbd"}

# Drivers whose own name stands in front of no file name.
UNNAMED = ("vvfat",)

FILTERS: dict[str, str] = {
    "blkdebug": "filters.blkdebug:Blkdebug",
    "blklogwrites": "filters.blklogwrites:Blklogwrites",
    "blkreplay": "filters.absent:Blkreplay",
    "blkverify": "filters.blkverify:Blkverify",
    "compress": "filters.compress:Compress",
    "copy-before-write": "filters.copy_before_write:CopyBeforeWrite",
    "copy-on-read": "filters.copy_on_read:CopyOnRead",
    "preallocate": "filters.preallocate:Preallocate",
    "quorum": "filters.quorum:Quorum",
    "replication": "filters.absent:Replication",
    "snapshot-access": "filters.snapshot_access:SnapshotAccess",
    "throttle": "filters.throttle:Throttle",
}

# The filters that stand in front of a file name as protocols do.
PREFIXED = ("blkdebug", "blkverify")

# Every name that an image may give for the format of its backing file: the drivers of qemu-img 10.0.2, also those of libblkio, there or not.
KNOWN = (
    "blkdebug blklogwrites blkreplay blkverify bochs cloop compress copy-before-write copy-on-read dmg file ftp ftps gluster host_cdrom "
    "host_device http https io_uring iscsi luks nbd nfs null-aio null-co nvme nvme-io_uring parallels preallocate qcow qcow2 qed quorum raw rbd replication "
    "snapshot-access ssh throttle vdi vhdx virtio-blk-vfio-pci virtio-blk-vhost-user virtio-blk-vhost-vdpa vmdk vpc vvfat"
)


def load(name: str, place: str) -> type[Node]:
    """The class of the driver `name`, which the table says is at `place`. Raises Unsupported where an Ansible module does not carry it."""
    module, _colon, attribute = place.partition(":")
    found: type[Node] = getattr(part(__package__, module, "driver '%s'" % name), attribute)
    return found


def lookup(name: str) -> type[Node]:
    """The class of the driver `name`. Raises OptionError in QEMU's words for an unknown one, Unsupported for one that is not here."""
    place = FORMATS[name][0] if name in FORMATS else PROTOCOLS.get(name) or FILTERS.get(name)
    if place is None:
        raise OptionError("Unknown driver '%s'" % name)
    return load(name, place)


def lookup_format(name: str) -> type[Format]:
    """The class of the format `name`. Raises OptionError for anything that is no format."""
    from .node import Format

    cls = lookup(name)
    if not issubclass(cls, Format):
        raise OptionError("Unknown driver '%s'" % name)
    return cls


def lookup_protocol(name: str) -> type[Protocol]:
    """The class of the protocol `name`. Raises OptionError for anything that is no protocol."""
    from .node import Protocol

    place = None if name in UNNAMED else PROTOCOLS.get(PREFIXES.get(name, name))
    cls = load(name, place) if place else None
    if cls is None or not issubclass(cls, Protocol):
        raise OptionError("Unknown protocol '%s'" % name)
    return cls
