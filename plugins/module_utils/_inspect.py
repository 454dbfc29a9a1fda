# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether an image that somebody else made is safe to use: what it refers to and what it would cost, found without opening any file but it."""

from __future__ import annotations

import os
import stat

from . import _policy
from .diskwright.errors import Denied, Error
from .diskwright.names import OpenPolicy
from .diskwright.parts import NotCarried, part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    from .diskwright.node import Node, Reference


class Noting(OpenPolicy):
    """The task's policy, which writes down what it was asked for."""

    __slots__ = ("found",)

    def __init__(self, policy: OpenPolicy) -> None:
        super().__init__(policy.mode, policy.allowed, policy.json, policy.protocols, policy.max_chain, policy.names)
        self.found: list[dict[str, Any]] = []

    def admit(self, parent: Node, reference: Reference, spec: Mapping[str, Any]) -> None:
        """See OpenPolicy.admit."""
        entry = {"image": parent.filename, "role": reference.role, "name": reference.name, "allowed": False}
        if entry not in self.found:
            self.found.append(entry)
        super().admit(parent, reference, spec)
        self.found.remove(entry)
        if {**entry, "allowed": True} not in self.found:
            self.found.append({**entry, "allowed": True})


def inspect(path: str, format: Optional[str]) -> dict[str, Any]:
    """The verdict: `safe`, `reasons` why not, and the `references` of the image and of those below it. Raises NotCarried."""
    policy, reasons = Noting(_policy.current()), []
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            reasons.append("it is neither a file nor a block device")
        else:
            _look(os.path.abspath(path), format, policy, reasons)
    except NotCarried:
        raise
    except (Error, OSError) as exc:
        reasons.append(str(exc))
    for entry in policy.found:
        if not entry["name"].isprintable():
            reasons.append("the name of its %s file has control characters" % entry["role"])
    return {"safe": not reasons, "reasons": list(dict.fromkeys(reasons)), "references": policy.found}


def _look(path: str, format: Optional[str], policy: Noting, reasons: list[str]) -> None:
    """Open the image and then, as far as they are allowed, those below it."""
    from .diskwright.graph import Graph, identity, parse_filename, resolve_name
    from .diskwright.node import OpenFlags, Reference

    seen, depth, name = set(), 0, path
    while True:
        depth += 1
        if depth > policy.max_chain:
            reasons.append("its backing chain is deeper than %d images" % policy.max_chain)
            return
        warnings: list[str] = []
        with Graph(policy, warn=warnings.append).open(name, format, OpenFlags(no_backing=True, no_io=True, force_share=True)) as node:
            if identity(node) in seen:
                reasons.append("its backing chain is a loop")
                return
            seen.add(identity(node))
            _judge(node, reasons)
            reasons += [text for text in warnings if "holds" in text]
            data_file = (node.format_specific() or {}).get("data-file")
            stored = [("data-file", data_file, "raw"), ("backing", node.backing_filename, node.backing_format)]
            following = None
            for role, stored_name, stored_format in stored:
                if not stored_name:
                    continue
                place = resolve_name(node, stored_name) if role == "backing" else os.path.join(os.path.dirname(name), stored_name)
                try:
                    policy.admit(node, Reference(role, stored_name, stored_format), parse_filename(place or stored_name))
                except (Denied, Error) as exc:
                    reasons.append(str(exc))
                    continue
                if role == "backing":
                    following = place
                    format = stored_format
                    if format is None:
                        reasons.append("%s does not say which format its backing file has" % node.filename)
        if following is None:
            return
        name = following


def _judge(node: Node, reasons: list[str]) -> None:
    """What the image itself says that is a reason."""
    from .diskwright.errors import Denied

    details: Mapping[str, Any] = node.format_specific() or {}
    try:
        _policy.check_size(node.filename, node.size)
    except Denied as exc:
        reasons.append(str(exc))
    if details.get("corrupt"):
        reasons.append("%s is marked as corrupt" % node.filename)
    encryption = details.get("encrypt", details)
    most = _policy.limits()["key_derivation"]
    counts = [slot.get("iters", 0) for slot in encryption.get("slots", ())] + [encryption.get("master-key-iters", 0)]
    if max(counts) > most:
        reasons.append("%s: trying a passphrase takes %d iterations, and limits.key_derivation is %d" % (node.filename, max(counts), most))
    if _policy.limits()["expansion"] is not None:
        data_bytes = part(__package__, "_extents").data_bytes
        try:
            _policy.check_expansion(node.filename, data_bytes(node, own=True), os.path.getsize(node.filename))
        except Denied as exc:
            reasons.append(str(exc))
