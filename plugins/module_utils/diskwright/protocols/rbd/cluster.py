# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A connection to a pool of a Ceph cluster (https://docs.ceph.com/en/latest/rados/api/python/), and what is asked of its images."""

from __future__ import annotations

import errno
import os

from ...errors import Error, OptionError, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

PATIENCE = 60  # seconds that the cluster may take, where its configuration does not say otherwise


def bindings() -> tuple[Any, Any]:
    """The modules rados and rbd. Raises Unsupported where they are not there."""
    try:
        import rados
        import rbd
    except ImportError as exc:
        text = "The 'rbd' block driver needs the Python modules rados and rbd: install python3-rados and python3-rbd (%s)" % exc
        raise Unsupported(text) from exc
    return rados, rbd


class Cluster:
    """An open pool."""

    def __init__(self, options: Any, direct: bool) -> None:
        """Connect as `options` say; without a cache where I/O is to be `direct`. Raises OptionError, Error in QEMU's words."""
        self._rados, self._rbd = bindings()
        self._errors = (self._rados.Error, self._rbd.Error, OSError)
        self._context: Any = None
        self._cluster = self.tell("error initializing", lambda: self._rados.Rados(rados_id=options.user or "admin", conffile=None))
        try:
            self._configure(options, direct)
            self.tell("error connecting", self._cluster.connect)
            self._context = self.tell("error opening pool %s" % options.pool, self._cluster.open_ioctx, options.pool)
            if options.namespace:
                self._context.set_namespace(options.namespace)
        except BaseException:
            self.close()
            raise

    def _configure(self, options: Any, direct: bool) -> None:
        for key in ("rados_mon_op_timeout", "rados_osd_op_timeout", "client_mount_timeout"):
            self._set(key, str(PATIENCE))
        if options.conf is not None:
            self.tell("error reading conf file %s" % options.conf, self._cluster.conf_read_file, options.conf)
        else:
            try:
                self._cluster.conf_read_file()
            except self._errors:
                pass  # there may be none
        self._set("rbd_cache", "false" if direct else "true")
        if options.key_secret is not None:
            from base64 import b64encode

            from ...crypto.secrets import secret_bytes

            secret = secret_bytes(getattr(options.key_secret, "objects", {}), options.key_secret)
            self._set("key", b64encode(secret).decode())
        if options.auth_client_required:
            self._set("auth_client_required", ";".join(options.auth_client_required))
        if options.server:
            self._set("mon_host", ";".join("%s:%s" % (_bracketed(server["host"]), server["port"]) for server in options.server))
        for key, value in _pairs(options.settings):
            self._set(key, value)

    def _set(self, key: str, value: str) -> None:
        self.tell("invalid conf option %s" % key, self._cluster.conf_set, key, value)

    def tell(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a call gives. Raises Error: `what`, and why."""
        try:
            return call(*arguments)
        except self._errors as exc:
            number = abs(getattr(exc, "errno", None) or errno.EIO)
            raise Error("%s: %s" % (what, os.strerror(number)), errno=number) from exc
        except (TypeError, ValueError, UnicodeError) as exc:  # a name that cannot be one
            raise OptionError("%s: %s" % (what, exc)) from exc

    def open(self, name: str, snapshot: Optional[str], read_only: bool) -> Any:
        """An open image."""
        return self.tell("error reading header from %s" % name, lambda: self._rbd.Image(self._context, name, snapshot=snapshot, read_only=read_only))

    def load_encryption(self, image: Any, options: Any) -> None:
        """Have librbd decrypt the image from now on."""
        kinds = {"luks": self._rbd.RBD_ENCRYPTION_FORMAT_LUKS1, "luks2": self._rbd.RBD_ENCRYPTION_FORMAT_LUKS2}
        kind = kinds.get(options.encrypt_format, getattr(self._rbd, "RBD_ENCRYPTION_FORMAT_LUKS", None))
        if kind is None:
            raise Unsupported("encrypt.format=luks-any needs a newer librbd")
        self.tell("encryption load fail", image.encryption_load, kind, _passphrase(options.encrypt_key_secret))

    def create(self, name: str, options: Any, order: int) -> None:
        """Create an image of the creation options `options`, with objects of 2**order bytes (0: the cluster's choice)."""
        secret = _passphrase(options.encrypt_key_secret) if options.encrypt_format is not None else ""
        self.tell("error rbd create", lambda: self._rbd.RBD().create(self._context, name, options.size, order=order or None, old_format=False))
        if options.encrypt_format is None:
            return
        try:
            image = self.open(name, None, False)
            try:
                self._encrypt(image, options, secret)
            finally:
                image.close()
        except BaseException:
            self.tell("error removing %s" % name, lambda: self._rbd.RBD().remove(self._context, name))
            raise

    def _encrypt(self, image: Any, options: Any, secret: str) -> None:
        rbd = self._rbd
        kind = rbd.RBD_ENCRYPTION_FORMAT_LUKS1 if options.encrypt_format == "luks" else rbd.RBD_ENCRYPTION_FORMAT_LUKS2
        cipher = rbd.RBD_ENCRYPTION_ALGORITHM_AES128 if options.encrypt_cipher_alg == "aes-128" else rbd.RBD_ENCRYPTION_ALGORITHM_AES256
        size = image.size()
        self.tell("encryption format fail", image.encryption_format, kind, secret, cipher)
        room = size - image.size()  # what the header takes
        if room > 0:
            self.tell("cannot resize image after encryption", image.resize, size + room)

    def present(self, image: Any, start: int, end: int) -> list[tuple[int, int]]:
        """(start, end) of the runs between `start` and `end` that objects hold, ascending; all of it where the cluster does not know."""
        rbd = self._rbd

        def ask() -> list[tuple[int, int]]:
            if not image.features() & rbd.RBD_FEATURE_FAST_DIFF or image.flags() & rbd.RBD_FLAG_FAST_DIFF_INVALID:
                return [(start, end)]
            found: list[tuple[int, int]] = []

            def note(offset: int, length: int, exists: bool) -> None:
                low, high = max(offset, start), min(offset + length, end)
                if exists and low < high:
                    if found and found[-1][1] >= low:
                        low, _old = found.pop()
                    found.append((low, high))

            image.diff_iterate(start, end - start, None, note, True, True)
            return found

        runs: list[tuple[int, int]] = self.tell("failed to look for data", ask)
        return runs

    def write_zeroes(self, image: Any, offset: int, length: int, thick: bool) -> bool:
        """Zeroes for a range; `thick` keeps its room. False where librbd cannot."""
        if not hasattr(image, "write_zeroes"):
            return False
        flags = self._rbd.RBD_WRITE_ZEROES_FLAG_THICK_PROVISION if thick else 0
        self.tell("write of zeroes failed", image.write_zeroes, offset, length, flags)
        return True

    def close(self) -> None:
        """Give the connection back."""
        context, self._context = self._context, None
        if context is not None:
            context.close()
        self._cluster.shutdown()


def _passphrase(ref: Any) -> str:
    from ...crypto.secrets import passphrase

    return passphrase(ref).decode()


def _bracketed(host: str) -> str:
    return "[%s]" % host if ":" in host else host


def _pairs(text: Optional[str]) -> list[tuple[str, str]]:
    """The settings that a name has, from their JSON. Raises OptionError."""
    if text is None:
        return []
    from json import loads

    try:
        words = loads(text)
    except ValueError:
        words = None
    if not isinstance(words, list) or len(words) % 2 or not all(isinstance(word, str) for word in words):
        raise OptionError("Parameter '=keyvalue-pairs' expects a list of pairs")
    return list(zip(words[::2], words[1::2]))
