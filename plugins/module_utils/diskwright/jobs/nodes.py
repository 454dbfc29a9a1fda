# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Nodes that come, go and change while others are in use: blockdev-add, -del, -reopen, and the like
(https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html)."""

from __future__ import annotations

from ..errors import Error, OptionError, ReadOnly, Unsupported
from ..node import ALL, CONSISTENT_READ, RESIZE, WRITE, Node
from ..objects import parse_object
from ..options import ObjectRef, flatten, nest, opt, parse_value
from ..root import Root
from . import chain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, Sequence

    from .live import Live

SECTOR = 512
MAX_NODES = 4096  # of a graph that a client can add to
MAX_OBJECTS = 1024


def add(live: Live, spec: Mapping[str, Any]) -> Node:
    """Open a node, which stays open until it is removed. Raises Error."""
    with live.lock:
        if len(live.graph.named) >= MAX_NODES:
            raise Error("There are %d nodes already" % MAX_NODES)
        return live.graph.add(spec)


def remove(live: Live, name: str) -> None:
    """Close a node that was added. Raises Error."""
    with live.lock:
        node = live.graph.named.get(name)
        if node is None:
            raise Error("Failed to find node with node-name='%s'" % name)
        if any(not isinstance(edge.user, Node) and edge.role != "main node" for edge in node.parents):
            raise Error("Node %s is in use" % name)
        live.check_free(node)
        live.graph.remove(name)


def resize(live: Live, device: Optional[str], node_name: Optional[str], size: int) -> None:
    """Change the virtual size of a node. Raises Error."""
    with live.lock:
        node = live.node_of(device, node_name)
        if size < 0:
            raise OptionError("Parameter 'size' expects a >0 size")
        live.check_free(node)
        if size % SECTOR:
            raise OptionError("The new size must be a multiple of 512")
        with live.graph.drained():
            with Root(live.graph, node, CONSISTENT_READ | WRITE | RESIZE, ALL, "block_resize") as root:
                root.truncate(size)
            live.resized()


def set_write_threshold(live: Live, node_name: str, threshold: int) -> None:
    """Have the first write that goes beyond `threshold` bytes told by an event; 0: none. Raises Error."""
    with live.lock:
        node = live.graph.named.get(node_name)
        if node is None:
            raise Error("Device '%s' not found" % node_name)
        with live.graph.drained():
            recorded = live.record(node)
            with recorded.lock:
                recorded.threshold = threshold


def change_backing_file(live: Live, device: str, image_node_name: str, backing_file: str) -> None:
    """Write another name of its backing file into the image of a node of the chain of `device`; nothing is opened. Raises Error."""
    with live.lock:
        top = live.root_node(device)
        if image_node_name not in live.graph.named:
            raise OptionError("Cannot find device='' nor node-name='%s'" % image_node_name)
        image = live.graph.named[image_node_name].unfiltered()
        if image.backing is None:
            raise OptionError("not allowing backing file change on an image without a backing file")
        if image not in list(chain.layers(top)):
            raise OptionError("'%s' and image file are not in the same chain" % device)
        live.check_free(top)
        with live.graph.drained():
            chain.change_header(image, backing_file, image.backing.unfiltered().driver)


def change_children(live: Live, parent: str, child: Optional[str], node: Optional[str]) -> None:
    """Give a quorum one more child, the node `node`, or take its child `child` away. Raises Error."""
    with live.lock:
        owner = live.node(parent)
        if child is None and node is None:
            raise OptionError("Either child or node must be specified")
        if child is not None and node is not None:
            raise OptionError("The parameters child and node are in conflict")
        new_role = getattr(owner, "new_role", None)
        if node is not None:
            added = live.node(node)
            if new_role is None:
                raise Unsupported("The node %s does not support adding a child" % parent)
            if added.parents:
                raise Error("The node %s already has a parent" % node)
            if added.size != owner.size:
                raise Error("The node %s is of another size" % node)
            with live.graph.drained():
                live.graph.set_child(owner, new_role(), added)
            return
        if child not in owner.children:
            raise Error("Node '%s' does not have child '%s'" % (parent, child))
        if new_role is None:
            raise Unsupported("The node %s does not support removing a child" % parent)
        with live.graph.drained():
            owner.check_leaving()  # type: ignore[attr-defined]
            live.graph.set_child(owner, str(child), None)


def add_object(live: Live, values: Mapping[str, Any]) -> None:
    """Make an object that nodes can refer to. Raises Error."""
    from ..json_text import dumps

    with live.lock:
        if len(live.graph.objects) >= MAX_OBJECTS:
            raise Error("There are %d objects already" % MAX_OBJECTS)
        new = parse_object(dumps(dict(values)))
        if new.id in live.graph.objects:
            raise OptionError("attempt to add duplicate property '%s' to object (type 'container')" % new.id)
        live.graph.objects[new.id] = new


def remove_object(live: Live, name: str) -> None:
    """Forget an object. Raises Error while a node refers to it."""
    with live.lock:
        if name not in live.graph.objects:
            raise Error("object '%s' not found" % name)
        for node in live.graph.named.values():
            for field in node.options.fields.values():
                value = getattr(node.options, field.name)
                if field.kind in ("ObjectRef", "SecretRef") and value == name:
                    raise Error("object '%s' is in use, can not be deleted" % name)
        del live.graph.objects[name]


# -- blockdev-reopen -------------------------------------------------------------------------------------------------

_GENERIC = ("read-only", "auto-read-only", "cache", "discard", "detect-zeroes", "force-share", "node-name", "driver", "active")


def reopen(live: Live, options: Sequence[Mapping[str, Any]]) -> None:
    """Let nodes go on under other options, all or none of them. Raises Error."""
    with live.lock, live.graph.drained(), live.graph.lock:
        undo: list[Any] = []
        try:
            for spec in options:
                undo += _reopen(live, nest(spec))
        except BaseException:
            for step in reversed(undo):
                step()
            raise


def _reopen(live: Live, spec: Mapping[str, Any]) -> list[Any]:
    name = spec.get("node-name")
    if name is None:
        raise OptionError("node-name not specified")
    node = live.graph.named.get(name)
    if node is None:
        raise OptionError("Failed to find node with node-name='%s'" % name)
    if spec.get("driver") != node.driver:
        raise OptionError("Cannot change the option 'driver'")
    children = _children(live, node, spec)
    changed = _changed_options(node, spec)
    undo: list[Any] = []
    try:
        for key, value in changed.items():
            undo.append(_change_option(node, key, value))
        undo += _change_flags(node, spec)
        for role, child in children.items():
            old = node.children.get(role)
            if old is child:
                continue
            live.check_free(node, below=True)
            kept = old.kept if old is not None else False
            if old is not None:
                old.kept = True  # it may have to come back
            live.graph.set_child(node, role, child)
            undo.append(lambda role=role, old=old: live.graph.set_child(node, role, old))
            if old is not None:
                old.kept = kept
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return undo


def _children(live: Live, node: Node, spec: Mapping[str, Any]) -> dict[str, Optional[Node]]:
    """The children that a node is to have, by role, as far as something is said of them."""
    found: dict[str, Optional[Node]] = {}
    for role in ("file", "backing"):
        if role not in spec:
            if role == "file" and role in node.children and not node.leaf:
                raise OptionError("Option 'file' missing, it must be given where a node is reopened")
            continue
        given = spec[role]
        if given is None:
            if role == "file":
                raise OptionError("Invalid parameter type for 'file', expected: BlockdevRef")
            found[role] = None
        elif isinstance(given, str):
            if given not in live.graph.named:
                raise OptionError("Cannot find device='' nor node-name='%s'" % given)
            found[role] = live.graph.named[given]
        else:
            raise Unsupported("Cannot open a new child '%s' in blockdev-reopen: give the name of a node" % role)
    if "backing" in spec and not node.supports_backing:
        raise OptionError("Block format '%s' does not support the option 'backing'" % node.driver)
    return found


def _changed_options(node: Node, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are to have other values. Raises OptionError for one that cannot."""
    changed: dict[str, Any] = {}
    values = {key: value for key, value in spec.items() if key not in _GENERIC and key not in ("file", "backing")}
    for key, value in flatten(values).items():
        field = type(node).options_class._by_key.get(key)
        if field is None:
            kind = "protocol" if node.leaf else "format"
            raise OptionError("Block %s '%s' does not support the option '%s'" % (kind, node.driver, key))
        if field.kind in ("NodeRef", "NodeRefs"):
            continue
        wanted = parse_value(field, value, key)
        old = getattr(node.options, field.name)
        if wanted != old:
            if key not in type(node).changeable:
                raise OptionError("Cannot change the option '%s'" % key)
            changed[key] = type(old)(wanted, old.objects) if isinstance(old, ObjectRef) else wanted
    return changed


