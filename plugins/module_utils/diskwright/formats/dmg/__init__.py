# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""dmg: Apple's disk images, UDIF, read-only (https://keramics.github.io/udif.html)."""

from __future__ import annotations

from .image import Dmg

__all__ = ["Dmg"]
