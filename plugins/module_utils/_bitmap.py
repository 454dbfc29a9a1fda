# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_bitmap: what a persistent dirty bitmap of an image is, what it should be, and the step from the one to the other."""

from __future__ import annotations

import os

from . import _policy
from ._plan import Refusal, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Iterable, Iterator, Mapping, Optional

    from .diskwright.bitmaps import Bitmap
    from .diskwright.node import Node

    State = Mapping[str, Any]
    Interval = tuple[int, int]  # start and end in bytes of the disk

MAX_NAME = 1023  # bytes


def wanted(params: State) -> dict[str, Any]:
    """The wanted state from the module's parameters, checked. Raises Refusal, OptionError."""
    from .diskwright.units import parse_size

    want = {key: params[key] for key in ("path", "name", "state", "format", "merge", "source_file", "source_format", "replace")}
    text = params["granularity"]
    want["granularity"] = size = None if text is None else parse_size(text, 1 << 63)
    if size is not None and (not 512 <= size <= 1 << 31 or size & (size - 1)):
        raise Refusal("granularity: %d is not a power of two from 512 to 2147483648" % size)
    if not 0 < len(want["name"].encode("utf-8", "surrogateescape")) <= MAX_NAME or "\0" in want["name"]:
        raise Refusal("name: a bitmap's name has 1 to %d bytes" % MAX_NAME)
    if bool(want["merge"]) != (want["state"] == "merged"):
        raise Refusal("merge names the bitmaps for state=merged, and only for that")
    return want


# -- what is -------------------------------------------------------------------------------------------------------


def observe(want: State) -> dict[str, Any]:
    """The bitmap, None if there is none. Works on images in use. Raises Error and OSError for what is no image.

    `_obstacle` says why the image cannot have bitmaps, `_sources` what is wrong with each bitmap that is to be merged, and
    `_merged` and `_merged_anew` how many bytes the bitmap, or a new one in its place, would cover with those.
    """
    node = _open(want["path"], want["format"])
    with node:
        bitmaps = node.bitmaps()
        found = next((bitmap for bitmap in bitmaps or () if bitmap.name == want["name"]), None)
        have: dict[str, Any] = {"format": node.driver, "size": node.size, "bitmap": None if found is None else _described(found)}
        possible = bitmaps is not None and node.stores_bitmaps
        have["_obstacle"] = None if possible else "%s: an image of the format %s cannot have bitmaps" % (want["path"], _kind(node))
        have["_granularity"] = max(4096, min(node.cluster_size or 65536, 65536))
        have["_sources"] = {}
        if want["state"] == "merged":
            _look_at_sources(want, node, found, have)
    return have


def _open(path: str, format: Optional[str]) -> Node:
    from .diskwright.graph import open_image
    from .diskwright.node import OpenFlags

    return open_image(os.path.abspath(path), format, OpenFlags(no_backing=True, no_io=True, force_share=True), policy=_policy.current())


def _kind(node: Node) -> str:
    compat = (node.format_specific() or {}).get("compat")
    return node.driver if compat is None else "%s with compat=%s" % (node.driver, compat)


def _described(bitmap: Bitmap) -> dict[str, Any]:
    marked = None if bitmap.inconsistent else covered([_intervals(bitmap, bitmap.granularity)])
    return {
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "enabled": bitmap.enabled,
        "inconsistent": bitmap.inconsistent,
        "dirty_bytes": marked,
    }


def _look_at_sources(want: State, node: Node, found: Optional[Bitmap], have: dict[str, Any]) -> None:
    path = want["source_file"]
    other = node if path is None else _open(path, want["source_format"])
    try:
        theirs = {bitmap.name: bitmap for bitmap in other.bitmaps() or ()}
        for name in want["merge"]:
            have["_sources"][name] = _problem(path or want["path"], name, theirs.get(name), node.size)
        good = [theirs[name] for name, problem in have["_sources"].items() if problem is None]
        if found is not None and not found.inconsistent:
            have["_merged"] = covered([_intervals(bitmap, found.granularity) for bitmap in (found, *good)])
        grain = want["granularity"] or have["_granularity"]
        have["_merged_anew"] = covered([_intervals(bitmap, grain) for bitmap in good])
    finally:
        if other is not node:
            other.close()


def _problem(path: str, name: str, bitmap: Optional[Bitmap], size: int) -> Optional[str]:
    if bitmap is None:
        return "%s: there is no bitmap '%s' to merge" % (path, name)
    if bitmap.inconsistent:
        return "%s: the bitmap '%s' is inconsistent, so that it cannot be merged" % (path, name)
    if bitmap.size != size:
        return "%s: the bitmap '%s' is of a disk of %d bytes, and cannot be merged into one of a disk of %d bytes" % (path, name, bitmap.size, size)
    return None


