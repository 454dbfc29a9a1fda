# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The NBD codec: both halves talk to each other, in whatever pieces the bytes arrive, and neither believes what it is sent."""

from __future__ import annotations

import random
import struct

import pytest

from diskwright.errors import ProtocolError
from diskwright.protocols.nbd import codec as nbd
from diskwright.protocols.nbd.codec_client import Answer, BlockSize, ClientCodec, Context, Data, Done, Export, Greeting, Hole, Listed, Status, Text
from diskwright.protocols.nbd.codec_server import Option, Request, ServerCodec

FLAGS = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.SEND_DF | nbd.SEND_FAST_ZERO | nbd.BLOCK_STAT_PAYLOAD
SIZE = 1 << 20
MODES = ("simple", "structured", "extended")
CONTEXTS = {7: nbd.BASE_ALLOCATION, 9: "qemu:dirty-bitmap:b0"}


def shown(event):
    """An event as plain values, without knowing what it is."""
    names = [name for kind in type(event).__mro__ for name in getattr(kind, "__slots__", ())]
    values = {name: getattr(event, name) for name in names}
    if isinstance(event, Status):
        values["_layout"] = values["_layout"].format
    return type(event).__name__, values


class Ends:
    """Both halves, connected; what one sends reaches the other in pieces of at most `piece` bytes."""

    def __init__(self, piece=1 << 30, tls=False):
        self.client = ClientCodec()
        self.server = ServerCodec(tls)
        self.piece = piece
        self.to_client(self.server.greeting())

    def deliver(self, codec, data):
        """The events that `data` makes, each with its payload."""
        events = []
        while True:
            event = codec.next_event()
            if event is not None:
                payload = memoryview(bytearray(codec.payload))
                taken = codec.payload_into(payload)
                while taken < len(payload):
                    count = min(self.piece, len(payload) - taken)
                    payload[taken : taken + count] = data[:count]
                    data = data[count:]
                    codec.payload_received(count)
                    taken += count
                events.append((event, bytes(payload)))
            elif data:
                codec.receive(data[: self.piece])
                data = data[self.piece :]
            else:
                return events

    def to_client(self, data):
        return self.deliver(self.client, data)

    def to_server(self, data):
        return self.deliver(self.server, data)

    def option(self, data):
        """The one Option that `data` is."""
        [(option, payload)] = self.to_server(data)
        assert isinstance(option, Option) and payload == b""
        return option

    def begin(self, mode="simple", contexts=None, flags=FLAGS, minimum=1):
        contexts = CONTEXTS if contexts is None else contexts
        self.to_server(self.client.client_flags())
        if mode != "simple":
            sent = self.client.structured_reply() if mode == "structured" else self.client.extended_headers()
            self.to_client(self.server.accept(self.option(sent)))
            option = self.option(self.client.set_meta_context("x", list(contexts.values())))
            replies = [self.server.meta_context(option, number, name) for number, name in contexts.items()]
            self.to_client(b"".join(replies) + self.server.accept(option))
        option = self.option(self.client.go("x", [nbd.INFO_BLOCK_SIZE]))
        answer = self.server.info_export(option, SIZE, flags) + self.server.info_block_size(option, minimum, 4096, nbd.MAX_PAYLOAD)
        self.to_client(answer + self.server.accept(option))
        assert self.client.transmission and self.server.transmission
        return self


@pytest.fixture(params=[1, 3, 1 << 30], ids=["bytewise", "threes", "whole"])
def piece(request):
    return request.param


