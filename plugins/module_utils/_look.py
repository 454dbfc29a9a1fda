# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an image is, as far as the modules that make and change images want to know."""

from __future__ import annotations

import os
from contextlib import contextmanager

from . import _policy
from ._options import stored
from ._plan import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterator, Optional

    from ._encryption import Encryption
    from .diskwright.node import Format


@contextmanager
def opened(path: str) -> Iterator[Format]:
    """The image at `path`, open for a look at its metadata, whoever else uses it. Raises Error, OSError, Refusal."""
    if not os.path.exists(path) and os.path.lexists(path):
        raise Refusal("%s is a symbolic link to %s, which does not exist" % (path, os.path.realpath(path)))
    from .diskwright.graph import open_image
    from .diskwright.node import OpenFlags

    flags = OpenFlags(no_backing=True, no_io=True, force_share=True)
    with open_image(os.path.abspath(path), flags=flags, policy=_policy.current()) as node:
        _policy.check_size(path, node.size)
        yield node


def described(node: Format, encryption: Optional[Encryption] = None) -> dict[str, Any]:
    """The state of an open image; with `encryption` also which key slots that opens."""
    state = {
        "state": "present",
        "format": node.driver,
        "size": node.size,
        "backing_file": node.backing_filename,
        "backing_format": node.backing_format,
        "options": stored(node),
        "encryption": None,
    }
    if node.encrypted:
        from ._encryption import observe as observe_encryption

        state.update(observe_encryption(node, encryption))
    return state


def observe(path: str) -> dict[str, Any]:
    """The state of the image at `path`; `state` is "absent" where there is nothing. Raises Error and OSError where there is something that
    is no image, or cannot be read."""
    if not os.path.lexists(path):
        return {"state": "absent"}
    with opened(path) as node:
        return described(node)
