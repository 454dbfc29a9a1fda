# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Options: a declared record of settings, and all its readers.

A record is a class whose annotated fields are `opt(...)` declarations; the annotation is the type. The same declaration
serves `-o k=v,k2=v2`, `--image-opts`, `json:` and blockdev JSON, `-o help`, JSON Schema and the Ansible modules.
"""

from __future__ import annotations

from .errors import OptionError
from .units import MAX_SIZE, OutOfRange, parse_number, parse_size_option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Mapping, Optional, Sequence, Union

    from typing_extensions import Self, dataclass_transform

    from .node import Node

    NodeRef = Union[Node, Mapping[str, Any], str]  # a specification before graph.py has opened it, a Node afterwards
    NodeRefs = Sequence[NodeRef]
else:

    def dataclass_transform(**_unused):
        return lambda cls: cls

    class NodeRef:
        """A child node: a specification before graph.py has opened it, a Node afterwards."""


class ObjectRef(str):
    """The id of an object (--object), and the objects by id among which it is to be looked for when it is needed."""

    objects: Mapping[str, Any] = {}

    def __new__(cls, id: str, objects: Optional[Mapping[str, Any]] = None) -> Self:
        ref = super().__new__(cls, id)
        ref.objects = objects or {}
        return ref


class SecretRef(ObjectRef):
    """The id of a secret object."""


_REFERENCES = {"ObjectRef": ObjectRef, "SecretRef": SecretRef}


Size = int  # bytes, 0 .. 2**64 - 1, written in QEMU's size grammar

MAX_NESTING = 128  # of mappings in one another

REQUIRED: Any = object()  # the default of a field that must be given


class Field:
    """One declared option: `name` is the Python attribute, `key` what users write, `kind` its type's name."""

    __slots__ = ("name", "key", "kind", "optional", "default", "help", "choices", "refusal", "legacy", "hidden")

    def __init__(
        self,
        default: Any,
        help: str,
        key: Optional[str],
        choices: Sequence[str],
        refusal: str,
        legacy: Sequence[str],
        hidden: bool,
    ) -> None:
        self.name = ""
        self.key = key or ""
        self.kind = ""
        self.optional = False
        self.default = default
        self.help = help
        self.choices = tuple(choices)
        self.refusal = refusal
        self.legacy = tuple(legacy)
        self.hidden = hidden


def opt(
    default: Any = REQUIRED,
    *,
    help: str = "",
    key: Optional[str] = None,
    choices: Sequence[str] = (),
    refusal: str = "",
    legacy: Sequence[str] = (),
    hidden: bool = False,
) -> Any:
    """Declare an option. `key` is what users write where it is not the attribute's name, `choices` the allowed values,
    `refusal` what is said of others where it is not the usual sentence (%s stands for the value), `legacy` older
    spellings of the key, `hidden` keeps it out of `-o help`."""
    return Field(default, help, key, choices, refusal, legacy, hidden)


_HELP_KINDS = {"str": "str", "ObjectRef": "str", "SecretRef": "str", "bool": "bool (on/off)", "int": "num", "Size": "size"}


