# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""How far a command has got: qemu-img's own display, a bar, or JSON
(https://www.qemu.org/docs/master/tools/qemu-img.html, SIGUSR1 and -p).
"""

from __future__ import annotations

from _thread import allocate_lock
from time import monotonic

from .units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, TextIO

    from .commands.ui import UI

REFRESH = 0.1  # seconds between two pictures of the bar
REPORT = 0.5  # seconds between two JSON objects
SETTLE = 0.3  # seconds before a rate is worth showing


def display(ui: UI, given: Mapping[str, object]) -> str:
    """Which display the options ask for: "none", "plain", "bar" or "json".

    -q beats everything. A bare -p or --progress is qemu-img's display, byte for byte, where standard output is no
    terminal, and the bar where it is one.
    """
    if "quiet" in given:
        return "none"
    form = given.get("progress")
    if isinstance(form, str):
        return form
    if "p" not in given and "progress" not in given:
        return "none"
    return "bar" if is_terminal(ui.out) else "plain"


def is_terminal(stream: Optional[TextIO]) -> bool:
    """Whether `stream` is there and is a terminal."""
    return stream is not None and stream.isatty()


class Progress:
    """The progress of one command, shown in one `form` (see display).

    Use it as a context manager around the work and the printing of its result, and call `update` from any thread.
    While it is entered, SIGUSR1 writes a line to standard error if no display is on. `step` is the least change in
    percent that the plain form shows.
    """

    def __init__(self, ui: UI, command: str, form: str, step: float) -> None:
        self._ui = ui
        self._command = command
        self._form = form
        self._step = step
        self._lock = allocate_lock()
        self._done = self._total = 0
        self._shown = -1.0  # what the plain form has printed last, in percent
        self._began = self._next = 0.0
        self._old_action: Any = None
        self.ends_line = True  # whether leaving ends the line of the plain form

    def __enter__(self) -> Progress:
        self._began = monotonic()
        try:
            from _signal import SIGUSR1, signal  # type: ignore[import-not-found, unused-ignore]

            self._old_action = signal(SIGUSR1, self._report)
        except (ImportError, ValueError):
            pass  # no such signal here, or not the main thread
        if self._form == "bar":
            self._ui.before = self.clear
        return self

    def __exit__(self, *_error: object) -> None:
        if self._old_action is not None:
            from _signal import SIGUSR1, signal

            signal(SIGUSR1, self._old_action)
        self._ui.before = None
        if self._form == "plain" and self.ends_line:
            self._ui.write("\n")
            self._ui.flush()
        elif self._form == "bar":
            self.clear()
        elif self._form == "json" and self._total:
            self._write_json(monotonic())

    @property
    def percent(self) -> float:
        """What is done, 0.0 to 100.0."""
        if self._total:
            return min(100.0, 100.0 * self._done / self._total)
        return 100.0 if self._done else 0.0

    def update(self, done: int, total: int) -> None:
        """Note that `done` of `total` bytes are done, and show it if it is time to. (0, total) shows 0 %."""
        self._done, self._total = done, total
        if self._form == "none" or not self._lock.acquire(False):
            return
        try:
            if self._form == "plain":
                self._show_plain()
            else:
                now = monotonic()
                if now >= self._next or done == total:
                    self._next = now + (REFRESH if self._form == "bar" else REPORT)
                    if self._form == "bar":
                        self._draw(now)
                    else:
                        self._write_json(now)
        finally:
            self._lock.release()

    def start(self) -> None:
        """Show 0 % before anything is known."""
        self.ends_line = True
        if self._form == "plain":
            self._show_plain()

    def finish(self) -> None:
        """Show 100 %, whatever was reported before."""
        self._done = self._total = self._total or 1
        if self._form == "plain":
            self._show_plain()
        elif self._form == "bar":
            self._draw(monotonic())

    def _show_plain(self) -> None:
        percent = self.percent
        if percent == self._shown:
            return
        if percent > self._shown + self._step or percent in (0.0, 100.0):
            self._shown = percent
            self._ui.write("    (%3.2f/100%%)\r" % percent)
            self._ui.flush()

    def _report(self, *_signal: object) -> None:
        """What SIGUSR1 asks for."""
        if self._form == "none":
            self._ui.hint("    (%3.2f/100%%)" % self.percent)

    def _rate(self, now: float) -> tuple[Optional[float], Optional[float]]:
        """Bytes a second so far, and the seconds that are left at this rate; None where it is too early to tell."""
        elapsed = now - self._began
        if elapsed < SETTLE or not self._done:
            return None, None
        rate = self._done / elapsed
        return rate, max(0, self._total - self._done) / rate

    def _write_json(self, now: float) -> None:
        rate, left = self._rate(now)
        self._ui.hint(
            '{"command": "%s", "done": %d, "total": %d, "percent": %.2f, "rate": %s, "eta": %s}'
            % (
                self._command,
                self._done,
                self._total,
                self.percent,
                "null" if rate is None else "%.0f" % rate,
                "null" if left is None else "%.1f" % left,
            )
        )

    def _stream(self) -> Optional[TextIO]:
        return self._ui.out if is_terminal(self._ui.out) else self._ui.err

    def _draw(self, now: float) -> None:
        stream = self._stream()
        if stream is None:
            return
        rate, left = self._rate(now)
        tail = " %5.1f%%  %s of %s" % (self.percent, format_size(self._done), format_size(self._total))
        if rate is not None and left is not None:
            tail += "  %s/s  %s left" % (format_size(int(rate)), _clock(left))
        width = max(0, min(40, _columns(stream) - len(self._command) - len(tail) - 4))
        full = int(width * self.percent / 100)
        picture = " [%s]" % ("#" * full).ljust(width, ".") if width else ""
        _put(stream, "\r\033[K" + self._command + picture + tail)

    def clear(self) -> None:
        """Take the bar off the terminal."""
        stream = self._stream()
        if stream is not None and is_terminal(stream):
            _put(stream, "\r\033[K")


def _put(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        pass


def _clock(seconds: float) -> str:
    """ "0:05", "1:02:03"."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return "%d:%02d:%02d" % (hours, minutes, rest) if hours else "%d:%02d" % (minutes, rest)


def _columns(stream: TextIO) -> int:
    import os

    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
