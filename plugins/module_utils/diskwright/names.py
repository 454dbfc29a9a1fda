# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Names: what a file name or an --image-opts string means, what to call a node, and which stored names may be opened.

A specification is a nested mapping in the language of QEMU's blockdev options
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, BlockdevOptions).
"""

from __future__ import annotations

import os

from . import drivers
from .errors import Denied, OptionError
from .node import Node, Protocol
from .options import nest, split_pairs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, Sequence

    from .node import Reference

MAX_CHAIN = 200  # nodes above one another; deeper chains are refused


class OpenPolicy:
    """Which files an image may make us open by naming them (backing files, data files, extents).

    mode      "any" (as QEMU does), "none", "same_directory" (files at or below the image's own directory, no links out
              of it), "listed" (those in `allowed`, after resolving links)
    allowed   paths of files or directories that the user named: admitted under each mode, and all that "listed" admits
    names     stored names that are admitted as they are, whatever they look like
    json      whether stored names may be json: descriptions
    protocols names of the protocols that a stored name may use
    """

    __slots__ = ("mode", "allowed", "names", "json", "protocols", "max_chain")

    def __init__(
        self,
        mode: str = "any",
        allowed: Sequence[str] = (),
        json: bool = True,
        protocols: Optional[Sequence[str]] = None,
        max_chain: int = MAX_CHAIN,
        names: Sequence[str] = (),
    ) -> None:
        if mode not in ("any", "none", "same_directory", "listed"):
            raise OptionError("Unknown open policy '%s'" % mode)
        self.mode = mode
        self.allowed = tuple(os.path.realpath(path) for path in allowed)
        self.names = tuple(names)
        self.json = json
        self.protocols = protocols
        self.max_chain = max_chain

    def admit(self, parent: Node, reference: Reference, spec: Mapping[str, Any]) -> None:
        """Raise Denied unless the file that `reference` of `parent` names, parsed as `spec`, may be opened."""
        if (self.mode == "any" and self.json and self.protocols is None) or reference.name in self.names:
            return
        what = "%s: the image refers to the %s file '%s', which the open policy" % (parent.filename, reference.role, reference.name)
        if reference.name.startswith("json:") and not self.json:
            raise Denied("%s refuses (json: names are not allowed)" % what, filename=parent.filename)
        for leaf in _leaves(spec):
            if "driver" in leaf or "filename" in leaf:
                self._admit_leaf(parent, what, leaf)

    def _admit_leaf(self, parent: Node, what: str, leaf: Mapping[str, Any]) -> None:
        driver, filename = leaf.get("driver"), leaf.get("filename", "")
        if driver is None:
            driver = protocol_prefix(str(filename)) or "file"
        if self.protocols is not None and driver not in self.protocols:
            raise Denied("%s refuses (protocol '%s' is not allowed)" % (what, driver), filename=parent.filename)
        if self.mode == "any":
            return
        if driver not in ("file", "host_device") or not isinstance(filename, str) or "\0" in filename:
            raise Denied("%s refuses (mode '%s')" % (what, self.mode), filename=parent.filename)
        path = os.path.realpath(filename)
        places = list(self.allowed)
        own = local_path(parent) if self.mode == "same_directory" and driver == "file" else ""
        if own:  # an image on a server has nothing beside it
            places.append(os.path.dirname(os.path.realpath(own)))
        if not any(path == place or path.startswith(place.rstrip("/") + "/") for place in places):
            raise Denied("%s refuses (mode '%s')" % (what, self.mode), filename=parent.filename)


def _leaves(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The innermost descriptions in `spec`, at whatever depth and under whatever key: what is going to be opened in the end."""
    found: list[Mapping[str, Any]] = []
    for value in spec.values():
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, dict):
                found += _leaves(item)
    if isinstance(spec.get("config"), str):  # blkdebug's, which is read as well
        found.append({"driver": "file", "filename": spec["config"]})
    return [*found, spec] if not found or "filename" in spec or str(spec.get("driver")) in drivers.PROTOCOLS else found


def parse_filename(filename: str) -> dict[str, Any]:
    """The specification that a plain FILENAME operand or a stored name means; the driver of the format is left open.

    Raises OptionError for an unknown protocol or a malformed json: name.
    """
    if filename.startswith("json:"):
        return _parse_json(filename)
    protocol = protocol_prefix(filename)
    if protocol is None:
        return {"file": {"driver": file_driver(filename), "filename": filename}}
    if protocol not in drivers.PREFIXED:
        cls: type[Node] = drivers.lookup_protocol(protocol)
        return {"file": {"driver": cls.driver, **cls.parse_name(filename)}}
    cls = drivers.lookup(protocol)
    named = {key: as_protocol(value) for key, value in cls.parse_name(filename).items()}
    return {"file": {"driver": cls.driver, **named}}


def with_driver(spec: Mapping[str, Any], format: str) -> dict[str, Any]:
    """`spec`, as parse_filename gives it, with a driver on top of it; a protocol takes the place of the file's."""
    inner = spec.get("file")
    if format in drivers.PROTOCOLS and isinstance(inner, dict) and "driver" not in spec:
        spec = inner
    return {**spec, "driver": format}


