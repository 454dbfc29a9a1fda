# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""parallels: expandable images of Parallels and Virtuozzo (https://www.qemu.org/docs/master/interop/parallels.html)."""

from __future__ import annotations

from .image import Parallels

__all__ = ["Parallels"]
