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


class NotCarried(Unsupported):
    """An Ansible module was sent without a part of the library that the task needs."""


def part(package: Optional[str], name: str, what: str = "") -> Any:
    """The module `name` (with dots; each one in front goes a package up) of the package `package`.

    Raises NotCarried, which says `what`, where it was not sent along.
    """
    try:  # not importlib, which is slow to start
        return __import__(name.lstrip("."), {"__package__": package}, None, ("*",), 1 + len(name) - len(name.lstrip(".")))
    except ModuleNotFoundError as exc:
        full = "%s.%s" % ((package or "").rsplit(".", len(name) - len(name.lstrip(".")))[0], name.lstrip("."))
        if exc.name is None or not (full + ".").startswith(exc.name + "."):
            raise  # something that this Python lacks
        what = what or "'%s'" % full.partition("diskwright.")[2]
        raise NotCarried("%s is not part of this module's payload, which holds what the module is made for" % what) from exc
