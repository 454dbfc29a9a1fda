# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Tests of `make test-heavy` only: their servers are large, and are no part of what a change must pass."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("DISKWRIGHT_TESTS") == "heavy" else ["test_*"]
