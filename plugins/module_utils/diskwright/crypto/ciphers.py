# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Ciphers over sectors of 512 bytes, each with an IV of its own (https://gitlab.com/cryptsetup/cryptsetup/-/wikis/Specification).

The ciphers are those of a library: the accelerator's, libgcrypt's, or those of the Python package cryptography.
"""

from __future__ import annotations

from .. import kernels
from ..errors import OptionError, Unsupported
from .hashes import HASHES, digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Protocol, Union

    Writable = Union[bytearray, memoryview]

    class Backend(Protocol):
        """A library with the key of one cipher and mode gone in."""

        def sectors(self, view: memoryview, ivs: Optional[bytes], encrypt: bool) -> None: ...

        def ecb(self, data: bytes, encrypt: bool) -> bytes: ...


SECTOR = 512

# Algorithm as QEMU names it -> (cipher in the header, length of its key in bytes).
ALGORITHMS = {
    "aes-128": ("aes", 16),
    "aes-192": ("aes", 24),
    "aes-256": ("aes", 32),
    "cast5-128": ("cast5", 16),
    "serpent-128": ("serpent", 16),
    "serpent-192": ("serpent", 24),
    "serpent-256": ("serpent", 32),
    "twofish-128": ("twofish", 16),
    "twofish-192": ("twofish", 24),
    "twofish-256": ("twofish", 32),
}
KNOWN = (*ALGORITHMS, "des", "3des", "sm4")  # QEMU's names; LUKS cannot have the last ones
MODES = ("ecb", "cbc", "xts", "ctr")
IVGENS = ("plain", "plain64", "essiv")
BLOCK = {"aes": 16, "cast5": 8, "serpent": 16, "twofish": 16}  # bytes


def algorithm(cipher: str, key_size: int) -> Optional[str]:
    """QEMU's name of the cipher `cipher` with keys of `key_size` bytes; None where there is none."""
    for name, pair in ALGORITHMS.items():
        if pair == (cipher, key_size):
            return name
    return None


class SectorCipher:
    """A cipher, mode, IV generator and key, which encrypt and decrypt whole sectors in place. Safe to use from many threads."""

    __slots__ = ("cipher", "mode", "ivgen", "_key", "_iv_key", "_native", "_backend", "_iv_backend")

    def __init__(self, name: str, mode: str, ivgen: str, ivgen_hash: Optional[str], key: bytes) -> None:
        """`name` is one of ALGORITHMS, `mode` of MODES, `ivgen` of IVGENS, `ivgen_hash` of HASHES (needed for essiv).

        Raises OptionError for what does not go together, Unsupported where no library has the cipher.
        """
        check(name, mode, ivgen, ivgen_hash)
        self.cipher = ALGORITHMS[name][0]
        self.mode = mode
        self.ivgen = ivgen
        self._key = bytes(key)
        self._iv_key = digest(ivgen_hash, self._key) if ivgen == "essiv" and ivgen_hash else b""
        self._native = kernels.native()
        self._backend: Optional[Backend] = None
        self._iv_backend: Optional[Backend] = None
        if self._native is None or self.cipher == "twofish":  # of which the accelerator's is a slow one
            try:
                self._backend = _backend(self.cipher, mode, self._key)
                if ivgen == "essiv":
                    self._iv_backend = _backend(self.cipher, "ecb", self._iv_key)
            except Unsupported:
                if self._native is None:
                    raise
                self._backend = None

    def __repr__(self) -> str:
        return "SectorCipher(%s, %s, %s)" % (self.cipher, self.mode, self.ivgen)  # not the key

    def encrypt(self, sector: int, buffer: Writable) -> None:
        """Encrypt `buffer`, whole sectors of which the first has the number `sector`, in place."""
        self._crypt(sector, buffer, True)

    def decrypt(self, sector: int, buffer: Writable) -> None:
        """The inverse of encrypt."""
        self._crypt(sector, buffer, False)

    def _crypt(self, sector: int, buffer: Writable, encrypt: bool) -> None:
        if self._backend is None and self._native is not None:
            self._native.sectors_crypt(buffer, self.cipher, self.mode, self._key, self.ivgen, self._iv_key, sector, encrypt)
        elif self._backend is not None:
            view = memoryview(buffer).cast("B")
            self._backend.sectors(view, self._ivs(sector, len(view) // SECTOR), encrypt)

    def _ivs(self, first: int, count: int) -> Optional[bytes]:
        """The IVs of `count` sectors, one after the other."""
        if self.mode == "ecb":
            return None
        width = BLOCK[self.cipher]
        mask = 0xFFFFFFFF if self.ivgen == "plain" else 0xFFFFFFFFFFFFFFFF
        numbers = b"".join([(number & mask).to_bytes(width, "little") for number in range(first, first + count)])
        return numbers if self._iv_backend is None else self._iv_backend.ecb(numbers, True)


def check(name: str, mode: str, ivgen: str, ivgen_hash: Optional[str]) -> None:
    """Raise OptionError in QEMU's words unless these go together."""
    cipher = ALGORITHMS[name][0]
    if mode == "xts" and BLOCK[cipher] != 16:
        raise OptionError("Unsupported cipher mode xts")
    if ivgen == "essiv":
        essiv_algorithm(name, ivgen_hash or "sha256")


def essiv_algorithm(name: str, ivgen_hash: str) -> str:
    """The algorithm that makes the IVs of `name`: the same cipher, with the hash for a key. Raises OptionError."""
    cipher = ALGORITHMS[name][0]
    length = HASHES[ivgen_hash][0]
    found = algorithm(cipher, length)
    if found is not None:
        return found
    if cipher == "cast5":
        raise OptionError("Cipher %s not supported with essiv" % name)
    label = "AES" if cipher == "aes" else cipher.capitalize()
    raise OptionError("No %s cipher with key size %d available" % (label, length))


def cbc_decrypt(key: bytes, iv: bytes, data: bytes) -> bytes:
    """`data` (whole blocks of 16 bytes) decrypted with AES-256 as one chain, as wrapped secrets are."""
    whole = bytearray(data.ljust(-(-len(data) // SECTOR) * SECTOR, b"\0"))
    SectorCipher("aes-%d" % (8 * len(key)), "ecb", "plain64", None, key).decrypt(0, whole)
    return _xor(bytes(whole[: len(data)]), (iv + data)[: len(data)])


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little")


def _backend(cipher: str, mode: str, key: bytes) -> Backend:
    from . import gcrypt

    if gcrypt.supports(cipher, mode, key):
        return gcrypt.Gcrypt(cipher, mode, key)
    if cipher == "aes":
        try:
            from .cryptography_aes import Aes

            return Aes(mode, key)
        except ImportError:
            pass
    packages = "diskwright-accel" if cipher != "aes" else "diskwright-accel or cryptography"
    raise Unsupported("The cipher %s needs the Python package %s, or the library libgcrypt (package libgcrypt20)" % (cipher, packages))
