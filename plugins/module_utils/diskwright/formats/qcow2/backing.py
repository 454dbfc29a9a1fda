# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Naming another backing file (https://www.qemu.org/docs/master/interop/qcow2.html#header, backing_file_offset and the header extensions)."""

from __future__ import annotations

import os

from ...errors import Error, OptionError
from . import header as layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from .image import Qcow2


def change_backing(image: Qcow2, name: Optional[str], format: Optional[str]) -> None:
    """Make the image name `name` (None: nothing) as its backing file, of the format `format`; no guest data is looked at.

    The header's cluster is written at once, so that a crash leaves the old name or the new one. Raises OptionError, and
    changes nothing, where the names do not fit.
    """
    header = image.header
    stored = os.fsencode(name) if name else None
    kind = os.fsencode(format) if name and format else None
    refusal = "Could not change the backing file to '%s': " % (name or "")
    if len(stored or b"") > layout.MAX_BACKING_NAME or len(kind or b"") > layout.MAX_BACKING_FORMAT:
        raise OptionError(refusal + "backing file name or format too long", filename=image.filename, errno=22)
    before = header.backing_file, list(header.extensions), header.backing_file_offset, header.backing_file_size
    header.backing_file = stored
    header.set_extension(layout.EXT_BACKING_FORMAT, kind)
    try:
        header.pack()
    except Error:
        header.backing_file, header.extensions, header.backing_file_offset, header.backing_file_size = before
        raise OptionError(refusal + "backing file name too long", filename=image.filename, errno=28) from None
    image.flush()
    image.update_header()
    image.backing_filename, image.backing_format = name or None, format if name and format else None
