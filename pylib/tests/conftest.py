# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Python 3.9 forks for each child process, which takes milliseconds in a large parent; posix_spawn, as later versions have it, does not."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

if sys.version_info < (3, 10):
    start = subprocess.Popen.__init__

    def spawn(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        """Popen's way to posix_spawn: no descriptor to close (none is inherited anyway), and env(1) changes the directory."""
        cwd = options.get("cwd")
        plain = not rest and not isinstance(args, (str, bytes)) and not {"shell", "preexec_fn", "pass_fds", "start_new_session"} & set(options)
        if plain:
            options["close_fds"] = False
            if cwd is not None:
                args = ["/usr/bin/env", "-C", cwd, *args]
                options["cwd"] = None
        start(self, args, **options) if plain else start(self, args, *rest, **options)

    subprocess.Popen.__init__ = spawn  # type: ignore[method-assign]
