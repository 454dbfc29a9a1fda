# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Descriptions of graphs: what --blockdev says, and whether it can be right, before anything is opened.

Permissions are looked at too: the rules are those of the open graph, edges.py and each driver's `child_flags`, which are asked about
nodes that hold no image. What images name by themselves (backing files) is not known here.

The language is BlockdevOptions of https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html: what a driver takes is declared by its
Options, and what every node takes here. Texts ("k=v") and JSON become the same typed, nested mappings.
"""

from __future__ import annotations

from functools import lru_cache

from . import drivers
from .edges import use
from .errors import Error, OptionError
from .graph import check_node_name, generic_flags
from .hooks import ALL, CONSISTENT_READ, RESIZE, WRITE, Edge
from .names import MAX_CHAIN
from .node import Node, OpenFlags
from .options import MAX_NESTING, REQUIRED, Field, Options, nest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence, Union

    # A key's value is what a Field says; several keys with the same word in front of a dot make a mapping of their own.
    Shape = dict[str, Union[Field, "Group"]]

MAX_NODES = 4096  # of one description, those described inside others included
MAX_INTEGER = (1 << 63) - 1
MAX_NAMED = 10  # nodes of a cycle that its message names; unknown keys that are looked at for what was meant


class Group:
    """The keys below one key: "encrypt.format", "encrypt.key-secret". `whole` is what the key itself may be instead of a mapping."""

    __slots__ = ("shape", "whole")

    def __init__(self) -> None:
        self.shape: Shape = {}
        self.whole: Optional[Field] = None


class Rows(Group):
    """The keys of the mappings in a list."""

    __slots__ = ("help",)

    def __init__(self, shape: Mapping[str, Field], field: Field) -> None:
        super().__init__()
        self.shape.update(shape)
        self.help = field.help


def declare(kind: str, help: str, choices: Sequence[str] = (), needed: bool = False) -> Field:
    """A key that no driver's Options declare."""
    field = Field(REQUIRED if needed else None, help, "", choices, "", (), False)
    field.kind, field.optional = kind, not needed
    return field


def _generic() -> Shape:
    cache = Group()
    cache.shape["direct"] = declare("bool", "go past the host's page cache")
    cache.shape["no-flush"] = declare("bool", "flushes do nothing: a crash of the host loses what was written")
    return {
        "node-name": declare("str", "by which other nodes, exports and commands refer to this node"),
        "discard": declare("str", "whether discarded space is given back", ("ignore", "unmap")),
        "cache": cache,
        "read-only": declare("bool", "never write"),
        "auto-read-only": declare("bool", "go on read-only where writing is not possible"),
        "active": declare("bool", "whether the node may be used at once"),
        "force-share": declare("bool", "read whatever others do to the file"),
        "detect-zeroes": declare("str", "whether writes of zeroes become requests to zero", ("off", "on", "unmap")),
    }


GENERIC = _generic()
_SHAPES: dict[type[Node], Shape] = {}  # that were asked for before


@lru_cache(maxsize=None)
def driver_names() -> list[str]:
    """The names of all drivers."""
    return sorted({*drivers.FORMATS, *drivers.PROTOCOLS, *drivers.FILTERS})


def shape_of(cls: type[Node]) -> Shape:
    """What a node of this driver takes besides `driver` and the generic keys."""
    if cls not in _SHAPES:
        _SHAPES[cls] = _make_shape(cls)
    return _SHAPES[cls]


def _make_shape(cls: type[Node]) -> Shape:
    shape: Shape = {}
    for key, field in cls.options_class.fields.items():
        if key == "backing":
            continue
        place = shape
        parts = key.split(".")
        for part in parts[:-1]:
            group = place.get(part)
            if not isinstance(group, Group):
                whole, group = group, Group()
                group.whole = whole
                place[part] = group
            place = group.shape
        if field.kind == "Rows":
            place[parts[-1]] = Rows(cls.options_class.rows[key], field)
            continue
        there = place.get(parts[-1])
        if isinstance(there, Group):
            there.whole = field
        else:
            place[parts[-1]] = field
    if cls.supports_backing:
        shape["backing"] = declare("Backing", "the node that holds what the image does not; null: none")
    for key in cls.numbered_references:
        shape.setdefault(key, declare("NodeRefs", "options of the files that the image names, by number"))
    return shape