def _change_option(node: Node, key: str, value: Any) -> Any:
    name = type(node).options_class.fields[key].name
    before = getattr(node.options, name)

    def change(wanted: Any) -> None:
        node.change_option(key, wanted)
        setattr(node.options, name, wanted)

    change(value)
    return lambda: change(before)


def _change_flags(node: Node, spec: Mapping[str, Any]) -> list[Any]:
    switch = opt(False)
    switch.kind = "bool"
    changed: dict[str, Any] = {}
    read_only = parse_value(switch, spec.get("read-only", False), "read-only")
    changed["writable"] = not read_only
    cache = spec.get("cache") or {}
    if not isinstance(cache, dict):
        raise OptionError("Invalid parameter type for 'cache', expected: object")
    changed["direct"] = parse_value(switch, cache.get("direct", False), "cache.direct")
    changed["no_flush"] = parse_value(switch, cache.get("no-flush", False), "cache.no-flush")
    discard = spec.get("discard", "ignore")
    if discard not in ("ignore", "off", "unmap", "on"):
        raise OptionError("Invalid discard option")
    changed["unmap"] = discard in ("unmap", "on")
    old = node.flags
    if all(getattr(old, key) == value for key, value in changed.items()):
        return []
    if read_only and old.permissions()[0] & (WRITE | RESIZE):
        raise ReadOnly("Cannot make block node read-only, there is a writer on it")
    if not read_only and node.unwritable:
        raise ReadOnly("Image is read-only")
    if read_only:
        node.flush()
    node.change_flags(old.but(**changed))
    return [lambda: node.change_flags(old)]
