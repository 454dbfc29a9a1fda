# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Vhdx, the node of an image (https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-vhdx/).

New blocks come to lie at the end of the file, which reads as zeroes, as they did before: they are in the BAT at once, and
nothing around a write has to be kept. The BAT reaches the file through the log, when the node is flushed.
"""

from __future__ import annotations

from ...blockmap import STORED, UNSTORED, BlockFormat
from ...errors import Corrupt, Error, ReadOnly
from ...extent import ALLOCATED, DATA, RECURSE, Extent
from ...node import OpenFlags
from ...options import Options, Size, opt
from ...parts import part
from .bat import FULLY_PRESENT, NOT_PRESENT, UNDEFINED, UNMAPPED, UNMAPPED_OLD, ZERO, Bat
from .layout import M, MAGIC, SECTOR, Headers, Layout, new_guid, read_inside, refused
from .log import Log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterator, Optional

    from diskwright.tally import CheckResult

    from ...node import Alloc, Node, Reference
    from ...options import NodeRef
    from .parent import Parent

EACCES, EIO = 13, 5
UNALLOCATED = (NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, UNMAPPED_OLD)  # states of blocks that read as zeroes
END_OF_NUMBERS = 1 << 63


class VhdxOptions(Options):
    """Runtime options of vhdx."""

    file: NodeRef = opt(help="the node that holds the image")


class VhdxCreateOptions(Options):
    """Creation options of vhdx."""

    DASHES = False
    SHOWN = ("log_size", "block_size")

    size: Size = opt(0, help="size of the disk, at most 64T")
    log_size: Size = opt(M, help="size of the log, a multiple of 1M below 4G")
    block_size: Size = opt(0, help="size of a block, a power of two from 1M to 256M; 0: as the size of the disk wants it")
    subformat: str = opt("dynamic", choices=("dynamic", "fixed"), help="dynamic: blocks come as they are written; fixed: all are there")
    block_state_zero: Optional[bool] = opt(None, help="say that new blocks are zero, and not that they are absent (default: on if dynamic)")


class Vhdx(BlockFormat):
    """A VHDX image."""

    driver = "vhdx"
    options_class = VhdxOptions
    create_options = VhdxCreateOptions
    creatable = True
    opaque = True
    stored = STORED | RECURSE

    def __init__(self, options: VhdxOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if read_inside(self.file, 0, len(MAGIC)) != MAGIC:
            raise refused(self.file, "there is no signature")
        self.headers = Headers(self.file)
        self.log = Log(self.headers)
        self.replayed = False  # the log, when it was opened
        self._replay()
        layout = self.layout = Layout(self.file, self.headers.current)
        self._size = layout.size // SECTOR * SECTOR
        self.cluster_size = self.block_size = layout.block_size
        self.bat = Bat(self.file, layout, self._lock, self._write_back)
        self.zero_initialized = self.file.zero_initialized
        self._announced = False  # the headers say that the image is being changed
        self._end = layout.regions.end  # no block ends behind it
        self._parent: Optional[Parent] = None
        if layout.parent_locator is not None:
            self._find_parent(layout.parent_locator)
        if not flags.check:
            self._survey(None)

    def _replay(self) -> None:
        entries = self.log.sequence()
        if not entries:
            return
        name = self.file.filename
        if not self.flags.writable:
            raise ReadOnly(
                "VHDX image file '%s' opened read-only, but contains a log that needs to be replayed" % name,
                errno=EACCES,
                hint="To replay the log, run:\nqemu-img check -r all '%s'" % name,
            )
        self.log.replay(entries)
        self.replayed = True

    def _find_parent(self, locator: bytes) -> None:
        from .parent import Parent

        if self.flags.writable:
            raise ReadOnly("vhdx: an image with a parent can only be read", errno=EACCES)
        self._parent = Parent(self, locator)
        self.opaque = False
        self.supports_backing = True
        self.zero_initialized = False
        self.backing_filename, self.backing_format = self._parent.name, "vhdx"

    # -- where blocks are ----------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterator[Extent]:
        if self._parent is not None:
            yield from self._parent.map(offset, length)
            return
        size = self.block_size
        first = offset // size
        for index, count, state, place in self.bat.runs(first, -(-(offset + length) // size) - first):
            if state == FULLY_PRESENT:
                yield Extent(index * size, count * size, self.stored, self.file, place)
            elif state in UNALLOCATED:
                yield Extent(index * size, count * size, UNSTORED)
            else:
                yield Extent(index * size, count * size, DATA | ALLOCATED, self, index * size)  # nobody can read it: _pread_into says why

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        raise self._impossible(host_offset // self.block_size)

    def _impossible(self, index: int) -> Corrupt:
        text = "%s: block %d is in state %d, which cannot be" % (self.filename, index, self.bat.get(index)[0])
        return Corrupt(text, filename=self.filename, offset=index * self.block_size, errno=EIO)

    def _locate(self, index: int) -> Optional[int]:
        state, place = self.bat.get(index)
        if state == FULLY_PRESENT:
            return place
        if state not in UNALLOCATED:
            raise self._impossible(index)
        return None

    def _take(self, index: int) -> int:
        untouched = self.file.size
        start = max(untouched, self._end) if self.file.growable else self._end
        place = -(-start // M) * M
        if self.file.growable:
            self.file.truncate(place + self.block_size, exact=False)
        elif place + self.block_size > untouched:
            raise Error("%s: no room for block %d" % (self.filename, index), filename=self.filename, errno=28)
        self._end = place + self.block_size
        self.bat.set(index, self._prepare(place, untouched))
        return place

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        self._announce()
        return super()._alloc(offset, length)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self._announce()
        return super()._zero(offset, length, unmap)

    def _discard(self, offset: int, length: int) -> None:
        self._announce()
        for _start, count, _status, host, place in self._extents(offset, length):
            if host is self.file:
                host.pdiscard(place, count)

    def _announce(self) -> None:
        """Before the first change: give the file and its data new GUIDs, so that children and backups see that it was changed."""
        if not self._announced:
            with self._lock:
                if not self._announced:
                    self.headers.update(file_write_guid=new_guid(), data_write_guid=new_guid())
                    self.file.flush()
                    self._announced = True

    def _flush(self) -> None:
        with self._lock:
            self._write_back()

    def _write_back(self) -> None:
        """Bring the BAT into the file; the lock is held."""
        pages = self.bat.changed_sectors()
        if pages:
            self.log.write(pages)
            self.bat.written()

    def preload(self) -> None:
        from ...kernels import table_runs

        del table_runs
        super().preload()

    # -- the whole image -----------------------------------------------------------------------------------------

    def references(self) -> list[Reference]:
        return [] if self._parent is None else [self._parent.reference]

    def attach(self, role: str, child: Node) -> None:
        """See Node.attach. Raises Corrupt where the parent is not the one that the image was made for."""
        if role == "backing" and self._parent is not None:
            self._parent.admit(child.headers.current.data_write_guid if isinstance(child, Vhdx) else None)
        super().attach(role, child)

    def _survey(self, result: Optional[CheckResult]) -> None:
        """Look at the place of every block: what is wrong goes into `result`, or is raised as Corrupt."""
        size = self.block_size
        file_size = -(-self.file.size // SECTOR) * SECTOR
        regions = self.layout.regions
        for index, count, state, place in self.bat.runs(0, self.layout.blocks):
            if state != FULLY_PRESENT:
                continue
            if place + count * size <= file_size and not regions.conflict(place, place + count * size):
                self._end = max(self._end, place + count * size)
                continue
            for at in range(count):
                faults = self._faults(index + at, place + at * size, file_size)
                if not faults:  # the last block, which the file need not hold to its end
                    self._end = max(self._end, place + (at + 1) * size)
                for words in faults:
                    if result is None:
                        raise refused(self.file, words.rstrip("."))
                    result.say("qemu-img: " + words)
                    result.corruptions += 1

    def _faults(self, index: int, place: int, file_size: int) -> list[str]:
        """In QEMU's words what is wrong with the place of a block."""
        found = []
        end = place + min(self.block_size, self.layout.size - index * self.block_size)
        conflict = self.layout.regions.conflict(place, place + self.block_size)
        if conflict:
            found.append(conflict)
        if place + self.block_size >= END_OF_NUMBERS:
            found.append("VHDX BAT entry %d offset overflow." % index)
        truncated = "points after end of file (%d). Image has probably been truncated." % file_size
        if place >= file_size:
            found.append("VHDX BAT entry %d start offset %d %s" % (index, place, truncated))
        elif end > file_size:
            found.append("VHDX BAT entry %d end offset %d %s" % (index, end - 1, truncated))
        return found

    def _check(self, repair: str) -> CheckResult:
        result: CheckResult = part(__package__, "..tally").CheckResult()
        if self.replayed:
            result.corruptions_fixed += 1
            self.replayed = False
        self._survey(result)
        self._find_shared(result)
        return result

    def _find_shared(self, result: CheckResult) -> None:
        """Blocks that lie over others, which QEMU does not look for."""
        Tally = part(__package__, "..tally").Tally

        size = self.block_size
        file_size = self.file.size
        tally = Tally(file_size // M, 1)
        more = True
        while more:
            for index, count, state, place in self.bat.runs(0, self.layout.blocks):
                if state != FULLY_PRESENT or place + count * size > file_size:
                    continue
                last = -1
                for lost in tally.add(place // M, count * size // M):
                    block = index + (lost * M - place) // size
                    if block != last:
                        result.say("qemu-img: VHDX BAT entry %d: another block is at offset %d too" % (block, lost * M))
                        result.corruptions += 1
                        last = block
            more = tally.advance()

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head.startswith(MAGIC) else 0

    @classmethod
    def check_creation(cls, options: Any) -> None:
        from .create import plan

        plan(options)

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        """See Hooks.create."""
        from .create import create

        create(file, options)
