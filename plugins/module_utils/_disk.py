# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""disk_image: what an image is, what it should be, and the steps from the one to the other."""

from __future__ import annotations

import os

from ._options import checked, joined, stored, virtual_size
from ._plan import Refusal, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    from .diskwright.node import OpenFlags

    State = Mapping[str, Any]


def exists(path: str) -> dict[str, Any]:
    """The state of `path` as far as removing it needs to know: an image that is damaged can be removed too."""
    import stat

    if not os.path.lexists(path):
        return {"state": "absent"}
    if not stat.S_ISREG(os.lstat(path).st_mode) and not os.path.islink(path):
        raise Refusal("%s is neither a file nor a link, and is not removed" % path)
    return {"state": "present"}


def observe(path: str, backing_file: Optional[str] = None) -> dict[str, Any]:
    """The state of the image at `path`; `state` is "absent" where there is nothing. Works on images in use.

    With a `backing_file` that is wanted there are two more facts: `_backing`, its format and size for an image that is yet
    to be made (None if it does not exist), and `_moved`, whether the backing file of an existing image is to be found
    under that name instead: it is gone from its old place, or the two names hold the same content. Raises Error and
    OSError where there is something that is no image, or cannot be read.
    """
    if not os.path.lexists(path):
        return {"state": "absent", "_backing": backing_file and _backing(path, backing_file)}
    if not os.path.exists(path):
        raise Refusal("%s is a symbolic link to %s, which does not exist" % (path, os.path.realpath(path)))
    from .diskwright.graph import open_image

    with open_image(os.path.abspath(path), flags=_looking()) as node:
        return {
            "state": "present",
            "format": node.driver,
            "size": node.size,
            "backing_file": node.backing_filename,
            "backing_format": node.backing_format,
            "options": stored(node),
            "_moved": _moved(path, node.backing_filename, backing_file),
        }


def _looking() -> OpenFlags:
    """How an image is opened whose metadata alone are of interest, whoever else uses it."""
    from .diskwright.node import OpenFlags

    return OpenFlags(no_backing=True, no_io=True, force_share=True)


def _backing(path: str, name: str) -> Optional[dict[str, Any]]:
    """Format and size of the backing file `name` of an image at `path`; None if there is no such file."""
    full = os.path.join(os.path.dirname(os.path.abspath(path)), name)
    if not os.path.exists(full):
        return None
    from .diskwright.graph import open_image

    with open_image(full, flags=_looking()) as node:
        return {"format": node.driver, "size": node.size}


def _moved(path: str, old: Optional[str], new: Optional[str]) -> bool:
    from .diskwright.graph import protocol_prefix

    if old is None or new is None or _same_file(path, old, new) or protocol_prefix(old) is not None:
        return False
    folder = os.path.dirname(os.path.abspath(path))
    old, new = os.path.join(folder, old), os.path.join(folder, new)
    if not os.path.exists(new):
        return False
    if not os.path.exists(old) or os.path.samefile(old, new):
        return True  # two names of one file, or nothing left to compare with
    from .diskwright.commands.compare import compare

    return bool(compare(old, new, strict=False, force_share=True).identical)


def wanted(params: Mapping[str, Any]) -> dict[str, Any]:
    """The wanted state from the module's parameters, checked. Raises OptionError in QEMU's words."""
    if params["state"] == "absent":
        return {"state": "absent", "path": params["path"]}
    from .diskwright.drivers import lookup_format
    from .diskwright.errors import OptionError

    options = checked(params["format"], params["options"], ("size", "backing_file", "backing_fmt", "preallocation"))
    if params["backing_file"] is not None and not lookup_format(params["format"]).supports_backing:
        raise OptionError("Backing file not supported for file format '%s'" % params["format"])
    return {
        "state": "present",
        "path": params["path"],
        "format": params["format"],
        "size": virtual_size(params["size"]),
        "backing_file": params["backing_file"],
        "backing_format": params["backing_format"],
        "options": options,
        "preallocation": params["preallocation"],
        "allow_shrink": params["allow_shrink"],
        "rebase": params["rebase"],
        "private": params["mode"] is not None,
    }


def plan(want: State, have: State) -> list[Step]:
    """The steps from `have` to `want`; none where nothing is to do. No I/O. Raises Refusal for what cannot or may not be."""
    path = want["path"]
    if want["state"] == "absent":
        return [] if have["state"] == "absent" else [_remove(path)]
    if have["state"] == "absent":
        if want["size"] is None and want["backing_file"] is None:
            raise Refusal("%s does not exist, and without a size or a backing file it cannot be created" % path)
        return [_create(want, have)]
    _refuse_what_cannot_change(want, have)
    steps = []
    if want["backing_file"] is not None and not _has_backing(want, have):
        steps.append(_follow(want, have))
    size = want["size"]
    if size is None or size == have["size"]:
        return steps
    if size < have["size"] and not want["allow_shrink"]:
        raise Refusal(
            "%s is %d bytes large and %d are wanted: shrinking destroys what lies beyond the new end, and needs allow_shrink"
            % (path, have["size"], size)
        )
    return steps + [_resize(want, have)]


