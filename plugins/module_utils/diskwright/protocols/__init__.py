# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The protocol drivers, a file for each; drivers.py lists them."""

from __future__ import annotations

# The environment of the process, which protocols may heed (proxies); empty unless cli.py fills it in.
ENVIRONMENT: dict[str, str] = {}