def parse_blockdev(text: str) -> dict[str, Any]:
    """What a --blockdev option says: "DRIVER,k=v,k.k2=v" or a JSON object. The result is typed. Raises OptionError in QEMU's words."""
    if text.startswith("{"):
        from .json_parser import parse_json

        return read_node(parse_json(text), True)
    from .objects import read_pairs

    return read_node(nest(read_pairs(text, "driver")), False)


def read_node(spec: Any, typed: bool, path: str = "", depth: int = 0) -> dict[str, Any]:
    """The description of a node, and of all that it describes inside, with typed values: numbers and booleans are none of them
    texts. Where `typed` is false they are texts in `spec`, and are read.

    `path` stands in front of keys in messages. Raises OptionError in QEMU's words, with the nearest right key as a hint.
    """
    if depth > MAX_NESTING:
        raise OptionError("Options are nested deeper than %d" % MAX_NESTING)
    rest = dict(spec)
    result: dict[str, Any] = {}
    driver = rest.pop("driver", None)
    if driver is None:
        raise OptionError("Parameter '%sdriver' is missing" % path)
    if not isinstance(driver, str):
        raise OptionError("Invalid parameter type for '%sdriver', expected: string" % path)
    names = driver_names()
    if driver not in names:
        raise OptionError("Parameter '%sdriver' does not accept value '%s'" % (path, driver), hint=nearest(driver, names))
    result["driver"] = driver
    shape = {**GENERIC, **shape_of(drivers.lookup(driver))}
    read_shape(shape, rest, result, typed, path, depth)
    if "node-name" in result:
        check_node_name(result["node-name"])
    return result


def read_shape(shape: Shape, rest: dict[str, Any], result: dict[str, Any], typed: bool, path: str = "", depth: int = 0) -> None:
    """Move what `shape` says from `rest` to `result`. Raises OptionError for what is wrong, missing or left."""
    for key, entry in shape.items():
        name = path + key
        if isinstance(entry, Rows):
            if key in rest:
                result[key] = _read_rows(entry, rest.pop(key), typed, name, depth)
            continue
        if isinstance(entry, Group):
            if key not in rest:
                _require(entry, name)
                continue
            value = rest.pop(key)
            if isinstance(value, dict):
                inner: dict[str, Any] = {}
                read_shape(entry.shape, dict(value), inner, typed, name + ".", depth + 1)
                result[key] = inner
            elif entry.whole is not None:
                result[key] = read_value(entry.whole, value, typed, name, depth)
            else:
                raise OptionError("Invalid parameter type for '%s', expected: object" % name)
            continue
        spelling = next((word for word in (key, *entry.legacy) if word in rest), None)
        if spelling is not None:
            result[key] = read_value(entry, rest.pop(spelling), typed, path + spelling, depth)
        elif is_needed(entry):
            wrong = [word for word in list(rest)[:MAX_NAMED] if isinstance(word, str) and word not in shape and nearest(word, shape) == nearest(key, shape)]
            hint = "Did you mean '%s' where it says '%s'?" % (name, path + wrong[0]) if wrong else None
            raise OptionError("Parameter '%s' is missing" % name, hint=hint)
    if rest:
        key = min(rest, key=str)
        raise OptionError("Parameter '%s%s' is unexpected" % (path, key), hint=nearest(str(key), shape, path))


def _read_rows(rows: Rows, value: Any, typed: bool, name: str, depth: int) -> list[Any]:
    """A list of mappings, typed. Raises OptionError in QEMU's words."""
    if not isinstance(value, (list, tuple)):
        raise OptionError("Invalid parameter type for '%s', expected: array" % name)
    found: list[Any] = []
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise OptionError("Invalid parameter type for '%s[%d]', expected: object" % (name, index))
        found.append({})
        read_shape(rows.shape, dict(item), found[-1], typed, "%s[%d]." % (name, index), depth + 1)
    return found


