# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What is asked of a logical unit, and how its answers are read (SPC-4 and SBC-3, https://www.t10.org/drafts.htm).

Offsets and lengths are bytes; a logical unit counts in blocks.
"""

from __future__ import annotations

from struct import pack, unpack_from

from ...errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from .session import Session

DISK, CDROM = 0, 5  # peripheral device types
_WITHOUT_16 = (CDROM,)

MIN_BLOCK, MAX_BLOCK = 512, 1 << 16  # bytes
MAX_SIZE = (1 << 63) - 512
MAX_TRANSFER = 1 << 20  # bytes of one READ or WRITE
MAX_SAME = 1 << 30  # bytes of one WRITE SAME or UNMAP
STATUS_ANSWER = 8 + 16 * 512  # bytes: room for the status of so many runs

MAPPED, DEALLOCATED, ANCHORED = 0, 1, 2

PAGE_LIMITS, PAGE_PROVISIONING = 0xB0, 0xB2


class Unit:
    """What a logical unit says of itself; sizes in bytes."""

    def __init__(self, session: Session) -> None:
        """Ask. Raises Error, ProtocolError for answers that cannot be."""
        inquiry = _inquire(session, None, 36)
        self.type = inquiry[0] & 0x1F
        self.block_size = MIN_BLOCK
        self.size = 0
        self.thin = self.zeroes = False  # blocks can be unmapped; unmapped blocks read as zeroes
        self.can_unmap = self.can_unmap_same = False  # by UNMAP; by WRITE SAME
        self.can_write_same = True  # until it refuses
        self.max_transfer = MAX_TRANSFER
        self.max_unmap = self.max_same = MAX_SAME
        self.unmap_unit = 0
        if self.type == DISK:
            self._read_capacity_16(session)
        elif self.type == CDROM:
            self._read_capacity_10(session)
        self.write_protected = self.type == CDROM or self.type == DISK and _is_write_protected(session)
        if self.type == DISK:
            self._read_pages(session)

    def _take_capacity(self, last: int, block_size: int) -> None:
        if not MIN_BLOCK <= block_size <= MAX_BLOCK or block_size & block_size - 1:
            raise ProtocolError("iSCSI: the logical unit says that its blocks have %d bytes" % block_size)
        if (last + 1) * block_size > MAX_SIZE:
            raise ProtocolError("iSCSI: the logical unit says that it has %d blocks of %d bytes" % (last + 1, block_size))
        self.block_size = block_size
        self.size = (last + 1) * block_size

    def _read_capacity_16(self, session: Session) -> None:
        answer = _ask(session, "READ CAPACITY(16)", pack(">BB8xIxx", 0x9E, 0x10, 32), 32, 12)
        last, block_size = unpack_from(">QI", answer)
        self._take_capacity(last, block_size)
        self.thin, self.zeroes = bool(answer[14] & 0x80), bool(answer[14] & 0x40)

    def _read_capacity_10(self, session: Session) -> None:
        from .session import NOT_READY, CheckCondition

        try:
            last, block_size = unpack_from(">II", _ask(session, "READ CAPACITY(10)", pack(">B9x", 0x25), 8, 8))
        except CheckCondition as exc:
            if exc.key != NOT_READY:  # no medium: a drive without size
                raise
            return
        self._take_capacity(last, block_size)

    def _read_pages(self, session: Session) -> None:
        from .session import CheckCondition

        try:
            limits = _inquire(session, PAGE_LIMITS, 64)
            (transfer,) = unpack_from(">I", limits, 8)
            unmap, _count, granularity = unpack_from(">III", limits, 20)
            (same,) = unpack_from(">Q", limits, 36)
            self.max_transfer = min(MAX_TRANSFER, transfer * self.block_size or MAX_TRANSFER)
            self.max_unmap = min(MAX_SAME, unmap * self.block_size or MAX_SAME)
            self.max_same = min(MAX_SAME, same * self.block_size or MAX_SAME)
            self.unmap_unit = granularity * self.block_size
            if self.thin:
                abilities = _inquire(session, PAGE_PROVISIONING, 8)[5]
                self.can_unmap, self.can_unmap_same = bool(abilities & 0x80), bool(abilities & 0x40)
        except CheckCondition:
            pass  # an old unit without these pages: nothing is said, and nothing is done of it

    def _range(self, codes: tuple[int, int], offset: int, length: int, flags: int = 0) -> bytes:
        """The CDB of READ and WRITE and what is like them, in its form of 16 or of 10 bytes."""
        first, count = offset // self.block_size, length // self.block_size
        if self.type in _WITHOUT_16:
            return pack(">BBIBHB", codes[1], flags, first, 0, count, 0)
        return pack(">BBQIBB", codes[0], flags, first, count, 0, 0)

    def read(self, session: Session, offset: int, view: memoryview) -> None:
        """Fill `view`, of whole blocks and at most `max_transfer` bytes. Raises ProtocolError for fewer bytes than that."""
        got = session.command("READ", self._range((0x88, 0x28), offset, len(view)), into=view)
        if got != len(view):
            raise ProtocolError("iSCSI: READ gave %d bytes in place of %d" % (got, len(view)))

    def write(self, session: Session, offset: int, view: memoryview) -> None:
        """Write `view`, of whole blocks and at most `max_transfer` bytes. Raises ProtocolError if not all was taken."""
        got = session.command("WRITE", self._range((0x8A, 0x2A), offset, len(view)), out=view)
        if got != len(view):
            raise ProtocolError("iSCSI: WRITE took %d bytes in place of %d" % (got, len(view)))

    def write_zeroes(self, session: Session, offset: int, length: int, unmap: bool) -> None:
        """Zeroes for whole blocks, at most `max_same` bytes."""
        cdb = self._range((0x93, 0x41), offset, length, 0x08 if unmap else 0)
        session.command("WRITE SAME", cdb, out=memoryview(bytes(self.block_size)))

    def unmap(self, session: Session, offset: int, length: int) -> None:
        """Give whole blocks back, at most `max_unmap` bytes."""
        blocks = pack(">HHxxxxQIxxxx", 22, 16, offset // self.block_size, length // self.block_size)
        session.command("UNMAP", pack(">B6xHx", 0x42, len(blocks)), out=memoryview(blocks))

    def flush(self, session: Session) -> None:
        """Bring everything to the medium."""
        session.command("SYNCHRONIZE CACHE", pack(">B9x", 0x35))

    def status(self, session: Session, offset: int) -> list[tuple[int, int, int]]:
        """(start, end, MAPPED or DEALLOCATED or ANCHORED) of the runs from the block at `offset` on: one at least, as many as
        the target told. Raises ProtocolError for an answer that is about something else."""
        cdb = pack(">BBQIxx", 0x9E, 0x12, offset // self.block_size, STATUS_ANSWER)
        answer = _ask(session, "GET LBA STATUS", cdb, STATUS_ANSWER, 24)
        (length,) = unpack_from(">I", answer)
        runs = []
        position = offset
        for place in range(8, min(length + 4, len(answer)) - 15, 16):
            first, count, provisioning = unpack_from(">QIB", answer, place)
            start, end = first * self.block_size, (first + count) * self.block_size
            if start > position or end <= position:
                if place == 8:
                    raise ProtocolError("iSCSI: GET LBA STATUS: blocks %d to %d were answered for block %d" % (first, first + count, offset // self.block_size))
                break
            runs.append((position, min(end, self.size), provisioning & 0x0F))
            position = end
        return runs


def _ask(session: Session, name: str, cdb: bytes, room: int, least: int) -> bytes:
    """The answer to a command, at most `room` bytes. Raises ProtocolError for fewer than `least`."""
    buffer = bytearray(room)
    got = session.command(name, cdb, into=memoryview(buffer))
    if got < least:
        raise ProtocolError("iSCSI: the answer to %s has %d bytes, not %d" % (name, got, least))
    return bytes(buffer)


def _inquire(session: Session, page: Optional[int], room: int) -> bytes:
    """Standard INQUIRY data, or those of one page of vital product data; zeroes where there is less than `room` bytes."""
    cdb = pack(">BBBHB", 0x12, 0 if page is None else 1, page or 0, room, 0)
    answer = _ask(session, "INQUIRY", cdb, room, 4)
    if page is not None and answer[1] != page:
        raise ProtocolError("iSCSI: INQUIRY gave page %#x in place of %#x" % (answer[1], page))
    return answer


def _is_write_protected(session: Session) -> bool:
    from .session import CheckCondition

    try:
        return bool(_ask(session, "MODE SENSE(6)", pack(">BBBBBB", 0x1A, 0x08, 0x3F, 0, 255, 0), 255, 4)[2] & 0x80)
    except CheckCondition:
        return False  # QEMU takes it for writable too
