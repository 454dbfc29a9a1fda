# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What the requests of NBD clients do (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, Transmission phase).

Bytes of plain files go from the file to the socket by sendfile(2). Nobody waits for a client while a request holds back a change
of the graph: data that the client does not take at once is looked for again when it does.
"""

from __future__ import annotations

import errno
import os
from threading import Lock
from time import perf_counter, perf_counter_ns

from ..errors import Error, ProtocolError
from ..extent import ZERO
from ..filter import Filter
from ..node import Node, fill_zeroes
from ..protocols.nbd import codec as nbd
from .stream import STALL, Disconnected

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional, Union

    from ..extent import Extent
    from ..protocols.nbd.codec_server import Request, ServerCodec
    from .exports import Export
    from .stream import Stream

MAX_BUFFER = 1 << 20  # bytes of a client's data that one thread holds
FIRST_BUFFER = 1 << 16
PIECE = 256 << 20  # bytes that are zeroed, discarded or cached in one go
SEND_FILE = 1 << 15  # bytes; less is read and sent with what is beside it
AT_ONCE = 1 << 18  # bytes that are sent from a file in one go
HOLE = 4096  # bytes; smaller ones are sent as zeroes
MAX_STATUS_EXTENTS = 4096  # of one context in one reply
SLOW = 0.001  # seconds for a request of the storage: from there on several are done at a time
MAX_HELD = 1 << 18  # bytes of replies that go out together
SAMPLE = 16  # of so many reads one is timed

_ERRORS = {
    errno.EPERM: nbd.EPERM,
    errno.EACCES: nbd.EPERM,
    errno.EROFS: nbd.EPERM,
    errno.ENOMEM: nbd.ENOMEM,
    errno.EINVAL: nbd.EINVAL,
    errno.ENOSPC: nbd.ENOSPC,
    errno.EDQUOT: nbd.ENOSPC,
    errno.EFBIG: nbd.ENOSPC,
    errno.EOVERFLOW: nbd.EOVERFLOW,
    errno.ENOTSUP: nbd.ENOTSUP,
    errno.ESHUTDOWN: nbd.ESHUTDOWN,
}


class Buffer:
    """One thread's place for data, as large as the requests that it met."""

    __slots__ = ("view",)

    def __init__(self, size: int = FIRST_BUFFER) -> None:
        self.view = memoryview(bytearray(size))

    def fitting(self, request: Request) -> Buffer:
        """This one, or a larger one if the request is worth it."""
        have = len(self.view)
        if request.length <= have or have == MAX_BUFFER or request.command not in (nbd.CMD_READ, nbd.CMD_WRITE):
            return self
        size = MAX_BUFFER
        while size // 2 >= request.length:
            size //= 2
        return Buffer(size)


class Chunk:
    """What is still to be sent of a chunk, of which something was sent if it is `begun`: `head`, and `length` bytes at `offset`."""

    __slots__ = ("head", "offset", "length", "begun")

    def __init__(self, head: Union[bytes, bytearray], offset: int, length: int) -> None:
        self.head = head
        self.begun = False
        self.offset = offset
        self.length = length

    def sent(self, count: int) -> None:
        """So many bytes less."""
        self.offset += count
        self.length -= count


