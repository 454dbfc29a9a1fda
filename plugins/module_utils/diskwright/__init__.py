# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Virtual machine disk images: made, converted, inspected and repaired with the standard library alone."""

from __future__ import annotations

__version__ = "0.1.0"
