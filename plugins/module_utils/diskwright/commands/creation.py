# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The options of an image that is to be made: those of its format and those of its protocol, as one list
(https://www.qemu.org/docs/master/tools/qemu-img.html, create)."""

from __future__ import annotations

from .. import drivers
from ..errors import OptionError
from ..options import parse_value, split_pairs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterator, Mapping, Optional

    from ..node import Node
    from ..options import Field, Options


def creatable(format: str, filename: Optional[str]) -> tuple[type[Node], type[Node]]:
    """The classes of `format` and of the protocol that `filename` (None: a plain file) names.

    Raises OptionError in QEMU's words for one that is unknown or cannot create.
    """
    from ..graph import parse_filename, protocol_prefix

    if format not in drivers.FORMATS and format not in drivers.PROTOCOLS and format not in drivers.FILTERS:
        raise OptionError("Unknown file format '%s'" % format)
    own = drivers.lookup(format)
    prefix: Optional[str] = "file"
    if filename is not None:
        prefix = protocol_prefix(filename) or parse_filename(filename)["file"]["driver"]
    protocol = drivers.lookup_protocol(prefix or "")
    for cls, kind in ((own, "Format"), (protocol, "Protocol")):
        if getattr(cls, "create_options", None) is None:
            raise OptionError("%s driver '%s' does not support image creation" % (kind, cls.driver))
    return own, protocol


class CreationOptions:
    """The -o options given for an image of the format `own` on the protocol `protocol`.

    `values` holds what was given, by key: numbers and truth values parsed, text as it is, since a wrong text is an error
    of the driver that gets it, and comes later.
    """

    def __init__(self, own: type[Node], protocol: type[Node], text: Optional[str] = None, objects: Optional[Mapping[str, Any]] = None) -> None:
        """Read `text`, "k=v,k2=v2"; secrets that it names are among `objects`.

        Raises OptionError for an unknown key, or a value that is no number or truth value.
        """
        self.own = own
        self.protocol = protocol
        self.objects = objects or {}
        self.values: dict[str, Any] = {}
        self._written: dict[str, str] = {}
        for key, value in split_pairs(text) if text else ():
            field = self.field(key)
            if field is None:
                raise OptionError("Invalid parameter '%s'" % key)
            self.values[field.key] = value if field.kind in ("str", "ObjectRef", "SecretRef") else parse_value(field, value, key)
            self._written[field.key] = value

    def _classes(self) -> tuple[type[Options], ...]:
        own: type[Options] = self.own.create_options  # type: ignore[attr-defined]
        protocol: type[Options] = self.protocol.create_options  # type: ignore[attr-defined]
        return (protocol,) if self.own.leaf else (own, protocol)

    def _fields(self) -> Iterator[Field]:
        seen: set[str] = set()
        for cls in self._classes():
            for key, field in cls.fields.items():
                if key not in seen:
                    seen.add(key)
                    yield field

    def field(self, key: str) -> Optional[Field]:
        """The declaration of an option, None for an unknown one."""
        for cls in self._classes():
            if key in cls.fields:
                return cls.fields[key]
        return None

    def set(self, key: str, value: Any) -> None:
        """Set an option as if it had been given."""
        self.values[key] = value
        self._written[key] = str(value)

    def line(self) -> str:
        """All options with a value, "k=v k2=v2", in the order and the spelling of the line "Formatting ..."."""
        shown = {key: cls.fields[key].default for cls in reversed(self._classes()) for key in cls.SHOWN}
        words = []
        for field in self._fields():
            key = field.key
            if key in self.values:
                value = self.values[key]
                if field.kind in ("int", "Size"):
                    text = str(value - (1 << 64) if value >> 63 else value)
                else:
                    text = self._written[key].replace(",", ",,")
            elif key in shown:
                text = {True: "on", False: "off"}.get(shown[key], str(shown[key])) if isinstance(shown[key], bool) else str(shown[key])
            else:
                continue
            words.append("%s=%s" % (key, text))
        return " ".join(words)

    def own_record(self) -> Any:
        """The record for the format. Raises OptionError for a value that the driver refuses."""
        cls = self._classes()[0]
        return cls.from_mapping({key: value for key, value in self.values.items() if key in cls.fields}).bind(self.objects)

    def secrets(self) -> dict[str, Any]:
        """The runtime options with which the image opens once it is made."""
        return {key: value for key, value in self.values.items() if key.endswith("key-secret")}

    def protocol_record(self) -> Any:
        """The record for the protocol. What both declare is the format's, unless the file is all there is to the image."""
        classes = self._classes()
        taken = () if self.own.leaf or self.own.plain else classes[0].fields
        fields = classes[-1].fields
        return classes[-1].from_mapping({key: value for key, value in self.values.items() if key in fields and key not in taken}).bind(self.objects)
