# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The command line: argv to a command, errors to messages and exit codes (https://www.qemu.org/docs/master/tools/qemu-img.html).

Besides kernels/ this is the only reader of the environment. Only the module of the command that runs is imported.
"""

from __future__ import annotations

import os
import sys
from _signal import ITIMER_REAL, setitimer  # type: ignore[import-not-found, unused-ignore]

from .commands import SUMMARIES
from .commands.spec import Answer, InvalidOptions, UsageError
from .commands.ui import UI
from .errors import Error, OptionError
from .getopt import VALUE, Option, Parser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any, Optional, Sequence

COMPATIBLE = "10.0.2"  # the qemu-img that this one stands in for

GLOBAL_OPTIONS = (
    Option("-h --help", key="help"),
    Option("-V --version", key="version"),
    Option("-T --trace", VALUE, "TRACE", key="trace"),
)

# Commands that are told to stop cleanly: what they leave must not depend on where a signal hits them.
INTERRUPTIBLE = ("amend", "bench", "bitmap", "check", "commit", "convert", "create", "dd", "rebase", "resize", "serve", "snapshot")


class Stopped(BaseException):
    """A signal asks the process to end; the argument is its number."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line `argv` (sys.argv) and return the exit code."""
    if argv is None:
        argv = sys.argv
    _fill_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape")
    name = os.path.basename(argv[0]) if argv else ""
    if name in ("", "-c", "-m", "__main__.py"):
        name = "diskwright"
    ui = UI(name, sys.stdout, sys.stderr, "POSIXLY_CORRECT" in os.environ)
    ui.environment = os.environ
    sys.unraisablehook = _stop_later
    status = run(["io", *argv[1:]] if name.startswith("qemu-io") else argv[1:], ui)
    setitimer(ITIMER_REAL, 0)  # the work is done: too late for _stop_later
    ui.flush()
    if ui.out is None and sys.stdout is not None:
        # Output could not be written, which is no error; nor must the interpreter make one of it when it ends.
        sys.stdout = open(os.devnull, "w")
    return status


def run(args: Sequence[str], ui: UI) -> int:
    """Run the arguments after the program's name; everything that goes wrong becomes a message and an exit code."""
    command: Optional[str] = None
    failure = 1
    ui.take_global = lambda key, value: take_global(key, value, ui)
    try:
        command, rest = _read_global(args, ui)
        module = load(command)
        failure = module.COMMAND.failure
        return _run_command(module, rest, ui)
    except Answer as answer:
        ui.write(str(answer))
        return 0
    except UsageError as error:
        full = "%s %s" % (ui.name, command) if command else ui.name
        ui.error(str(error), full if error.parsing else None)
        ui.hint("Try '%s --help' for more info" % full)
        return 1
    except InvalidOptions as error:
        _say(ui, error.reason)
        ui.error(error.where)
    except Error as error:
        _say(ui, error)
    except OSError as error:
        ui.error(describe(error))
    except MemoryError:
        ui.error("Cannot allocate memory")
    except (KeyboardInterrupt, Stopped) as error:
        return _stop(ui, command or "", error.args[0] if isinstance(error, Stopped) else 2)
    finally:
        if ui.tracer is not None:
            ui.tracer.end()
    return failure


def _say(ui: UI, error: Error) -> None:
    if error.hint and error.hint.startswith("qcow2: "):  # QEMU says this when it finds it, which comes before what fails by it
        ui.hint(error.hint)
    ui.error(str(error), error.__dict__.get("prefix"))
    if error.hint and not error.hint.startswith("qcow2: ") and not str(error).endswith(": " + error.hint):
        ui.hint(error.hint)


def load(command: str) -> Any:
    """The module of a command, by imports that a packager of modules can follow."""
    module: ModuleType
    if command == "info":
        from .commands import info as module
    elif command == "amend":
        from .commands import amend as module
    elif command == "bench":
        from .commands import bench as module
    elif command == "bitmap":
        from .commands import bitmap as module
    elif command == "check":
        from .commands import check as module
    elif command == "commit":
        from .commands import commit as module
    elif command == "compare":
        from .commands import compare as module
    elif command == "convert":
        from .commands import convert as module
    elif command == "create":
        from .commands import create as module
    elif command == "dd":
        from .commands import dd as module
    elif command == "graph":
        from .commands import graph as module
    elif command == "io":
        from .commands import io as module
    elif command == "map":
        from .commands import map as module
    elif command == "measure":
        from .commands import measure as module
    elif command == "rebase":
        from .commands import rebase as module
    elif command == "resize":
        from .commands import resize as module
    elif command == "serve":
        from .commands import serve as module
    elif command == "snapshot":
        from .commands import snapshot as module
    else:
        raise KeyError(command)
    return module


