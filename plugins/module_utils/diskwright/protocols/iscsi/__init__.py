# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""iscsi: a logical unit of an iSCSI target, through libiscsi (https://www.rfc-editor.org/rfc/rfc7143, BlockdevOptionsIscsi of
https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html)."""

from __future__ import annotations

import errno

from ...errors import Error, OptionError, ReadOnly
from ...extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from ...node import MAX_SIZE, Alloc, OpenFlags, Protocol, fill_zeroes
from ...options import Options, SecretRef, opt
from ..existing import ExistingCreateOptions, take_existing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, ClassVar, Iterable, Optional

    from .scsi import Unit
    from .session import Address, Session

MAX_SESSIONS = 4  # of one node
PATIENCE = 60.0  # seconds that an answer may take where the option timeout does not say it
MAX_TIMEOUT = 3600  # seconds
MAX_LUN = 16383
INITIATOR = "iqn.2008-11.org.linux-kvm"  # QEMU's, which targets may have in their lists

STORED = DATA | OFFSET_VALID | ALLOCATED
HOLE = ZERO | OFFSET_VALID | ALLOCATED
UNDEFINED = OFFSET_VALID  # no data, and nothing promised

DEPRECATED = "iSCSI block driver 'password' option is deprecated, use 'password-secret' instead"


class IscsiOptions(Options):
    """Runtime options of iscsi."""

    transport: Optional[str] = opt(None, help="tcp, or iser over RDMA")
    portal: Optional[str] = opt(None, help="address[:port] of the target")
    target: Optional[str] = opt(None, help="qualified name (IQN) of the target")
    lun: int = opt(0, help="number of the logical unit")
    user: Optional[str] = opt(None, help="user name for CHAP")
    password: Optional[str] = opt(None, help="password for CHAP; better: password-secret")
    password_secret: Optional[SecretRef] = opt(None, help="id of the secret with the password for CHAP")
    initiator_name: Optional[str] = opt(None, help="qualified name (IQN) of the initiator")
    header_digest: str = opt("none-crc32c", help="crc32c, none, crc32c-none or none-crc32c")
    timeout: int = opt(0, help="seconds until a request fails; 0: as long as the driver finds right")


class Iscsi(Protocol):
    """A logical unit."""

    driver = "iscsi"
    options_class = IscsiOptions
    strong_options = ("transport", "portal", "target", "lun", "user", "password", "password-secret", "initiator-name", "header-digest")
    create_options: ClassVar[type[Options]] = ExistingCreateOptions
    creatable = True
    fixed = True

    def __init__(self, options: IscsiOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        from ..connections import Pool
        from .library import libiscsi
        from .scsi import Unit
        from .session import Session

        address = _address(options)
        if options.user is not None and options.password is not None:
            self.warnings.append(DEPRECATED)
        api = libiscsi()

        def connect() -> Session:
            return Session(api, address)

        self._pool = Pool(connect, MAX_SESSIONS)
        try:
            self._unit: Unit = self._pool.run(Unit)
            self._size = self._unit.size
            self.request_alignment = self._unit.block_size
            self._tells_status = self._unit.thin
            self._check_protection()
        except BaseException:
            self._pool.close()
            raise

    def _check_protection(self) -> None:
        if self.flags.writable and self._unit.write_protected:
            raise ReadOnly("LUN is write protected: Permission denied", filename=self.filename, errno=errno.EACCES)

    def _changed_flags(self, old: OpenFlags) -> None:
        self._check_protection()

    def _release_host(self) -> None:
        self._pool.close()

    def disk_size(self) -> None:
        """Nobody says."""
        return None

    # -- what is where -------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        end = offset + length
        block = self.request_alignment
        position = offset // block * block
        while position < min(end, self._size):
            for start, stop, status in self._runs(position):
                yield Extent(start, stop - start, status, self, start)
                position = stop
        if end > self._size:
            yield Extent(self._size, MAX_SIZE - self._size, HOLE, self, self._size)

    def _runs(self, offset: int) -> list[tuple[int, int, int]]:
        """(start, end, status) of runs from `offset` on, one at least."""
        from .scsi import MAPPED
        from .session import CheckCondition

        if self._tells_status:
            unmapped = HOLE if self._unit.zeroes else UNDEFINED
            try:
                runs = self._pool.run(self._unit.status, offset)
                if runs:
                    return [(start, end, STORED if what == MAPPED else unmapped) for start, end, what in runs]
            except CheckCondition:
                self._tells_status = False  # it is not able to
        return [(offset, self._size, STORED)]

    # -- data ----------------------------------------------------------------------------------------------------

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def read_own(self, host_offset: int, view: memoryview) -> None:
        """See Node.read_own; memory need not be aligned."""
        if (host_offset | len(view)) % self.request_alignment:
            super().read_own(host_offset, view)
        else:
            self._pread_into(host_offset, view)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        inside = max(min(len(view), self._size - host_offset), 0)
        fill_zeroes(view[inside:])
        for start in range(0, inside, self._unit.max_transfer):
            part = view[start : min(inside, start + self._unit.max_transfer)]
            self._pool.run(self._unit.read, host_offset + start, part)

    def write_own(self, host_offset: int, view: memoryview) -> None:
        """See Node.write_own; a unit does not grow, and memory need not be aligned."""
        if host_offset + len(view) > self._size:
            raise Error("%s: write at %#x is beyond the end of the device" % (self.filename, host_offset), filename=self.filename, errno=errno.ENOSPC)
        if (host_offset | len(view)) % self.request_alignment:
            super().write_own(host_offset, view)
            return
        entry = self.serialise(host_offset, len(view), self.request_alignment)  # others may rewrite parts of these blocks
        try:
            self._pwrite(host_offset, view)
        finally:
            self.release(entry)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        for start in range(0, len(view), self._unit.max_transfer):
            part = view[start : start + self._unit.max_transfer]
            self._pool.run(self._unit.write, host_offset + start, part)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        unit = self._unit
        start, count = _whole(offset, length, unit.block_size)
        unmap = unmap and self.flags.unmap and unit.can_unmap_same and unit.zeroes
        if count <= 0 or not unit.can_write_same:
            return offset, 0
        if not self._in_pieces(start, count, unit.max_same, unit.write_zeroes, unmap):
            unit.can_write_same = False
            return offset, 0
        return start, count

    def _discard(self, offset: int, length: int) -> None:
        unit = self._unit
        start, count = _whole(offset, min(length, self._size - offset), max(unit.unmap_unit, unit.block_size))
        if self.flags.unmap and unit.can_unmap and count > 0:
            unit.can_unmap = self._in_pieces(start, count, unit.max_unmap, unit.unmap)

    def _in_pieces(self, offset: int, length: int, most: int, request: Callable[..., None], *more: Any) -> bool:
        """Make a request for a range in pieces; False if the unit says that it is none of its commands."""
        from .session import ILLEGAL_REQUEST, CheckCondition

        most = max(most // self._unit.block_size * self._unit.block_size, self._unit.block_size)
        try:
            for position in range(offset, offset + length, most):
                self._pool.run(request, position, min(most, offset + length - position), *more)
        except CheckCondition as exc:
            if exc.key != ILLEGAL_REQUEST:
                raise
            return False
        return True

    def _flush(self) -> None:
        from .session import ILLEGAL_REQUEST, CheckCondition

        if self.flags.no_flush:
            return
        try:
            self._pool.run(self._unit.flush)
        except CheckCondition as exc:
            if exc.key != ILLEGAL_REQUEST:  # a unit without a cache
                raise

    def _truncate(self, size: int, preallocation: str) -> None:
        if preallocation != "off":
            raise OptionError("Unsupported preallocation mode '%s' for iSCSI devices" % preallocation, errno=errno.ENOTSUP)
        if size != self._size:
            raise Error("Cannot resize iSCSI devices", filename=self.filename, errno=errno.ENOTSUP)

    # -- names and creation --------------------------------------------------------------------------------------

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        from .names import parse

        return parse(filename)

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        """Nothing is created: see take_existing."""

        def open_it(flags: OpenFlags) -> Iscsi:
            return cls(cls.options_class.from_mapping(cls.parse_name(filename)), flags)

        take_existing(cls.driver, filename, options, open_it, "Cannot grow iSCSI devices")


def _whole(offset: int, length: int, unit: int) -> tuple[int, int]:
    """(offset, length) of the whole units in a range; the length may be negative for none."""
    start = -(-offset // unit) * unit
    return start, (offset + length) // unit * unit - start


def _address(options: IscsiOptions) -> Address:
    """Where to go. Raises OptionError in QEMU's words."""
    from . import library as lib
    from .session import Address

    if options.transport is None or options.portal is None or options.target is None:
        raise OptionError("Need all of transport, portal and target options")
    if options.transport not in ("tcp", "iser"):
        raise OptionError("Unknown transport: %s" % options.transport)
    if not 0 <= options.lun <= MAX_LUN:
        raise OptionError("Invalid LUN: %d" % options.lun)
    if options.timeout > MAX_TIMEOUT:
        raise OptionError("The timeout is at most %d seconds" % MAX_TIMEOUT)
    password: Optional[bytes] = None
    if options.user is not None:
        if options.password_secret is not None and options.password is not None:
            raise OptionError("'password' and 'password-secret' properties are mutually exclusive")
        if options.password_secret is not None:
            from ...crypto.secrets import passphrase

            password = passphrase(options.password_secret)
        elif options.password is not None:
            password = options.password.encode("utf-8", "surrogateescape")
        else:
            raise OptionError("CHAP username specified but no password was given")
    if options.header_digest not in lib.HEADER_DIGESTS:
        raise OptionError("Invalid header-digest setting : %s" % options.header_digest)
    for value in (options.portal, options.target, options.user or "", options.initiator_name or ""):
        if "\0" in value or len(value) > 223 or not value.isascii():  # 223: the longest name of RFC 7143
            raise OptionError("iSCSI: '%s' is no name" % value.replace("\0", "\\0"))
    transport = lib.ISER if options.transport == "iser" else lib.TCP
    initiator = options.initiator_name or INITIATOR
    address = Address(transport, options.portal, options.target, options.lun, initiator, options.user or "", password)
    address.header_digest = lib.HEADER_DIGESTS[options.header_digest]
    address.patience = float(options.timeout or PATIENCE)
    return address
