# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Sockets that systemd hands over, and telling it how we are (https://www.freedesktop.org/software/systemd/man/latest/sd_listen_fds.html, sd_notify).

`environment` is the part of the process's environment that systemd uses: LISTEN_PID, LISTEN_FDS, NOTIFY_SOCKET.
"""

from __future__ import annotations

import os
import socket

from ..errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Mapping

FIRST_FD = 3
MAX_FDS = 256
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET")


def listening_fds(environment: Mapping[str, str]) -> list[int]:
    """The descriptors of the sockets that were handed over to this process. Raises Error where the environment makes no sense."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    text = environment.get("LISTEN_FDS", "")
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_FDS:
        raise Error("LISTEN_FDS is '%s', and not a number of sockets from 1 to %d" % (text, MAX_FDS))
    return list(range(FIRST_FD, FIRST_FD + int(text)))


def notify(environment: Mapping[str, str], text: str) -> None:
    """Tell systemd, if it wants to know; that it cannot be told is no reason to fail."""
    place = environment.get("NOTIFY_SOCKET", "")
    if not place or place[0] not in "/@":
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1)
            sock.sendto(text.encode(), "\0" + place[1:] if place[0] == "@" else place)
    except OSError:
        return
