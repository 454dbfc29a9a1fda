# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qemu_img_info: what an image is, as data."""

from __future__ import annotations

import os

from . import _policy
from .diskwright.describe import info
from .diskwright.parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping


# what the documentation fragments `describing` and `untrusted` describe
ARGUMENTS: dict[str, Any] = {
    **_policy.ARGUMENTS,
    "path": {"type": "list", "elements": "path", "required": True, "aliases": ["paths"]},
    "format": {"type": "str"},
    "backing_chain": {"type": "bool", "default": False},
    "map": {"type": "bool", "default": False},
    "measure": {"type": "dict", "options": {"format": {"type": "str", "default": "qcow2"}, "options": {"type": "dict"}}},
    "content_checksum": {"type": "bool", "default": False},
    "inspect": {"type": "bool", "default": False},
    "missing_ok": {"type": "bool", "default": False},
}


def describe(path: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that `params` (those of the module) ask for about one image. Raises Error and OSError."""
    if params["missing_ok"] and not os.path.exists(path):
        return {"path": path, "exists": False}
    name = os.path.abspath(path)
    entry: dict[str, Any] = {"path": path, "exists": True}
    shared: dict[str, Any] = {"format": params["format"], "force_share": True, "policy": _policy.current()}
    if params.get("inspect"):
        from ._inspect import inspect

        entry["inspect"] = inspect(path, params["format"])
        if not entry["inspect"]["safe"]:
            return entry
    found = [underscored(record.as_dict()) for record in info(name, backing_chain=params["backing_chain"], **shared)]
    for record in found:
        _policy.check_size(record["filename"], record["virtual_size"])
    entry.update(found[0])
    if params["backing_chain"]:
        entry["chain"] = found
    if params["map"]:
        map_image = part(__package__, "diskwright.commands.map").map_image

        entry["map"] = [run.as_dict() for run in map_image(name, **shared)]
    if params["measure"] is not None:
        # what an encrypted image holds shows only to those who have its passphrase
        entry["measure"] = None if any(record.get("encrypted") for record in found) else measured(name, params["measure"], shared)
    if params.get("content_checksum"):
        from .diskwright.graph import open_image
        from .diskwright.node import OpenFlags

        content_checksum = part(__package__, "diskwright.copy.content").content_checksum
        with open_image(name, params["format"], OpenFlags(force_share=True), policy=_policy.current()) as node:
            entry["content_checksum"] = content_checksum(node)
    return entry


def measured(name: str, wanted: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, int]:
    """The bytes that a new image with the content of `name` would need. Raises Error and OSError."""
    as_text, joined = part(__package__, "_options").as_text, part(__package__, "_options").joined
    options = joined({key: as_text(value) for key, value in (wanted["options"] or {}).items()})
    room = part(__package__, "diskwright.commands.measure").measure(name, target_format=wanted["format"], options=options, **shared)
    sizes = {"required": room.required, "fully_allocated": room.fully_allocated}
    if room.bitmaps is not None:
        sizes["bitmaps"] = room.bitmaps
    return sizes


def underscored(value: Any) -> Any:
    """QEMU's keys in the spelling of Ansible's: a-b becomes a_b, all the way down."""
    if isinstance(value, dict):
        return {key.replace("-", "_"): underscored(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [underscored(inner) for inner in value]
    return value
