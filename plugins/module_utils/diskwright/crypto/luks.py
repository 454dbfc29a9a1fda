# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""LUKS volumes, version 1 (https://gitlab.com/cryptsetup/cryptsetup/-/wikis/Specification): header, key slots, master key.

A volume's header lies at the beginning of some range of bytes: a file, or clusters of a qcow2 image. Whoever owns the range
gives the functions that read and write it.
"""

from __future__ import annotations

import os

from ..errors import Corrupt, Error, OptionError, Unsupported, WrongFormat
from ..ondisk import Struct
from . import antiforensic
from .ciphers import ALGORITHMS, IVGENS, KNOWN, MODES, SECTOR, SectorCipher, algorithm, check
from .hashes import HASHES, digest, iterations_for, pbkdf2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

    from ..ondisk import u16, u32

    Read = Callable[[int, int], bytes]  # offset, length -> so many bytes, zeroes beyond the end
    Write = Callable[[int, bytes], None]

bytes6 = bytes
bytes20 = bytes
bytes32 = bytes
bytes40 = bytes

MAGIC = b"LUKS\xba\xbe"
ACTIVE = 0x00AC71F3
INACTIVE = 0x0000DEAD
SLOTS = 8
STRIPES = 4000
SALT = 32  # bytes
DIGEST = 20  # bytes of the master key's digest
SLOT_ALIGNMENT = 4096  # bytes; so does cryptsetup
LEAST_ITERATIONS = 1000
MAX_KEY_SIZE = 64  # bytes of a master key
MAX_ITERATIONS = (1 << 32) - 1  # for one key slot or digest; see `limit_iterations`

_iterations_limit = MAX_ITERATIONS
_opened: dict[bytes, bytes] = {}  # the volume made last: what it was opened with -> its master key


def limit_iterations(count: int) -> int:
    """Refuse, from now on, key slots that would take more than `count` iterations of PBKDF2 to try; the limit until now."""
    global _iterations_limit
    before, _iterations_limit = _iterations_limit, count
    return before


class LuksHeader(Struct):
    """struct luks_phdr without its key slots; the payload offset counts sectors."""

    magic: bytes6
    version: u16
    cipher_name: bytes32
    cipher_mode: bytes32
    hash_spec: bytes32
    payload_offset_sectors: u32
    key_bytes: u32
    mk_digest: bytes20
    mk_digest_salt: bytes32
    mk_digest_iterations: u32
    uuid: bytes40


class KeySlot(Struct):
    """struct luks_key_slot; `material_offset_sectors` counts sectors from the header on."""

    active: u32
    iterations: u32
    salt: bytes32
    material_offset_sectors: u32
    stripes: u32


HEADER_SIZE = LuksHeader.SIZE + SLOTS * KeySlot.SIZE


class Parameters:
    """What a volume is to be encrypted with, checked and complete; the names are QEMU's, `iter_time` is in milliseconds."""

    __slots__ = ("cipher_alg", "cipher_mode", "ivgen_alg", "ivgen_hash_alg", "hash_alg", "iter_time")

    def __init__(
        self,
        cipher_alg: Optional[str] = None,
        cipher_mode: Optional[str] = None,
        ivgen_alg: Optional[str] = None,
        ivgen_hash_alg: Optional[str] = None,
        hash_alg: Optional[str] = None,
        iter_time: Optional[int] = None,
    ) -> None:
        """Raises OptionError for what LUKS cannot have, or does not go together."""
        self.cipher_alg = cipher_alg or "aes-256"
        self.cipher_mode = cipher_mode or "xts"
        self.ivgen_alg = ivgen_alg or "plain64"
        self.ivgen_hash_alg = ivgen_hash_alg or ("sha256" if self.ivgen_alg == "essiv" else None)
        self.hash_alg = hash_alg or "sha256"
        self.iter_time = 2000 if iter_time is None else iter_time
        if self.cipher_alg in KNOWN and self.cipher_alg not in ALGORITHMS:
            raise OptionError("Algorithm '%s' not supported" % self.cipher_alg)
        check(self.cipher_alg, self.cipher_mode, self.ivgen_alg, self.ivgen_hash_alg)

    @property
    def key_size(self) -> int:
        """Bytes of a master key."""
        return ALGORITHMS[self.cipher_alg][1] * (2 if self.cipher_mode == "xts" else 1)

    @property
    def slot_size(self) -> int:
        """Bytes from one key slot's material to the next one's."""
        return -(-_material_size(self.key_size) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    @property
    def header_size(self) -> int:
        """Bytes before the payload: header and key material."""
        return SLOT_ALIGNMENT + SLOTS * self.slot_size


class Volume:
    """A LUKS volume: its header, and, once it is unlocked, its cipher."""

    def __init__(self, header: LuksHeader, slots: list[KeySlot], detached: bool) -> None:
        """Check and take a header. Raises WrongFormat, Corrupt, Unsupported."""
        self.header = header
        self.slots = slots
        self.detached = detached
        self._check_texts()
        self._check_layout()
        cipher = _text(header.cipher_name)
        mode, dash, iv = _text(header.cipher_mode).partition("-")
        if not dash:
            raise Corrupt("Unexpected cipher mode string format '%s'" % mode)
        self.hash_alg = _known(_text(header.hash_spec), HASHES, "Hash algorithm")
        self.cipher_mode = _known(mode, MODES, "Cipher mode")
        key_size = header.key_bytes // 2 if mode == "xts" else header.key_bytes
        name = algorithm(cipher, key_size)
        ivgen, colon, ivgen_hash = iv.partition(":")
        self.ivgen_hash_alg = _known(ivgen_hash, HASHES, "Hash algorithm") if colon else None
        self.ivgen_alg = _known(ivgen, IVGENS, "IV generator")
        if name is None or ivgen == "essiv" and not colon:
            raise Unsupported("Algorithm '%s' with key size %d bytes not supported" % (cipher, key_size))
        self.cipher_alg = name
        check(name, mode, ivgen, self.ivgen_hash_alg)
        self._master_key: Optional[bytes] = None
        self.cipher: Optional[SectorCipher] = None

    def __repr__(self) -> str:
        return "Volume(%s)" % _text(self.header.uuid)  # not the key

    # -- the header ----------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, read: Read, detached: bool = False) -> Volume:
        """Read a header at offset 0. Raises WrongFormat, Corrupt, Unsupported, OSError."""
        data = read(0, HEADER_SIZE)
        header = LuksHeader.unpack(data)
        if header.magic != MAGIC:
            raise WrongFormat("Volume is not in LUKS format")
        if header.version != 1:
            raise Unsupported("LUKS version %d is not supported" % header.version)
        slots = [KeySlot.unpack(data, LuksHeader.SIZE + index * KeySlot.SIZE) for index in range(SLOTS)]
        return cls(header, slots, detached)

    def pack(self) -> bytes:
        """The header as it is stored."""
        return self.header.pack() + b"".join([slot.pack() for slot in self.slots])

    @property
    def payload_offset(self) -> int:
        """Where the encrypted data begins, in bytes; 0 where the header is detached from it."""
        return self.header.payload_offset_sectors * SECTOR

    def _check_texts(self) -> None:
        for value, what in (
            (self.header.cipher_name, "cipher name"),
            (self.header.cipher_mode, "cipher mode"),
            (self.header.hash_spec, "hash spec"),
        ):
            if b"\0" not in value:
                raise Corrupt("LUKS header %s is not NUL terminated" % what)

    def _check_layout(self) -> None:
        """That the parts of the header overlap neither one another nor the payload."""
        header = self.header
        payload = header.payload_offset_sectors
        first = -(-HEADER_SIZE // SECTOR)
        if not (self.detached and payload == 0) and payload < first:
            raise Corrupt("LUKS payload is overlapping with the header")
        if not header.mk_digest_iterations:
            raise Corrupt("LUKS key iteration count is zero")
        length = -(-_material_size(header.key_bytes) // SECTOR)
        starts = [slot.material_offset_sectors for slot in self.slots]
        for index, (slot, start) in enumerate(zip(self.slots, starts)):
            if slot.stripes != STRIPES:
                stripes = slot.stripes - (1 << 32) if slot.stripes >> 31 else slot.stripes
                raise Corrupt("Keyslot %d is corrupted (stripes %d != %d)" % (index, stripes, STRIPES))
            if start < first:
                raise Corrupt("Keyslot %d is overlapping with the LUKS header" % index)
            if slot.active not in (ACTIVE, INACTIVE):
                raise Corrupt("Keyslot %d state (active/disable) is corrupted" % index)
            if slot.active == ACTIVE and not slot.iterations:
                raise Corrupt("Keyslot %d iteration count is zero" % index)
            if payload and start + length > payload:
                raise Corrupt("Keyslot %d is overlapping with the encrypted payload" % index)
            for other in range(index + 1, SLOTS):
                if start < starts[other] + length and starts[other] < start + length:
                    raise Corrupt("Keyslots %d and %d are overlapping in the header" % (index, other))

    # -- keys ----------------------------------------------------------------------------------------------------

    def unlock(self, read: Read, passphrase: bytes) -> None:
        """Find the master key with `passphrase`. Raises Error where it opens no key slot, OSError."""
        key = _opened.get(_fingerprint(self.pack(), passphrase))
        if key is None:
            for index, slot in enumerate(self.slots):
                if slot.active == ACTIVE:
                    key = self._try(index, read, passphrase)
                    if key is not None:
                        break
        if key is None:
            raise Error("Invalid password, cannot unlock any keyslot", errno=1)
        self._use(key)

    def _use(self, key: bytes) -> None:
        self._master_key = key
        self.cipher = self._sector_cipher(key)

    def _sector_cipher(self, key: bytes) -> SectorCipher:
        return SectorCipher(self.cipher_alg, self.cipher_mode, self.ivgen_alg, self.ivgen_hash_alg, key)

    def _try(self, index: int, read: Read, passphrase: bytes) -> Optional[bytes]:
        """The master key by one key slot; None for a passphrase that is not this slot's."""
        slot = self.slots[index]
        size = self.header.key_bytes
        self._within_limit(slot.iterations, "Keyslot %d" % index)
        self._within_limit(self.header.mk_digest_iterations, "The master key's digest")
        stored = bytearray(read(slot.material_offset_sectors * SECTOR, _material_size(size)))
        derived = pbkdf2(self.hash_alg, passphrase, slot.salt, slot.iterations, size)
        self._sector_cipher(derived).decrypt(0, stored)
        key = antiforensic.merge(bytes(stored[: size * STRIPES]), STRIPES, self.hash_alg)
        return key if self._digest(key) == self.header.mk_digest else None

    def _digest(self, key: bytes) -> bytes:
        header = self.header
        return pbkdf2(self.hash_alg, key, header.mk_digest_salt, header.mk_digest_iterations, DIGEST)

    @staticmethod
    def _within_limit(iterations: int, what: str) -> None:
        if iterations > _iterations_limit:
            raise Unsupported("%s takes %d iterations; the limit is %d" % (what, iterations, _iterations_limit))

    def matching(self, read: Read, passphrase: bytes) -> list[int]:
        """The numbers of the key slots that `passphrase` opens."""
        return [index for index, slot in enumerate(self.slots) if slot.active == ACTIVE and self._try(index, read, passphrase) is not None]

    def active(self) -> list[int]:
        """The numbers of the key slots in use."""
        return [index for index, slot in enumerate(self.slots) if slot.active == ACTIVE]

    def prepare_slot(self, index: int, passphrase: bytes, iter_time: int) -> tuple[int, bytes]:
        """Give key slot `index` a passphrase: what is to be written, and where, before the header is.

        The volume must be unlocked. `iter_time` is in milliseconds. Raises Error.
        """
        if self._master_key is None:
            raise Error("Parameter 'key-secret' is required for cipher")
        size = self.header.key_bytes
        slot = self.slots[index]
        iterations = max(LEAST_ITERATIONS, iterations_for(self.hash_alg, size, iter_time))
        salt = os.urandom(SALT)
        derived = pbkdf2(self.hash_alg, passphrase, salt, iterations, size)
        material = bytearray(antiforensic.split(self._master_key, STRIPES, self.hash_alg).ljust(_material_size(size), b"\0"))
        self._sector_cipher(derived).encrypt(0, material)
        slot.active, slot.iterations, slot.salt = ACTIVE, iterations, salt
        return slot.material_offset_sectors * SECTOR, bytes(material)

    def exchange_material(self, index: int, other: int) -> tuple[int, bytes]:
        """Let two key slots change places: where the first one's material was, and what to overwrite it with after the header is."""
        first, second = self.slots[index], self.slots[other]
        offset = first.material_offset_sectors
        first.material_offset_sectors, second.material_offset_sectors = second.material_offset_sectors, offset
        return offset * SECTOR, os.urandom(_material_size(self.header.key_bytes))

    def clear_slot(self, index: int) -> tuple[int, bytes]:
        """Take key slot `index` out of use: what is to be written, and where, after the header is."""
        slot = self.slots[index]
        slot.active, slot.iterations, slot.salt = INACTIVE, 0, bytes(SALT)
        return slot.material_offset_sectors * SECTOR, os.urandom(_material_size(self.header.key_bytes))

    def describe(self) -> dict[str, Any]:
        """What info tells of the volume, in QEMU's keys."""
        slots = []
        for slot in self.slots:
            entry: dict[str, Any] = {"active": slot.active == ACTIVE, "key-offset": slot.material_offset_sectors * SECTOR}
            if slot.active == ACTIVE:
                entry["iters"] = slot.iterations
                entry["stripes"] = slot.stripes
            slots.append(entry)
        values: dict[str, Any] = {
            "cipher-alg": self.cipher_alg,
            "cipher-mode": self.cipher_mode,
            "ivgen-alg": self.ivgen_alg,
            "hash-alg": self.hash_alg,
            "payload-offset": self.payload_offset,
            "master-key-iters": self.header.mk_digest_iterations,
            "uuid": _text(self.header.uuid),
            "detached-header": self.detached,
            "slots": slots,
        }
        if self.ivgen_alg == "essiv":
            values["ivgen-hash-alg"] = self.ivgen_hash_alg
        return values


def format_luks(parameters: Parameters, passphrase: bytes, write: Write, detached: bool = False) -> Volume:
    """Make a volume: write its header and the material of key slot 0. The volume comes unlocked. Raises Error, OSError."""
    size = parameters.key_size
    key = os.urandom(size)
    salt = os.urandom(SALT)
    # An eighth of the time that a key slot takes, as cryptsetup has it.
    iterations = iterations_for(parameters.hash_alg, DIGEST, parameters.iter_time) // 8
    header = LuksHeader(
        magic=MAGIC,
        version=1,
        cipher_name=_field(ALGORITHMS[parameters.cipher_alg][0], 32),
        cipher_mode=_field(_mode_text(parameters), 32),
        hash_spec=_field(parameters.hash_alg, 32),
        payload_offset_sectors=0 if detached else parameters.header_size // SECTOR,
        key_bytes=size,
        mk_digest=bytes(DIGEST),
        mk_digest_salt=salt,
        mk_digest_iterations=max(LEAST_ITERATIONS, iterations),
        uuid=_field(_uuid(), 40),
    )
    slots = [
        KeySlot(
            active=INACTIVE,
            iterations=0,
            salt=bytes(SALT),
            material_offset_sectors=(SLOT_ALIGNMENT + index * parameters.slot_size) // SECTOR,
            stripes=STRIPES,
        )
        for index in range(SLOTS)
    ]
    volume = Volume(header, slots, detached)
    volume._use(key)
    header.mk_digest = volume._digest(key)
    offset, material = volume.prepare_slot(0, passphrase, parameters.iter_time)
    write(offset, material)
    packed = volume.pack()
    write(0, packed)
    # Whoever made a volume opens it next: that need not take the time of a stranger who tries passphrases.
    _opened.clear()
    _opened[_fingerprint(packed, passphrase)] = key
    return volume


def _mode_text(parameters: Parameters) -> str:
    text = "%s-%s" % (parameters.cipher_mode, parameters.ivgen_alg)
    return text + ":" + parameters.ivgen_hash_alg if parameters.ivgen_hash_alg else text


def _uuid() -> str:
    from uuid import uuid4

    return str(uuid4())


def _fingerprint(header: bytes, passphrase: bytes) -> bytes:
    return digest("sha256", header + passphrase)


def _material_size(key_size: int) -> int:
    """Bytes of a key in stripes, as whole sectors."""
    return -(-key_size * STRIPES // SECTOR) * SECTOR


def _field(text: str, size: int) -> bytes:
    return text.encode("ascii").ljust(size, b"\0")


def _text(value: bytes) -> str:
    return value.partition(b"\0")[0].decode("ascii", "backslashreplace")


def _known(name: str, names: Any, what: str) -> str:
    if name not in names:
        raise Unsupported("%s '%s' not supported" % (what, name))
    return name


__all__ = [
    "HEADER_SIZE",
    "SLOTS",
    "KeySlot",
    "LuksHeader",
    "Parameters",
    "Volume",
    "format_luks",
    "limit_iterations",
]
