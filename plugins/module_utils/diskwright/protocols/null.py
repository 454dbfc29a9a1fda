# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""null-co and null-aio: a disk that forgets what is written and reads as zeroes (or as anything).

QEMU's BlockdevOptionsNull describes the options.
"""

from __future__ import annotations

from ..errors import Error, OptionError
from ..extent import ALLOCATED, OFFSET_VALID, ZERO, Extent
from ..node import MAX_SIZE, Alloc, OpenFlags, Protocol, fill_zeroes
from ..options import Options, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable


class NullOptions(Options):
    """Runtime options of null-co and null-aio."""

    filename: str = opt("", help="nothing but the driver's own name", hidden=True)
    window: Size = opt(1 << 30, key="size", help="size of the device in bytes")
    latency_ns: int = opt(0, help="nanoseconds that each request takes")
    read_zeroes: bool = opt(False, help="reads return zeroes; off leaves the buffer as it is")


class NullCo(Protocol):
    """A device without memory."""

    driver = "null-co"
    options_class = NullOptions
    strong_options = ("size", "read-zeroes")
    dirty = None

    def __init__(self, options: NullOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if not 0 <= options.latency_ns < 1 << 63:
            raise OptionError("latency-ns is invalid")
        if options.filename not in ("", self.driver + "://"):
            raise OptionError("The only allowed filename for this driver is '%s://'" % self.driver)
        if options.window > MAX_SIZE:
            raise Error("Could not refresh total sector count: File too large", errno=27)
        self._size = options.window
        self._latency = options.latency_ns / 1e9
        self._read_zeroes = options.read_zeroes
        self.zero_initialized = options.read_zeroes

    def disk_size(self) -> int:
        return 0

    def options_name(self) -> str:
        return "" if len(self.full_options) > 1 else self.driver + "://"

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        if filename != cls.driver + "://":
            raise OptionError("The only allowed filename for this driver is '%s://'" % cls.driver)
        return {}

    def _wait(self) -> None:
        if self._latency:
            from time import sleep

            sleep(self._latency)

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        status = OFFSET_VALID | ZERO | ALLOCATED if self._read_zeroes else OFFSET_VALID  # QEMU's: neither data nor zeroes
        return (Extent(offset, length, status, self, offset),)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        self._wait()
        if self._read_zeroes:
            fill_zeroes(view)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self._wait()

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self._wait()
        return offset, length

    def _flush(self) -> None:
        self._wait()


class NullAio(NullCo):
    """The same under its other name."""

    driver = "null-aio"
