# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The program as a process: its name, its streams, its exit; and the progress that it shows."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diskwright import __version__
from diskwright.commands.compare import COMMAND as COMPARE
from diskwright.commands.convert import COMMAND as CONVERT
from diskwright.commands.spec import settle_progress_argument
from diskwright.commands.ui import UI
from diskwright.progress import Progress, display

LAUNCH = "import sys; sys.argv[0] = %r; from diskwright.cli import main; raise SystemExit(main())"


def run(*args: str, name: str = "/usr/bin/qemu-img", **streams: object) -> tuple[int, str, str]:
    """Run the command line as a process called `name`."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    done = subprocess.run([sys.executable, "-c", LAUNCH % name, *args], check=False, **options)  # type: ignore[call-overload]
    return done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode()


@pytest.mark.parametrize("name", ["qemu-img", "./qemu-img", "/a b/my-tool", "diskwright"])
def test_messages_begin_with_the_name_of_the_program(name: str) -> None:
    base = os.path.basename(name)
    assert run(name=name) == (1, "", f"{base}: Not enough arguments\nTry '{base} --help' for more info\n")
    assert run("info", "-Z", name=name)[2].startswith(f"{base} info: invalid option -- 'Z'\nTry '{base} info --help'")
    assert f"Usage: {base} info " in run("info", "--help", name=name)[1]


def test_version() -> None:
    first = run("--version")[1].splitlines()[0]
    theirs = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout
    assert first.startswith(f"qemu-img version 10.0.2 (diskwright {__version__}, kernels: ")
    assert first.split()[:3] == theirs.split()[:3]
    lines = run("-V", name="diskwright")[1].splitlines()
    assert lines[0] == f"diskwright {__version__}" and lines[1].startswith("kernels: ") and lines[2] == "compatible with qemu-img 10.0.2"


def test_help_of_the_program_names_every_command() -> None:
    text = run("--help")[1]
    for command in ("create", "info", "convert", "check", "compare", "map", "measure", "resize", "dd"):
        assert f"\n  {command} " in text


def test_output_that_cannot_be_written_is_no_error() -> None:
    with open("/dev/full", "wb") as full:
        assert run("--version", stdout=full) == (0, "", "")
        assert run("convert", "--help", stdout=full) == (0, "", "")
    reader, writer = os.pipe()
    os.close(reader)
    assert run("--help", stdout=writer) == (0, "", "")
    os.close(writer)


def test_closed_streams_are_no_error() -> None:
    command = [sys.executable, "-c", LAUNCH % "qemu-img"]
    for redirection in (">&-", "2>&-", "<&- >&- 2>&-"):
        line = '"$@" %s' % redirection
        assert subprocess.run(["sh", "-c", line, "sh", *command, "--version"], capture_output=True, check=False).returncode == 0
        assert subprocess.run(["sh", "-c", line, "sh", *command, "nope"], capture_output=True, check=False).returncode == 1


def test_an_image_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What is printed would otherwise be written into it."""
    command = [sys.executable, "-c", LAUNCH % "qemu-img", "create", "-f", "raw", str(tmp_path / "x"), "1M"]
    assert subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], check=False).returncode == 0
    assert (tmp_path / "x").read_bytes() == bytes(1 << 20)


