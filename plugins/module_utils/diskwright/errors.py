# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The exceptions of the library: one base, and a leaf only where a caller would catch it apart.

`OSError` passes through unchanged; everything else that any input can cause is an `Error`.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional


class Error(Exception):
    """Something that the caller asked for cannot be done.

    `str(e)` is complete (which file, what, where). `filename` names the image or node if one is at fault, `offset` is
    a byte offset in it, `errno` a POSIX error number, `hint` further lines that a person may want to read.
    """

    def __init__(
        self,
        message: str,
        *,
        filename: Optional[str] = None,
        offset: Optional[int] = None,
        errno: Optional[int] = None,
        hint: Optional[str] = None,
    ) -> None:
        super().__init__(message)
        self.filename = filename
        self.offset = offset
        self.errno = errno
        self.hint = hint


class OptionError(Error):
    """An option is unknown, missing, of the wrong type, out of range or contradicts another."""


class WrongFormat(Error):
    """The file is not an image of the format that was asked for, or its format cannot be told."""


class Corrupt(Error):
    """The image breaks its format's specification."""


class Unsupported(Error):
    """The image or the request is valid but needs a feature, library or device that is not there."""


class ReadOnly(Error):
    """A write was asked of something that was opened, or can only be, read-only."""


class Locked(Error):
    """Another process uses the image in a way that excludes ours."""

    search: Optional[Callable[[], Optional[str]]] = None
    permission: Optional[tuple[str, str]] = None  # what the other one does with which permission: "uses" or "does not share"
    waited: Optional[float] = None  # seconds for which it was tried again

    @property
    def holder(self) -> Optional[str]:
        """Who that is, as "name (process 123)", searched for when asked; None where the host does not tell."""
        return self.search() if self.search is not None else None


class Denied(Error):
    """The open policy refuses a file that the image refers to."""


class ProtocolError(Error):
    """A network peer broke its protocol."""


class Finding(str):
    """A line for a person that is complete: printed as it is."""

    __slots__ = ()


def refused(filename: str, why: str, number: int = 22) -> Error:
    """The error for an image that cannot be opened as it is, where QEMU says no more than the error number; `why` is the hint.

    Number 95 (ENOTSUP) is for what is valid; the others make it Corrupt.
    """
    kind = Unsupported if number == 95 else Corrupt
    return kind("Could not open '%s': %s" % (filename, os.strerror(number)), errno=number, hint=why + ".")