def test_negotiation(piece):
    ends = Ends(piece, tls=True)
    greeting = ends.server.greeting()
    ends.client = ClientCodec()
    [(event, payload)] = ends.to_client(greeting)
    assert isinstance(event, Greeting) and event.fixed and payload == b""
    assert ends.to_server(ends.client.client_flags()) == []
    option = ends.option(ends.client.list_exports())
    assert option.error == nbd.REP_ERR_TLS_REQD
    [(event, payload)] = ends.to_client(ends.server.refuse(option))
    assert (event.option, event.code, event.text, event.accepted) == (nbd.OPT_LIST, option.error, "Option 0x3 not permitted before TLS", False)
    option = ends.option(ends.client.start_tls())
    [(event, payload)] = ends.to_client(ends.server.accept(option))
    assert event.accepted
    ends.server.tls = False
    option = ends.option(ends.client.list_exports())
    assert option.error == 0
    answer = ends.server.listed(option, "one", "the first") + ends.server.listed(option, "") + ends.server.accept(option)
    events = [event for event, payload in ends.to_client(answer)]
    assert [shown(event) for event in events[:2]] == [shown(Listed("one", "the first")), shown(Listed("", ""))] and events[2].accepted
    option = ends.option(ends.client.list_meta_context("one", ["base:", "qemu:"]))
    assert option.error == nbd.REP_ERR_INVALID
    ends.to_client(ends.server.refuse(option))
    ends.to_client(ends.server.accept(ends.option(ends.client.structured_reply())))
    option = ends.option(ends.client.list_meta_context("one", ["base:", "qemu:"]))
    assert (option.name, option.queries, option.error) == ("one", ["base:", "qemu:"], 0)
    [(event, payload), (last, payload)] = ends.to_client(ends.server.meta_context(option, 0, nbd.BASE_ALLOCATION) + ends.server.accept(option))
    assert shown(event) == shown(Context(0, nbd.BASE_ALLOCATION)) and ends.client.contexts == ends.server.contexts == {}
    option = ends.option(ends.client.info("one", [nbd.INFO_DESCRIPTION, 77]))
    assert option.wanted == [nbd.INFO_DESCRIPTION, 77]
    answer = ends.server.info_export(option, SIZE, FLAGS) + ends.server.info_text(option, nbd.INFO_DESCRIPTION, "words")
    answer += ends.server.info_text(option, 77, "unknown") + ends.server.info_block_size(option, 512, 4096, nbd.MAX_PAYLOAD) + ends.server.accept(option)
    events = [event for event, payload in ends.to_client(answer)]
    expected = [Export(SIZE, FLAGS, False), Text(nbd.INFO_DESCRIPTION, "words"), BlockSize(512, 4096, nbd.MAX_PAYLOAD), Answer(nbd.OPT_INFO, nbd.REP_ACK)]
    assert [shown(event) for event in events] == [shown(event) for event in expected]
    assert not ends.client.transmission and not ends.server.transmission
    assert ends.option(ends.client.abort()).option == nbd.OPT_ABORT
    ends.to_client(ends.server.accept(Option(nbd.OPT_ABORT)))


@pytest.mark.parametrize("no_zeroes", [True, False])
def test_export_name(piece, no_zeroes):
    ends = Ends(piece)
    if not no_zeroes:
        ends.client._flags = nbd.FIXED_NEWSTYLE
    ends.to_server(ends.client.client_flags())
    option = ends.option(ends.client.export_name("disk"))
    assert option.name == "disk"
    answer = ends.server.export_name(SIZE, FLAGS)
    assert len(answer) == (10 if no_zeroes else 134)
    [(event, payload)] = ends.to_client(answer)
    assert shown(event) == shown(Export(SIZE, FLAGS, True)) and ends.client.transmission


def test_oldstyle(piece):
    ends = Ends(piece)
    ends.client = ClientCodec()
    words = nbd.INIT_MAGIC + struct.pack(">QQI", nbd.OLDSTYLE_MAGIC, SIZE, 3) + bytes(124)
    [(event, payload)] = ends.to_client(words)
    assert shown(event) == shown(Export(SIZE, 3, True))


def script(ends, seed, mode):
    """A random conversation; returns what happened at both ends."""
    rng = random.Random(seed)
    log = []
    waiting = []
    for handle in range(40):
        command = rng.choice([nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_FLUSH, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES, nbd.CMD_BLOCK_STATUS])
        length = rng.randrange(1, 3000)
        offset = rng.randrange(0, SIZE - length)
        if command == nbd.CMD_FLUSH:
            offset = length = 0
        if command == nbd.CMD_BLOCK_STATUS and mode == "simple":
            continue
        if command == nbd.CMD_BLOCK_STATUS and mode == "extended" and rng.random() < 0.5:
            words = ends.client.block_status_of(handle, offset, length, [9])
        else:
            words = ends.client.request(command, handle, offset, length)
        payload = rng.randbytes(length) if command == nbd.CMD_WRITE else b""
        [(request, got)] = ends.to_server(words + payload)
        assert (request.command, request.offset, request.length, request.error, got) == (command, offset, length, 0, payload), request.text
        log.append(shown(request))
        waiting.append(request)
        if rng.random() < 0.3:
            rng.shuffle(waiting)
            for known in waiting:
                log.append([(shown(event), got) for event, got in ends.to_client(answer(ends.server, known, rng, mode))])
            waiting = []
    for known in waiting:
        log.append([(shown(event), got) for event, got in ends.to_client(answer(ends.server, known, rng, mode))])
    assert not ends.client.pending
    return log


def answer(server, request, rng, mode):
    if rng.random() < 0.2:
        return server.reply_error(request, rng.choice(nbd.ERRORS), "it is broken")
    if request.command == nbd.CMD_BLOCK_STATUS:
        parts = []
        for context in request.contexts:
            extents = [(rng.randrange(1, 5000), rng.randrange(4)) for _number in range(rng.randrange(1, 5))]
            parts.append(server.reply_status(request, context, extents, done=context == request.contexts[-1]))
        return b"".join(parts)
    if request.command != nbd.CMD_READ:
        return server.reply_done(request)
    if mode == "simple":
        return server.reply_data(request, request.offset, request.length) + rng.randbytes(request.length)
    cuts = sorted({request.offset, request.offset + request.length, *(request.offset + rng.randrange(request.length) for _number in range(4))})
    chunks = list(zip(cuts, cuts[1:]))
    rng.shuffle(chunks)
    parts = []
    for start, end in chunks:
        if rng.random() < 0.3:
            parts.append(server.reply_hole(request, start, end - start, done=False))
        else:
            parts.append(server.reply_data(request, start, end - start, done=False) + rng.randbytes(end - start))
    return b"".join(parts) + server.reply_done(request)


