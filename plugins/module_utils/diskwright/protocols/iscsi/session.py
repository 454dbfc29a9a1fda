# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""One iSCSI session (RFC 7143, https://www.rfc-editor.org/rfc/rfc7143): login, and SCSI commands one after the other."""

from __future__ import annotations

import errno
from ctypes import addressof
from time import monotonic, sleep

from ...errors import Error
from ..clibrary import readable, text, writable
from ..connections import Lost, serve
from . import library as lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

LOGOUT_TIME = 2.0  # seconds that a target has to say goodbye
BUSY_PAUSE = 0.1  # seconds before a command is made again that the target had no time for
MAX_ATTENTIONS = 16  # unit attentions in a row: the target has something to tell before it does anything

NOT_READY, MEDIUM_ERROR, HARDWARE_ERROR, ILLEGAL_REQUEST, UNIT_ATTENTION, DATA_PROTECT, ABORTED = 2, 3, 4, 5, 6, 7, 11

_CAUSES = {
    0x0C02: errno.EIO,  # write error
    0x2000: errno.EOPNOTSUPP,  # invalid operation code
    0x2100: errno.ENOSPC,  # LBA out of range
    0x2400: errno.EINVAL,  # invalid field in the CDB
    0x2500: errno.ENODEV,  # no such logical unit
    0x2600: errno.EINVAL,  # invalid field in the parameter list
    0x2700: errno.EACCES,  # write protected
    0x2707: errno.ENOSPC,  # no room left in a thinly provisioned unit
    0x3A00: errno.ENOMEDIUM,
}


class Address:
    """Where a session goes, and as whom. `password` is None without CHAP; `patience` the seconds that an answer may take."""

    def __init__(self, transport: int, portal: str, target: str, lun: int, initiator: str, user: str, password: Optional[bytes]) -> None:
        self.transport = transport
        self.portal = portal
        self.target = target
        self.lun = lun
        self.initiator = initiator
        self.user = user
        self.password = password
        self.header_digest = lib.HEADER_DIGESTS["none-crc32c"]
        self.patience = 0.0

    def __str__(self) -> str:
        return "iscsi://%s/%s/%d" % (self.portal, self.target, self.lun)


class CheckCondition(Error):
    """The target refused a command; `key` and `ascq` are its sense (https://www.t10.org/lists/asc-num.htm)."""

    def __init__(self, message: str, key: int, ascq: int, filename: str) -> None:
        super().__init__(message, filename=filename, errno=_CAUSES.get(ascq, errno.EIO))
        self.key = key
        self.ascq = ascq


