# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""iscsi://[USER[%PASSWORD]@]HOST[:PORT]/TARGET/LUN (https://github.com/sahlberg/libiscsi#iscsi-url-format)."""

from __future__ import annotations

from ...errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_TRANSPORTS = {"iscsi://": "tcp", "iser://": "iser"}


def parse(filename: str) -> dict[str, Any]:
    """The options that a name stands for, the LUN as it is written. Raises OptionError in QEMU's words."""
    scheme = filename[: filename.find("//") + 2]
    rest, _query, _options = filename[len(scheme) :].partition("?")
    words = rest.rsplit("/", 2)
    if scheme not in _TRANSPORTS or len(words) != 3 or not words[2].isdecimal() or not words[2].isascii():
        raise OptionError("Failed to parse URL : %s" % filename)
    place, target, lun = words
    found: dict[str, Any] = {"transport": _TRANSPORTS[scheme]}
    login, at, portal = place.rpartition("@")
    user, percent, password = login.partition("%")
    if at and percent:
        found["user"], found["password"] = user, password
    found.update(portal=portal, target=_decoded(target), lun=str(int(lun)))
    return found


def _decoded(text: str) -> str:
    from urllib.parse import unquote

    return unquote(text, errors="surrogateescape")
