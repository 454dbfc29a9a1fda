# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""THE table: driver name -> class, by static imports inside functions, so that only what is used is loaded.

A new driver is one file and one line here (and its name in FORMATS or PROTOCOLS).
"""

from __future__ import annotations

from .errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

    from .node import Format, Node, Protocol


def _raw() -> type[Node]:
    from .formats.raw import Raw

    return Raw


def _qcow() -> type[Node]:
    from .formats.qcow import Qcow

    return Qcow


def _parallels() -> type[Node]:
    from .formats.parallels import Parallels

    return Parallels


def _qcow2() -> type[Node]:
    from .formats.qcow2 import Qcow2

    return Qcow2


def _bochs() -> type[Node]:
    from .formats.bochs import Bochs

    return Bochs


def _cloop() -> type[Node]:
    from .formats.cloop import Cloop

    return Cloop


def _luks() -> type[Node]:
    from .formats.luks import Luks

    return Luks


def _vdi() -> type[Node]:
    from .formats.vdi import Vdi

    return Vdi


def _gzip() -> type[Node]:
    from .formats.wrapped import Gzip

    return Gzip


def _xz() -> type[Node]:
    from .formats.wrapped import Xz

    return Xz


def _bzip2() -> type[Node]:
    from .formats.wrapped import Bzip2

    return Bzip2


def _zstd() -> type[Node]:
    from .formats.wrapped import Zstd

    return Zstd


def _ova() -> type[Node]:
    from .formats.ova import Ova

    return Ova


def _ovf() -> type[Node]:
    from .formats.ova import Ovf

    return Ovf


def _vmdk() -> type[Node]:
    from .formats.vmdk import Vmdk

    return Vmdk


def _qed() -> type[Node]:
    from .formats.qed import Qed

    return Qed


def _vhdx() -> type[Node]:
    from .formats.vhdx import Vhdx

    return Vhdx


def _vpc() -> type[Node]:
    from .formats.vpc import Vpc

    return Vpc


def _dmg() -> type[Node]:
    from .formats.dmg import Dmg

    return Dmg


def _file() -> type[Node]:
    from .protocols.file import File

    return File


def _host_device() -> type[Node]:
    from .protocols.file.device import HostDevice

    return HostDevice


def _null_co() -> type[Node]:
    from .protocols.null import NullCo

    return NullCo


def _null_aio() -> type[Node]:
    from .protocols.null import NullAio

    return NullAio


def _blklogwrites() -> type[Node]:
    from .filters.blklogwrites import Blklogwrites

    return Blklogwrites


def _blkverify() -> type[Node]:
    from .filters.blkverify import Blkverify

    return Blkverify


def _compress() -> type[Node]:
    from .filters.compress import Compress

    return Compress


def _copy_on_read() -> type[Node]:
    from .filters.copy_on_read import CopyOnRead

    return CopyOnRead


def _preallocate() -> type[Node]:
    from .filters.preallocate import Preallocate

    return Preallocate


def _quorum() -> type[Node]:
    from .filters.quorum import Quorum

    return Quorum


def _throttle() -> type[Node]:
    from .filters.throttle import Throttle

    return Throttle


def _vvfat() -> type[Node]:
    from .protocols.vvfat import Vvfat

    return Vvfat


# name -> (loader, (offset, magic)...): probing loads a class, and asks its `probe`, only where one of its magics is found. Offsets below 0 count
# from the end of the file, which is looked at (and `probe_tail` asked) only where nothing else matches.
FORMATS: dict[str, tuple[Callable[[], type[Node]], tuple[tuple[int, bytes], ...]]] = {
    "bochs": (_bochs, ((0, b"Bochs Virtual HD Image"),)),
    "cloop": (_cloop, ((0, b"#!/bin/sh\n#V2.0 Format\n"),)),
    "dmg": (_dmg, ((-512, b"koly"),)),
    "luks": (_luks, ((0, b"LUKS\xba\xbe"),)),
    "qcow": (_qcow, ((0, b"QFI\xfb\0\0\0\1"),)),
    "parallels": (_parallels, ((0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt"))),
    "qcow2": (_qcow2, ((0, b"QFI\xfb"),)),
    "qed": (_qed, ((0, b"QED\0"),)),
    "raw": (_raw, ()),
    "vdi": (_vdi, ((64, b"\x7f\x10\xda\xbe"),)),
    "vpc": (_vpc, ((0, b"conectix"),)),
    "vhdx": (_vhdx, ((0, b"vhdxfile"),)),
    # a descriptor is text: comments or empty lines, then its version
    "bzip2": (_bzip2, ((0, b"BZh"),)),
    "gzip": (_gzip, ((0, b"\x1f\x8b\x08"),)),
    "xz": (_xz, ((0, b"\xfd7zXZ\0"),)),
    "zstd": (_zstd, ((0, b"\x28\xb5\x2f\xfd"),)),
    "ova": (_ova, ((257, b"ustar"),)),
    "ovf": (_ovf, ((0, b"<?xml"), (0, b"<Envelope"), (0, b"<ovf:Envelope"), (0, b"\xef\xbb\xbf<"))),
    "vmdk": (_vmdk, ((0, b"KDMV"), (0, b"COWD"), (0, b"#"), (0, b"version"), (0, b" "), (0, b"\xef\xbb\xbf"))),
}

# what a file of such a name is, whatever it holds, if its beginning says nothing or STREAMS; as in QEMU
SUFFIXES = {".dmg": "dmg"}

# compressed streams, with which a part of an image of another format may begin as well
STREAMS = ("bzip2", "gzip", "xz", "zstd")

PROTOCOLS: dict[str, Callable[[], type[Node]]] = {
    "file": _file,
    "host_device": _host_device,
    "null-co": _null_co,
    "null-aio": _null_aio,
    "vvfat": _vvfat,
}

# What stands in front of a file name where it is not the driver's own name.
PREFIXES = {"fat": "vvfat"}

FILTERS: dict[str, Callable[[], type[Node]]] = {
    "blklogwrites": _blklogwrites,
    "blkverify": _blkverify,
    "compress": _compress,
    "copy-on-read": _copy_on_read,
    "preallocate": _preallocate,
    "quorum": _quorum,
    "throttle": _throttle,
}

# The filters that stand in front of a file name as protocols do.
PREFIXED = ("blkverify",)

# Every name that an image may give for the format of its backing file: the drivers of qemu-img 10.0.2, there or not.
KNOWN = (
    "blkdebug blklogwrites blkreplay blkverify bochs cloop compress copy-before-write copy-on-read dmg file ftp ftps gluster host_cdrom "
    "host_device http https iscsi luks nbd nfs null-aio null-co nvme parallels preallocate qcow qcow2 qed quorum raw rbd replication "
    "snapshot-access ssh throttle vdi vhdx vmdk vpc vvfat"
)


def lookup(name: str) -> type[Node]:
    """The class of the driver `name`. Raises OptionError in QEMU's words for an unknown one."""
    if name in FORMATS:
        return FORMATS[name][0]()
    loader = PROTOCOLS.get(name) or FILTERS.get(name)
    if loader is None:
        raise OptionError("Unknown driver '%s'" % name)
    return loader()


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

    loader = None if name in PREFIXES.values() else PROTOCOLS.get(PREFIXES.get(name, name))
    cls = loader() if loader else None
    if cls is None or not issubclass(cls, Protocol):
        raise OptionError("Unknown protocol '%s'" % name)
    return cls
