# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""qcow: version 1 of QEMU's copy-on-write format (https://github.com/libyal/libqcow/blob/main/documentation/QEMU%20Copy-On-Write%20file%20format.asciidoc)."""

from __future__ import annotations

from .image import Qcow

__all__ = ["Qcow"]
