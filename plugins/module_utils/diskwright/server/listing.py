# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What another NBD server exports, in the words of `qemu-nbd -L` (https://www.qemu.org/docs/master/tools/qemu-nbd.html)."""

from __future__ import annotations

from time import monotonic
from typing import Any, Iterator, Mapping, Optional

from ..crypto.tls import Credentials
from ..errors import Error
from ..protocols.nbd import codec as nbd
from ..protocols.nbd.address import Address
from ..protocols.nbd.codec_client import Answer, BlockSize, ClientCodec, Context, Export, Greeting, Listed, Text
from ..protocols.nbd.connection import Channel

SECONDS = 30  # for all of it
MAX_LISTED = 4096
_FLAGS = (
    (nbd.READ_ONLY, "readonly"),
    (nbd.SEND_FLUSH, "flush"),
    (nbd.SEND_FUA, "fua"),
    (nbd.ROTATIONAL, "rotational"),
    (nbd.SEND_TRIM, "trim"),
    (nbd.SEND_WRITE_ZEROES, "zeroes"),
    (nbd.SEND_DF, "df"),
    (nbd.CAN_MULTI_CONN, "multi"),
    (nbd.SEND_RESIZE, "resize"),
    (nbd.SEND_CACHE, "cache"),
    (nbd.SEND_FAST_ZERO, "fast-zero"),
    (nbd.BLOCK_STAT_PAYLOAD, "block-status-payload"),
)


class Dialogue:
    """The options of one connection, one after the other."""

    def __init__(self, address: Mapping[str, Any], tls: Optional[Credentials], hostname: Optional[str]) -> None:
        self._deadline = monotonic() + SECONDS
        place = Address(address)
        self._channel: Any = Channel(place.connect(self._deadline))
        self._codec = ClientCodec()
        self._buffer = memoryview(bytearray(65536))
        if not isinstance(self._event(), Greeting):
            raise Error("Server does not support export lists")
        self._channel.send(self._codec.client_flags())
        if tls is not None:
            if not self.ask(self._codec.start_tls())[0].accepted:
                raise Error("Server don't support STARTTLS option")
            self._channel = tls.wrap(self._channel, self._deadline, hostname or place.host)

    def _event(self) -> Any:
        while True:
            event = self._codec.next_event()
            if event is not None:
                return event
            self._channel.set_timeout(max(self._deadline - monotonic(), 0.001))
            count = self._channel.receive_into(self._buffer)
            if not count:
                raise Error("Unexpected end-of-file before all data were read")
            self._codec.receive(self._buffer[:count])

    def ask(self, data: bytes) -> tuple[Answer, list[Any]]:
        """Send an option: the last answer, and what came before it."""
        self._channel.send(data)
        told: list[Any] = []
        while True:
            event = self._event()
            if isinstance(event, Answer):
                return event, told
            told.append(event)

    def exports(self) -> Iterator[str]:
        """The lines about all exports."""
        codec = self._codec
        extended = self.ask(codec.extended_headers())[0].accepted
        structured = extended or self.ask(codec.structured_reply())[0].accepted
        answer, told = self.ask(codec.list_exports())
        if not answer.accepted:
            raise Error("Failed to list exports: %s" % (answer.text or "the server refuses"))
        listed = [event for event in told if isinstance(event, Listed)][:MAX_LISTED]
        yield "exports available: %d" % len(listed)
        for export in listed:
            yield " export: '%s'" % export.name
            wanted = [nbd.INFO_NAME, nbd.INFO_DESCRIPTION, nbd.INFO_BLOCK_SIZE]
            yield from _about(export, self.ask(codec.info(export.name, wanted))[1])
            if structured:
                yield "  transaction size: %d-bit" % (64 if extended else 32)
                answer, told = self.ask(codec.list_meta_context(export.name))
                names = [event.name for event in told if isinstance(event, Context)]
                if names:
                    yield "  available meta contexts: %d" % len(names)
                    yield from ("   " + name for name in names)

    def close(self) -> None:
        """Leave."""
        self._channel.close()


def _about(export: Listed, told: list[Any]) -> Iterator[str]:
    description = next((event.text for event in told if isinstance(event, Text) and event.kind == nbd.INFO_DESCRIPTION), export.description)
    if description:
        yield "  description: %s" % description
    for event in told:
        if isinstance(event, Export):
            yield "  size:  %d" % event.size
            words = [word for bit, word in _FLAGS if event.flags & bit]
            yield "  flags: 0x%x (%s )" % (event.flags, "".join(" " + word for word in words))
    for event in told:
        if isinstance(event, BlockSize):
            yield "  min block: %d" % event.minimum
            yield "  opt block: %d" % event.preferred
            yield "  max block: %d" % event.maximum


def exports_of(address: Mapping[str, Any], tls: Any, objects: Mapping[str, Any], hostname: Optional[str]) -> Iterator[str]:
    """Lines about the exports of the server at a SocketAddress; `tls` is the object of the credentials. Raises Error, OSError."""
    dialogue = Dialogue(address, Credentials(objects, tls.id, "client") if tls is not None else None, hostname)
    try:
        yield from dialogue.exports()
    finally:
        dialogue.close()