@pytest.mark.parametrize("mode", MODES)
def test_conversations(mode):
    for seed in range(6):
        logs = [script(Ends(piece).begin(mode), seed, mode) for piece in (1, 7, 1 << 30)]
        assert logs[0] == logs[1] == logs[2]


# -- what neither half believes --------------------------------------------------------------------------------------------


def option_words(number, data=b"", magic=nbd.OPTION_MAGIC):
    return nbd.OPTION_HEADER.pack(magic, number, len(data)) + data


def asked(*options):
    """What the server makes of the last of these options, having accepted the others."""
    ends = Ends()
    ends.to_server(ends.client.client_flags())
    for words in options[:-1]:
        ends.server.accept(ends.option(words))
    return ends.option(options[-1])


STRUCTURED = option_words(nbd.OPT_STRUCTURED_REPLY)
EXTENDED = option_words(nbd.OPT_EXTENDED_HEADERS)
NAME = nbd.counted(b"disk")

BAD_OPTIONS = [
    ([option_words(4)], nbd.REP_ERR_UNSUP, "Unsupported option 4 (peek export)"),
    ([option_words(99, b"abc")], nbd.REP_ERR_UNSUP, "Unsupported option 99 (<unknown>)"),
    ([option_words(nbd.OPT_LIST, b"x")], nbd.REP_ERR_INVALID, "option 'list' has unexpected length"),
    ([option_words(nbd.OPT_STARTTLS)], nbd.REP_ERR_POLICY, "TLS not configured"),
    ([STRUCTURED, STRUCTURED], nbd.REP_ERR_INVALID, "structured reply already negotiated"),
    ([EXTENDED, STRUCTURED], nbd.REP_ERR_EXT_HEADER_REQD, "extended headers already negotiated"),
    ([EXTENDED, EXTENDED], nbd.REP_ERR_INVALID, "extended headers already negotiated"),
    ([option_words(nbd.OPT_GO)], nbd.REP_ERR_INVALID, "NBD: export name reaches beyond the end of the option"),
    ([option_words(nbd.OPT_GO, b"\0\0\0\5disk")], nbd.REP_ERR_INVALID, "NBD: export name reaches beyond the end of the option"),
    ([option_words(nbd.OPT_GO, NAME)], nbd.REP_ERR_INVALID, "option 'go' has the wrong length"),
    ([option_words(nbd.OPT_INFO, NAME + b"\0\2\0\0")], nbd.REP_ERR_INVALID, "option 'info' has the wrong length"),
    ([option_words(nbd.OPT_GO, nbd.counted(b"\xff") + b"\0\0")], nbd.REP_ERR_INVALID, "NBD: export name is not UTF-8"),
    ([option_words(nbd.OPT_GO, nbd.counted(b"a\0b") + b"\0\0")], nbd.REP_ERR_INVALID, "NBD: export name has a NUL in it"),
    ([option_words(nbd.OPT_GO, nbd.counted(b"x" * 4097) + b"\0\0")], nbd.REP_ERR_INVALID, "NBD: export name has 4097 bytes, more than 4096"),
    ([option_words(nbd.OPT_GO, NAME + (1025).to_bytes(2, "big") + bytes(2050))], nbd.REP_ERR_INVALID, "1025 pieces of information wanted, more than 1024"),
    ([STRUCTURED, option_words(nbd.OPT_SET_META_CONTEXT, NAME)], nbd.REP_ERR_INVALID, "option 'set meta context' has the wrong length"),
    ([STRUCTURED, option_words(nbd.OPT_SET_META_CONTEXT, NAME + b"\0\0\0\2" + NAME)], nbd.REP_ERR_INVALID, "NBD: query 1 reaches beyond the end of the option"),
    ([STRUCTURED, option_words(nbd.OPT_SET_META_CONTEXT, NAME + b"\xff\xff\xff\xff")], nbd.REP_ERR_INVALID, "4294967295 queries, more than 1024"),
    ([STRUCTURED, option_words(nbd.OPT_SET_META_CONTEXT, NAME + b"\0\0\0\0x")], nbd.REP_ERR_INVALID, "option 'set meta context' has the wrong length"),
    ([option_words(nbd.OPT_LIST, bytes(nbd.MAX_OPTION + 1))], nbd.REP_ERR_TOO_BIG, "option has 1048577 bytes, more than 1048576"),
]


