# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The rules of blkdebug: from options and from files (https://www.qemu.org/docs/master/devel/testing/blkdebug.html)."""

from __future__ import annotations

from ...errors import Error, OptionError
from ...options import REQUIRED, Field, opt, parse_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, Sequence

INJECT_ERROR, SET_STATE, SUSPEND = "inject-error", "set-state", "suspend"
IOTYPES = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
PERMISSIONS = {"consistent-read": 1, "write": 2, "write-unchanged": 4, "resize": 8}
MAX_CONFIG = 1 << 20  # bytes of a file of rules
MAX_RULES = 1000  # of one node
MAX_WORD, MAX_VALUE = 63, 1023  # characters of a key and of a value in a file
SECTOR = 512
EIO = 5

EVENTS = frozenset(
    "l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update l2_update_compressed l2_alloc_cow_read "
    "l2_alloc_write read_aio read_backing_aio read_compressed write_aio write_compressed vmstate_load vmstate_save cow_read cow_write "
    "reftable_load reftable_grow reftable_update refblock_load refblock_update refblock_update_part refblock_alloc refblock_alloc_hookup "
    "refblock_alloc_write refblock_alloc_write_blocks refblock_alloc_write_table refblock_alloc_switch_table cluster_alloc cluster_alloc_bytes "
    "cluster_free flush_to_os flush_to_disk pwritev_rmw_head pwritev_rmw_after_head pwritev_rmw_tail pwritev_rmw_after_tail pwritev pwritev_zero "
    "pwritev_done empty_image_prepare l1_shrink_write_table l1_shrink_free_l2_clusters cor_write cluster_alloc_space none".split()
)


def _field(kind: str, key: str, help: str, default: Any = None) -> Field:
    field: Field = opt(default, help=help, choices=sorted(EVENTS) if key == "event" else IOTYPES if key == "iotype" else ())
    field.kind, field.key = kind, key
    return field


_WHERE = (_field("str", "event", "the event at which the rule begins to work", REQUIRED), _field("int", "state", "only in this state; 0: in any"))
_THEN = (
    _field("str", "iotype", "requests of this type; all but block-status otherwise"),
    _field("int", "errno", "the error, 5 otherwise"),
    _field("int", "sector", "requests that touch this sector of 512 bytes"),
    _field("bool", "once", "one request, and not all that follow"),
    _field("bool", "immediately", "fail at once; there is no difference here"),
)
KEYS = {
    INJECT_ERROR: {field.key: field for field in (*_WHERE, *_THEN)},
    SET_STATE: {field.key: field for field in (*_WHERE, _field("int", "new_state", "the state from then on"))},
}


def _plain(field: Field) -> Field:
    """The same field without its choices: QEMU has other words for wrong ones."""
    plain: Field = opt(None)
    plain.kind, plain.key = field.kind, field.key
    return plain


class Rule:
    """What happens at one event: a request of one of `iotypes` at `offset` (-1: anywhere) fails with `errno`; the state becomes
    `new_state`; or the request stops under the name `tag`. Only in `state`, if that is not 0."""

    __slots__ = ("kind", "event", "state", "iotypes", "errno", "offset", "once", "new_state", "tag")

    def __init__(
        self,
        kind: str,
        event: str,
        state: int = 0,
        iotypes: Sequence[str] = IOTYPES[:-1],
        errno: int = EIO,
        offset: int = -1,
        once: bool = False,
        new_state: int = 0,
        tag: str = "",
    ) -> None:
        self.kind = kind
        self.event = event
        self.state = state
        self.iotypes = tuple(iotypes)
        self.errno = errno
        self.offset = offset
        self.once = once
        self.new_state = new_state
        self.tag = tag

    @classmethod
    def read(cls, kind: str, values: Mapping[str, Any], unknown: str) -> Rule:
        """The rule that options say. Raises OptionError, for a key that is not known with the text `unknown`."""
        read: dict[str, Any] = {}
        for key, value in values.items():
            if key not in KEYS[kind]:
                raise OptionError(unknown % key)
            found = parse_value(_plain(KEYS[kind][key]), value, key)
            read[key] = found - (1 << 64) if isinstance(found, int) and found >= 1 << 63 else found
        if "event" not in read:
            raise OptionError("Missing event name for rule")
        iotype = read.get("iotype")
        for value, names in ((read["event"], EVENTS), (iotype, IOTYPES)):
            if value is not None and value not in names:
                raise OptionError("invalid parameter value: %s" % value)
        sector = read.get("sector", -1)
        return cls(
            kind,
            read["event"],
            read.get("state", 0),
            (iotype,) if iotype is not None else IOTYPES[:-1],
            read.get("errno", EIO),
            sector if sector < 0 else sector * SECTOR,
            read.get("once", False),
            read.get("new_state", 0),
        )


