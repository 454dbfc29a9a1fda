# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The client's half of the NBD codec (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).

Every method that is named after an option or a request gives the bytes to send. `next_event` gives what the server says.
The negotiation allows one option at a time; requests may be many, and their replies come in any order.
"""

from __future__ import annotations

from ...errors import ProtocolError
from . import codec as nbd

TYPE_CHECKING = False
if TYPE_CHECKING:
    import struct
    from typing import Any, Iterator, Optional, Sequence


class Greeting:
    """The first words of a newstyle server: the negotiation begins. Not `fixed`: export_name is the only option."""

    __slots__ = ("fixed", "flags")

    def __init__(self, fixed: bool, flags: int) -> None:
        self.fixed = fixed
        self.flags = flags


class Export:
    """What the server says of an export. `final`: requests may be sent (oldstyle, or the answer to export_name)."""

    __slots__ = ("size", "flags", "final")

    def __init__(self, size: int, flags: int, final: bool) -> None:
        self.size = size
        self.flags = flags
        self.final = final


class BlockSize:
    """The sizes of requests (bytes) that the export takes: their unit, the best, the largest payload."""

    __slots__ = ("minimum", "preferred", "maximum")

    def __init__(self, minimum: int, preferred: int, maximum: int) -> None:
        self.minimum = minimum
        self.preferred = preferred
        self.maximum = maximum


class Text:
    """A name (INFO_NAME) or description (INFO_DESCRIPTION) of the export."""

    __slots__ = ("kind", "text")

    def __init__(self, kind: int, text: str) -> None:
        self.kind = kind
        self.text = text


class Listed:
    """One export of the list."""

    __slots__ = ("name", "description")

    def __init__(self, name: str, description: str) -> None:
        self.name = name
        self.description = description


class Context:
    """A metadata context: with SET_META_CONTEXT it is selected, by this number."""

    __slots__ = ("id", "name")

    def __init__(self, id: int, name: str) -> None:
        self.id = id
        self.name = name


class Answer:
    """The last reply to an option: `code` is REP_ACK, or an error with the server's words in `text`."""

    __slots__ = ("option", "code", "text")

    def __init__(self, option: int, code: int, text: str = "") -> None:
        self.option = option
        self.code = code
        self.text = text

    @property
    def accepted(self) -> bool:
        return self.code == nbd.REP_ACK


class Data:
    """`length` bytes of the export at `offset` follow as a payload; they answer the request `handle`."""

    __slots__ = ("handle", "offset", "length")

    def __init__(self, handle: int, offset: int, length: int) -> None:
        self.handle = handle
        self.offset = offset
        self.length = length


class Hole(Data):
    """`length` bytes at `offset` read as zeroes; no payload."""

    __slots__ = ()


class Status:
    """A chunk of block status for the context with the number `context`."""

    __slots__ = ("handle", "context", "_layout", "_data")

    def __init__(self, handle: int, context: int, layout: struct.Struct, data: bytes) -> None:
        self.handle = handle
        self.context = context
        self._layout = layout
        self._data = data

    @property
    def count(self) -> int:
        """How many extents there are."""
        return len(self._data) // self._layout.size

    def extents(self) -> Iterator[tuple[int, int]]:
        """(length, flags) of the extents from the beginning of the request on; the last may reach beyond its end."""
        for length, flags in self._layout.iter_unpack(self._data):
            if not length:
                raise ProtocolError("NBD: server sent an extent without length")
            yield length, flags


class Done:
    """The request `handle` is answered; `error` is 0, or one of the protocol's numbers, with the server's words in `text`."""

    __slots__ = ("handle", "error", "text")

    def __init__(self, handle: int, error: int, text: str = "") -> None:
        self.handle = handle
        self.error = error
        self.text = text


