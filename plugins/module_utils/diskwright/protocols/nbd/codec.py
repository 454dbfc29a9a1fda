# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What both roles of the NBD codec share: the protocol's numbers, the limits, the stream of incoming bytes.

The protocol is https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md. The codec is a state machine without
sockets: bytes go in, events come out, and functions give the bytes to send. Payloads pass it by: it says how many bytes
follow, and whoever has the socket receives them where they belong.
"""

from __future__ import annotations

import struct

from ...errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional, Union

    Buffer = Union[bytes, bytearray, memoryview]

INIT_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

# handshake flags; the client answers with the same bits
FIXED_NEWSTYLE = 1
NO_ZEROES = 2

# options
OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10
OPT_EXTENDED_HEADERS = 11

OPTION_NAMES = {
    OPT_EXPORT_NAME: "export name",
    OPT_ABORT: "abort",
    OPT_LIST: "list",
    4: "peek export",
    OPT_STARTTLS: "starttls",
    OPT_INFO: "info",
    OPT_GO: "go",
    OPT_STRUCTURED_REPLY: "structured reply",
    OPT_LIST_META_CONTEXT: "list meta context",
    OPT_SET_META_CONTEXT: "set meta context",
    OPT_EXTENDED_HEADERS: "extended headers",
}

# replies to options
REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERROR = 1 << 31
REP_ERR_UNSUP = REP_ERROR + 1
REP_ERR_POLICY = REP_ERROR + 2
REP_ERR_INVALID = REP_ERROR + 3
REP_ERR_PLATFORM = REP_ERROR + 4
REP_ERR_TLS_REQD = REP_ERROR + 5
REP_ERR_UNKNOWN = REP_ERROR + 6
REP_ERR_SHUTDOWN = REP_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD = REP_ERROR + 8
REP_ERR_TOO_BIG = REP_ERROR + 9
REP_ERR_EXT_HEADER_REQD = REP_ERROR + 10

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

# transmission flags of an export
HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
ROTATIONAL = 1 << 4
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
SEND_DF = 1 << 7
CAN_MULTI_CONN = 1 << 8
SEND_RESIZE = 1 << 9
SEND_CACHE = 1 << 10
SEND_FAST_ZERO = 1 << 11
BLOCK_STAT_PAYLOAD = 1 << 12

# commands
CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

# command flags
FLAG_FUA = 1 << 0
FLAG_NO_HOLE = 1 << 1
FLAG_DF = 1 << 2
FLAG_REQ_ONE = 1 << 3
FLAG_FAST_ZERO = 1 << 4
FLAG_PAYLOAD_LEN = 1 << 5

# chunks of structured and extended replies
CHUNK_DONE = 1
CHUNK_NONE = 0
CHUNK_DATA = 1
CHUNK_HOLE = 2
CHUNK_STATUS = 5
CHUNK_STATUS_EXT = 6
CHUNK_ERROR = (1 << 15) + 1
CHUNK_ERROR_OFFSET = (1 << 15) + 2

# what base:allocation says of an extent
STATE_HOLE = 1
STATE_ZERO = 2

# errors, whose numbers are Linux's
EPERM = 1
EIO = 5
ENOMEM = 12
EINVAL = 22
ENOSPC = 28
EOVERFLOW = 75
ENOTSUP = 95
ESHUTDOWN = 108
ERRORS = (EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN)

BASE_ALLOCATION = "base:allocation"

# Limits of what a peer may send.
MAX_STRING = 4096  # bytes of a name, a query, a message
MAX_PAYLOAD = 32 << 20  # bytes that one request reads or writes
MAX_OPTION = 1 << 20  # bytes of an option or of a reply to one; what is longer is read past
MAX_SKIPPED = 32 << 20  # bytes that are read past; who announces more is cut off
MAX_QUERIES = 1024  # queries, and requests for information, in one option
MAX_OPTION_REPLIES = 1 << 16  # replies to one option
MAX_EXTENTS = 1 << 20  # descriptors of one block status chunk
MAX_CONTEXTS = 64  # metadata contexts of a connection
MAX_ERROR_CHUNKS = 64  # of one reply

OPTION_HEADER = struct.Struct(">8sII")  # magic, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, type, length
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, handle, offset, length
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, handle
STRUCTURED_REPLY = struct.Struct(">IHHQI")  # magic, flags, type, handle, length
EXTENDED_REPLY = struct.Struct(">IHHQQQ")  # magic, flags, type, handle, offset, length
HOLE = struct.Struct(">QI")  # offset, length
ERROR = struct.Struct(">IH")  # error, length of the message
INFO_EXPORT_FIELDS = struct.Struct(">HQH")  # type, size, flags
INFO_BLOCK_SIZE_FIELDS = struct.Struct(">HIII")  # type, minimum, preferred, maximum
STATUS = struct.Struct(">I")  # context; then the descriptors
STATUS_EXT = struct.Struct(">II")  # context, count; then the descriptors
EXTENT = struct.Struct(">II")  # length, flags
EXTENT_EXT = struct.Struct(">QQ")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")


class Codec:
    """The incoming half of a connection: bytes that were received and not yet understood, and what is to be done next.

    `receive` takes bytes, `next_event` gives events until it returns None, which means that it needs `missing` more bytes.
    After an event with a payload (`payload` > 0) the caller moves its bytes, first those that are here already
    (payload_into), then those it receives itself (payload_received), and only then asks for the next event.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._state: Callable[[], Any] = self._unready
        self._skip = 0  # bytes to be read past
        self.payload = 0  # bytes of the payload that were not yet moved
        self.missing = 1  # at least so many bytes are needed for the next event

    def _unready(self) -> Any:
        raise NotImplementedError

    def receive(self, data: Buffer) -> None:
        """Take bytes from the peer, as many as there are."""
        self._buffer += data

    def next_event(self) -> Any:
        """The next thing that the peer said; None where that is not complete. Raises ProtocolError, for good."""
        while True:
            if self.payload:
                raise RuntimeError("%d bytes of payload were not taken" % self.payload)
            if self._skip:
                past = min(self._skip, len(self._buffer))
                del self._buffer[:past]
                self._skip -= past
                if self._skip:
                    self.missing = self._skip
                    return None
            self.missing = 0
            event = self._state()
            if event is not None:
                return event
            if self.missing:
                return None

    def payload_into(self, view: memoryview) -> int:
        """Move what is here already of the payload to the beginning of `view`; returns how many bytes that were."""
        count = min(self.payload, len(view), len(self._buffer))
        if count:
            with memoryview(self._buffer) as buffer:
                view[:count] = buffer[:count]
            del self._buffer[:count]
            self.payload -= count
        return count

    def payload_received(self, count: int) -> None:
        """Say that `count` bytes of the payload were received past the codec."""
        if count > self.payload or self._buffer:
            raise RuntimeError("that was no payload")
        self.payload -= count

    def skip_payload(self) -> None:
        """Nobody wants the rest of the payload: read past it."""
        self._skip += self.payload
        self.payload = 0

    @property
    def buffered(self) -> int:
        """Bytes that were received and are not used yet."""
        return len(self._buffer)

    def _take(self, count: int) -> Optional[bytes]:
        """The next `count` bytes, or None (and `missing` says how many are) where there are fewer."""
        if len(self._buffer) < count:
            self.missing = count - len(self._buffer)
            return None
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _peek(self, layout: struct.Struct, at: int = 0) -> Optional[tuple[Any, ...]]:
        """The fields of `layout` at `at`, left where they are; None where bytes are missing."""
        if len(self._buffer) < at + layout.size:
            self.missing = at + layout.size - len(self._buffer)
            return None
        return layout.unpack_from(self._buffer, at)


def text_of(data: bytes, what: str) -> str:
    """A string of the protocol. Raises ProtocolError where it is too long, no UTF-8, or has a NUL in it."""
    if len(data) > MAX_STRING:
        raise ProtocolError("NBD: %s has %d bytes, more than %d" % (what, len(data), MAX_STRING))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("NBD: %s is not UTF-8" % what) from None
    if "\0" in text:
        raise ProtocolError("NBD: %s has a NUL in it" % what)
    return text


def bytes_of(text: str, what: str) -> bytes:
    """A string as it is sent. Raises ProtocolError where it may not be: too long, no text, with a NUL in it."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ProtocolError("NBD: %s is no text" % what) from None
    if len(data) > MAX_STRING:
        raise ProtocolError("NBD: %s has %d bytes, more than %d" % (what, len(data), MAX_STRING))
    if b"\0" in data:
        raise ProtocolError("NBD: %s has a NUL in it" % what)
    return data


def counted(data: bytes) -> bytes:
    """A string with its length in front."""
    return U32.pack(len(data)) + data


def message_of(data: bytes) -> str:
    """A message for people, whatever is in it: cut, decoded as far as it can be, control characters made harmless."""
    text = data[:MAX_STRING].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in text)
