# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Descriptions from the older -drive syntax (https://www.qemu.org/docs/master/system/invocation.html, "Block device options").

One -drive is a host's node and a guest's device in one. Its node becomes one or several --blockdev descriptions: the image, and
filters above it for copy-on-read and throttling. What belongs to the device is reported: it goes into QEMU's -device.
"""

from __future__ import annotations

from .description import nearest, read_node
from .errors import OptionError
from .names import parse_filename, with_driver
from .objects import UserObject, make_object
from .options import nest, split_pairs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# key -> what it is called at the device (QEMU's -device); None: the machine decides, and the device's place says it
DEVICE = {
    "if": None,
    "bus": None,
    "unit": None,
    "index": None,
    "addr": None,
    "media": None,
    "werror": "werror",
    "rerror": "rerror",
    "serial": "serial",
    "share-rw": "share-rw",
    "write-cache": "write-cache",
}

# cache=MODE -> (cache.direct, cache.no-flush, the device's write-cache)
CACHE = {
    "none": (True, False, "on"),
    "off": (True, False, "on"),
    "writeback": (False, False, "on"),
    "unsafe": (False, True, "on"),
    "writethrough": (False, False, "off"),
    "directsync": (True, False, "off"),
}

_WAYS = {"": "total", "_rd": "read", "_wr": "write"}
# bps_rd_max and throttling.bps-read-max mean limits.bps-read-max
_OLD_LIMITS = {
    unit + way + burst: "%s-%s%s" % (unit, name, burst.replace("_", "-"))
    for unit in ("bps", "iops")
    for way, name in _WAYS.items()
    for burst in ("", "_max", "_max_length")
}
_OLD_LIMITS["iops_size"] = "iops-size"

_OWN = ("file", "format", "driver", "id", "cache", "snapshot", "readonly", "read-only", "aio", "copy-on-read", "discard", "detect-zeroes", "group")


class Drive:
    """What one -drive means. `blockdevs` are typed descriptions, the last one is what the guest sees; `objects` its throttle group;
    `device` the properties that belong to the device; `snapshot` that writes are to go to a temporary overlay of it."""

    __slots__ = ("blockdevs", "device", "notes", "objects", "snapshot")

    def __init__(self) -> None:
        self.blockdevs: list[dict[str, Any]] = []
        self.objects: dict[str, UserObject] = {}
        self.device: dict[str, str] = {}
        self.snapshot = False
        self.notes: list[str] = []  # what a person should know

    @property
    def top(self) -> str:
        """The node-name of what the guest sees."""
        return str(self.blockdevs[-1]["node-name"])


def parse_drive(text: str, number: int = 0) -> Drive:
    """What "file=disk.qcow2,format=qcow2,cache=none,..." means; `number` makes a name where no id gives one.

    Raises OptionError in QEMU's words for what it does not take, with the nearest right key as a hint.
    """
    values = dict(split_pairs(text))
    drive = Drive()
    name = values.pop("id", None) or "drive%d" % number
    node: dict[str, Any] = {}
    limits, group = _take_limits(values, name)
    for key in [key for key in values if key in DEVICE]:
        _to_device(drive, key, values.pop(key))
    _take_cache(drive, node, values)
    drive.snapshot = _flag(values, "snapshot")
    if drive.snapshot:
        drive.notes.append("snapshot=on: writes go to a temporary overlay that no description holds; serve and io have the option --snapshot for it")
    aio = values.pop("aio", None)
    copy_on_read = _flag(values, "copy-on-read")
    read_only = _flag(values, "readonly") or _flag(values, "read-only")
    if read_only:
        node["read-only"] = "on"
    if "discard" in values:
        word = values.pop("discard")
        if word not in ("ignore", "off", "unmap", "on"):
            raise OptionError("Invalid discard option")
        node["discard"] = "unmap" if word in ("unmap", "on") else "ignore"
    if "detect-zeroes" in values:
        node["detect-zeroes"] = values.pop("detect-zeroes")
    _add_image(drive, name, node, values, aio)
    if copy_on_read and read_only:
        drive.notes.append("copy-on-read=on: read-only drives do without")
    elif copy_on_read:
        drive.blockdevs.append({"driver": "copy-on-read", "node-name": name + "-cor", "file": drive.top})
    if limits:
        drive.objects[group] = make_object({"qom-type": "throttle-group", "id": group, "limits": limits})
        drive.blockdevs.append({"driver": "throttle", "node-name": name + "-throttle", "throttle-group": group, "file": drive.top})
    return drive


def _take_limits(values: dict[str, str], name: str) -> tuple[dict[str, int], str]:
    """Take what is about throttling out of `values`: the limits by their names, and the id of the group."""
    from .units import parse_number

    limits: dict[str, int] = {}
    for key in list(values):
        limit = _OLD_LIMITS.get(key) or (key[len("throttling.") :] if key.startswith("throttling.") else None)
        if limit in _OLD_LIMITS.values():
            try:
                number = parse_number(values.pop(key), (1 << 63) - 1, 0)
            except OptionError:
                raise OptionError("Parameter '%s' expects a number" % key) from None
            if number:
                limits[str(limit)] = number
    group = values.pop("throttling.group", None) or values.pop("group", None) or name
    return limits, group


def _to_device(drive: Drive, key: str, value: str) -> None:
    if key == "media" and value not in ("disk", "cdrom"):
        raise OptionError("'%s' invalid media" % value)
    if DEVICE[key] is None:
        drive.notes.append("%s=%s: belongs to the device, and is said by its type and its place" % (key, value))
    else:
        drive.device[str(DEVICE[key])] = value


def _take_cache(drive: Drive, node: dict[str, Any], values: dict[str, str]) -> None:
    mode = values.pop("cache", None)
    if mode is not None:
        if mode not in CACHE:
            raise OptionError("invalid cache option", hint=nearest(mode, CACHE))
        direct, no_flush, write_cache = CACHE[mode]
        node["cache"] = {"direct": direct, "no-flush": no_flush}
        if write_cache == "off":
            drive.device["write-cache"] = write_cache
    for key in ("direct", "no-flush"):
        if "cache." + key in values:
            node.setdefault("cache", {})[key] = values.pop("cache." + key)
    if "cache.writeback" in values:
        drive.device["write-cache"] = "on" if _flag(values, "cache.writeback") else "off"


def _flag(values: dict[str, str], key: str) -> bool:
    value = values.pop(key, "off")
    if value not in ("on", "yes", "true", "y", "off", "no", "false", "n"):
        raise OptionError("Parameter '%s' expects 'on' or 'off'" % key)
    return value in ("on", "yes", "true", "y")


def _add_image(drive: Drive, name: str, node: dict[str, Any], values: dict[str, str], aio: Any) -> None:
    """The image itself: the protocol's node inside the format's, each with what is said of it."""
    filename, format = values.pop("file", None), values.pop("format", None) or values.pop("driver", None)
    spec: dict[str, Any] = nest(values)
    if filename is not None:
        named = parse_filename(filename)
        if format is not None:
            named = with_driver(named, format)
        spec = {**named, **spec}
    elif format is not None:
        spec["driver"] = format
    if "driver" not in spec:
        spec["driver"] = "raw"
        drive.notes.append("no format: taken for raw, which is safe; say format= for anything else")
    inner = spec.get("file")
    bottom = inner if isinstance(inner, dict) else spec
    if aio is not None:
        bottom["aio"] = aio
    if inner is bottom:
        for key in ("cache", "discard", "read-only"):  # what a drive says of its image holds for the file below too
            if key in node:
                bottom.setdefault(key, node[key])
    try:
        drive.blockdevs.append(read_node({**node, **spec, "node-name": name}, False))
    except OptionError as error:
        word = str(error).partition("'")[2].partition("'")[0]
        hint = error.hint or nearest(word, [*_OWN, *DEVICE, *_OLD_LIMITS])
        raise OptionError(str(error), hint=hint) from None
