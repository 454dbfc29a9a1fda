# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""query-qmp-schema: the commands and their arguments, made from the declarations
(https://www.qemu.org/docs/master/devel/qapi-code-gen.html#client-json-protocol-introspection).

Events, return types and the options of drivers are not described in detail: they are objects of any kind.
"""

from __future__ import annotations

from ..options import REQUIRED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable

    from ..options import Field, Options
    from .commands import Command

EVENTS = (
    "BLOCK_EXPORT_DELETED",
    "BLOCK_IMAGE_CORRUPTED",
    "BLOCK_IO_ERROR",
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_ERROR",
    "BLOCK_JOB_PENDING",
    "BLOCK_JOB_READY",
    "BLOCK_WRITE_THRESHOLD",
    "JOB_STATUS_CHANGE",
    "QUORUM_FAILURE",
    "QUORUM_REPORT_BAD",
)
_BUILTIN = {"str": "str", "bool": "bool", "int": "int", "Size": "int"}
_ANY, _EMPTY, _ANYS = "any", "0", "[any]"


def schema(commands: Iterable[Command]) -> list[dict[str, Any]]:
    """The entities, each once; names of types that are no built-in ones are numbers."""
    found: list[dict[str, Any]] = [
        {"name": _ANY, "meta-type": "builtin", "json-type": "value"},
        {"name": "str", "meta-type": "builtin", "json-type": "string"},
        {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
        {"name": "int", "meta-type": "builtin", "json-type": "int"},
        {"name": _ANYS, "meta-type": "array", "element-type": _ANY},
        {"name": _EMPTY, "meta-type": "object", "members": []},
    ]
    types: dict[Any, str] = {}
    for command in commands:
        argument = _ANY if command.spec else _object(command.arguments, found, types)
        returns = _ANYS if command.name in ("query-commands", "query-jobs", "query-block-jobs") else _ANY if command.name.startswith("query-") else _EMPTY
        found.append({"name": command.name, "meta-type": "command", "arg-type": argument, "ret-type": returns})
    found += [{"name": name, "meta-type": "event", "arg-type": _ANY} for name in EVENTS]
    return found


def _object(declared: type[Options], found: list[dict[str, Any]], types: dict[Any, str]) -> str:
    if not declared.fields:
        return _EMPTY
    if declared not in types:
        members = []
        for key, field in declared.fields.items():
            member: dict[str, Any] = {"name": key, "type": _type(field, found, types)}
            if field.default is not REQUIRED:
                member["default"] = None
            members.append(member)
        types[declared] = str(len(types) + 1)
        found.append({"name": types[declared], "meta-type": "object", "members": members})
    return types[declared]


def _type(field: Field, found: list[dict[str, Any]], types: dict[Any, str]) -> str:
    if field.choices:
        if field.choices not in types:
            types[field.choices] = str(len(types) + 1)
            values = [{"name": value} for value in field.choices]
            found.append({"name": types[field.choices], "meta-type": "enum", "members": values, "values": list(field.choices)})
        return types[field.choices]
    return _ANYS if field.kind == "list" else _BUILTIN.get(field.kind, _ANY)
