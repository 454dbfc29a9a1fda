# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Permissions where a node has several users: what each does with it and lets the others do, and who objects.

They are QEMU's (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html, BlockPermission). The permissions that all users of a
node take together are what the node itself needs of its children, down to the locks of the files.
"""

from __future__ import annotations

from .errors import Error, ReadOnly, Unsupported
from .hooks import ALL, CONSISTENT_READ, RESIZE, WRITE, WRITE_UNCHANGED, Edge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, Sequence

    from .hooks import OpenFlags
    from .node import Node

_NAMES = ((CONSISTENT_READ, "consistent read"), (WRITE, "write"), (WRITE_UNCHANGED, "write unchanged"), (RESIZE, "resize"))


def use(user: Any, role: str, node: Node, perm: int, shared: int) -> Edge:
    """Make `user` one more user of a node. Raises Error where another one objects, ReadOnly, and Locked; nothing is changed then."""
    edge = Edge(user, role, node, perm, shared)
    held, tolerated = node.flags.permissions()
    alone = not node.parents
    node.parents.append(edge)
    try:
        if alone or perm & ~tolerated or held & ~shared:
            refresh(node)
        else:  # whoever they are, nobody objects: a node may have thousands of users
            _hold(node, held | perm, tolerated & shared)
    except BaseException:
        node.parents.remove(edge)
        settle(node)
        raise
    return edge


def change(edge: Edge, perm: int, shared: int) -> None:
    """Give a user other permissions. Raises what `use` raises; nothing is changed then."""
    old = edge.perm, edge.shared
    edge.perm, edge.shared = perm, shared
    try:
        refresh(edge.node)
    except BaseException:
        edge.perm, edge.shared = old
        settle(edge.node)
        raise


def refresh(node: Node) -> None:
    """Make the permissions of a node what its users need by now. Raises Error, ReadOnly, Locked."""
    find_conflict(node)
    _hold(node, *together(node))


def _hold(node: Node, perm: int, shared: int) -> None:
    if perm & (WRITE | WRITE_UNCHANGED) and node.read_only:
        raise ReadOnly("Block node is read-only", filename=node.filename)
    if (perm, shared) != node.flags.permissions():
        node.change_flags(node.flags.but(perm=perm, shared=shared))


def settle(node: Node) -> None:
    """The same after users went away or back to what they were: there is nobody to object."""
    try:
        refresh(node)
    except (Error, OSError):
        pass  # more than is needed is held; the next change tries again


def together(node: Node) -> tuple[int, int]:
    """What all users of a node do, and what each of them lets others do."""
    perm, shared = 0, ALL
    for edge in node.parents:
        perm |= edge.perm
        shared &= edge.shared
    return perm, shared


def find_conflict(node: Node) -> None:
    """Raise Error if one user does what another one does not share; the newest is heard first, as in QEMU."""
    for left in reversed(node.parents):
        right = None if left.shared == ALL else next((edge for edge in reversed(node.parents) if edge is not left and edge.perm & ~left.shared), None)
        if right is not None:
            names = ", ".join(name for bit, name in _NAMES if right.perm & ~left.shared & bit)
            text = "Permission conflict on node '%s': permissions '%s' are both required by %s and unshared by %s."
            raise Error(text % (node.name, names, describe_use(right), describe_use(left)), filename=node.filename)


def describe_use(edge: Edge) -> str:
    """Who uses which node as what, for messages."""
    described = getattr(edge.user, "description", None)
    if described is None:
        described = "node '%s'" % getattr(edge.user, "name", edge.user)
    return "%s (uses node '%s' as '%s' child)" % (described, edge.node.name, edge.role)


def below(node: Node) -> Iterator[Node]:
    """A node and all that it is made of, each once."""
    seen = {id(node)}
    todo = [node]
    while todo:
        found = todo.pop()
        yield found
        for child in found.children.values():
            if id(child) not in seen:
                seen.add(id(child))
                todo.append(child)


def replace(old: Node, new: Node) -> None:
    """Let all users of `old` use `new`, but for those that `new` itself is made of: a filter put on top of `old` stays there.

    Raises Error, ReadOnly, Locked where permissions do not allow it; nothing is changed then.
    """
    inside = {id(node) for node in below(new)}
    moved = [edge for edge in old.parents if id(edge.user) not in inside]
    move(moved, old, new)


def move(moved: list[Edge], old: Node, new: Node) -> None:
    """Let the users `moved` of `old` use `new`. Raises what `replace` raises."""
    for edge in moved:
        if edge.role != "backing" and getattr(edge.user, "keeps_children", False):
            text = "The '%s' child of the %s node '%s' cannot be replaced while it is open"
            raise Unsupported(text % (edge.role, edge.user.driver, edge.user.name), filename=edge.user.filename)
    place = list(old.parents)
    old.parents[:] = [edge for edge in place if edge not in moved]
    new.parents.extend(moved)
    for edge in moved:
        edge.node = new
    attached: list[Edge] = []
    try:
        settle(old)
        refresh(new)
        for edge in moved:
            edge.user.attach(edge.role, new)
            attached.append(edge)
    except BaseException:
        for edge in moved:
            edge.node = old
        for edge in attached:
            edge.user.attach(edge.role, old)
        new.parents[:] = [edge for edge in new.parents if edge not in moved]
        old.parents[:] = place
        settle(new)
        settle(old)
        raise


def release(node: Node, edges: Sequence[Edge], how: Callable[[Node], None]) -> None:
    """Take users from a node. Once it has none and nobody keeps it, it is closed: by `how`, Node.close or Node.abandon."""
    left = [edge for edge in node.parents if edge not in edges]
    node.parents[:] = left
    if not left and not node.kept:
        how(node)
    elif edges and not node._closed:
        settle(node)


def change_use(edge: Edge, flags: OpenFlags) -> None:
    """Let a node go on under the flags that one user wants; where it has others too, or is kept, only the permissions change.
    Raises Locked or Error, nothing being changed then."""
    if edge.node.kept or len(edge.node.parents) > 1:
        change(edge, *flags.permissions())
    else:
        flags = flags.but(**{"detect_zeroes": edge.node.flags.detect_zeroes, **edge.node.own_flags})
        if flags.permissions()[0] & WRITE and not flags.writable:
            raise ReadOnly("Block node is read-only", filename=edge.node.filename)
        edge.node.change_flags(flags)
        edge.perm, edge.shared = flags.permissions()
