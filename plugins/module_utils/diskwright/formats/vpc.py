# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""vpc: VHD images of Virtual PC, Hyper-V and others (https://learn.microsoft.com/windows/win32/vstor/about-vhd).

A fixed image is the disk and a footer of 512 bytes. A dynamic one has a copy of the footer in front, a header, a table with the
place of each block, blocks (a bitmap of their sectors, then the data) and the footer. A differencing image is a dynamic one
with a parent, which has what the bitmaps say is not here; it is read only.
"""

from __future__ import annotations

import os

from ..blockmap import STORED, BlockFormat, BlockMap
from ..cache import read_padded
from ..errors import Corrupt, Error, Unsupported, WrongFormat
from ..extent import RECURSE, Extent
from ..node import CHUNK, Alloc, OpenFlags, Reference
from ..ondisk import Struct
from ..options import Options, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator, Optional

    from ..node import Node
    from ..ondisk import bytes4, bytes8, bytes16, bytes192, bytes256, bytes427, bytes512, u8, u16, u32, u64
    from ..options import NodeRef

SECTOR = 512
BLOCK = 2 << 20  # bytes of a block in a new image
COOKIE = b"conectix"
HEADER_COOKIE = b"cxsparse"
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
FREE = 0xFFFFFFFF  # an entry of the table: there is no such block
NOWHERE = (1 << 64) - 1
MAX_SECTORS = 0xFF000000  # 2040 GiB
MAX_CHS = 65535 * 16 * 255  # sectors; whoever writes this geometry means the size
MAX_ENTRIES = ((1 << 31) - 1) // 4
MAX_OFFSET = (1 << 63) - 1
EPOCH = 946684800  # 2000-01-01 in seconds since 1970
EFBIG = 27
BY_GEOMETRY = (b"vpc ", b"qemu")  # programs that mean the geometry where it contradicts the size


class Footer(Struct):
    """The footer, with the names of the specification."""

    cookie: bytes8 = COOKIE
    features: u32 = 2
    file_format_version: u32 = 0x00010000
    data_offset: u64
    time_stamp: u32
    creator_application: bytes4
    creator_version: u32 = 0x00050003
    creator_host_os: bytes4 = b"Wi2k"
    original_size: u64
    current_size: u64
    cylinders: u16
    heads: u8
    sectors_per_track: u8
    disk_type: u32
    checksum: u32 = 0
    unique_id: bytes16
    saved_state: u8 = 0
    reserved: bytes427 = b""


class Header(Struct):
    """The header of a dynamic image."""

    cookie: bytes8 = HEADER_COOKIE
    data_offset: u64 = NOWHERE
    table_offset: u64
    header_version: u32 = 0x00010000
    max_table_entries: u32
    block_size: u32 = BLOCK
    checksum: u32 = 0
    parent_unique_id: bytes16 = b""
    parent_time_stamp: u32 = 0
    reserved: u32 = 0
    parent_unicode_name: bytes512 = b""
    parent_locators: bytes192 = b""
    reserved2: bytes256 = b""


class VpcOptions(Options):
    """Runtime options of vpc."""

    file: NodeRef = opt(help="the node that holds the image")
    force_size_calc: Optional[str] = opt(
        None,
        key="force_size_calc",
        choices=("chs", "current_size"),
        refusal="Invalid size calculation mode: '%s'",
        help="whether the geometry or the size in the footer says how large the disk is",
    )


class VpcCreateOptions(Options):
    """Creation options of vpc."""

    DASHES = False

    size: Size = opt(0, help="size of the disk")
    subformat: str = opt("dynamic", choices=("dynamic", "fixed"), help="whether the file grows (dynamic, the default) or has its full size at once (fixed)")
    force_size: bool = opt(False, help="make the disk exactly as large as asked for, not as large as the next geometry")


class Vpc(BlockFormat):
    """A VHD image."""

    driver = "vpc"
    options_class = VpcOptions
    create_options = VpcCreateOptions
    creatable = True
    strong_options = ("force_size_calc",)

    def __init__(self, options: VpcOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        name = self.file.filename
        footer, in_front = read_footer(self.file)
        self.footer = footer
        sectors = disk_sectors(footer, options.force_size_calc)
        if sectors > MAX_SECTORS:
            raise Error("Could not open '%s': %s" % (name, os.strerror(EFBIG)), filename=name, errno=EFBIG)
        self._size = sectors * SECTOR
        self.fixed = footer.disk_type == FIXED
        self._end = -(-self.file.size // SECTOR) * SECTOR  # of what the image may use; the footer of a fixed one apart
        if in_front:
            header = self.header = read_header(self.file, footer, self._size)
            self.block_size = header.block_size
            self._bitmap_size = -(-header.block_size // (8 * SECTOR * SECTOR)) * SECTOR
            self.blocks = BlockMap(self.file, header.table_offset, header.max_table_entries, "big", self._lock, self._announce)
            self._table_end = -(-(header.table_offset + 4 * header.max_table_entries) // SECTOR) * SECTOR
            self._free = self._find_end()
        if self.fixed:
            self._end -= SECTOR
            self.zero_initialized = self.file.zero_initialized
        else:
            self.cluster_size = self.block_size
        self.differencing = in_front and footer.disk_type == DIFFERENCING and any(self.header.parent_locators + self.header.parent_unicode_name)
        self._untouched = self.file.size  # what follows was not written by anyone
        if self.differencing:
            if flags.writable:
                raise Unsupported("differencing VHD images can only be read", filename=name)
            self.supports_backing = True
            self.backing_filename = parent_name(self.file, self.header)
            self.backing_format = "vpc"

    def _find_end(self) -> int:
        """Where the first block behind all others would begin. Raises Corrupt where the file is shorter."""
        end = self._table_end
        total = self._bitmap_size + self.block_size
        for _index, length, value, step in self.blocks.runs(0, self.header.max_table_entries, total // SECTOR):
            if value != FREE or step:
                last = value + (length - 1) * step
                end = max(end, (last if last < FREE else last - step) * SECTOR + total)
        if end > self._end:
            text = "block-vpc: free_data_block_offset points after the end of file. The image has been truncated."
            raise Corrupt(text, filename=self.filename, offset=end)
        return end

    # -- the parent ----------------------------------------------------------------------------------------------

    def references(self) -> list[Reference]:
        if self.backing_filename is None:
            return []
        return [Reference("backing", self.backing_filename, self.backing_format)]

    def attach(self, role: str, child: Node) -> None:
        """See Node.attach. Raises Corrupt for a parent with another unique ID."""
        found = child.footer.unique_id if isinstance(child, Vpc) else None
        if self.differencing and found is not None and found != self.header.parent_unique_id:
            text = "%s: the parent '%s' is another image: its ID is %s, not %s"
            ids = (found.hex(), self.header.parent_unique_id.hex())
            raise Corrupt(text % (self.filename, child.filename, *ids), filename=self.filename)
        super().attach(role, child)

    def _map_over_parent(self, offset: int, length: int) -> Iterator[Extent]:
        """What the bitmaps of the blocks say is here; the parent has the rest."""
        from ..kernels import bit_runs

        size = self.block_size
        first = offset // size
        for index, count, place in self._runs(first, -(-(offset + length) // size) - first):
            start = index * size
            if place is None:
                yield Extent(start, count * size, 0)
                continue
            bitmap = bytearray(self._bitmap_size)
            read_padded(self.file, place - self._bitmap_size, memoryview(bitmap))
            bits = bytes(bitmap).translate(_MIRROR)  # the format counts from the most significant bit
            position = 0
            while position < size:
                runs = bit_runs(bits, position // SECTOR, (size - position) // SECTOR, 256)
                for sector, sectors in runs:
                    if sector * SECTOR > position:
                        yield Extent(start + position, sector * SECTOR - position, 0)
                    position = (sector + sectors) * SECTOR
                    yield Extent(start + sector * SECTOR, sectors * SECTOR, STORED, self.file, place + sector * SECTOR)
                if len(runs) < 256 and position < size:
                    yield Extent(start + position, size - position, 0)
                    position = size

    # -- where blocks are ----------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        if self.fixed:
            return (Extent(offset, length, STORED | RECURSE, self.file, offset),)
        return self._map_over_parent(offset, length) if self.differencing else super()._map(offset, length)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        if not self.fixed:
            return super()._alloc(offset, length)
        self._check_end(offset + length)
        return [Alloc(offset, length, self.file, offset)]

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        if not self.fixed:
            return super()._zero(offset, length, unmap)
        self._check_end(offset + length)
        self.file.pwrite_zeroes(offset, length, unmap)
        return offset, length

    def _check_end(self, end: int) -> None:
        if end > self._end:
            raise Corrupt("%s: the disk goes on behind the footer, at %#x" % (self.filename, self._end), filename=self.filename, offset=self._end)

    def _runs(self, first: int, count: int) -> Iterator[tuple[int, int, Optional[int]]]:
        for index, length, value, step in self.blocks.runs(first, count, (self._bitmap_size + self.block_size) // SECTOR):
            if value == FREE and not step:
                yield index, length, None
                continue
            for at in range(length):
                entry = value + at * step
                yield index + at, 1, entry * SECTOR + self._bitmap_size if entry < FREE else None

    def _locate(self, index: int) -> Optional[int]:
        value = self.blocks.get(index)
        if value == FREE:
            return None
        start = value * SECTOR
        end = start + self._bitmap_size + self.block_size
        header, table = self.footer.data_offset, self.header.table_offset
        for low, high in ((0, SECTOR), (header, header + Header.SIZE), (table, self._table_end)):
            if start < high and low < end:
                raise self._outside(index, start)
        return start + self._bitmap_size

    def _take(self, index: int) -> int:
        start = self._free
        if start // SECTOR >= FREE:
            raise Error("%s: no room for block %d" % (self.filename, index), filename=self.filename, errno=EFBIG)
        place = self._prepare(start + self._bitmap_size, self._untouched)
        self.file.write_hosted(start, memoryview(b"\xff" * self._bitmap_size))
        self.blocks.set(index, start // SECTOR)
        self._free = place + self.block_size
        return place

    # -- writing -------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Bring blocks, and the footer behind them, to the disk: all that comes before the table."""
        self.file.write_hosted(self._free, memoryview(self.footer.pack()))
        self.file.flush()

    def _flush(self) -> None:
        if self.fixed:
            return
        with self._lock:
            if self.blocks.changed:
                self._announce()
                self.blocks.write()

    # -- the image -----------------------------------------------------------------------------------------------

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head.startswith(COOKIE) else 0

    @classmethod
    def created_size(cls, options: Any) -> int:
        return new_geometry(options)[0] * SECTOR

    @classmethod
    def check_creation(cls, options: Any) -> None:
        new_geometry(options)

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        sectors, (cylinders, heads, spt) = new_geometry(options)
        fixed = options.subformat == "fixed"
        from time import time

        footer = Footer(
            data_offset=NOWHERE if fixed else SECTOR,
            time_stamp=int(time()) - EPOCH & 0xFFFFFFFF,
            creator_application=b"qem2" if options.force_size else b"qemu",
            original_size=sectors * SECTOR,
            current_size=sectors * SECTOR,
            cylinders=cylinders,
            heads=heads,
            sectors_per_track=spt,
            disk_type=FIXED if fixed else DYNAMIC,
            unique_id=_new_id(),
        )
        footer.checksum = checksum(footer.pack(), Footer)
        if fixed:
            file.truncate(sectors * SECTOR, exact=False)
            file.write_hosted(sectors * SECTOR, memoryview(footer.pack()))
            return
        count = -(-sectors * SECTOR // BLOCK)
        header = Header(table_offset=SECTOR + Header.SIZE, max_table_entries=count)
        header.checksum = checksum(header.pack(), Header)
        table = -(-4 * count // SECTOR) * SECTOR
        file.write_hosted(0, memoryview(footer.pack() + header.pack()))
        for position in range(0, table, CHUNK):
            file.write_hosted(header.table_offset + position, memoryview(b"\xff" * min(CHUNK, table - position)))
        file.write_hosted(header.table_offset + table, memoryview(footer.pack()))


# -- footer and header ---------------------------------------------------------------------------------------------------


def checksum(record: bytes, kind: type[Struct]) -> int:
    """The one's complement of the sum of all bytes, without the checksum's own."""
    at = kind.OFFSETS["checksum"]
    return ~(sum(record) - sum(record[at : at + 4])) & 0xFFFFFFFF


def read_footer(file: Node) -> tuple[Footer, bool]:
    """The footer, and whether it is the copy in front, which dynamic images have. Raises WrongFormat or Corrupt."""
    data = bytearray(SECTOR)
    read_padded(file, 0, memoryview(data))
    in_front = data.startswith(COOKIE)
    if not in_front:
        length = -(-file.size // SECTOR) * SECTOR
        if length < SECTOR:
            raise WrongFormat("File too small for a VHD header")
        read_padded(file, length - SECTOR, memoryview(data))
    footer = Footer.unpack(data)
    if not in_front and (footer.cookie != COOKIE or footer.disk_type != FIXED):
        raise WrongFormat("invalid VPC image")
    if checksum(bytes(data), Footer) != footer.checksum:
        raise Corrupt("Incorrect header checksum")
    return footer, in_front


def disk_sectors(footer: Footer, forced: Optional[str]) -> int:
    """The size of the disk in sectors. Programs do not agree on what says it, so who made the image decides, or `forced`."""
    geometry = footer.cylinders * footer.heads * footer.sectors_per_track
    by_geometry = forced == "chs" or forced is None and footer.creator_application in BY_GEOMETRY
    return geometry if by_geometry and geometry != MAX_CHS else footer.current_size // SECTOR


def read_header(file: Node, footer: Footer, size: int) -> Header:
    """The header of a dynamic image. Raises WrongFormat, Corrupt or Unsupported."""
    if footer.data_offset > MAX_OFFSET - Header.SIZE:
        raise Corrupt("Error reading dynamic VHD header")
    data = bytearray(Header.SIZE)
    read_padded(file, footer.data_offset, memoryview(data))
    header = Header.unpack(data)
    if header.cookie != HEADER_COOKIE:
        raise WrongFormat("Invalid header magic")
    if header.block_size < SECTOR or header.block_size & (header.block_size - 1):
        raise Unsupported("Invalid block size %d" % header.block_size)
    count = header.max_table_entries
    if count * header.block_size < size:
        raise Corrupt("Page table too small")
    if count > MAX_ENTRIES:
        raise Corrupt("Max Table Entries too large (%d)" % (count - (1 << 32) if count >> 31 else count))
    if header.table_offset > MAX_OFFSET - 4 * count - SECTOR:
        raise Corrupt("Error reading pagetable")
    return header


def new_geometry(options: Any) -> tuple[int, tuple[int, int, int]]:
    """Sectors of a new disk, and its geometry: (cylinders, heads, sectors of a track). Raises Error for one that is too large."""
    sectors = -(-options.size // SECTOR)
    if sectors > MAX_SECTORS:
        raise Error(os.strerror(EFBIG), errno=EFBIG)
    if options.force_size:
        return sectors, (65535, 16, 255)
    wanted = min(sectors, MAX_CHS)
    found, more = (0, 0, 0), 0
    while found[0] * found[1] * found[2] < wanted:
        found = geometry(wanted + more)
        more += 1
    if found == (65535, 16, 255):
        return sectors, found
    return found[0] * found[1] * found[2], found


def geometry(sectors: int) -> tuple[int, int, int]:
    """The geometry (cylinders, heads, sectors of a track) for a disk, by the appendix of the specification; it may hold a little less."""
    sectors = min(sectors, MAX_CHS)
    if sectors >= 65535 * 16 * 63:
        return sectors // (16 * 255), 16, 255
    spt = 17
    tracks = sectors // spt
    heads = max(4, (tracks + 1023) // 1024)
    if tracks >= heads * 1024 or heads > 16:
        spt, heads = 31, 16
        tracks = sectors // spt
    if tracks >= heads * 1024:
        spt, heads = 63, 16
        tracks = sectors // spt
    return tracks // heads, heads, spt


def _new_id() -> bytes:
    """A random UUID."""
    uuid = bytearray(os.urandom(16))
    uuid[6] = uuid[6] & 0x0F | 0x40
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)


# -- the parent of a differencing image ----------------------------------------------------------------------------------

MAX_LOCATOR = 4096  # bytes of a parent's name
_MIRROR = bytes(sum((value >> bit & 1) << (7 - bit) for bit in range(8)) for value in range(256))


class Locator(Struct):
    """One of eight places where the parent may be named."""

    platform_code: bytes4
    platform_data_space: u32
    platform_data_length: u32
    reserved: u32
    platform_data_offset: u64


def parent_name(file: Node, header: Header) -> str:
    """The parent's name: as the image has it relative to itself, else absolute, else the bare name. Raises Corrupt.

    Names of a Windows disk or server say nothing here: of such a name the last part is taken, beside the image.
    """
    names: dict[bytes, str] = {}
    for at in range(0, len(header.parent_locators), Locator.SIZE):
        locator = Locator.unpack(header.parent_locators, at)
        length = locator.platform_data_length
        if locator.platform_code in (b"W2ru", b"W2ku", b"MacX") and 0 < length <= MAX_LOCATOR:
            data = bytearray(length)
            if locator.platform_data_offset <= MAX_OFFSET - length:
                read_padded(file, locator.platform_data_offset, memoryview(data))
            names.setdefault(locator.platform_code, bytes(data).decode("utf-8" if locator.platform_code == b"MacX" else "utf-16-le", "replace"))
    names[b""] = header.parent_unicode_name.decode("utf-16-be", "replace")
    for code in (b"W2ru", b"W2ku", b"MacX", b""):
        name = names.get(code, "").split("\0", 1)[0].replace("\\", "/")
        if name.startswith("file://"):
            from urllib.parse import unquote

            name = unquote("/" + name[len("file://") :].partition("/")[2])
        if name[1:2] == ":" or name.startswith("//"):
            name = name.rsplit("/", 1)[-1].rsplit(":", 1)[-1]
        while name.startswith("./"):
            name = name[2:].lstrip("/")
        if name:
            return "./" + name if ":" in name.split("/", 1)[0] else name
    raise Corrupt("a differencing VHD image that does not name its parent", filename=file.filename)
