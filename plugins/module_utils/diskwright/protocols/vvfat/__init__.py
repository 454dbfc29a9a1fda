# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""vvfat: a directory of the host as a disk with a FAT file system (https://www.qemu.org/docs/master/system/images.html#virtual-fat-disk-images)."""

from __future__ import annotations

import errno
import os
from bisect import bisect_right

from ...errors import OptionError, ReadOnly
from ...extent import ALLOCATED, DATA, ZERO, Extent
from ...node import Alloc, OpenFlags, Protocol, fill_zeroes
from ...options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Optional

    from .layout import Item
    from .overlay import Overlay

LABEL = "QEMU VVFAT"
MAX_LABEL = 11  # bytes
OPEN_FILES = 16


class VvfatOptions(Options):
    """Runtime options of vvfat."""

    dir: Optional[str] = opt(None, help="the directory of the host")
    fat_type: int = opt(0, help="12, 16 or 32 (default: 16, or 12 for a floppy)")
    floppy: bool = opt(False, help="a floppy disk, without partitions")
    label: Optional[str] = opt(None, help="label of the volume, up to 11 bytes (default: QEMU VVFAT)")
    rw: bool = opt(False, help="what is written goes into the directory")


class Vvfat(Protocol):
    """A disk that is made of a directory."""

    driver = "vvfat"
    options_class = VvfatOptions
    strong_options = ("dir", "fat-type", "floppy", "label", "rw")
    dirty = None
    opaque = True

    def __init__(self, options: VvfatOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if options.dir is None:
            raise OptionError("vvfat block driver requires a 'dir' option")
        label = LABEL if options.label is None else options.label
        if len(label.encode("utf-8", "surrogateescape")) > MAX_LABEL:
            raise OptionError("vvfat label cannot be longer than 11 bytes")
        if options.fat_type not in (0, 12, 16, 32):
            raise OptionError("Valid FAT types are only 12, 16 and 32")
        if options.rw and not flags.writable:
            raise ReadOnly("Unable to set VVFAT to 'rw' when drive is read-only")
        if flags.writable and not options.rw:
            raise ReadOnly("Image is read-only")
        self.unwritable = not options.rw
        from .layout import SECTOR, Geometry, Layout, scan

        self.layout = Layout(Geometry(options.fat_type, options.floppy), scan(options.dir), label)
        self._size = self.layout.geometry.total * SECTOR
        self._files: dict[str, int] = {}  # descriptors by path
        self.set_regions(self.layout.regions)
        self.overlay: Optional[Overlay] = None
        if flags.writable:
            from .overlay import Overlay

            self.overlay = Overlay(self)

    def set_regions(self, regions: list[tuple[int, int, bytes | Item, int]]) -> None:
        """From now on the disk is made of these."""
        self._regions = regions
        self._starts = [region[0] for region in regions]
        self.close_files()

    def options_name(self) -> str:
        return ""

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        if not filename.startswith("fat:"):
            raise OptionError("File name string must start with 'fat:'")
        kind = next((bits for bits in (32, 16, 12) if ":%d:" % bits in filename), 0)
        path = filename[filename.rindex(":") + 1 :]
        return {"dir": path, "fat-type": kind, "floppy": ":floppy:" in filename, "rw": ":rw:" in filename}

    def _changed_flags(self, old: OpenFlags) -> None:
        if self.flags.writable and self.overlay is None:
            text = "Block format '%s' used by node '%s' does not support reopening files" % (self.driver, self.filename)
            raise ReadOnly(text, filename=self.filename)

    # -- reading -------------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        """What no file and no table lies in is zero; QEMU's driver does not tell."""
        end = offset + length
        position = offset
        for start, stop in self._used(offset, end):
            if start > position:
                yield Extent(position, start - position, ZERO | ALLOCATED)
            yield Extent(start, stop - start, DATA | ALLOCATED, self, start)
            position = stop
        if position < end:
            yield Extent(position, end - position, ZERO | ALLOCATED)

    def _used(self, offset: int, end: int) -> list[tuple[int, int]]:
        """(start, end) of the parts of a range that may be other than zero."""
        if self.overlay is not None:
            return [(offset, end)]
        found = []
        for start, length, _source, _at in self._regions[max(0, bisect_right(self._starts, offset) - 1) :]:
            low, high = max(start, offset), min(start + length, end)
            if start >= end:
                break
            if low < high:
                found.append((low, high))
        return found

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        if self.overlay is not None:
            self.overlay.read(host_offset, view)
        else:
            self.read_host(host_offset, view)

    def read_host(self, offset: int, view: memoryview) -> None:
        """What the directory has for a range of the disk."""
        fill_zeroes(view)
        end = offset + len(view)
        for start, length, source, at in self._regions[max(0, bisect_right(self._starts, offset) - 1) :]:
            if start >= end:
                break
            low, high = max(start, offset), min(start + length, end)
            if low >= high:
                continue
            part = view[low - offset : high - offset]
            if isinstance(source, bytes):
                part[:] = memoryview(source)[at + low - start : at + high - start]
            else:
                self._read_file(source, at + low - start, part)

    def _read_file(self, item: Item, offset: int, view: memoryview) -> None:
        """A part of a file; what it does not have (any more) is zero."""
        length = max(0, min(len(view), item.size - offset))
        done = 0
        with self._lock:
            descriptor = self._descriptor(item.path)
            while done < length:
                count = os.preadv(descriptor, [view[done:length]], offset + done)
                if not count:
                    break
                done += count

    def _descriptor(self, path: str) -> int:
        found = self._files.get(path)
        if found is None:
            if len(self._files) >= OPEN_FILES:
                self.close_files()
            found = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return found

    def close_files(self) -> None:
        """Close what is open in the directory."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    # -- writing -------------------------------------------------------------------------------------------------

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        if self.overlay is None:
            raise ReadOnly("Image is read-only", filename=self.filename, errno=errno.EACCES)
        self._check_range(host_offset, len(view))
        self.overlay.write(host_offset, view)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        from .layout import SECTOR

        start, end = -(-offset // SECTOR) * SECTOR, (offset + length) // SECTOR * SECTOR
        if self.overlay is None or start >= end:
            return offset, 0
        self.overlay.zero(start, end - start)
        return start, end - start

    def preload(self) -> None:
        from . import layout, names

        del layout, names
        super().preload()

    def _flush(self) -> None:
        if self.overlay is not None:
            self.overlay.flush()

    def _close(self) -> None:
        if self.overlay is not None:
            self.overlay.finish()

    def _release_host(self) -> None:
        self.close_files()
        if self.overlay is not None:
            self.overlay.forget()
