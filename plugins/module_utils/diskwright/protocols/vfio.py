# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""PCI devices that a program drives itself, by VFIO (https://docs.kernel.org/driver-api/vfio.html): there is no such driver here."""

from __future__ import annotations

import os

from ..errors import Error, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

VFIO = "/dev/vfio/vfio"


def refuse(device: str) -> NoReturn:
    """Say what is missing for a PCI device to be driven from here."""
    try:
        os.stat(VFIO)
    except OSError as exc:
        raise Error("Failed to open %s: %s" % (VFIO, exc.strerror), filename=VFIO, errno=exc.errno) from exc
    if not os.path.isdir("/sys/bus/pci/devices/%s" % device) or "/" in device:
        raise Error("There is no PCI device %s" % device, filename=device, errno=2)
    raise Unsupported("The PCI device %s is not driven from here: bind it to the kernel's driver, and open its device under /dev" % device, filename=device)
