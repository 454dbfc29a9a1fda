# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Encryption: AES with the password as its key, sector by sector by their place on the disk
(https://www.qemu.org/docs/master/system/secrets.html). Tables and compressed clusters are not encrypted."""

from __future__ import annotations

from ...crypto.ciphers import SECTOR, SectorCipher
from ...crypto.secrets import passphrase
from ...encrypted import EncryptedSectors
from ...errors import OptionError
from ...node import OpenFlags
from ...options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from ...node import Node
    from .header import QcowOptions

KEY = 16  # bytes of the password that are used
HOST_BITS = 64


class Clusters(EncryptedSectors):
    """The clusters of an encrypted image in plain text: what its extents and allocations name as their host.

    An address here has both the place in the file and the one on the disk, which decides how a sector is encrypted.
    """

    driver = "qcow"
    leaf = True

    def __init__(self, file: Node, cipher: Optional[SectorCipher]) -> None:
        super().__init__(Options(), OpenFlags())
        self._file = file
        self._sectors = cipher

    @property
    def size(self) -> int:
        return self._file.size

    @staticmethod
    def address(host_offset: int, guest_offset: int) -> int:
        """Where guest data is here. Addresses follow one another as far as guest and host offsets both do."""
        return (guest_offset - host_offset << HOST_BITS) + host_offset

    @staticmethod
    def host_offset(address: int) -> int:
        """The place in the file."""
        return address & (1 << HOST_BITS) - 1

    def write_hosted(self, host_offset: int, view: memoryview) -> None:
        self.write_own(host_offset, view)

    def _cipher(self) -> Optional[SectorCipher]:
        return self._sectors

    def _stored(self, host_offset: int) -> tuple[Node, int, int]:
        place = self.host_offset(host_offset)
        return self._file, place, (place + (host_offset >> HOST_BITS)) // SECTOR


def open_clusters(file: Node, options: QcowOptions, flags: OpenFlags) -> Clusters:
    """The clusters of an encrypted image; with the key, unless only metadata will be looked at. Raises OptionError, Error."""
    if flags.no_io:
        return Clusters(file, None)
    if options.encrypt_key_secret is None:
        raise OptionError("Parameter 'encrypt.key-secret' is required for cipher")
    secret = passphrase(options.encrypt_key_secret)
    return Clusters(file, SectorCipher("aes-128", "cbc", "plain64", None, secret[:KEY].ljust(KEY, b"\0")))
