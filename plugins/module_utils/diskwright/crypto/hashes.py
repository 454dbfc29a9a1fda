# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Hashes of LUKS, key derivation with PBKDF2 (https://www.rfc-editor.org/rfc/rfc8018#section-5.2), and how long that takes."""

from __future__ import annotations

import hashlib

from .. import kernels
from ..errors import Error, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Name in headers and options -> (length in bytes, hashlib's name).
HASHES = {
    "md5": (16, "md5"),
    "sha1": (20, "sha1"),
    "sha224": (28, "sha224"),
    "sha256": (32, "sha256"),
    "sha384": (48, "sha384"),
    "sha512": (64, "sha512"),
    "ripemd160": (20, "ripemd160"),
    "sm3": (32, "sm3"),
}
_NATIVE = ("sha1", "sha256")

MAX_ITERATIONS = (1 << 32) - 1  # what a header can say
_SAMPLE = 0.02  # seconds of processor time after which a measurement is believed


def new(name: str) -> Any:
    """A new hash object. Raises Unsupported where Python's OpenSSL lacks it."""
    try:
        return hashlib.new(HASHES[name][1], usedforsecurity=False)
    except ValueError:
        raise Unsupported("The hash algorithm '%s' is not offered by this Python's OpenSSL" % name) from None


def digest(name: str, data: bytes) -> bytes:
    """The hash of `data`; see new."""
    state = new(name)
    state.update(data)
    return bytes(state.digest())


def pbkdf2(name: str, password: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """A key of `length` bytes. Releases the GIL. Raises Unsupported as new does."""
    module = kernels.native()
    if module is not None and name in _NATIVE:
        return bytes(module.pbkdf2(name, password, salt, iterations, length))
    new(name)
    return hashlib.pbkdf2_hmac(HASHES[name][1], password, salt, iterations, length)


def iterations_for(name: str, length: int, milliseconds: int) -> int:
    """How many iterations take one processor so long to derive a key of `length` bytes.

    Raises Error for more than a header can hold.
    """
    from time import thread_time

    # A single block is what every library computes on one thread; a key costs as much for each of its blocks.
    size = HASHES[name][0]
    blocks = -(-length // size)
    count = 1000
    while True:
        start = thread_time()
        pbkdf2(name, b"passphrase", bytes(32), count, size)
        taken = thread_time() - start
        if taken >= _SAMPLE or count >= 1 << 26:
            break
        count = min(count * 4 if taken < _SAMPLE / 8 else int(count * _SAMPLE * 1.2 / taken) + 1, 1 << 26)
    rate = count / max(taken, 1e-9) / blocks  # iterations a second
    if milliseconds >= 1 << 63 or milliseconds * int(rate) >= 1 << 64:
        raise Error("PBKDF iterations %d too large to scale: Numerical result out of range" % rate)
    wanted = int(rate * milliseconds / 1000)
    if wanted > MAX_ITERATIONS:
        raise Error("PBKDF iterations %d larger than %d: Numerical result out of range" % (wanted, MAX_ITERATIONS))
    return wanted