def as_protocol(spec: Any) -> Any:
    """The specification of a format's own file: a name in it is a protocol's, and its content is not probed for a format."""
    if not isinstance(spec, dict) or "driver" in spec or "file" in spec or "filename" not in spec:
        return spec
    named = parse_filename(str(spec["filename"]))
    rest = {key: value for key, value in spec.items() if key != "filename"}
    return {**(named if "driver" in named else named.get("file", named)), **rest}


def protocol_prefix(filename: str) -> Optional[str]:
    """The protocol in front of the first colon, unless a slash comes earlier; None for a path."""
    colon = filename.find(":")
    slash = filename.find("/")
    if colon < 0 or 0 <= slash < colon:
        return None
    return filename[:colon]


def file_driver(path: str) -> str:
    """host_cdrom for an optical drive, host_device for another block or character device, else file."""
    import stat

    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "file"
    if stat.S_ISBLK(mode) and _is_optical(path):
        return "host_cdrom"
    return "host_device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "file"


def _is_optical(path: str) -> bool:
    """Whether the block device at `path` tells of a medium in it, as drives for optical discs do (CDROM_DRIVE_STATUS)."""
    from fcntl import ioctl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        ioctl(fd, 0x5326, 0x7FFFFFFF)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _parse_json(filename: str) -> dict[str, Any]:
    from .json_parser import parse_json

    try:
        value = parse_json(filename[5:])
    except OptionError as exc:
        raise OptionError("Could not parse the JSON options: %s" % exc) from None
    if not isinstance(value, dict):
        raise OptionError("Invalid JSON object given")
    return nest(value)


def parse_image_opts(text: str) -> dict[str, Any]:
    """The specification that an --image-opts string means."""
    return nest(dict(split_pairs(text, implied_key="file")))


def resolve_name(node: Node, name: str) -> str:
    """A stored name as seen from the working directory: relative ones are relative to the image that stores them. Raises
    OptionError in QEMU's words where nothing is relative to that."""
    base = local_path(node) if node.filename.startswith("json:") else node.filename
    if join_name("/", name) != name:
        leaf = bottom(node)
        if not base or leaf.baseless:
            raise OptionError("Cannot generate a base directory " + (leaf.baseless or "for %s nodes" % leaf.driver))
    return join_name(base, name)


def beside_name(node: Node, name: str) -> str:
    """A path as seen from the working directory: relative ones are relative to the local file of `node`."""
    place = local_path(node)
    return name if name.startswith("/") else place[: place.rfind("/") + 1] + name


def join_name(base: str, name: str) -> str:
    """`name` as it is, or beside the file `base` if it is a relative path."""
    if not name or name.startswith("/") or name.startswith("json:") or protocol_prefix(name) is not None:
        return name
    return base[: base.rfind("/") + 1] + name


def local_path(node: Node) -> str:
    """The path of the local file at the bottom of `node`; "" where there is none."""
    return getattr(bottom(node).options, "filename", "")


def bottom(node: Node) -> Node:
    """The protocol below `node`, or what is there in its place."""
    while not node.leaf and node.primary in node.children:
        node = node.children[node.primary]
    return node


def identity(node: Node) -> Any:
    """What tells the file below `node` from all others (device and inode, or the name); None where nothing does."""
    return identity_of_path(local_path(node))


def identity_of_spec(spec: Mapping[str, Any]) -> Any:
    inner = spec.get("file", spec)
    return identity_of_path(str(inner.get("filename", ""))) if isinstance(inner, dict) else None


def identity_of_path(path: str) -> Any:
    """Device and inode of the file at `path`, None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def describe(node: Node, given: Mapping[str, Any]) -> None:
    """Fill in the name of a node for people, and the specification that it stands for.

    The name is the plain file name where that says it all, else json:{...}, as QEMU has it. `given` are the driver's own
    options as the user wrote them, by flat key.
    """
    strong = [key for key in given if key in node.strong_options]
    if len(strong) > 1:
        from .json_text import in_order

        strong = in_order(strong)  # from one hash table into the other
    full = {key: given[key] for key in strong}
    weak = not full
    full["driver"] = node.driver
    file = node.children.get("file")
    if isinstance(node, Protocol):
        node.full_options = full
        node.filename = node.options_name()
    else:
        lists: dict[str, dict[int, Any]] = {}
        for role, child in node.children.items():
            name, numbered, number = role.partition(".")
            if numbered:  # one of a list of children
                lists.setdefault(name, {})[int(number)] = child.full_options
            elif role != "backing":
                full[role] = child.full_options
        full.update((name, [members[number] for number in sorted(members)]) for name, members in lists.items())
        node.full_options = full
        node.filename = node.options_name()
        if not node.filename and weak and file is not None and node.unfiltered() is node and (file.leaf or file.options_name()):
            node.filename = "" if file.filename.startswith("json:") else file.filename
    if not node.filename:
        from .json_text import dumps

        node.filename = "json:" + dumps(full)