def _require(group: Group, path: str) -> None:
    """Raise OptionError if a mapping that is absent has a key that must be given."""
    for key, entry in group.shape.items():
        if isinstance(entry, Rows):
            continue
        if isinstance(entry, Group):
            _require(entry, "%s.%s" % (path, key))
        elif is_needed(entry):
            raise OptionError("Parameter '%s.%s' is missing" % (path, key))


def is_needed(field: Field) -> bool:
    """Whether a key must be given."""
    return field.default is REQUIRED and not field.optional


def read_value(field: Field, value: Any, typed: bool, name: str, depth: int = 0) -> Any:
    """One value, typed. Raises OptionError in QEMU's words."""
    kind = field.kind
    if kind in ("NodeRef", "Backing"):
        if isinstance(value, str) or kind == "Backing" and value is None:
            return value
        if not isinstance(value, dict):
            raise OptionError("Invalid parameter type for '%s', expected: %s" % (name, "BlockdevRef" if kind == "NodeRef" else "BlockdevRefOrNull"))
        return read_node(value, typed, name + ".", depth + 1)
    if kind == "NodeRefs":
        if not isinstance(value, (list, tuple)):
            raise OptionError("Invalid parameter type for '%s', expected: array" % name)
        one = declare("NodeRef", "")
        return [read_value(one, item, typed, "%s[%d]" % (name, index), depth) for index, item in enumerate(value)]
    if kind == "ServerList":
        if not isinstance(value, (list, tuple)):
            raise OptionError("Invalid parameter type for '%s', expected: array" % name)
        return [_read_texts(item, "%s[%d]" % (name, index)) for index, item in enumerate(value)]
    if kind in ("Words", "TextList"):
        if not isinstance(value, (list, tuple)):
            raise OptionError("Invalid parameter type for '%s', expected: array" % name)
        one = declare("str", "")
        return [read_value(one, item, typed, "%s[%d]" % (name, index)) for index, item in enumerate(value)]
    if kind == "bool":
        if isinstance(value, bool):
            return value
        if typed or not isinstance(value, str):
            raise OptionError("Invalid parameter type for '%s', expected: boolean" % name)
        if value not in ("on", "yes", "true", "y", "off", "no", "false", "n"):
            raise OptionError("Parameter '%s' expects 'on' or 'off'" % name)
        return value in ("on", "yes", "true", "y")
    if kind in ("int", "Size"):
        return _read_integer(kind, value, typed, name)
    if not isinstance(value, str):
        raise OptionError("Invalid parameter type for '%s', expected: string" % name)
    if field.choices and value not in field.choices:
        raise OptionError("Parameter '%s' does not accept value '%s'" % (name, value), hint=nearest(value, field.choices))
    return value


def _read_texts(value: Any, name: str) -> dict[str, str]:
    """A mapping of texts: the address of a server, one of several."""
    if not isinstance(value, dict):
        raise OptionError("Invalid parameter type for '%s', expected: object" % name)
    return {key: read_value(declare("str", ""), item, True, "%s.%s" % (name, key)) for key, item in value.items()}


def _read_integer(kind: str, value: Any, typed: bool, name: str) -> int:
    if not typed and isinstance(value, str):
        from .units import parse_number, parse_size

        try:
            value = parse_size(value, MAX_INTEGER) if kind == "Size" else parse_number(value, MAX_INTEGER, 0)
        except OptionError:
            raise OptionError("Parameter '%s' expects integer" % name) from None
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError("Invalid parameter type for '%s', expected: integer" % name)
    if not 0 <= value <= MAX_INTEGER:
        raise OptionError("Value '%d' is out of range for parameter '%s'" % (value, name))
    return int(value)


