# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F401
# pylint: disable=unused-import
"""What internal snapshots and bitmaps take, besides reading; see _bundle_looking.py."""

from __future__ import annotations

from . import _bundle_reading
from .diskwright.formats.parallels import extension
from .diskwright.formats.qcow2 import discard, resize, snapshot_changes, write
from .diskwright.protocols.file import preallocate