class Transmission:
    """Does one client's requests for one export; several threads may call `do` at once."""

    def __init__(self, codec: ServerCodec, stream: Stream, export: Export) -> None:
        self._codec = codec
        self._stream = stream
        self._root = export.root
        self._export = export
        self._sending = Lock()
        self._held = bytearray()  # replies, or the ends of some, that go out with the next one where its request is here already
        self._seconds = 0.0  # that a request of the storage takes, on average
        self._reads = 0
        self._do: dict[int, Callable[[Request, memoryview], None]] = {
            nbd.CMD_READ: self._read,
            nbd.CMD_WRITE: self._write,
            nbd.CMD_FLUSH: self._flush,
            nbd.CMD_TRIM: self._trim,
            nbd.CMD_CACHE: self._cache,
            nbd.CMD_WRITE_ZEROES: self._zero,
            nbd.CMD_BLOCK_STATUS: self._status,
        }

    def buffer(self) -> Buffer:
        """A place for data, for one thread."""
        return Buffer()

    def overlaps(self, request: Request) -> bool:
        """Whether the next request should be begun before this one is done."""
        return not request.error and (self._seconds > SLOW or request.command in (nbd.CMD_FLUSH, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES))

    def take_payload(self, request: Request, buffer: Buffer) -> bool:
        """Receive what a write brings with it; False if that is more than the buffer holds: `do` takes it piece by piece then."""
        if request.payload > len(buffer.view):
            return False
        if request.payload:
            self._fill(buffer.view[: request.payload])
        return True

    def do(self, request: Request, buffer: Buffer) -> None:
        """Do one request and answer it. Raises Disconnected, ProtocolError."""
        if self._held and (request.command != nbd.CMD_READ or self._seconds > SLOW):
            self.flush()
        if request.error:
            self._answer(self._codec.reply_error(request))
            return
        try:
            if request.offset + request.length > self._root.size:  # it was larger when the client came
                number = nbd.ENOSPC if request.command in (nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES) else nbd.EINVAL
                raise Error("the export has only %d bytes now" % self._root.size, errno=number)
            self._do[request.command](request, buffer.view)
        except (Error, OSError, MemoryError) as exc:
            if isinstance(exc, ProtocolError):
                raise
            if self._codec.payload and request.payload:
                self._codec.skip_payload()
            self._answer(self._codec.reply_error(request, number_of(exc), str(exc)))

    def flush(self) -> None:
        """Send replies that are held back; to be called before anything that may take its time."""
        with self._sending:
            self._stream.send(self._take_held())

    def _take_held(self) -> bytearray:
        held, self._held = self._held, bytearray()
        return held

    def _release(self) -> None:
        """Send what is held back, unless the next request is here and will be answered soon."""
        if self._codec.buffered < nbd.EXTENDED_REQUEST.size or len(self._held) > MAX_HELD or self._seconds > SLOW:
            self._stream.send(self._take_held())

    def _answer(self, data: bytes) -> None:
        with self._sending:
            self._stream.send(self._take_held(), data)

    def _took(self, began: float) -> None:
        self._seconds += (perf_counter() - began - self._seconds) / 8

    # -- reading -------------------------------------------------------------------------------------------------

    def _read(self, request: Request, buffer: memoryview) -> None:
        codec = self._codec
        offset, left = request.offset, request.length
        if not left:
            self._answer(codec.reply_done(request))
            return
        began = perf_counter_ns()
        if left < SEND_FILE:
            self._read_small(request, buffer)
            self._root.count("rd", request.length, perf_counter_ns() - began)
            return
        self._reads += 1
        direct = self._stream.plain and self._seconds <= SLOW and self._reads % SAMPLE != 0
        pieces = [(offset, left, False)] if not codec.structured or request.flags & nbd.FLAG_DF else self._plan(offset, left)
        for number, (start, length, hole) in enumerate(pieces):
            done = number == len(pieces) - 1
            if hole:
                self._answer(codec.reply_hole(request, start, length, done))
            else:
                self._send_data(request, start, length, done, buffer, direct)
        self._root.count("rd", request.length, perf_counter_ns() - began)

    def _read_small(self, request: Request, buffer: memoryview) -> None:
        """A read that is not worth looking for holes, or for a file that it could be sent from."""
        began = perf_counter()
        length = self._gather(request.offset, request.length, buffer)
        self._took(began)
        head = self._codec.reply_data(request, request.offset, length)
        with self._sending:
            self._held += head
            self._held += buffer[:length]
            self._release()

    def _plan(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """(offset, length, hole) of the chunks that a read is answered with."""
        pieces: list[tuple[int, int, bool]] = []
        with self._root.request() as node:
            extents = node.resolve(offset, length)
        for start, count, status, _host, _host_offset in extents:
            hole = bool(status & ZERO) and count >= HOLE
            if pieces and pieces[-1][2] == hole:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + count, hole)
            else:
                pieces.append((start, count, hole))
        return pieces

    def _send_data(self, request: Request, offset: int, length: int, done: bool, buffer: memoryview, direct: bool) -> None:
        """Send one chunk of data. Raises what storage raises as long as nothing of it is sent.

        Where an error may still come when the head of a structured reply is sent, that is not the last chunk: one more ends the reply.
        """
        ready = 0
        if not direct:
            began = perf_counter()
            ready = self._gather(offset, min(length, len(buffer)), buffer)
            self._took(began)
        open_end = done and self._codec.structured and ready < length
        head = self._codec.reply_data(request, offset, length, done and not open_end)
        with self._sending:
            chunk = Chunk(self._take_held() + head, offset, length)
            while chunk.length:
                if ready:
                    self._stream.send(chunk.head, buffer[:ready])
                    chunk.head, chunk.begun = b"", True
                    chunk.sent(ready)
                    ready = 0
                    continue
                try:
                    ready = self._push(chunk, buffer, direct)
                except (Error, OSError) as exc:
                    if not chunk.begun:
                        self._held += chunk.head[: -len(head)]
                        raise
                    self._give_up(request, chunk, exc)
                    return
            if open_end:
                self._held += self._codec.reply_done(request)
                self._release()

    def _push(self, chunk: Chunk, buffer: memoryview, direct: bool) -> int:
        """Send what can be sent from files, up to something that cannot: that is read, and so many bytes are in the buffer then."""
        with self._root.request() as node:
            until = perf_counter() + STALL
            extents = node.resolve(chunk.offset, chunk.length)
            for index, (_start, count, _status, host, host_offset) in enumerate(extents):
                fd = descriptor(host, count) if direct else -1
                if fd < 0:
                    return _read_extents(extents[index:], buffer, direct)
                if chunk.head:
                    sent = self._stream.send_first(chunk.head)
                    chunk.begun |= sent > 0
                    chunk.head = chunk.head[sent:]
                    if chunk.head:
                        break
                done = 0
                while done < count:
                    moved = self._stream.send_file(fd, host_offset + done, min(count - done, AT_ONCE))
                    if moved is None:
                        break
                    done += moved
                    chunk.sent(moved)
                    if not moved:  # the file ends here, the node does not
                        rest = min(count - done, len(buffer))
                        fill_zeroes(buffer[:rest])
                        return rest
                    if perf_counter() > until:  # a client that takes little at a time
                        return 0
                else:
                    continue
                break
            else:
                return 0
        self._stream.wait()
        return 0

    def _gather(self, offset: int, length: int, buffer: memoryview) -> int:
        """Read `length` bytes into the buffer."""
        with self._root.request() as node:
            return _read_extents(node.resolve(offset, length), buffer[:length], False)

    def _give_up(self, request: Request, chunk: Chunk, exc: Exception) -> None:
        """Storage fails in the middle of a chunk: the rest of it is zeroes, and an error chunk says that none of it is true."""
        if not self._codec.structured:
            raise Disconnected("reading failed in the middle of a reply: %s" % exc)
        zeroes = bytes(min(chunk.length, FIRST_BUFFER))
        while chunk.length:
            count = min(chunk.length, len(zeroes))
            self._stream.send(chunk.head, zeroes[:count])
            chunk.head = b""
            chunk.sent(count)
        self._stream.send(self._codec.reply_error(request, number_of(exc), str(exc)))

    # -- writing -------------------------------------------------------------------------------------------------

    def _fill(self, view: memoryview) -> None:
        """Receive a part of a payload."""
        codec = self._codec
        count = codec.payload_into(view)
        if count < len(view):
            self._stream.fill(view[count:])
            codec.payload_received(len(view) - count)

    def _write(self, request: Request, buffer: memoryview) -> None:
        fua = bool(request.flags & nbd.FLAG_FUA) or self._export.writethrough
        offset, left = request.offset, request.length
        began = perf_counter()
        if left <= len(buffer):
            self._root.pwrite(offset, buffer[:left], fua)
        else:
            try:
                while left:
                    view = buffer[:left]
                    self._fill(view)
                    left -= len(view)
                    self._root.pwrite(offset, view, fua and not left)
                    offset += len(view)
            finally:
                self._codec.skip_payload()
        self._took(began)
        self._answer(self._codec.reply_done(request))

    def _flush(self, request: Request, _buffer: memoryview) -> None:
        if self._export.writable:
            self._root.flush()
        self._answer(self._codec.reply_done(request))

    def _trim(self, request: Request, _buffer: memoryview) -> None:
        for offset, length in _pieces(request):
            self._root.pdiscard(offset, length)
        self._settle(request)

    def _zero(self, request: Request, _buffer: memoryview) -> None:
        if request.flags & nbd.FLAG_FAST_ZERO and not zeroes_fast(self._root.node):
            raise Error("zeroing would be no faster than writing", errno=errno.ENOTSUP)
        for offset, length in _pieces(request):
            self._root.pwrite_zeroes(offset, length, not request.flags & nbd.FLAG_NO_HOLE)
        self._settle(request)

    def _settle(self, request: Request) -> None:
        if request.flags & nbd.FLAG_FUA or self._export.writethrough:
            self._root.flush()
        self._answer(self._codec.reply_done(request))

    # -- the rest ------------------------------------------------------------------------------------------------

    def _cache(self, request: Request, buffer: memoryview) -> None:
        """Have the host read ahead; what no file of the host holds is read, for whoever below keeps it."""
        for offset, length in _pieces(request):
            others = []
            with self._root.request() as node:
                for start, count, _status, host, host_offset in node.resolve(offset, length):
                    fd = descriptor(host, SEND_FILE)
                    if fd >= 0:
                        os.posix_fadvise(fd, host_offset, count, os.POSIX_FADV_WILLNEED)
                    elif host is not None:
                        others.append((start, count))
            for start, count in others:
                for position in range(start, start + count, len(buffer)):
                    self._root.pread_into(position, buffer[: min(len(buffer), start + count - position)])
        self._answer(self._codec.reply_done(request))

    def _status(self, request: Request, _buffer: memoryview) -> None:
        limit = 1 if request.flags & nbd.FLAG_REQ_ONE else MAX_STATUS_EXTENTS
        parts = []
        for index, number in enumerate(request.contexts):
            with self._root.request() as node:
                extents = self._export.contexts[number].extents(node, request.offset, request.length, limit)
            parts.append(self._codec.reply_status(request, number, extents, index == len(request.contexts) - 1))
        self._answer(b"".join(parts))


