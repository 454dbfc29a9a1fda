# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""rbd: an image of a Ceph cluster, through the Python bindings of librbd (https://docs.ceph.com/en/latest/rbd/api/librbdpy/,
BlockdevOptionsRbd of https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html)."""

from __future__ import annotations

import errno

from ...errors import Error, OptionError, ReadOnly
from ...extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from ...hooks import Snapshot
from ...node import MAX_SIZE, Alloc, OpenFlags, Protocol, fill_zeroes
from ...options import Options, SecretRef, Size, opt
from ..numbered import StrongKeys, member, take
from . import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Iterable, Mapping, Optional, Sequence

    from typing_extensions import Self

    TextList = Sequence[str]
    ServerList = Sequence[Mapping[str, str]]

MAX_TRANSFER = 4 << 20  # bytes of one request
MAX_LOOK = 1 << 36  # bytes whose state is asked for in one go
FORMATS = ("luks", "luks2", "luks-any")
LUKS_HEADS = {b"LUKS\xba\xbe\0\1": "luks", b"LUKS\xba\xbe\0\2": "luks2"}

STORED = DATA | OFFSET_VALID | ALLOCATED
HOLE = ZERO | OFFSET_VALID | ALLOCATED

WRONG_FORMAT = "Parameter 'format' does not accept value '%s'"


class RbdOptions(Options):
    """Runtime options of rbd."""

    pool: str = opt(help="name of the pool")
    namespace: Optional[str] = opt(None, help="name of the namespace in the pool")
    image: str = opt(help="name of the image")
    conf: Optional[str] = opt(None, help="configuration file of the cluster")
    snapshot: Optional[str] = opt(None, help="name of a snapshot of the image")
    encrypt_format: Optional[str] = opt(None, key="encrypt.format", choices=FORMATS, refusal=WRONG_FORMAT, help="how librbd decrypts the image")
    encrypt_key_secret: Optional[SecretRef] = opt(None, key="encrypt.key-secret", help="id of the secret with the passphrase")
    user: Optional[str] = opt(None, help="user of the cluster, without 'client.'")
    auth_client_required: Optional[TextList] = opt(None, help="authentication that will do: cephx, none")
    key_secret: Optional[SecretRef] = opt(None, help="id of the secret with the user's key")
    server: Optional[ServerList] = opt(None, help="monitors, host and port")
    settings: Optional[str] = opt(None, key=names.SETTINGS, hidden=True, help="settings of the cluster, from a file name")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], unknown: str = "") -> Self:
        """See Options.from_mapping; this driver has words of its own for what is unknown or missing."""
        rest, servers = take(values, "server")
        rest, modes = take(rest, "auth-client-required")
        encrypt = [key for key in rest if key.startswith("encrypt.")]
        if any(key.startswith("encrypt.parent.") for key in encrypt):
            raise OptionError("Parameter 'encrypt.parent' is not supported: the Python bindings of librbd do not have it")
        for key in ("encrypt.format", "encrypt.key-secret"):
            if encrypt and key not in rest:
                raise OptionError("Parameter '%s' is missing" % key)
        for mode in modes:
            if mode not in ("cephx", "none"):
                raise OptionError("Parameter 'auth-client-required' does not accept value '%s'" % (mode,))
        record = super().from_mapping(rest, unknown="Parameter '%s' is unexpected")
        record.server = [member(given, "server.%d" % number, ("host", "port")) for number, given in enumerate(servers)] or None
        record.auth_client_required = modes or None
        return record


class RbdCreateOptions(Options):
    """Creation options of rbd."""

    DASHES = False

    size: Size = opt(0, help="Virtual disk size")
    cluster_size: Size = opt(0, help="RBD object size")
    password_secret: Optional[SecretRef] = opt(None, key="password-secret", help="ID of secret providing the password")
    encrypt_format: Optional[str] = opt(
        None, key="encrypt.format", choices=FORMATS[:2], refusal=WRONG_FORMAT, help="Encrypt the image, format choices: 'luks', 'luks2'"
    )
    encrypt_cipher_alg: str = opt(
        "aes-256",
        key="encrypt.cipher-alg",
        choices=("aes-128", "aes-256"),
        refusal="Parameter 'cipher-alg' does not accept value '%s'",
        help="Name of encryption cipher algorithm (allowed values: aes-128, aes-256)",
    )
    encrypt_key_secret: Optional[SecretRef] = opt(None, key="encrypt.key-secret", help="ID of secret providing LUKS passphrase")


class Rbd(Protocol):
    """An image of a cluster. Its library may be used by several threads."""

    driver = "rbd"
    options_class = RbdOptions
    strong_options = StrongKeys(("pool", "namespace", "image", "conf", "snapshot", "user", "server", "password-secret"))
    create_options: ClassVar[type[Options]] = RbdCreateOptions
    creatable = True
    growable = True
    zero_initialized = True

    def __init__(self, options: RbdOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        from .cluster import Cluster

        self._cluster = Cluster(options, direct=flags.direct)
        self._image: Any = None
        try:
            self._image = self._open(flags)
            self._size = self._image.size()
            self.cluster_size = self._image.stat()["obj_size"]
            self._encryption = LUKS_HEADS.get(self._image.read(0, min(8, self._size)) if self._size else b"")
            if options.encrypt_format is not None:
                self._cluster.load_encryption(self._image, options)
                self._size = self._image.size()
            if not 0 <= self._size <= MAX_SIZE:
                raise Error("%s: the image has %d bytes" % (options.image, self._size), errno=errno.EFBIG)
        except BaseException:
            self._release_host()
            raise

    def _open(self, flags: OpenFlags) -> Any:
        options: Any = self.options
        if options.snapshot and flags.writable:
            raise ReadOnly("rbd snapshots are read-only", errno=errno.EROFS)
        return self._cluster.open(options.image, options.snapshot or None, not flags.writable)

    def _changed_flags(self, old: OpenFlags) -> None:
        options: Any = self.options
        if self.flags.writable != old.writable:
            previous, self._image = self._image, self._open(self.flags)
            if options.encrypt_format is not None:
                self._cluster.load_encryption(self._image, options)
            previous.close()

    def _release_host(self) -> None:
        image, self._image = self._image, None
        try:
            if image is not None:
                self._cluster.tell("error closing %s" % self.filename, image.close)
        finally:
            self._cluster.close()

    def disk_size(self) -> None:
        """Nobody says."""
        return None

    def format_specific(self) -> dict[str, Any]:
        return {"encryption-format": self._encryption} if self._encryption else {}

    # -- what is where -------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        end = min(offset + length, self._size)
        position = offset
        while position < end:
            stop = min(end, position + MAX_LOOK)
            for start, until in self._cluster.present(self._image, position, stop):
                if start > position:
                    yield Extent(position, start - position, HOLE, self, position)
                yield Extent(start, until - start, STORED, self, start)
                position = until
            if position < stop:
                yield Extent(position, stop - position, HOLE, self, position)
                position = stop
        if offset + length > self._size:
            yield Extent(self._size, MAX_SIZE - self._size, HOLE, self, self._size)

    # -- data ----------------------------------------------------------------------------------------------------

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        inside = max(min(len(view), self._size - host_offset), 0)
        fill_zeroes(view[inside:])
        for start in range(0, inside, MAX_TRANSFER):
            part = view[start : min(inside, start + MAX_TRANSFER)]
            data = self._cluster.tell("%s: read failed" % self.filename, self._image.read, host_offset + start, len(part))
            part[: len(data)] = data
            fill_zeroes(part[len(data) :])

    def _make_room(self, end: int) -> None:
        with self._lock:
            if end > self._size:
                self._cluster.tell("failed to resize", self._image.resize, end)
                self._size = end

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        self._make_room(host_offset + len(view))
        for start in range(0, len(view), MAX_TRANSFER):
            part = bytes(view[start : start + MAX_TRANSFER])
            self._cluster.tell("%s: write failed" % self.filename, self._image.write, part, host_offset + start)

    def _zero(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        self._make_room(offset + length)
        return offset, length if self._cluster.write_zeroes(self._image, offset, length, not unmap) else 0

    def _discard(self, offset: int, length: int) -> None:
        length = min(length, self._size - offset)
        if self.flags.unmap and length > 0:
            self._cluster.tell("%s: discard failed" % self.filename, self._image.discard, offset, length)

    def _flush(self) -> None:
        if not self.flags.no_flush:
            self._cluster.tell("%s: flush failed" % self.filename, self._image.flush)

    def _truncate(self, size: int, preallocation: str) -> None:
        if preallocation != "off":
            raise OptionError("Unsupported preallocation mode '%s'" % preallocation, errno=errno.ENOTSUP)
        with self._lock:
            self._cluster.tell("failed to resize", self._image.resize, size)
            self._size = size

    # -- snapshots -----------------------------------------------------------------------------------------------

    def snapshots(self) -> list[Snapshot]:
        """The image's snapshots; QEMU gives their size for that of a VM's state."""
        found = self._cluster.tell("failed to list snapshots", lambda: list(self._image.list_snaps()))
        return [Snapshot(snap["name"], snap["name"], vm_state_size=snap["size"], icount=0, disk_size=snap["size"]) for snap in found]

    def _create_snapshot(self, name: str, like: Optional[Snapshot]) -> Snapshot:
        self._cluster.tell("failed to create snap", self._image.create_snap, name)
        return Snapshot(name, name, vm_state_size=self._size, icount=0, disk_size=self._size)

    def _apply_snapshot(self, name: str) -> None:
        self._cluster.tell("failed to roll back", self._image.rollback_to_snap, name)
        self._size = self._image.size()

    def _delete_snapshot(self, name: str, id: Optional[str]) -> None:
        self._cluster.tell("failed to remove snap", self._image.remove_snap, name)

    # -- names and creation --------------------------------------------------------------------------------------

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        return names.parse(filename)

    @classmethod
    def create_file(cls, filename: str, options: Any, flags: OpenFlags) -> None:
        """Create the image. Raises Error in QEMU's words, also where there is one of this name."""
        order = options.cluster_size.bit_length() - 1 if options.cluster_size else 0
        if options.cluster_size and options.cluster_size != 1 << order:
            raise OptionError("obj size needs to be power of 2")
        if options.cluster_size and options.cluster_size < 4096:
            raise OptionError("obj size too small")
        if (options.encrypt_format is None) != (options.encrypt_key_secret is None):
            raise OptionError("Parameter '%s' is missing" % ("key-secret" if options.encrypt_format else "format"))
        from .cluster import Cluster

        record = cls.options_class.from_mapping(cls.parse_name(filename))
        record.key_secret = options.password_secret
        cluster = Cluster(record, direct=False)
        try:
            cluster.create(record.image, options, order)
        finally:
            cluster.close()
