# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""vhdx: the disk images of Hyper-V (https://learn.microsoft.com/en-us/openspecs/windows_protocols/ms-vhdx/)."""

from __future__ import annotations

from .image import Vhdx

__all__ = ["Vhdx"]
