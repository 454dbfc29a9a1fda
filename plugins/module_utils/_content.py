# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The content checksum of an image, kept in a file beside it: IMAGE.content.json.

The file is JSON: `algorithm` is "sha256-64k" (see copy/content.py of the library), `content` the checksum of what the disk was made from, and `file` has the
`size`, `inode` and `mtime_ns` of the image when it was written: what was changed since has the checksum no more.
"""

from __future__ import annotations

import json
import os

from .diskwright.parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

ALGORITHM = "sha256-64k"
LIMIT = 4096  # bytes of a file that are read


def file_path(path: str) -> str:
    """The file beside the image at `path`."""
    return os.path.realpath(path) + ".content.json"


def write(path: str, content: str) -> None:
    """Keep the checksum of the image at `path`, which is complete. Raises OSError."""
    from .diskwright.beside import beside

    with beside(file_path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump({"algorithm": ALGORITHM, "content": content, "file": _identity(path)}, file)


def read(path: str) -> Optional[str]:
    """The checksum that is kept for the image at `path`, None where there is none that fits the image as it is now."""
    try:
        with open(file_path(path), encoding="utf-8") as file:
            record = json.loads(file.read(LIMIT))
        fits = isinstance(record, dict) and record.get("algorithm") == ALGORITHM and record.get("file") == _identity(path)
    except (OSError, ValueError):
        return None
    content = record.get("content") if fits else None
    return content if isinstance(content, str) else None


def _identity(path: str) -> dict[str, int]:
    status = os.stat(path)
    return {"size": status.st_size, "inode": status.st_ino, "mtime_ns": status.st_mtime_ns}


def of_source(path: str, open_source: Callable[[], Any]) -> str:
    """The checksum of an image: the one that is kept for it, or else its content is read."""
    kept = read(path)
    if kept is not None:
        return kept
    from . import _progress

    with open_source() as node:
        found: str = part(__package__, "diskwright.copy.content").content_checksum(node, _progress.tell)
    return found


def difference(dest: str, wanted: Callable[[], str]) -> str:
    """Why the image at `dest` may not have the checksum `wanted`; "" if it has."""
    kept = read(dest)
    if kept is None:
        return "there is no content checksum that was kept for it as it is"
    return "" if kept == wanted() else "its content is different"
