# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Descriptions of nodes as QMP takes them: typed, every key declared (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, BlockdevOptions)."""

from __future__ import annotations

from .. import drivers
from ..errors import OptionError
from ..options import flatten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping

_GENERIC = {
    "node-name": str,
    "driver": str,
    "read-only": bool,
    "auto-read-only": bool,
    "force-share": bool,
    "detect-zeroes": str,
    "discard": str,
    "cache": dict,
    "active": bool,
}
_WORDS: dict[type, str] = {str: "string", bool: "boolean", int: "integer", dict: "object"}
_KINDS: dict[str, type] = {"str": str, "ObjectRef": str, "SecretRef": str, "bool": bool, "int": int, "Size": int}


def check(values: Mapping[str, Any], path: str = "") -> None:
    """Raise OptionError in QEMU's words for what no description may have; what a driver thinks of it shows when it is opened."""
    driver = values.get("driver")
    if driver is None:
        raise OptionError("Parameter '%sdriver' is missing" % path)
    if not isinstance(driver, str):
        raise OptionError("Invalid parameter type for '%sdriver', expected: string" % path)
    if driver not in drivers.KNOWN.split():
        raise OptionError("Parameter 'driver' does not accept value '%s'" % driver)
    for key, kind in _GENERIC.items():
        if key in values:
            _check_type(values[key], kind, path + key)
    fields = drivers.lookup(driver).options_class._by_key
    heads = {key.partition(".")[0] for key in fields}
    for key, value in values.items():
        if key in _GENERIC:
            continue
        field = fields.get(key)
        if field is not None and field.kind in _KINDS and not isinstance(value, dict):
            _check_type(value, _KINDS[field.kind], path + key)
            if field.choices and value not in field.choices:
                raise OptionError("Parameter '%s' does not accept value '%s'" % (key, value))
        elif isinstance(value, dict) and (key in ("file", "backing") or field is not None and field.kind == "NodeRef"):
            if key != "backing" or "driver" in value:
                check(value, path + key + ".")
        elif key not in heads and key not in ("file", "backing") and key.partition(".")[0] not in heads:
            raise OptionError("Parameter '%s%s' is unexpected" % (path, key))
        elif isinstance(value, dict) and field is None:
            for inner in flatten(value, key + "."):
                if inner not in fields and not any(inner.startswith(known + ".") for known in fields):
                    raise OptionError("Parameter '%s%s' is unexpected" % (path, inner))


def _check_type(value: Any, kind: type, path: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise OptionError("Invalid parameter type for '%s', expected: %s" % (path, _WORDS[kind]))