@dataclass_transform(kw_only_default=True, field_specifiers=(opt,))
class Options:
    """Base of option records.

    `fields` maps the keys that users write (in order of declaration) to their declarations. `DASHES` says that an
    attribute a_b is written a-b (runtime options); creation options keep the underscore. Creation options are declared in the
    order in which QEMU announces them.
    """

    DASHES: ClassVar[bool] = True
    rows: ClassVar[Mapping[str, Mapping[str, Field]]] = {}  # of options of the kind Rows, lists of mappings: what is in one of them
    SHOWN: ClassVar[tuple[str, ...]] = ()  # creation options that are announced even with their default
    fields: ClassVar[dict[str, Field]] = {}
    _by_key: ClassVar[dict[str, Field]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.fields = dict(cls.fields)
        for name, kind in cls.__dict__.get("__annotations__", {}).items():
            field = cls.__dict__.get(name)
            if not isinstance(field, Field):
                continue
            field.name = name
            field.optional = kind.startswith("Optional[")
            field.kind = kind[9:-1] if field.optional else kind
            field.key = field.key or (name.replace("_", "-") if cls.DASHES else name)
            cls.fields[field.key] = field
        cls._by_key = {key: field for field in cls.fields.values() for key in (field.key, *field.legacy)}

    def __init__(self, **values: Any) -> None:
        for field in self.fields.values():
            value = values.pop(field.name, field.default)
            if value is REQUIRED:
                raise OptionError("Parameter '%s' is missing" % field.key)
            setattr(self, field.name, value)
        if values:
            raise OptionError("Invalid parameter '%s'" % min(values))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.__dict__ == other.__dict__

    def __repr__(self) -> str:
        return "%s(%s)" % (type(self).__name__, ", ".join("%s=%r" % (f.name, getattr(self, f.name)) for f in self.fields.values()))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], unknown: str = "Invalid parameter '%s'") -> Self:
        """Read flat `key: value` pairs, typed or as text; None stands for "not given".

        Raises OptionError: `unknown` (with the key filled in) for a key that is not declared, QEMU's words for the rest.
        """
        parsed: dict[str, Any] = {}
        for key, value in values.items():
            field = cls._by_key.get(key)
            if field is None:
                raise OptionError(unknown % key)
            if value is not None:
                parsed[field.name] = parse_value(field, value, key)
        return cls(**parsed)

    @classmethod
    def from_string(cls, text: str) -> Self:
        """Read `k=v,k2=v2` in QEMU's grammar (see split_pairs)."""
        return cls.from_mapping(dict(split_pairs(text)))

    def bind(self, objects: Mapping[str, Any]) -> Self:
        """Tell the record's references among which objects they are looked for. Returns the record."""
        for field in self.fields.values():
            value = getattr(self, field.name)
            kind = _REFERENCES.get(field.kind)
            if kind is not None and value is not None:
                setattr(self, field.name, kind(value, objects))
        return self

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by the key that users write."""
        return {f.key: getattr(self, f.name) for f in self.fields.values() if getattr(self, f.name) != f.default}

    @classmethod
    def help_lines(cls) -> list[str]:
        """The lines of `-o help`, sorted by key, in QEMU's layout."""
        lines = []
        for key, field in sorted(cls.fields.items()):
            if not field.hidden and field.kind in _HELP_KINDS:
                lines.append("  %s - %s" % (("%s=<%s>" % (key, _HELP_KINDS[field.kind])).ljust(22), field.help))
        return lines

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """A JSON Schema (draft 2020-12) of the record as an object."""
        properties = {}
        for key, field in cls.fields.items():
            entry: dict[str, Any] = dict(_SCHEMAS.get(field.kind, {}))
            if field.choices:
                entry = {"type": "string", "enum": list(field.choices)}
            if field.help:
                entry["description"] = field.help
            if field.default is not REQUIRED and field.default is not None:
                entry["default"] = field.default
            properties[key] = entry
        required = [key for key, field in cls.fields.items() if field.default is REQUIRED]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_SCHEMAS: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "ObjectRef": {"type": "string"},
    "SecretRef": {"type": "string"},
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "Size": {"type": "integer", "minimum": 0},
    "NodeRef": {"type": ["object", "string"]},
    "NodeRefs": {"type": "array", "items": {"type": ["object", "string"]}},
}


def parse_value(field: Field, value: Any, key: str) -> Any:
    """Turn what a user wrote for `field` (text, or a typed JSON value) into its Python value.

    Raises OptionError in QEMU's words, naming `key`.
    """
    kind = field.kind
    if kind in ("NodeRef", "NodeRefs"):
        return value
    if kind == "bool":
        if isinstance(value, bool):
            return value
        if value in ("on", "yes", "true", "y"):
            return True
        if value in ("off", "no", "false", "n"):
            return False
        raise OptionError("Parameter '%s' expects 'on' or 'off'" % key)
    if kind in ("int", "Size"):
        return _parse_number(kind, value, key)
    if isinstance(value, bool) or not isinstance(value, str):
        raise OptionError("Invalid parameter type for '%s', expected: string" % key)
    if field.choices and value not in field.choices:
        raise OptionError(field.refusal % value if field.refusal else "Parameter '%s' does not accept value '%s'" % (key, value))
    return value


