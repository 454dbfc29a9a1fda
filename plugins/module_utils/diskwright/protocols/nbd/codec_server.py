# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The server's half of the NBD codec (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).

`next_event` gives what the client wants, checked: an Option or a Request. Whatever breaks the rules but can be answered comes
with an `error` to answer it with; what cannot be is a ProtocolError, after which the connection is to be closed.
The answers to requests may be made by several threads at once.
"""

from __future__ import annotations

from ...errors import ProtocolError
from . import codec as nbd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Sequence

_WITHOUT_DATA = (nbd.OPT_ABORT, nbd.OPT_LIST, nbd.OPT_STARTTLS, nbd.OPT_STRUCTURED_REPLY, nbd.OPT_EXTENDED_HEADERS)

# the flags that a command may have, whatever was negotiated
_FLAGS = {
    nbd.CMD_READ: nbd.FLAG_FUA | nbd.FLAG_DF,
    nbd.CMD_WRITE: nbd.FLAG_FUA | nbd.FLAG_PAYLOAD_LEN,
    nbd.CMD_DISC: nbd.FLAG_FUA,
    nbd.CMD_FLUSH: nbd.FLAG_FUA,
    nbd.CMD_TRIM: nbd.FLAG_FUA,
    nbd.CMD_CACHE: nbd.FLAG_FUA,
    nbd.CMD_WRITE_ZEROES: nbd.FLAG_FUA | nbd.FLAG_NO_HOLE | nbd.FLAG_FAST_ZERO,
    nbd.CMD_BLOCK_STATUS: nbd.FLAG_FUA | nbd.FLAG_REQ_ONE | nbd.FLAG_PAYLOAD_LEN,
}

# the transmission flag that announces a command
_ANNOUNCED = {
    nbd.CMD_FLUSH: nbd.SEND_FLUSH,
    nbd.CMD_TRIM: nbd.SEND_TRIM,
    nbd.CMD_CACHE: nbd.SEND_CACHE,
    nbd.CMD_WRITE_ZEROES: nbd.SEND_WRITE_ZEROES,
}

_WRITING = (nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES)


class Option:
    """An option of the client. `error` is 0, or the reply (REP_ERR_...) that it is to be refused with, saying `text`.

    name      of the export: EXPORT_NAME, INFO, GO, LIST_META_CONTEXT, SET_META_CONTEXT
    wanted    numbers of the information that INFO and GO ask for
    queries   of LIST_META_CONTEXT and SET_META_CONTEXT
    """

    __slots__ = ("option", "name", "wanted", "queries", "error", "text")

    def __init__(self, option: int) -> None:
        self.option = option
        self.name = ""
        self.wanted: list[int] = []
        self.queries: list[str] = []
        self.error = 0
        self.text = ""

    def refuse(self, error: int, text: str) -> Option:
        """The same option, to be refused."""
        self.error, self.text = error, text
        return self


class Request:
    """A request for `length` bytes at `offset`. `error` is 0, or the number that it is to be refused with, saying `text`.

    payload   bytes that follow and are to be taken from the codec (CMD_WRITE without an error)
    contexts  the numbers of the contexts that a CMD_BLOCK_STATUS is about: the selected ones, or fewer
    """

    __slots__ = ("command", "flags", "handle", "offset", "length", "payload", "contexts", "error", "text")

    def __init__(self, command: int, flags: int, handle: int, offset: int, length: int) -> None:
        self.command = command
        self.flags = flags
        self.handle = handle
        self.offset = offset
        self.length = length
        self.payload = 0
        self.contexts: Sequence[int] = ()
        self.error = 0
        self.text = ""

    def refuse(self, error: int, text: str) -> Request:
        """The same request, to be refused."""
        self.error, self.text = error, text
        return self


class ServerCodec(nbd.Codec):
    """The server's side of one connection. `tls`: TLS is at hand, and nothing but STARTTLS is served before it.

    size, flags, minimum    of the export, from the moment that it was announced to the client (export_name, info_export)
    contexts                the selected metadata contexts by their numbers, for the export `contexts_name`
    transmission            requests are being served
    """

    def __init__(self, tls: bool = False) -> None:
        super().__init__()
        self.tls = tls
        self.structured = False
        self.extended = False
        self.transmission = False
        self.contexts: dict[int, str] = {}
        self.contexts_name: Optional[str] = None
        self.size = 0
        self.flags = 0
        self.minimum = 1
        self._fixed = True
        self._zeroes = True
        self._state = self._read_client_flags

    # -- negotiation: what comes ---------------------------------------------------------------------------------

    def _read_client_flags(self) -> None:
        data = self._take(4)
        if data is None:
            return
        flags = int.from_bytes(data, "big")
        if flags & ~(nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES):
            raise ProtocolError("Unknown client flags 0x%x received" % flags)
        self._fixed, self._zeroes = bool(flags & nbd.FIXED_NEWSTYLE), not flags & nbd.NO_ZEROES
        self._state = self._read_option

    def _read_option(self) -> Optional[Option]:
        fields = self._peek(nbd.OPTION_HEADER)
        if fields is None:
            return None
        magic, number, length = fields
        if magic != nbd.OPTION_MAGIC:
            raise ProtocolError("Bad magic received")
        if length > nbd.MAX_SKIPPED:
            raise ProtocolError("len (%u) is larger than max len (%d)" % (length, nbd.MAX_SKIPPED))
        if number == nbd.OPT_EXPORT_NAME and length > nbd.MAX_STRING:
            raise ProtocolError("Bad length received")
        option = Option(number)
        if length > nbd.MAX_OPTION:
            del self._buffer[: nbd.OPTION_HEADER.size]
            self._skip = length
            return option.refuse(nbd.REP_ERR_TOO_BIG, "option has %d bytes, more than %d" % (length, nbd.MAX_OPTION))
        whole = self._take(nbd.OPTION_HEADER.size + length)
        if whole is None:
            return None
        if not self._fixed and number != nbd.OPT_EXPORT_NAME:
            raise ProtocolError("Unsupported option %u (%s)" % (number, nbd.OPTION_NAMES.get(number, "<unknown>")))
        self._parse(option, whole[nbd.OPTION_HEADER.size :])
        return option

    def _parse(self, option: Option, data: bytes) -> None:
        """Fill in `option`, or refuse it."""
        number = option.option
        name = nbd.OPTION_NAMES.get(number, "<unknown>")
        if self.tls and number not in (nbd.OPT_STARTTLS, nbd.OPT_ABORT):
            if number == nbd.OPT_EXPORT_NAME:
                raise ProtocolError("Option 0x%x not permitted before TLS" % number)
            option.refuse(nbd.REP_ERR_TLS_REQD, "Option 0x%x not permitted before TLS" % number)
        elif number in _WITHOUT_DATA:
            if data:
                option.refuse(nbd.REP_ERR_INVALID, "option '%s' has unexpected length" % name)
            elif number == nbd.OPT_STARTTLS and not self.tls:
                option.refuse(nbd.REP_ERR_POLICY, "TLS not configured")
            elif number == nbd.OPT_STRUCTURED_REPLY and self.structured:
                kind = nbd.REP_ERR_EXT_HEADER_REQD if self.extended else nbd.REP_ERR_INVALID
                option.refuse(kind, "%s already negotiated" % ("extended headers" if self.extended else "structured reply"))
            elif number == nbd.OPT_EXTENDED_HEADERS and self.extended:
                option.refuse(nbd.REP_ERR_INVALID, "extended headers already negotiated")
        elif number == nbd.OPT_EXPORT_NAME:
            option.name = nbd.text_of(data, "export name")
        elif number in (nbd.OPT_INFO, nbd.OPT_GO, nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT):
            try:
                if number in (nbd.OPT_INFO, nbd.OPT_GO):
                    self._parse_info(option, data)
                else:
                    self._parse_queries(option, data)
            except ProtocolError as exc:
                option.refuse(nbd.REP_ERR_INVALID, str(exc))
            if number == nbd.OPT_SET_META_CONTEXT:
                self.contexts, self.contexts_name = {}, option.name
        else:
            option.refuse(nbd.REP_ERR_UNSUP, "Unsupported option %u (%s)" % (number, name))

    def _parse_info(self, option: Option, data: bytes) -> None:
        option.name, at = _string(data, 0, "export name")
        count = int.from_bytes(data[at : at + 2], "big")
        if len(data) != at + 2 + 2 * count:
            raise ProtocolError("option '%s' has the wrong length" % nbd.OPTION_NAMES[option.option])
        if count > nbd.MAX_QUERIES:
            raise ProtocolError("%d pieces of information wanted, more than %d" % (count, nbd.MAX_QUERIES))
        option.wanted = [int.from_bytes(data[i : i + 2], "big") for i in range(at + 2, len(data), 2)]

    def _parse_queries(self, option: Option, data: bytes) -> None:
        if not self.structured:
            raise ProtocolError("request option '%s' when structured reply is not negotiated" % nbd.OPTION_NAMES[option.option])
        option.name, at = _string(data, 0, "export name")
        if len(data) < at + 4:
            raise ProtocolError("option '%s' has the wrong length" % nbd.OPTION_NAMES[option.option])
        count = int.from_bytes(data[at : at + 4], "big")
        at += 4
        if count > nbd.MAX_QUERIES:
            raise ProtocolError("%d queries, more than %d" % (count, nbd.MAX_QUERIES))
        for index in range(count):
            query, at = _string(data, at, "query %d" % index)
            option.queries.append(query)
        if at != len(data):
            raise ProtocolError("option '%s' has the wrong length" % nbd.OPTION_NAMES[option.option])

    # -- negotiation: what to send -------------------------------------------------------------------------------

    def greeting(self) -> bytes:
        """The first bytes of the connection."""
        return nbd.INIT_MAGIC + nbd.OPTION_MAGIC + (nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES).to_bytes(2, "big")

    def export_name(self, size: int, flags: int) -> bytes:
        """The answer to EXPORT_NAME: this export; requests come next."""
        self._announce(size, flags)
        self._begin()
        return nbd.U64.pack(size) + flags.to_bytes(2, "big") + (bytes(124) if self._zeroes else b"")

    def accept(self, option: Option) -> bytes:
        """REP_ACK, the last reply, and what follows from it.

        STARTTLS: the TLS handshake comes next, and all is forgotten that was negotiated; the caller sets tls = False after it.
        GO: requests come next.
        """
        number = option.option
        if number == nbd.OPT_STRUCTURED_REPLY:
            self.structured = True
        elif number == nbd.OPT_EXTENDED_HEADERS:
            self.structured = self.extended = True
        elif number == nbd.OPT_STARTTLS:
            if self._buffer:
                raise ProtocolError("the client went on unencrypted after STARTTLS")
            self.structured = self.extended = False
            self.contexts, self.contexts_name = {}, None
        elif number == nbd.OPT_GO:
            if self.contexts_name != option.name:
                self.contexts = {}
            self._begin()
        return self._reply(option, nbd.REP_ACK)

    def refuse(self, option: Option, error: int = 0, text: str = "") -> bytes:
        """The last reply to an option, an error: the one that came with it, or another one."""
        message = (text or option.text).encode("utf-8", "replace")[: nbd.MAX_STRING]
        return self._reply(option, error or option.error, message)

    def listed(self, option: Option, name: str, description: str = "") -> bytes:
        """One export of the LIST."""
        data = nbd.counted(nbd.bytes_of(name, "export name")) + nbd.bytes_of(description, "export description")
        return self._reply(option, nbd.REP_SERVER, data)

    def info_export(self, option: Option, size: int, flags: int) -> bytes:
        """For INFO and GO: the size in bytes and the transmission flags."""
        self._announce(size, flags)
        return self._reply(option, nbd.REP_INFO, nbd.INFO_EXPORT_FIELDS.pack(nbd.INFO_EXPORT, size, flags))

    def info_text(self, option: Option, kind: int, text: str) -> bytes:
        """For INFO and GO: INFO_NAME or INFO_DESCRIPTION."""
        return self._reply(option, nbd.REP_INFO, kind.to_bytes(2, "big") + nbd.bytes_of(text, "export description"))

    def info_block_size(self, option: Option, minimum: int, preferred: int, maximum: int) -> bytes:
        """For INFO and GO: the unit of requests (it is insisted on from now on), the best size, the largest payload."""
        self.minimum = minimum
        data = nbd.INFO_BLOCK_SIZE_FIELDS.pack(nbd.INFO_BLOCK_SIZE, minimum, preferred, maximum)
        return self._reply(option, nbd.REP_INFO, data)

    def meta_context(self, option: Option, number: int, name: str) -> bytes:
        """A context that a query found; by SET_META_CONTEXT it is selected."""
        if option.option == nbd.OPT_SET_META_CONTEXT:
            self.contexts[number] = name
        return self._reply(option, nbd.REP_META_CONTEXT, nbd.U32.pack(number) + nbd.bytes_of(name, "meta context"))

    def _reply(self, option: Option, code: int, data: bytes = b"") -> bytes:
        return nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option.option, code, len(data)) + data

    def _announce(self, size: int, flags: int) -> None:
        self.size, self.flags = size, flags

    def _begin(self) -> None:
        self.transmission = True
        self._state = self._read_request

    # -- transmission: what comes --------------------------------------------------------------------------------

    def _read_request(self) -> Optional[Request]:
        fields = self._peek(nbd.EXTENDED_REQUEST if self.extended else nbd.REQUEST)
        if fields is None:
            return None
        if fields[0] != (nbd.EXTENDED_REQUEST_MAGIC if self.extended else nbd.REQUEST_MAGIC):
            raise ProtocolError("invalid magic (got 0x%x)" % fields[0])
        flags, command, handle, offset, length = fields[1:]
        request = Request(command, flags, handle, offset, length)
        size = nbd.EXTENDED_REQUEST.size if self.extended else nbd.REQUEST.size
        # QEMU's client sends a write with extended headers without the flag that is due; its payload comes all the same.
        has_payload = command == nbd.CMD_WRITE or self.extended and flags & nbd.FLAG_PAYLOAD_LEN
        if not has_payload:
            del self._buffer[:size]
            return self._checked(request)
        if length > nbd.MAX_PAYLOAD:
            raise ProtocolError("payload (%d) is larger than max len (%d)" % (length, nbd.MAX_PAYLOAD))
        if command == nbd.CMD_BLOCK_STATUS and self.flags & nbd.BLOCK_STAT_PAYLOAD:
            return self._read_filter(request, size)
        del self._buffer[:size]
        self._checked(request)
        if request.error or command != nbd.CMD_WRITE:
            self._skip = length
            return request if request.error else request.refuse(nbd.EINVAL, "command %d takes no payload" % command)
        self.payload = request.payload = length
        return request

    def _read_filter(self, request: Request, size: int) -> Optional[Request]:
        """A CMD_BLOCK_STATUS whose payload names the contexts that it is about."""
        length = request.length
        request.length = 0
        if length < 8 or length % 4 or length > 8 + 4 * nbd.MAX_CONTEXTS:
            del self._buffer[:size]
            self._skip = length
            return request.refuse(nbd.EINVAL, "payload length %d is not valid" % length)
        whole = self._take(size + length)
        if whole is None:
            return None
        request.length = int.from_bytes(whole[size : size + 8], "big")
        chosen = [int.from_bytes(whole[i : i + 4], "big") for i in range(size + 8, len(whole), 4)]
        self._checked(request)
        if not request.error and (not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(self.contexts)):
            return request.refuse(nbd.EINVAL, "invalid payload of contexts")
        request.contexts = chosen
        return request

    def _checked(self, request: Request) -> Request:
        """`request`, refused where it breaks a rule."""
        command, flags, length = request.command, request.flags, request.length
        if command not in _FLAGS:
            return request.refuse(nbd.EINVAL, "invalid request type (%u) received" % command)
        if flags & ~self._valid_flags(command):
            return request.refuse(nbd.EINVAL, "unsupported flags for command %d (got 0x%x)" % (command, flags))
        if command in _ANNOUNCED and not self.flags & _ANNOUNCED[command] and command not in _WRITING:
            return request.refuse(nbd.EINVAL, "command %d was not announced" % command)
        if command in (nbd.CMD_DISC, nbd.CMD_FLUSH):
            return request
        if command in _WRITING:
            if self.flags & nbd.READ_ONLY:
                return request.refuse(nbd.EPERM, "Export is read-only")
            if command in _ANNOUNCED and not self.flags & _ANNOUNCED[command]:
                return request.refuse(nbd.EINVAL, "command %d was not announced" % command)
        if command == nbd.CMD_BLOCK_STATUS and not self.contexts:
            return request.refuse(nbd.EINVAL, "CMD_BLOCK_STATUS not negotiated")
        return self._in_range(request, length)

    def _valid_flags(self, command: int) -> int:
        valid = _FLAGS[command]
        if not self.extended or command == nbd.CMD_BLOCK_STATUS and not self.flags & nbd.BLOCK_STAT_PAYLOAD:
            valid &= ~nbd.FLAG_PAYLOAD_LEN
        if not self.structured:
            valid &= ~nbd.FLAG_DF
        if not self.flags & nbd.SEND_FAST_ZERO:
            valid &= ~nbd.FLAG_FAST_ZERO
        return valid

    def _in_range(self, request: Request, length: int) -> Request:
        command, offset = request.command, request.offset
        if command == nbd.CMD_READ and length > nbd.MAX_PAYLOAD:
            return request.refuse(nbd.EINVAL, "len (%d) is larger than max len (%d)" % (length, nbd.MAX_PAYLOAD))
        if offset + length > self.size:
            error = nbd.ENOSPC if command in (nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES) else nbd.EINVAL
            return request.refuse(error, "operation past EOF; From: %d, Len: %d, Size: %d" % (offset, length, self.size))
        if offset % self.minimum or length % self.minimum:
            text = "request of %d bytes at %d is not aligned to %d" % (length, offset, self.minimum)
            return request.refuse(nbd.EINVAL, text)
        if command == nbd.CMD_BLOCK_STATUS:
            if not length:
                return request.refuse(nbd.EINVAL, "block status of no bytes")
            request.contexts = tuple(self.contexts)
        return request

    # -- transmission: what to send ------------------------------------------------------------------------------

    def reply_done(self, request: Request) -> bytes:
        """The request succeeded, and all of its content, if any, was sent."""
        if self.structured and (self.extended or request.command == nbd.CMD_READ or request.command == nbd.CMD_BLOCK_STATUS):
            return self._chunk(request, nbd.CHUNK_NONE, 0, True)
        return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, request.handle)

    def reply_error(self, request: Request, error: int = 0, text: str = "", done: bool = True) -> bytes:
        """The request failed, with the error that it came with or another one; numbers that NBD does not know become EINVAL."""
        error = error or request.error
        error = error if error in nbd.ERRORS else nbd.EINVAL
        if not self.structured:
            return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, request.handle)
        message = (text or request.text).encode("utf-8", "replace")[: nbd.MAX_STRING]
        body = nbd.ERROR.pack(error, len(message)) + message
        return self._chunk(request, nbd.CHUNK_ERROR, len(body), done) + body

    def reply_data(self, request: Request, offset: int, length: int, done: bool = True) -> bytes:
        """What stands before `length` bytes (not 0) read at `offset`; they follow it. Without structured replies that is all
        the request asked for."""
        if not self.structured:
            if offset != request.offset or length != request.length or not done:
                raise RuntimeError("a simple reply cannot be cut")
            return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, request.handle)
        return self._chunk(request, nbd.CHUNK_DATA, length + 8, done) + nbd.U64.pack(offset)

    def reply_hole(self, request: Request, offset: int, length: int, done: bool = True) -> bytes:
        """`length` bytes (not 0) at `offset` read as zeroes; only with structured replies."""
        return self._chunk(request, nbd.CHUNK_HOLE, nbd.HOLE.size, done) + nbd.HOLE.pack(offset, length)

    def reply_status(self, request: Request, context: int, extents: Sequence[tuple[int, int]], done: bool = True) -> bytes:
        """The (length, flags) of extents (one at least) from the beginning of the request on; they may cover less of it, not more.

        In 32 bits an extent that is too long ends the list before it, cut to what fits.
        """
        if self.extended:
            head = nbd.STATUS_EXT.pack(context, len(extents))
            body = b"".join([nbd.EXTENT_EXT.pack(*extent) for extent in extents])
            return self._chunk(request, nbd.CHUNK_STATUS_EXT, len(head) + len(body), done) + head + body
        parts = [nbd.STATUS.pack(context)]
        for length, flags in extents:
            parts.append(nbd.EXTENT.pack(min(length, 0xFFFFF000), flags))
            if length > 0xFFFFF000:
                break
        body = b"".join(parts)
        return self._chunk(request, nbd.CHUNK_STATUS, len(body), done) + body

    def _chunk(self, request: Request, kind: int, length: int, done: bool) -> bytes:
        flags = nbd.CHUNK_DONE if done else 0
        if self.extended:
            return nbd.EXTENDED_REPLY.pack(nbd.EXTENDED_REPLY_MAGIC, flags, kind, request.handle, request.offset, length)
        return nbd.STRUCTURED_REPLY.pack(nbd.STRUCTURED_REPLY_MAGIC, flags, kind, request.handle, length)


def _string(data: bytes, at: int, what: str) -> tuple[str, int]:
    """A string with its length in front, and where it ends."""
    length = int.from_bytes(data[at : at + 4], "big")
    end = at + 4 + length
    if at + 4 > len(data) or end > len(data):
        raise ProtocolError("NBD: %s reaches beyond the end of the option" % what)
    return nbd.text_of(data[at + 4 : end], what), end


__all__ = ["Option", "Request", "ServerCodec"]
