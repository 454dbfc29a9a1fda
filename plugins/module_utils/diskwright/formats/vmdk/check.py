# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Looking for grains that are not where they can be (VMware's "Virtual Disk Format 5.0", Hosted Sparse Extents)."""

from __future__ import annotations

import errno
import os

from ...errors import Error, Unsupported
from ...tally import CheckResult
from .extents import DATA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .extents import SparseExtent
    from .image import Vmdk

SECTOR = 512


def check(image: Vmdk, repair: str) -> CheckResult:
    """Check that every grain begins inside its file; ends at the first that does not, as QEMU does. Raises Unsupported for a repair."""
    if repair:
        raise Unsupported("This image format does not support checks", filename=image.filename, errno=errno.ENOTSUP)
    result = CheckResult()
    for extent in image.sparse:
        lost = _first_lost(extent)
        if lost >= 0:
            result.say("ERROR: cluster offset for sector %d points after EOF" % ((extent.start + lost) // SECTOR))
            result.failure = Error(os.strerror(errno.EINVAL), filename=image.filename, errno=errno.EINVAL)
            break
    return result


def _first_lost(extent: SparseExtent) -> int:
    """Where in the extent the first grain is that begins behind the end of the file; -1 if there is none."""
    end = extent.file.size
    for offset, length, kind, place in extent.runs(0, extent.size):
        if kind == DATA:
            inside = max(0, -(-(end - place) // extent.grain))  # of a run, so many grains begin inside
            if extent.compressed:
                inside = 0 if place >= end else length // extent.grain
            if inside < length // extent.grain:
                return offset + inside * extent.grain
    return -1
