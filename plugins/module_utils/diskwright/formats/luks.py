# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""luks: a disk encrypted as a LUKS volume, version 1 (https://gitlab.com/cryptsetup/cryptsetup/-/wikis/Specification).

The header may be in a node of its own. All of the disk is encrypted, sector by sector, so this node hosts its own bytes.
"""

from __future__ import annotations

import errno

from ..crypto.ciphers import IVGENS, KNOWN, MODES, SECTOR
from ..crypto.hashes import HASHES
from ..crypto.keyslots import LuksAmendOptions
from ..crypto.luks import MAGIC, Parameters, Volume, format_luks
from ..crypto.secrets import passphrase
from ..encrypted import EncryptedSectors
from ..errors import Corrupt, Error, OptionError
from ..extent import ALLOCATED, DATA, Extent
from ..node import Alloc, Format, Measure, OpenFlags
from ..options import Options, SecretRef, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Optional

    from ..crypto.ciphers import SectorCipher
    from ..node import Node
    from ..options import NodeRef

MAX_LENGTH = (1 << 63) - (1 << 30)  # bytes of a file, as far as QEMU goes


class LuksOptions(Options):
    """Runtime options of luks."""

    header: Optional[NodeRef] = opt(None, help="the node that holds the header, if it is detached")
    file: NodeRef = opt(help="the node that holds the encrypted bytes, behind the header if there is no other node for it")
    key_secret: Optional[SecretRef] = opt(None, help="the id of the secret object with the passphrase")


class LuksCreateOptions(Options):
    """Creation options of luks."""

    size: Size = opt(0, help="size of the disk")
    key_secret: Optional[SecretRef] = opt(None, help="id of the secret object with the passphrase")
    cipher_alg: Optional[str] = opt(None, help="cipher and length of its key (default: aes-256)", choices=KNOWN)
    cipher_mode: Optional[str] = opt(None, help="how blocks are chained: xts (default), cbc, ctr, ecb", choices=MODES)
    ivgen_alg: Optional[str] = opt(None, help="what makes the IV of a sector: plain64 (default), plain, essiv", choices=IVGENS)
    ivgen_hash_alg: Optional[str] = opt(None, help="hash for essiv (default: sha256)", choices=tuple(HASHES))
    hash_alg: Optional[str] = opt(None, help="hash for key derivation (default: sha256)", choices=tuple(HASHES))
    iter_time: Optional[int] = opt(None, help="milliseconds that trying a passphrase takes (default: 2000)")
    detached_header: bool = opt(False, help="write only the header; the disk is another file")
    preallocation: str = opt("off", help="how space is taken for the disk", choices=("off", "metadata", "falloc", "full"), hidden=True)


class Luks(EncryptedSectors, Format):
    """A LUKS volume."""

    driver = "luks"
    options_class = LuksOptions
    create_options = LuksCreateOptions
    amend_options = LuksAmendOptions
    creatable = True
    strong_options = ("key-secret",)
    encrypted = True

    def __init__(self, options: LuksOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        self._holder = self.children.get("header", self.file)
        secret = None if flags.no_io else _passphrase(options.key_secret)
        self.volume = Volume.read(self._read_header, detached="header" in self.children)
        if secret is not None:
            self.volume.unlock(self._read_header, secret)
        self._start = self.volume.payload_offset
        self._size = -(-self.file.size // SECTOR) * SECTOR - self._start
        if self._size < 0:
            raise Corrupt("Could not refresh total sector count: Input/output error", errno=errno.EIO)

    def _read_header(self, offset: int, length: int) -> bytes:
        inside = max(0, min(length, self._holder.size - offset))
        return (self._holder.pread(offset, inside) if inside else b"").ljust(length, b"\0")

    def _write_header(self, offset: int, data: bytes) -> None:
        self._holder.write_hosted(offset, memoryview(data))

    def _cipher(self) -> Optional[SectorCipher]:
        return self.volume.cipher

    def _stored(self, host_offset: int) -> tuple[Node, int, int]:
        return self.file, self._start + host_offset, host_offset // SECTOR

    # -- the disk ------------------------------------------------------------------------------------------------

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, DATA | ALLOCATED, self, offset),)

    def _alloc(self, offset: int, length: int) -> list[Alloc]:
        return [Alloc(offset, length, self, offset)]

    def _truncate(self, size: int, preallocation: str) -> None:
        if size > MAX_LENGTH - self._start:
            raise Error("offset(%d) exceeds maximum(%d)" % (size, MAX_LENGTH), filename=self.filename)
        self.file.truncate(self._start + size, preallocation)
        self._size = -(-size // SECTOR) * SECTOR

    # -- metadata ------------------------------------------------------------------------------------------------

    def format_specific(self) -> Optional[dict[str, Any]]:
        return self.volume.describe()

    def key_slots(self, secret: SecretRef) -> list[int]:
        return self.volume.matching(self._read_header, passphrase(secret))

    def _amend(self, options: Any, force: bool, progress: Optional[Callable[[int, int], None]] = None) -> None:
        from ..crypto.keyslots import amend

        amend(self.volume, options, force, self._read_header, self._write_header, self._holder.flush)

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head[:8] == MAGIC + b"\0\1" else 0

    @classmethod
    def create(cls, file: Node, options: Any) -> None:
        """See Hooks.create. With `detached_header` only the header is written: its disk is another file."""
        secret = _passphrase(options.key_secret)
        parameters = _parameters(options)
        if options.size > MAX_LENGTH - parameters.header_size:
            raise Error("The requested file size is too large")
        preallocation = "off" if options.preallocation == "metadata" else options.preallocation
        size = 0 if options.detached_header else options.size
        file.truncate(parameters.header_size + size, preallocation, exact=False)
        format_luks(parameters, secret, lambda offset, data: file.write_hosted(offset, memoryview(data)), options.detached_header)

    @classmethod
    def measure(cls, options: Any, source: Optional[Node]) -> Measure:
        _passphrase(options.key_secret)
        parameters = _parameters(options)
        size = source.size if source is not None else options.size
        total = parameters.header_size + (0 if options.detached_header else size)
        return Measure(total, total)


def _passphrase(ref: Optional[SecretRef]) -> bytes:
    if ref is None:
        raise OptionError("Parameter 'key-secret' is required for cipher")
    return passphrase(ref)


def _parameters(options: Any) -> Parameters:
    return Parameters(
        options.cipher_alg,
        options.cipher_mode,
        options.ivgen_alg,
        options.ivgen_hash_alg,
        options.hash_alg,
        options.iter_time,
    )
