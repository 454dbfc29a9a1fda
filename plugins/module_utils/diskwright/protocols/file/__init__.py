# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""file: a regular file of the host (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, BlockdevOptionsFile)."""

from __future__ import annotations

import errno
import os
import stat
from _thread import allocate_lock

from ...errors import Error, OptionError
from ...extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from ...node import ALL, MAX_SIZE, Alloc, OpenFlags, Protocol, fill_zeroes
from ...options import Options, Size, opt
from ...parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Iterable, Optional

    from .locking import ImageLock

STORED = DATA | OFFSET_VALID | ALLOCATED
HOLE = ZERO | OFFSET_VALID | ALLOCATED
_UNKNOWN = (0, 0, STORED)

BAD_VALUE = "invalid parameter value: %s"


class FileOptions(Options):
    """Runtime options of file and host_device."""

    filename: str = opt("", help="path of the file")
    aio: str = opt("threads", choices=("threads", "native", "io_uring"), refusal=BAD_VALUE, help="how QEMU would issue requests; only bench makes a difference")
    aio_max_batch: int = opt(0, help="how many requests QEMU would submit at once; no difference here")
    locking: str = opt("auto", choices=("auto", "on", "off"), refusal=BAD_VALUE, help="lock the image; auto: where the host can")
    pr_manager: Optional[str] = opt(None, help="id of the object that makes persistent reservations")
    drop_cache: bool = opt(True, help="drop the host's page cache where QEMU hands the image over; no difference here")
    x_check_cache_dropped: bool = opt(False, help="check that the host's page cache was dropped; no difference here")


class FileCreateOptions(Options):
    """Creation options of file."""

    DASHES = False

    size: Size = opt(0, help="Virtual disk size")
    nocow: bool = opt(False, help="No copy-on-write for the file (btrfs)")
    preallocation: str = opt(
        "off",
        choices=("off", "metadata", "falloc", "full"),
        refusal=BAD_VALUE,
        help="Preallocation mode (allowed values: off, falloc, full)",
    )
    extent_size_hint: Size = opt(1 << 20, help="Extents of at least this size for the file (XFS), 0 for the file system's own choice")


