# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A connection to an NBD server: a socket and the client's codec, used by several threads at once.

There is no thread that receives. Whoever waits for an answer while nobody receives does it for all, until it has its own answer,
and hands that on to another one who waits: one thread alone pays for no switch between threads.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from _thread import allocate_lock
from time import monotonic

from ...errors import Error, ProtocolError
from ...hooks import MAX_SIZE
from ...node import fill_zeroes
from . import codec as nbd
from .codec_client import Answer, BlockSize, ClientCodec, Data, Done, Export, Greeting, Hole, Listed, Status, Text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, Optional, Sequence, Union

    Buffer = Union[bytes, bytearray, memoryview]

RECEIVE = 16 << 10  # bytes received at a time where no payload is known to come
END = "Unexpected end-of-file before all data were read"


class Lost(Error):
    """The connection is gone; another one may do."""


class Channel:
    """A connected socket; crypto/tls.py has the like for TLS."""

    reading = "Unable to read from socket"  # how messages begin

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def set_timeout(self, seconds: float) -> None:
        """How long the peer may be silent. Without a poll before each call, unlike socket.settimeout."""
        self.sock.settimeout(None)
        value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6) or (0 if seconds >= 1 else 1))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def receive_into(self, view: memoryview, whole: bool = False) -> int:
        """Receive some bytes, with `whole` as many as there is room for if the peer is not slow; 0 at the end."""
        return self.sock.recv_into(view, 0, socket.MSG_WAITALL if whole else 0)

    def send(self, *parts: Buffer) -> None:
        """Send all of `parts`; one caller at a time."""
        rest = [memoryview(part).cast("B") for part in parts]
        while rest:
            sent = self.sock.sendmsg(rest)
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][sent:]

    def close(self) -> None:
        self.sock.close()


class Call:
    """A request that waits for its answer."""

    __slots__ = ("handle", "offset", "into", "statuses", "error", "text", "finished", "failure", "signal")

    def __init__(self, handle: int, offset: int, into: Optional[memoryview]) -> None:
        self.handle = handle
        self.offset = offset
        self.into = into
        self.statuses: list[Status] = []
        self.error = 0
        self.text = ""
        self.finished = False
        self.failure: Optional[BaseException] = None  # of the connection
        self.signal = allocate_lock()
        self.signal.acquire()

    def wake(self) -> None:
        """Let the thread look again that waits for the answer; under the connection's lock."""
        if self.signal.locked():
            self.signal.release()


class Terms:
    """What was agreed upon with the server."""

    def __init__(self) -> None:
        self.size = -1
        self.flags = 0
        self.minimum = 0  # 0: the server did not say
        self.preferred = 0
        self.maximum = nbd.MAX_PAYLOAD
        self.structured = False
        self.extended = False
        self.context: Optional[int] = None  # the number of the context that was asked for
        self.name = ""
        self.description = ""


