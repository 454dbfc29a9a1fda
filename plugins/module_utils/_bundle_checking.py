# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F401
# pylint: disable=unused-import
"""What checking and repairing images takes, besides reading; see _bundle_looking.py."""

from __future__ import annotations

from . import _bundle_reading
from .diskwright.formats.parallels import extension
from .diskwright.formats.qcow2 import discard, repair, resize, write
from .diskwright.formats.qed import check
from .diskwright.formats.vmdk import check as extents
from .diskwright.formats.vmdk import write as grains
from .diskwright.protocols.file import preallocate
