# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""host_cdrom: an optical drive of the host (https://www.kernel.org/doc/html/latest/userspace-api/ioctl/cdrom.html)."""

from __future__ import annotations

import errno
import os

from ...errors import Error
from ...node import fill_zeroes
from .device import HostDevice

_CDROM_DRIVE_STATUS = 0x5326
_CURRENT_SLOT = 0x7FFFFFFF
_DISC_OK = 4


class HostCdrom(HostDevice):
    """A drive, with or without a medium."""

    driver = "host_cdrom"

    def _examine(self) -> None:
        super()._examine()
        self._inserted = _status(self._fd) == _DISC_OK
        if not self._inserted:
            self._size = 0

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        if self._inserted:
            super()._pread_into(host_offset, view)
        else:
            fill_zeroes(view)  # it is all behind the end

    def write_own(self, host_offset: int, view: memoryview) -> None:
        """See Node.write_own."""
        if not self._inserted:
            raise Error("%s: No medium found" % self._name, filename=self._name, errno=errno.ENOMEDIUM)
        super().write_own(host_offset, view)

    def disk_size(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def fileno(self) -> int:
        """None to go around the driver with, while there is no medium."""
        return self._fd if self._inserted else -1


def _status(fd: int) -> int:
    """What the drive says of its medium; -1 where this is no drive."""
    from fcntl import ioctl

    try:
        return int(ioctl(fd, _CDROM_DRIVE_STATUS, _CURRENT_SLOT))
    except OSError:
        return -1
