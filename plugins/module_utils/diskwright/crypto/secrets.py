# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What secret objects hold (https://www.qemu.org/docs/master/system/secrets.html). No secret is part of any message."""

from __future__ import annotations

import errno

from ..errors import Error, OptionError, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    from ..options import SecretRef

MAX_SECRET = 1 << 20  # bytes of a file with a secret
MAX_WRAPPED = 16  # secrets that wrap one another

_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\r\n")


def passphrase(ref: SecretRef) -> bytes:
    """The secret that an option names, which has to be UTF-8 text, as bytes. Raises OptionError, Error."""
    secret = secret_bytes(getattr(ref, "objects", {}), ref)  # a plain text where nobody called Options.bind
    try:
        valid = b"\0" not in secret and secret.decode("utf-8") is not None
    except UnicodeDecodeError:
        valid = False
    if not valid:
        raise OptionError("Data from secret %s is not valid UTF-8" % str(ref))
    return secret


def secret_bytes(objects: Mapping[str, Any], name: str) -> bytes:
    """The bytes of the secret object with the id `name`, decoded and unwrapped. Raises OptionError, Error."""
    return _read(objects, str(name), 0)


def _read(objects: Mapping[str, Any], name: str, depth: int) -> bytes:
    found = objects.get(name)
    if found is None:
        raise OptionError("No secret with id '%s'" % name)
    if found.type not in ("secret", "secret_keyring"):
        raise OptionError("Object with id '%s' is not a secret" % name)
    if depth > MAX_WRAPPED:
        raise OptionError("Secret '%s' is wrapped too often" % name)
    if found.content is not None:
        return bytes(found.content)
    properties = found.properties
    if found.type == "secret_keyring":
        data = _from_keyring(properties["serial"])
    elif "file" in properties:
        data = _from_file(properties["file"])
    else:
        data = properties["data"].encode("utf-8", "surrogateescape")
    keyid = properties.get("keyid")
    is_base64 = properties.get("format") == "base64"
    if keyid is not None:
        key = _read(objects, keyid, depth + 1)
        return _unwrap(_from_base64(data) if is_base64 else data, key, properties.get("iv"))
    return _from_base64(data) if is_base64 else data


def _from_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SECRET + 1)
    except OSError as exc:
        what = "Error reading file" if exc.errno == errno.EISDIR else "Failed to open file"
        text = "Unable to read %s: %s \u201c%s\u201d: %s" % (path, what, path, exc.strerror)
        raise Error(text, filename=path, errno=exc.errno) from None
    except ValueError:  # a NUL byte
        raise OptionError("Unable to read %s: not a file name" % path) from None
    if len(data) > MAX_SECRET:
        raise OptionError("Unable to read %s: it is longer than %d bytes" % (path, MAX_SECRET))
    return data


def _from_base64(data: bytes) -> bytes:
    """What base64 text stands for; an incomplete group at its end is ignored, as QEMU does."""
    import binascii

    if not _BASE64.issuperset(data):
        raise OptionError("Base64 data contains invalid characters")
    text = data.replace(b"\r", b"").replace(b"\n", b"")
    try:
        return binascii.a2b_base64(text[: len(text) // 4 * 4])
    except binascii.Error:
        raise OptionError("Base64 data is not valid") from None


def _unwrap(data: bytes, key: bytes, iv: Optional[str]) -> bytes:
    """Decrypt AES-256-CBC with PKCS #7 padding."""
    from .ciphers import cbc_decrypt

    if len(key) != 32:
        raise OptionError("Key should be 32 bytes in length")
    if iv is None:
        raise OptionError("IV is required to decrypt secret")
    start = _from_base64(iv.encode("utf-8", "surrogateescape"))
    if len(start) != 16:
        raise OptionError("IV should be 16 bytes in length not %d" % len(start))
    if len(data) % 16:
        raise OptionError("Length %d must be a multiple of block size 16" % len(data))
    plain = cbc_decrypt(key, start, data)
    padding = plain[-1] if plain else 0
    if not 1 <= padding <= 16 or padding > len(plain):
        raise OptionError("Incorrect number of padding bytes (%d) found on decrypted data" % padding)
    return plain[:-padding]


_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "loongarch64": 219, "i686": 288, "armv7l": 311, "ppc64le": 271, "ppc64": 271, "s390x": 280}
_KEYCTL_READ = 11


def _from_keyring(serial: int) -> bytes:
    """The payload of a key of the kernel's keyrings, by the keyctl system call."""
    import ctypes
    import os

    number = _KEYCTL.get(os.uname().machine)
    if number is None:
        raise Unsupported("secret_keyring objects are not supported on %s" % os.uname().machine)
    keyctl = ctypes.CDLL(None, use_errno=True).syscall
    keyctl.restype = ctypes.c_long
    buffer = ctypes.create_string_buffer(MAX_SECRET)
    arguments = (ctypes.c_long(_KEYCTL_READ), ctypes.c_long(serial), buffer, ctypes.c_size_t(MAX_SECRET))
    length = keyctl(ctypes.c_long(number), *arguments)
    if length < 0:
        number = ctypes.get_errno()
        raise Error("Unable to read serial key %08x: %s" % (serial & 0xFFFFFFFF, os.strerror(number)), errno=number)
    data = buffer.raw[: min(length, MAX_SECRET)]
    ctypes.memset(buffer, 0, MAX_SECRET)
    return data
