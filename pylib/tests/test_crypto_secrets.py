# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Secrets: files, base64, wrapped ones, the kernel's keyring; the words of refusals; and that no secret shows up anywhere."""

from __future__ import annotations

import base64
import ctypes
import os
import subprocess

import pytest

from diskwright.crypto.secrets import passphrase, secret_bytes
from diskwright.errors import Error
from diskwright.objects import add_object
from diskwright.options import SecretRef


def objects(*texts):
    found = {}
    for text in texts:
        add_object(found, text)
    return found


def refusal(*texts, name="s"):
    with pytest.raises(Error) as caught:
        passphrase(SecretRef(name, objects(*texts)))
    return str(caught.value)


def test_forms(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"a\xc3\xa4 b\n")
    assert secret_bytes(objects("secret,id=s,data=abc"), "s") == b"abc"
    assert secret_bytes(objects("secret,id=s,data=a,,b"), "s") == b"a,b"
    assert secret_bytes(objects("secret,id=s,file=%s" % path), "s") == b"a\xc3\xa4 b\n"
    assert secret_bytes(objects("secret,id=s,data=YWJj,format=base64"), "s") == b"abc"
    assert secret_bytes(objects('{"qom-type": "secret", "id": "s", "data": "YWJj\\nZA==", "format": "base64"}'), "s") == b"abcd"
    assert passphrase(SecretRef("s", objects("secret,id=s,data="))) == b""


def wrapped(key, iv, plain):
    command = ["openssl", "enc", "-aes-256-cbc", "-K", key.hex(), "-iv", iv.hex()]
    return subprocess.run(command, input=plain, capture_output=True, check=True).stdout


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 600])
def test_wrapped(size):
    key, iv, plain = bytes(range(32)), bytes(range(16)), b"x" * size
    outer = "secret,id=k,data=%s,format=base64" % base64.b64encode(key).decode()
    stored = base64.b64encode(wrapped(key, iv, plain)).decode()
    inner = "secret,id=s,data=%s,format=base64,keyid=k,iv=%s" % (stored, base64.b64encode(iv).decode())
    assert secret_bytes(objects(outer, inner), "s") == plain


def test_refusals(tmp_path):
    (tmp_path / "nul").write_bytes(b"a\0b")
    (tmp_path / "bin").write_bytes(b"\xff")
    key = "secret,id=k,data=%s,format=base64" % base64.b64encode(bytes(32)).decode()
    iv = base64.b64encode(bytes(16)).decode()
    assert refusal() == "No secret with id 's'"
    assert refusal("tls-creds-anon,id=s,dir=/tmp,endpoint=client") == "Object with id 's' is not a secret"
    for name in ("nul", "bin"):
        assert refusal("secret,id=s,file=%s" % (tmp_path / name)) == "Data from secret s is not valid UTF-8"
    missing = tmp_path / "missing"
    assert refusal("secret,id=s,file=%s" % missing) == "Unable to read %s: Failed to open file \u201c%s\u201d: No such file or directory" % (missing, missing)
    assert refusal("secret,id=s,data=Y-WJj,format=base64") == "Base64 data contains invalid characters"
    assert refusal("secret,id=s,data=YWJj,format=base64,keyid=k") == "No secret with id 'k'"
    assert refusal("secret,id=k,data=abc", "secret,id=s,data=YWJj,format=base64,keyid=k,iv=" + iv) == "Key should be 32 bytes in length"
    assert refusal(key, "secret,id=s,data=YWJj,format=base64,keyid=k,iv=YWJj") == "IV should be 16 bytes in length not 3"
    assert refusal(key, "secret,id=s,data=YWJj,format=base64,keyid=k,iv=" + iv) == "Length 3 must be a multiple of block size 16"
    zeroes = base64.b64encode(bytes(32)).decode()
    assert "found on decrypted data" in refusal(key, "secret,id=s,data=%s,format=base64,keyid=k,iv=%s" % (zeroes, iv))
    assert refusal("secret,id=s,data=YWJj,format=base64,keyid=s,iv=" + iv) == "Secret 's' is wrapped too often"
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    assert "longer than" in refusal("secret,id=s,file=%s" % (tmp_path / "large"))


def test_keyring():
    assert refusal("secret_keyring,id=s,serial=12345").startswith("Unable to read serial key 00003039: ")
    if os.uname().machine != "x86_64":
        return
    add_key = ctypes.CDLL(None, use_errno=True).syscall
    serial = add_key(248, b"user", b"diskwright-test", b"from the ring", 13, -1)  # the thread's keyring
    if serial < 0:
        assert ctypes.get_errno() in (1, 13, 38)  # a sandbox without keyrings
        return
    assert secret_bytes(objects("secret_keyring,id=s,serial=%d" % serial), "s") == b"from the ring"


def test_no_secret_shows(tmp_path):
    found = objects("secret,id=s,data=canary,format=base64,iv=canary")
    ref = SecretRef("s", found)
    for text in (repr(found), repr(ref), str(ref), refusal("secret,id=s,data=canary!,format=base64")):
        assert "canary" not in text
