# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""ova and ovf, packages of virtual machines, opened in place (https://www.dmtf.org/standards/ovf, DSP0243)."""

from __future__ import annotations

from .image import Ova, Ovf

__all__ = ["Ova", "Ovf"]
