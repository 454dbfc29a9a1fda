# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""replication and blkreplay: what a description may say of them (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html), and why they cannot be opened.

Both work together with a virtual machine that runs in the same process.
"""

from __future__ import annotations

import errno

from ..errors import OptionError, Unsupported
from ..filter import Filter
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ..node import OpenFlags
    from ..options import NodeRef


class ReplicationOptions(Options):
    """Runtime options of replication."""

    mode: Optional[str] = opt(None, help="primary or secondary: on which side of a pair of machines the node is")
    top_id: Optional[str] = opt(None, help="secondary: the node or device at the top of its chain")
    file: NodeRef = opt(help="the node that is replicated")


class Replication(Filter):
    """One side of COLO, which keeps a second virtual machine in step with the first."""

    driver = "replication"
    options_class = ReplicationOptions
    strong_options = ("mode", "top-id")

    def __init__(self, options: ReplicationOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if options.mode is None:
            raise OptionError("Missing the option mode")
        if options.mode not in ("primary", "secondary"):
            raise OptionError("The option mode's value should be primary or secondary")
        if options.mode == "secondary" and options.top_id is None:
            raise OptionError("Missing the option top-id")
        if options.mode == "primary" and options.top_id is not None:
            raise OptionError("The primary side does not support option top-id")
        text = "The driver 'replication' works only in the QEMU that runs the virtual machine: COLO starts it, and checkpoints it with the machine's memory"
        raise Unsupported(text, errno=errno.ENOTSUP)


class BlkreplayOptions(Options):
    """Runtime options of blkreplay."""

    image: NodeRef = opt(help="the node whose requests are recorded or replayed")


class Blkreplay(Filter):
    """The order of requests, recorded and replayed together with all else that a virtual machine does."""

    driver = "blkreplay"
    primary = "image"
    options_class = BlkreplayOptions

    def __init__(self, options: BlkreplayOptions, flags: OpenFlags) -> None:
        text = "The driver 'blkreplay' works only in the QEMU that runs the virtual machine: it orders requests by the machine's instruction counter"
        raise Unsupported(text, errno=errno.ENOTSUP)
