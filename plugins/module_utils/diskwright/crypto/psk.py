# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Shared keys for the TLS of a Python older than 3.13, whose ssl module cannot: OpenSSL is told directly.

The functions are https://docs.openssl.org/master/man3/SSL_CTX_use_psk_identity_hint/. They are called in the library that the ssl
module itself is linked with, for the context of that module, whose first field is OpenSSL's since Python 2.7.
"""

from __future__ import annotations

import ctypes
import ssl
import sys

from ..errors import Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping

_CLIENT = ctypes.CFUNCTYPE(
    ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char), ctypes.c_uint, ctypes.POINTER(ctypes.c_char), ctypes.c_uint
)
_SERVER = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char), ctypes.c_uint)

NEEDED = "TLS with shared keys (tls-creds-psk) needs Python 3.13, or an ssl module that is linked with a shared OpenSSL"


def check() -> None:
    """Raise Unsupported where this does not work."""
    _library()


def _library() -> Any:
    if sys.implementation.name != "cpython" or hasattr(sys, "getobjects") or sys.version_info >= (3, 13):
        raise Unsupported(NEEDED)
    try:
        import _ssl

        library = ctypes.CDLL(_ssl.__file__)  # and with it what it is linked with
        for name in ("SSL_CTX_set_psk_client_callback", "SSL_CTX_set_psk_server_callback", "SSL_CTX_get_verify_mode"):
            getattr(library, name)
    except (ImportError, OSError, AttributeError):
        raise Unsupported(NEEDED) from None
    return library


def _context(library: Any, context: ssl.SSLContext) -> ctypes.c_void_p:
    """OpenSSL's context of a Python one."""
    found = ctypes.c_void_p.from_address(id(context) + object.__basicsize__)
    library.SSL_CTX_get_verify_mode.argtypes = (ctypes.c_void_p,)
    if not found.value or library.SSL_CTX_get_verify_mode(found) != context.verify_mode:
        raise Unsupported(NEEDED)
    return found


def client_key(context: ssl.SSLContext, user: str, key: bytes) -> Any:
    """Have clients of `context` show `key` as `user`. What is returned must live as long as the context."""
    library = _library()
    name = user.encode("utf-8", "surrogateescape") + b"\0"

    def choose(_session: Any, _hint: Any, identity: Any, most_identity: int, secret: Any, most_secret: int) -> int:
        if len(name) > most_identity or len(key) > most_secret:
            return 0
        ctypes.memmove(identity, name, len(name))
        ctypes.memmove(secret, key, len(key))
        return len(key)

    callback = _CLIENT(choose)
    library.SSL_CTX_set_psk_client_callback.argtypes = (ctypes.c_void_p, _CLIENT)
    library.SSL_CTX_set_psk_client_callback.restype = None
    library.SSL_CTX_set_psk_client_callback(_context(library, context), callback)
    return callback


def server_keys(context: ssl.SSLContext, keys: Mapping[str, bytes]) -> Any:
    """Have servers of `context` look for keys, by their users, in `keys`; see client_key."""
    library = _library()

    def find(_session: Any, identity: Any, secret: Any, most: int) -> int:
        key = keys.get((identity or b"").decode("utf-8", "surrogateescape"), b"")
        if len(key) > most:
            return 0
        ctypes.memmove(secret, key, len(key))
        return len(key)

    callback = _SERVER(find)
    library.SSL_CTX_set_psk_server_callback.argtypes = (ctypes.c_void_p, _SERVER)
    library.SSL_CTX_set_psk_server_callback.restype = None
    library.SSL_CTX_set_psk_server_callback(_context(library, context), callback)
    return callback