def _refuse_what_cannot_change(want: State, have: State) -> None:
    path = want["path"]
    if want["format"] != have["format"]:
        raise Refusal(
            "%s is a %s image and %s is wanted: convert it with diskwright.images.image_convert, or remove it first"
            % (path, have["format"], want["format"])
        )
    for key, value in want["options"].items():
        present = have["options"].get(key)
        if present is not None and present != value:
            raise Refusal("%s has %s=%s and %s is wanted: that cannot be changed in place" % (path, key, present, value))
    if want["backing_file"] is None:
        return
    if not _has_backing(want, have) and not _may_follow(want, have):
        raise Refusal(
            "%s has %s and '%s' is wanted: that is not changed unless rebase allows it and the content is the same"
            % (path, "the backing file '%s'" % have["backing_file"] if have["backing_file"] else "no backing file", want["backing_file"])
        )
    if want["backing_format"] is not None and have["backing_format"] not in (None, want["backing_format"]):
        raise Refusal("%s has the backing format %s and %s is wanted" % (path, have["backing_format"], want["backing_format"]))


def _has_backing(want: State, have: State) -> bool:
    return have["backing_file"] is not None and _same_file(want["path"], want["backing_file"], have["backing_file"])


def _may_follow(want: State, have: State) -> bool:
    """Whether the reference to the backing file may be rewritten: it has moved, and following it was allowed."""
    return want["rebase"] == "moved" and have["backing_file"] is not None and bool(have["_moved"])


def _same_file(path: str, name: str, other: str) -> bool:
    """Whether two backing file names mean the same file, relative ones being relative to the image; by name only."""
    folder = os.path.dirname(os.path.abspath(path))
    return os.path.normpath(os.path.join(folder, name)) == os.path.normpath(os.path.join(folder, other))


def _remove(path: str) -> Step:
    def run() -> None:
        from ._record import remove

        remove(path)

    return Step("remove", path, "it should be absent", ["rm", "--", path], {"state": "absent"}, run)


def _create(want: State, have: State) -> Step:
    options = dict(want["options"])
    if want["preallocation"] != "off":
        options["preallocation"] = want["preallocation"]
    size, format, why = want["size"], want["backing_format"], "it does not exist"
    argv = ["qemu-img", "create", "-f", want["format"]]
    if want["backing_file"] is not None:
        if have["_backing"]:
            size = have["_backing"]["size"] if size is None else size
            format = format or have["_backing"]["format"]
        else:
            why += ", nor yet does its backing file"
        argv += ["-b", want["backing_file"], *(["-F", format] if format else [])]
    text = joined(options)
    argv += ["-o", text] if text else []
    argv += [want["path"], *([str(want["size"])] if want["size"] is not None else [])]

    def run() -> None:
        from .diskwright.beside import beside
        from .diskwright.commands.create import create

        with beside(want["path"], want["private"]) as temporary:
            create(temporary, want["size"], format=want["format"], options=text, backing=want["backing_file"], backing_format=format)

    change = {key: want[key] for key in ("state", "format", "backing_file", "options")}
    return Step("create", want["path"], why, argv, {**change, "size": size, "backing_format": format}, run)


def _follow(want: State, have: State) -> Step:
    format = want["backing_format"] or have["backing_format"]
    argv = ["qemu-img", "rebase", "-u", "-f", want["format"], "-b", want["backing_file"], *(["-F", format] if format else []), want["path"]]

    def run() -> None:
        from .diskwright.image import open_node

        with open_node(os.path.abspath(want["path"]), "r+", format=want["format"], backing=False) as node:
            node.change_backing(want["backing_file"], format)

    why = "its backing file '%s' has moved" % have["backing_file"]
    return Step("rebase", want["path"], why, argv, {"backing_file": want["backing_file"], "backing_format": format}, run)


def _resize(want: State, have: State) -> Step:
    grows = want["size"] > have["size"]
    argv = ["qemu-img", "resize", "-f", want["format"]]
    if not grows:
        argv.append("--shrink")
    preallocation = want["preallocation"] if grows else "off"
    if preallocation != "off":
        argv += ["--preallocation", preallocation]
    why = "it is %d bytes large and %d are wanted" % (have["size"], want["size"])

    def run() -> None:
        from .diskwright.commands.resize import resize

        resize(os.path.abspath(want["path"]), want["size"], format=want["format"], shrink=not grows, preallocation=preallocation)

    return Step("resize", want["path"], why, argv + [want["path"], str(want["size"])], {"size": want["size"]}, run)
