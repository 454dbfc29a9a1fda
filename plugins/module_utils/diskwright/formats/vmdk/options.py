# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The options of vmdk (https://www.qemu.org/docs/master/system/images.html, VMDK)."""

from __future__ import annotations

from ...errors import OptionError
from ...options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...options import NodeRef, Size

FLAT = ("monolithicFlat", "twoGbMaxExtentFlat")
SPLIT = ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat")
SUBFORMATS = ("monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized")
ADAPTERS = ("ide", "lsilogic", "buslogic", "legacyESX")
ENOTSUP, EINVAL = 95, 22


class VmdkOptions(Options):
    """Runtime options of vmdk."""

    file: NodeRef = opt(help="the node that holds the image, or the descriptor of its extents")
    backing: Optional[NodeRef] = opt(None, help="the node that holds what the image does not")


class VmdkCreateOptions(Options):
    """Creation options of vmdk."""

    DASHES = False
    SHOWN = ("compat6", "hwversion")

    size: Size = opt(0, help="Virtual disk size")
    adapter_type: str = opt("ide", help="Virtual adapter type: ide (default), lsilogic, buslogic or legacyESX")
    backing_file: Optional[str] = opt(None, help="File name of a base image")
    backing_fmt: Optional[str] = opt(None, help="Image format of the base image, which can only be vmdk")
    compat6: bool = opt(False, help="VMDK version 6 image")
    hwversion: str = opt("undefined", help="VMDK hardware version")
    toolsversion: str = opt("2147483647", help="VMware guest tools version")
    subformat: str = opt("monolithicSparse", help="Kind of image: " + ", ".join(SUBFORMATS))
    zeroed_grain: bool = opt(False, help="Grains of zeroes take no room (needs a reader that knows them)")


def check_options(options: VmdkCreateOptions) -> None:
    """Refuse what does not go together, in QEMU's words. Raises OptionError."""
    if options.adapter_type not in ADAPTERS:
        raise OptionError("invalid parameter value: %s" % options.adapter_type)
    if options.hwversion != "undefined" and options.compat6:
        raise OptionError("compat6 cannot be enabled with hwversion set", errno=EINVAL)
    if options.subformat not in SUBFORMATS:
        raise OptionError("invalid parameter value: %s" % options.subformat)
    if options.subformat in FLAT:
        if options.backing_file is not None:
            raise OptionError("Flat image can't have backing file", errno=ENOTSUP)
        if options.zeroed_grain:
            raise OptionError("Flat image can't enable zeroed grain", errno=ENOTSUP)
