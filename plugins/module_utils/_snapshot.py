# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_snapshot: which internal snapshots the disks of a machine have, and the steps to those they should have.

A step changes all disks or none: all are locked before the first is changed, and what was done is undone where one fails.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager

from . import _policy
from ._plan import Refusal, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Iterator, Mapping, Optional, Sequence, Union

    from .diskwright.node import Node, Snapshot

    State = Mapping[str, Any]
    Entry = Mapping[str, Any]

MAX_NAME = 255  # bytes; qcow2's snapshots are listed with no more
MARK = "user.diskwright.snapshot"  # an attribute of images of which a snapshot is being made: its name
UNDO = "diskwright-undo"  # what a disk held before it was set back, as long as the other disks are not set back yet


def wanted(params: State) -> dict[str, Any]:
    """The wanted state from the module's parameters, checked. Raises Refusal."""
    want = {key: params[key] for key in ("state", "name", "id", "keep", "match", "complete", "allow_rollback", "format")}
    want["paths"] = paths = list(params["path"])
    state, name, keep = want["state"], want["name"], want["keep"]
    files = [os.path.realpath(path) for path in paths]
    for index, file in enumerate(files):
        if file in files[:index]:
            raise Refusal("path: %s and %s are the same image" % (paths[files.index(file)], paths[index]))
    if not paths:
        raise Refusal("path: at least one image is needed")
    if name is not None and (not name or "\0" in name or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME):
        raise Refusal("name: a snapshot's name has 1 to %d bytes" % MAX_NAME)
    if want["id"] is not None and len(paths) > 1:
        raise Refusal("id: the images of one machine number their snapshots apart; several images need a name")
    if state == "present" and name is None:
        raise Refusal("state=present needs the name of the snapshot")
    if state == "applied" and name is None and want["id"] is None:
        raise Refusal("state=applied needs the name or the id of the snapshot")
    if state == "applied" and keep is not None:
        raise Refusal("keep has no meaning with state=applied")
    if state == "absent" and [name, want["id"], keep].count(None) != 2:
        raise Refusal("state=absent needs one of name, id and keep")
    if keep is not None and keep < (1 if state == "present" else 0):
        raise Refusal("keep: %d is too small" % keep)
    return want


# -- what is -------------------------------------------------------------------------------------------------------


def observe(want: State) -> dict[str, Any]:
    """The snapshots of each image. Works on images in use. Raises Error and OSError for what is no image.

    `_obstacles` says why an image cannot have snapshots, by its path, and `_rollback_obstacles` why it cannot be set back.
    `holds` of an image, with state=applied, is whether its disk is as the snapshot was.
    """
    from .diskwright.graph import open_image
    from .diskwright.node import OpenFlags

    have: dict[str, Any] = {"images": {}, "_obstacles": {}, "_rollback_obstacles": {}, "_unfinished": []}
    for path in want["paths"]:
        flags = OpenFlags(no_backing=True, no_io=True, force_share=True)
        with open_image(os.path.abspath(path), want["format"], flags, policy=_policy.current()) as node:
            _policy.check_size(path, node.size)
            image: dict[str, Any] = {"format": node.driver, "size": node.size, "snapshots": _listed(node)}
            if want["state"] == "applied":
                found = chosen(want, image["snapshots"])
                image["holds"] = bool(found and node.holds_snapshot(found[-1]["id"]))
            have["images"][path] = image
            obstacle = _obstacle(node)
            have["_obstacles"][path] = obstacle
            if want["state"] == "present" and marked(path) == want["name"]:
                have["_unfinished"].append(path)
            bitmaps = obstacle is None and node.bitmaps()
            have["_rollback_obstacles"][path] = "it has dirty bitmaps, which would not tell of the change" if bitmaps and bitmaps.all else None
    return have


def marked(path: str) -> Optional[str]:
    """The snapshot that was being made of the image at `path` and of others when the process ended; None for none."""
    try:
        return os.getxattr(path, MARK).decode("utf-8", "surrogateescape")
    except OSError:
        return None  # nor is there one where the file system has no attributes


def unmark(paths: Sequence[str]) -> None:
    """Forget that snapshots were being made."""
    for path in paths:
        try:
            os.removexattr(path, MARK)
        except OSError:
            continue  # there was none, or there cannot be any


def _mark(paths: Sequence[str], name: str) -> None:
    for path in paths:
        try:
            os.setxattr(path, MARK, name.encode("utf-8", "surrogateescape"))
        except OSError:
            continue  # without it a run after one that was killed asks for `complete`


def _listed(node: Node) -> list[dict[str, Any]]:
    return [
        {
            "id": snapshot.id,
            "name": snapshot.name,
            "date": snapshot.date_sec + snapshot.date_nsec / 1e9,
            "size": node.size if snapshot.disk_size is None else snapshot.disk_size,
            "vm_state_size": snapshot.vm_state_size,
        }
        for snapshot in node.snapshots()
    ]


