# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What image_convert made an image from, kept with the image: in an extended attribute, which follows a file that is moved
and goes with one that is removed; where the file system has none, in a file beside it, which must name the image's inode."""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

ATTRIBUTE = "user.diskwright.source"
LIMIT = 4096  # bytes of a record that are read


def digest(value: Any) -> str:
    """A short stand-in for `value`, which JSON must be able to hold; equal values have equal ones."""
    from hashlib import sha256

    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def record_path(path: str) -> str:
    """The file beside the image at `path`."""
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, ".%s.source.json" % name)


def write(path: str, temporary: str, record: Mapping[str, str]) -> None:
    """Keep `record` for the image in the file `temporary`, which is about to be renamed to `path`. Raises OSError."""
    forget(path)
    try:
        os.setxattr(temporary, ATTRIBUTE, json.dumps(record).encode())
    except OSError:  # no attributes here, or no room for one
        from .diskwright.beside import beside

        with beside(record_path(path)) as name, open(name, "w", encoding="utf-8") as file:
            json.dump({**record, "inode": os.stat(temporary).st_ino}, file)


def read(path: str) -> Optional[dict[str, Any]]:
    """The record of the image at `path`; None where there is none, or none that fits the image."""
    try:
        record = json.loads(os.getxattr(path, ATTRIBUTE)[:LIMIT])
        return record if isinstance(record, dict) else None
    except (OSError, ValueError):
        pass
    try:
        with open(record_path(path), encoding="utf-8") as file:
            record = json.loads(file.read(LIMIT))
        return record if isinstance(record, dict) and record.get("inode") == os.stat(path).st_ino else None
    except (FileNotFoundError, ValueError):
        return None


def forget(path: str) -> None:
    """Remove the file beside the image at `path`, if there is one."""
    try:
        os.unlink(record_path(path))
    except FileNotFoundError:
        pass


def remove(path: str) -> None:
    """Remove the image at `path`, or the link there, and the record of what it was made from. Raises Locked if it is in use."""
    from .diskwright.beside import alone

    if os.path.islink(path):
        os.unlink(path)
        return
    with alone(path):
        os.unlink(path)
    forget(path)