class Negotiation:
    """The dialogue before the requests. Every step has to be over by the deadline (of time.monotonic)."""

    def __init__(self, channel: Any, deadline: float) -> None:
        self.channel = channel
        self.codec = ClientCodec()
        self.terms = Terms()
        self._deadline = deadline
        self._fixed = False
        self._buffer = memoryview(bytearray(RECEIVE))

    def _next(self, what: str) -> Any:
        """The next event. Raises Error, and ProtocolError where there is nothing more to be said to this server."""
        while True:
            event = self.codec.next_event()
            if event is not None:
                return event
            left = self._deadline - monotonic()
            try:
                if left <= 0:
                    raise BlockingIOError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
                self.channel.set_timeout(left)
                count = self.channel.receive_into(self._buffer)
            except BlockingIOError:
                raise Lost("Failed to read %s: the server does not answer" % what, errno=errno.ETIMEDOUT) from None
            except OSError as exc:
                raise Lost("Failed to read %s: %s: %s" % (what, self.channel.reading, exc.strerror or exc), errno=exc.errno) from exc
            if not count:
                raise Lost("Failed to read %s: %s" % (what, END), errno=errno.EINVAL)
            self.codec.receive(self._buffer[:count])

    def _send(self, data: bytes) -> None:
        try:
            self.channel.set_timeout(max(self._deadline - monotonic(), 0.001))
            self.channel.send(data)
        except OSError as exc:
            raise Lost("Failed to send option request: Unable to write to socket: %s" % (exc.strerror or exc), errno=exc.errno) from exc

    def _ask(self, data: bytes, note: Optional[Callable[[Any], None]] = None) -> Answer:
        """Send an option and return the last answer to it; `note` gets the others."""
        self._send(data)
        while True:
            event = self._next("option reply")
            if isinstance(event, Answer):
                return event
            if note is not None:
                note(event)

    def greet(self) -> bool:
        """Take the server's first words and answer them; False: it is oldstyle, and all is said."""
        event = self._next("initial magic")
        if isinstance(event, Export):
            self._note(event)
            return False
        self._fixed = isinstance(event, Greeting) and event.fixed
        self._send(self.codec.client_flags())
        return True

    def start_tls(self, wrap: Callable[[Any, float], Any]) -> None:
        """Go over to TLS; `wrap` makes a channel of the present one, before the deadline."""
        if not self._fixed:
            raise ProtocolError("Server does not support STARTTLS", errno=errno.EINVAL)
        answer = self._ask(self.codec.start_tls())
        if not answer.accepted:
            raise _refused(answer, "", "Server don't support STARTTLS option" if answer.code == nbd.REP_ERR_UNSUP else "")
        self.channel = wrap(self.channel, self._deadline)

    def settle(self, export: str, context: Optional[str]) -> None:
        """Choose `export`, with extended headers and all that the server has, and the metadata context `context`."""
        codec, terms = self.codec, self.terms
        if len(export.encode("utf-8", "surrogatepass")) > nbd.MAX_STRING:
            raise Error("export name too long to send to server", errno=errno.EINVAL)
        if self._fixed:
            if self._optional(codec.extended_headers()) or self._optional(codec.structured_reply()):
                if context is not None:
                    self._optional(codec.set_meta_context(export, [context]))
                    self._take_contexts(context)
            answer = self._ask(codec.go(export, [nbd.INFO_BLOCK_SIZE, nbd.INFO_NAME, nbd.INFO_DESCRIPTION]), self._note)
            if answer.code == nbd.REP_ERR_UNSUP and not codec.extended:
                self._look_for(export)
            elif not answer.accepted:
                raise _refused(answer, export)
        if not codec.transmission:
            self._send(codec.export_name(export))
            self._note(self._next("export length"))
        terms.structured, terms.extended = codec.structured, codec.extended

    def check(self) -> None:
        """Raise ProtocolError unless what the server said of the export makes sense."""
        terms = self.terms
        if terms.size < 0:
            raise ProtocolError("broken server omitted NBD_INFO_EXPORT", errno=errno.EINVAL)
        if terms.size > MAX_SIZE:
            raise ProtocolError("the server says that the export has %d bytes" % terms.size, errno=errno.EFBIG)
        if terms.minimum and terms.size % terms.minimum:
            raise ProtocolError("export size %d is not multiple of minimum block size %d" % (terms.size, terms.minimum), errno=errno.EINVAL)

    def give_up(self) -> None:
        """Close, saying good-bye where that can be done."""
        if self._fixed and not self.codec.transmission:
            try:
                self.channel.set_timeout(0.1)
                self.channel.send(self.codec.abort())
            except (OSError, Error):
                pass
        self.channel.close()

    def _optional(self, data: bytes) -> bool:
        """Whether the server accepts an option that may be done without."""
        return self._ask(data).accepted

    def _take_contexts(self, wanted: str) -> None:
        contexts = self.codec.contexts
        for number, name in contexts.items():
            if name != wanted:
                raise ProtocolError("Failed to negotiate query '%s', server answered with different context '%s'" % (wanted, name), errno=errno.EINVAL)
            self.terms.context = number

    def _look_for(self, export: str) -> None:
        """Ask a server that does not know GO for its exports: an unknown one would only make it hang up."""
        seen: set[bool] = set()  # whether one was the right one; not the names, which may be many

        def note(event: Listed) -> None:
            seen.add(event.name == export)

        answer = self._ask(self.codec.list_exports(), note)
        if answer.accepted and True not in seen and (export or seen):
            raise Error("No export with name '%s' available" % export, errno=errno.EINVAL)
        if answer.code not in (nbd.REP_ACK, nbd.REP_ERR_UNSUP, nbd.REP_ERR_POLICY):
            raise _refused(answer, export)

    def _note(self, event: Any) -> None:
        terms = self.terms
        if isinstance(event, Export):
            terms.size, terms.flags = event.size, event.flags
        elif isinstance(event, BlockSize):
            terms.minimum, terms.preferred = event.minimum, event.preferred
            terms.maximum = min(event.maximum, nbd.MAX_PAYLOAD) // event.minimum * event.minimum
            if not terms.maximum:
                raise ProtocolError("the server insists on blocks of %d bytes" % event.minimum, errno=errno.EINVAL)
        elif isinstance(event, Text):
            if event.kind == nbd.INFO_NAME:
                terms.name = event.text
            else:
                terms.description = event.text


