# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F401
# pylint: disable=unused-import
"""What converting images takes, besides reading; see _bundle_looking.py."""

from __future__ import annotations

from . import _bundle_reading, _bundle_sources
from .diskwright.commands import compare, convert, resize
from .diskwright.copy import changed, content, stream
from .diskwright.formats.qcow2 import create as making
from .diskwright.formats.qcow2 import discard, write
from .diskwright.formats.qcow2 import resize as resizing
from .diskwright.formats.vmdk import create as extents
from .diskwright.formats.vmdk import stream as streaming
from .diskwright.formats.vmdk import write as grains
from .diskwright.protocols.file import preallocate
