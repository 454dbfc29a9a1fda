# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qemu_img_info: what an image is, as data."""

from __future__ import annotations

import os

from ._options import as_text, joined
from .diskwright.commands.info import info
from .diskwright.parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping


def describe(path: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that `params` (those of the module) ask for about one image. Raises Error and OSError."""
    if params["missing_ok"] and not os.path.exists(path):
        return {"path": path, "exists": False}
    name = os.path.abspath(path)
    found = [underscored(record.as_dict()) for record in info(name, format=params["format"], backing_chain=params["backing_chain"], force_share=True)]
    entry: dict[str, Any] = {"path": path, "exists": True, **found[0]}
    if params["backing_chain"]:
        entry["chain"] = found
    if params["map"]:
        map_image = part(__package__, "diskwright.commands.map").map_image

        entry["map"] = [run.as_dict() for run in map_image(name, format=params["format"], force_share=True)]
    if params["measure"] is not None:
        measure = part(__package__, "diskwright.commands.measure").measure

        wanted = params["measure"]
        options = joined({key: as_text(value) for key, value in (wanted["options"] or {}).items()})
        room = measure(name, format=params["format"], target_format=wanted["format"], options=options, force_share=True)
        entry["measure"] = {"required": room.required, "fully_allocated": room.fully_allocated}
        if room.bitmaps is not None:
            entry["measure"]["bitmaps"] = room.bitmaps
    return entry


def underscored(value: Any) -> Any:
    """QEMU's keys in the spelling of Ansible's: a-b becomes a_b, all the way down."""
    if isinstance(value, dict):
        return {key.replace("-", "_"): underscored(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [underscored(inner) for inner in value]
    return value