@pytest.mark.parametrize("options, error, text", BAD_OPTIONS)
def test_bad_options_are_refused(options, error, text):
    option = asked(*options)
    assert (option.error, option.text) == (error, text)


@pytest.mark.parametrize(
    "words, text",
    [
        (b"\0\0\0\7", "Unknown client flags 0x7 received"),
        (b"\0\0\0\3" + option_words(nbd.OPT_LIST, magic=b"IHAVEOPS"), "Bad magic received"),
        (b"\0\0\0\3" + nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, nbd.OPT_LIST, (32 << 20) + 1), "is larger than max len"),
        (b"\0\0\0\3" + nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, nbd.OPT_EXPORT_NAME, 4097), "Bad length received"),
        (b"\0\0\0\3" + option_words(nbd.OPT_EXPORT_NAME, b"\xff"), "export name is not UTF-8"),
        (b"\0\0\0\0" + option_words(nbd.OPT_LIST), r"Unsupported option 3 \(list\)"),
    ],
)
def test_hopeless_clients(words, text):
    server = ServerCodec()
    server.receive(words)
    with pytest.raises(ProtocolError, match=text):
        server.next_event()


def test_before_tls_there_is_no_export():
    server = ServerCodec(tls=True)
    server.receive(b"\0\0\0\3" + option_words(nbd.OPT_EXPORT_NAME, b"x"))
    with pytest.raises(ProtocolError, match="Option 0x1 not permitted before TLS"):
        server.next_event()
    server = ServerCodec(tls=True)
    server.receive(b"\0\0\0\3" + option_words(nbd.OPT_STARTTLS) + b"x")
    option = server.next_event()
    with pytest.raises(ProtocolError, match="the client went on unencrypted"):
        server.accept(option)


def request_words(mode, command, offset=0, length=512, flags=0, magic=None):
    if mode == "extended":
        return nbd.EXTENDED_REQUEST.pack(magic or nbd.EXTENDED_REQUEST_MAGIC, flags, command, 1, offset, length)
    return nbd.REQUEST.pack(magic or nbd.REQUEST_MAGIC, flags, command, 1, offset, length)


PAYLOAD = nbd.FLAG_PAYLOAD_LEN
BAD_REQUESTS = [
    ("simple", (77,), b"", nbd.EINVAL, "invalid request type (77) received"),
    ("simple", (nbd.CMD_CACHE,), b"", nbd.EINVAL, "command 5 was not announced"),
    ("simple", (nbd.CMD_READ, 0, 512, nbd.FLAG_DF), b"", nbd.EINVAL, "unsupported flags for command 0 (got 0x4)"),
    ("structured", (nbd.CMD_WRITE, 0, 512, nbd.FLAG_NO_HOLE), bytes(512), nbd.EINVAL, "unsupported flags for command 1 (got 0x2)"),
    ("structured", (nbd.CMD_READ, 0, 512, PAYLOAD), b"", nbd.EINVAL, "unsupported flags for command 0 (got 0x20)"),
    ("simple", (nbd.CMD_BLOCK_STATUS,), b"", nbd.EINVAL, "CMD_BLOCK_STATUS not negotiated"),
    ("structured", (nbd.CMD_BLOCK_STATUS, 0, 0), b"", nbd.EINVAL, "block status of no bytes"),
    ("structured", (nbd.CMD_READ, SIZE - 511, 512), b"", nbd.EINVAL, "operation past EOF; From: 1048065, Len: 512, Size: 1048576"),
    ("structured", (nbd.CMD_READ, (1 << 64) - 1, 512), b"", nbd.EINVAL, "operation past EOF; From: 18446744073709551615, Len: 512, Size: 1048576"),
    ("structured", (nbd.CMD_WRITE, SIZE, 512), bytes(512), nbd.ENOSPC, "operation past EOF; From: 1048576, Len: 512, Size: 1048576"),
    ("structured", (nbd.CMD_TRIM, SIZE, 512), b"", nbd.EINVAL, "operation past EOF; From: 1048576, Len: 512, Size: 1048576"),
    ("structured", (nbd.CMD_READ, 0, nbd.MAX_PAYLOAD + 1), b"", nbd.EINVAL, "len (33554433) is larger than max len (33554432)"),
    ("extended", (nbd.CMD_READ, 0, 512, PAYLOAD), bytes(512), nbd.EINVAL, "unsupported flags for command 0 (got 0x20)"),
    ("extended", (nbd.CMD_BLOCK_STATUS, 0, 9, PAYLOAD), bytes(9), nbd.EINVAL, "payload length 9 is not valid"),
    ("extended", (nbd.CMD_BLOCK_STATUS, 0, 8, PAYLOAD), nbd.U64.pack(512), nbd.EINVAL, "invalid payload of contexts"),
    ("extended", (nbd.CMD_BLOCK_STATUS, 0, 16, PAYLOAD), nbd.U64.pack(512) + bytes([0, 0, 0, 7] * 2), nbd.EINVAL, "invalid payload of contexts"),
    ("extended", (nbd.CMD_BLOCK_STATUS, 0, 12, PAYLOAD), nbd.U64.pack(512) + bytes([0, 0, 0, 8]), nbd.EINVAL, "invalid payload of contexts"),
    ("extended", (nbd.CMD_TRIM, 0, 1 << 63), b"", nbd.EINVAL, "operation past EOF; From: 0, Len: 9223372036854775808, Size: 1048576"),
]


