# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""qed: the QEMU Enhanced Disk format (https://www.qemu.org/docs/master/interop/qed_spec.html)."""

from __future__ import annotations

from .image import Qed

__all__ = ["Qed"]
