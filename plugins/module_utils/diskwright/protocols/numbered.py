# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Options that are lists, written "server.0.host=a,server.1.host=b" where options are flat."""

from __future__ import annotations

from ..errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping

MAX_MEMBERS = 64


class StrongKeys(tuple):  # type: ignore[type-arg]
    """Names of options, those that are lists with all that is in them."""

    def __contains__(self, key: object) -> bool:
        return tuple.__contains__(self, str(key).partition(".")[0])


def take(values: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[Any]]:
    """`values` without the list `name`, and the list: of texts, or of mappings for what has parts.

    Raises OptionError for numbers that do not count from 0 on.
    """
    rest: dict[str, Any] = {}
    members: dict[int, Any] = {}
    for key, value in values.items():
        first, _dot, tail = key.partition(".")
        number, dot, part = tail.partition(".")
        if first != name:
            rest[key] = value
        elif not tail:
            raise OptionError("Invalid parameter type for '%s', expected: array" % name)
        elif not number.isdecimal() or int(number) >= MAX_MEMBERS:
            raise OptionError("Parameter '%s' is unexpected" % key)
        elif dot:
            member = members.setdefault(int(number), {})
            if not isinstance(member, dict):
                raise OptionError("Cannot mix scalar and non-scalar keys at '%s.%s'" % (name, number))
            member[part] = value
        else:
            members[int(number)] = value
    if sorted(members) != list(range(len(members))):
        raise OptionError("Parameter '%s.%d' missing" % (name, next(number for number in range(MAX_MEMBERS) if number not in members)))
    return rest, [members[number] for number in range(len(members))]


def member(values: Any, where: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, str]:
    """One mapping of a list, all of whose values are texts. Raises OptionError in QEMU's words."""
    if not isinstance(values, dict):
        raise OptionError("Invalid parameter type for '%s', expected: object" % where)
    for key in needed:
        if key not in values:
            raise OptionError("Parameter '%s.%s' is missing" % (where, key))
    for key, value in values.items():
        if key not in needed and key not in optional:
            raise OptionError("Parameter '%s.%s' is unexpected" % (where, key))
        if not isinstance(value, str):
            raise OptionError("Invalid parameter type for '%s.%s', expected: string" % (where, key))
    return dict(values)