def describe(error: OSError) -> str:
    """A message for an error that no one has put into words yet."""
    reason = error.strerror or str(error)
    return "%s: %s" % (os.fsdecode(error.filename), reason) if isinstance(error.filename, (str, bytes)) else reason


def _read_global(args: Sequence[str], ui: UI) -> tuple[str, Sequence[str]]:
    """The command word and the arguments after it; options before it are answered."""
    parser = Parser(GLOBAL_OPTIONS, args, stop_at_operand=True)
    items = iter(parser)
    while True:
        try:
            option, value = next(items)
        except StopIteration:
            break
        except OptionError as error:
            raise UsageError(str(error)) from None
        if option is None:
            parser.index -= 1
            break
        take_global(option.key, value, ui)
    if parser.index == len(args):
        raise UsageError("Not enough arguments")
    if ui.tracer is not None:
        ui.tracer.begin()
    command = args[parser.index]
    if command not in SUMMARIES:
        raise UsageError("Command not found: %s" % command)
    return command, args[parser.index + 1 :]


def take_global(key: str, value: Optional[str], ui: UI) -> None:
    """One of the options before the command word. Raises Answer."""
    if key == "trace":
        if ui.tracer is None:
            from .trace import Tracer

            ui.tracer = Tracer(ui)
        text = ui.tracer.option(value or "")
        if text:
            raise Answer(text)
    elif key == "help":
        from .commands.help import global_help

        raise Answer(version(ui.name) + global_help(ui))
    else:
        raise Answer(version(ui.name))


def version(name: str) -> str:
    """What --version prints. Under the name of qemu-img the first line is one that readers of its version understand."""
    from . import __version__
    from .kernels import backend

    if name.startswith(("qemu-img", "qemu-io")):
        return "%s version %s (diskwright %s, kernels: %s)\n" % (name, COMPATIBLE, __version__, backend())
    return "diskwright %s\nkernels: %s\ncompatible with qemu-img %s\n" % (__version__, backend(), COMPATIBLE)


def _run_command(module: Any, args: Sequence[str], ui: UI) -> int:
    if module.COMMAND.name in INTERRUPTIBLE:
        # The module behind `signal`, which takes longer to import than all of ours.
        from _signal import SIGTERM, signal

        try:
            signal(SIGTERM, _raise_stopped)
        except ValueError:
            pass  # not the main thread: whoever runs us there looks after signals
    from .hooks import ENVIRONMENT

    ENVIRONMENT.update(os.environ)
    status: int = module.main(args, ui)
    return status


def _stop_later(unraisable: Any) -> None:
    """The interpreter drops an exception that hits it in a destructor or a callback; if that is a signal's, raise it again soon."""
    if not issubclass(unraisable.exc_type, (KeyboardInterrupt, Stopped)):
        sys.__unraisablehook__(unraisable)
        return
    from _signal import SIGALRM, SIGINT, signal

    number = unraisable.exc_value.args[0] if isinstance(unraisable.exc_value, Stopped) else SIGINT
    signal(SIGALRM, lambda *_details: _raise_stopped(number, None))
    setitimer(ITIMER_REAL, 0.01)


def _raise_stopped(number: int, _frame: object) -> None:
    raise Stopped(number)


def _stop(ui: UI, command: str, number: int) -> int:
    """Say that a signal ended the command, and end the process by it: whoever waits for it sees what it did."""
    from signal import SIG_DFL, Signals, signal

    ui.error("%s was interrupted by %s" % (command, Signals(number).name))
    ui.flush()
    signal(number, SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


def _fill_standard_descriptors() -> None:
    """Where a standard stream is closed, put the null device in its place: no image may get its number."""
    if sys.stdin is None or sys.stdout is None or sys.stderr is None:
        while True:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor > 2:
                os.close(descriptor)
                break
