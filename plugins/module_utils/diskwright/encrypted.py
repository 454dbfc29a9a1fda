# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Nodes whose bytes are stored encrypted in another node, sector by sector (https://gitlab.com/cryptsetup/cryptsetup/-/wikis/Specification)."""

from __future__ import annotations

from .crypto.ciphers import SECTOR
from .errors import Error
from .node import CHUNK, Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    from .crypto.ciphers import SectorCipher


class EncryptedSectors(Node):
    """A node that hosts sectors in plain text; `_cipher` and `_stored` say how and where they are stored."""

    request_alignment = SECTOR
    key_option = "key-secret"  # what names the passphrase

    def _cipher(self) -> Optional[SectorCipher]:
        """What the sectors are encrypted with; None where the image was opened for its metadata only."""
        raise NotImplementedError(self.driver)

    def _stored(self, host_offset: int) -> tuple[Node, int, int]:
        """The node that stores the sector at `host_offset`, where it does so, and the number that the sector has for the cipher."""
        raise NotImplementedError(self.driver)

    def _key(self) -> SectorCipher:
        cipher = self._cipher()
        if cipher is None:
            raise Error("Parameter '%s' is required for cipher" % self.key_option, filename=self.filename)
        return cipher

    def read_own(self, host_offset: int, view: memoryview) -> None:
        """See Node.read_own; whole sectors are decrypted where they are wanted."""
        if (host_offset | len(view)) % SECTOR:
            super().read_own(host_offset, view)
        else:
            self._pread_into(host_offset, view)

    def write_own(self, host_offset: int, view: memoryview) -> None:
        """See Node.write_own; whole sectors need not be read before."""
        if (host_offset | len(view)) % SECTOR:
            super().write_own(host_offset, view)
            return
        entry = self.serialise(host_offset, len(view), SECTOR)
        try:
            self._pwrite(host_offset, view)
        finally:
            self.release(entry)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        cipher = self._key()
        node, place, sector = self._stored(host_offset)
        inside = max(0, min(len(view), node.size - place))
        if inside:
            node.pread_into(place, view[:inside])
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)  # what is not there was never encrypted, but who knows
        cipher.decrypt(sector, view)

    def _pwrite(self, host_offset: int, view: memoryview) -> None:
        cipher = self._key()
        node, place, sector = self._stored(host_offset)
        for position in range(0, len(view), CHUNK):
            stored = bytearray(view[position : position + CHUNK])
            cipher.encrypt(sector + position // SECTOR, stored)
            node.write_hosted(place + position, memoryview(stored))
