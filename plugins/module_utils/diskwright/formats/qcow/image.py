# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The image: opening, mapping and writing
(https://github.com/libyal/libqcow/blob/main/documentation/QEMU%20Copy-On-Write%20file%20format.asciidoc, version 1).

Room is taken at the end of the file, and never given back. Tables stay in memory until a flush, which writes new L2 tables,
waits for them and the data, and only then writes what points at them.
"""

from __future__ import annotations

import errno
import os
import sys
from array import array

from ... import kernels
from ...cache import TableCache, read_padded
from ...errors import Corrupt, Error, OptionError
from ...extent import ALLOCATED, COMPRESSED, DATA, OFFSET_VALID, Extent
from ...node import MAX_SIZE, Alloc, Format, OpenFlags
from .header import MAGIC, QcowCreateOptions, QcowOptions, plan_header, read_header
from . import header as layout
from .tables import L1Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator, Optional, Sequence

    from ...hooks import Reference
    from ...node import Node

PACKED = 1 << 63  # the entry of a compressed cluster
CACHE = 32 << 20  # bytes of L2 tables that are kept
RUNS = 4096  # asked from the kernel at a time
TAIL = 256 << 10  # bytes of compressed clusters that are written in one go


class Qcow(Format):
    """A qcow image."""

    driver = "qcow"
    options_class = QcowOptions
    create_options = QcowCreateOptions
    creatable = True
    supports_backing = True
    supports_compression = True
    zero_initialized = True
    strong_options = ("encrypt.key-secret",)

    def __init__(self, options: QcowOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        file = self.file
        self.header = header = read_header(file.pread(0, min(layout.Header.SIZE, file.size)))
        self.cluster_size = self.allocation_unit = 1 << header.cluster_bits
        self.entries = 1 << header.l2_bits
        self._size = header.size // layout.SECTOR * layout.SECTOR
        self.encrypted = header.crypt_method == layout.CRYPT_AES
        self._check_format(options.encrypt_format)
        if header.backing_file_offset > MAX_SIZE or header.l1_table_offset > MAX_SIZE - header.l1_size * 8:
            reason = os.strerror(errno.EIO)
            raise Corrupt("Could not open '%s': %s" % (file.filename, reason), errno=errno.EIO)
        self._read_name()
        self._load_tables()
        self.clusters = None
        if self.encrypted:
            from .encryption import open_clusters

            self.clusters = open_clusters(file, options, flags)

    def _check_format(self, given: Optional[str]) -> None:
        if given is None:
            return
        if not self.encrypted:
            raise OptionError("No encryption in image header, but options specified format '%s'" % given)
        if given != "aes":
            raise OptionError("Header reported 'aes' encryption format but options specify '%s'" % given)

    def _read_name(self) -> None:
        at, length = self.header.backing_file_offset, self.header.backing_file_size
        if at and length:
            name = self.file.pread(at, max(0, min(length, self.file.size - at))).partition(b"\0")[0]
            self.backing_filename = os.fsdecode(name) or None

    def _load_tables(self) -> None:
        """Forget what is known of the tables, unwritten changes included, and of the end of the file."""
        table = self.entries * 8
        self.reach = self.entries * self.cluster_size  # guest bytes that an L2 table maps
        self.l1 = L1Table(self.file, self.header.l1_table_offset, self.header.l1_size)
        self.cache = TableCache(self.file, table, CACHE // table, self.write_back)
        self.fresh: set[int] = set()  # L2 tables that no L1 entry in the file points at yet
        self.end = self.file.size  # where new clusters come to lie
        self.tail = bytearray()  # compressed clusters that are not written yet: the last of what is taken
        self.free: list[tuple[int, int]] = []  # (offset, length) of clusters that were taken and given back

    def _changed_flags(self, old: OpenFlags) -> None:
        if self.flags.writable and not old.writable:
            self._load_tables()

    # -- looking up ----------------------------------------------------------------------------------------------

    def _l2_table(self, index: int) -> Optional[bytearray]:
        """The L2 table of L1 entry `index`, None if there is none. Raises Corrupt."""
        offset = self.l1.get(index)
        if not offset:
            return None
        if offset > MAX_SIZE - self.cache.table_size:
            raise self._invalid("L2 table", offset)
        return self.cache.get(offset)

    def _invalid(self, what: str, offset: int) -> Corrupt:
        text = "%s: %s offset %#x is invalid" % (self.filename, what, offset)
        return Corrupt(text, filename=self.filename, offset=offset, errno=errno.EIO)

    def _runs(self, table: bytearray, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(number, count, value) of runs of entries: empty ones, compressed ones one by one, else a cluster further each."""
        end = first + count
        while first < end:
            for number, length, value, step in kernels.table_runs(table, 8, True, first, end - first, self.cluster_size, RUNS):
                first = number + length
                if not value and not step:
                    yield number, length, 0
                elif not value:  # the others only seem to follow
                    first = number + 1
                    yield number, 1, 0
                    break
                elif value & PACKED or not step or value + length * step > MAX_SIZE:
                    for turn in range(length):
                        yield number + turn, 1, value + turn * step
                else:
                    yield number, length, value

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(guest offset, L1 index, first entry, entries) of a cluster-aligned range, L2 table by L2 table."""
        size = self.cluster_size
        while start < end:
            index, rest = divmod(start, self.reach)
            stop = min(end, (index + 1) * self.reach)
            yield start, index, rest // size, (stop - start) // size
            start = stop

    def _plain(self, value: int, length: int) -> None:
        """Raise Corrupt unless plain clusters of `length` bytes can be at `value`."""
        if value % layout.SECTOR or value > MAX_SIZE - length:
            raise self._invalid("cluster", value)

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        end = offset + length
        while offset < end:
            with self._lock:
                extents, offset = self._map_part(offset, end)
            yield from extents

    def _map_part(self, offset: int, end: int) -> tuple[list[Extent], int]:
        """Extents from `offset` on, as far as an L2 table or a run of absent ones reaches, and where they end."""
        size = self.cluster_size
        position, index, first, count = next(self._parts(offset // size * size, -(-end // size) * size))
        table = self._l2_table(index)
        if table is None:
            stop = self.l1.next_used(index + 1, -(-end // self.reach))
            return [Extent(index * self.reach, (stop - index) * self.reach, 0)], stop * self.reach
        extents: list[Extent] = []
        clusters = self.clusters
        for number, run, value in self._runs(table, first, count):
            start = position + (number - first) * size
            if not value:
                extents.append(Extent(start, run * size, 0))
            elif value & PACKED:
                extents.append(Extent(start, size, DATA | ALLOCATED | COMPRESSED, self, start))
            elif value % layout.SECTOR or value > MAX_SIZE - run * size:
                if extents:  # an error is that of its place
                    return extents, start
                raise self._invalid("cluster", value)
            elif clusters is not None:
                extents.append(Extent(start, run * size, DATA | ALLOCATED, clusters, clusters.address(value, start)))
            else:
                extents.append(Extent(start, run * size, DATA | OFFSET_VALID | ALLOCATED, self.file, value))
        return extents, position + count * size

    # -- compressed clusters -------------------------------------------------------------------------------------

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        """Bytes of compressed clusters, by their guest offset."""
        size = self.cluster_size
        position, end = host_offset, host_offset + len(view)
        while position < end:
            start = position // size * size
            stop = min(start + size, end)
            part = view[position - host_offset : stop - host_offset]
            with self._lock:
                table = self._l2_table(start // self.reach)
                at = start % self.reach // size * 8
                value = int.from_bytes(table[at : at + 8], "big") if table is not None else 0
            if value & PACKED:
                part[:] = memoryview(self._inflate(start, value))[position - start : stop - start]
            else:  # overwritten since it was mapped
                self.pread_into(position, part)
            position = stop

    def _inflate(self, offset: int, value: int) -> bytes:
        """The guest cluster at `offset`, whose entry is `value`. Raises Corrupt."""
        from ...compression import inflate

        shift = 63 - self.header.cluster_bits
        place, length = value & (1 << shift) - 1, value >> shift & self.cluster_size - 1
        with self._lock:
            if place + length > self.end - len(self.tail):
                self._write_tail()
        stored = bytearray(length)
        read_padded(self.file, place, memoryview(stored))
        try:
            return inflate(stored, self.cluster_size)
        except Corrupt as exc:
            text = "%s: the compressed cluster of guest offset %#x cannot be read: %s" % (self.filename, offset, exc)
            raise Corrupt(text, filename=self.filename, offset=place, errno=errno.EIO) from exc

    def _encode(self, view: memoryview) -> Optional[bytes]:
        from ...compression import deflate

        missing = self.cluster_size - len(view)
        return deflate(memoryview(bytes(view) + bytes(missing)) if missing > 0 else view)

    def _pwrite_compressed(self, offset: int, view: memoryview) -> None:
        self._pwrite_encoded(offset, view, self._encode(view) or b"")

    def _pwrite_encoded(self, offset: int, view: memoryview, encoded: bytes) -> None:
        size = self.cluster_size
        if offset % size or len(view) != size and (len(view) > size or offset + len(view) != self.size):
            raise Error("compressed writes need whole clusters", filename=self.filename, offset=offset, errno=errno.EINVAL)
        if len(encoded) >= size or self.encrypted:
            self.pwrite(offset, view)
            return
        entry = self.serialise(offset, size)
        try:
            with self._lock:
                place, length = self.end, len(encoded)
                shift = 63 - self.header.cluster_bits
                if place + length >> shift:
                    raise Error("%s: compressed clusters cannot be stored beyond %#x" % (self.filename, 1 << shift), errno=errno.EFBIG)
                table = self._writable_l2(offset // self.reach)
                if self.end != place:  # a new table has taken the place
                    place = self.end
                self.end += length
                self.tail += encoded
                at = offset % self.reach // size * 8
                self.cache.get(table)[at : at + 8] = (PACKED | length << shift | place).to_bytes(8, "big")
                self.cache.mark(table)
                if len(self.tail) >= TAIL:
                    self._write_tail()
        finally:
            self.release(entry)

    def _write_tail(self) -> None:
        """Write the compressed clusters that wait for it; the lock is held."""
        if self.tail:
            self.file.write_hosted(self.end - len(self.tail), memoryview(bytes(self.tail)))
            self.tail = bytearray()

    # -- writing -------------------------------------------------------------------------------------------------

    def _take(self, length: int) -> tuple[int, int]:
        """Room for clusters of `length` bytes or for the first of them: (offset, length)."""
        if self.free:
            place, room = self.free.pop()
            if room > length:
                self.free.append((place + length, room - length))
            return place, min(room, length)
        return self._append(length), length

    def _append(self, length: int) -> int:
        """Room at the end of the file, at a multiple of the cluster size."""
        place = -(-self.end // self.cluster_size) * self.cluster_size
        if place + length > MAX_SIZE:
            raise Error("%s: the file cannot grow any more" % self.filename, filename=self.filename, errno=errno.EFBIG)
        self._write_tail()
        self.end = place + length
        return place

    def _writable_l2(self, index: int) -> int:
        """The offset of the L2 table of L1 entry `index`, made if there is none."""
        if self._l2_table(index) is not None:
            return self.l1.get(index)
        length = self.cache.table_size
        offset = self._append(length)
        self.cache.put(offset, bytearray(length))
        self.fresh.add(offset)
        self.l1.set(index, offset)
        return offset

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        size = self.cluster_size
        allocs: list[Alloc] = []
        with self._lock:
            try:
                for start, index, first, count in self._parts(offset // size * size, -(-(offset + length) // size) * size):
                    table = self.cache.get(self._writable_l2(index))
                    for number, run, value in list(self._runs(table, first, count)):
                        position = start + (number - first) * size
                        if value and not value & PACKED:
                            self._plain(value, run * size)
                            allocs.append(self._at(position, run * size, value, False))
                            continue
                        left = run * size
                        while left:
                            place, taken = self._take(left)
                            allocs.append(self._at(position, taken, place, True))
                            position += taken
                            left -= taken
            except BaseException:
                self._abort([alloc for alloc in allocs if alloc.fresh])
                raise
        return allocs

    def _at(self, offset: int, length: int, place: int, fresh: bool) -> Alloc:
        if self.clusters is None:
            return Alloc(offset, length, self.file, place, fresh, place)
        return Alloc(offset, length, self.clusters, self.clusters.address(place, offset), fresh, place)

    def _link(self, allocs: Sequence[Alloc]) -> None:
        size = self.cluster_size
        with self._lock:
            for alloc in allocs:
                for start, index, first, count in self._parts(alloc.offset, alloc.offset + alloc.length):
                    place = alloc.token + start - alloc.offset
                    entries = array("Q", range(place, place + count * size, size))
                    if sys.byteorder == "little":
                        entries.byteswap()
                    table = self._writable_l2(index)
                    self.cache.get(table)[first * 8 : (first + count) * 8] = entries.tobytes()
                    self.cache.mark(table)

    def _abort(self, allocs: Sequence[Alloc]) -> None:
        with self._lock:
            self.free += [(alloc.token, alloc.length) for alloc in allocs]

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        """The format has no zero clusters; but where nothing is, and no backing file, nothing needs to be written."""
        if self.backing_filename is not None or self.backing is not None:
            return offset, 0
        done = 0
        for _start, count, status, _host, _place in self.block_status(offset, length, False, 1):
            done = 0 if status & ALLOCATED else count
        return offset, done

    # -- the whole image -----------------------------------------------------------------------------------------

    def _make_empty(self) -> None:
        self.flush()
        with self._lock:
            self.l1.clear()
            self.file.flush()
            end = self.header.l1_table_offset + self.header.l1_size * 8
            if self.file.size > end:
                self.file.truncate(end, exact=False)
            self._load_tables()

    def write_back(self) -> None:
        """Bring cached tables into the file, in order; the last step still waits for a flush of the file."""
        with self._lock:
            self._write_tail()
            if not self.cache.dirty and not self.l1.dirty:
                return
            self.cache.write(self.fresh)
            self.file.flush()
            self.cache.write()
            self.l1.write()
            self.fresh.clear()

    def _flush(self) -> None:
        self.write_back()

    def preload(self) -> None:
        from ... import compression

        del compression
        super().preload()

    def references(self) -> list[Reference]:
        from ...hooks import Reference

        if self.backing_filename is None or "backing" in self.children:
            return []
        return [Reference("backing", self.backing_filename)]

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head[:8] == MAGIC.to_bytes(4, "big") + layout.VERSION.to_bytes(4, "big") else 0

    @classmethod
    def check_creation(cls, options: Any) -> None:
        plan_header(options)

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        header, name = plan_header(options)
        if header.crypt_method:
            from ...crypto.secrets import passphrase

            passphrase(options.encrypt_key_secret)
        end = header.l1_table_offset + -(-header.l1_size * 8 // layout.SECTOR) * layout.SECTOR
        if file.size >= end:  # a device: nobody knows what is there
            file.pwrite_zeroes(0, end)
        file.write_hosted(0, memoryview(header.pack() + name))
        if file.size < end:
            file.truncate(end, exact=False)