def test_names_that_are_not_utf8_are_printed_as_they_are(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe"
    command = [sys.executable.encode(), b"-c", (LAUNCH % "qemu-img").encode(), b"info", name]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"}, check=False)
    assert done.returncode == 1 and b"/\xff\xfe'" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_a_message(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCH % "qemu-img", "convert", "--progress=json", "-", str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stderr
        process.stdin.write(bytes(8 << 20))
        process.stdin.flush()  # the pipe holds 64 KiB: by now the command reads
        process.send_signal(number)
        errors = process.stderr.read().decode()
        assert process.wait() == -number
    assert f"qemu-img: convert was interrupted by {number.name}\n" in errors


# progress


def shown(form: str, step: float, updates: list[tuple[int, int]]) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    with Progress(UI("x", out, err), "convert", form, step) as progress:
        for done, total in updates:
            progress.update(done, total)
    return out.getvalue(), err.getvalue()


def test_plain_progress_steps() -> None:
    text, errors = shown("plain", 2.0, [(0, 1000), (10, 1000), (20, 1000), (21, 1000), (22, 1000), (500, 1000), (1000, 1000), (1000, 1000)])
    assert text == "".join("    (%s/100%%)\r" % percent for percent in ("0.00", "2.10", "50.00", "100.00")) + "\n"
    assert errors == ""


def test_no_progress() -> None:
    assert shown("none", 1.0, [(0, 10), (10, 10)]) == ("", "")


def test_json_progress() -> None:
    text, errors = shown("json", 1.0, [(0, 1000), (500, 1000), (1000, 1000)])
    reports = [json.loads(line) for line in errors.splitlines()]
    assert text == "" and reports
    assert set(reports[-1]) == {"command", "done", "total", "percent", "rate", "eta"}
    assert (reports[-1]["command"], reports[-1]["done"], reports[-1]["total"], reports[-1]["percent"]) == ("convert", 1000, 1000, 100.0)


def test_empty_work_is_all_done() -> None:
    assert shown("plain", 1.0, [(0, 0)])[0] == "    (0.00/100%)\r\n"
    out = io.StringIO()
    with Progress(UI("x", out, None), "convert", "plain", 1.0) as progress:
        progress.start()
        progress.finish()
    assert out.getvalue() == "    (0.00/100%)\r    (100.00/100%)\r\n"


def test_usr1_reports_on_standard_error() -> None:
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGUSR1)
    with Progress(UI("x", out, err), "convert", "none", 1.0) as progress:
        progress.update(360, 1000)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert (out.getvalue(), err.getvalue()) == ("", "    (36.00/100%)\n")
    assert signal.getsignal(signal.SIGUSR1) == before


def test_which_display() -> None:
    ui = UI("x", io.StringIO(), io.StringIO())
    assert display(ui, {}) == "none"
    assert display(ui, {"p": True}) == display(ui, {"progress": None}) == "plain"
    assert display(ui, {"progress": "json"}) == display(ui, {"p": True, "progress": "json"}) == "json"
    assert display(ui, {"p": True, "progress": "bar", "quiet": True}) == "none"


def test_the_bar_on_a_terminal_leaves_nothing_behind() -> None:
    primary, secondary = pty.openpty()
    with os.fdopen(secondary, "w") as terminal:
        ui = UI("x", terminal, None)
        assert display(ui, {"p": True}) == "bar"
        with Progress(ui, "convert", "bar", 1.0) as progress:
            progress.update(512 << 20, 1 << 30)
            picture = os.read(primary, 4096).decode()
            ui.write("Images are identical.\n")
        ui.flush()
        rest = os.read(primary, 4096).decode()
    os.close(primary)
    assert "convert [" in picture and " 50.0%" in picture and "512 MiB of 1 GiB" in picture and "\n" not in picture
    assert rest.startswith("\r\033[KImages are identical.\r\n")


def settled(command: object, *args: str) -> tuple[list[str], object]:
    given = command.read(args, UI("x", None, None))  # type: ignore[attr-defined]
    settle_progress_argument(given, 2, 2 if command is COMPARE else 1 << 30)
    return given.operands, given.get("progress", "absent")


def test_the_word_after_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settled(CONVERT, "a", "b") == (["a", "b"], "absent")
    assert settled(CONVERT, "--progress", "a", "b") == (["a", "b"], None)
    assert settled(CONVERT, "--progress", "json", "a", "b") == (["a", "b"], "json")
    assert settled(CONVERT, "--progress=bar", "json", "a", "b") == (["json", "a", "b"], "bar")
    assert settled(CONVERT, "a", "b", "--progress", "plain") == (["a", "b"], "plain")
    assert settled(CONVERT, "--progress", "json", "b") == (["json", "b"], None)  # not enough operands without it
    assert settled(CONVERT, "--progress", "xml", "a", "b") == (["xml", "a", "b"], None)
    (tmp_path / "json").touch()
    assert settled(CONVERT, "--progress", "json", "a", "b") == (["json", "a", "b"], None)  # a file to concatenate
    assert settled(COMPARE, "--progress", "json", "a", "b") == (["a", "b"], "json")  # compare takes two
    assert settled(COMPARE, "--progress", "json", "a") == (["json", "a"], None)
