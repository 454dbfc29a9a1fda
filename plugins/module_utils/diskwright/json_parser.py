# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""JSON as QEMU reads it: RFC 8259 with strings in either kind of quotes and no key twice
(https://www.rfc-editor.org/rfc/rfc8259).

`json:` names stand in images that nobody needs to trust, so size and depth have limits; and importing Python's own
parser takes longer than opening an image.
"""

from __future__ import annotations

from .errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterator

MAX_DEPTH = 128  # of lists and objects in one another
MAX_LENGTH = 1 << 20  # characters

_SPACE = " \t\r\n"
_DIGITS = "0123456789"
_KEYWORD = "abcdefghijklmnopqrstuvwxyz"
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"', "'": "'"}
_CONSTANTS = {"true": True, "false": False, "null": None}


def parse_json(text: str) -> Any:
    """The one value that `text` is: None, bool, int, float, str, list or dict. Raises OptionError in QEMU's words."""
    if len(text) > MAX_LENGTH:
        raise OptionError("JSON parse error, text is longer than %d characters" % MAX_LENGTH)
    values: list[Any] = []
    for tokens in _messages(text):
        if values:
            raise OptionError("Expecting at most one JSON value")
        values.append(_Parser(tokens).value())
    if not values:
        raise OptionError("Expecting a JSON value")
    return values[0]


def _error(what: str) -> OptionError:
    return OptionError("JSON parse error, " + what)


def _messages(text: str) -> Iterator[list[str]]:
    """The tokens of each value in `text`: up to where brackets are balanced, or one closes that was never opened, or the end."""
    tokens: list[str] = []
    braces = brackets = 0
    emitted = False
    try:
        for token in _tokens(text):
            tokens.append(token)
            braces += (token == "{") - (token == "}")
            brackets += (token == "[") - (token == "]")
            if braces + brackets > MAX_DEPTH:
                raise _error("nesting is deeper than %d" % MAX_DEPTH)
            if braces < 0 or brackets < 0 or braces == brackets == 0:
                yield tokens
                emitted = True
                tokens, braces, brackets = [], 0, 0
        if tokens:
            yield tokens
    except OptionError:
        if emitted:
            raise OptionError("Expecting at most one JSON value") from None
        raise


def _tokens(text: str) -> Iterator[str]:
    """The tokens of `text` as they are written."""
    position = 0
    while position < len(text):
        start = position
        character = text[position]
        position += 1
        if character in _SPACE:
            continue
        if character in "'\"":
            position = _end_of_string(text, start)
        elif character in _KEYWORD:
            while position < len(text) and text[position] in _KEYWORD:
                position += 1
        elif character == "-" or character in _DIGITS:
            position = _end_of_number(text, start)
        elif character not in "{}[]:,":
            raise _error("stray '%s'" % character)
        yield text[start:position]


def _end_of_string(text: str, start: int) -> int:
    position = start + 1
    while position < len(text) and text[position] >= " ":
        if text[position] == text[start]:
            return position + 1
        position += 2 if text[position] == "\\" else 1
    raise _error("stray '%s'" % text[start : position + 1])


def _end_of_number(text: str, start: int) -> int:
    def digits(position: int) -> int:
        end = position
        while text[end : end + 1] in _DIGITS and end < len(text):
            end += 1
        if end == position:
            raise _error("stray '%s'" % text[start : end + 1])
        return end

    position = start + (text[start] == "-")
    end = digits(position)
    if text[position] == "0" and end > position + 1:
        raise _error("stray '%s'" % text[start : position + 2])
    if text[end : end + 1] == ".":
        end = digits(end + 1)
    if text[end : end + 1] in ("e", "E"):
        end = digits(end + 2 if text[end + 1 : end + 2] in ("+", "-") else end + 1)
    return end


class _Parser:
    """Turns the tokens of one value into it."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.index = 0

    def next(self) -> str:
        if self.index == len(self.tokens):
            raise _error("premature EOI")
        self.index += 1
        return self.tokens[self.index - 1]

    def value(self) -> Any:
        token = self.next()
        first = token[0]
        if first == "{":
            return self.object()
        if first == "[":
            return self.list()
        if first in "'\"":
            return _string(token)
        if first in _KEYWORD:
            if token not in _CONSTANTS:
                raise _error("invalid keyword '%s'" % token)
            return _CONSTANTS[token]
        if first == "-" or first in _DIGITS:
            return _number(token)
        raise _error("expecting value")

    def object(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.tokens[self.index : self.index + 1] == ["}"]:
            self.index += 1
            return found
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise _error("key is not a string in object")
            if self.next() != ":":
                raise _error("missing : in object pair")
            value = self.value()
            if key in found:
                raise _error("duplicate key")
            found[key] = value
            token = self.next()
            if token == "}":
                return found
            if token != ",":
                raise _error("expected separator in dict")

    def list(self) -> list[Any]:
        found: list[Any] = []
        if self.tokens[self.index : self.index + 1] == ["]"]:
            self.index += 1
            return found
        while True:
            found.append(self.value())
            token = self.next()
            if token == "]":
                return found
            if token != ",":
                raise _error("expected separator in list")


def _number(token: str) -> Any:
    """An int where 64 bits hold it, else a float."""
    if token.strip("-" + _DIGITS) == "" and len(token) <= 20:
        number = int(token)
        if -(1 << 63) <= number < 1 << 64:
            return number
    return float(token)


def _string(token: str) -> str:
    body = token[1:-1]
    if "\\" not in body:
        return body
    parts: list[str] = []
    position = 0
    while position < len(body):
        slash = body.find("\\", position)
        if slash < 0:
            slash = len(body)
        parts.append(body[position:slash])
        position = slash + 2
        escape = body[slash + 1 : slash + 2]
        if escape == "u":
            code, position = _code_point(body, slash, token)
            parts.append(chr(code))
        elif escape:
            if escape not in _ESCAPES:
                raise _error("invalid escape sequence in string")
            parts.append(_ESCAPES[escape])
    return "".join(parts)


def _code_point(body: str, slash: int, token: str) -> tuple[int, int]:
    """The character of the \\u at `slash`, which may be the first of two that make one; and where the next begins."""
    code = _four_digits(body, slash, token)
    end = slash + 6
    if 0xD800 <= code < 0xDC00 and body[end : end + 2] == "\\u":
        low = _four_digits(body, end, token)
        if 0xDC00 <= low < 0xE000:
            return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00), end + 6
    if 0xD800 <= code < 0xE000 or not code:
        raise _error("%s is not a valid Unicode character" % body[slash:end])
    return code, end


def _four_digits(body: str, slash: int, token: str) -> int:
    digits = body[slash + 2 : slash + 6]
    if len(digits) < 4 or digits.strip("0123456789abcdefABCDEF"):
        start = slash + 1  # in the token, which has a quote in front
        raise _error("%s is not a valid Unicode character" % token[start : start + 6])
    return int(digits, 16)
