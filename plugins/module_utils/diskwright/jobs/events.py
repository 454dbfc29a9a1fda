# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Events: what happened, for whoever listens (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html)."""

from __future__ import annotations

import time
from threading import Lock

from ..errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

    Listener = Callable[[dict[str, Any]], None]


class Events:
    """Hands events to all listeners, in one order. A listener takes {"event", "data", "timestamp"} from whatever thread, must not
    wait, and must not call back."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Call `listener` for each event from now on."""
        with self._lock:
            self._listeners.append(listener)

    def forget(self, listener: Listener) -> None:
        """Do not call it any more; one that is not there does no harm."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def emit(self, name: str, **data: Any) -> None:
        """Tell that `name` happened."""
        with self._lock:
            now = time.time_ns()
            stamp = {"seconds": now // 10**9, "microseconds": now // 1000 % 10**6}
            event = {"timestamp": stamp, "event": name}
            if data:
                event["data"] = {key.replace("_", "-"): value for key, value in data.items()}
            for listener in self._listeners:
                listener(event)


class NotFound(Error):
    """There is no device of that name. QMP tells this error apart."""

    kind = "DeviceNotFound"


class NotActive(Error):
    """There is no block job of that name. QMP tells this error apart."""

    kind = "DeviceNotActive"
