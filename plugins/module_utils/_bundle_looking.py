# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F401
# pylint: disable=unused-import
"""What looking at the commonest images takes: a module that imports this, for type checkers only, has Ansible send it along.

drivers.py and parts.py of the library import by name, which Ansible does not follow. A bundle is a list of what they may be asked for.
"""

from __future__ import annotations

from .diskwright.formats import qcow2, raw
from .diskwright.formats.qcow2 import bitmaps, snapshots
from .diskwright.protocols import file
from .diskwright.protocols.file import device
