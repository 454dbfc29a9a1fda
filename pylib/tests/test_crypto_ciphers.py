# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Ciphers over sectors: published vectors, and every library the same bytes; PBKDF2 and the anti-forensic splitter."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest

from diskwright import kernels
from diskwright.crypto import antiforensic, ciphers, gcrypt, hashes
from diskwright.crypto.cryptography_aes import Aes
from diskwright.errors import Error, OptionError

MATRIX = [
    (name, mode, ivgen)
    for name, (cipher, _size) in ciphers.ALGORITHMS.items()
    for mode in ciphers.MODES
    for ivgen in ciphers.IVGENS
    if not (mode == "xts" and cipher == "cast5") and not (mode == "ecb" and ivgen != "plain64")
]


def make(name, mode, ivgen, key, library):
    """A SectorCipher that uses `library`; None where that has no such cipher."""
    ivgen_hash = "md5" if name.startswith("cast5") else "sha256"
    found = ciphers.SectorCipher(name, mode, ivgen, ivgen_hash, key)
    if library == "native":
        if kernels.native() is None:
            return None
        found._backend = found._iv_backend = None
        found._native = kernels.native()
        return found
    cipher = found.cipher
    if library == "libgcrypt":
        if not gcrypt.supports(cipher, mode, key):
            return None
    else:
        if cipher != "aes" or (mode == "xts" and len(key) == 48):
            return None

    def build(mode: str, key: bytes) -> Any:
        return gcrypt.Gcrypt(cipher, mode, key) if library == "libgcrypt" else Aes(mode, key)

    found._backend = build(mode, key)
    found._iv_backend = build("ecb", found._iv_key) if ivgen == "essiv" else None
    return found


@pytest.mark.parametrize("name, mode, ivgen", [one for one in MATRIX if not (one[0] == "twofish-192" and kernels.native() is None)])
def test_libraries_agree(name, mode, ivgen):
    rng = random.Random(name + mode + ivgen)
    key = rng.randbytes(ciphers.ALGORITHMS[name][1] * (2 if mode == "xts" else 1))
    results = {}
    for first, count in ((0, 1), ((1 << 32) - 3, 19)):
        data = rng.randbytes(512 * count)
        for library in ("native", "libgcrypt", "cryptography"):
            cipher = make(name, mode, ivgen, key, library)
            if cipher is None:
                continue
            buffer = bytearray(data)
            cipher.encrypt(first, buffer)
            results.setdefault((first, count), {})[library] = bytes(buffer)
            assert buffer != data
            # sector by sector it is the same
            parts = bytearray(data)
            for number in range(count):
                cipher.encrypt(first + number, memoryview(parts)[number * 512 : number * 512 + 512])
            assert parts == buffer, library
            cipher.decrypt(first, buffer)
            assert buffer == data, library
    for found in results.values():
        assert len(set(found.values())) == 1, sorted(found)
    assert results