_REFUSALS = {
    nbd.REP_ERR_UNSUP: "Unsupported option type %(option)u (%(name)s)",
    nbd.REP_ERR_POLICY: "Denied by server for option %(option)u (%(name)s)",
    nbd.REP_ERR_INVALID: "Invalid parameters for option %(option)u (%(name)s)",
    nbd.REP_ERR_PLATFORM: "Server lacks support for option %(option)u (%(name)s)",
    nbd.REP_ERR_TLS_REQD: "TLS negotiation required before option %(option)u (%(name)s)",
    nbd.REP_ERR_UNKNOWN: "Requested export not available",
    nbd.REP_ERR_SHUTDOWN: "Server shutting down before option %(option)u (%(name)s)",
    nbd.REP_ERR_BLOCK_SIZE_REQD: "Server requires INFO_BLOCK_SIZE for option %(option)u (%(name)s)",
}


def _refused(answer: Answer, export: str, words: str = "") -> Error:
    """The error for an option that the server refuses, in QEMU's words."""
    values = {"option": answer.option, "name": nbd.OPTION_NAMES.get(answer.option, "<unknown>")}
    text = words or _REFUSALS.get(answer.code, "Unknown error code when asking for option %(option)u (%(name)s)") % values
    hints = []
    if answer.code == nbd.REP_ERR_TLS_REQD:
        hints.append("Did you forget a valid tls-creds?")
    if answer.text:
        hints.append("server reported: %s" % answer.text)
    return Error(text, errno=errno.EINVAL, hint="\n".join(hints) or None)