def _parse_number(kind: str, value: Any, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < 1 << 64:
            raise OptionError("Parameter '%s' expects a non-negative number below 2^64" % key)
        return value
    if not isinstance(value, str):
        raise OptionError("Invalid parameter type for '%s', expected: integer" % key)
    if kind == "Size":
        return parse_size_option(value, key)
    try:
        return parse_number(value, MAX_SIZE, -(1 << 63)) & MAX_SIZE  # QEMU lets negative numbers wrap; no driver takes them
    except OutOfRange:
        raise OptionError("Value '%s' is too large for parameter '%s'" % (value, key)) from None
    except OptionError:
        raise OptionError("Parameter '%s' expects a number" % key) from None


def split_pairs(text: str, implied_key: Optional[str] = None) -> list[tuple[str, str]]:
    """Split `k=v,k2=v2` into pairs; `,,` is a literal comma, `k` alone means k=on and `nok` k=off.

    `implied_key` names the key of a first element without `=`. Later pairs override earlier ones once made a dict.
    Raises OptionError for an empty key.
    """
    pairs: list[tuple[str, str]] = []
    for position, item in enumerate(_split_commas(text)):
        key, equals, value = item.partition("=")
        if not equals:
            if position == 0 and implied_key is not None:
                key, value = implied_key, item
            elif item.startswith("no") and len(item) > 2:
                key, value = item[2:], "off"
            else:
                key, value = item, "on"
        if not key:
            raise OptionError("Invalid parameter ''")
        pairs.append((key, value.replace(",,", ",")))
    return pairs


def _split_commas(text: str) -> list[str]:
    """The elements of a comma-separated list in which `,,` inside a value does not separate (and is left doubled)."""
    items: list[str] = []
    start = 0
    position = text.find(",")
    while position >= 0:
        if text[position + 1 : position + 2] == ",":
            position = text.find(",", position + 2)
            continue
        items.append(text[start:position])
        start = position + 1
        position = text.find(",", start)
    if start < len(text):
        items.append(text[start:])
    return items


_MIXED = ("overlap-check",)  # these are values, and may all the same have parts that add to them


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested mappings, and mappings with the keys 0..n-1 into lists; nested input is kept.

    Raises OptionError where a key is both a value and a mapping.
    """
    root: dict[str, Any] = {}
    mixed = [key for key in flat if key.rpartition(".")[2] in _MIXED and not isinstance(flat[key], dict)]
    for key, value in flat.items():
        if isinstance(value, dict):
            value = nest(value)
        parts = key.split(".")
        for whole in mixed:
            if key.startswith(whole + "."):
                depth = whole.count(".")
                parts[depth:] = [".".join(parts[depth:])]
        place = root
        for depth, part in enumerate(parts[:-1]):
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                raise OptionError("Cannot mix scalar and non-scalar keys at '%s'" % ".".join(parts[: depth + 1]))
            place = inner
        old = place.get(parts[-1])
        if isinstance(old, dict) and isinstance(value, dict):
            old.update(value)
        elif isinstance(old, dict):
            raise OptionError("Cannot mix scalar and non-scalar keys at '%s'" % key)
        else:
            place[parts[-1]] = value
    lists: dict[str, Any] = _lists(root)
    return lists


def _lists(value: Any, depth: int = 0) -> Any:
    """Replace mappings whose keys are 0..n-1 by lists, all the way down."""
    if not isinstance(value, dict):
        return value
    if depth > MAX_NESTING:
        raise OptionError("Options are nested deeper than %d" % MAX_NESTING)
    inner = {key: _lists(item, depth + 1) for key, item in value.items()}
    if inner and all(key.isdecimal() for key in inner) and set(inner) == {str(i) for i in range(len(inner))}:
        return [inner[str(i)] for i in range(len(inner))]
    return inner


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of nest: nested mappings and lists as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, (list, tuple)):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            flat.update(flatten(value, prefix + key + "."))
        else:
            flat[prefix + key] = value
    return flat
