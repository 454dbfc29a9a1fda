# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""nvme: a namespace of an NVMe controller that no driver of the kernel holds (https://nvmexpress.org/specifications/, BlockdevOptionsNVMe of
https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html).

QEMU drives the controller itself, through VFIO. Here such a device is described and checked, and refused when it is opened: the kernel
gives the same namespace as /dev/nvmeXnY.
"""

from __future__ import annotations

from ..errors import OptionError
from ..node import OpenFlags, Protocol
from ..options import Options, opt
from .existing import ExistingCreateOptions, take_existing
from .vfio import refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Optional

PREFIX = "nvme://"


class NvmeOptions(Options):
    """Runtime options of nvme."""

    device: Optional[str] = opt(None, help="PCI address of the controller, 0000:44:00.0")
    namespace: int = opt(0, help="number of the namespace, from 1 on")


class Nvme(Protocol):
    """A namespace; there is no way to open one."""

    driver = "nvme"
    options_class = NvmeOptions
    strong_options = ("device", "namespace")
    create_options: ClassVar[type[Options]] = ExistingCreateOptions

    def __init__(self, options: NvmeOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if options.device is None:
            raise OptionError("'device' option is required")
        refuse(options.device)

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        device, _slash, number = filename[len(PREFIX) :].partition("/") if filename.startswith(PREFIX) else ("", "", "")
        found: dict[str, Any] = {"device": device} if device else {}
        if number:
            if not number.isdecimal() or not number.isascii():
                raise OptionError("Invalid namespace '%s', positive number expected" % number)
            found["namespace"] = number
        return found

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        """Nothing is created: see take_existing."""

        def open_it(flags: OpenFlags) -> Nvme:
            return cls(cls.options_class.from_mapping(cls.parse_name(filename)), flags)

        take_existing(cls.driver, filename, options, open_it, "Cannot grow NVMe devices")
