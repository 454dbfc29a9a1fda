# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the documentation of several modules says alike."""

from __future__ import annotations


class ModuleDocFragment:
    """The attributes of all modules."""

    DOCUMENTATION = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/diskwright.images.images) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - diskwright.images.images
  check_mode:
    description: Can run in C(check_mode) and return changed status prediction without modifying target.
    support: full
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in C(check_mode)), when in diff mode.
    support: full
  idempotent:
    description: A second run with the same parameters changes nothing.
    support: full
  platform:
    description: Target OS/families that can be operated against.
    platforms: linux
    support: full
requirements:
  - Python 3.9 or newer on the managed node, and nothing else
notes:
  - The library that does the work travels with the module; neither QEMU nor a package is needed on the managed node.
  - Where the Python package C(diskwright-accel) is installed it is used; the return value RV(ignore:diskwright) says so.
"""
