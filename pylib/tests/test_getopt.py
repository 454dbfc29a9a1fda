# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""getopt.py against glibc: util-linux's getopt(1) reads random command lines, qemu-img its own options."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from diskwright.errors import OptionError
from diskwright.getopt import FLAG, MAYBE, VALUE, Option, Parser

OPTIONS = [
    Option("-h --help"),
    Option("-f --format", VALUE),
    Option("-q --quiet"),
    Option("--output", VALUE),
    Option("--progress", MAYBE),
    Option("-U --image-opts"),
]
WORDS = ["-h", "-q", "-f", "-fraw", "-qf", "-qUf", "-qfU", "-Uq", "-x", "-qx", "--help", "--h", "--help=1", "--format", "--format=raw", "--fo"]
WORDS += ["--form=", "--output", "--out=x", "--progress", "--progress=json", "--pro", "--image", "--nope", "--nope=1", "--", "-", "a", "b", "", "-f=x"]


def command_lines() -> list[list[str]]:
    rng = random.Random(30)
    return [[rng.choice(WORDS) for _count in range(rng.randrange(1, 7))] for _line in range(300)]


def ours(args: list[str], stop: bool = False) -> tuple[list[str], str]:
    """The canonical form that getopt(1) prints, and the first error."""
    found: list[str] = []
    operands: list[str] = []
    try:
        for option, value in Parser(OPTIONS, args, stop):
            if option is None:
                operands.append(value or "")
            else:
                found.append(option.names[-1])
                if option.kind != FLAG:
                    found.append(value or "")
    except OptionError as error:
        return [], str(error)
    return [*found, "--", *operands], ""


def theirs(args: list[str], stop: bool = False) -> tuple[list[str], str]:
    short = ("+" if stop else "") + "hf:qU"
    words = ["getopt", "-n", "x", "-o", short, "-l", "help,format:,quiet,output:,progress::,image-opts", "--", *args]
    environment = {key: value for key, value in os.environ.items() if key != "POSIXLY_CORRECT"}
    run = subprocess.run(words, capture_output=True, text=True, env={**environment, "LC_ALL": "C"}, check=False)
    if run.returncode:
        return [], run.stderr.splitlines()[0].removeprefix("x: ")
    long = {"-h": "--help", "-f": "--format", "-q": "--quiet", "-U": "--image-opts"}
    canonical = shlex.split(run.stdout)
    out: list[str] = []
    position = 0
    while position < len(canonical) and canonical[position] != "--":
        name = long.get(canonical[position], canonical[position])
        out.append(name)
        position += 1
        if name in ("--format", "--output", "--progress"):
            out.append(canonical[position])
            position += 1
    return out + canonical[position:], ""


@pytest.mark.parametrize("stop", [False, True])
def test_command_lines_are_read_as_glibc_reads_them(stop: bool) -> None:
    lines = command_lines()
    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(lambda args: theirs(args, stop), lines))
    wrong = [(line, ours(line, stop), want) for line, want in zip(lines, expected) if ours(line, stop) != want]
    assert not wrong
    assert sum(1 for _words, error in expected if error) > 50 < sum(1 for _words, error in expected if not error)


def message(args: list[str], options: list[Option]) -> str:
    with pytest.raises(OptionError) as caught:
        list(Parser(options, args))
    return str(caught.value)


@pytest.mark.parametrize("word", ["--=", "--b", "--ba", "--backing-=1", "--o", "--x", "--x=1", "-Z", "-qZ", "-f", "--format", "--quiet=1", "--q=", "--qu=x"])
def test_messages_are_those_of_qemu_img(word: str) -> None:
    from diskwright.commands.create import COMMAND

    run = subprocess.run(["qemu-img", "create", word], capture_output=True, text=True, check=False)
    want = run.stderr.splitlines()[0].split("qemu-img create: ")[1]
    assert message([word], list(COMMAND.options)) == want


def test_names_of_other_dialects_never_make_a_prefix_ambiguous() -> None:
    options = [Option("--parallel", VALUE), Option("--rate", VALUE, extra="--rate-limit"), Option("", FLAG, extra="--progress")]
    assert [(o and o.key, v) for o, v in Parser(options, ["--p", "3", "--prog", "--ra=1", "--rate-l", "2"])] == [
        ("parallel", "3"),
        ("progress", None),
        ("rate_limit", "1"),
        ("rate_limit", "2"),
    ]


def test_two_spellings_of_one_option_are_not_ambiguous() -> None:
    option = Option("--left-format --left-form", VALUE)
    assert list(Parser([option], ["--left=raw"])) == [(option, "raw")]


def test_the_consumer_may_read_on_by_itself() -> None:
    parser = Parser([Option("-q --quiet")], ["image", "-1G", "-q"])
    seen: list[object] = []
    for option, value in parser:
        seen.append(option.key if option else value)
        if value == "image":
            seen.append(parser.args[parser.index])
            parser.index += 1
    assert seen == ["image", "-1G", "quiet"]