def number_of(exc: Exception) -> int:
    """The error number that a client is told."""
    if isinstance(exc, MemoryError):
        return nbd.ENOMEM
    return _ERRORS.get(getattr(exc, "errno", None) or 0, nbd.EIO)


def descriptor(host: Optional[Node], length: int) -> int:
    """The file from which `length` bytes of `host` can be sent as they are, or -1."""
    if host is None or length < SEND_FILE or host.request_alignment != 1:
        return -1
    return host.fileno()


def _read_extents(extents: list[Extent], buffer: memoryview, direct: bool) -> int:
    """Read as many of the extents as the buffer holds, the last perhaps in part, up to one that is better sent from its file."""
    have = 0
    for _start, count, _status, host, host_offset in extents:
        room = len(buffer) - have
        if not room or direct and have and descriptor(host, count) >= 0:
            break
        part = buffer[have : have + min(count, room)]
        if host is None:
            fill_zeroes(part)
        else:
            host.read_own(host_offset, part)
        have += len(part)
    return have


def zeroes_fast(node: Node) -> bool:
    """Whether the node has a way to zero a range other than to write zeroes."""
    while "file" in node.children and (isinstance(node, Filter) or node.driver == "raw"):
        node = node.children["file"]
    return type(node)._zero is not Node._zero


def _pieces(request: Request) -> list[tuple[int, int]]:
    """The range of a request, PIECE bytes at a time."""
    end = request.offset + request.length
    return [(start, min(PIECE, end - start)) for start in range(request.offset, end, PIECE)]
