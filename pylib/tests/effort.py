# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""How much is tried: DISKWRIGHT_TESTS=brief takes samples where nothing new is to be found by trying all of it a second time."""

from __future__ import annotations

import os

BRIEF = os.environ.get("DISKWRIGHT_TESTS") == "brief"
