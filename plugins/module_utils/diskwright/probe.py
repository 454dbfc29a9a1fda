# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Which format is this: by content, with QEMU's rule that the best score wins and raw takes what is left; but
where two formats are as sure as each other, nobody is to guess."""

from __future__ import annotations

from . import drivers
from .errors import WrongFormat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .node import Node

PROBE_SIZE = 2048  # bytes from the start of the file that decide
LUKS2 = b"LUKS\xba\xbe\0\2"


def probe(file: Node, filename: str) -> str:
    """The name of the format of the image in `file`; "raw" where nothing better matches. Raises OSError, WrongFormat."""
    return probe_head(file.pread(0, min(PROBE_SIZE, file.size)), filename)


def probe_head(head: bytes, filename: str) -> str:
    """The name of the format of an image that begins with `head`. Raises WrongFormat where several claim it."""
    names, score = ["raw"], 0
    for name, (load, magics) in drivers.FORMATS.items():
        if any(head.startswith(magic, offset) for offset, magic in magics):
            found = load().probe(head, filename)
            if found > score:
                names, score = [name], found
            elif found == score and found:
                names.append(name)
    if len(names) > 1:
        message = "The image format is ambiguous: it may be %s; name the one that is meant" % " or ".join(sorted(names))
        raise WrongFormat(message, filename=filename)
    return names[0]


def unread(file: Node) -> str:
    """What a file that is taken for a raw image holds, where it is known and cannot be read; "" otherwise. Raises OSError."""
    if file.pread(0, min(len(LUKS2), file.size)) == LUKS2:
        return "a LUKS version 2 volume, which only cryptsetup opens"
    return ""
