# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""qcow2: QEMU's copy-on-write image format (https://www.qemu.org/docs/master/interop/qcow2.html)."""

from __future__ import annotations

from .image import Qcow2

__all__ = ["Qcow2"]
