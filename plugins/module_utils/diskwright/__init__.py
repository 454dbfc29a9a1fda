# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Diskwright: create, convert, inspect, repair and compose virtual machine disk images with no QEMU installed.

The public API is what `__all__` names; it loads on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"
