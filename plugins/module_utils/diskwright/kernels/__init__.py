# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The switch between the pure and the native twins of all kernels (contract.py says what they promise).

`DISKWRIGHT_ACCEL` is `auto` (the native twins if they are installed and fit, else the pure ones), `off` or `require`. A twin is loaded when a kernel is
first asked for, except that `require` is answered at once. It is all of the native kernels or none of them.
"""

from __future__ import annotations

import os

from ..errors import Error
from ..parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any, Optional

    from diskwright.kernels.pure import (
        bit_runs,
        crc32c,
        difference_runs,
        first_difference,
        gather,
        l2_runs,
        l2_runs_extended,
        nonzero_runs,
        refcount_free_runs,
        refcount_mismatches,
        refcounts_pack,
        refcounts_unpack,
        scatter,
        table_runs,
        tally,
    )

    __all__ = [
        "backend",
        "bit_runs",
        "crc32c",
        "difference_runs",
        "first_difference",
        "gather",
        "l2_runs",
        "l2_runs_extended",
        "native",
        "nonzero_runs",
        "refcount_free_runs",
        "refcount_mismatches",
        "refcounts_pack",
        "refcounts_unpack",
        "scatter",
        "table_runs",
        "tally",
    ]

_demand = os.environ.get("DISKWRIGHT_ACCEL", "auto")
if _demand not in ("auto", "off", "require"):
    raise Error("DISKWRIGHT_ACCEL must be auto, off or require, not '%s'" % _demand)

_loaded = False
_native: Optional[ModuleType] = None


def _unfit(module: ModuleType) -> str:
    """Why a native module cannot be used; empty if it can."""
    from .contract import ABI, CIPHERS, CODECS, KERNELS

    found = getattr(module, "ABI", None)
    if found != ABI:
        return "diskwright_accel has ABI %s, this library needs %d" % (found, ABI)
    missing = [name for name in KERNELS + CODECS + CIPHERS if not hasattr(module, name)]
    return "diskwright_accel lacks %s" % ", ".join(missing) if missing else ""


def native() -> Optional[ModuleType]:
    """The native module if its kernels are in use, else None."""
    global _loaded, _native
    if _loaded:
        return _native
    if _demand != "off":
        try:
            import diskwright_accel
        except ImportError as error:
            reason = "diskwright_accel cannot be imported (%s)" % error
        else:
            reason = _unfit(diskwright_accel)
            if not reason:
                _native = diskwright_accel
        if reason and _demand == "require":
            raise Error("DISKWRIGHT_ACCEL=require: " + reason)
    _loaded = True
    return _native


def backend() -> str:
    """Which twins are in use: `pure`, or for example `accel 0.1.0 (abi 1)`."""
    module = native()
    return "accel %s (abi %d)" % (module.__version__, module.ABI) if module else "pure"


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Load a twin when the first kernel is asked for, and put all kernels into this module."""
        from .contract import KERNELS

        if name not in KERNELS:
            raise AttributeError("module %r has no attribute %r" % (__name__, name))
        twin = native()
        if twin is None:
            twin = part(__package__, "pure")
        for kernel in KERNELS:
            globals()[kernel] = getattr(twin, kernel)
        return globals()[name]


if _demand == "require":
    native()
