# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Arguments of commands: the declared records of options, read from JSON with JSON's types
(https://www.qemu.org/docs/master/devel/qapi-code-gen.html).

The annotation of a field is its type: str, bool, int, Size, dict or list; all else is taken as it is.
"""

from __future__ import annotations

from ..errors import OptionError
from ..options import REQUIRED, Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, TypeVar

    from ..options import Field

    Record = TypeVar("Record", bound=Options)

MAX_INT = (1 << 63) - 1

_EXPECTED = {"str": "string", "bool": "boolean", "int": "integer", "Size": "integer", "list": "array", "dict": "object"}
_TYPES: dict[str, Any] = {"str": str, "bool": bool, "int": int, "Size": int, "list": list, "dict": dict}


def read(declared: type[Record], values: Mapping[str, Any], path: str = "") -> Record:
    """The record that a JSON object is. Raises OptionError in QEMU's words; `path` stands in front of the names of members."""
    parsed: dict[str, Any] = {}
    for key, field in declared.fields.items():
        if key in values:
            parsed[field.name] = _typed(field, values[key], path + key)
        elif field.default is REQUIRED:
            raise OptionError("Parameter '%s' is missing" % (path + key))
    for key in values:
        if key not in declared.fields:
            raise OptionError("Parameter '%s' is unexpected" % (path + key))
    return declared(**parsed)


def _typed(field: Field, value: Any, path: str) -> Any:
    kind = field.kind
    expected = _TYPES.get(kind)
    if expected is None:
        return value
    if not isinstance(value, expected) or isinstance(value, bool) and kind != "bool":
        raise OptionError("Invalid parameter type for '%s', expected: %s" % (path, _EXPECTED[kind]))
    if expected is int and not -MAX_INT - 1 <= value <= MAX_INT:
        raise OptionError("Invalid parameter type for '%s', expected: integer" % path)
    if field.choices and value not in field.choices:
        raise OptionError("Parameter '%s' does not accept value '%s'" % (path.rpartition(".")[2], value))
    return value
