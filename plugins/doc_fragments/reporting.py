# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long tasks tell how far they are."""

from __future__ import annotations


class ModuleDocFragment:
    """The parameter of modules that move data."""

    DOCUMENTATION = r"""
options:
  progress_file:
    description:
      - A file on the managed node that says how far the task is, for whoever started it with C(async). It is JSON, replaced as a whole about
        once a second, with the keys C(pid), C(step) of C(steps), C(verb), C(target), C(done) of C(total) bytes, C(started) and C(updated)
        in seconds since 1970, and at the end C(finished) and C(failed).
      - Read it with M(ansible.builtin.slurp) between calls of M(ansible.builtin.async_status).
    type: path
attributes:
  async:
    description:
      - Supports being used with the C(async) keyword. The work goes on where the controller goes away, and nothing half made is left
        where it is killed.
    support: full
"""