class Pending:
    """A request that was sent: what it asked for, and what of it was answered."""

    __slots__ = ("command", "flags", "offset", "length", "end", "got", "covered", "contexts", "errors", "error", "text")

    def __init__(self, command: int, flags: int, offset: int, length: int) -> None:
        self.command = command
        self.flags = flags
        self.offset = offset
        self.length = length
        self.end = offset  # where the chunks so far end, as long as they came in order
        self.got = 0  # bytes
        self.covered: Optional[list[tuple[int, int]]] = None  # all chunks, once they came out of order
        self.contexts: set[int] = set()
        self.errors = 0
        self.error = 0
        self.text = ""

    def cover(self, offset: int, length: int) -> None:
        """Note a chunk of content. Raises ProtocolError where it is not one that may come."""
        if not length or offset < self.offset or offset + length > self.offset + self.length:
            raise ProtocolError("NBD: server sent %d bytes at %#x, which nobody asked for" % (length, offset))
        if offset != self.end and self.covered is None:
            self.covered = [(self.offset, self.end)] if self.got else []
        if self.covered is not None:
            from bisect import bisect

            at = bisect(self.covered, (offset, 0))
            before = self.covered[at - 1][1] if at else 0
            after = self.covered[at][0] if at < len(self.covered) else offset + length
            if before > offset or after < offset + length:
                raise ProtocolError("NBD: server sent the bytes at %#x twice" % offset)
            self.covered.insert(at, (offset, offset + length))
        self.end = offset + length
        self.got += length


