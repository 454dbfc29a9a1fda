# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The backing file of an image: which one it should be, and what of an overlay should be in it."""

from __future__ import annotations

import os

from . import _policy, _progress
from ._plan import Refusal, Step
from .diskwright.parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    from ._encryption import Address
    from .diskwright.node import Format

    State = Mapping[str, Any]


# -- what is -------------------------------------------------------------------------------------------------------


def describe(path: str, name: Optional[str], format: Optional[str] = None) -> Optional[dict[str, Any]]:
    """Format and size of the backing file `name` of an image at `path`, and the files of its chain; None if there is no such file."""
    if name is None:
        return None
    full = os.path.join(os.path.dirname(os.path.abspath(path)), name)
    if not os.path.exists(full):
        return None
    from .diskwright.describe import info

    chain = info(full, format=format, backing_chain=True, force_share=True, policy=_policy.current())
    for record in chain:
        _policy.check_size(record.filename, record.virtual_size)
    return {"format": chain[0].format, "size": chain[0].virtual_size, "chain": [os.path.realpath(record.filename) for record in chain]}


def observe(path: str, node: Format, want: State) -> dict[str, Any]:
    """Facts about an existing image that a change of its backing file depends on.

    `_new` describes the backing file that is wanted; `_moved` is whether it is the present one at a new place: that is gone from
    its old place, or the two names hold the same content; `_data` is whether the image holds anything itself.
    """
    facts: dict[str, Any] = {"_new": None, "_moved": False, "_data": False, "_own": None, "_below": None}
    new, old = want["backing_file"], node.backing_filename
    if new is not None and (old is None or not same_file(path, old, new) or want["backing_format"] not in (None, node.backing_format)):
        facts["_new"] = describe(path, new, want["backing_format"] or (node.backing_format if want["rebase"] == "moved" else None))
        facts["_moved"] = want["rebase"] == "moved" and old is not None and _moved(path, node, old, new)
        if want["rebase"] == "safe":
            facts["_below"] = _bytes_below(path, node)
    if want["flatten"] and old is not None:
        facts["_below"] = _bytes_below(path, node)
    if want["commit"]:
        from ._extents import own_bytes

        facts["_own"] = own_bytes(node)
        facts["_data"] = facts["_own"] > 0 or _holds_data(node)
    return facts


def _bytes_below(path: str, node: Format) -> Optional[int]:
    """How many bytes of data the image has from its backing files; None where those are encrypted, or gone."""
    from ._extents import data_bytes, own_bytes
    from .diskwright.errors import Error
    from .diskwright.graph import open_image
    from .diskwright.node import OpenFlags

    if node.encrypted:
        return None
    try:
        with open_image(os.path.abspath(path), node.driver, OpenFlags(force_share=True), policy=_policy.current()) as whole:
            return max(0, data_bytes(whole) - own_bytes(node))
    except Error:
        return None  # whatever is wrong shows when it is done


def same_file(path: str, name: str, other: str) -> bool:
    """Whether two backing file names mean the same file, relative ones being relative to the image; by name only."""
    folder = os.path.dirname(os.path.abspath(path))
    return os.path.normpath(os.path.join(folder, name)) == os.path.normpath(os.path.join(folder, other))


def _moved(path: str, node: Format, old: str, new: str) -> bool:
    from .diskwright.graph import parse_filename, protocol_prefix
    from .diskwright.node import Reference

    if same_file(path, old, new) or protocol_prefix(old) is not None:
        return False
    folder = os.path.dirname(os.path.abspath(path))
    old, new = os.path.join(folder, old), os.path.join(folder, new)
    if not os.path.exists(new):
        return False
    if not os.path.exists(old) or os.path.samefile(old, new):
        return True  # two names of one file, or nothing left to compare with
    policy = _policy.current()
    policy.admit(node, Reference("backing", node.backing_filename or "", node.backing_format), parse_filename(old))
    compare = part(__package__, "diskwright.commands.compare").compare

    return bool(compare(old, new, format1=node.backing_format, strict=False, force_share=True, policy=policy, progress=_progress.tell).identical)


