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


def _throttle() -> type[Node]:
    from .filters.throttle import Throttle

    return Throttle


# name -> (loader, (offset, magic)...): probing loads a class, and asks its `probe`, only where one of its magics is found
FORMATS: dict[str, tuple[Callable[[], type[Node]], tuple[tuple[int, bytes], ...]]] = {
    "bochs": (_bochs, ((0, b"Bochs Virtual HD Image"),)),
    "cloop": (_cloop, ((0, b"#!/bin/sh\n#V2.0 Format\n"),)),
    "luks": (_luks, ((0, b"LUKS\xba\xbe"),)),
    "qcow2": (_qcow2, ((0, b"QFI\xfb"),)),
    "qed": (_qed, ((0, b"QED\0"),)),
    "raw": (_raw, ()),
    "vdi": (_vdi, ((64, b"\x7f\x10\xda\xbe"),)),
    "vpc": (_vpc, ((0, b"conectix"),)),
    "vhdx": (_vhdx, ((0, b"vhdxfile"),)),
    # a descriptor is text: comments or empty lines, then its version
    "vmdk": (_vmdk, ((0, b"KDMV"), (0, b"COWD"), (0, b"#"), (0, b"version"), (0, b" "), (0, b"\xef\xbb\xbf"))),
}

PROTOCOLS: dict[str, Callable[[], type[Node]]] = {
    "file": _file,
    "host_device": _host_device,
    "null-co": _null_co,
    "null-aio": _null_aio,
}

FILTERS: dict[str, Callable[[], type[Node]]] = {
    "throttle": _throttle,
}


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

    loader = PROTOCOLS.get(name)
    cls = loader() if loader else None
    if cls is None or not issubclass(cls, Protocol):
        raise OptionError("Unknown protocol '%s'" % name)
    return cls