@pytest.mark.parametrize("mode, request_of, payload, error, text", BAD_REQUESTS)
def test_bad_requests_are_refused(mode, request_of, payload, error, text, piece):
    """And the next one is understood."""
    ends = Ends(piece).begin(mode)
    [(request, got), (after, got_after)] = ends.to_server(request_words(mode, *request_of) + payload + request_words(mode, nbd.CMD_FLUSH, 0, 0))
    assert isinstance(request, Request) and (request.error, request.text, got) == (error, text, b"")
    assert (after.command, after.error, got_after) == (nbd.CMD_FLUSH, 0, b"")


@pytest.mark.parametrize("command", [nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES])
def test_a_read_only_export(command):
    ends = Ends().begin("structured", flags=nbd.HAS_FLAGS | nbd.READ_ONLY)
    [(request, got)] = ends.to_server(request_words("structured", command) + (bytes(512) if command == nbd.CMD_WRITE else b""))
    assert (request.error, request.text) == (nbd.EPERM, "Export is read-only")


def test_a_write_that_does_not_say_that_it_has_a_payload(piece):
    """QEMU's client sends such ones with extended headers."""
    ends = Ends(piece).begin("extended")
    [(request, got)] = ends.to_server(request_words("extended", nbd.CMD_WRITE) + b"x" * 512)
    assert (request.error, got) == (0, b"x" * 512)


def test_blocks_are_insisted_on():
    ends = Ends().begin("structured", minimum=512)
    for offset, length, error in ((0, 512, 0), (1, 512, nbd.EINVAL), (0, 511, nbd.EINVAL)):
        [(request, got)] = ends.to_server(request_words("structured", nbd.CMD_READ, offset, length))
        assert request.error == error


@pytest.mark.parametrize("mode", MODES)
def test_hopeless_requests(mode):
    for words, text in (
        (request_words(mode, nbd.CMD_READ, magic=1), r"invalid magic \(got 0x1\)"),
        (request_words(mode, nbd.CMD_WRITE, 0, nbd.MAX_PAYLOAD + 1, PAYLOAD if mode == "extended" else 0), "payload .33554433. is larger"),
    ):
        ends = Ends().begin(mode)
        with pytest.raises(ProtocolError, match=text):
            ends.to_server(words)


def test_contexts_are_of_one_export():
    ends = Ends()
    ends.to_server(ends.client.client_flags())
    ends.server.accept(ends.option(STRUCTURED))
    option = ends.option(option_words(nbd.OPT_SET_META_CONTEXT, NAME + bytes(4)))
    ends.server.meta_context(option, 1, nbd.BASE_ALLOCATION)
    assert ends.server.contexts == {1: nbd.BASE_ALLOCATION}
    ends.server.accept(ends.option(option_words(nbd.OPT_GO, nbd.counted(b"other") + bytes(2))))
    assert ends.server.contexts == {}


# -- what a client does not believe


def reply_words(option, code, data=b"", magic=nbd.OPTION_REPLY_MAGIC):
    return nbd.OPTION_REPLY.pack(magic, option, code, len(data)) + data


