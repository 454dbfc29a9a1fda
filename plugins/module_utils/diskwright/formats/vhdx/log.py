# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The log: metadata is written there before it is written where it belongs, so that a crash tears nothing apart
(https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-vhdx/, section 2.3).

It is a ring of sectors of 4 KiB. An entry is a header, descriptors and a sector for each that has data. Entries that follow one another,
each with the next sequence number, are a sequence; the one that ends with the greatest number counts.
"""

from __future__ import annotations

import os

from ...errors import Error
from ...kernels import crc32c
from ...ondisk import Struct
from .layout import M, MAX_FILE, NO_GUID, REGION_TABLES, new_guid, refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Optional, Sequence

    from ...ondisk import bytes4, bytes8, bytes16, u32, u64
    from .layout import Headers

    Descriptor = tuple[bytes, bytes, bytes, int]  # signature, trailing and leading bytes, file offset
    Page = tuple[int, bytes]  # file offset, 4 KiB

LOG_SECTOR = 4096
READ = 1 << 20  # bytes of the log that are in memory at a time
MAX_DESCRIPTORS = 1 << 20  # of one entry; more than 4 GiB of data


class EntryHeader(Struct):
    """What an entry begins with."""

    ORDER = "<"

    signature: bytes4 = b"loge"
    checksum: u32 = 0
    entry_length: u32
    tail: u32
    sequence_number: u64
    descriptor_count: u32
    reserved: u32 = 0
    log_guid: bytes16
    flushed_file_offset: u64
    last_file_offset: u64


class DescriptorRecord(Struct):
    """Either kind of descriptor; `leading` of a zero descriptor is the length."""

    ORDER = "<"

    signature: bytes4 = b"desc"
    trailing: bytes4
    leading: bytes8
    file_offset: u64
    sequence_number: u64


class Entry:
    """An entry that is sound: its place in the log and its header."""

    __slots__ = ("position", "header")

    def __init__(self, position: int, header: EntryHeader) -> None:
        self.position = position
        self.header = header

    @property
    def first_data(self) -> int:
        """Bytes from the beginning of the entry to its first data sector."""
        return descriptor_sectors(self.header.descriptor_count) * LOG_SECTOR


def descriptor_sectors(count: int) -> int:
    """Sectors that the header and `count` descriptors take."""
    return -(-(EntryHeader.SIZE + count * DescriptorRecord.SIZE) // LOG_SECTOR)


class Log:
    """The log of the image that `headers` belong to."""

    __slots__ = ("file", "headers", "offset", "length", "_position", "_sequence_number", "_budget")

    def __init__(self, headers: Headers) -> None:
        self.file = headers.file
        self.headers = headers
        self.offset = headers.current.log_offset
        self.length = headers.current.log_length
        self._position = 0
        self._sequence_number = int.from_bytes(os.urandom(4), "little")
        self._budget = 2 * self.length + LOG_SECTOR  # bytes that may be summed up: entries do not overlap, so all of the log once

    # -- reading -----------------------------------------------------------------------------------------------------

    def sequence(self) -> list[Entry]:
        """The entries that must be replayed, in order; none where the log is empty. Raises Corrupt where one lies."""
        header = self.headers.current
        if header.log_guid == NO_GUID or not self.length:
            return []
        if self.length % M:
            raise refused(self.file, "a log of %d bytes" % self.length)
        if self.offset + self.length > self.file.size:
            raise refused(self.file, "the log ends at %#x, behind the end of the file" % (self.offset + self.length))
        best: list[Entry] = []
        entries = {entry.position: entry for entry in self._entries()}
        followers = {self._after(entry) for entry in entries.values() if self._follows(entries.get(self._after(entry)), entry)}
        for entry in entries.values():
            if entry.position in followers:
                continue
            run = [entry]
            following = entries.get(self._after(entry))
            while self._follows(following, run[-1]) and following is not None:
                run.append(following)
                following = entries.get(self._after(following))
            if not best or run[-1].header.sequence_number > best[-1].header.sequence_number:
                best = run
        tails = [entry.position for entry in best]
        if best and best[-1].header.tail in tails:
            best = best[tails.index(best[-1].header.tail) :]
        return best

    def _after(self, entry: Entry) -> int:
        return (entry.position + entry.header.entry_length) % self.length

    def _follows(self, second: Optional[Entry], first: Entry) -> bool:
        return second is not None and second.header.sequence_number == first.header.sequence_number + 1

    def _entries(self) -> list[Entry]:
        """All sound entries of the present log."""
        found = []
        guid = self.headers.current.log_guid
        for start in range(0, self.length, READ):
            raw = self._read(start, min(READ, self.length - start))
            at = raw.find(b"loge")
            while at >= 0:
                if not at % LOG_SECTOR:
                    header = EntryHeader.unpack(raw, at)
                    if header.log_guid == guid and self._is_sound(start + at, header):
                        found.append(Entry(start + at, header))
                at = raw.find(b"loge", at + 4)
        for entry in found:
            for _descriptor in self._descriptors(entry):
                pass  # those that cannot be raise
        return found

    def _is_sound(self, position: int, header: EntryHeader) -> bool:
        """Whether the entry has a possible length and the right checksum."""
        length, count = header.entry_length, header.descriptor_count
        if not header.sequence_number or not LOG_SECTOR <= length <= self.length or length % LOG_SECTOR or count > MAX_DESCRIPTORS:
            return False
        if descriptor_sectors(count) * LOG_SECTOR > length:
            return False
        self._budget -= length
        if self._budget < 0:
            raise refused(self.file, "log entries overlap")
        crc = 0
        for at in range(0, length, READ):
            part = bytearray(self._read((position + at) % self.length, min(READ, length - at)))
            if not at:
                part[4:8] = bytes(4)
            crc = crc32c(part, crc)
        return crc == header.checksum

    def _read(self, position: int, length: int) -> bytes:
        """Bytes of the ring, at most READ."""
        inside = min(length, self.length - position)
        raw = self.file.pread(self.offset + position, inside)
        return raw if inside == length else raw + self.file.pread(self.offset, length - inside)

    def _descriptors(self, entry: Entry) -> Iterator[Descriptor]:
        """The descriptors of an entry. Raises Corrupt where one cannot be."""
        header = entry.header
        count = header.descriptor_count
        size = DescriptorRecord.SIZE
        with_data = done = 0
        while done < count:
            part = min(count - done, READ // size)
            raw = self._read((entry.position + EntryHeader.SIZE + done * size) % self.length, part * size)
            for at in range(0, part * size, size):
                record = DescriptorRecord.unpack(raw, at)
                place = record.file_offset
                if record.signature not in (b"desc", b"zero") or record.sequence_number != header.sequence_number or place % LOG_SECTOR:
                    raise refused(self.file, "a descriptor of the log is damaged")
                if record.signature == b"zero" and int.from_bytes(record.leading, "little") % LOG_SECTOR:
                    raise refused(self.file, "a zero descriptor of the log is damaged")
                with_data += record.signature == b"desc"
                yield record.signature, record.trailing, record.leading, place
            done += part
        if entry.first_data + with_data * LOG_SECTOR > header.entry_length:
            raise refused(self.file, "a log entry has too many descriptors")

    # -- replaying ---------------------------------------------------------------------------------------------------

    def replay(self, entries: Sequence[Entry]) -> None:
        """Write what the entries hold where it belongs, and empty the log. Raises Corrupt, and writes nothing, where one lies."""
        for entry in entries:
            self._apply(entry, False)
        for entry in entries:
            self._apply(entry, True)
        end = -(-entries[-1].header.last_file_offset // M) * M
        if self.file.size < end and self.file.growable:
            self.file.truncate(end, exact=False)
        self.file.flush()
        self.headers.update(log_guid=NO_GUID)
        self.file.flush()

    def _apply(self, entry: Entry, really: bool) -> None:
        """Check what an entry would do, or do it."""
        header = entry.header
        if header.flushed_file_offset > self.file.size or header.last_file_offset > MAX_FILE:
            raise refused(self.file, "the file is shorter than the log says")
        at = entry.position + entry.first_data
        low, high = header.sequence_number & 0xFFFFFFFF, header.sequence_number >> 32
        for signature, trailing, leading, place in self._descriptors(entry):
            length = LOG_SECTOR if signature == b"desc" else int.from_bytes(leading, "little")
            self._admit(place, length)
            if signature == b"zero":
                inside = min(length, self.file.size - place)
                if really and inside > 0:
                    self.file.pwrite_zeroes(place, inside)
                continue
            raw = self._read(at % self.length, LOG_SECTOR)
            at += LOG_SECTOR
            if int.from_bytes(raw[4:8], "little") != high or int.from_bytes(raw[4092:], "little") != low:
                raise refused(self.file, "a data sector of the log is torn")
            if really:
                self.file.write_hosted(place, memoryview(leading + raw[8:4092] + trailing))

    def _admit(self, place: int, length: int) -> None:
        """Raise unless the log may change a range: headers and the log itself are not what it is for."""
        end = place + length
        if place < REGION_TABLES[0] or end > MAX_FILE or place < self.offset + self.length and end > self.offset:
            raise refused(self.file, "the log holds something for %#x" % place, 5)

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(self, pages: Sequence[Page]) -> None:
        """Bring pages of 4 KiB to where they belong in the file, all those of a log's worth or none if there is a crash.

        What was written to the file before is there before them. The last step still waits for a flush.
        """
        file, headers = self.file, self.headers
        half = self.length // 2 // LOG_SECTOR  # so that an entry never lies over the one before
        most = half - descriptor_sectors(half)
        if most < 1 or self.length % LOG_SECTOR or self.offset + self.length > MAX_FILE:
            raise Error("%s: the log of %d bytes is too short" % (file.filename, self.length), filename=file.filename, errno=5)
        for start in range(0, len(pages), most):
            batch = pages[start : start + most]
            guid = new_guid()
            self._append(batch, guid)
            file.flush()
            headers.update(log_guid=guid)
            file.flush()
            for offset, data in batch:
                file.write_hosted(offset, memoryview(data))
            file.flush()
            headers.update(log_guid=NO_GUID)

    def _append(self, pages: Sequence[Page], guid: bytes) -> None:
        """Write one entry, a sequence by itself, behind the last one."""
        self._sequence_number += 1
        number = self._sequence_number
        sectors = descriptor_sectors(len(pages))
        size = self.file.size
        header = EntryHeader(
            entry_length=(sectors + len(pages)) * LOG_SECTOR,
            tail=self._position,
            sequence_number=number,
            descriptor_count=len(pages),
            log_guid=guid,
            flushed_file_offset=size,
            last_file_offset=size,
        )
        parts = [header.pack()]
        for offset, data in pages:
            parts.append(DescriptorRecord(trailing=data[4092:], leading=data[:8], file_offset=offset, sequence_number=number).pack())
        parts.append(bytes(sectors * LOG_SECTOR - EntryHeader.SIZE - len(pages) * DescriptorRecord.SIZE))
        high, low = (number >> 32).to_bytes(4, "little"), (number & 0xFFFFFFFF).to_bytes(4, "little")
        for offset, data in pages:
            parts += (b"data", high, data[8:4092], low)
        entry = bytearray().join(parts)
        entry[4:8] = crc32c(entry).to_bytes(4, "little")
        inside = min(len(entry), self.length - self._position)
        self.file.write_hosted(self.offset + self._position, memoryview(entry)[:inside])
        if inside < len(entry):
            self.file.write_hosted(self.offset, memoryview(entry)[inside:])
        self._position = (self._position + len(entry)) % self.length
