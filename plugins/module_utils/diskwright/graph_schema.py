# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""JSON Schema of graph files and of all that they describe (https://json-schema.org/draft/2020-12).

It is made of what the validation itself is made of: the drivers' Options, description.py and the table of objects. What a schema
cannot say (references, cycles, permissions, limits that contradict each other) only the validation finds.
"""

from __future__ import annotations

from . import drivers
from .description import GENERIC, MAX_INTEGER, Group, Rows, driver_names, is_needed, shape_of
from .graph import MAX_NAME
from .graph_file import EXPORT, SERVER
from .objects import TYPES, limits_shape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .description import Shape
    from .options import Field

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_NAME = {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9._-]*$"}
_INTEGER = {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}
_REF = {"$ref": "#/$defs/ref"}

_KINDS: dict[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "int": _INTEGER,
    "Size": _INTEGER,
    "NodeRef": _REF,
    "Backing": {"if": {"type": "null"}, "else": _REF},
    "NodeRefs": {"type": "array", "items": _REF},
    "Words": {"type": "array", "items": {"type": "string"}},
    "TextList": {"type": "array", "items": {"type": "string"}},
    "ServerList": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "string"}}},
}


def schema() -> dict[str, Any]:
    """The schema of a graph file; `$defs/blockdev` is that of what blockdev-add takes, `$defs/object` of object-add."""
    names = driver_names()
    nodes = {"blockdev-" + name: _object(_described(name), {"driver": {"const": name}}, ["driver"]) for name in names}
    objects = {"object-" + name: _user_object(name) for name in sorted(TYPES) if name != "authz-list-file"}
    kinds = [name[len("object-") :] for name in objects]
    return {
        "$schema": DRAFT,
        "title": "A graph of block nodes",
        "description": "What diskwright graph and diskwright serve read: objects, nodes, and under which names and where the nodes are exported.",
        "type": "object",
        "properties": {
            "objects": {"type": ["array", "null"], "items": {"$ref": "#/$defs/object"}},
            "blockdevs": {"type": ["array", "null"], "items": {"$ref": "#/$defs/blockdev", "required": ["node-name"]}},
            "exports": {"type": ["array", "null"], "items": {"$ref": "#/$defs/export"}},
            "nbd-server": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/nbd-server"}]},
        },
        "additionalProperties": False,
        "$defs": {
            "ref": {
                "description": "the name of a node, or the description of one",
                "if": {"type": "string"},
                "else": {"$ref": "#/$defs/blockdev"},
            },
            "blockdev": _choice("driver", "blockdev-", names),
            "object": _choice("qom-type", "object-", kinds),
            "export": _object(EXPORT),
            "nbd-server": _object(SERVER),
            **nodes,
            **objects,
        },
    }


def _choice(key: str, prefix: str, values: list[str]) -> dict[str, Any]:
    """An object of which the value of `key` says what else is in it."""
    branches = [{"if": {"properties": {key: {"const": value}}, "required": [key]}, "then": {"$ref": "#/$defs/" + prefix + value}} for value in values]
    return {"type": "object", "required": [key], "properties": {key: {"enum": values}}, "allOf": branches}


def _described(driver: str) -> Shape:
    return {**GENERIC, **shape_of(drivers.lookup(driver))}


def _object(shape: Shape, own: Any = None, needed: Any = ()) -> dict[str, Any]:
    """A mapping with the keys of `shape`, and no others."""
    properties: dict[str, Any] = dict(own or {})
    required = list(needed)
    for key, entry in shape.items():
        if isinstance(entry, Rows):
            properties[key] = {"type": "array", "items": _object(entry.shape), "description": entry.help}
            continue
        if isinstance(entry, Group):
            inner = _object(entry.shape)
            properties[key] = inner if entry.whole is None else {"anyOf": [inner, _value(entry.whole)]}
            if "required" in inner:
                required.append(key)
            continue
        for word in (key, *entry.legacy):
            properties[word] = _value(entry)
        if is_needed(entry):
            required.append(key)
    result: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        result["required"] = required
    return {**result, "additionalProperties": False}


def _value(field: Field) -> dict[str, Any]:
    found = dict(_KINDS.get(field.kind, {"type": "string"}))
    if field.choices:
        found = {"type": "string", "enum": list(field.choices)}
    if field is GENERIC["node-name"]:
        found = {**_NAME, "maxLength": MAX_NAME}
    if field.help:
        found["description"] = field.help
    return found


def _user_object(kind: str) -> dict[str, Any]:
    properties: dict[str, Any] = {"qom-type": {"const": kind}, "id": _NAME}
    required = ["qom-type", "id"]
    for key, what in TYPES[kind].items():
        if what.startswith("!"):
            required.append(key)
        properties[key] = _property(what.lstrip("!"))
    found: dict[str, Any] = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "secret":
        found["oneOf"] = [{"required": ["data"]}, {"required": ["file"]}]
    return found


def _property(what: str) -> dict[str, Any]:
    simple: dict[str, dict[str, Any]] = {
        "string": {"type": "string"},
        "int": {"type": "integer"},
        "bool": {"type": "boolean"},
        "list": {"type": "array"},
    }
    if what == "limits":
        return {"type": "object", "properties": {key: {"type": "integer"} for key in limits_shape()}, "additionalProperties": False}
    return simple.get(what) or {"type": "string", "enum": what.split()}
