# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F401
# pylint: disable=unused-import
"""What creating and enlarging the images of a graph takes, and opening its nodes; see _bundle_looking.py."""

from __future__ import annotations

from . import _bundle_reading
from .diskwright.commands import create, resize
from .diskwright.filters import compress, copy_on_read, preallocate, quorum, throttle
from .diskwright.formats.parallels import extension
from .diskwright.formats.qcow2 import backing, discard, write
from .diskwright.formats.qcow2 import create as making
from .diskwright.formats.qcow2 import resize as resizing
from .diskwright.formats.vmdk import create as extents
from .diskwright.formats.vmdk import write as grains
from .diskwright.protocols.file import preallocate as allocation
