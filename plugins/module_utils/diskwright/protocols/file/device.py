# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""host_device: a block or character device of the host (https://man7.org/linux/man-pages/man4/sd.4.html for the ioctls)."""

from __future__ import annotations

import errno
import os
import stat

from ...errors import Error, OptionError
from ...extent import Extent
from ...node import MAX_SIZE, OpenFlags
from ...options import Options, Size, opt
from ...parts import part
from . import BAD_VALUE, HOLE, STORED, File

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Iterable

SECTOR = 512

_BLKROGET = 0x125E
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F


class HostDeviceCreateOptions(Options):
    """Creation options of host_device: a device is what it is."""

    DASHES = False

    size: Size = opt(0, help="Virtual disk size")
    preallocation: str = opt(
        "off", choices=("off", "metadata", "falloc", "full"), refusal=BAD_VALUE, help="Preallocation mode (allowed values: off)"
    )


class HostDevice(File):
    """A device. Its size is given, and it has no holes."""

    driver = "host_device"
    create_options: ClassVar[type[Options]] = HostDeviceCreateOptions
    growable = False
    fixed = True
    zero_initialized = False

    def _examine(self) -> None:
        mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise Error(
                "'%s' driver requires '%s' to be either a character or block device" % (self.driver, self._name),
                filename=self._name,
                errno=errno.EINVAL,
            )
        self._is_block = stat.S_ISBLK(mode)
        if self.flags.writable and self._is_block and self._is_read_only():
            raise Error("The device is not writable: Permission denied", filename=self._name, errno=errno.EACCES)
        if self.flags.direct:
            request_alignment = part(__package__, "direct").request_alignment

            self.request_alignment = request_alignment(self._fd)
        else:
            self.request_alignment = 1
        if self._is_block:
            self._size = os.lseek(self._fd, 0, os.SEEK_END)

    def _is_read_only(self) -> bool:
        from fcntl import ioctl
        from struct import unpack

        try:
            return bool(unpack("i", ioctl(self._fd, _BLKROGET, bytes(4)))[0])
        except OSError:
            return False

    @property
    def size(self) -> int:
        return self._size

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        if offset < self._size:
            yield Extent(0, self._size, STORED, self, 0)
        if offset + length > self._size:
            yield Extent(self._size, MAX_SIZE - self._size, HOLE, self, self._size)

    def write_own(self, host_offset: int, view: memoryview) -> None:
        """See Node.write_own; a device does not grow."""
        if host_offset + len(view) > self._size:
            raise Error("%s: write at %#x is beyond the end of the device" % (self._name, host_offset), filename=self._name, errno=errno.ENOSPC)
        super().write_own(host_offset, view)

    def _padded(self, end: int) -> int:
        return 0

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        start = -(-offset // SECTOR) * SECTOR
        count = (offset + length) // SECTOR * SECTOR - start
        if not self._is_block or count <= 0:
            return offset, 0
        if unmap and self.flags.unmap:
            punch_hole = part(__package__, "preallocate").punch_hole

            if punch_hole(self._fd, start, count):
                return start, count
        return start, count if self._ioctl(_BLKZEROOUT, start, count) else 0

    def _discard(self, offset: int, length: int) -> None:
        start = -(-offset // SECTOR) * SECTOR
        count = (offset + length) // SECTOR * SECTOR - start
        if self.flags.unmap and self._is_block and count > 0:
            self._ioctl(_BLKDISCARD, start, count)

    def _ioctl(self, request: int, offset: int, length: int) -> bool:
        """Have the device work on a range; False where it cannot."""
        from fcntl import ioctl
        from struct import pack

        try:
            ioctl(self._fd, request, pack("QQ", offset, length))
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS):
                raise
            return False
        return True

    def _truncate(self, size: int, preallocation: str) -> None:
        if preallocation != "off":
            raise OptionError("Unsupported preallocation mode '%s'" % preallocation, errno=errno.ENOTSUP)
        if size > self._size:
            raise Error("Cannot grow device files", filename=self._name, errno=errno.EINVAL)
        if size < self._size:
            raise Error("Cannot resize device files", filename=self._name, errno=errno.ENOTSUP)

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        """Nothing is created: the device must be there and be large enough. Its first sector is cleared, so that
        nothing that it held before is taken for the new image."""
        try:
            device = cls(cls.options_class.from_mapping({"filename": filename}), OpenFlags(writable=True, resize=True))
        except Error as exc:
            raise Error(
                "Protocol driver '%s' does not support creating new images, so an existing image must be selected as the target; "
                "however, opening the given target as an existing image failed: %s" % (cls.driver, exc),
                filename=filename,
                errno=exc.errno,
                hint=exc.hint,
            ) from exc
        with device:
            if options.preallocation != "off":
                raise OptionError("Unsupported preallocation mode '%s'" % options.preallocation)
            if options.size > device.size:
                raise Error("Cannot grow device files", filename=filename, errno=errno.EINVAL)
            device.pwrite(0, bytes(min(SECTOR, options.size, device.size)))
