# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Encryption: the clusters of guest data are stored encrypted, with a LUKS header inside the image, or with the password alone
(https://www.qemu.org/docs/master/interop/qcow2.html#data-encryption).

Tables, bitmaps and compressed clusters are not encrypted.
"""

from __future__ import annotations

from ...crypto.ciphers import IVGENS, KNOWN, MODES, SECTOR, SectorCipher
from ...crypto.hashes import HASHES
from ...crypto.keyslots import LuksAmendOptions, amend
from ...crypto.luks import Parameters, Volume, format_luks
from ...crypto.secrets import passphrase
from ...encrypted import EncryptedSectors
from ...errors import Corrupt, OptionError, Unsupported
from ...extent import ALLOCATED, DATA, OFFSET_VALID, ZERO, Extent
from ...node import Alloc, OpenFlags
from ...options import Options
from .header import CRYPT_AES, CRYPT_LUKS, EXT_ENCRYPTION, MAX_OFFSET, EncryptionExtension
from .overlap import ENCRYPTION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence

    from ...node import Node
    from ...options import SecretRef
    from .image import Qcow2
    from .options import Qcow2CreateOptions, Qcow2Options

AES_KEY = 16  # bytes of the password that `aes` uses
HOST_BITS = 64  # see Clusters.address
EIO, EINVAL, ENOTSUP = 5, 22, 95

_PREFIX = "encrypt."


class Clusters(EncryptedSectors):
    """The host clusters of an encrypted image in plain text: what its extents and allocations name as their host.

    `luks` encrypts a sector by its place in the file, `aes` by its place on the guest's disk. An address here has both.
    """

    driver = "qcow2"
    leaf = True
    key_option = "encrypt.key-secret"

    def __init__(self, image: Qcow2, encryption: Encryption) -> None:
        super().__init__(Options(), OpenFlags())
        self._image = image
        self._encryption = encryption

    @property
    def size(self) -> int:
        return self._image.data_file.size

    def address(self, host_offset: int, guest_offset: int) -> int:
        """Where guest data is here. Addresses follow one another as far as guest and host offsets both do."""
        if self._encryption.volume is not None:
            return host_offset
        return (guest_offset - host_offset << HOST_BITS) + host_offset

    @staticmethod
    def host_offset(address: int) -> int:
        """The place in the file."""
        return address & (1 << HOST_BITS) - 1

    def write_hosted(self, host_offset: int, view: memoryview) -> None:
        self.write_own(host_offset, view)

    def _cipher(self) -> Optional[SectorCipher]:
        return self._encryption.cipher

    def _stored(self, host_offset: int) -> tuple[Node, int, int]:
        place = self.host_offset(host_offset)
        return self._image.data_file, place, (place + (host_offset >> HOST_BITS)) // SECTOR


class Encryption:
    """How an image is encrypted, and with the key, which `cipher` has, its data in plain text."""

    def __init__(self, image: Qcow2, secret: Optional[bytes]) -> None:
        """Read what the header of the image says; with a `secret` find the key. Raises Error in QEMU's words."""
        self._image = image
        self.volume: Optional[Volume] = None
        self.cipher: Optional[SectorCipher] = None
        self._start = self._length = 0
        if image.header.crypt_method == CRYPT_LUKS:
            extension = EncryptionExtension.unpack(image.header.extension(EXT_ENCRYPTION) or b"")
            self._start, self._length = extension.offset, extension.length
            self.volume = Volume.read(self._read)
            if secret is not None:
                self.volume.unlock(self._read, secret)
                self.cipher = self.volume.cipher
        elif secret is not None:
            self.cipher = SectorCipher("aes-128", "cbc", "plain64", None, secret[:AES_KEY].ljust(AES_KEY, b"\0"))
        self.clusters = Clusters(image, self)

    # -- the LUKS header -----------------------------------------------------------------------------------------

    def _place(self, offset: int, length: int) -> int:
        """Where a range of the LUKS header is in the file."""
        if offset + length > self._length:
            raise Corrupt("Request for data outside of extension header", filename=self._image.filename, errno=EINVAL)
        return self._start + offset

    def _read(self, offset: int, length: int) -> bytes:
        place, file = self._place(offset, length), self._image.file
        if place > MAX_OFFSET - length:
            raise Corrupt("Could not read encryption header: Input/output error", filename=self._image.filename, errno=EIO)
        inside = max(0, min(length, file.size - place))
        return (file.pread(place, inside) if inside else b"").ljust(length, b"\0")

    def _write(self, offset: int, data: bytes) -> None:
        place = self._place(offset, len(data))
        self._image.overlap.check(place, len(data), ignore=ENCRYPTION, what="encryption header")
        self._image.file.write_hosted(place, memoryview(data))

    def amend(self, values: Mapping[str, Any], force: bool) -> None:
        """Change key slots as the options encrypt.* say; see keyslots.amend."""
        if self.volume is None:
            raise Unsupported("Only LUKS encryption options can be amended", filename=self._image.filename, errno=ENOTSUP)
        options = LuksAmendOptions.from_mapping({key[len(_PREFIX) :]: value for key, value in values.items()})
        amend(self.volume, options, force, self._read, self._write, self._image.barrier)

    def key_slots(self, secret: SecretRef) -> Optional[list[int]]:
        """See Hooks.key_slots."""
        return None if self.volume is None else self.volume.matching(self._read, passphrase(secret))

    def describe(self) -> dict[str, Any]:
        """What info tells, in QEMU's keys."""
        if self.volume is None:
            return {"format": "aes"}
        return {"format": "luks", **self.volume.describe()}

    # -- the guest's data ----------------------------------------------------------------------------------------

    def extents(self, found: Iterable[Extent]) -> Iterator[Extent]:
        """Extents of the image's tables, with their data in plain text; where that lies is nobody else's affair."""
        for extent in found:
            offset, length, status, _host, host_offset = extent
            if not status & OFFSET_VALID:
                yield extent
            elif status & DATA:
                yield Extent(offset, length, DATA | ALLOCATED, self.clusters, self.clusters.address(host_offset, offset))
            else:
                yield Extent(offset, length, status & (ZERO | ALLOCATED))

    def cover(self, allocs: Sequence[Alloc]) -> list[Alloc]:
        """Allocations in the file as such in plain text."""
        clusters = self.clusters
        return [
            Alloc(alloc.offset, alloc.length, clusters, clusters.address(alloc.host_offset, alloc.offset), alloc.fresh, alloc.token)
            for alloc in allocs
        ]

    def uncover(self, allocs: Sequence[Alloc]) -> list[Alloc]:
        """The inverse of cover."""
        host = self._image.data_file
        return [
            Alloc(alloc.offset, alloc.length, host, self.clusters.host_offset(alloc.host_offset), alloc.fresh, alloc.token) for alloc in allocs
        ]

    def write(self, host_offset: int, guest_offset: int, view: memoryview) -> None:
        """Write guest data, whole sectors, to a place in the file that is known."""
        self.clusters.write_own(self.clusters.address(host_offset, guest_offset), view)


def open_encryption(image: Qcow2, options: Qcow2Options, flags: OpenFlags) -> Encryption:
    """The encryption of an image whose header names some; with its key, unless only metadata will be looked at. Raises Error."""
    secret = None
    if not flags.no_io:
        if options.encrypt_key_secret is None:
            raise OptionError("Parameter 'encrypt.key-secret' is required for cipher", filename=image.filename, errno=EINVAL)
        secret = passphrase(options.encrypt_key_secret)
    return Encryption(image, secret)


# -- making images -------------------------------------------------------------------------------------------------


def check_creation(options: Qcow2CreateOptions) -> None:
    """Refuse options encrypt.* that cannot be, and secrets that cannot be read, in QEMU's words."""
    format = chosen_format(options)
    if format is None:
        return
    if options.encrypt_key_secret is None:
        raise OptionError("Parameter 'encrypt.key-secret' is required for cipher")
    if format == "luks":
        _parameters(options)
    passphrase(options.encrypt_key_secret)


def chosen_format(options: Qcow2CreateOptions) -> Optional[str]:
    """`aes`, `luks` or None. Raises OptionError in QEMU's words for what means nothing."""
    format = options.encrypt_format
    if options.encryption:
        if format is not None:
            raise OptionError("'encrypt.format' and its alias 'encryption' can't be used at the same time")
        format = "aes"
    given = [key[len(_PREFIX) :] for key in options.given() if key.startswith(_PREFIX)]
    if format is None:
        if given:
            raise OptionError("Parameter 'encrypt.format' is missing")
        return None
    if format not in ("aes", "qcow", "luks"):
        raise OptionError("Parameter 'format' does not accept value '%s'" % format)
    if format == "luks":
        _check_names(options)
        return format
    for key in ("cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time"):
        if key in given:
            raise OptionError("Parameter 'encrypt.%s' is unexpected" % key)
    return "aes"


def _check_names(options: Qcow2CreateOptions) -> None:
    for name, value, allowed in (
        ("cipher-alg", options.encrypt_cipher_alg, KNOWN),
        ("cipher-mode", options.encrypt_cipher_mode, MODES),
        ("ivgen-alg", options.encrypt_ivgen_alg, IVGENS),
        ("ivgen-hash-alg", options.encrypt_ivgen_hash_alg, HASHES),
        ("hash-alg", options.encrypt_hash_alg, HASHES),
    ):
        if value is not None and value not in allowed:
            raise OptionError("Parameter '%s' does not accept value '%s'" % (name, value))


def _parameters(options: Qcow2CreateOptions) -> Parameters:
    return Parameters(
        options.encrypt_cipher_alg,
        options.encrypt_cipher_mode,
        options.encrypt_ivgen_alg,
        options.encrypt_ivgen_hash_alg,
        options.encrypt_hash_alg,
        options.encrypt_iter_time,
    )


def header_size(options: Qcow2CreateOptions) -> int:
    """The bytes of the LUKS header of an image made with `options`. Raises OptionError in QEMU's words."""
    _check_names(options)
    if options.encrypt_key_secret is None:
        raise OptionError("Parameter 'encrypt.key-secret' is required for cipher")
    passphrase(options.encrypt_key_secret)
    return _parameters(options).header_size


def set_up(image: Qcow2, options: Qcow2CreateOptions) -> None:
    """Encrypt a new image, which has no data yet: its header names the method once all that belongs to it is written."""
    format, reference = chosen_format(options), options.encrypt_key_secret
    if format is None or reference is None:
        return
    header = image.header
    if format == "luks":
        _write_luks(image, _parameters(options), passphrase(reference))
    header.crypt_method = CRYPT_LUKS if format == "luks" else CRYPT_AES


def _write_luks(image: Qcow2, parameters: Parameters, secret: bytes) -> None:
    size, file = image.cluster_size, image.file
    clusters = -(-parameters.header_size // size)
    start = image.refcounts.allocate_whole(clusters) * size
    file.write_hosted(start, memoryview(bytes(clusters * size)))
    format_luks(parameters, secret, lambda offset, data: file.write_hosted(start + offset, memoryview(data)))
    extension = EncryptionExtension(offset=start, length=parameters.header_size)
    image.header.set_extension(EXT_ENCRYPTION, extension.pack())


__all__ = ["Clusters", "Encryption", "check_creation", "chosen_format", "header_size", "open_encryption", "set_up"]
