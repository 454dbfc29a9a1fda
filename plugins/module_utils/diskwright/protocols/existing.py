# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Storage that cannot be made, only taken: a new image goes to what is there already, if it is large enough."""

from __future__ import annotations

import errno

from ..errors import Error, OptionError
from ..node import OpenFlags
from ..options import Options, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

    from ..node import Protocol

SECTOR = 512


class ExistingCreateOptions(Options):
    """Creation options where nothing is created."""

    DASHES = False

    size: Size = opt(0, help="Virtual disk size")
    preallocation: str = opt(
        "off",
        choices=("off", "metadata", "falloc", "full"),
        refusal="invalid parameter value: %s",
        help="Preallocation mode (allowed values: off)",
    )


def take_existing(driver: str, filename: str, options: Any, open_it: Callable[[OpenFlags], Protocol], too_small: str) -> None:
    """Open the storage, see that `options.size` fits, and clear its first sector, so that nothing that it held before is
    taken for the new image. `too_small` is what is said where it does not fit. Raises Error in QEMU's words."""
    try:
        node = open_it(OpenFlags(writable=True, resize=True))
    except Error as exc:
        raise Error(
            "Protocol driver '%s' does not support creating new images, so an existing image must be selected as the target; "
            "however, opening the given target as an existing image failed: %s" % (driver, exc),
            filename=filename,
            errno=exc.errno,
            hint=exc.hint,
        ) from exc
    with node:
        if options.preallocation != "off":
            raise OptionError("Unsupported preallocation mode '%s'" % options.preallocation)
        if options.size > node.size:
            raise Error(too_small, filename=filename, errno=errno.EINVAL)
        if options.size:
            node.pwrite(0, bytes(min(SECTOR, options.size, node.size)))
