# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What keeps two runs of the whole suite short: child processes without fork, and samples in a brief run."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from typing import Any

import pytest

from effort import BRIEF

# A brief run takes all tests of what the kernels do, every fourth of what they have no part in and real servers are needed for, and every second of
# all others.
WHOLE = ("test_architecture", "test_compression", "test_copy", "test_crypto", "test_image", "test_kernels", "test_ondisk", "test_script", "test_units")
FOURTH = ("test_graph", "test_jobs", "test_nbd", "test_protocol_", "test_qmp", "test_serve", "test_command_io", "test_command_graph", "test_filter")


def part(stem: str) -> int:
    """A brief run takes one of so many tests of a file."""
    return 1 if stem.startswith(WHOLE) else 4 if stem.startswith(FOURTH) else 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if BRIEF:
        items[:] = [item for number, item in enumerate(items) if number % part(item.path.stem) == 0]


if sys.version_info < (3, 10):
    # Python 3.9 forks for each child process, which takes milliseconds in a large parent; posix_spawn, as later versions have it, does not.
    start = subprocess.Popen.__init__
    find = functools.lru_cache(None)(shutil.which)

    def spawn(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        """Popen's way to posix_spawn: a program with its path, no descriptor to close (none is inherited anyway), and env(1) changes the directory."""
        if rest or isinstance(args, (str, bytes)) or {"shell", "preexec_fn", "pass_fds", "start_new_session", "executable"} & set(options):
            start(self, args, *rest, **options)
            return
        options["close_fds"] = False
        cwd = options.get("cwd")
        if cwd is not None:
            args = ["/usr/bin/env", "-C", cwd, *args]
            options["cwd"] = None
        elif "env" not in options and isinstance(args[0], str) and "/" not in args[0]:
            options["executable"] = find(args[0])
        start(self, args, **options)

    subprocess.Popen.__init__ = spawn  # type: ignore[method-assign]
