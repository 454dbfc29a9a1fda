# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Graph files: objects, nodes, exports and where they are served, in YAML or JSON (https://yaml.org/spec/1.2.2/).

    objects:   [{qom-type: throttle-group, id: slow, limits: {bps-total: 10485760}}]      as object-add takes them
    blockdevs: [{driver: qcow2, node-name: disk, file: {driver: file, filename: d.q}}]     as blockdev-add
    exports:   [{type: nbd, id: e, node-name: disk, name: disk, writable: true}]           as block-export-add
    nbd-server: {addr: {type: unix, path: /run/d.sock}}                                    as nbd-server-start, the address in one piece

The order does not matter. JSON needs nothing; YAML needs the package ruamel.yaml, which keeps comments when a file is written again.
"""

from __future__ import annotations

from .description import MAX_NODES, Group, check_blockdevs, check_root, declare, in_order, nearest, read_node, read_shape
from .errors import OptionError, Unsupported
from .objects import UserObject, make_object, throttle_limits
from .options import MAX_NESTING, flatten, nest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterable, Mapping, Optional

    from .description import Shape

MAX_FILE = 1 << 20  # bytes of a graph file
MAX_YAML = 1 << 17  # bytes of one in YAML, which takes long to read

SECTIONS = ("objects", "blockdevs", "nbd-server", "exports")

EXPORT: Shape = {
    "type": declare("str", "how it is exported", ("nbd",), needed=True),
    "id": declare("str", "the export's own name", needed=True),
    "node-name": declare("str", "the node that is exported", needed=True),
    "name": declare("str", "the name that clients ask for (default: the node's)"),
    "description": declare("str", "a text that clients can show"),
    "writable": declare("bool", "whether clients may write"),
    "writethrough": declare("bool", "what is written is on stable storage before the client hears of it"),
    "bitmaps": declare("Words", "names of dirty bitmaps that clients may read"),
    "allocation-depth": declare("bool", "whether clients may see which layer holds what"),
}


def _server() -> Shape:
    address = Group()
    address.shape.update(
        {
            "type": declare("str", "what kind of address it is", ("inet", "unix", "vsock", "fd"), needed=True),
            "host": declare("str", "inet: name or number of the interface"),
            "port": declare("str", "inet, vsock: the port"),
            "path": declare("str", "unix: the path of the socket"),
            "cid": declare("str", "vsock: the context id"),
            "str": declare("str", "fd: number of a descriptor that is open"),
        }
    )
    return {
        "addr": address,
        "tls-creds": declare("str", "id of the TLS credentials, of which the endpoint is the server"),
        "tls-authz": declare("str", "id of the object that says who may come in"),
        "max-connections": declare("int", "clients at a time; 0: any number (default: 100)"),
        "handshake-max-seconds": declare("int", "seconds that a client may take to agree (default: 10)"),
    }


SERVER = _server()


class GraphDescription:
    """What a graph file, or a command line, describes; typed. `blockdevs` come as they were written."""

    __slots__ = ("blockdevs", "exports", "nbd_server", "objects")

    def __init__(
        self,
        objects: Optional[Mapping[str, UserObject]] = None,
        blockdevs: Iterable[Mapping[str, Any]] = (),
        exports: Iterable[Mapping[str, Any]] = (),
        nbd_server: Optional[Mapping[str, Any]] = None,
    ) -> None:
        self.objects = dict(objects or {})
        self.blockdevs = list(blockdevs)
        self.exports = list(exports)
        self.nbd_server = nbd_server

    def check(self, ordered: bool = False) -> None:
        """Look at all of it together; see description.check_blockdevs. Raises OptionError, Error."""
        check_blockdevs(self.blockdevs, self.objects, self.exports, (), ordered)
        for key in ("id", "name"):
            seen = set()
            for export in self.exports:
                name = export.get(key) or export["node-name"]
                if name in seen:
                    raise OptionError("There are two exports with the %s '%s'" % (key, name))
                seen.add(name)
        for key in ("tls-creds", "tls-authz"):
            name = (self.nbd_server or {}).get(key)
            if name is not None and name not in self.objects:
                raise OptionError("No object with id '%s'" % name)

    def in_order(self) -> list[Mapping[str, Any]]:
        """The nodes, each behind those that it refers to."""
        return in_order(self.blockdevs)

    def as_mapping(self) -> dict[str, Any]:
        """The same as a file has it; what is empty is left out."""
        whole: dict[str, Any] = {
            "objects": [object_mapping(found) for found in self.objects.values()],
            "blockdevs": [dict(spec) for spec in self.in_order()],
            "nbd-server": dict(self.nbd_server) if self.nbd_server else None,
            "exports": [dict(export) for export in self.exports],
        }
        return {key: value for key, value in whole.items() if value}


def object_mapping(found: UserObject) -> dict[str, Any]:
    """An object as object-add takes it; old spellings of limits become the new ones."""
    properties = found.properties
    if found.type == "throttle-group":
        limits = throttle_limits(properties)
        properties = {"limits": limits} if limits else {}
    return {"qom-type": found.type, "id": found.id, **properties}


def load(path: str, lenient: bool = False) -> GraphDescription:
    """Read a graph file and look at each part of it (see `check` for all of it). Raises OptionError, Unsupported, Error; OSError.

    With `lenient` texts are taken for numbers and booleans, dotted keys for nested ones and old spellings for new ones.
    """
    return parse(load_raw(path), path, lenient)


def load_raw(path: str, comments: bool = False) -> Any:
    """What the file says, unexamined; with `comments` as ruamel.yaml's own types, if it is YAML."""
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise OptionError("%s: a graph file is at most %d bytes long" % (path, MAX_FILE), filename=path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise OptionError("%s: not a text in UTF-8" % path, filename=path) from None
    if is_yaml(path, text):
        return load_yaml(text, path, comments)
    from .json_parser import parse_json

    try:
        return parse_json(text)
    except OptionError as error:
        raise OptionError("%s: %s" % (path, error), filename=path) from None


def is_yaml(path: str, text: str = "") -> bool:
    """Whether a file is YAML, by its name or else by its first character."""
    if path.endswith((".yaml", ".yml")):
        return True
    return not path.endswith(".json") and not text.lstrip().startswith("{")


def yaml_module() -> Any:
    """ruamel.yaml. Raises Unsupported where it is not installed."""
    try:
        import ruamel.yaml
    except ImportError:
        raise Unsupported("YAML needs the Python package 'ruamel.yaml', which is not installed; JSON needs nothing") from None
    return ruamel.yaml


def load_yaml(text: str, path: str, comments: bool = False) -> Any:
    """The content of a YAML text. Raises OptionError for what is no YAML, too long, or nested too deeply."""
    yaml = yaml_module()
    if len(text) > MAX_YAML:
        raise OptionError("%s: a graph file in YAML is at most %d bytes long; JSON may have %d" % (path, MAX_YAML, MAX_FILE), filename=path)
    _check_depth(text, path)
    reader = yaml.YAML() if comments else yaml.YAML(typ="safe", pure=True)
    reader.max_depth = MAX_NESTING
    try:
        return reader.load(text)
    except yaml.error.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "%s:%d:%d" % (path, mark.line + 1, mark.column + 1) if mark is not None else path
        reason = str(error.problem or error).partition("\n")[0]
        raise OptionError("%s: %s" % (place, reason), filename=path) from None
    except (yaml.error.YAMLError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition("\n")[0]
        raise OptionError("%s: %s" % (path, reason), filename=path) from None


def _check_depth(text: str, path: str) -> None:
    """Refuse what would keep the YAML reader busy: nested brackets, and sequences within sequences on one line."""
    depth = 0
    for character in text:
        if character in "[{":
            depth += 1
            if depth > MAX_NESTING:
                raise OptionError("%s: nested too deeply" % path, filename=path)
        elif character in "]}":
            depth = max(0, depth - 1)
    if any(line.count("- ") > MAX_NESTING or len(line) - len(line.lstrip(" ")) > 8 * MAX_NESTING for line in text.split("\n")):
        raise OptionError("%s: nested too deeply" % path, filename=path)


def parse(raw: Any, path: str, lenient: bool = False) -> GraphDescription:
    """The description that the content of a file is. Raises OptionError, which says where."""
    if not isinstance(raw, dict):
        raise OptionError("%s: a graph file is a mapping with the keys %s" % (path, ", ".join(SECTIONS)), filename=path)
    for key in raw:
        if key not in SECTIONS:
            raise OptionError("%s: Parameter '%s' is unexpected" % (path, key), filename=path, hint=nearest(str(key), SECTIONS))
    _check_size(raw, path)
    result = GraphDescription()
    for found in _each(raw, "objects", path, lambda value: make_object(nest(value) if lenient else value, not lenient)):
        if found.id in result.objects:
            raise OptionError("%s: attempt to add duplicate property '%s' to object (type 'container')" % (path, found.id), filename=path)
        result.objects[found.id] = found
    result.blockdevs = _each(raw, "blockdevs", path, lambda value: check_root(read_node(nest(value) if lenient else value, not lenient)))
    result.exports = _each(raw, "exports", path, lambda value: _read(EXPORT, value, lenient))
    if raw.get("nbd-server") is not None:
        server = _each({"nbd-server": [raw["nbd-server"]]}, "nbd-server", path, lambda value: _read(SERVER, value, lenient))
        result.nbd_server = server[0]
    return result


def _read(shape: Shape, value: Mapping[str, Any], lenient: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    read_shape(shape, nest(value) if lenient else dict(value), result, not lenient)
    return result


def _each(raw: Mapping[str, Any], key: str, path: str, read: Callable[[Any], Any]) -> list[Any]:
    """The items of a section, read; errors say which one is wrong."""
    items = raw.get(key)
    if items is None:
        return []
    if not isinstance(items, list):
        raise OptionError("%s: Invalid parameter type for '%s', expected: array" % (path, key), filename=path)
    result = []
    for index, item in enumerate(items):
        place = "%s: %s[%d]" % (path, key, index) if len(items) > 1 or key != "nbd-server" else "%s: %s" % (path, key)
        if not isinstance(item, dict):
            raise OptionError("%s: expected a mapping" % place, filename=path)
        try:
            result.append(read(item))
        except OptionError as error:
            hint = error.hint
            if "expected: boolean" in str(error) and hint is None:
                hint = "In YAML and JSON that is true or false."
            raise OptionError("%s: %s" % (place, error), filename=path, hint=hint) from None
    return result


def _check_size(raw: Any, path: str) -> None:
    """Refuse a file that is small and means much (aliases in YAML), or is nested deeply, before it is walked through."""
    todo = [(raw, 0)]
    count = 0
    while todo:
        value, depth = todo.pop()
        count += 1
        if count > 32 * MAX_NODES:
            raise OptionError("%s: too many values" % path, filename=path)
        if depth > MAX_NESTING + 2:
            raise OptionError("%s: nested too deeply" % path, filename=path)
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise OptionError("%s: a key is not a text" % path, filename=path)
            todo += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            todo += [(item, depth + 1) for item in value]


# -- writing ------------------------------------------------------------------------------------------------------------


def to_yaml(value: Any) -> str:
    """`value` as YAML. Raises Unsupported without ruamel.yaml."""
    import io

    writer = yaml_module().YAML()
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.width = 120
    buffer = io.StringIO()
    writer.dump(value, buffer)
    return buffer.getvalue()


def to_json(value: Any) -> str:
    """`value` as JSON, a key a line, in the order in which it is written."""
    import json

    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def to_arguments(description: GraphDescription) -> list[str]:
    """The arguments of qemu-storage-daemon (and, but for exports, of QEMU) that make the same graph."""
    arguments: list[str] = []
    for found in description.objects.values():
        arguments += ["--object", _keys(object_mapping(found), "qom-type")]
    for spec in description.in_order():
        arguments += ["--blockdev", _keys(spec, "driver")]
    if description.nbd_server:
        arguments += ["--nbd-server", _keys(description.nbd_server)]
    for export in description.exports:
        arguments += ["--export", _keys(export, "type")]
    return arguments


def _keys(value: Mapping[str, Any], implied: str = "") -> str:
    """A mapping as "k=v,k.k2=v", or as JSON where keys cannot say it: null, and lists or mappings that are empty."""
    flat = flatten(value)
    if any(item is None for item in flat.values()) or nest(flat) != _plain(value):
        import json

        return json.dumps(value, ensure_ascii=False)
    words = []
    for key, item in flat.items():
        text = ("on" if item else "off") if isinstance(item, bool) else str(item).replace(",", ",,")
        words.append(text if key == implied and "=" not in text else "%s=%s" % (key, text))
    return ",".join(words)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def rewrite(path: str) -> str:
    """The text of a graph file in its normal form: numbers and booleans instead of texts, nested instead of dotted keys, today's
    spellings instead of old ones. The order stays, and so do the comments of YAML. Raises what `load` and `check` raise."""
    raw = load_raw(path, comments=True)
    plain = _plain(raw)
    description = parse(plain, path, lenient=True)
    description.check()
    normal: dict[str, Any] = {
        "objects": [object_mapping(found) for found in description.objects.values()],
        "blockdevs": description.blockdevs,
        "exports": description.exports,
        "nbd-server": description.nbd_server,
    }
    for key in list(raw):
        if raw[key] is not None:
            raw[key] = _settle(raw[key], normal[key])
    return to_yaml(raw) if hasattr(raw, "ca") else to_json(raw)


def _settle(old: Any, new: Any) -> Any:
    """`old`, with its comments, changed into `new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        gone, added = [key for key in old if key not in new], [key for key in new if key not in old]
        for index, key in enumerate(gone):
            remarks = old.ca.items if hasattr(old, "ca") else {}
            remark = remarks.pop(key, None)
            if remark is not None and added:
                remarks[added[min(index, len(added) - 1)]] = remark
            del old[key]
        for key, value in new.items():
            if key in old:
                old[key] = _settle(old[key], value)
            else:
                old[key] = value
        return old
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, value in enumerate(new):
            old[index] = _settle(old[index], value)
        return old
    return old if type(old) is type(new) and old == new or isinstance(old, str) and old == new else new
