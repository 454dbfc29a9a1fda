# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""nfs://HOST/EXPORT/FILE[?uid=&gid=&tcp-syncnt=&readahead=&pagecache=&debug=] (https://www.rfc-editor.org/rfc/rfc2224)."""

from __future__ import annotations

from ...errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PARAMETERS = {
    "uid": "user",
    "gid": "group",
    "tcp-syncnt": "tcp-syn-count",
    "readahead": "readahead-size",
    "pagecache": "page-cache-size",
    "debug": "debug",
}


def parse(filename: str) -> dict[str, Any]:
    """The options that a name stands for, numbers as they are written. Raises OptionError in QEMU's words."""
    from urllib.parse import parse_qsl, unquote, urlsplit

    try:
        parts = urlsplit(filename)
        host = parts.hostname
    except ValueError:
        raise OptionError("Invalid URI specified") from None
    if not host:
        raise OptionError("missing hostname in URI")
    if not parts.path:
        raise OptionError("missing file path in URI")
    found: dict[str, Any] = {"server": {"host": _host(parts.netloc), "type": "inet"}, "path": unquote(parts.path, errors="surrogateescape")}
    for key, value in parse_qsl("&".join(word for word in parts.query.split("&") if "=" in word), keep_blank_values=True):
        if key not in PARAMETERS:
            raise OptionError("Unknown NFS parameter name: %s" % key)
        if not value.isdecimal() or not value.isascii() or int(value) >> 64:
            raise OptionError("Invalid value for NFS parameter: %s" % key)
        found[PARAMETERS[key]] = value
    return found


def _host(place: str) -> str:
    """The host in USER@HOST:PORT, in the case that it is written in."""
    host = place.rpartition("@")[2]
    return host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]


def compose(host: str, path: str, uid: int, gid: int) -> str:
    """The name of a file; what is not said in it has no part in which bytes it holds."""
    who = [word for word, number in (("uid=%d" % uid, uid), ("gid=%d" % gid, gid)) if number]
    return "nfs://%s%s%s" % (host, path, "?" + "&".join(who) if who else "")
