# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""JSON as qemu-img prints it (https://www.rfc-editor.org/rfc/rfc8259), without the cost of importing json at start-up.

qemu-img's objects come in the order of a hash table of 512 buckets with gdbm's string hash; this file reproduces it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable

_BUCKETS = 512
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def bucket(key: str) -> int:
    """The place of `key` in the hash table: gdbm's hash function, of 32 bits, modulo 512."""
    data = key.encode("utf-8", "surrogateescape")
    value = 0x238F13AF * len(data)
    for index, byte in enumerate(data):
        value += byte << (index * 5 % 24)
    return (1103515243 * value + 12345 & 0xFFFFFFFF) % _BUCKETS


def in_order(keys: Iterable[str]) -> list[str]:
    """`keys`, given in the order of their insertion, as the hash table lists them: of one bucket, the last comes first."""
    found = [(bucket(key), -index, key) for index, key in enumerate(keys)]
    found.sort()
    return [entry[2] for entry in found]


def dumps(value: Any, indent: int = -1) -> str:
    """The text of `value`: None, bool, int, str, and lists and dicts of them.

    `indent` is the depth at which the text begins, for the layout of one item a line, four columns a level; negative
    puts all on one line.
    """
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, dict):
        return _brackets("{}", ["%s: %s" % (quote(key), dumps(value[key], _deeper(indent))) for key in in_order(value)], indent)
    if isinstance(value, (list, tuple)):
        return _brackets("[]", [dumps(item, _deeper(indent)) for item in value], indent)
    return "null" if value is None else "true" if value is True else "false" if value is False else str(value)


def _deeper(indent: int) -> int:
    return indent + 1 if indent >= 0 else indent


def _brackets(pair: str, items: list[str], indent: int) -> str:
    if indent < 0:
        return pair[0] + ", ".join(items) + pair[1]
    inner = "\n" + "    " * (indent + 1)
    return pair[0] + (inner if items else "") + ("," + inner).join(items) + "\n" + "    " * indent + pair[1]


def quote(text: str) -> str:
    """`text` as a JSON string in ASCII; bytes that are no UTF-8 (surrogate escapes) become U+FFFD."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return '"' + text + '"'
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return '"' + "".join([_ESCAPES.get(char) or (char if " " <= char <= "~" else _escape(char)) for char in text]) + '"'


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x10000:
        return "\\u%04X" % code
    code -= 0x10000
    return "\\u%04X\\u%04X" % (0xD800 | code >> 10, 0xDC00 | code & 0x3FF)
