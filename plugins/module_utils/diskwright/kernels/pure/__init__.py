# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The pure twins of all kernels (../contract.py says what they promise)."""

from __future__ import annotations

from .blocks import bit_runs, crc32c, difference_runs, first_difference, gather, nonzero_runs, scatter
from .refcounts import refcount_free_runs, refcount_mismatches, refcounts_pack, refcounts_unpack, tally
from .tables import l2_runs, l2_runs_extended, table_runs

__all__ = [
    "bit_runs",
    "crc32c",
    "difference_runs",
    "first_difference",
    "gather",
    "l2_runs",
    "l2_runs_extended",
    "nonzero_runs",
    "refcount_free_runs",
    "refcount_mismatches",
    "refcounts_pack",
    "refcounts_unpack",
    "scatter",
    "table_runs",
    "tally",
]