class Session:
    """A logged-in session, for one thread at a time."""

    def __init__(self, api: Any, address: Address) -> None:
        """Log in. Raises Error in QEMU's words, Lost where nobody answers."""
        self._api = api
        self._address = address
        self.lost = False
        self._context = api.iscsi_create_context(address.initiator.encode())
        if not self._context:
            raise Error("iSCSI: Failed to create iSCSI context.", errno=errno.ENOMEM)
        try:
            self._log_in()
        except BaseException:
            self._destroy()
            raise

    def _log_in(self) -> None:
        api, context, address = self._api, self._context, self._address
        settings = [
            api.iscsi_init_transport(context, address.transport),
            api.iscsi_set_targetname(context, address.target.encode()),
            api.iscsi_set_session_type(context, lib.NORMAL_SESSION),
            api.iscsi_set_header_digest(context, address.header_digest),
        ]
        if address.password is not None:
            settings.append(api.iscsi_set_initiator_username_pwd(context, address.user.encode(), address.password))
        if any(settings):
            raise self._failure("iSCSI: Failed to set up the session")
        api.iscsi_set_noautoreconnect(context, 1)
        api.iscsi_set_timeout(context, max(int(address.patience), 1))
        status: list[int] = []

        def connected(_context: Any, result: int, _data: Any, _private: Any) -> None:
            status.append(result)

        callback = lib.CALLBACK(connected)
        if api.iscsi_full_connect_async(context, address.portal.encode(), address.lun, callback, None):
            raise self._failure("iSCSI: Failed to connect to LUN : Failed to start full connect")
        outcome = self._serve(status, address.patience)
        if outcome == "late":
            self._destroy()  # while the callback is there
            raise Error("iSCSI: Failed to connect to LUN : no answer from %s within %g seconds" % (address.portal, address.patience), errno=errno.ETIMEDOUT)
        if outcome or status[0] != lib.GOOD:
            refusal = self._failure("iSCSI: Failed to connect to LUN :", Lost if outcome or status[0] == lib.ERROR else Error)
            self._destroy()
            raise refusal

    def _serve(self, status: list[int], patience: float) -> str:
        api = self._api
        return serve(self._context, api.iscsi_get_fd, api.iscsi_which_events, api.iscsi_service, status.__len__, patience)

    def _failure(self, what: str, kind: type[Error] = Error) -> Error:
        reason = text(self._api.iscsi_get_error(self._context))
        if not reason or "econnect" in reason:  # that it may not connect once more is not what was wrong
            reason = "nobody answers at %s" % self._address.portal
        return kind("%s %s" % (what, reason), filename=str(self._address), errno=errno.EIO)

    def command(self, name: str, cdb: bytes, into: Optional[memoryview] = None, out: Optional[memoryview] = None) -> int:
        """Have the target carry out a command; it fills `into` or gets `out`. Returns the count of bytes that were moved.

        Raises CheckCondition for a refusal, Lost for a connection that broke, Error for an answer that does not come.
        """
        until = monotonic() + self._address.patience
        attentions = 0
        while True:
            try:
                moved = self._once(name, cdb, into, out, until - monotonic())
                if moved is not None:
                    return moved
                sleep(BUSY_PAUSE)
                if monotonic() >= until:
                    raise Error("iSCSI: %s: the target is busy" % name, filename=str(self._address), errno=errno.EBUSY)
            except CheckCondition as exc:
                attentions += 1
                if exc.key != UNIT_ATTENTION or attentions > MAX_ATTENTIONS:
                    raise

    def _once(self, name: str, cdb: bytes, into: Optional[memoryview], out: Optional[memoryview], patience: float) -> Optional[int]:
        """`command`, without another try: None where the target was busy."""
        api = self._api
        if not self._context:
            raise Lost("iSCSI: the session is closed", filename=str(self._address), errno=errno.EIO)
        memory: Any = None
        length = len(into or out or b"")
        direction = lib.READ if into else lib.WRITE if out else lib.NO_TRANSFER
        task = api.scsi_create_task(len(cdb), cdb, direction, length)
        if not task:
            raise Error("iSCSI: %s: out of memory" % name, errno=errno.ENOMEM)
        status: list[int] = []

        def finished(_context: Any, result: int, _task: Any, _private: Any) -> None:
            status.append(result)

        callback = lib.CALLBACK(finished)
        try:
            if into:
                memory = writable(into)
                api.scsi_task_add_data_in_buffer(task, length, addressof(memory))
            elif out:
                memory = readable(out)
                api.scsi_task_add_data_out_buffer(task, length, addressof(memory))
            if api.iscsi_scsi_command_async(self._context, self._address.lun, task, callback, None, None):
                raise self._broken(name, False)
            outcome = self._serve(status, max(patience, 0.0))
            if outcome or status[0] in (lib.CANCELLED, lib.ERROR, lib.TIMEOUT):
                raise self._broken(name, outcome == "late" or bool(status) and status[0] == lib.TIMEOUT)
            return self._judge(name, task.contents, status[0], length)
        finally:
            if not status:  # the library still has the task and the memory
                self._destroy()
            api.scsi_free_scsi_task(task)
            del memory, callback

    def _broken(self, name: str, late: bool) -> Error:
        """The error for a command without an answer. The session is over, since its answer might still come."""
        address = self._address
        if late:
            words = "iSCSI: %s: no answer from %s within %g seconds" % (name, address.portal, address.patience)
            why = Error(words, filename=str(address), errno=errno.ETIMEDOUT)
        else:
            why = self._failure("iSCSI: %s failed: the connection was lost:" % name, Lost)
        self._destroy()
        return why

    def _judge(self, name: str, task: lib.Task, status: int, length: int) -> Optional[int]:
        if status == lib.GOOD:
            missing = int(task.residual) if task.residual_status == 1 else 0
            return max(length - missing, 0)
        if status in (lib.BUSY, lib.TASK_SET_FULL):
            return None
        reason = text(self._api.iscsi_get_error(self._context))
        if status == lib.CHECK_CONDITION:
            raise CheckCondition("iSCSI: %s failed: %s" % (name, reason), int(task.sense.key), int(task.sense.ascq), str(self._address))
        raise Error("iSCSI: %s failed with status %#x: %s" % (name, status, reason), filename=str(self._address), errno=errno.EIO)

    def close(self) -> None:
        """Log out, if there is still somebody to say it to."""
        if self._context and not self.lost:
            status: list[int] = []

            def gone(_context: Any, result: int, _data: Any, _private: Any) -> None:
                status.append(result)

            callback = lib.CALLBACK(gone)
            if not self._api.iscsi_logout_async(self._context, callback, None):
                self._serve(status, LOGOUT_TIME)
            self._destroy()
            del callback

    def _destroy(self) -> None:
        """Free all. Commands under way are called back, as cancelled, before it returns."""
        self.lost = True
        context, self._context = self._context, None
        if context:
            self._api.iscsi_destroy_context(context)
