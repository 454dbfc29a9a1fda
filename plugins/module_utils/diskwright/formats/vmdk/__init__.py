# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""vmdk, VMware's format: a descriptor and extents, in one file or several (docs/formats/vmdk.md has its specification)."""

from __future__ import annotations

from .image import Vmdk

__all__ = ["Vmdk"]
