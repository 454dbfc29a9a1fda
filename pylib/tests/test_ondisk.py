# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Struct: layout, both directions, and truncated input."""

from __future__ import annotations

import random
import struct

import pytest

from diskwright.errors import Corrupt
from diskwright.ondisk import Struct, bytes4, u8, u16, u32, u64


class Big(Struct):
    magic: bytes4
    version: u32 = 3
    size: u64
    order: u8
    pad: u16 = 0


class Little(Big):
    ORDER = "<"

    extra: u64


def test_layout_is_packed_in_order_of_declaration() -> None:
    assert Big.SIZE == 19
    assert Big.OFFSETS == {"magic": 0, "version": 4, "size": 8, "order": 16, "pad": 17}
    assert Little.SIZE == 27 and Little.OFFSETS["extra"] == 19


def test_pack_agrees_with_the_struct_module_and_unpack_inverts_it() -> None:
    rng = random.Random(1)
    for _number in range(200):
        values = (rng.randbytes(4), rng.getrandbits(32), rng.getrandbits(64), rng.getrandbits(8), rng.getrandbits(16))
        record = Big(**dict(zip(Big.FIELDS, values)))
        assert record.pack() == struct.pack(">4sIQBH", *values)
        shift = rng.randrange(5)
        again = Big.unpack(rng.randbytes(shift) + record.pack() + b"more", shift)
        assert again == record and again.size == values[2]
        little = Little(**dict(zip(Big.FIELDS, values)), extra=7)
        assert little.pack() == struct.pack("<4sIQBHQ", *values, 7)
        assert little != record


def test_defaults_missing_and_unknown_fields() -> None:
    assert Big(magic=b"abcd", size=1, order=2).version == 3
    with pytest.raises(TypeError, match="needs size"):
        Big(magic=b"abcd", order=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no field colour"):
        Big(magic=b"abcd", size=1, order=2, colour=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("length", range(Big.SIZE))
def test_truncated_input_is_corrupt_and_says_where(length: int) -> None:
    with pytest.raises(Corrupt, match=r"Big needs 19 bytes at 0x3") as caught:
        Big.unpack(bytes(3 + length), 3)
    assert caught.value.offset == 3


def test_a_negative_offset_never_reads_from_the_end() -> None:
    with pytest.raises(Corrupt):
        Big.unpack(bytes(100), -19)
