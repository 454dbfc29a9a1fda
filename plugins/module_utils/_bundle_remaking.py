# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: F401
# pylint: disable=unused-import
"""What making an image anew from itself takes, besides writing; see _bundle_looking.py."""

from __future__ import annotations

from .diskwright.commands import convert
