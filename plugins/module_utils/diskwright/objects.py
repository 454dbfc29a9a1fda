# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The objects that images refer to by id: secrets, throttle groups, TLS credentials (--object).

The types and their properties are those of https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html (ObjectType).
A definition is checked as far as its text goes; files that it names are read by whoever uses the object, or by `complete`.
"""

from __future__ import annotations

from .errors import OptionError
from .json_parser import parse_json
from .options import nest
from .parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

_BURST = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")
_LIMITS = {name + suffix: "int" for name in _BURST for suffix in ("", "-max", "-max-length")}
_LIMITS["iops-size"] = "int"

_CREDENTIALS = {"dir": "string", "endpoint": "client server", "priority": "string", "verify-peer": "bool"}

# type -> {property: its kind, or the values it may have}; "!" marks what must be given
TYPES: dict[str, dict[str, str]] = {
    "authz-list": {"policy": "deny allow", "rules": "list"},
    "authz-list-file": {"filename": "!string", "refresh": "bool"},
    "authz-simple": {"identity": "!string"},
    "main-loop": {"aio-max-batch": "int", "thread-pool-max": "int", "thread-pool-min": "int"},
    "pr-manager-helper": {"path": "!string"},
    "secret": {"data": "string", "file": "string", "format": "raw base64", "iv": "string", "keyid": "string"},
    "secret_keyring": {"format": "raw base64", "iv": "string", "keyid": "string", "serial": "!int"},
    "thread-context": {"cpu-affinity": "list", "node-affinity": "list"},
    "throttle-group": {"limits": "limits", **{"x-" + name: "int" for name in _LIMITS}},
    "tls-creds-anon": _CREDENTIALS,
    "tls-creds-psk": {**_CREDENTIALS, "username": "string"},
    "tls-creds-x509": {**_CREDENTIALS, "passwordid": "string", "sanity-check": "bool"},
}

_HELP_NAMES = {
    "limits": "ThrottleLimits",
    "client server": "QCryptoTLSCredsEndpoint",
    "raw base64": "QCryptoSecretFormat",
}
_LIST_NAMES = {"rules": "QAuthZListRule", "cpu-affinity": "int", "node-affinity": "int"}
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

MAX_RATE = 10**15  # bytes or requests a second


class UserObject:
    """One object definition: its type, its id and the properties given, as Python values (`limits` as a dict of ints).

    `content` is what a secret turned out to be, once it was read; `group` what the nodes of a throttle group share.
    """

    __slots__ = ("type", "id", "properties", "content", "group")

    def __init__(self, type: str, id: str, properties: dict[str, Any]) -> None:
        self.type = type
        self.id = id
        self.properties = properties
        self.content: Optional[bytes] = None
        self.group: Any = None

    def __repr__(self) -> str:
        return "UserObject(%r, %r)" % (self.type, self.id)  # not the properties: they may be a password


def parse_object(text: str) -> UserObject:
    """The object that `text` defines: "type,id=ID,k=v" or a JSON object. Raises OptionError in QEMU's words."""
    if text.startswith("{"):
        return make_object(parse_json(text))
    return make_object(nest(read_pairs(text, "qom-type")), False)


def make_object(values: Mapping[str, Any], typed: bool = True) -> UserObject:
    """The object that `values` define, which are all texts where they are not `typed`. Raises OptionError in QEMU's words."""
    values = dict(values)
    kind = _take(values, "qom-type", "!string", typed, "")
    if kind not in TYPES or kind == "authz-list-file":  # of the latter qemu-img has no more than the help
        raise OptionError("Parameter 'qom-type' does not accept value '%s'" % kind)
    name = _take(values, "id", "!string", typed, "")
    properties = {}
    for key, what in TYPES[kind].items():
        value = _take(values, key, what, typed, "")
        if value is not None:
            properties[key] = value
    if values:
        raise OptionError("Parameter '%s' is unexpected" % next(iter(values)))
    if name[:1] not in _LETTERS or not name or name.strip(_LETTERS + "0123456789-._"):
        raise OptionError(
            "Parameter 'id' expects an identifier",
            hint="Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
        )
    if kind == "secret":
        if "data" in properties and "file" in properties:
            raise OptionError("'file' and 'data' are mutually exclusive")
        if "data" not in properties and "file" not in properties:
            raise OptionError("Either 'file' or 'data' must be provided")
    elif kind == "throttle-group":
        check_limits(throttle_limits(properties))
    elif kind == "main-loop":
        if not 0 <= properties.get("aio-max-batch", 0):
            raise OptionError("aio-max-batch value must be in range [0, %d]" % ((1 << 63) - 1))
        if properties.get("thread-pool-min", 0) > properties.get("thread-pool-max", 64):
            raise OptionError("bad thread-pool-min/thread-pool-max values")
    return UserObject(kind, name, properties)


def add_object(objects: dict[str, UserObject], text: str) -> None:
    """Read one definition into `objects`. Raises OptionError, also for an id that is there already."""
    new = parse_object(text)
    if new.id in objects:
        raise OptionError("attempt to add duplicate property '%s' to object (type 'container')" % new.id)
    objects[new.id] = new


def complete(objects: Mapping[str, UserObject], name: str) -> None:
    """Do for the object `name` at once what would else be done when it is used, as qemu-img does: read a secret, load
    TLS credentials. Raises OptionError, Error."""
    found = objects[name]
    properties = found.properties
    if found.type in ("secret", "secret_keyring"):
        from .crypto.secrets import secret_bytes

        found.content = secret_bytes(objects, name)
    elif found.type.startswith("tls-creds-"):
        part(__package__, "crypto.tls", "object type '%s'" % found.type).Credentials(objects, name, properties.get("endpoint", "client"))