def _obstacle(node: Node) -> Optional[str]:
    from .diskwright.hooks import Hooks

    if type(node)._create_snapshot is Hooks._create_snapshot:
        return "the %s format has no internal snapshots" % node.driver
    if any(reference.role == "data-file" for reference in node.references()):
        return "an image with an external data file cannot have internal snapshots"
    return None


def chosen(want: State, snapshots: Sequence[Entry]) -> list[Entry]:
    """Those of an image's snapshots that `want` names, oldest first."""
    key = "name" if want["id"] is None else "id"
    return sorted((entry for entry in snapshots if want[key] is not None and entry[key] == want[key]), key=_age)


def _age(entry: Entry) -> tuple[float, int]:
    """Sorts snapshots by age; one that is yet to be made is the newest."""
    return (float("inf") if entry["date"] is None else entry["date"], int(entry["id"]) if entry["id"].isdecimal() else 0)


# -- what is to be done --------------------------------------------------------------------------------------------


def plan(want: State, have: State) -> list[Step]:
    """The steps from `have` to `want`; none where nothing is to do. No I/O. Raises Refusal for what cannot or may not be."""
    images = {path: dict(image) for path, image in have["images"].items()}
    steps: list[Step] = []
    if want["state"] == "present":
        steps += _creation(want, have, images)
    elif want["state"] == "applied":
        steps += _rollback(want, have, images)
    doomed = {path: _doomed(want, images[path]["snapshots"]) for path in want["paths"]}
    doomed = {path: entries for path, entries in doomed.items() if entries}
    if doomed:
        steps.append(_deletion(want, images, doomed))
    return steps


def _creation(want: State, have: State, images: dict[str, dict[str, Any]]) -> list[Step]:
    missing = [path for path in want["paths"] if not chosen(want, images[path]["snapshots"])]
    if not missing:
        return []
    steps = []
    torn = {path: chosen(want, images[path]["snapshots"]) for path in have.get("_unfinished", ()) if path not in missing}
    if torn:  # they are of another moment than those that are to be made, and nobody was told that they exist
        steps = [_deletion(want, images, torn, "a run that was killed has made it of some of the disks")]
        missing = [path for path in want["paths"] if path in missing or path in torn]
    for path in want["paths"]:
        if have["_obstacles"][path]:
            raise Refusal("%s: %s" % (path, have["_obstacles"][path]))
    others = [path for path in want["paths"] if path not in missing]
    if others and not want["complete"]:
        raise Refusal(
            "%s: there is no snapshot '%s', but %s has one: made now it would be of another moment, which needs complete"
            % (missing[0], want["name"], others[0])
        )
    name = want["name"]
    for path in missing:
        entries = images[path]["snapshots"]
        id = str(max([int(entry["id"]) for entry in entries if entry["id"].isdecimal()], default=0) + 1)
        new = {"id": id, "name": name, "date": None, "size": images[path]["size"], "vm_state_size": 0}
        images[path] = {**images[path], "snapshots": [*entries, new]}

    def run() -> None:
        with _held(want, want["paths"]) as nodes:
            if len(missing) > 1:
                _mark(missing, name)
            _all_or_none("create", name, [Creation(path, nodes[path], name) for path in missing])
        unmark(missing)

    lines = [["qemu-img", "snapshot", "-c", name, path] for path in missing]
    return [*steps, _step("create", missing, "there is no snapshot '%s'" % name, lines, images, run)]


def _rollback(want: State, have: State, images: dict[str, dict[str, Any]]) -> list[Step]:
    name = want["name"] if want["id"] is None else want["id"]
    targets = {}
    for path in want["paths"]:
        found = chosen(want, images[path]["snapshots"])
        if not found:
            raise Refusal("%s: there is no snapshot '%s'" % (path, name))
        targets[path] = found[-1]
    moved = [path for path in want["paths"] if not images[path]["holds"]]
    if not moved:
        return []
    for path in moved:
        reason = have["_obstacles"][path] or have["_rollback_obstacles"][path]
        if reason:
            raise Refusal("%s: the snapshot '%s' cannot be applied: %s" % (path, name, reason))
    if not want["allow_rollback"]:
        raise Refusal(
            "%s: the disk was changed since the snapshot '%s': going back to it destroys what the disk holds now, and needs allow_rollback"
            % (moved[0], name)
        )
    for path in moved:
        images[path] = {**images[path], "holds": True, "size": targets[path]["size"]}

    def run() -> None:
        with _held(want, want["paths"]) as nodes:
            _all_or_none("apply", name, [Rollback(path, nodes[path], targets[path]["id"], len(moved) > 1) for path in moved])

    lines = [["qemu-img", "snapshot", "-a", targets[path]["id"], path] for path in moved]
    return [_step("apply", moved, "the disk was changed since the snapshot '%s'" % name, lines, images, run)]


