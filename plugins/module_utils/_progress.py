# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How far a long task is, in a file that others may read meanwhile: whoever started it with `async`, say."""

from __future__ import annotations

import os
from time import monotonic, time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

INTERVAL = 1.0  # seconds between two writes

_report: Optional[Report] = None


class Report:
    """The file at `path`, JSON, replaced in one piece each time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.state: dict[str, Any] = {"pid": os.getpid(), "started": time(), "finished": False, "step": 0, "steps": 0}
        self._due = 0.0
        self._write()

    def begin(self, step: int, steps: int, verb: str, target: str) -> None:
        """Say which step of how many is next."""
        self.state.update(step=step, steps=steps, verb=verb, target=target, done=0, total=None)
        self._write()

    def tell(self, done: int, total: int) -> None:
        """Say how many bytes of how many are done; written now and then."""
        self.state.update(done=done, total=total)
        if monotonic() >= self._due:
            self._write()

    def end(self, failed: bool) -> None:
        """Say that it is over."""
        self.state.update(finished=True, failed=failed)
        self._write()

    def _write(self) -> None:
        import json

        self.state["updated"] = time()
        beside = "%s.%d" % (self.path, os.getpid())
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(self.state, file)
        os.replace(beside, self.path)
        self._due = monotonic() + INTERVAL


def start(path: Optional[str]) -> None:
    """Report to the file at `path` from now on. Raises OSError."""
    global _report
    _report = None if path is None else Report(path)


def begin(step: int, steps: int, verb: str, target: str) -> None:
    """See Report.begin; nothing without a report."""
    if _report is not None:
        _report.begin(step, steps, verb, target)


def tell(done: int, total: int) -> None:
    """See Report.tell; nothing without a report. This is what the library's functions take as `progress`."""
    if _report is not None:
        _report.tell(done, total)


def end(failed: bool) -> None:
    """See Report.end; nothing without a report."""
    if _report is not None:
        _report.end(failed)
