# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The anti-forensic splitter of LUKS (https://gitlab.com/cryptsetup/cryptsetup/-/wikis/Specification, TKS1): a key in so many
stripes that the loss of any part of them loses the key."""

from __future__ import annotations

import os

from .hashes import HASHES, new


def split(key: bytes, stripes: int, hash: str) -> bytes:
    """`key` in `stripes` stripes of its length."""
    size = len(key)
    noise = os.urandom(size * (stripes - 1))
    last = _mixed(noise, size, stripes, hash) ^ int.from_bytes(key, "big")
    return noise + last.to_bytes(size, "big")


def merge(material: bytes, stripes: int, hash: str) -> bytes:
    """The key that `split` made `material` of."""
    size = len(material) // stripes
    last = int.from_bytes(material[size * (stripes - 1) :], "big")
    return (_mixed(material, size, stripes, hash) ^ last).to_bytes(size, "big")


def _mixed(material: bytes, size: int, stripes: int, hash: str) -> int:
    """All stripes but the last, run through xor and the diffusing hash."""
    width = HASHES[hash][0]
    empty = new(hash)
    parts = [(index.to_bytes(4, "big"), at, min(width, size - at)) for index, at in enumerate(range(0, size, width))]
    mixed = 0
    for number in range(stripes - 1):
        block = (mixed ^ int.from_bytes(material[number * size : (number + 1) * size], "big")).to_bytes(size, "big")
        diffused = b""
        for index, at, length in parts:
            state = empty.copy()
            state.update(index + block[at : at + length])
            diffused += state.digest()[:length]
        mixed = int.from_bytes(diffused, "big")
    return mixed