@pytest.mark.parametrize(
    "name, key, plain, stored",
    [
        # FIPS 197, appendix C
        ("aes-128", bytes(range(16)).hex(), "00112233445566778899aabbccddeeff", "69c4e0d86a7b0430d8cdb78070b4c55a"),
        ("aes-192", bytes(range(24)).hex(), "00112233445566778899aabbccddeeff", "dda97ca4864cdfe06eaf70a0ec0d7191"),
        ("aes-256", bytes(range(32)).hex(), "00112233445566778899aabbccddeeff", "8ea2b7ca516745bfeafc49904b496089"),
        # RFC 2144, appendix B.1
        ("cast5-128", "0123456712345678234567893456789a", "0123456789abcdef", "238b4fe5847e44b2"),
        # Twofish, ecb_tbl.txt of the AES submission
        ("twofish-128", "00" * 16, "00" * 16, "9f589f5cf6122c32b6bfec2f2ae8c35a"),
        ("twofish-256", "00" * 32, "00" * 16, "57ff739d4dc92c1bd7fc01700cc8216f"),
    ],
)
def test_published_blocks(name, key, plain, stored):
    buffer = bytearray(bytes.fromhex(plain).ljust(512, b"\0"))
    ciphers.SectorCipher(name, "ecb", "plain64", None, bytes.fromhex(key)).encrypt(0, buffer)
    assert buffer[: len(stored) // 2].hex() == stored


def test_xts_of_ieee_1619():
    """IEEE 1619-2007, annex B, vector 4: a data unit of 512 bytes."""
    key = bytes.fromhex("2718281828459045235360287471352631415926535897932384626433832795")
    buffer = bytearray(bytes(range(256)) * 2)
    ciphers.SectorCipher("aes-128", "xts", "plain64", None, key).encrypt(0, buffer)
    assert buffer[:32].hex() == "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"


def test_what_does_not_go_together():
    for name, mode, ivgen, ivgen_hash, words in (
        ("cast5-128", "xts", "plain64", None, "Unsupported cipher mode xts"),
        ("aes-256", "cbc", "essiv", "sha1", "No AES cipher with key size 20 available"),
        ("cast5-128", "cbc", "essiv", "sha256", "Cipher cast5-128 not supported with essiv"),
    ):
        with pytest.raises(OptionError) as caught:
            ciphers.SectorCipher(name, mode, ivgen, ivgen_hash, bytes(16))
        assert str(caught.value) == words


def test_repr_shows_no_key():
    key = b"canary-canary-canary-canary-1234"
    cipher = ciphers.SectorCipher("aes-256", "cbc", "plain64", None, key)
    assert "canary" not in repr(cipher) and key.hex() not in repr(cipher)


@pytest.mark.parametrize("hash", ["sha1", "sha256", "sha512", "md5", "ripemd160"])
def test_pbkdf2(hash):
    rng = random.Random(hash)
    for size in (0, 1, 55, 63, 64, 65, 128, 200):
        password, salt = rng.randbytes(size), rng.randbytes(rng.choice((0, 8, 32, 51, 52, 60, 64, 100)))
        for iterations, length in ((1, 20), (2, 33), (7, 64), (2500, 61)):
            assert hashes.pbkdf2(hash, password, salt, iterations, length) == hashlib.pbkdf2_hmac(hash, password, salt, iterations, length)


def test_kernels_refuse():
    module = kernels.native()
    if module is None:
        return
    good = (bytearray(512), "aes", "cbc", bytes(32), "plain64", b"", 0, True)
    module.sectors_crypt(*good)
    for place, value in ((0, bytearray(511)), (1, "des"), (2, "lrw"), (3, bytes(31)), (4, "benbi"), (6, -1), (0, bytes(512))):
        with pytest.raises(ValueError):
            module.sectors_crypt(*good[:place], value, *good[place + 1 :])
    for hash, iterations, length in (("md5", 1, 16), ("sha1", 0, 16), ("sha1", 1, 0), ("sha1", 1 << 32, 16), ("sha1", 1, 9999)):
        with pytest.raises(ValueError):
            module.pbkdf2(hash, b"", b"", iterations, length)


def test_calibration_scales_and_is_bounded():
    short, long = hashes.iterations_for("sha256", 32, 10), hashes.iterations_for("sha256", 32, 1000)
    assert 0 < short < long
    assert hashes.iterations_for("sha256", 32, 0) == 0
    for milliseconds, words in ((99999999999, "larger than 4294967295"), (1 << 63, "too large to scale")):
        with pytest.raises(Error, match=words):
            hashes.iterations_for("sha256", 32, milliseconds)


@pytest.mark.parametrize("hash", ["sha1", "sha256", "md5", "sha512"])
@pytest.mark.parametrize("size", [16, 24, 32, 48, 64])
def test_antiforensic(hash, size):
    key = random.Random(size).randbytes(size)
    material = antiforensic.split(key, 50, hash)
    assert len(material) == 50 * size and key not in material
    assert antiforensic.merge(material, 50, hash) == key
    broken = bytearray(material)
    broken[size] ^= 1
    assert antiforensic.merge(bytes(broken), 50, hash) != key
