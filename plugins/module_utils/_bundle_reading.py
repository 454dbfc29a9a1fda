# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F401
# pylint: disable=unused-import
"""What reading images takes, of any format that can be made; see _bundle_looking.py."""

from __future__ import annotations

from . import _bundle_looking
from .diskwright import json_parser
from .diskwright.formats import luks, parallels, qcow, qed, vdi, vhdx, vmdk, vpc
from .diskwright.formats.parallels import check
from .diskwright.formats.qcow2 import compressed, encryption, refcount, subclusters
from .diskwright.formats.vmdk import compressed as grains
from .diskwright.kernels import pure