def limits_shape() -> list[str]:
    """The names of all limits of a throttle group."""
    return list(_LIMITS)


def throttle_limits(properties: Mapping[str, Any]) -> dict[str, int]:
    """The limits of a throttle group, by their stable names: `limits` with the old x- spellings laid under it."""
    limits = {key[2:]: value for key, value in properties.items() if key.startswith("x-")}
    limits.update(properties.get("limits", {}))
    return limits


def check_limits(limits: Mapping[str, int]) -> None:
    """Raise OptionError for limits that contradict each other or are out of range."""
    for unit in ("bps", "iops"):
        for suffix in ("", "-max"):
            parts = any(limits.get("%s-%s%s" % (unit, way, suffix)) for way in ("read", "write"))
            if parts and limits.get("%s-total%s" % (unit, suffix)):
                raise OptionError("bps/iops/max total values and read/write values cannot be used at the same time")
    for name in _BURST:
        average, burst = limits.get(name, 0), limits.get(name + "-max", 0)
        if not (0 <= average <= MAX_RATE and 0 <= burst <= MAX_RATE):
            raise OptionError("bps/iops/max values must be within [0, %d]" % MAX_RATE)
        length = limits.get(name + "-max-length", 1)
        if length < 1:
            raise OptionError("the burst length cannot be 0")
        if length > 1 and not burst:
            raise OptionError("burst length set without burst rate")
        if burst and not average:
            raise OptionError("bps_max/iops_max require corresponding bps/iops values")
        if burst and burst < average:
            raise OptionError("bps_max/iops_max cannot be lower than bps/iops")


def help_text(text: str) -> str:
    """What --object prints if `text` asks for help ("help", "TYPE,help"); empty if it does not."""
    items = text.split(",")
    if text.startswith("{") or not any(item in ("help", "?") for item in items):
        return ""
    kind = items[0][len("qom-type=") :] if items[0].startswith("qom-type=") else items[0]
    if kind not in TYPES:
        return "List of user creatable objects:\n" + "".join("  %s\n" % name for name in sorted(TYPES))
    lines = ["%s options:\n" % kind]
    for key, what in sorted(TYPES[kind].items(), key=lambda item: item[0] + "="):
        what = what.lstrip("!")
        shown = _LIST_NAMES.get(key) or _HELP_NAMES.get(what, what)
        if key == "policy":
            shown = "QAuthZListPolicy"
        elif key == "serial":
            shown = "int32_t"
        lines.append("  %s=<%s>\n" % (key, shown))
    return "".join(lines)


def read_pairs(text: str, implied_key: str) -> dict[str, str]:
    """The pairs of "type,k=v": unlike elsewhere, only the first may be without "=", and is the value of `implied_key` then. `,,` is a
    comma in a value. Raises OptionError."""
    pairs: dict[str, str] = {}
    rest = text
    while rest:
        item = rest
        position = rest.find(",")
        while position >= 0 and rest[position + 1 : position + 2] == ",":
            position = rest.find(",", position + 2)
        if position >= 0:
            item, rest = rest[:position], rest[position + 1 :]
        else:
            rest = ""
        key, equals, value = item.partition("=")
        if not equals and not pairs and item:
            key, value = implied_key, item
        elif not key or not equals and not item:
            raise OptionError("Invalid parameter ''")
        elif not equals:
            raise OptionError("Expected '=' after parameter '%s'" % key)
        pairs[key] = value.replace(",,", ",")
    return pairs


def _take(values: dict[str, Any], key: str, kind: str, typed: bool, prefix: str) -> Any:
    """Remove `key` from `values` and return its value as the `kind` of TYPES; None if it is absent and may be."""
    needed, kind = kind.startswith("!"), kind.lstrip("!")
    name = prefix + key
    if key not in values:
        if needed:
            raise OptionError("Parameter '%s' is missing" % name)
        return None
    value = values.pop(key)
    if kind == "limits":
        if not isinstance(value, dict):
            raise OptionError("Invalid parameter type for '%s', expected: object" % name)
        value = dict(value)
        limits = {limit: _take(value, limit, what, typed, name + ".") for limit, what in _LIMITS.items()}
        if value:
            raise OptionError("Parameter '%s.%s' is unexpected" % (name, next(iter(value))))
        return {limit: number for limit, number in limits.items() if number is not None}
    if kind == "list":
        if not isinstance(value, list):
            raise OptionError("Invalid parameter type for '%s', expected: array" % name)
        return value
    if kind == "int":
        return _integer(value, name, typed)
    if kind == "bool":
        return _boolean(value, name, typed)
    if not isinstance(value, str):
        raise OptionError("Invalid parameter type for '%s', expected: string" % name)
    if kind != "string" and value not in kind.split():
        raise OptionError("Parameter '%s' does not accept value '%s'" % (name, value))
    return value


def _integer(value: Any, name: str, typed: bool) -> int:
    if typed or not isinstance(value, str):
        if isinstance(value, bool) or not isinstance(value, int):
            raise OptionError("Invalid parameter type for '%s', expected: integer" % name)
        return value
    from .units import parse_number

    try:
        return parse_number(value, (1 << 63) - 1, -(1 << 63))
    except OptionError:
        raise OptionError("Parameter '%s' expects integer" % name) from None


def _boolean(value: Any, name: str, typed: bool) -> bool:
    if typed:
        if not isinstance(value, bool):
            raise OptionError("Invalid parameter type for '%s', expected: boolean" % name)
        return value
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise OptionError("Parameter '%s' expects 'on' or 'off'" % name)