def nearest(word: str, known: Iterable[str], path: str = "") -> Optional[str]:
    """A hint that names what `word` may have been meant to be, with `path` in front; None where nothing is near."""
    from difflib import get_close_matches

    found = get_close_matches(word[:64], list(known), 1)
    return "Did you mean '%s%s'?" % (path, found[0]) if found else None


def children_of(spec: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(role, description or node-name) of the children that a typed description gives a node."""
    cls = drivers.lookup(spec["driver"])
    for key, entry in shape_of(cls).items():
        value = spec.get(key)
        if isinstance(entry, Group) or value is None or value == "" and key == "backing":
            continue
        if entry.kind in ("NodeRef", "Backing"):
            yield key, value
        elif entry.kind == "NodeRefs" and key not in cls.numbered_references:
            for index, item in enumerate(value):
                yield "%s.%d" % (key, index), item


def check_blockdevs(
    specs: Sequence[Mapping[str, Any]],
    objects: Mapping[str, Any],
    exports: Sequence[Mapping[str, Any]] = (),
    known: Iterable[str] = (),
    ordered: bool = True,
) -> None:
    """Look at typed descriptions as a whole: names, references among them and to objects, and who may write what.

    `exports` tell of users besides: their node-name and whether they are writable. `known` are names of nodes that are there
    already. With `ordered` a node is to be described before it is referred to, as QEMU wants it. Raises OptionError or Error in
    QEMU's words for the first mistake, with a hint.
    """
    for spec in specs:
        check_root(spec)
    every = list(all_nodes(specs))
    names = _check_names(every, known)
    check_cycles(specs)
    seen = set(known)
    for spec in specs:
        inner = list(all_nodes([spec]))
        seen.update(item["node-name"] for item in inner[1:] if "node-name" in item)
        for item in inner:
            for _role, child in children_of(item):
                if isinstance(child, str) and child not in (seen if ordered else names):
                    hint = "It is described later; what a node refers to comes first." if child in names else nearest(child, names)
                    raise OptionError("Cannot find device='%s' nor node-name='%s'" % (child, child), hint=hint)
        seen.add(spec["node-name"])
    for item in every:
        check_objects(item, objects)
    check_permissions(in_order(specs), exports)


def check_root(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """The description of a node that no other one describes; raises OptionError if it has no name."""
    if spec.get("node-name") is None:
        raise OptionError("'node-name' must be specified for the root node")
    return spec


def all_nodes(specs: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """All nodes of typed descriptions, those described inside others behind them. Raises OptionError if there are too many."""
    todo = list(specs)
    count = 0
    while todo:
        spec = todo.pop(0)
        count += 1
        if count > MAX_NODES:
            raise OptionError("There are more than %d nodes" % MAX_NODES)
        yield spec
        todo[:0] = [child for _role, child in children_of(spec) if isinstance(child, dict)]


def _check_names(nodes: Iterable[Mapping[str, Any]], known: Iterable[str]) -> set[str]:
    names = set(known)
    for spec in nodes:
        name = spec.get("node-name")
        if name is not None:
            if name in names:
                raise OptionError("Duplicate nodes with node-name='%s'" % name)
            names.add(name)
    return names


def references_of(spec: Mapping[str, Any]) -> list[str]:
    """The node-names that a typed description, or one inside it, refers to."""
    return [child for item in all_nodes([spec]) for _role, child in children_of(item) if isinstance(child, str)]


def _homes(specs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """In which of the descriptions each node-name is given."""
    return {item["node-name"]: index for index, spec in enumerate(specs) for item in all_nodes([spec]) if "node-name" in item}


def check_cycles(specs: Sequence[Mapping[str, Any]]) -> None:
    """Raise OptionError if a node is, in the end, a child of its own."""
    homes = _homes(specs)
    edges = [[homes[name] for name in references_of(spec) if name in homes] for spec in specs]
    done: set[int] = set()
    for start in range(len(specs)):
        path: list[int] = []
        todo = [(start, iter([start]))]
        while todo:
            _node, rest = todo[-1]
            index = next(rest, None)
            if index is None:
                todo.pop()
                if path:
                    done.add(path.pop())
            elif index in path:
                names = [str(specs[item].get("node-name")) for item in [*path[path.index(index) :], index]]
                if len(names) > MAX_NAMED:
                    names[MAX_NAMED - 2 : -1] = ["..."]
                raise OptionError("The nodes are in a cycle: %s" % " -> ".join(names))
            elif index not in done:
                if len(path) >= MAX_CHAIN:
                    raise OptionError("The graph is deeper than %d nodes" % MAX_CHAIN)
                path.append(index)
                todo.append((index, iter(edges[index])))


def in_order(specs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The descriptions, each behind those that it refers to, and otherwise as they come. There must be no cycle."""
    homes = _homes(specs)
    needs = [[homes[name] for name in references_of(spec) if name in homes] for spec in specs]
    result: list[Mapping[str, Any]] = []
    done: set[int] = set()
    for start in range(len(specs)):
        todo = [start]
        while todo:
            index = todo[-1]
            missing = [need for need in needs[index] if need not in done and need != index]
            if missing:
                todo += reversed(missing)
                continue
            todo.pop()
            if index not in done:
                done.add(index)
                result.append(specs[index])
    return result


def check_objects(spec: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
    """Raise OptionError if a description refers to an object that is not there, or not of the right type."""
    for key, field in drivers.lookup(spec["driver"]).options_class.fields.items():
        if field.kind not in ("ObjectRef", "SecretRef"):
            continue
        value: Any = spec
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            continue
        found = objects.get(value)
        secret = field.kind == "SecretRef"
        if found is None or secret and found.type not in ("secret", "secret_keyring") or key == "throttle-group" and found.type != key:
            text = "No secret with id '%s'" if secret else "Throttle group '%s' does not exist" if key == "throttle-group" else "No object with id '%s'"
            raise OptionError(text % value, hint=nearest(value, objects))


class PlannedNode(Node):
    """A node of a description, which gives its children the permissions that a node of the class `kind` would give them."""

    def __init__(self, name: str, kind: type[Node], flags: OpenFlags) -> None:
        super().__init__(Options(), flags)
        self.name = name
        self.kind = kind

    def change_child(self, role: str, flags: OpenFlags) -> None:
        super().change_child(role, self.kind.child_flags(role.partition(".")[0], flags))


def check_permissions(specs: Sequence[Mapping[str, Any]], exports: Sequence[Mapping[str, Any]] = ()) -> None:
    """Raise Error in QEMU's words where two users of a node exclude one another. The typed descriptions come in the order in which
    they can be opened; nodes that none of them describes are left out."""
    named: dict[str, PlannedNode] = {}
    for spec in specs:
        _plan(spec, OpenFlags(writable=True, perm=0), named).kept = True
    for export in exports:
        node = named.get(str(export.get("node-name")))
        if node is None:
            name = export.get("node-name")
            raise OptionError("Cannot find device='%s' nor node-name='%s'" % (name, name))
        writable = bool(export.get("writable", False))
        if writable and node.read_only:
            raise Error("Cannot export read-only node as writable")
        use("export '%s'" % export.get("id"), "root", node, CONSISTENT_READ | (WRITE if writable else 0), ALL & ~RESIZE)


def _plan(spec: Mapping[str, Any], flags: OpenFlags, named: dict[str, PlannedNode]) -> PlannedNode:
    flags = generic_flags(dict(spec), flags)
    kind = drivers.lookup(spec["driver"])
    node = PlannedNode(spec.get("node-name", ""), kind, flags)
    for role, child in children_of(spec):
        wanted = kind.child_flags(role.partition(".")[0], flags)
        if isinstance(child, str):
            if child in named:
                use(node, role, named[child], *wanted.permissions())
                node.children[role] = named[child]
            continue
        inner = _plan(child, wanted, named)
        inner.parents.append(Edge(node, role, inner, *inner.flags.permissions()))
        node.children[role] = inner
    if node.name:
        named[node.name] = node
    return node
