# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""blkdebug: the driver is in node.py, its rules in rules.py (https://www.qemu.org/docs/master/devel/testing/blkdebug.html)."""

from __future__ import annotations

from .node import Blkdebug

__all__ = ["Blkdebug"]
