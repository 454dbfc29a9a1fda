# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Where a command writes: its output, its messages and its progress."""

from __future__ import annotations

from ..errors import Finding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Mapping, Optional, TextIO

    from diskwright.progress import Progress
    from diskwright.trace import Tracer


class UI:
    """The terminal as a command sees it.

    `name` is what messages begin with; `out` and `err` are None where the process was started without them. Output
    that cannot be written is dropped, as qemu-img does: it is no reason to fail.
    """

    def __init__(
        self,
        name: str,
        out: Optional[TextIO],
        err: Optional[TextIO],
        posixly_correct: bool = False,
    ) -> None:
        self.name = name
        self.out = out
        self.err = err
        self.posixly_correct = posixly_correct
        self.take_global: Optional[Callable[[str, Optional[str]], None]] = None  # -T and -V, for commands that have them too
        self.quiet = False
        self.tracer: Optional[Tracer] = None  # what -T asks for
        self.environment: Mapping[str, str] = {}  # the process's, for those that are told by it what to do (systemd's sockets)
        self.before: Optional[Callable[[], None]] = None  # called before anything is written: takes a progress bar away

    @property
    def scratch(self) -> str:
        """Where temporary files go."""
        place = self.environment.get("TMPDIR")
        return place if place and place != "/tmp" else "/var/tmp"  # /tmp may be memory

    def write(self, text: str) -> None:
        """Write `text` to standard output, as it is."""
        if self.before is not None:
            self.before()
        if self.out is not None:
            try:
                self.out.write(text)
            except OSError:
                self.out = None

    def say(self, text: str) -> None:
        """Write `text` to standard output unless -q was given."""
        if not self.quiet:
            self.write(text)

    def error(self, message: str, prefix: Optional[str] = None) -> None:
        """Write one message to standard error: "NAME: message" and a newline."""
        self.flush()
        if self.before is not None:
            self.before()
        if self.err is not None:
            try:
                self.err.write("%s: %s\n" % (prefix or self.name, message))
                self.err.flush()
            except OSError:
                self.err = None

    def hint(self, text: str) -> None:
        """Write further lines of a message to standard error."""
        if self.err is not None:
            try:
                self.err.write(text + "\n")
                self.err.flush()
            except OSError:
                self.err = None

    def warning(self, message: str) -> None:
        """Write "NAME: warning: message" to standard error."""
        self.error("warning: " + message)

    def caution(self, text: str) -> None:
        """Write what the library warns of: a Finding, and a text that begins with "WARNING: ", as it is, any other as a warning."""
        if isinstance(text, Finding) or text.startswith("WARNING: "):
            self.flush()
            self.hint(text)
        else:
            self.warning(text)

    def flush(self) -> None:
        """Let everything written so far reach standard output."""
        if self.out is not None:
            try:
                self.out.flush()
            except OSError:
                self.out = None

    def progress(self, command: str, given: Mapping[str, object], step: float = 1.0) -> Progress:
        """The progress display that the options -p, --progress and -q in `given` ask for: a context manager.

        `step` is the least change that qemu-img's own display shows, in percent.
        """
        from ..progress import Progress, display

        return Progress(self, command, display(self, given), step)
