# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F401
# pylint: disable=unused-import
"""What is told of images besides what looking at them tells; see _bundle_looking.py."""

from __future__ import annotations

from . import _extents, _options
from .diskwright.commands import map as map_command
from .diskwright.commands import measure as measure_command
from .diskwright.copy import content
from .diskwright.formats import bochs, cloop
from .diskwright.formats.qcow2 import measure
