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

    def begin(self, mode="simple", contexts=CONTEXTS, flags=FLAGS, minimum=1):
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
            extents = [(rng.randrange(1, 5000), rng.randrange(4)) for _ in range(rng.randrange(1, 5))]
            parts.append(server.reply_status(request, context, extents, done=context == request.contexts[-1]))
        return b"".join(parts)
    if request.command != nbd.CMD_READ:
        return server.reply_done(request)
    if mode == "simple":
        return server.reply_data(request, request.offset, request.length) + rng.randbytes(request.length)
    cuts = sorted({request.offset, request.offset + request.length, *(request.offset + rng.randrange(request.length) for _ in range(4))})
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