def _doomed(want: State, snapshots: Sequence[Entry]) -> list[Entry]:
    """Those of an image's snapshots that are to go, oldest first."""
    from fnmatch import fnmatchcase

    named = chosen(want, snapshots)
    if want["state"] == "applied":
        keeps = not want["allow_rollback"] or want["name"] == UNDO
        return [] if keeps else [entry for entry in snapshots if entry["name"] == UNDO and entry not in named]
    if want["keep"] is None:
        return named if want["state"] == "absent" else []
    order = sorted((entry for entry in snapshots if fnmatchcase(entry["name"], want["match"])), key=_age, reverse=True)
    order.sort(key=lambda entry: entry not in named)  # the one that is wanted stays, however old it is
    return sorted(order[want["keep"] :], key=_age)


def _deletion(want: State, images: dict[str, dict[str, Any]], doomed: Mapping[str, Sequence[Entry]], reason: str = "") -> Step:
    why = {"applied": "a run that was killed has left it"}.get(want["state"], "it should be absent")
    if want["keep"] is not None:
        why = "the newest %d are kept" % want["keep"]
    why = reason or why
    lines = []
    for path, entries in doomed.items():
        images[path] = {**images[path], "snapshots": [entry for entry in images[path]["snapshots"] if entry not in entries]}
        lines += [["qemu-img", "snapshot", "-d", entry["name"], path] for entry in entries]

    def run() -> None:
        with _held(want, list(doomed)) as nodes:
            for path, entries in doomed.items():
                for entry in entries:
                    with _failing("delete", entry["name"], path):
                        nodes[path].delete_snapshot(entry["name"], entry["id"])

    return _step("delete", list(doomed), why, lines, images, run)


def _step(verb: str, paths: Sequence[str], why: str, lines: Sequence[Sequence[str]], images: State, run: Callable[[], None]) -> Step:
    return Step(verb, ", ".join(paths), why, lines[0], {"images": dict(images)}, run, lines[1:])


# -- doing it ------------------------------------------------------------------------------------------------------


class Creation:
    """A snapshot that is made of one disk."""

    def __init__(self, path: str, node: Node, name: str) -> None:
        self.path, self.node, self.name = path, node, name
        self.made: Optional[Snapshot] = None

    def do(self) -> None:
        """Make it."""
        self.made = self.node.create_snapshot(self.name)

    def undo(self) -> None:
        """Take it away if it was made."""
        if self.made is not None:
            self.node.delete_snapshot(self.made.name, self.made.id)

    def finish(self) -> None:
        """Nothing is left to be done."""


class Rollback:
    """One disk that is set back; what it held is kept as a snapshot until all are."""

    def __init__(self, path: str, node: Node, id: str, reversible: bool) -> None:
        self.path, self.node, self.id, self.reversible = path, node, id, reversible
        self.kept: Optional[Snapshot] = None

    def do(self) -> None:
        """Set it back."""
        if self.reversible:
            self.kept = self.node.create_snapshot(UNDO)
        self.node.apply_snapshot(self.id)

    def undo(self) -> None:
        """Let it be what it was."""
        if self.kept is not None:
            self.node.apply_snapshot(self.kept.id)
            self.finish()

    def finish(self) -> None:
        """Forget what it was."""
        if self.kept is not None:
            self.node.delete_snapshot(self.kept.name, self.kept.id)
            self.kept = None


def _all_or_none(verb: str, name: str, changes: Sequence[Union[Creation, Rollback]]) -> None:
    """Do all `changes`, or, if one fails, none. Raises what it failed with."""
    begun: list[Union[Creation, Rollback]] = []
    try:
        for change in changes:
            begun.append(change)
            with _failing(verb, name, change.path):
                change.do()
    except BaseException:
        for change in reversed(begun):
            with _failing("undo the attempt to %s" % verb, name, change.path):
                change.undo()
        raise
    for change in changes:
        with _failing("forget what was before", name, change.path):
            change.finish()


@contextmanager
def _failing(verb: str, name: str, path: str) -> Iterator[None]:
    """What goes wrong in the block is said of the snapshot `name` of the image at `path`."""
    from .diskwright.errors import Error
    from .diskwright.graph import prefixed

    text = "%s: Could not %s snapshot '%s': " % (path, verb, name)
    try:
        yield
    except Error as exc:
        raise prefixed(text, exc, path) from exc
    except OSError as exc:
        raise Error("%s%s" % (text, exc.strerror or exc), filename=path, errno=exc.errno) from exc


@contextmanager
def _held(want: State, paths: Sequence[str]) -> Iterator[dict[str, Node]]:
    """The images, open for writing all at once, so that nobody else writes to one of them. They are closed as if all had gone
    well, whatever happens: bitmaps stay valid that way."""
    from .diskwright.graph import open_image
    from .diskwright.node import OpenFlags

    nodes: dict[str, Node] = {}
    with ExitStack() as stack:
        for path in paths:
            flags = OpenFlags(writable=True, no_backing=True, no_io=True)
            nodes[path] = open_image(os.path.abspath(path), want["format"], flags, policy=_policy.current())
            stack.callback(nodes[path].close)
        yield nodes