GO, LIST, SET = nbd.OPT_GO, nbd.OPT_LIST, nbd.OPT_SET_META_CONTEXT
BAD_ANSWERS = [
    (GO, reply_words(GO, nbd.REP_ACK, magic=1), "Unexpected option reply magic"),
    (GO, reply_words(LIST, nbd.REP_ACK), "Unexpected option type 3 expected 7"),
    (GO, nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, GO, nbd.REP_INFO, nbd.MAX_OPTION + 1), "option reply 3 has 1048577 bytes"),
    (GO, reply_words(GO, nbd.REP_ACK, b"x"), "option 7 is acknowledged with 1 bytes of data"),
    (GO, reply_words(GO, nbd.REP_SERVER, b"\0\0\0\0"), "Unexpected reply type 2 to option 7"),
    (GO, reply_words(GO, nbd.REP_INFO, b"\0"), "info length 1 is too short"),
    (GO, reply_words(GO, nbd.REP_INFO, b"\0\0abc"), "Unexpected NBD_INFO_EXPORT length 5"),
    (GO, reply_words(GO, nbd.REP_INFO, b"\0\3abc"), "Unexpected NBD_INFO_BLOCK_SIZE length 5"),
    (GO, reply_words(GO, nbd.REP_INFO, nbd.INFO_BLOCK_SIZE_FIELDS.pack(3, 0, 0, 0)), "server minimum block size 0 is not a power of two"),
    (GO, reply_words(GO, nbd.REP_INFO, nbd.INFO_BLOCK_SIZE_FIELDS.pack(3, 3, 0, 0)), "server minimum block size 3 is not a power of two"),
    (GO, reply_words(GO, nbd.REP_INFO, nbd.INFO_BLOCK_SIZE_FIELDS.pack(3, 512, 256, 1024)), "server preferred block size 256 is not valid"),
    (GO, reply_words(GO, nbd.REP_INFO, nbd.INFO_BLOCK_SIZE_FIELDS.pack(3, 512, 512, 1000)), "server maximum block size 1000 is not valid"),
    (GO, reply_words(GO, nbd.REP_INFO, b"\0\2" + b"x" * 4097), "export description has 4097 bytes"),
    (LIST, reply_words(LIST, nbd.REP_SERVER, b"\0\0\0\7abc"), "incorrect option name length"),
    (LIST, reply_words(LIST, nbd.REP_SERVER, b"ab"), "incorrect option name length"),
    (LIST, reply_words(LIST, nbd.REP_SERVER, bytes(4)) * (nbd.MAX_OPTION_REPLIES + 1), "server sends no end of replies to option 3"),
    (SET, reply_words(SET, nbd.REP_META_CONTEXT, b"\0\0\0\1"), "its name is missing"),
    (SET, reply_words(SET, nbd.REP_META_CONTEXT, b"\0\0\0\1a") * 2, "server selects metadata context 'a' twice"),
    (SET, b"".join(reply_words(SET, nbd.REP_META_CONTEXT, bytes([0, 0, 0, i, 33 + i])) for i in range(65)), "server selects more than 64"),
]


@pytest.mark.parametrize("option, words, text", BAD_ANSWERS)
def test_bad_answers(option, words, text):
    ends = Ends()
    asks = {GO: lambda: ends.client.go("x"), LIST: ends.client.list_exports, SET: lambda: ends.client.set_meta_context("x", ["a"])}
    asks[option]()
    with pytest.raises(ProtocolError, match=text):
        ends.to_client(words)


@pytest.mark.parametrize(
    "words, text",
    [
        (b"HTTP/1.1", "Bad initial magic received: 0x485454502f312e31"),
        (nbd.INIT_MAGIC + b"\0" * 8, "Bad server magic received: 0x0000000000000000"),
    ],
)
def test_what_is_no_nbd_server(words, text):
    client = ClientCodec()
    client.receive(words)
    with pytest.raises(ProtocolError, match=text):
        client.next_event()


def test_nothing_unencrypted_after_starttls():
    ends = Ends()
    ends.client.start_tls()
    with pytest.raises(ProtocolError, match="server sent unencrypted data after it agreed to TLS"):
        ends.to_client(reply_words(nbd.OPT_STARTTLS, nbd.REP_ACK) + b"x")


def chunk(kind, data=b"", handle=1, done=True):
    return nbd.STRUCTURED_REPLY.pack(nbd.STRUCTURED_REPLY_MAGIC, int(done), kind, handle, len(data)) + data


def long_chunk(kind, data=b"", handle=1, done=True, offset=4096):
    return nbd.EXTENDED_REPLY.pack(nbd.EXTENDED_REPLY_MAGIC, int(done), kind, handle, offset, len(data)) + data


def data(offset, count):
    return nbd.U64.pack(offset) + bytes(count)


def status(context, *extents):
    return nbd.U32.pack(context) + b"".join(nbd.EXTENT.pack(*extent) for extent in extents)


