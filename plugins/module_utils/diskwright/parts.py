# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Imports by name, for what not every Ansible module carries: Ansible sends along whatever is imported statically, used or not.

What a module carries besides is listed in its bundle (plugins/module_utils/_bundle_*.py); installed as a package, everything is there.
"""

from __future__ import annotations

from .errors import Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional


def part(package: Optional[str], name: str, what: str = "") -> Any:
    """The module `name` (with dots) of the package `package`. Raises Unsupported, which says `what`, where it was not sent along."""
    try:  # not importlib, which is slow to start
        return __import__(name, {"__package__": package}, None, ("*",), 1)
    except ModuleNotFoundError as exc:
        if exc.name != "%s.%s" % (package, name) and not "%s.%s" % (package, name).startswith("%s." % exc.name):
            raise  # something that this Python lacks
        text = "%s is not part of this module's payload, which holds what the module is made for" % (what or "'%s.%s'" % ((package or "").rpartition(".")[2], name))
        raise Unsupported(text) from exc
