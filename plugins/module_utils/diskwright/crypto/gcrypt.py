# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""libgcrypt's ciphers by ctypes (https://www.gnupg.org/documentation/manuals/gcrypt/Symmetric-cryptography.html)."""

from __future__ import annotations

import ctypes

from ..errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

SECTOR = 512

# Numbers of enum gcry_cipher_algos and gcry_cipher_modes; keys in bytes.
_ALGORITHMS = {
    ("aes", 16): 7,
    ("aes", 24): 8,
    ("aes", 32): 9,
    ("cast5", 16): 3,
    ("serpent", 16): 304,
    ("serpent", 24): 305,
    ("serpent", 32): 306,
    ("twofish", 16): 303,
    ("twofish", 32): 10,
}
_MODES = {"ecb": 1, "cbc": 3, "ctr": 6, "xts": 13}
_DISABLE_SECMEM = 37  # enum gcry_ctl_cmds
_INITIALIZATION_FINISHED = 38
_INITIALIZATION_FINISHED_P = 39

_library: Any = None
_missing = False


def _load() -> Any:
    """The library, None where there is none."""
    global _library, _missing
    if _library is None and not _missing:
        try:
            library = ctypes.CDLL("libgcrypt.so.20")
            library.gcry_check_version.restype = ctypes.c_char_p
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            library.gcry_cipher_open.argtypes = (ctypes.POINTER(pointer), ctypes.c_int, ctypes.c_int, ctypes.c_uint)
            library.gcry_cipher_close.argtypes = (pointer,)
            library.gcry_cipher_setkey.argtypes = (pointer, ctypes.c_char_p, size)
            library.gcry_cipher_setiv.argtypes = library.gcry_cipher_setctr.argtypes = (pointer, ctypes.c_char_p, size)
            for name in ("gcry_cipher_encrypt", "gcry_cipher_decrypt"):
                getattr(library, name).argtypes = (pointer, pointer, size, pointer, size)
            if library.gcry_check_version(None) is None:
                raise OSError("libgcrypt does not start")
            if not library.gcry_control(_INITIALIZATION_FINISHED_P):
                library.gcry_control(_DISABLE_SECMEM, 0)
                library.gcry_control(_INITIALIZATION_FINISHED, 0)
            _library = library
        except (OSError, AttributeError):
            _missing = True
    return _library


def _algorithm(cipher: str, mode: str, key: bytes) -> Optional[int]:
    return _ALGORITHMS.get((cipher, len(key) // 2 if mode == "xts" else len(key)))


def supports(cipher: str, mode: str, key: bytes) -> bool:
    """Whether the library is there and has this cipher with keys of this length."""
    library = _load()
    if library is None or _algorithm(cipher, mode, key) is None:
        return False
    try:
        Gcrypt(cipher, mode, key).ecb(bytes(16), True)
    except Error:  # an old library without XTS, or one in FIPS mode
        return False
    return True


class Gcrypt:
    """One cipher, mode and key; see ciphers.Backend."""

    __slots__ = ("_cipher", "_mode", "_key")

    def __init__(self, cipher: str, mode: str, key: bytes) -> None:
        self._cipher = cipher
        self._mode = mode
        self._key = key

    def _open(self, mode: str, key: bytes) -> Any:
        handle = ctypes.c_void_p()
        library = _load()
        algorithm = _algorithm(self._cipher, mode, key)
        _succeed(library.gcry_cipher_open(ctypes.byref(handle), algorithm, _MODES[mode], 0))
        failed = library.gcry_cipher_setkey(handle, key, len(key))
        if failed:
            library.gcry_cipher_close(handle)
            _succeed(failed)
        return handle

    def sectors(self, view: memoryview, ivs: Optional[bytes], encrypt: bool) -> None:
        """Encrypt or decrypt sectors in place, each with its IV of `ivs`."""
        library = _load()
        handle = self._open(self._mode, self._key)
        try:
            crypt = library.gcry_cipher_encrypt if encrypt else library.gcry_cipher_decrypt
            start = ctypes.addressof((ctypes.c_char * len(view)).from_buffer(view)) if len(view) else 0
            if ivs is None:
                _succeed(crypt(handle, start, len(view), None, 0))
                return
            set_iv = library.gcry_cipher_setctr if self._mode == "ctr" else library.gcry_cipher_setiv
            width = len(ivs) * SECTOR // max(len(view), 1)
            failed = 0
            for position in range(0, len(ivs), width):
                failed |= set_iv(handle, ivs[position : position + width], width)
                failed |= crypt(handle, start, SECTOR, None, 0)
                start += SECTOR
            _succeed(failed)
        finally:
            library.gcry_cipher_close(handle)

    def ecb(self, data: bytes, encrypt: bool) -> bytes:
        """Blocks by themselves; with a key of XTS, by its first half."""
        library = _load()
        handle = self._open("ecb", self._key[: len(self._key) // 2] if self._mode == "xts" else self._key)
        try:
            buffer = bytearray(data)
            whole = (ctypes.c_char * len(buffer)).from_buffer(buffer)
            crypt = library.gcry_cipher_encrypt if encrypt else library.gcry_cipher_decrypt
            _succeed(crypt(handle, ctypes.addressof(whole), len(buffer), None, 0))
            return bytes(buffer)
        finally:
            library.gcry_cipher_close(handle)


def _succeed(code: int) -> None:
    if code:
        raise Error("libgcrypt: error %d" % (code & 0xFFFF))