def _intervals(bitmap: Bitmap, granularity: int) -> Iterator[Interval]:
    """What a bitmap has marked, as one of another granularity would have it."""
    for offset, length in bitmap.runs():
        yield offset // granularity * granularity, min(-(-(offset + length) // granularity) * granularity, bitmap.size)


def covered(many: Iterable[Iterable[Interval]]) -> int:
    """How many bytes lie in one of the intervals, which ascend in each of the `many` series."""
    from heapq import merge

    total = reached = 0
    for start, end in merge(*many):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


# -- what is to be done --------------------------------------------------------------------------------------------


def plan(want: State, have: State) -> list[Step]:
    """One step if something is to be done. No I/O. Raises Refusal for what cannot or may not be."""
    bitmap, path, name = have["bitmap"], want["path"], want["name"]
    if want["state"] == "absent":
        return [] if bitmap is None else [_step(want, [("remove", "")], ["it should be absent"], None)]
    if have["_obstacle"]:
        raise Refusal(have["_obstacle"])
    for problem in have["_sources"].values():
        if problem:
            raise Refusal(problem)
    actions, reasons = [], []
    reason = None if bitmap is None else _unfit(want, bitmap)
    if reason and not want["replace"]:
        raise Refusal("%s: the bitmap '%s' %s: making it anew loses what it recorded, and needs replace" % (path, name, reason))
    anew = bitmap is None or reason is not None
    if reason:
        actions.append(("remove", ""))
        reasons.append("it " + reason)
    if anew:
        actions.append(("add", ""))
        reasons.append("there is no such bitmap" if bitmap is None else "")
        grain = want["granularity"] or have["_granularity"]
        bitmap = {"name": name, "granularity": grain, "enabled": True, "inconsistent": False, "dirty_bytes": 0}
    bitmap = dict(bitmap)
    if want["state"] in ("enabled", "disabled") and bitmap["enabled"] != (want["state"] == "enabled"):
        bitmap["enabled"] = want["state"] == "enabled"
        actions.append((want["state"][:-1], ""))
        reasons.append("it should be " + want["state"])
    if want["state"] == "cleared" and bitmap["dirty_bytes"]:
        reasons.append("it has recorded writes to %d bytes" % bitmap["dirty_bytes"])
        bitmap["dirty_bytes"] = 0
        actions.append(("clear", ""))
    merged = have["_merged_anew" if anew else "_merged"] if want["state"] == "merged" else bitmap["dirty_bytes"]
    if merged != bitmap["dirty_bytes"]:
        reasons.append("it lacks %d bytes that others have recorded" % (merged - bitmap["dirty_bytes"]))
        bitmap["dirty_bytes"] = merged
        actions += [("merge", source) for source in want["merge"]]
    return [_step(want, actions, [reason for reason in reasons if reason], bitmap)] if actions else []


def _unfit(want: State, bitmap: State) -> Optional[str]:
    """Why a bitmap can only be made anew; None if it need not be."""
    if bitmap["inconsistent"]:
        return "is inconsistent"
    if want["granularity"] not in (None, bitmap["granularity"]):
        return "has the granularity %d and %d is wanted" % (bitmap["granularity"], want["granularity"])
    return None


def _step(want: State, actions: list[tuple[str, str]], reasons: list[str], bitmap: Optional[State]) -> Step:
    words = [action for action, _source in actions]
    argv = ["qemu-img", "bitmap", *(["-f", want["format"]] if want["format"] else [])]
    for action, source in actions:
        argv += ["--" + action, *([source] if source else [])]
    granularity = (want["granularity"] or 0) if "add" in words else 0
    if granularity:
        argv += ["-g", str(granularity)]
    other = want["source_file"] if "merge" in words else None
    if other is not None:
        argv += ["-b", other, *(["-F", want["source_format"]] if want["source_format"] else [])]

    def run() -> None:
        from .diskwright.commands.bitmap import bitmap as change

        change(
            os.path.abspath(want["path"]),
            want["name"],
            actions,
            granularity=granularity,
            source_file=None if other is None else os.path.abspath(other),
            source_format=want["source_format"] if other is not None else None,
            format=want["format"],
            no_io=True,
            policy=_policy.current(),
        )

    change = {"bitmap": bitmap, "_merged": (bitmap or {}).get("dirty_bytes")}
    return Step("bitmap", want["path"], ", ".join(reasons), [*argv, want["path"], want["name"]], change, run, cost=0)
