# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""AES of the Python package cryptography (https://cryptography.io/en/latest/hazmat/primitives/symmetric-encryption/)."""

from __future__ import annotations

try:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
except ImportError:  # the first use says so; Ansible's checks import each file without it
    MISSING = True
else:
    MISSING = False

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

SECTOR = 512


class Aes:
    """One mode and key; see ciphers.Backend."""

    __slots__ = ("_mode", "_key", "_half")

    def __init__(self, mode: str, key: bytes) -> None:
        """Raises ImportError without the package, or where it has no such key."""
        if MISSING:
            raise ImportError("cryptography is not installed")
        self._mode = mode
        self._key = key
        self._half = key[: len(key) // 2] if mode == "xts" else key
        if mode == "xts" and len(key) not in (32, 64):
            raise ImportError("cryptography has no AES-192-XTS")

    def ecb(self, data: bytes, encrypt: bool) -> bytes:
        """Blocks by themselves; with a key of XTS, by its first half."""
        cipher = Cipher(algorithms.AES(self._half), modes.ECB())
        return bytes((cipher.encryptor() if encrypt else cipher.decryptor()).update(data))

    def sectors(self, view: memoryview, ivs: Optional[bytes], encrypt: bool) -> None:
        """Encrypt or decrypt sectors in place, each with its IV of `ivs`."""
        if ivs is None:
            view[:] = self.ecb(bytes(view), encrypt)
            return
        make: Any = {"cbc": modes.CBC, "ctr": modes.CTR, "xts": modes.XTS}[self._mode]
        algorithm = algorithms.AES(self._key)
        for number in range(len(ivs) // 16):
            cipher = Cipher(algorithm, make(ivs[number * 16 : number * 16 + 16]))
            sector = view[number * SECTOR : (number + 1) * SECTOR]
            sector[:] = (cipher.encryptor() if encrypt else cipher.decryptor()).update(sector)
