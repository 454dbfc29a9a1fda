# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A new file is written beside its final name, flushed and renamed; on failure nothing of it is left."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator


@contextmanager
def beside(path: str) -> Iterator[str]:
    """A name in the directory of `path` to write to; when the block ends well it becomes `path`, else it is removed.

    A device is written in place. The new file gets the mode that a plain creation would give it, or that of the file it replaces.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            yield path
            return
        permissions = stat.S_IMODE(mode)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        permissions = 0o644 & ~mask
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=".%s." % os.path.basename(path)[:200], suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, permissions)
        _sync(temporary)
        os.rename(temporary, path)
        _sync(folder)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
