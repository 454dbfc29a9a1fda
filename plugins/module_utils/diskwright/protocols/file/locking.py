# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Image locking: the byte range locks by which QEMU and Diskwright keep off one another's images.

Open file description locks of one byte each (https://www.gnu.org/software/libc/manual/html_node/Open-File-Description-Locks.html),
all of them shared: byte 100 + i says "permission i is in use here", byte 200 + i "permission i is not shared by me". The
bytes lie beyond the end of a small file without harm.
"""

from __future__ import annotations

import errno
import fcntl
import os
from struct import pack, unpack

from ...errors import Error, Locked, Unsupported
from ...node import ALL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

IN_USE = 100
NOT_SHARED = 200
NAMES = ("consistent read", "write", "write unchanged", "resize")

# The constants of Linux, for Pythons that were built without them.
_GETLK = getattr(fcntl, "F_OFD_GETLK", 36)
_SETLK = getattr(fcntl, "F_OFD_SETLK", 37)
_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length, pid

# What a host answers that knows no such locks, or whose file system (NFS without a lock daemon, some FUSE) does not.
_NO_LOCKS = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY)


class ImageLock:
    """The locks that one open image holds. `mode` is the option `locking`: "auto" goes without locks where the host
    has none, "on" fails there, "off" never locks."""

    __slots__ = ("filename", "mode", "held")

    def __init__(self, filename: str, mode: str) -> None:
        self.filename = filename
        self.mode = mode
        self.held: frozenset[int] = frozenset()

    def change(self, fd: int, perm: int, shared: int) -> None:
        """Hold the bytes of `perm` and of what is not in `shared`, and no others.

        New bytes are taken before old ones are dropped. Raises Locked, and changes nothing then, if another open image
        does not tolerate it or does what is not shared here.
        """
        if self.mode == "off":
            return
        wanted = bytes_held(perm, shared)
        new = sorted(wanted - self.held)
        taken = []
        try:
            for byte in new:
                if not self._set(fd, fcntl.F_RDLCK, byte):
                    return
                taken.append(byte)
            self._examine(fd, perm, shared)
        except BaseException:
            for byte in taken:
                self._set(fd, fcntl.F_UNLCK, byte)
            raise
        for byte in sorted(self.held - wanted):
            self._set(fd, fcntl.F_UNLCK, byte)
        self.held = wanted

    def move(self, fd: int) -> None:
        """Hold on another descriptor of the same file what is held now; the old one may be closed afterwards."""
        for byte in sorted(self.held):
            self._set(fd, fcntl.F_RDLCK, byte)

    def _set(self, fd: int, kind: int, byte: int) -> bool:
        """Lock or unlock one byte; False where there are no locks and none are insisted on."""
        try:
            fcntl.fcntl(fd, _SETLK, pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
        except OSError as exc:
            if exc.errno in _NO_LOCKS:
                if self.mode == "on":
                    raise Unsupported("Failed to lock byte %d: %s" % (byte, exc.strerror), filename=self.filename, errno=exc.errno) from exc
                self.mode = "off"
                return False
            raise _locked("Failed to lock byte %d" % byte, self.filename, fd, byte, asks=False) from exc
        return True

    def _examine(self, fd: int, perm: int, shared: int) -> None:
        for i, name in enumerate(NAMES):
            if perm >> i & 1 and _taken(fd, NOT_SHARED + i):
                raise _locked('Failed to get "%s" lock' % name, self.filename, fd, NOT_SHARED + i)
        for i, name in enumerate(NAMES):
            if not shared >> i & 1 and _taken(fd, IN_USE + i):
                raise _locked('Failed to get shared "%s" lock' % name, self.filename, fd, IN_USE + i)


def bytes_held(perm: int, shared: int) -> frozenset[int]:
    """The bytes that whoever has the permissions `perm` and lets others have `shared` holds."""
    used = {IN_USE + i for i in range(len(NAMES)) if perm >> i & 1}
    return frozenset(used | {NOT_SHARED + i for i in range(len(NAMES)) if (ALL & ~shared) >> i & 1})


def _taken(fd: int, byte: int) -> bool:
    """Whether another open file description holds a lock on `byte`."""
    answer = fcntl.fcntl(fd, _GETLK, pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def _locked(message: str, filename: str, fd: int, byte: int, asks: bool = True) -> Error:
    hint = "Is another process using the image [%s]?" % filename if asks else None
    exc = Locked(message, filename=filename, errno=errno.EAGAIN, hint=hint)
    status = os.fstat(fd)
    exc.search = lambda: holder((status.st_dev, status.st_ino), byte, fd)
    place = byte - NOT_SHARED if byte >= NOT_SHARED else byte - IN_USE
    exc.permission = ("does not share" if byte >= NOT_SHARED else "uses", NAMES[place])
    return exc


def holder(file: tuple[int, int], byte: int, own: int = -1) -> Optional[str]:
    """Who holds a lock on `byte` of the file with this device and inode, as "name (process 123)"; None where that cannot
    be told. `own` is a descriptor of this process that does not count.

    Linux shows the locks of each descriptor in /proc/PID/fdinfo (https://docs.kernel.org/filesystems/proc.html), to its
    owner and to root.
    """
    try:
        processes = [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return None
    for process in processes:
        try:
            descriptors = os.listdir("/proc/%s/fd" % process)
        except OSError:
            continue
        for descriptor in descriptors:
            if int(process) == os.getpid() and int(descriptor) == own:
                continue
            try:
                other = os.stat("/proc/%s/fd/%s" % (process, descriptor))
                if (other.st_dev, other.st_ino) == file and _holds(process, descriptor, byte):
                    with open("/proc/%s/comm" % process, encoding="utf-8", errors="replace") as comm:
                        return "%s (process %s)" % (comm.read().strip(), process)
            except OSError:
                continue
    return _in_table(file, byte)


def _in_table(file: tuple[int, int], byte: int) -> Optional[str]:
    """The same by the table of all locks, which names the owners of POSIX locks only, and shows everybody that there is one."""
    place = "%02x:%02x:%d" % (os.major(file[0]), os.minor(file[0]), file[1])
    try:
        with open("/proc/locks", encoding="utf-8") as table:
            rows = [line.split() for line in table]
    except OSError:
        return None
    for words in rows:  # "1: OFDLCK ADVISORY READ -1 fe:00:12 100 101"
        if "->" in words or len(words) < 8 or words[5] != place:
            continue
        if int(words[6]) <= byte and (words[7] == "EOF" or byte <= int(words[7])):
            process = words[4]
            try:
                with open("/proc/%s/comm" % process, encoding="utf-8", errors="replace") as comm:
                    return "%s (process %s)" % (comm.read().strip(), process)
            except OSError:
                return "a process of another user"
    return None


def _holds(process: str, descriptor: str, byte: int) -> bool:
    """Whether the descriptor's fdinfo shows a lock that covers `byte`: "lock: 1: OFDLCK ADVISORY READ -1 fe:00:12 100 101"."""
    with open("/proc/%s/fdinfo/%s" % (process, descriptor), encoding="utf-8") as info:
        for line in info:
            words = line.split()
            if len(words) < 9 or words[0] != "lock:":
                continue
            if int(words[7]) <= byte and (words[8] == "EOF" or byte <= int(words[8])):
                return True
    return False
