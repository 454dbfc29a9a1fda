# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""One client: the negotiation, and the threads that do what it asks for (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).

One thread receives, does and answers request after request. Only where storage turns out to be slow does it let another thread
go on with the next request meanwhile, up to MAX_IN_FLIGHT.
"""

from __future__ import annotations

from threading import Lock, Thread
from time import monotonic

from ..errors import Error, ProtocolError
from ..protocols.nbd import codec as nbd
from ..protocols.nbd.codec_server import Option, Request, ServerCodec
from .contexts import matches
from .stream import Disconnected, Stream, TlsStream
from .transmission import Transmission

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

    from .exports import Export
    from .server import NbdServer

MAX_IN_FLIGHT = 16  # requests of one client that are under way
SPARE = 2  # threads of one client that wait for its next request; more end
MAX_OPTIONS = 1024  # of one client before it gets to requests
RECEIVE = 4096  # bytes at a time where no payload is expected: some headers in one go, and little to be copied of a payload


class Connection:
    """One client of `server`. `peer` is what it is called in messages."""

    def __init__(self, server: NbdServer, stream: Stream, peer: str) -> None:
        self.server = server
        self.peer = peer
        self.stream = stream
        self.export: Optional[Export] = None
        self._codec = ServerCodec(tls=server.tls is not None)
        self._transmission: Optional[Transmission] = None
        self._heads = memoryview(bytearray(RECEIVE))
        self._receiving = Lock()  # held by the thread that is next to receive a request
        self._counting = Lock()
        self._threads = 1
        self._idle = 0  # threads that wait for _receiving
        self._over = False
        self._stopping = False

    # -- from other threads --------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Disconnect the client once what it has under way is done."""
        self._stopping = True
        self.stream.end_receiving()

    def shut(self) -> None:
        """Disconnect the client now."""
        self._stopping = True
        self.stream.shut()

    # -- the client's threads ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve the client until it has gone; for a thread of its own."""
        reason = ""
        try:
            self.stream.limit(self.server.handshake_seconds)
            if self._negotiate():
                self.stream.limit(0)
                self._work()
        except BaseException as exc:
            self._over = True
            if not isinstance(exc, (Disconnected, Error, OSError)):
                raise
            reason = str(exc)
        finally:
            self._leave(reason)

    def _leave(self, reason: str) -> None:
        """One of the client's threads ends; the last one closes the connection."""
        with self._counting:
            self._threads -= 1
            last = not self._threads
        if not last:
            if self._over:
                self.stream.end_receiving()
            return
        self.stream.close()
        if self.export is not None:
            self.export.leave(self)
        self.server.gone(self, reason)

    def _work(self) -> None:
        """Receive requests and do them, in turns with the other threads of this client."""
        transmission = self._transmission
        if transmission is None:
            return
        buffer = transmission.buffer()
        while True:
            with self._counting:
                self._idle += 1
            with self._receiving:
                with self._counting:
                    self._idle -= 1
                while True:
                    if self._over or self._stopping:
                        transmission.flush()
                        return
                    request = self._next_event()
                    if request is None or request.command == nbd.CMD_DISC and not request.error:
                        self._over = True
                        transmission.flush()
                        return
                    buffer = buffer.fitting(request)
                    whole = transmission.take_payload(request, buffer)
                    if whole and transmission.overlaps(request) and self._another():
                        break
                    transmission.do(request, buffer)
            transmission.do(request, buffer)
            if self._idle > SPARE:
                return

    def _another(self) -> bool:
        """Whether another thread receives requests once _receiving is free; one is started if need be."""
        with self._counting:
            if self._idle:
                return True
            if self._threads >= MAX_IN_FLIGHT or not self.server.threads.acquire(blocking=False):
                return False
            self._threads += 1
        try:
            Thread(target=self._run_another, name="nbd %s" % self.peer, daemon=True).start()
        except RuntimeError:  # the system has no more threads
            self.server.threads.release()
            with self._counting:
                self._threads -= 1
            return False
        return True

    def _run_another(self) -> None:
        reason = ""
        try:
            self._work()
        except BaseException as exc:
            self._over = True
            if not isinstance(exc, (Disconnected, Error, OSError)):
                raise
            reason = str(exc)
        finally:
            self.server.threads.release()
            self._leave(reason)

    def _next_event(self) -> Any:
        """What the client says next; None at the end of the connection. Raises ProtocolError, Disconnected."""
        codec = self._codec
        while True:
            try:
                event = codec.next_event()
            except ProtocolError:
                self._settle()
                raise
            if event is not None:
                return event
            self._settle()
            count = self.stream.receive_into(self._heads)
            if not count:
                if codec.buffered and not self._stopping:
                    raise Disconnected("the connection ended within a message")
                return None
            codec.receive(self._heads[:count])

    def _settle(self) -> None:
        """Let nothing wait that is ready for the client."""
        if self._transmission is not None:
            self._transmission.flush()

    # -- the negotiation -----------------------------------------------------------------------------------------

    def _negotiate(self) -> bool:
        """All up to the first request; False if the client leaves before that."""
        codec = self._codec
        self.stream.send(codec.greeting())
        for _number in range(MAX_OPTIONS):
            option = self._next_event()
            if option is None:
                return False
            if option.error:
                self.stream.send(codec.refuse(option))
            elif option.option == nbd.OPT_ABORT:
                self.stream.send(codec.accept(option))
                return False
            elif option.option in (nbd.OPT_GO, nbd.OPT_INFO):
                self._tell(option)
            elif option.option == nbd.OPT_EXPORT_NAME:
                self._begin_by_name(option)
            else:
                self._answer(option)
            if codec.transmission:
                return True
        raise ProtocolError("more than %d options" % MAX_OPTIONS)

    def _answer(self, option: Option) -> None:
        codec = self._codec
        number = option.option
        if number == nbd.OPT_STARTTLS:
            self._start_tls(option)
        elif number == nbd.OPT_LIST:
            for export in self.server.exports:
                self.stream.send(codec.listed(option, export.name, export.description))
            self.stream.send(codec.accept(option))
        elif number in (nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT):
            self._answer_contexts(option)
        else:
            self.stream.send(codec.accept(option))

    def _start_tls(self, option: Option) -> None:
        tls = self.server.tls
        if tls is None:
            self.stream.send(self._codec.refuse(option, nbd.REP_ERR_POLICY, "TLS not configured"))
            return
        plain = self.stream
        plain.send(self._codec.accept(option))
        channel = tls.wrap(plain, monotonic() + plain.left())
        self.stream = TlsStream(plain, channel)
        if self._stopping:
            raise Disconnected("")
        self.server.admit(channel)
        self._codec.tls = False

    def _flags(self, export: Export) -> int:
        codec = self._codec
        return export.flags | (nbd.SEND_DF if codec.structured else 0) | (nbd.BLOCK_STAT_PAYLOAD if codec.extended else 0)

    def _tell(self, option: Option) -> None:
        """INFO and GO."""
        codec = self._codec
        export = self.server.exports.by_name(option.name)
        go = option.option == nbd.OPT_GO
        if export is None or go and not export.enter(self):
            self.stream.send(codec.refuse(option, nbd.REP_ERR_UNKNOWN, "export '%s' not present" % option.name))
            return
        if go:
            self._take(export)
        parts = []
        if nbd.INFO_NAME in option.wanted:
            parts.append(codec.info_text(option, nbd.INFO_NAME, export.name))
        if nbd.INFO_DESCRIPTION in option.wanted and export.description:
            parts.append(codec.info_text(option, nbd.INFO_DESCRIPTION, export.description))
        minimum, preferred, most = export.block_sizes
        parts.append(codec.info_block_size(option, minimum if nbd.INFO_BLOCK_SIZE in option.wanted else 1, preferred, most))
        parts.append(codec.info_export(option, export.size, self._flags(export)))
        parts.append(codec.accept(option))
        self.stream.send(b"".join(parts))

    def _begin_by_name(self, option: Option) -> None:
        """EXPORT_NAME, which has no way to say no."""
        export = self.server.exports.by_name(option.name)
        if export is None or not export.enter(self):
            raise ProtocolError("export '%s' not present" % option.name)
        self._take(export)
        self.stream.send(self._codec.export_name(export.size, self._flags(export)))

    def _take(self, export: Export) -> None:
        self.export = export
        self._transmission = Transmission(self._codec, self.stream, export)

    def _answer_contexts(self, option: Option) -> None:
        """The metadata contexts of an export that the queries are about, or all of them."""
        codec = self._codec
        export = self.server.exports.by_name(option.name)
        if export is None:
            self.stream.send(codec.refuse(option, nbd.REP_ERR_UNKNOWN, "export '%s' not present" % option.name))
            return
        listing = option.option == nbd.OPT_LIST_META_CONTEXT
        parts = []
        for number, context in enumerate(export.contexts):
            if listing and not option.queries or any(matches(query, context.name, listing) for query in option.queries):
                parts.append(codec.meta_context(option, number, context.name))
        parts.append(codec.accept(option))
        self.stream.send(b"".join(parts))


__all__ = ["MAX_IN_FLIGHT", "MAX_OPTIONS", "Connection", "Request"]
