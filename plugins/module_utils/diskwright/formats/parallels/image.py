# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Parallels, the node of an image: its header, where its clusters are, writing (https://www.qemu.org/docs/master/interop/parallels.html).

A cluster that is freed is not used again before the image is opened anew, so nobody who was told that it holds something reads
what somebody else has written there since.
"""

from __future__ import annotations

import errno

from ...blockmap import BlockFormat, BlockMap
from ...cache import read_padded
from ...errors import Corrupt, Error, Finding, Unsupported, WrongFormat
from ...extent import Extent
from ...node import CHUNK, OpenFlags
from ...ondisk import Struct
from ...options import Options, Size, opt
from ...parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator, Optional

    from diskwright.tally import CheckResult

    from ...bitmaps import BitmapSet
    from ...node import Node
    from ...ondisk import bytes16, u32, u64
    from ...options import NodeRef

SECTOR = 512
MAGIC_OLD = b"WithoutFreeSpace"  # entries count sectors
MAGIC_EXT = b"WithouFreSpacExt"  # entries count clusters
VERSION = 2
IN_USE = 0x746F6E59
HEADS, TRACK = 16, 32  # the geometry of new images
DEFAULT_CLUSTER = 1 << 20  # bytes
MAX_CLUSTER_SECTORS = ((1 << 31) - 1) // (SECTOR + 1)
MAX_ENTRIES = ((1 << 31) - 1) // 4
MAX_LENGTH = (1 << 63) - (1 << 30)  # bytes of a disk or file
MAX_ENTRY = (1 << 32) - 1
WINDOW = 1 << 22  # clusters from the first on among which unused ones are looked for
PREALLOCATION = 128 << 20  # bytes


class Header(Struct):
    """The header, with the names of the specification."""

    ORDER = "<"

    magic: bytes16 = MAGIC_EXT
    version: u32 = VERSION
    heads: u32 = HEADS
    cylinders: u32
    tracks: u32
    nb_bat_entries: u32
    nb_sectors: u64
    in_use: u32 = 0
    data_off: u32
    flags: u32 = 0
    ext_off: u64 = 0


class ParallelsOptions(Options):
    """Runtime options of parallels."""

    file: NodeRef = opt(help="the node that holds the image")
    prealloc_size: Size = opt(PREALLOCATION, help="so many bytes are reserved at a time, if prealloc-mode is given")
    prealloc_mode: Optional[str] = opt(
        None,
        choices=("falloc", "truncate"),
        refusal="invalid parameter value: %s",
        help="how room is reserved in advance when the file grows; it is given back when the image is closed (default: not at all)",
    )


class ParallelsCreateOptions(Options):
    """Creation options of parallels."""

    DASHES = False
    SHOWN = ("cluster_size",)

    size: Size = opt(0, help="size of the disk")
    cluster_size: Size = opt(DEFAULT_CLUSTER, help="bytes of a cluster, rounded up to sectors")


class Parallels(BlockFormat):
    """A Parallels image. `header` is what the file's header says, but for `in_use` while the image is being changed."""

    driver = "parallels"
    options_class = ParallelsOptions
    create_options = ParallelsCreateOptions
    creatable = True
    supports_backing = True  # one that is given when the image is opened: the format itself names none
    dirty = None

    options: ParallelsOptions

    def __init__(self, options: ParallelsOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        head = bytearray(Header.SIZE)
        read_padded(self.file, 0, memoryview(head))
        if self.file.size < Header.SIZE:
            raise WrongFormat("Image not in Parallels format")
        header = self.header = Header.unpack(head)
        self._size = check_header(header)
        self.block_size = header.tracks * SECTOR
        self.unit = self.block_size if header.magic == MAGIC_EXT else SECTOR  # bytes that entries count
        self.step = self.block_size // self.unit  # from an entry to that of the next cluster of the file
        self.blocks = BlockMap(self.file, Header.SIZE, header.nb_bat_entries, "little", self._lock, self._announce)
        self.unclean = header.in_use == IN_USE
        self.table_end = -(-(Header.SIZE + 4 * header.nb_bat_entries) // SECTOR) * SECTOR
        self.data_start, self.data_off_wrong = self._find_start()
        self.end = 0  # of all clusters; only known if the image is open for writing
        self._changing = False  # the file says that it is in use, by us
        self._freed = False
        self._free = bytearray()  # clusters before the end: 1 for those that are not in use
        self._untouched = self.file.size  # what follows was not written by anyone
        self._bitmaps: Optional[BitmapSet] = None
        if header.ext_off:
            self._open_extension()
        if flags.writable:
            self._prepare_to_write()

    def _find_start(self) -> tuple[int, bool]:
        """Where the data area begins, and whether the header says something else, which it must not."""
        ext = self.header.magic == MAGIC_EXT
        least = -(-self.table_end // self.block_size) * self.block_size if ext else self.table_end
        stated = self.header.data_off * SECTOR
        if least <= stated <= self.file_end:
            return stated, False
        return least, bool(stated) or ext

    @property
    def file_end(self) -> int:
        """The length of the file in bytes, in whole sectors."""
        return -(-self.file.size // SECTOR) * SECTOR

    def _open_extension(self) -> None:
        if self.flags.writable:
            self.warnings.append("Format Extension ignored in RW mode")
            return
        self._bitmaps = part(__package__, "extension").read_extension(self)

    def _prepare_to_write(self) -> None:
        """Find the end of the image; repair what must not be written to, as QEMU does whenever it opens one for writing."""
        check = part(__package__, "check").check
        find_end = part(__package__, "check").find_end
        has_duplicates = part(__package__, "check").has_duplicates

        self.end = find_end(self)
        if self.flags.check:
            return
        if self.unclean or self.data_off_wrong or self.end > self.file_end or has_duplicates(self):
            result = check(self, "all")
            self.warnings += [Finding(line) for line in result.messages]
        self.find_room()

    def find_room(self) -> None:
        """Find unused clusters before the end."""
        count = min(WINDOW, max(0, self.end - self.data_start) // self.block_size)
        self._free = self.blocks.unused(self.data_start // self.unit, self.step, 0, count)

    # -- where clusters are --------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        for extent in super()._map(offset, length):
            yield extent if extent.host is not None else Extent(extent.offset, extent.length, 0)

    def _runs(self, first: int, count: int) -> Iterator[tuple[int, int, Optional[int]]]:
        unit = self.unit
        inside = max(0, min(count, self.blocks.count - first))
        for index, length, value, step in self.blocks.runs(first, inside, self.step):
            if not value and not step:
                yield index, length, None
            elif step and value:
                yield index, length, value * unit
            else:  # many entries for one cluster, or an ascending run from 0 on
                for at in range(length):
                    yield index + at, 1, (value + at * step) * unit or None
        if inside < count:
            yield first + inside, count - inside, None

    def _locate(self, index: int) -> Optional[int]:
        if index >= self.blocks.count:
            raise Corrupt("%s: the table has no entry for cluster %d" % (self.filename, index), filename=self.filename)
        place = self.blocks.get(index) * self.unit
        if not place:
            return None
        if place < self.table_end or place + self.block_size > self.end:
            raise self._outside(index, place)
        return place

    def _take(self, index: int) -> int:
        self.begin_change()
        at = self._free.find(1)
        if at >= 0:
            self._free[at] = 0
            place = self.data_start + at * self.block_size
        else:
            place = self.end
            if self.unit != SECTOR:
                place = -(-place // self.unit) * self.unit
            if place // self.unit > MAX_ENTRY:
                raise Error("%s: no room for cluster %d" % (self.filename, index), filename=self.filename, errno=errno.EFBIG)
            self.end = place + self.block_size
            self._reserve()
        if self.backing is None:
            self._prepare(place, self._untouched)
        else:
            self._fill_from_backing(index, place)
        self.blocks.set(index, place // self.unit)
        return place

    def _fill_from_backing(self, index: int, place: int) -> None:
        """Make a new cluster hold what was read there until now."""
        start = index * self.block_size
        for at in range(0, self.block_size, CHUNK):
            piece = bytearray(min(CHUNK, self.block_size - at))
            inside = max(0, min(len(piece), self._size - start - at))
            self.pread_into(start + at, memoryview(piece)[:inside])
            self.file.write_hosted(place + at, memoryview(piece))

    def _reserve(self) -> None:
        """Let the file grow in advance, if that is wanted."""
        mode = self.options.prealloc_mode
        if mode is not None and self.file.size < self.end:
            size = max(-(-self.options.prealloc_size // self.block_size), 1) * self.block_size
            self.file.truncate(self.end - self.block_size + size, "falloc" if mode == "falloc" else "off", exact=False)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        if self.backing is not None:  # what is not here is not zero then
            return offset, 0
        size = self.block_size
        first, last = -(-offset // size), (offset + length) // size
        if offset + length == self._size:
            last = -(-self._size // size)
        if first >= last:
            return super()._zero(offset, length, unmap)
        self._discard(offset, length)
        for low, high in ((offset, first * size), (last * size, offset + length)):
            if low < high:
                super()._zero(low, high - low, unmap)
        return offset, length

    def _discard(self, offset: int, length: int) -> None:
        """Free whole clusters; the rest stays."""
        if self.backing is not None:
            return
        size = self.block_size
        first, last = -(-offset // size), (offset + length) // size
        if offset + length == self._size:
            last = -(-self._size // size)
        for index, count, place in list(self._runs(first, last - first)) if first < last else ():
            if place is None:
                continue
            with self._lock:
                self.begin_change()
                self._freed = True
                for at in range(index, index + count):
                    if self._locate(at) is not None:
                        self.blocks.set(at, 0)
            self.file.pdiscard(place, count * size)

    # -- writing -------------------------------------------------------------------------------------------------

    def begin_change(self) -> None:
        """Mark the image as in use, and drop the format extension: its bitmaps will not be true any more. The lock is held."""
        if not self._changing:
            self._changing = True
            self.header.ext_off = 0
            self._write_header(IN_USE)
            self.file.flush()

    def _write_header(self, in_use: int) -> None:
        self.header.in_use = in_use
        self.file.write_hosted(0, memoryview(self.header.pack()))

    def _announce(self) -> None:
        """Bring all data to the disk, and the file to its length: what comes before the table."""
        if self.file.size < self.end:
            self.file.truncate(self.end, exact=False)
        self.file.flush()

    def _flush(self) -> None:
        with self._lock:
            if self.blocks.changed:
                self._announce()
                self.blocks.write()

    def _close(self) -> None:
        """Cut off what is behind the last cluster, and say that all is well."""
        if not self.flags.writable or not self._changing:
            return
        if self._freed:
            find_end = part(__package__, "check").find_end

            self.end = find_end(self)
        if self.file.size > self.end:
            self.file.truncate(self.end, exact=False)
        self.file.flush()
        self._write_header(0)
        self.file.flush()

    # -- the image -----------------------------------------------------------------------------------------------

    @property
    def stores_bitmaps(self) -> bool:  # type: ignore[override]
        return self.read_only

    def bitmaps(self) -> Optional[BitmapSet]:
        return self._bitmaps

    def format_specific(self) -> Optional[dict[str, Any]]:
        if self._bitmaps is None or not self._bitmaps.all:
            return None
        return {"bitmaps": [{"name": bitmap.name, "granularity": bitmap.granularity} for bitmap in self._bitmaps]}

    def _check(self, repair: str) -> CheckResult:
        check = part(__package__, "check").check

        found: CheckResult = check(self, repair)
        return found

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        known = head[:16] in (MAGIC_OLD, MAGIC_EXT)
        return 100 if known and int.from_bytes(head[16:20], "little") == VERSION else 0

    @classmethod
    def check_creation(cls, options: Any) -> None:
        _layout(options)

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        size, cluster, entries, start = _layout(options)
        sectors = size // SECTOR
        header = Header(
            cylinders=sectors // HEADS // TRACK & 0xFFFFFFFF,
            tracks=cluster // SECTOR,
            nb_bat_entries=entries,
            nb_sectors=sectors,
            data_off=start // SECTOR,
        )
        file.truncate(start, exact=False)
        for position in range(0, start, CHUNK):
            file.pwrite_zeroes(position, min(CHUNK, start - position))
        file.write_hosted(0, memoryview(header.pack()))


def check_header(header: Header) -> int:
    """The size of the disk in bytes. Raises WrongFormat, Corrupt or Unsupported for a header that is not right."""
    if header.magic not in (MAGIC_OLD, MAGIC_EXT) or header.version != VERSION:
        raise WrongFormat("Image not in Parallels format")
    if not header.tracks:
        raise Corrupt("Invalid image: Zero sectors per track")
    if header.tracks > MAX_CLUSTER_SECTORS:
        raise Unsupported("Invalid image: Too big cluster")
    if header.nb_bat_entries > MAX_ENTRIES:
        raise Unsupported("Catalog too large")
    if header.ext_off > MAX_LENGTH // SECTOR:
        raise Corrupt("Invalid image: Too big offset")
    size = (header.nb_sectors if header.magic == MAGIC_EXT else header.nb_sectors & 0xFFFFFFFF) * SECTOR
    if size > MAX_LENGTH:
        raise Unsupported("Could not refresh total sector count: File too large")
    return size


def _layout(options: Any) -> tuple[int, int, int, int]:
    """Of a new image: the size of the disk and of a cluster, the entries of the table, and where data begins. Raises Error."""
    size = -(-options.size // SECTOR) * SECTOR
    cluster = -(-options.cluster_size // SECTOR) * SECTOR
    if cluster > MAX_CLUSTER_SECTORS * SECTOR:
        raise Error("Cluster size is too large")
    if size >= cluster << 32:
        raise Error("Image size is too large for this cluster size")
    entries = -(-size // cluster)
    if entries > MAX_ENTRIES:
        raise Error("File too large", errno=errno.EFBIG)
    return size, cluster, entries, -(-(Header.SIZE + 4 * entries) // cluster) * cluster