class ClientCodec(nbd.Codec):
    """The client's side of one connection, from the first byte on."""

    def __init__(self) -> None:
        super().__init__()
        self.structured = False
        self.extended = False
        self.contexts: dict[int, str] = {}  # those selected, by their numbers
        self.transmission = False
        self.pending: dict[int, Pending] = {}
        self._option = 0  # the one that waits for its answer
        self._replies = 0
        self._flags = 0  # the handshake flags that were agreed upon
        self._after: Optional[tuple[int, Pending]] = None  # a request that is answered once its payload is taken
        self._state = self._read_greeting

    # -- negotiation: what to send -------------------------------------------------------------------------------

    def client_flags(self) -> bytes:
        """The answer to Greeting."""
        return nbd.U32.pack(self._flags)

    def _send_option(self, option: int, data: bytes = b"") -> bytes:
        if self._option:
            raise RuntimeError("option %d still waits for its answer" % self._option)
        self._option, self._replies = option, 0
        return nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, option, len(data)) + data

    def export_name(self, name: str) -> bytes:
        """Choose an export in the old way: Export is the answer, or the server closes."""
        self._state = self._read_export
        return self._send_option(nbd.OPT_EXPORT_NAME, nbd.bytes_of(name, "export name"))

    def abort(self) -> bytes:
        self._option = 0
        return self._send_option(nbd.OPT_ABORT)

    def list_exports(self) -> bytes:
        """Listed for each export, then Answer."""
        return self._send_option(nbd.OPT_LIST)

    def start_tls(self) -> bytes:
        """After an accepting Answer the TLS handshake has to follow, and all is forgotten that was agreed upon before."""
        return self._send_option(nbd.OPT_STARTTLS)

    def structured_reply(self) -> bytes:
        return self._send_option(nbd.OPT_STRUCTURED_REPLY)

    def extended_headers(self) -> bytes:
        return self._send_option(nbd.OPT_EXTENDED_HEADERS)

    def info(self, name: str, wanted: Sequence[int] = ()) -> bytes:
        """Export, BlockSize, Text as the server has them, then Answer; `wanted` are numbers of information."""
        return self._send_option(nbd.OPT_INFO, self._info(name, wanted))

    def go(self, name: str, wanted: Sequence[int] = ()) -> bytes:
        """The same, and after an accepting Answer requests may be sent."""
        return self._send_option(nbd.OPT_GO, self._info(name, wanted))

    def _info(self, name: str, wanted: Sequence[int]) -> bytes:
        numbers = b"".join(number.to_bytes(2, "big") for number in wanted)
        return nbd.counted(nbd.bytes_of(name, "export name")) + len(wanted).to_bytes(2, "big") + numbers

    def list_meta_context(self, name: str, queries: Sequence[str] = ()) -> bytes:
        """Context for each one that matches (all, without queries), then Answer."""
        return self._send_option(nbd.OPT_LIST_META_CONTEXT, self._queries(name, queries))

    def set_meta_context(self, name: str, queries: Sequence[str]) -> bytes:
        """Select contexts: Context for each one that is, then Answer; go must follow for the same export."""
        self.contexts = {}
        return self._send_option(nbd.OPT_SET_META_CONTEXT, self._queries(name, queries))

    def _queries(self, name: str, queries: Sequence[str]) -> bytes:
        texts = [nbd.counted(nbd.bytes_of(query, "meta context")) for query in queries]
        return nbd.counted(nbd.bytes_of(name, "export name")) + nbd.U32.pack(len(texts)) + b"".join(texts)

    # -- transmission: what to send ------------------------------------------------------------------------------

    def request(self, command: int, handle: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
        """The header of a request; the payload of CMD_WRITE follows it. `handle` must be of no request under way."""
        if command != nbd.CMD_DISC:
            if handle in self.pending:
                raise RuntimeError("handle %d is in use" % handle)
            self.pending[handle] = Pending(command, flags, offset, length)
        if self.extended:
            if command == nbd.CMD_WRITE:
                flags |= nbd.FLAG_PAYLOAD_LEN
            return nbd.EXTENDED_REQUEST.pack(nbd.EXTENDED_REQUEST_MAGIC, flags, command, handle, offset, length)
        return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, handle, offset, length)

    def block_status_of(self, handle: int, offset: int, length: int, contexts: Sequence[int], flags: int = 0) -> bytes:
        """A whole request for the status in some of the selected contexts only; needs BLOCK_STAT_PAYLOAD."""
        payload = nbd.U64.pack(length) + b"".join(nbd.U32.pack(number) for number in contexts)
        flags |= nbd.FLAG_PAYLOAD_LEN
        self.pending[handle] = Pending(nbd.CMD_BLOCK_STATUS, flags, offset, length)
        head = nbd.EXTENDED_REQUEST.pack(nbd.EXTENDED_REQUEST_MAGIC, flags, nbd.CMD_BLOCK_STATUS, handle, offset, len(payload))
        return head + payload

    # -- negotiation: what comes ---------------------------------------------------------------------------------

    def _read_greeting(self) -> Any:
        if len(self._buffer) >= 8 and not self._buffer.startswith(nbd.INIT_MAGIC):
            raise ProtocolError("Bad initial magic received: 0x%016x" % int.from_bytes(self._buffer[:8], "big"))
        magics = self._peek(nbd.OPTION_HEADER)  # a magic of 8 bytes, and 8 more
        if magics is None:
            return None
        if self._buffer[8:16] == nbd.OPTION_MAGIC:
            data = self._take(18)
            if data is None:
                return None
            offered = int.from_bytes(data[16:], "big")
            self._flags = offered & (nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)
            self._state = self._read_option_reply
            return Greeting(bool(offered & nbd.FIXED_NEWSTYLE), offered)
        magic = int.from_bytes(self._buffer[8:16], "big")
        if magic != nbd.OLDSTYLE_MAGIC:
            raise ProtocolError("Bad server magic received: 0x%016x" % magic)
        data = self._take(8 + 8 + 8 + 4 + 124)
        if data is None:
            return None
        self._begin()
        return Export(int.from_bytes(data[16:24], "big"), int.from_bytes(data[26:28], "big"), True)

    def _read_export(self) -> Any:
        data = self._take(10 if self._flags & nbd.NO_ZEROES else 134)
        if data is None:
            return None
        self._begin()
        return Export(int.from_bytes(data[:8], "big"), int.from_bytes(data[8:10], "big"), True)

    def _begin(self) -> None:
        self.transmission = True
        self._state = self._read_reply

    def _read_option_reply(self) -> Any:
        fields = self._peek(nbd.OPTION_REPLY)
        if fields is None:
            return None
        magic, option, code, length = fields
        if magic != nbd.OPTION_REPLY_MAGIC:
            raise ProtocolError("Unexpected option reply magic")
        if option != self._option:
            raise ProtocolError("Unexpected option type %u expected %u" % (option, self._option))
        if length > nbd.MAX_OPTION:
            raise ProtocolError("option reply %u has %u bytes, more than %d" % (code, length, nbd.MAX_OPTION))
        whole = self._take(nbd.OPTION_REPLY.size + length)
        if whole is None:
            return None
        self._replies += 1
        if self._replies > nbd.MAX_OPTION_REPLIES:
            raise ProtocolError("server sends no end of replies to option %u" % option)
        data = whole[nbd.OPTION_REPLY.size :]
        if code & nbd.REP_ERROR:
            self._option = 0
            return Answer(option, code, nbd.message_of(data))
        if code == nbd.REP_ACK:
            return self._accepted(option, data)
        if code == nbd.REP_SERVER and option == nbd.OPT_LIST:
            return self._listed(data)
        if code == nbd.REP_INFO and option in (nbd.OPT_INFO, nbd.OPT_GO):
            return self._information(data)
        if code == nbd.REP_META_CONTEXT and option in (nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT):
            return self._context(option, data)
        raise ProtocolError("Unexpected reply type %u to option %u" % (code, option))

    def _accepted(self, option: int, data: bytes) -> Answer:
        if data:
            raise ProtocolError("option %u is acknowledged with %d bytes of data" % (option, len(data)))
        self._option = 0
        if option == nbd.OPT_STRUCTURED_REPLY:
            self.structured = True
        elif option == nbd.OPT_EXTENDED_HEADERS:
            self.structured = self.extended = True
        elif option == nbd.OPT_STARTTLS:
            if self._buffer:
                raise ProtocolError("server sent unencrypted data after it agreed to TLS")
            self.structured = self.extended = False
            self.contexts = {}
        elif option == nbd.OPT_GO:
            self._begin()
        return Answer(option, nbd.REP_ACK)

    def _listed(self, data: bytes) -> Listed:
        length = int.from_bytes(data[:4], "big")
        if len(data) < 4 or length > len(data) - 4:
            raise ProtocolError("incorrect option name length")
        description = data[4 + length :]
        return Listed(nbd.text_of(data[4 : 4 + length], "export name"), nbd.text_of(description, "export description"))

    def _information(self, data: bytes) -> Any:
        kind = int.from_bytes(data[:2], "big")
        if len(data) < 2:
            raise ProtocolError("info length %d is too short" % len(data))
        if kind == nbd.INFO_EXPORT:
            if len(data) != nbd.INFO_EXPORT_FIELDS.size:
                raise ProtocolError("Unexpected NBD_INFO_EXPORT length %d" % len(data))
            size, flags = nbd.INFO_EXPORT_FIELDS.unpack(data)[1:]
            return Export(size, flags, False)
        if kind == nbd.INFO_BLOCK_SIZE:
            if len(data) != nbd.INFO_BLOCK_SIZE_FIELDS.size:
                raise ProtocolError("Unexpected NBD_INFO_BLOCK_SIZE length %d" % len(data))
            return self._block_size(*nbd.INFO_BLOCK_SIZE_FIELDS.unpack(data)[1:])
        if kind in (nbd.INFO_NAME, nbd.INFO_DESCRIPTION):
            return Text(kind, nbd.text_of(data[2:], "export description"))
        return None  # what is not known is ignored

    def _block_size(self, minimum: int, preferred: int, maximum: int) -> BlockSize:
        if not minimum or minimum & (minimum - 1):
            raise ProtocolError("server minimum block size %u is not a power of two" % minimum)
        if preferred & (preferred - 1) or preferred < minimum:
            raise ProtocolError("server preferred block size %u is not valid" % preferred)
        if maximum < minimum or maximum != 0xFFFFFFFF and maximum % minimum:
            raise ProtocolError("server maximum block size %u is not valid" % maximum)
        return BlockSize(minimum, preferred, maximum)

    def _context(self, option: int, data: bytes) -> Context:
        if len(data) <= 4:
            raise ProtocolError("Failed to negotiate metadata context: its name is missing")
        number, name = int.from_bytes(data[:4], "big"), nbd.text_of(data[4:], "meta context")
        if option == nbd.OPT_SET_META_CONTEXT:
            if number in self.contexts or name in self.contexts.values():
                raise ProtocolError("server selects metadata context '%s' twice" % name)
            if len(self.contexts) >= nbd.MAX_CONTEXTS:
                raise ProtocolError("server selects more than %d metadata contexts" % nbd.MAX_CONTEXTS)
            self.contexts[number] = name
        return Context(number, name)

    # -- transmission: what comes --------------------------------------------------------------------------------

    def _read_reply(self) -> Any:
        if self._after is not None:
            handle, pending = self._after
            self._after = None
            return self._finish(handle, pending)
        first = self._peek(nbd.U32)
        if first is None:
            return None
        magic = first[0]
        if magic == nbd.SIMPLE_REPLY_MAGIC and not self.extended:
            return self._simple()
        if magic == nbd.EXTENDED_REPLY_MAGIC and self.extended or magic == nbd.STRUCTURED_REPLY_MAGIC and self.structured and not self.extended:
            return self._chunk()
        raise ProtocolError("invalid magic (got 0x%x)" % magic)

    def _simple(self) -> Any:
        fields = self._peek(nbd.SIMPLE_REPLY)
        if fields is None:
            return None
        error, handle = fields[1:]
        pending = self._find(handle)
        if self.structured and pending.command == nbd.CMD_READ and not error:
            raise ProtocolError("Protocol error: simple reply when structured reply chunk was expected")
        del self._buffer[: nbd.SIMPLE_REPLY.size]
        if error or pending.command != nbd.CMD_READ:
            pending.error = error
            return self._finish(handle, pending)
        pending.got = self.payload = pending.length
        self._after = (handle, pending)
        return Data(handle, pending.offset, pending.length)

    def _find(self, handle: int) -> Pending:
        pending = self.pending.get(handle)
        if pending is None:
            raise ProtocolError("server answers a request that nobody made (handle %#x)" % handle)
        return pending

    def _finish(self, handle: int, pending: Pending) -> Done:
        del self.pending[handle]
        if not pending.error:
            if pending.command == nbd.CMD_READ and pending.got != pending.length:
                raise ProtocolError("server left %d bytes of a read out" % (pending.length - pending.got))
            if pending.command == nbd.CMD_BLOCK_STATUS and not pending.contexts:
                raise ProtocolError("Server did not reply with any status extents")
        return Done(handle, pending.error, pending.text)

    def _chunk(self) -> Any:
        layout = nbd.EXTENDED_REPLY if self.extended else nbd.STRUCTURED_REPLY
        fields = self._peek(layout)
        if fields is None:
            return None
        flags, kind, handle, length = fields[1], fields[2], fields[3], fields[-1]
        pending = self._find(handle)
        if self.extended and fields[4] != pending.offset:
            raise ProtocolError("server answers a request at %#x with one at %#x" % (pending.offset, fields[4]))
        done = bool(flags & nbd.CHUNK_DONE)
        size = layout.size
        if kind == nbd.CHUNK_DATA:
            return self._data(handle, pending, size, length, done)
        event: Any = None
        if kind & (1 << 15):
            self._error(pending, size, kind, length)
        elif kind == nbd.CHUNK_NONE:
            if length or not done:
                raise ProtocolError("Protocol error: NBD_REPLY_TYPE_NONE chunk without NBD_REPLY_FLAG_DONE flag set")
            del self._buffer[:size]
            return self._finish(handle, pending)
        elif kind == nbd.CHUNK_HOLE and pending.command == nbd.CMD_READ:
            event = self._hole(handle, pending, size, length)
        elif kind == (nbd.CHUNK_STATUS_EXT if self.extended else nbd.CHUNK_STATUS) and pending.command == nbd.CMD_BLOCK_STATUS:
            event = self._status(handle, pending, size, length)
        else:
            raise ProtocolError("Unexpected reply type %d to command %d" % (kind, pending.command))
        if self.missing:
            return None
        if done and event is None:
            return self._finish(handle, pending)
        if done:
            self._after = (handle, pending)
        return event

    def _data(self, handle: int, pending: Pending, size: int, length: int, done: bool) -> Optional[Data]:
        if pending.command != nbd.CMD_READ or not 8 < length <= nbd.MAX_PAYLOAD + 8:
            raise ProtocolError("Protocol error: invalid payload for NBD_REPLY_TYPE_OFFSET_DATA")
        fields = self._peek(nbd.U64, size)
        if fields is None:
            return None
        pending.cover(fields[0], length - 8)
        del self._buffer[: size + 8]
        self.payload = length - 8
        if done:
            self._after = (handle, pending)
        return Data(handle, fields[0], length - 8)

    def _hole(self, handle: int, pending: Pending, size: int, length: int) -> Optional[Hole]:
        if length != nbd.HOLE.size:
            raise ProtocolError("Protocol error: invalid payload for NBD_REPLY_TYPE_OFFSET_HOLE")
        fields = self._peek(nbd.HOLE, size)
        if fields is None:
            return None
        pending.cover(*fields)
        del self._buffer[: size + length]
        return Hole(handle, *fields)

    def _error(self, pending: Pending, size: int, kind: int, length: int) -> None:
        least = nbd.ERROR.size + (8 if kind == nbd.CHUNK_ERROR_OFFSET else 0)
        if not least <= length <= nbd.MAX_STRING + least:
            raise ProtocolError("Protocol error: invalid payload for structured error")
        whole = self._take(size + length)
        if whole is None:
            return
        error, count = nbd.ERROR.unpack_from(whole, size)
        if count > length - least:
            raise ProtocolError("Protocol error: server sent structured error chunk with incorrect message length")
        if not error:
            raise ProtocolError("Protocol error: server sent structured error chunk with error = 0")
        pending.errors += 1
        if pending.errors > nbd.MAX_ERROR_CHUNKS:
            raise ProtocolError("server sends no end of errors for one request")
        if not pending.error:
            at = size + nbd.ERROR.size
            pending.error, pending.text = error, nbd.message_of(whole[at : at + count])

    def _status(self, handle: int, pending: Pending, size: int, length: int) -> Optional[Status]:
        head, entry = (nbd.STATUS_EXT, nbd.EXTENT_EXT) if self.extended else (nbd.STATUS, nbd.EXTENT)
        count, odd = divmod(length - head.size, entry.size)
        if count < 1 or odd:
            raise ProtocolError("Protocol error: invalid payload for NBD_REPLY_TYPE_BLOCK_STATUS")
        if count > nbd.MAX_EXTENTS:
            raise ProtocolError("server sends %d extents, more than %d" % (count, nbd.MAX_EXTENTS))
        fields = self._peek(head, size)
        if fields is None:
            return None
        context = fields[0]
        if context not in self.contexts:
            raise ProtocolError("Protocol error: unexpected context id %d for NBD_REPLY_TYPE_BLOCK_STATUS" % context)
        if self.extended and fields[1] != count:
            raise ProtocolError("Protocol error: %d extents announced, %d sent" % (fields[1], count))
        if context in pending.contexts:
            raise ProtocolError("Several BLOCK_STATUS chunks in reply")
        if pending.flags & nbd.FLAG_REQ_ONE and count > 1:
            raise ProtocolError("server sends %d extents where one was asked for" % count)
        whole = self._take(size + length)
        if whole is None:
            return None
        pending.contexts.add(context)
        return Status(handle, context, entry, whole[size + head.size :])
