# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""json_parser.py against qemu-img, which reads JSON in file names, and against Python's json."""

from __future__ import annotations

import json
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from diskwright.errors import OptionError
from diskwright.json_parser import MAX_DEPTH, MAX_LENGTH, parse_json

BROKEN = """
{| {x| x| }| ]| [}| {]| {"a"| {"a":| {"a":1| {"a":1,| {"a" 1}| {"a":tru}| {"a":tru| {"a":"\\q"}| {,}| {"a":1,}| {"a":"x| {"a":"x'}| {"a":1} x| {"a":1}}| {} {}
{} @| {"a":1e}| {"a":1e| {"a":1.}| {"a":1.5e+}| {"a":01}| {"a":-}| {"a":-01}| {"a":@}| {"a":#}| {"a":NaN}| {"a":Infinity}| {"a":[1 2]}| {"a":[1,]}| {"a":[,]}
{"a":1 "b"}| {1:1}| {[]:1}| {a:1}| {"a":}| {"a":]| {"a":1]| {"a":[1}| {"driver":"x","driver":"y"}| {"a":"\\u12"}| {"a":"\\ud800"}| {"a":"\\u12g4"}
{"a" 1| [1| [1 2| {"a":True}| {"a":.5}| {"a":+1}| {"a"::1}| :| ,| {"a":1;}| {'a':'x"}| {"a":"\\x41"}| 1 2| "a| '| -| tru| {"a":"\\ud800\\u0041"}
"""


def ours(text: str) -> str:
    with pytest.raises(OptionError) as caught:
        parse_json(text)
    return str(caught.value)


def theirs(text: str) -> str:
    error = subprocess.run(["qemu-img", "info", "json:" + text], capture_output=True, check=False).stderr.decode("utf-8", "replace")
    return error.rstrip("\n").rpartition("': Could not parse the JSON options: ")[2]


def test_errors_are_those_of_qemu() -> None:
    texts = ["", " "] + [text for line in BROKEN.strip().splitlines() for text in line.split("| ")]
    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(theirs, texts))
    assert [(text, ours(text)) for text in texts] == list(zip(texts, expected))


def values(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind == 6:
        return [values(rng, depth + 1) for _count in range(rng.randrange(4))]
    if kind == 7:
        return {"k%d" % rng.randrange(9): values(rng, depth + 1) for _count in range(rng.randrange(4))}
    strings = ["", "a b", 'q"', "back\\slash", "\n\t", "\u00e9\U0001f600", "/"]
    return [None, True, rng.randrange(-(10**18), 10**18), rng.random() * 10**9, rng.choice(strings), False][kind]


def test_good_json_is_read_as_python_reads_it() -> None:
    rng = random.Random(40)
    for _count in range(500):
        value = values(rng)
        for text in (json.dumps(value), json.dumps(value, indent=2), json.dumps(value, ensure_ascii=False)):
            assert parse_json(text) == value


def test_single_quotes() -> None:
    assert parse_json("{'a': 'x\"', \"b\": \"it's\"}") == {"a": 'x"', "b": "it's"}


def test_no_string_holds_a_nul() -> None:
    """QEMU lets it in, but no name can have one."""
    assert ours('{"a":"\\u0000"}') == "JSON parse error, \\u0000 is not a valid Unicode character"


def test_limits() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert "nesting" in ours("[" * (MAX_DEPTH + 1))
    assert "nesting" in ours('{"a":' * 100000)
    assert "longer" in ours(" " * (MAX_LENGTH + 1))
    assert parse_json("9" * 5000) == float("inf")


def test_any_text_is_a_value_or_an_option_error() -> None:
    rng = random.Random(41)
    for _count in range(3000):
        text = "".join(rng.choice("{}[]:,'\"\\u0123e.-+ truefalsn\x00\n\u00e9") for _character in range(rng.randrange(30)))
        try:
            parse_json(text)
        except OptionError:
            pass
