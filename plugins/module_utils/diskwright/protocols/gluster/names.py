# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""gluster[+tcp|+unix]://[HOST[:PORT]]/VOLUME/PATH[?socket=PATH]
(https://www.qemu.org/docs/master/system/qemu-block-drivers.html, GlusterFS disk images)."""

from __future__ import annotations

from ...errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_PORT = "24007"
USAGE = "Usage: file=gluster[+transport]://[host[:port]]volume/path[?socket=...][,file.debug=N][,file.logfile=/path/filename.log]"


def parse(filename: str) -> tuple[str, str, list[dict[str, str]]]:
    """(volume, path in it, servers) of a name. Raises OptionError in QEMU's words."""
    from urllib.parse import parse_qsl, unquote, urlsplit

    wrong = OptionError("invalid URI %s" % filename, hint=USAGE)
    try:
        parts = urlsplit(filename)
        port = parts.port
    except ValueError:
        raise wrong from None
    volume, _slash, path = unquote(parts.path, errors="surrogateescape").lstrip("/").partition("/")
    if parts.scheme not in ("gluster", "gluster+tcp", "gluster+unix") or not volume or not path:
        raise wrong
    query: list[tuple[str, Any]] = parse_qsl(parts.query, keep_blank_values=True)
    if parts.scheme == "gluster+unix":
        if len(query) != 1 or query[0][0] != "socket" or parts.netloc:
            raise wrong
        return volume, path, [{"type": "unix", "path": query[0][1]}]
    if query:
        raise wrong
    return volume, path, [{"type": "inet", "host": parts.hostname or "", "port": str(port or DEFAULT_PORT)}]