def collect(values: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Take the lists `names` out of flat options: NAME.0.KEY, NAME.1.KEY (or NAME.0, NAME.1, of plain words) and NAME.KEY for a list of one.

    Returns the other options, and the lists by name. Raises OptionError for a list with gaps.
    """
    rest: dict[str, Any] = {}
    lists: dict[str, list[Any]] = {}
    for name in names:
        found: dict[int, Any] = {}
        for key, value in values.items():
            if not key.startswith(name + "."):
                continue
            number, _dot, field = key[len(name) + 1 :].partition(".")
            if not number.isdecimal():
                number, field = "0", key[len(name) + 1 :]
            if field:
                found.setdefault(int(number), {})[field] = value
            else:
                found[int(number)] = value
        for index, item in found.items():
            if index >= len(found) or index >= MAX_RULES:
                key = "%d.%s" % (index, next(iter(item))) if isinstance(item, dict) else str(index)
                raise OptionError("Unused option '%s' for [%s]" % (key, name))
        if found:
            lists[name] = [found[index] for index in range(len(found))]
    for key, value in values.items():
        if key.rpartition(".")[0] == "" or not any(key.startswith(name + ".") for name in names):
            rest[key] = value
    return rest, lists


def read_config(path: Optional[str]) -> list[Rule]:
    """The rules in a file: groups [inject-error] and [set-state], each with lines KEY = "VALUE". Raises OptionError, Error."""
    if not path:
        return []
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG + 1)
    except OSError as exc:
        raise Error("Could not read blkdebug config file: %s" % exc.strerror, filename=path, errno=exc.errno) from exc
    if len(content) > MAX_CONFIG:
        raise Error("%s: a file of rules has at most %d bytes" % (path, MAX_CONFIG), filename=path)
    groups: list[tuple[str, dict[str, str]]] = []
    for line in content.decode(errors="surrogateescape").splitlines():
        _read_line(line, groups)
    if len(groups) > MAX_RULES:
        raise OptionError("%s: more than %d rules" % (path, MAX_RULES))
    return [Rule.read(kind, values, "Invalid parameter '%s'") for kind, values in groups]


def _read_line(line: str, groups: list[tuple[str, dict[str, str]]]) -> None:
    if not line.strip() or line[:1] == "#":
        return
    if line[:1] == "[" and "]" in line:
        name, quote, id = line[1 : line.index("]")].partition('"')
        name, id = name.strip(), id.partition('"')[0]
        if name not in KEYS:
            raise OptionError("There is no option group '%s'" % name)
        if quote and not (id[:1].isalpha() and id.isascii() and id.translate({45: None, 46: None, 95: None}).isalnum()):
            hint = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
            raise OptionError("Parameter 'id' expects an identifier", hint=hint)
        groups.append((name, {}))
        return
    if not groups:
        raise OptionError("no group defined")
    key = line.split()[0][:MAX_WORD]
    value = line.strip()[len(key) :].strip()
    inside = ""
    if value[:1] == "=" and value[1:].strip()[:1] == '"':
        inside = value[1:].strip()[1:].partition('"')[0][:MAX_VALUE]
    kind, values = groups[-1]
    if key not in KEYS[kind]:
        raise OptionError("Invalid parameter '%s'" % key)
    values[key] = inside