class Connection:
    """The requests of one connection. `timeout` seconds of silence, while an answer is waited for, end it."""

    def __init__(self, channel: Any, codec: ClientCodec, terms: Terms, timeout: float) -> None:
        self.terms = terms
        self.broken: Optional[BaseException] = None
        self._channel = channel
        self._codec = codec
        self._timeout = timeout
        self._calls: dict[int, Call] = {}
        self._handle = 0
        self._lock = allocate_lock()  # guards what is above, and who receives
        self._sending = allocate_lock()
        self._receiving = False
        self._waiting: list[Call] = []  # those that somebody else receives for; some may have their answers
        self._buffer = memoryview(bytearray(RECEIVE))
        channel.set_timeout(timeout)

    @property
    def busy(self) -> int:
        """Requests under way."""
        return len(self._calls)

    @property
    def idle(self) -> bool:
        """Whether no thread is at work with its socket."""
        return not self._receiving and not self._sending.locked()

    def call(self, command: int, offset: int, length: int, flags: int = 0, payload: Optional[memoryview] = None, into: Optional[memoryview] = None) -> Call:
        """Make a request and wait for the answer. Raises Lost, ProtocolError; what the server answers is in the Call."""
        with self._lock:
            if self.broken is not None:
                raise self._failure(self.broken)
            self._handle += 1
            call = Call(self._handle, offset, into)
            self._calls[call.handle] = call
        try:
            with self._sending:
                head = self._codec.request(command, call.handle, offset, length, flags)
                if payload is None:
                    self._channel.send(head)
                else:
                    self._channel.send(head, payload)
        except BaseException as exc:
            self._break(exc)
            if not isinstance(exc, OSError):
                raise
        self._await(call)
        if call.failure is not None:
            raise self._failure(call.failure)
        return call

    def _await(self, call: Call) -> None:
        while True:
            with self._lock:
                if call in self._waiting:
                    self._waiting.remove(call)
                if call.finished:
                    return
                if not self._receiving:
                    self._receiving = True
                    break
                self._waiting.append(call)
            call.signal.acquire()
        try:
            self._receive_for(call)
        except BaseException as exc:
            self._break(exc)
            if not isinstance(exc, (OSError, Error)):
                raise
        finally:
            with self._lock:
                self._receiving = False
                while self._waiting:
                    other = self._waiting.pop(0)
                    if not other.finished:
                        other.wake()
                        break

    def _receive_for(self, call: Call) -> None:
        """Receive, and give everybody what is theirs, until `call` is answered."""
        codec, channel = self._codec, self._channel
        while not call.finished:
            event = codec.next_event()
            if event is None:
                count = channel.receive_into(self._buffer)
                if not count:
                    raise Lost("The server closed the connection", errno=errno.EIO)
                codec.receive(self._buffer[:count])
            elif isinstance(event, Data):
                place = self._calls.get(event.handle)
                if place is None or place.into is None:
                    raise ProtocolError("NBD: data where none was asked for")
                view = place.into[event.offset - place.offset : event.offset - place.offset + event.length]
                if isinstance(event, Hole):
                    fill_zeroes(view)
                else:
                    self._receive_payload(view)
            elif isinstance(event, Status):
                place = self._calls.get(event.handle)
                if place is not None:
                    place.statuses.append(event)
            elif isinstance(event, Done):
                self._finish(event)

    def _receive_payload(self, view: memoryview) -> None:
        done = self._codec.payload_into(view)
        while done < len(view):
            count = self._channel.receive_into(view[done:], True)
            if not count:
                raise Lost("The server closed the connection in the middle of a reply", errno=errno.EIO)
            self._codec.payload_received(count)
            done += count

    def _finish(self, event: Done) -> None:
        with self._lock:
            call = self._calls.pop(event.handle, None)
            if call is None:
                return  # it was given up
            call.error, call.text = event.error, event.text
            call.finished = True
            call.wake()

    def _break(self, exc: BaseException) -> None:
        """Nothing more can be said over this connection: everybody who waits is told."""
        with self._lock:
            if self.broken is None:
                self.broken = exc
            for call in self._calls.values():
                call.failure = self.broken
                call.finished = True
                call.wake()
            self._calls.clear()
        try:
            self._channel.sock.shutdown(socket.SHUT_RDWR)  # whoever receives or sends comes back
        except OSError:
            pass

    def _failure(self, exc: BaseException) -> Error:
        """What is said of a request that `exc` has ended."""
        if isinstance(exc, (BlockingIOError, socket.timeout)):
            return Lost("The server has been silent for %g seconds" % self._timeout, errno=errno.ETIMEDOUT)
        if isinstance(exc, OSError):
            return Lost("The connection failed: %s" % (exc.strerror or exc), errno=errno.EIO)
        if isinstance(exc, Lost):
            return Lost(str(exc), errno=exc.errno)
        if isinstance(exc, ProtocolError):
            return ProtocolError(str(exc), errno=errno.EIO)
        return Lost("The connection was given up", errno=errno.EIO)

    def close(self) -> None:
        """Say good-bye, if there is anybody to say it to, and close."""
        if self.broken is None and not self._calls:
            self.broken = Lost("The connection is closed", errno=errno.EIO)
            try:
                self._channel.set_timeout(1)
                self._channel.send(self._codec.request(nbd.CMD_DISC, 0))
            except (OSError, Error):
                pass
        self._channel.close()


def extents_of(statuses: Sequence[Status], length: int) -> Iterator[tuple[int, int]]:
    """(length, flags) of what a server said of a range of so many bytes, cut at its end. Raises ProtocolError."""
    for status in statuses:
        for count, flags in status.extents():
            count = min(count, length)
            yield count, flags
            length -= count
            if not length:
                return