class File(Protocol):
    """A regular file."""

    driver = "file"
    options_class = FileOptions
    create_options: ClassVar[type[Options]] = FileCreateOptions
    creatable = True
    growable = True
    zero_initialized = True

    def __init__(self, options: FileOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self._name = options.filename
        self._lock_mode = options.locking
        self._image_lock: Optional[ImageLock] = None
        self._known = _UNKNOWN  # the last answer about holes: start, end, status
        self._next_data = -1  # where data was found to begin after the last hole
        self._has_holes = True  # False once the file system said that it cannot tell
        self._flush_error: Optional[OSError] = None
        self._length = 0  # direct I/O only: the size, without padding under way
        self._growing = allocate_lock()  # direct I/O only: held by writes that may touch the end
        if not self._name:
            raise OptionError("The '%s' block driver requires a file name" % self.driver)
        if options.pr_manager is not None:
            raise OptionError("No persistent reservation manager with id '%s'" % options.pr_manager)
        self._fd = -1
        try:
            self._fd = self._open(self._name)
            if options.aio == "native" and not flags.direct:
                raise OptionError("aio=native was specified, but it requires cache.direct=on, which was not specified.")
            self._examine()
            self._permit(*flags.permissions())
        except BaseException:
            self._release_host()
            raise

    # -- opening -------------------------------------------------------------------------------------------------

    def _open(self, path: str) -> int:
        """A descriptor as flags want it. Raises Error in QEMU's words."""
        mode = (os.O_RDWR if self.flags.writable else os.O_RDONLY) | os.O_NONBLOCK | os.O_NOCTTY
        if self.flags.direct:
            mode |= getattr(os, "O_DIRECT", 0)
        try:
            fd = os.open(path, mode)  # nonblocking, or a FIFO would keep us here
            os.set_blocking(fd, True)
            return fd
        except (OSError, ValueError) as exc:
            code = getattr(exc, "errno", None) or errno.ENOENT
            text = "Could not open '%s': %s" % (self._name, os.strerror(code))
            if code == errno.EINVAL and self.flags.direct:
                text = "Could not open '%s': filesystem does not support O_DIRECT" % self._name
            raise Error(text, filename=self._name, errno=code) from exc

    def _examine(self) -> None:
        """Look at what was opened. Raises Error where it is not this driver's."""
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise Error("'%s' driver requires '%s' to be a regular file" % (self.driver, self._name), filename=self._name, errno=errno.EINVAL)
        if self.flags.direct:
            request_alignment = part(__package__, "direct").request_alignment

            self._length = status.st_size
            self.request_alignment = request_alignment(self._fd)
        else:
            self.request_alignment = 1

    def _permit(self, perm: int, shared: int) -> None:
        """Take the permissions `perm` and deny others what is not `shared`. Raises Error (Locked) where others object."""
        if self._image_lock is None:
            if not perm and shared == ALL or self._lock_mode == "off":
                return
            from .locking import ImageLock

            self._image_lock = ImageLock(self._name, self._lock_mode)
        self._image_lock.change(self._fd, perm, shared)

    def change_flags(self, flags: OpenFlags) -> None:
        """Take other permissions, and another descriptor where they need one. Raises Locked or Error, nothing being
        changed then."""
        old = self.flags
        self._permit(*flags.permissions())
        try:
            self.flags = flags
            if (flags.writable, flags.direct) != (old.writable, old.direct):
                self._reopen()
        except BaseException:
            self.flags = old
            self._permit(*old.permissions())
            raise

    def _reopen(self) -> None:
        fd = self._open("/proc/self/fd/%d" % self._fd)  # the same file, whatever its name is now
        try:
            if self._image_lock is not None:
                self._image_lock.move(fd)
        except BaseException:
            os.close(fd)
            raise
        old, self._fd = self._fd, fd
        os.close(old)
        self._examine()

    def _release_host(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size if self.request_alignment == 1 else self._length

    def fileno(self) -> int:
        return self._fd

    def format_specific(self) -> Optional[dict[str, Any]]:
        from .attributes import extent_size_hint

        hint = extent_size_hint(self._fd)
        return {"extent-size-hint": hint} if hint else {}

    # -- holes ---------------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        end = offset + length
        while offset < end:
            start, stop, status = self._region(offset)
            yield Extent(start, stop - start, status, self, start)
            offset = stop

    def _region(self, offset: int) -> tuple[int, int, int]:
        """(start, end, status) of the run around `offset`.

        Data is remembered until this node changes it; a hole only where this node does not write, since parents write
        through `fileno()` too.
        """
        known = self._known
        if known[0] <= offset < known[1]:
            return known
        found = self._seek(offset)
        if found[2] == STORED or not self.flags.writable:
            self._known = found
        return found

    def _seek(self, offset: int) -> tuple[int, int, int]:
        if not self._has_holes:
            size = self.size
            return (0, size, STORED) if offset < size else (size, MAX_SIZE, HOLE)
        try:
            if offset != self._next_data:
                data = os.lseek(self._fd, offset, os.SEEK_DATA)
                if data > offset:
                    self._next_data = data
                    return offset, data, HOLE
            hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # no data after offset
                return offset, MAX_SIZE, HOLE
            if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY):
                raise
            self._has_holes = False
            return self._seek(offset)
        if hole > offset:
            return offset, hole, STORED
        if offset == self._next_data:  # it was data when we were told so
            self._next_data = -1
            return self._seek(offset)
        return offset, MAX_SIZE, HOLE  # cut short between the two calls

    def _forget(self) -> None:
        self._known = _UNKNOWN
        self._next_data = -1

    # -- data ----------------------------------------------------------------------------------------------------

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        done = os.preadv(self._fd, (view,), host_offset)
        while done < len(view):
            # direct I/O ends at the end of the file with a count that is no multiple of the alignment
            count = 0 if done % self.request_alignment else os.preadv(self._fd, (view[done:],), host_offset + done)
            if not count:
                fill_zeroes(view[done:])
                return
            done += count

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        done = os.pwrite(self._fd, view, host_offset)
        if done < len(view):
            write_all = part(__package__, "preallocate").write_all

            write_all(self._fd, view[done:], host_offset + done)

    def write_own(self, host_offset: int, view: memoryview) -> None:
        """See Node.write_own. Direct writes that touch the end go one at a time: padding is cut off again afterwards."""
        if self.request_alignment == 1 or self._padded(host_offset + len(view)) <= self._length:
            super().write_own(host_offset, view)
            return
        with self._growing:
            super().write_own(host_offset, view)

    def _padded(self, end: int) -> int:
        return -(-end // self.request_alignment) * self.request_alignment

    def _trim(self, end: int) -> None:
        if self._padded(end) > self._length:
            length = max(self._length, end)
            if os.fstat(self._fd).st_size > length:
                os.ftruncate(self._fd, length)
            self._length = length

    def _grow(self, end: int) -> None:
        """Make the file end at `end` or later, without touching what others may have written meanwhile."""
        if self.request_alignment == 1:
            if end > self.size:
                os.pwrite(self._fd, b"\0", end - 1)
            return
        with self._growing:
            if end > self._length:
                os.ftruncate(self._fd, end)
                self._length = end

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        punch_hole = part(__package__, "preallocate").punch_hole
        zero_range = part(__package__, "preallocate").zero_range

        self._forget()
        end = offset + length
        if unmap and self.flags.unmap and punch_hole(self._fd, offset, length):
            self._grow(end)
            return offset, length
        if end > self.size:
            self._grow(end)
        return offset, length if zero_range(self._fd, offset, length) else 0

    def _discard(self, offset: int, length: int) -> None:
        punch_hole = part(__package__, "preallocate").punch_hole

        length = min(length, self.size - offset)
        if self.flags.unmap and length > 0:
            self._forget()
            punch_hole(self._fd, offset, length)

    def _flush(self) -> None:
        if self.flags.no_flush:
            return
        if self._flush_error is not None:
            # the kernel reports a failed write-back once and then forgets the pages: nothing here is certain any more
            raise OSError(self._flush_error.errno, self._flush_error.strerror)
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # a file system without
                self._flush_error = exc
                raise

    def _truncate(self, size: int, preallocation: str) -> None:
        resize = part(__package__, "preallocate").resize

        self._forget()
        if self.request_alignment == 1:
            resize(self._fd, self.size, size, preallocation)
            return
        old = self._length
        self._length = max(old, size)  # so that writes of zeroes are not taken for writes that grow the file
        try:
            resize(self._fd, old, size, preallocation, self.write_own)
            self._length = size
        except BaseException:
            self._length = old
            raise

    # -- names and creation --------------------------------------------------------------------------------------

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        return {"filename": filename[len(cls.driver) + 1 :]}

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        """Create or empty the file, under the locks that `flags` ask for, taken first. Raises Error in QEMU's words."""
        from .attributes import set_extent_size_hint, set_nocow
        from .locking import ImageLock

        resize = part(__package__, "preallocate").resize
        try:
            fd = os.open(filename, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY, 0o644)
        except (OSError, ValueError) as exc:
            code = getattr(exc, "errno", None) or errno.ENOENT
            raise Error("Could not create '%s': %s" % (filename, os.strerror(code)), filename=filename, errno=code) from exc
        try:
            os.set_blocking(fd, True)
            ImageLock(filename, "auto").change(fd, *flags.permissions())
            resize(fd, os.fstat(fd).st_size, 0, "off")
            if options.nocow:
                set_nocow(fd)
            set_extent_size_hint(fd, options.extent_size_hint)
            resize(fd, 0, options.size, options.preallocation)
        finally:
            os.close(fd)
