# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""gluster: a file of a GlusterFS volume, without mounting it, through libgfapi (https://docs.gluster.org, BlockdevOptionsGluster of
https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html)."""

from __future__ import annotations

import errno
import os

from ...errors import Error, OptionError
from ...extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from ...node import MAX_SIZE, Alloc, OpenFlags, Protocol, fill_zeroes
from ...options import Options, Size, opt
from ..numbered import StrongKeys, member, take
from . import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Iterable, Mapping, NoReturn, Optional, Sequence

    from typing_extensions import Self

    ServerList = Sequence[Mapping[str, str]]

MAX_TRANSFER = 1 << 20  # bytes of one request
MAX_DEBUG = 9
MODE = 0o600  # of a new file, as QEMU makes it
SEEK_DATA, SEEK_HOLE = 3, 4

STORED = DATA | OFFSET_VALID | ALLOCATED
HOLE = ZERO | OFFSET_VALID | ALLOCATED

DEPRECATED = "'gluster' is deprecated"


class GlusterOptions(Options):
    """Runtime options of gluster: `filename`, or `volume`, `path` and `server`."""

    filename: str = opt("", hidden=True, help="name of the file, gluster://...")
    volume: Optional[str] = opt(None, help="name of the volume")
    path: Optional[str] = opt(None, help="path of the file in the volume")
    server: Optional[ServerList] = opt(None, help="servers to get the volume's description from: type (inet, unix) and host and port, or path")
    debug: int = opt(4, help="how much the library logs, 0 to 9")
    logfile: str = opt("-", help="file that the library logs to; -: standard error")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], unknown: str = "Invalid parameter '%s'") -> Self:
        rest, members = take(values, "server")
        record = super().from_mapping(rest, unknown=unknown)
        record.server = [_server(given, number) for number, given in enumerate(members)] or None
        return record


def _server(given: Any, number: int) -> dict[str, str]:
    hint = "hint: check in 'server' array index '%d'" % number
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in ("inet", "tcp", "unix"):
        raise OptionError("Parameter 'type' may be 'inet' or 'unix'", hint=hint)
    keys = ("type", "path") if kind == "unix" else ("type", "host", "port")
    for key in keys:
        if key not in given:
            raise OptionError("Parameter '%s' is missing" % key, hint=hint)
    return member(given, "server.%d" % number, keys)


class GlusterCreateOptions(Options):
    """Creation options of gluster."""

    DASHES = False

    size: Size = opt(0, help="Virtual disk size")
    preallocation: str = opt(
        "off",
        choices=("off", "metadata", "falloc", "full"),
        refusal="invalid parameter value: %s",
        help="Preallocation mode (allowed values: off, falloc, full)",
    )
    debug: int = opt(4, help="Gluster log level, valid range is 0-9")
    logfile: str = opt("-", help="Logfile path of libgfapi")


class Gluster(Protocol):
    """A file of a volume."""

    driver = "gluster"
    options_class = GlusterOptions
    strong_options = StrongKeys(("volume", "path", "server"))
    create_options: ClassVar[type[Options]] = GlusterCreateOptions
    creatable = True
    growable = True
    zero_initialized = True
    dirty = None

    def __init__(self, options: GlusterOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self.warnings.append(DEPRECATED)
        self._volume = Volume(options)
        self._has_holes = True
        self._fd: Any = None
        try:
            self._fd = self._open(flags)
            self._size, self._used = self._stat()
        except BaseException:
            self._release_host()
            raise

    def _open(self, flags: OpenFlags) -> Any:
        mode = (os.O_RDWR if flags.writable else os.O_RDONLY) | (getattr(os, "O_DIRECT", 0) if flags.direct else 0)
        found = self._volume.api.glfs_open(self._volume.context, os.fsencode(self._volume.path), mode)
        if not found:
            self._fail("Could not open '%s'" % (self.options_name() or self._volume.path))
        return found

    def _fail(self, what: str) -> NoReturn:
        self._volume.fail(what)

    def _stat(self) -> tuple[int, int]:
        from ctypes import byref

        from .library import Stat

        found = Stat()
        if self._volume.api.glfs_fstat(self._fd, byref(found)):
            self._fail("Could not stat '%s'" % self._volume.path)
        if not 0 <= found.st_size <= MAX_SIZE:
            raise Error("%s: a file of %d bytes" % (self._volume.path, found.st_size), errno=errno.EFBIG)
        return int(found.st_size), int(found.st_blocks) * 512

    def _changed_flags(self, old: OpenFlags) -> None:
        if (self.flags.writable, self.flags.direct) != (old.writable, old.direct):
            previous, self._fd = self._fd, self._open(self.flags)
            self._volume.api.glfs_close(previous)

    def _release_host(self) -> None:
        fd, self._fd = self._fd, None
        if fd:
            self._volume.api.glfs_close(fd)
        self._volume.close()

    def disk_size(self) -> int:
        return self._stat()[1]

    def options_name(self) -> str:
        return str(getattr(self.options, "filename", ""))

    # -- data ----------------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        end = offset + length
        while offset < end:
            start, stop, status = self._region(offset)
            yield Extent(start, stop - start, status, self, start)
            offset = stop

    def _region(self, offset: int) -> tuple[int, int, int]:
        """(start, end, status) of the run at `offset`."""
        from ctypes import get_errno

        if offset >= self._size:
            return offset, MAX_SIZE, HOLE
        if self._has_holes:
            seek = self._volume.api.glfs_lseek
            data = seek(self._fd, offset, SEEK_DATA)
            if data > offset:
                return offset, min(data, self._size), HOLE
            if data == offset:
                hole = seek(self._fd, offset, SEEK_HOLE)
                if hole > offset:
                    return offset, min(hole, self._size), STORED
            elif data < 0 and get_errno() == errno.ENXIO:  # no data after offset
                return offset, self._size, HOLE
            self._has_holes = False  # it cannot tell
        return offset, self._size, STORED

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        from ctypes import addressof

        from ..clibrary import writable

        done = 0
        while done < len(view):
            part = view[done : done + MAX_TRANSFER]
            memory = writable(part)
            count = self._volume.api.glfs_pread(self._fd, addressof(memory), len(part), host_offset + done, 0, None)
            if count < 0 or count > len(part):
                self._fail("%s: read failed" % self.filename)
            if not count:
                fill_zeroes(view[done:])
                return
            done += count

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        from ctypes import addressof

        from ..clibrary import readable

        done = 0
        while done < len(view):
            part = view[done : done + MAX_TRANSFER]
            memory = readable(part)
            count = self._volume.api.glfs_pwrite(self._fd, addressof(memory), len(part), host_offset + done, 0, None, None)
            if not 0 < count <= len(part):
                self._fail("%s: write failed" % self.filename)
            done += count
        self._grown(host_offset + len(view))

    def _grown(self, end: int) -> None:
        with self._lock:
            self._size = max(self._size, end)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        if self._volume.api.glfs_zerofill(self._fd, offset, length):
            return offset, 0
        self._grown(offset + length)
        return offset, length

    def _discard(self, offset: int, length: int) -> None:
        length = min(length, self._size - offset)
        if self.flags.unmap and length > 0:
            self._volume.api.glfs_discard(self._fd, offset, length)  # a volume that cannot is none the worse

    def _flush(self) -> None:
        if not self.flags.no_flush and self._volume.api.glfs_fsync(self._fd, None, None):
            self._fail("%s: fsync failed" % self.filename)

    def _truncate(self, size: int, preallocation: str) -> None:
        _resize(self._volume, self._fd, self._size, size, preallocation)
        self._size = size

    # -- names and creation --------------------------------------------------------------------------------------

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        return {"filename": filename}

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        """Create or empty the file, and give it its size. Raises Error in QEMU's words."""
        given = {"filename": filename, "debug": options.debug, "logfile": options.logfile}
        volume = Volume(cls.options_class.from_mapping(given))
        try:
            file = volume.api.glfs_creat(volume.context, os.fsencode(volume.path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, MODE)
            if not file:
                volume.fail("Could not create '%s'" % filename)
            try:
                _resize(volume, file, 0, options.size, options.preallocation)
            finally:
                volume.api.glfs_close(file)
        finally:
            volume.close()


def _resize(volume: Volume, file: Any, old: int, size: int, preallocation: str) -> None:
    if preallocation not in ("off", "falloc", "full"):
        raise OptionError("Unsupported preallocation mode '%s'" % preallocation, errno=errno.ENOTSUP)
    if preallocation != "off" and size < old:
        raise Error("Preallocation can't be used for shrinking files", errno=errno.ENOTSUP)
    if preallocation == "falloc" and size > old:
        if volume.api.glfs_fallocate(file, 0, old, size - old):
            volume.fail("Could not preallocate data")
        return
    if volume.api.glfs_ftruncate(file, size, None, None):
        volume.fail("Could not resize file")
    if preallocation == "full" and size > old and volume.api.glfs_zerofill(file, old, size - old):
        volume.fail("Could not zerofill the new area")


class Volume:
    """A connection to a volume, which several threads may use."""

    def __init__(self, options: Any) -> None:
        """Connect. Raises OptionError, Error in QEMU's words."""
        if options.filename:
            self.name, self.path, self.servers = names.parse(options.filename)
        else:
            for key in ("server", "volume", "path"):
                if getattr(options, key) is None:
                    raise OptionError("Parameter '%s' is missing" % key)
            self.name, self.path, self.servers = options.volume, options.path, options.server
        texts = [self.name, self.path, options.logfile] + [text for server in self.servers for text in server.values()]
        if any("\0" in text for text in texts):
            raise OptionError("gluster: a name with a NUL byte")
        from .library import libgfapi

        self.api = libgfapi()
        self.context = self.api.glfs_new(os.fsencode(self.name))
        if not self.context:
            self.fail("Gluster connection for volume %s, path %s failed to connect" % (self.name, self.path))
        try:
            self._connect(options)
        except BaseException:
            self.close()
            raise

    def _connect(self, options: Any) -> None:
        tried = []
        for server in self.servers:
            if server["type"] == "unix":
                found = self.api.glfs_set_volfile_server(self.context, b"unix", os.fsencode(server["path"]), 0)
                tried.append("hint: failed on socket %s " % server["path"])
            else:
                if not server["port"].isdecimal() or not 0 < int(server["port"]) < 1 << 16:
                    raise OptionError("'%s' is not a valid port number" % server["port"])
                found = self.api.glfs_set_volfile_server(self.context, b"tcp", os.fsencode(server["host"]), int(server["port"]))
                tried.append("hint: failed on host %s and port %s " % (server["host"], server["port"]))
            if found:
                self.fail("Gluster: could not use the server %s" % server)
        level = min(options.debug, MAX_DEBUG)
        if self.api.glfs_set_logging(self.context, os.fsencode(options.logfile), level):
            self.fail("Gluster: could not log to '%s'" % options.logfile)
        if self.api.glfs_init(self.context):
            text = "Gluster connection for volume %s, path %s failed to connect" % (self.name, self.path)
            raise Error(text, errno=errno.ECONNREFUSED, hint="\n".join(tried) + "Please refer to gluster logs for more info")

    def fail(self, what: str) -> NoReturn:
        """Raise the Error for the call that has just failed."""
        from ctypes import get_errno

        number = get_errno() or errno.EIO
        raise Error("%s: %s" % (what, os.strerror(number)), filename=self.path, errno=number)

    def close(self) -> None:
        """Give the connection back."""
        context, self.context = self.context, None
        if context:
            self.api.glfs_fini(context)
