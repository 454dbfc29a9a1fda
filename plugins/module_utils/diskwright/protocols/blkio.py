# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The drivers that QEMU has through libblkio (https://libblkio.gitlab.io/libblkio/): described and checked, and refused when opened.

Options: BlockdevOptionsIoUring, BlockdevOptionsNvmeIoUring and BlockdevOptionsVirtioBlk* of
https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html.
"""

from __future__ import annotations

import os

from ..errors import Error, OptionError, Unsupported
from ..node import OpenFlags, Protocol
from ..options import Options, opt
from .vfio import refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, Optional


class FilenameOptions(Options):
    """Runtime options of io_uring."""

    filename: Optional[str] = opt(None, help="path of the file or device")


class PathOptions(Options):
    """Runtime options of the drivers that go to a device, or to the socket of one."""

    path: Optional[str] = opt(None, help="path of the device or of its socket")


class Blkio(Protocol):
    """What the drivers have in common: what is missing is named."""

    key = "path"
    instead = ""  # what opens the same storage

    def __init__(self, options: Any, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        path = getattr(options, self.key)
        if path is None:
            raise OptionError("Parameter '%s' is missing" % self.key)
        self._refuse(path)

    def _refuse(self, path: str) -> NoReturn:
        try:
            os.stat(path)
        except (OSError, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or "No such file or directory"
            raise Error("Could not open '%s': %s" % (path, reason), filename=path, errno=getattr(exc, "errno", None)) from exc
        raise Unsupported("The '%s' block driver needs libblkio, which is not used here%s" % (self.driver, self.instead), filename=path)

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        return {cls.key: filename[len(cls.driver) + 1 :]}


class IoUring(Blkio):
    """A file or device, by io_uring."""

    driver = "io_uring"
    options_class = FilenameOptions
    key = "filename"
    instead = ": use file or host_device, with aio=io_uring if you like"


class NvmeIoUring(Blkio):
    """A namespace, by the kernel's pass-through of NVMe commands (/dev/ng0n1)."""

    driver = "nvme-io_uring"
    options_class = PathOptions
    strong_options = ("path",)
    instead = ": use host_device with the block device of the namespace (/dev/nvme0n1)"


class VirtioBlkVfioPci(Blkio):
    """A virtio-blk PCI device, by VFIO; its path is the one in sysfs."""

    driver = "virtio-blk-vfio-pci"
    options_class = PathOptions
    strong_options = ("path",)

    def _refuse(self, path: str) -> NoReturn:
        refuse(os.path.basename(path.rstrip("/")))


class VirtioBlkVhostUser(Blkio):
    """A virtio-blk device that another process gives over a socket."""

    driver = "virtio-blk-vhost-user"
    options_class = PathOptions
    strong_options = ("path",)


class VirtioBlkVhostVdpa(Blkio):
    """A virtio-blk device of a vDPA card (/dev/vhost-vdpa-0)."""

    driver = "virtio-blk-vhost-vdpa"
    options_class = PathOptions
    strong_options = ("path",)
