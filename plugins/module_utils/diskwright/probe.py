# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Which format is this: by content, with QEMU's rule that the best score wins and raw takes what is left; but
where two formats are as sure as each other, nobody is to guess."""

from __future__ import annotations

import errno
import os

from . import drivers
from .errors import Error, WrongFormat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .node import Node

PROBE_SIZE = 2048  # bytes from the start of the file that decide
BOOT_SIGNATURE = b"\x55\xaa"  # at byte 510 of a disk with partitions
LUKS2 = b"LUKS\xba\xbe\0\2"


def probe(file: Node, filename: str) -> str:
    """The name of the format of the image in `file`; "raw" where nothing better matches. Raises Error, OSError."""
    try:
        head = file.pread(0, min(PROBE_SIZE, file.size))
    except (Error, OSError) as exc:
        number = exc.errno or errno.EIO
        text = "Could not read image for determining its format: %s" % os.strerror(number)
        raise Error(text, filename=filename, errno=number, hint=str(exc) if isinstance(exc, Error) else None) from exc
    best = probe_head(head, filename)
    return _probe_rest(file, filename, head, best) if head and (best == "raw" or best in drivers.STREAMS) else best


def _probe_rest(file: Node, filename: str, head: bytes, best: str) -> str:
    """The format of a file whose beginning says little, by its name and by its end; else what it said."""
    size = file.size
    for suffix, name in drivers.SUFFIXES.items():
        if filename.endswith(suffix):
            return name
    if head[510:512] == BOOT_SIGNATURE:  # a disk, whose guest may write at its end what it likes
        return best
    for name, (_place, magics) in drivers.FORMATS.items():
        for offset, magic in magics:
            if -size <= offset < 0:
                tail = file.pread(size + offset, abs(offset))
                if tail.startswith(magic) and drivers.lookup(name).probe_tail(tail, size):
                    return name
    return best


def probe_head(head: bytes, filename: str) -> str:
    """The name of the format of an image that begins with `head`. Raises WrongFormat where several claim it."""
    names, score = ["raw"], 0
    for name, (_place, magics) in drivers.FORMATS.items():
        if any(offset >= 0 and head.startswith(magic, offset) for offset, magic in magics):
            found = drivers.lookup(name).probe(head, filename)
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