READ, STATUS, FLUSH = nbd.CMD_READ, nbd.CMD_BLOCK_STATUS, nbd.CMD_FLUSH
BAD_REPLIES = [  # to a request for 1024 bytes at 4096
    ("simple", READ, b"\0\0\0\1" * 4, r"invalid magic \(got 0x1\)"),
    ("simple", READ, chunk(nbd.CHUNK_NONE), "invalid magic"),
    ("extended", READ, chunk(nbd.CHUNK_NONE), "invalid magic"),
    ("structured", READ, long_chunk(nbd.CHUNK_NONE), "invalid magic"),
    ("simple", READ, nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 2), "server answers a request that nobody made"),
    ("structured", READ, chunk(nbd.CHUNK_NONE, handle=2), "server answers a request that nobody made"),
    ("structured", READ, nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 1), "simple reply when structured reply chunk was expected"),
    ("simple", FLUSH, nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, 1) * 2, "server answers a request that nobody made"),
    ("structured", READ, chunk(nbd.CHUNK_NONE), "server left 1024 bytes of a read out"),
    ("structured", READ, chunk(nbd.CHUNK_DATA, data(4096, 512)), "server left 512 bytes of a read out"),
    ("structured", READ, chunk(nbd.CHUNK_DATA, data(4095, 512)), "server sent 512 bytes at 0xfff, which nobody asked for"),
    ("structured", READ, chunk(nbd.CHUNK_DATA, data(4096, 1025)), "server sent 1025 bytes at 0x1000, which nobody asked for"),
    ("structured", READ, chunk(nbd.CHUNK_DATA, data(4096, 0)), "invalid payload for NBD_REPLY_TYPE_OFFSET_DATA"),
    ("structured", READ, chunk(nbd.CHUNK_DATA, data(4096, 600), done=False) + chunk(nbd.CHUNK_DATA, data(4608, 512)), "sent the bytes at 0x1200 twice"),
    ("structured", READ, chunk(nbd.CHUNK_DATA, data(4608, 512), done=False) * 2, "sent the bytes at 0x1200 twice"),
    ("structured", READ, chunk(nbd.CHUNK_HOLE, nbd.HOLE.pack(4096, 0)), "server sent 0 bytes at 0x1000"),
    ("structured", READ, chunk(nbd.CHUNK_HOLE, bytes(11)), "invalid payload for NBD_REPLY_TYPE_OFFSET_HOLE"),
    ("structured", READ, chunk(nbd.CHUNK_NONE, done=False), "without NBD_REPLY_FLAG_DONE flag set"),
    ("structured", READ, chunk(nbd.CHUNK_NONE, b"x"), "without NBD_REPLY_FLAG_DONE flag set"),
    ("structured", READ, chunk(77), "Unexpected reply type 77 to command 0"),
    ("structured", FLUSH, chunk(nbd.CHUNK_DATA, data(4096, 512)), "invalid payload for NBD_REPLY_TYPE_OFFSET_DATA"),
    ("structured", FLUSH, chunk(nbd.CHUNK_HOLE, nbd.HOLE.pack(4096, 512)), "Unexpected reply type 2 to command 3"),
    ("structured", FLUSH, chunk(nbd.CHUNK_ERROR, b"\0" * 5), "invalid payload for structured error"),
    ("structured", FLUSH, chunk(nbd.CHUNK_ERROR, b"\0" * 6), "structured error chunk with error = 0"),
    ("structured", FLUSH, chunk(nbd.CHUNK_ERROR, b"\0\0\0\5\0\7abc"), "incorrect message length"),
    ("structured", FLUSH, chunk(nbd.CHUNK_ERROR_OFFSET, b"\0\0\0\5\0\1" + bytes(8)), "incorrect message length"),
    ("structured", FLUSH, chunk(nbd.CHUNK_ERROR, bytes(5000)), "invalid payload for structured error"),
    ("structured", FLUSH, chunk(nbd.CHUNK_ERROR, b"\0\0\0\5\0\0", done=False) * 65, "no end of errors for one request"),
    ("structured", STATUS, chunk(nbd.CHUNK_NONE), "Server did not reply with any status extents"),
    ("structured", STATUS, chunk(nbd.CHUNK_STATUS, status(7)), "invalid payload for NBD_REPLY_TYPE_BLOCK_STATUS"),
    ("structured", STATUS, chunk(nbd.CHUNK_STATUS, status(7, (512, 0)) + b"x"), "invalid payload for NBD_REPLY_TYPE_BLOCK_STATUS"),
    ("structured", STATUS, chunk(nbd.CHUNK_STATUS, status(8, (512, 0))), "unexpected context id 8"),
    ("structured", STATUS, chunk(nbd.CHUNK_STATUS, status(7, (512, 0)), done=False) * 2, "Several BLOCK_STATUS chunks in reply"),
    ("structured", STATUS, nbd.STRUCTURED_REPLY.pack(nbd.STRUCTURED_REPLY_MAGIC, 1, 5, 1, 4 + 8 * (nbd.MAX_EXTENTS + 1)), "server sends 1048577 extents"),
    ("extended", STATUS, long_chunk(nbd.CHUNK_STATUS, status(7, (512, 0))), "Unexpected reply type 5 to command 7"),
    ("extended", STATUS, long_chunk(nbd.CHUNK_STATUS_EXT, nbd.STATUS_EXT.pack(7, 2) + bytes(16)), "2 extents announced, 1 sent"),
    ("extended", READ, long_chunk(nbd.CHUNK_NONE, offset=0), "answers a request at 0x1000 with one at 0x0"),
    ("extended", READ, nbd.EXTENDED_REPLY.pack(nbd.EXTENDED_REPLY_MAGIC, 1, 1, 1, 4096, 1 << 63), "invalid payload for NBD_REPLY_TYPE_OFFSET_DATA"),
]


@pytest.mark.parametrize("mode, command, words, text", BAD_REPLIES)
def test_bad_replies(mode, command, words, text, piece):
    ends = Ends(piece).begin(mode)
    ends.client.request(command, 1, 4096, 1024)
    with pytest.raises(ProtocolError, match=text):
        ends.to_client(words)


