# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Struct: a declared on-disk record, with the field names of its specification.

Fields are annotations: `u8 u16 u32 u64` (integers), `bytes8`-like `bytes<N>` for N raw bytes. Byte order is the
class's `ORDER`, ">" (big-endian) unless it says otherwise. Fields follow one another without padding.
"""

from __future__ import annotations

import struct

from .errors import Corrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Iterator, Union

    from typing_extensions import Self, dataclass_transform

    Buffer = Union[bytes, bytearray, memoryview]
else:

    def dataclass_transform(**_unused):
        return lambda cls: cls


u8 = int
u16 = int
u32 = int
u64 = int
bytes4 = bytes
bytes8 = bytes
bytes16 = bytes
bytes32 = bytes
bytes64 = bytes
bytes128 = bytes
bytes192 = bytes
bytes256 = bytes
bytes427 = bytes
bytes512 = bytes

_CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


@dataclass_transform(kw_only_default=True)
class Struct:
    """Base of on-disk records; a subclass's annotations are its layout, in order, and defaults are allowed.

    `SIZE` is the record's length in bytes, `OFFSETS` the byte offset of each field.
    """

    ORDER: ClassVar[str] = ">"
    SIZE: ClassVar[int] = 0
    FIELDS: ClassVar[tuple[str, ...]] = ()
    OFFSETS: ClassVar[dict[str, int]] = {}
    _layout: ClassVar[struct.Struct]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        codes = []
        offsets = {}
        size = 0
        own = [item for base in reversed(cls.__mro__) for item in base.__dict__.get("__annotations__", {}).items()]
        for name, kind in own:
            if "ClassVar" in kind:
                continue
            code = _CODES.get(kind) or (kind[5:] + "s")
            offsets[name] = size
            size += struct.calcsize("=" + code)
            codes.append(code)
        cls.FIELDS = tuple(offsets)
        cls.OFFSETS = offsets
        cls._layout = struct.Struct(cls.ORDER + "".join(codes))
        cls.SIZE = cls._layout.size

    def __init__(self, **values: Any) -> None:
        for name in self.FIELDS:
            try:
                value = values.pop(name)
            except KeyError:
                value = getattr(type(self), name, None)
                if value is None:
                    raise TypeError("%s needs %s" % (type(self).__name__, name)) from None
            setattr(self, name, value)
        if values:
            raise TypeError("%s has no field %s" % (type(self).__name__, ", ".join(sorted(values))))

    @classmethod
    def unpack(cls, buffer: Buffer, offset: int = 0) -> Self:
        """Read a record at byte `offset` of `buffer`. Raises Corrupt where the buffer ends too early."""
        if offset < 0 or len(buffer) - offset < cls.SIZE:
            raise Corrupt("%s needs %d bytes at %#x" % (cls.__name__, cls.SIZE, offset), offset=offset)
        record = cls.__new__(cls)
        for name, value in zip(cls.FIELDS, cls._layout.unpack_from(buffer, offset)):
            setattr(record, name, value)
        return record

    @classmethod
    def each(cls, buffer: Buffer) -> Iterator[tuple[Any, ...]]:
        """The records that follow one another in `buffer`, of which the last may be cut, as tuples of their fields: for very many."""
        return cls._layout.iter_unpack(memoryview(buffer)[: len(buffer) // cls.SIZE * cls.SIZE])

    def pack(self) -> bytes:
        """The record's bytes, `SIZE` of them."""
        return self._layout.pack(*[getattr(self, name) for name in self.FIELDS])

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.__dict__ == other.__dict__

    def __repr__(self) -> str:
        return "%s(%s)" % (type(self).__name__, ", ".join("%s=%r" % (n, getattr(self, n)) for n in self.FIELDS))
