# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Image locks command by command: the bytes that each one holds and checks, its refusals and words, beside qemu-img's."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from diskwright.cli import run
from diskwright.commands.ui import UI

from locks import BYTES, Watcher, stranger

READ = {100, 201, 203}
READ_CHECKED = {101, 103, 200}
WRITE = {100, 101, 103, 201, 203}
WRITE_CHECKED = {101, 103, 200, 201, 203}


class Case(NamedTuple):
    """A command line, one of its files, the bytes held on it at some time and those checked."""

    command: str
    file: str
    held: set[int]
    checked: set[int]


CASES = [
    Case("info raw", "raw", set(), set()),
    Case("info -U raw", "raw", set(), set()),
    Case("info qcow2", "qcow2", {201, 203}, {101, 103}),
    Case("info -U qcow2", "qcow2", set(), set()),
    Case("info --backing-chain overlay", "qcow2", {201, 203}, {101, 103}),
    Case("check qcow2", "qcow2", READ, READ_CHECKED),
    Case("check -U qcow2", "qcow2", {100}, {200}),
    Case("check -r all qcow2", "qcow2", WRITE, WRITE_CHECKED),
    Case("check overlay", "qcow2", READ, READ_CHECKED),
    Case("map raw", "raw", {100}, {200}),
    Case("map qcow2", "qcow2", READ, READ_CHECKED),
    Case("map -U qcow2", "qcow2", {100}, {200}),
    Case("map overlay", "qcow2", READ, READ_CHECKED),
    Case("measure -O qcow2 raw", "raw", {100}, {200}),
    Case("measure -O raw qcow2", "qcow2", READ, READ_CHECKED),
    Case("compare raw qcow2", "raw", {100}, {200}),
    Case("compare raw qcow2", "qcow2", READ, READ_CHECKED),
    Case("compare -U raw qcow2", "qcow2", {100}, {200}),
    Case("convert -O raw qcow2 new", "qcow2", READ, READ_CHECKED),
    Case("convert -U -O raw qcow2 new", "qcow2", {100}, {200}),
    Case("convert -f raw -O qcow2 raw new", "raw", READ, READ_CHECKED),
    Case("convert -U -f raw -O qcow2 raw new", "raw", {100}, {200}),
    Case("convert -f raw -O raw raw target", "target", {100, 101, 103, 203}, {103, 200, 201, 203}),
    Case("convert -n -f raw -O raw raw target", "target", {100, 101}, {200, 201}),
    Case("convert -f raw -O qcow2 raw target", "target", WRITE, WRITE_CHECKED),
    Case("create -q -f raw target 1M", "target", {101, 103, 203}, {103, 201, 203}),
    Case("create -q -f qcow2 target 1M", "target", WRITE, WRITE_CHECKED),
    Case("dd -f raw if=raw of=new", "raw", {100}, {200}),
    Case("dd -f raw if=raw of=target", "target", {100, 101, 103, 203}, {103, 200, 201, 203}),
    Case("resize -f raw raw 2M", "raw", {100, 101, 103}, {200, 201, 203}),
    Case("resize qcow2 2M", "qcow2", WRITE, WRITE_CHECKED),
]
by_case = pytest.mark.parametrize("case", CASES, ids=["%s: %s" % (case.command, case.file) for case in CASES])


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with raw, target (raw too), qcow2 and overlay (of qcow2)."""
    monkeypatch.chdir(tmp_path)
    for args in ("raw raw", "raw target", "qcow2 qcow2", "qcow2 -b qcow2 -F qcow2 overlay"):
        subprocess.run(["qemu-img", "create", "-q", "-f", *args.split(), "1M"], check=True)
    return tmp_path


def ours(command: str) -> tuple[int, str]:
    """Exit code and messages of our command."""
    messages = io.StringIO()
    code = run(command.split(), UI("qemu-img", io.StringIO(), messages))
    return code, messages.getvalue()


def theirs(command: str) -> tuple[int, str]:
    done = subprocess.run(["qemu-img", *command.split()], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


@by_case
def test_these_bytes_are_held_and_checked(case: Case) -> None:
    with Watcher(Path(case.file)) as watcher:
        code, messages = ours(case.command)
    assert code == 0, messages
    assert (watcher.most, watcher.checked) == (case.held, case.checked), watcher.requests


@by_case
def test_the_same_bytes_refuse_it_in_the_same_words(images: Path, case: Case) -> None:
    shutil.copytree(images, images / "untouched")
    for byte in BYTES:
        answers = []
        for call in (ours, theirs):
            for name in os.listdir("untouched"):
                shutil.copyfile(images / "untouched" / name, name)
            Path("new").unlink(missing_ok=True)
            with stranger(Path(case.file), byte):
                answers.append(call(case.command))
        assert answers[0] == answers[1], byte
        assert bool(answers[0][1]) == (byte in case.checked), byte
