# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Shared libraries of C by ctypes (https://docs.python.org/3/library/ctypes.html): found by their names, with every prototype that is used declared.

A call through ctypes releases the GIL; a callback takes it again.
"""

from __future__ import annotations

from ..errors import Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Sequence

Prototype = "tuple[Any, tuple[Any, ...]]"  # what a function returns, and what it takes


def load(driver: str, sonames: Sequence[str], packages: str, prototypes: Mapping[str, Any]) -> Any:
    """The first of `sonames` that this machine has, with `prototypes` (name -> (result, arguments)) declared.

    Raises Unsupported, which names the `packages` to install, where there is none or it lacks a function.
    """
    try:
        import ctypes
    except ImportError:
        raise Unsupported("The '%s' block driver needs Python's ctypes module" % driver) from None
    library: Any = None
    for soname in sonames:
        try:
            library = ctypes.CDLL(soname, use_errno=True)
            break
        except OSError:
            continue
    if library is None:
        raise Unsupported("The '%s' block driver needs %s, which is not there: install %s" % (driver, sonames[0], packages))
    for name, (result, arguments) in prototypes.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise Unsupported("The '%s' block driver needs another version of %s: this one has no %s" % (driver, soname, name)) from None
        function.restype = result
        function.argtypes = arguments
    return library


def text(value: Any) -> str:
    """What a C string says, in one line; "" for NULL."""
    return value.decode("utf-8", "replace").strip() if value else ""


def writable(view: memoryview) -> Any:
    """The memory behind a writable buffer, for C to fill."""
    import ctypes

    return (ctypes.c_char * len(view)).from_buffer(view)


def readable(view: memoryview) -> Any:
    """The memory behind a buffer, for C to read: itself, or a copy where Python does not let us have it."""
    import ctypes

    kind = ctypes.c_char * len(view)
    return kind.from_buffer_copy(view) if view.readonly else kind.from_buffer(view)
