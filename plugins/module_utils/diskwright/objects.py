# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The objects that images refer to by id: secrets, throttle groups, TLS credentials (--object).

The types and their properties are those of https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html (ObjectType).
"""

from __future__ import annotations

from .errors import OptionError
from .options import split_pairs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class UserObject:
    """One object definition: its type, its id and its other properties, as the user wrote them."""

    __slots__ = ("type", "id", "properties")

    def __init__(self, type: str, id: str, properties: dict[str, Any]) -> None:
        self.type = type
        self.id = id
        self.properties = properties


def add_object(objects: dict[str, UserObject], text: str) -> None:
    """Read one definition, "type,id=ID,k=v" or a JSON object, into `objects`. Raises OptionError."""
    properties = dict(split_pairs(text, "qom-type"))
    objects[properties["id"]] = UserObject(properties.pop("qom-type"), properties.pop("id"), properties)


__all__ = ["UserObject", "add_object", "OptionError"]
