# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""From a stream of bytes to QMP requests and back, without sockets (https://www.qemu.org/docs/master/interop/qmp-spec.html)."""

from __future__ import annotations

import re

from ..errors import Error, OptionError
from ..json_parser import parse_json
from ..json_text import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterator, Optional, Union

MAX_MESSAGE = 1 << 20  # bytes of one request
MAX_ERRORS = 64  # requests in a row that are no JSON; a peer that sends more of them is no QMP client

GENERIC = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"
DEVICE_NOT_FOUND = "DeviceNotFound"
DEVICE_NOT_ACTIVE = "DeviceNotActive"

_MARK = re.compile(rb"[\"'{}\[\]]")  # what matters outside of strings
_SPACE = b" \t\r\n"
_BARE_END = re.compile(rb"[ \t\r\n{}\[\]\"']")


class QmpError(Error):
    """An error with one of the classes that QMP tells apart."""

    def __init__(self, text: str, kind: str = GENERIC) -> None:
        super().__init__(text)
        self.kind = kind


class Request:
    """One request: what is to be executed, with which arguments, and the client's `id`, None where it gave none."""

    __slots__ = ("command", "arguments", "id", "has_id")

    def __init__(self, command: str, arguments: dict[str, Any], id: Any, has_id: bool) -> None:
        self.command = command
        self.arguments = arguments
        self.id = id
        self.has_id = has_id


class Refused:
    """A request that cannot be executed; `reply` says why. `fatal`: the peer is to be disconnected."""

    __slots__ = ("reply", "fatal")

    def __init__(self, reply: dict[str, Any], fatal: bool = False) -> None:
        self.reply = reply
        self.fatal = fatal


class Decoder:
    """Bytes in, requests out. Memory is bounded by MAX_MESSAGE and what `feed` is given at a time."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._at = 0  # what is before it was looked at
        self._depth = 0  # of brackets
        self._quote = 0  # the quote that ends the string at hand, 0 outside of strings
        self._bare = False  # inside a word outside of brackets
        self._errors = 0  # in a row

    def feed(self, data: bytes) -> Iterator[Union[Request, Refused]]:
        """The requests that end in `data`."""
        self._data += data
        while True:
            text = self._next()
            if text is None:
                break
            found = self._read(text)
            yield found
            if isinstance(found, Refused) and found.fatal:
                return
        if len(self._data) > MAX_MESSAGE:
            yield Refused(failure(QmpError("JSON parse error, request is longer than %d bytes" % MAX_MESSAGE)), True)

    def _next(self) -> Optional[bytes]:
        """The next value of the stream as it is written, None while it is not there in full."""
        data = self._data
        while True:
            if not self._depth and not self._quote and not self._bare:
                while self._at < len(data) and data[self._at] in _SPACE:
                    self._at += 1
                del data[: self._at]
                self._at = 0
                if not data:
                    return None
                if data[0] not in b"{}[]\"'":
                    self._bare = True
            if self._bare:
                end = _BARE_END.search(data, self._at)
                if end is None:
                    self._at = len(data)
                    return None
                self._bare = False
                return self._cut(end.start())
            if self._quote:
                if not self._skip_string():
                    return None
                if not self._depth:
                    return self._cut(self._at)
                continue
            mark = _MARK.search(data, self._at)
            if mark is None:
                self._at = len(data)
                return None
            self._at = mark.end()
            character = data[mark.start()]
            if character in b"\"'":
                self._quote = character
            elif character in b"{[":
                self._depth += 1
            else:
                self._depth = max(0, self._depth - 1)
                if not self._depth:
                    return self._cut(self._at)

    def _skip_string(self) -> bool:
        data = self._data
        while self._at < len(data):
            character = data[self._at]
            if character == 0x5C:
                if self._at + 1 == len(data):
                    return False
                self._at += 2
                continue
            if character == self._quote:
                self._at += 1
                self._quote = 0
                return True
            plain = data.find(bytes([self._quote]), self._at)
            escape = data.find(b"\\", self._at)
            ends = [place for place in (plain, escape) if place >= 0]
            self._at = min(ends) if ends else len(data)
        return False

    def _cut(self, end: int) -> bytes:
        text = bytes(self._data[:end])
        del self._data[:end]
        self._at = 0
        return text

    def _read(self, text: bytes) -> Union[Request, Refused]:
        try:
            value = parse_json(text.decode("utf-8", "replace"))
        except OptionError as exc:
            self._errors += 1
            return Refused(failure(exc), self._errors >= MAX_ERRORS)
        self._errors = 0
        try:
            return _request(value)
        except QmpError as exc:
            reply = failure(exc)
            if isinstance(value, dict) and "id" in value:
                reply["id"] = value["id"]
            return Refused(reply)


def _request(value: Any) -> Request:
    if not isinstance(value, dict):
        raise QmpError("QMP input must be a JSON object")
    command = None
    for key, item in value.items():
        if key == "execute":
            if not isinstance(item, str):
                raise QmpError("QMP input member 'execute' must be a string")
            command = item
        elif key == "arguments":
            if not isinstance(item, dict):
                raise QmpError("QMP input member 'arguments' must be an object")
        elif key != "id":
            raise QmpError("QMP input member '%s' is unexpected" % key)
    if command is None:
        raise QmpError("QMP input lacks member 'execute'")
    return Request(command, value.get("arguments", {}), value.get("id"), "id" in value)


def failure(exc: BaseException) -> dict[str, Any]:
    """The reply that tells of an error."""
    text = str(exc)
    if isinstance(exc, OSError):
        text = exc.strerror or text
    return {"error": {"class": getattr(exc, "kind", GENERIC), "desc": text}}


def encode(message: dict[str, Any]) -> bytes:
    """A message as it is sent."""
    return dumps(message).encode("utf-8", "replace") + b"\r\n"
