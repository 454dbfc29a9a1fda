# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Differencing images: what they do not hold is in the parent, another VHDX image
(https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-vhdx/, sections 2.4 and 2.6.2.6)."""

from __future__ import annotations

from ...errors import Corrupt
from ...extent import ALLOCATED, DATA, Extent
from ...blockmap import UNSTORED
from ...hooks import Reference
from ...kernels import bit_runs
from ...ondisk import Struct
from .bat import FULLY_PRESENT, NOT_PRESENT, PARTIALLY_PRESENT
from .layout import CHUNK_SECTORS, M, SECTOR, read_inside, refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator, Optional

    from ...ondisk import bytes16, u16, u32
    from .image import Vhdx

VHDX_PARENT = bytes.fromhex("b7ef4ab09ed1814ab78925b8e9445913")
MAX_KEYS = 256  # of a locator; the specification knows five


class LocatorHeader(Struct):
    """What a parent locator begins with."""

    ORDER = "<"

    locator_type: bytes16
    reserved: u16
    key_value_count: u16


class LocatorEntry(Struct):
    """A key and its value, both UTF-16; offsets count from the beginning of the locator."""

    ORDER = "<"

    key_offset: u32
    value_offset: u32
    key_length: u16
    value_length: u16


class Parent:
    """What `image` says of its parent: `name`, as seen from the image's directory, and which it must be."""

    def __init__(self, image: Vhdx, locator: bytes) -> None:
        self._image = image
        values = self._read(locator)
        self._linkages = {self._guid(values[key]) for key in ("parent_linkage", "parent_linkage2") if key in values}
        name = values.get("relative_path") or ""
        if not name and values.get("absolute_win32_path"):
            name = ".\\" + values["absolute_win32_path"].rpartition("\\")[2]  # what a drive letter means here nobody knows
        name = name.replace("\\", "/")
        if not name or "\0" in name or not self._linkages:
            raise refused(image.file, "it has a parent, but does not say which")
        self.name = name if name.startswith(("/", "./", "../")) else "./" + name  # no protocol
        self.reference = Reference("backing", self.name, "vhdx")

    def _read(self, locator: bytes) -> dict[str, str]:
        file = self._image.file
        if len(locator) < LocatorHeader.SIZE:
            raise refused(file, "the parent locator is too short")
        header = LocatorHeader.unpack(locator)
        if header.locator_type != VHDX_PARENT or header.key_value_count > MAX_KEYS:
            raise refused(file, "the parent locator is of an unknown kind", 95)
        if LocatorHeader.SIZE + header.key_value_count * LocatorEntry.SIZE > len(locator):
            raise refused(file, "the parent locator is too short")
        values = {}
        for index in range(header.key_value_count):
            entry = LocatorEntry.unpack(locator, LocatorHeader.SIZE + index * LocatorEntry.SIZE)
            if max(entry.key_offset + entry.key_length, entry.value_offset + entry.value_length) > len(locator):
                raise refused(file, "the parent locator is damaged")
            key = locator[entry.key_offset : entry.key_offset + entry.key_length]
            value = locator[entry.value_offset : entry.value_offset + entry.value_length]
            values[key.decode("utf-16-le", "replace")] = value.decode("utf-16-le", "replace")
        return values

    def _guid(self, text: str) -> bytes:
        """A GUID of the form {...} as it is stored."""
        digits = text.strip("{}").replace("-", "")
        try:
            raw = bytes.fromhex(digits)
        except ValueError:
            raw = b""
        if len(raw) != 16:
            raise refused(self._image.file, "the parent's GUID is damaged")
        return raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:]

    def admit(self, guid: Optional[bytes]) -> None:
        """Raise Corrupt unless `guid` is that of the content that the image was made for."""
        if guid not in self._linkages:
            image = self._image
            text = "%s: the parent '%s' is not the one that the image was made for, or was changed since" % (image.file.filename, self.name)
            raise Corrupt(text, filename=image.filename, errno=22)

    def map(self, offset: int, length: int) -> Iterator[Extent]:
        """See Hooks._map."""
        image = self._image
        size = image.block_size
        first = offset // size
        for index, count, state, place in image.bat.runs(first, -(-(offset + length) // size) - first):
            if state == FULLY_PRESENT:
                yield Extent(index * size, count * size, image.stored, image.file, place)
            elif state == NOT_PRESENT:
                yield Extent(index * size, count * size, 0)
            elif state == PARTIALLY_PRESENT:
                for at in range(count):
                    yield from self._map_block(index + at, place + at * size)
            elif state == 4:
                yield Extent(index * size, count * size, DATA | ALLOCATED, image, index * size)
            else:
                yield Extent(index * size, count * size, UNSTORED)

    def _map_block(self, index: int, place: int) -> Iterator[Extent]:
        """A block of which the sector bitmap says what is there."""
        image = self._image
        size = image.block_size
        chunk, within = divmod(index, image.layout.ratio)
        with image._lock:
            state, bitmap = image.bat.bitmap(chunk)
        self._admit_places(index, place, state, bitmap)
        sectors = size // SECTOR
        bits = read_inside(image.file, bitmap + within * sectors // 8, sectors // 8)
        done = 0
        for first, count in bit_runs(bits, 0, sectors, sectors):
            if first > done:
                yield Extent(index * size + done * SECTOR, (first - done) * SECTOR, 0)
            yield Extent(index * size + first * SECTOR, count * SECTOR, image.stored, image.file, place + first * SECTOR)
            done = first + count
        if done < sectors:
            yield Extent(index * size + done * SECTOR, (sectors - done) * SECTOR, 0)

    def _admit_places(self, index: int, place: int, state: int, bitmap: int) -> None:
        """Raise Corrupt unless a partial block and its bitmap are in the file, and nothing else is there."""
        image = self._image
        regions = image.layout.regions
        fault = (state != FULLY_PRESENT and "it has no sector bitmap") or regions.conflict(place, place + image.block_size)
        fault = fault or regions.conflict(bitmap, bitmap + CHUNK_SECTORS // 8)
        if not fault and max(place, bitmap + M) > image.file.size:
            fault = "it is behind the end of the file"
        if fault:
            text = "%s: block %d cannot be read: %s" % (image.filename, index, fault)
            raise Corrupt(text, filename=image.filename, offset=index * image.block_size, errno=5)