def test_one_extent_was_asked_for():
    ends = Ends().begin("structured")
    ends.client.request(STATUS, 1, 4096, 1024, nbd.FLAG_REQ_ONE)
    with pytest.raises(ProtocolError, match="server sends 2 extents where one was asked for"):
        ends.to_client(chunk(nbd.CHUNK_STATUS, status(7, (512, 0), (512, 0))))


def test_an_extent_without_length():
    ends = Ends().begin("structured")
    ends.client.request(STATUS, 1, 4096, 1024)
    [(event, got), (done, got)] = ends.to_client(chunk(nbd.CHUNK_STATUS, status(7, (512, 1), (0, 0))))
    with pytest.raises(ProtocolError, match="an extent without length"):
        list(event.extents())


def test_a_reply_in_pieces():
    """Chunks in any order, holes among them; a message's control characters are made harmless."""
    ends = Ends().begin("structured")
    ends.client.request(READ, 1, 4096, 1024)
    words = chunk(nbd.CHUNK_HOLE, nbd.HOLE.pack(4608, 512), done=False) + chunk(nbd.CHUNK_DATA, data(4096, 512))
    events = [event for event, got in ends.to_client(words)]
    assert [shown(event) for event in events] == [shown(Hole(1, 4608, 512)), shown(Data(1, 4096, 512)), shown(Done(1, 0))]
    ends.client.request(FLUSH, 2, 0, 0)
    [(event, got)] = ends.to_client(chunk(nbd.CHUNK_ERROR, b"\0\0\0\5\0\5a\x1b[2J", handle=2))
    assert shown(event) == shown(Done(2, 5, "a?[2J"))
    ends.client.request(FLUSH, 3, 0, 0)
    [(event, got)] = ends.to_client(chunk(0x8077, b"\0\0\0\5\0\0", handle=3))  # an error of a kind that is not known
    assert shown(event) == shown(Done(3, 5))


# -- bytes of no sense at all


def mutated(rng, words):
    words = bytearray(words)
    for _number in range(rng.randrange(1, 5)):
        at = rng.randrange(len(words))
        kind = rng.randrange(4)
        if kind == 0:
            words[at] = rng.randrange(256)
        elif kind == 1:
            del words[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            words[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            words[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, b"\x80\0\0\0", b"\0\0\0\1"))
        words = words or bytearray(b"x")
    return bytes(words)


def consume(codec, words):
    """Whatever the bytes are: events, or a ProtocolError, and no more memory than what was sent."""
    try:
        for start in range(0, len(words), 50):
            codec.receive(words[start : start + 50])
            while True:
                event = codec.next_event()
                if event is None:
                    break
                if isinstance(event, Status):
                    for length, flags in event.extents():
                        assert length and flags >= 0
                if codec.payload:
                    view = memoryview(bytearray(min(codec.payload, 1 << 16)))
                    codec.payload_into(view)
                    codec.skip_payload()
    except ProtocolError:
        pass
    assert codec.buffered <= len(words)


@pytest.mark.parametrize("mode", MODES)
def test_mutations(mode):
    rng = random.Random(mode)
    for _number in range(300):
        ends = Ends().begin(mode)
        handles = range(1, 6)
        commands = [rng.choice([READ, STATUS, FLUSH, nbd.CMD_WRITE]) for handle in handles]
        requests = [ends.client.request(command, handle, 4096, 64) for handle, command in zip(handles, commands)]
        sent = b"".join(words + (bytes(64) if command == nbd.CMD_WRITE else b"") for words, command in zip(requests, commands))
        server = ends.server
        replies = b"".join(answer(server, request, rng, mode) for request, got in Ends.deliver(ends, server, sent) if not request.error)
        consume(ends.client, mutated(rng, replies or b"x"))
        consume(Ends().begin(mode).server, mutated(rng, sent))


def test_mutated_negotiations():
    rng = random.Random(1)
    options = [STRUCTURED, option_words(nbd.OPT_LIST), option_words(SET, NAME + b"\0\0\0\1" + nbd.counted(b"base:")), option_words(GO, NAME + b"\0\1\0\3")]
    replies = reply_words(GO, nbd.REP_INFO, nbd.INFO_EXPORT_FIELDS.pack(0, SIZE, FLAGS))
    replies += reply_words(GO, nbd.REP_INFO, nbd.INFO_BLOCK_SIZE_FIELDS.pack(3, 1, 4096, 65536)) + reply_words(GO, nbd.REP_ACK)
    for _number in range(500):
        consume(ServerCodec(), mutated(rng, b"\0\0\0\3" + b"".join(options)))
        ends = Ends()
        ends.client.go("disk")
        consume(ends.client, mutated(rng, replies))
        consume(ClientCodec(), mutated(rng, ends.server.greeting()))