def _holds_data(node: Format) -> bool:
    from .diskwright.extent import ALLOCATED

    position = 0
    while position < node.size:
        for extent in node.block_status(position, node.size - position, False, 1024):
            if extent.status & ALLOCATED:
                return True
            position = extent.offset + extent.length
    return False


# -- what is to be done --------------------------------------------------------------------------------------------


def has_backing(want: State, have: State) -> bool:
    """Whether the image has the backing file that is wanted, in the format that is wanted."""
    if have["backing_file"] is None or not same_file(want["path"], want["backing_file"], have["backing_file"]):
        return False
    return want["backing_format"] is None or have["backing_format"] in (None, want["backing_format"])


def plan(want: State, have: State, address: Address) -> list[Step]:
    """The step to the backing file that is wanted, or to none. No I/O. Raises Refusal for what cannot or may not be."""
    if want["flatten"]:
        return [] if have["backing_file"] is None else [_rebase(want, have, address, None, None, False)]
    if want["backing_file"] is None or has_backing(want, have):
        return []
    path, new, mode = want["path"], want["backing_file"], want["rebase"]
    if mode == "never" or (mode == "moved" and not have["_moved"]):
        raise Refusal(
            "%s has %s and '%s' is wanted: that is not changed unless rebase allows it%s"
            % (path, _present(have), _named(new, want["backing_format"]), " and the content is the same" if mode == "moved" else "")
        )
    if mode == "unsafe" and not want["allow_unsafe_rebase"]:
        raise Refusal("%s has %s: rebase=unsafe changes what it reads as, and needs allow_unsafe_rebase" % (path, _present(have)))
    if have["_new"] is None:
        raise Refusal("%s: the backing file '%s' that is wanted does not exist" % (path, new))
    if os.path.realpath(path) in have["_new"]["chain"]:
        raise Refusal("%s: '%s' is, or has below it, the image itself" % (path, new))
    return [_rebase(want, have, address, new, want["backing_format"] or have["_new"]["format"], mode != "safe")]


def _present(have: State) -> str:
    if have["backing_file"] is None:
        return "no backing file"
    return "the backing file '%s'" % _named(have["backing_file"], have["backing_format"])


def _named(name: str, format: Optional[str]) -> str:
    return name if format is None else "%s (%s)" % (name, format)


def _rebase(want: State, have: State, address: Address, new: Optional[str], format: Optional[str], unsafe: bool) -> Step:
    argv = ["qemu-img", "rebase", *(["-u"] if unsafe else []), *address.words, "-b", new or "", *(["-F", format] if format else []), address.operand]
    why = "it has %s" % _present(have)
    if want["rebase"] == "moved" and new is not None:
        why = "its backing file '%s' has moved" % have["backing_file"]

    def run() -> None:
        rebase = part(__package__, "diskwright.commands.rebase").rebase

        rebase(address.name, new, backing_format=format, unsafe=unsafe, progress=_progress.tell, **address.arguments)

    change = {"backing_file": new, "backing_format": format, "_data": True}
    return Step("rebase", want["path"], why, argv, change, run, cost=0 if unsafe else have.get("_below"))


def commit(want: State, have: State, moved: bool, address: Address) -> list[Step]:
    """The step that writes what the image holds into its backing file; `moved` is whether that has just changed. Raises Refusal."""
    if not want["commit"] or not (have["_data"] or (moved and want["rebase"] == "safe")):
        return []
    path = want["path"]
    backing = have["backing_file"]
    if not want["allow_backing_change"]:
        raise Refusal("%s: commit changes the backing file '%s', and whatever else is based on it, and needs allow_backing_change" % (path, backing))

    def run() -> None:
        bring_down = part(__package__, "diskwright.commands.commit").commit

        bring_down(address.name, progress=_progress.tell, **address.arguments)

    argv = ["qemu-img", "commit", *address.words, address.operand]
    return [Step("commit", path, "it holds data that should be in '%s'" % backing, argv, {"_data": False}, run, cost=have.get("_own"))]
