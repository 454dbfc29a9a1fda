# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Diskwright: create, convert, inspect, repair and compose virtual machine disk images with no QEMU installed.

The public API is what `__all__` names (types in __init__.pyi); it loads on first use, so that importing the package
costs nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"

_HOMES = {
    "open": ("image", "open_node"),
    "open_file": ("image", "open_file"),
    "commit_snapshot": ("temporary", "commit"),
    "ImageFile": ("image", "ImageFile"),
    "OpenPolicy": ("graph", "OpenPolicy"),
    "OpenFlags": ("node", "OpenFlags"),
    "Graph": ("graph", "Graph"),
    "Root": ("root", "Root"),
    "Node": ("node", "Node"),
    "Extent": ("extent", "Extent"),
    "amend": ("commands.amend", "amend"),
    "bench": ("commands.bench", "bench"),
    "create": ("commands.create", "create"),
    "convert": ("commands.convert", "convert"),
    "bitmap": ("commands.bitmap", "bitmap"),
    "check": ("commands.check", "check"),
    "compare": ("commands.compare", "compare"),
    "info": ("describe", "info"),
    "map": ("commands.map", "map_image"),
    "measure": ("commands.measure", "measure"),
    "rebase": ("commands.rebase", "rebase"),
    "commit": ("commands.commit", "commit"),
    "resize": ("commands.resize", "resize"),
    "snapshot": ("commands.snapshot", "snapshot"),
    "Snapshot": ("node", "Snapshot"),
    "dd": ("commands.dd", "dd"),
    **{name: ("errors", name) for name in ("Error", "OptionError", "WrongFormat", "Corrupt", "Unsupported", "ReadOnly", "Locked", "Denied", "ProtocolError")},
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    """Load a name of the public API.

    The import is dynamic on purpose: a static one would put the whole library into the payload of every Ansible module.
    """
    if name not in _HOMES:
        raise AttributeError("module %r has no attribute %r" % (__name__, name))
    from importlib import import_module

    home, attribute = _HOMES[name]
    value = getattr(import_module("." + home, __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
