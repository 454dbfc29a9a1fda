# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F401
"""What making the images of a graph takes, and opening its nodes; see _bundle_looking.py."""

from __future__ import annotations

from . import _bundle_writing
from .diskwright.filters import blklogwrites, blkverify, compress, copy_on_read, preallocate, quorum, throttle
