# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""blklogwrites: every write is also entered into a log, from which each state between them can be made again.

The log is that of Linux's dm-log-writes (https://docs.kernel.org/admin-guide/device-mapper/log-writes.html): a superblock of one sector, then for each
write an entry of one sector and its data. Numbers are little-endian.
"""

from __future__ import annotations

from ..errors import Corrupt, OptionError
from ..filter import Witness
from ..node import CHUNK
from ..ondisk import Struct, u32, u64
from ..options import Options, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..node import Node, OpenFlags
    from ..options import NodeRef

MAGIC = 0x6A736677736872
VERSION = 1
FLUSH, DISCARD = 1, 4
MIN_SECTOR, MAX_SECTOR = 512, 8 << 20
MAX_ENTRIES = 1 << 24  # of a log that is to be continued


class Superblock(Struct):
    """The log's first sector."""

    ORDER = "<"

    magic: u64
    version: u64
    nr_entries: u64
    sectorsize: u32


class Entry(Struct):
    """What a write was; its data follows in the next sector, but that of a discard."""

    ORDER = "<"

    sector: u64
    nr_sectors: u64
    flags: u64
    data_len: u64


class BlklogwritesOptions(Options):
    """Runtime options of blklogwrites."""

    log: NodeRef = opt(help="the node that takes the log")
    log_append: bool = opt(False, help="continue the log that is there")
    log_sector_size: int = opt(512, help="bytes of a sector: a power of two from 512 to 8 MiB")
    log_super_update_interval: int = opt(4096, help="after so many entries the superblock is written")
    file: NodeRef = opt(help="the node whose writes are logged")


class Blklogwrites(Witness):
    """A node whose writes can be replayed."""

    driver = "blklogwrites"
    options_class = BlklogwritesOptions
    strong_options = ("log-append", "log-sector-size", "log-super-update-interval")

    def __init__(self, options: BlklogwritesOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self.log = self.children["log"]
        self._sector, self._count, self._next = options.log_sector_size, 0, 1
        self._interval = options.log_super_update_interval
        if options.log_append:
            self._continue_log()
        if not MIN_SECTOR <= self._sector <= MAX_SECTOR or self._sector & (self._sector - 1):
            raise OptionError("Invalid log sector size %d" % self._sector)
        if self._interval < 1:
            raise OptionError("Invalid log superblock update interval %d" % self._interval)
        self.request_alignment = self._sector
        self._written = self._count

    def attach(self, role: str, child: Node) -> None:
        super().attach(role, child)
        self.log = self.children["log"]

    def _continue_log(self) -> None:
        """Find the end of the log that is there; an empty file is a new log."""
        log = self.log
        if not log.size:
            return
        head = Superblock.unpack(log.pread(0, min(Superblock.SIZE, log.size)))
        if head.magic != MAGIC or head.version != VERSION:
            raise Corrupt("%s: not a log of writes" % log.filename, filename=log.filename)
        self._sector = head.sectorsize
        if not MIN_SECTOR <= self._sector <= MAX_SECTOR or self._sector & (self._sector - 1):
            raise OptionError("Invalid log sector size %d" % self._sector)
        if head.nr_entries > MAX_ENTRIES:
            raise Corrupt("%s: the log has too many entries (%d)" % (log.filename, head.nr_entries), filename=log.filename)
        for self._count in range(1, head.nr_entries + 1):
            at = self._next * self._sector
            if at + Entry.SIZE > log.size:
                raise Corrupt("%s: the log ends before entry %d" % (log.filename, self._count), filename=log.filename, offset=at)
            entry = Entry.unpack(log.pread(at, Entry.SIZE))
            if entry.nr_sectors > log.size // self._sector and not entry.flags & DISCARD:
                raise Corrupt("%s: entry %d of the log is damaged" % (log.filename, self._count), filename=log.filename, offset=at)
            self._next += 1 + (0 if entry.flags & DISCARD else entry.nr_sectors)

    def _enter(self, offset: int, length: int, flags: int, data: int) -> int:
        """Take room in the log for an entry with so many bytes of data, and write the entry; where its data goes."""
        with self._lock:
            place = self._next * self._sector
            self._next += 1 + data // self._sector
            self._count += 1
            due = self._count - self._written >= self._interval
        entry = Entry(sector=offset // self._sector, nr_sectors=length // self._sector, flags=flags, data_len=0)
        self.log.pwrite(place, entry.pack().ljust(self._sector, b"\0"))
        if due:
            self._write_superblock()
        return place + self._sector

    def _write_superblock(self) -> None:
        with self._lock:
            head = Superblock(magic=MAGIC, version=VERSION, nr_entries=self._count, sectorsize=self._sector)
            self._written = self._count
            self.log.pwrite(0, head.pack().ljust(self._sector, b"\0"))

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        super()._pwrite(host_offset, view)
        self.log.pwrite(self._enter(host_offset, len(view), 0, len(view)), view)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        """Whole sectors; what is around them is written like data."""
        sector = self._sector
        first, stop = -(-offset // sector) * sector, (offset + length) // sector * sector
        if first >= stop:
            return offset, 0
        self.file.pwrite_zeroes(first, stop - first, unmap)
        place = self._enter(first, stop - first, 0, stop - first)
        for at in range(0, stop - first, CHUNK):
            self.log.pwrite(place + at, bytes(min(CHUNK, stop - first - at)))
        return first, stop - first

    def _discard(self, offset: int, length: int) -> None:
        sector = self._sector
        first, stop = -(-offset // sector) * sector, (offset + length) // sector * sector
        if first < stop:
            self.file.pdiscard(first, stop - first)
            self._enter(first, stop - first, DISCARD, 0)

    def _flush(self) -> None:
        self.file.flush()
        self._enter(0, 0, FLUSH, 0)
        self._write_superblock()
