# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""disk_image: what an image is, what it should be, and the steps from the one to the other."""

from __future__ import annotations

import os
import stat

from ._look import described, opened
from ._options import OWN, amendable, checked, created_size, virtual_size
from ._plan import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, Sequence

    from ._plan import Step
    from .diskwright.node import Format

    State = Mapping[str, Any]

# parameters that are taken as they are
PLAIN = ("state", "path", "format", "backing_file", "backing_format", "preallocation", "allow_shrink", "rebase", "allow_unsafe_rebase")
PLAIN += ("flatten", "commit", "allow_backing_change", "allow_data_file_change", "allow_convert")
UNTOLD = {"lazy_refcounts": "off", "data_file_raw": "off", "extended_l2": "off"}  # what an image has that tells nothing of it


def exists(path: str) -> dict[str, Any]:
    """The state of `path` as far as removing it needs to know: an image that is damaged can be removed too."""
    if not os.path.lexists(path):
        return {"state": "absent"}
    if not stat.S_ISREG(os.lstat(path).st_mode) and not os.path.islink(path):
        raise Refusal("%s is neither a file nor a link, and is not removed" % path)
    return {"state": "present"}


def observe(path: str, want: Optional[State] = None) -> dict[str, Any]:
    """The state of the image at `path`; `state` is "absent" where there is nothing. Works on images in use.

    With `want` there are more facts, which the plan for that depends on: `_backing` describes the backing file of an image that
    is yet to be made; for the others see _backing.observe and _encryption.observe. Raises Error and OSError where there is
    something that is no image, or cannot be read.
    """
    if not os.path.lexists(path):
        below = want["backing_file"] if want else None
        if want is None or below is None:
            return {"state": "absent", "_backing": None}
        from . import _backing

        return {"state": "absent", "_backing": _backing.describe(path, below, want["backing_format"])}
    with opened(path) as node:
        have = described(node, want["encryption"] if want and node.driver == want["format"] else None)
        if want:
            bitmaps = node.bitmaps() if want["options"].get("compat") == "0.10" else None
            have.update(_below(path, node, want), _amendable=amendable(node), _bitmaps=bool(bitmaps and bitmaps.all))
            have["_preallocated"] = _is_preallocated(path, node, want["preallocation"])
            if want["allow_convert"]:
                from ._extents import own_bytes

                bitmaps = node.bitmaps()
                have["_lost"] = _lost(node.snapshots(), bitmaps.all if bitmaps else ())
                have["_stored"] = own_bytes(node) if not node.encrypted else None
        return have


def _below(path: str, node: Format, want: State) -> dict[str, Any]:
    """See _backing.observe, of which nothing is needed where the backing file is as it should be."""
    if not want["flatten"] and not want["commit"] and _has_backing(want, node.backing_filename, node.backing_format):
        return {"_new": None, "_moved": False, "_data": False}
    from . import _backing

    return _backing.observe(path, node, want)


def _has_backing(want: State, name: Optional[str], format: Optional[str]) -> bool:
    """Whether nothing else is wanted, word for word."""
    return want["backing_file"] is None or (want["backing_file"] == name and want["backing_format"] in (None, format))


def _is_preallocated(path: str, node: Format, mode: str) -> bool:
    """Whether the image has the room in advance that `mode` asks for, as far as its format lets one see it."""
    from .diskwright.extent import ALLOCATED

    if mode == "off" or node.driver not in ("raw", "qcow2"):
        return True
    if mode != "metadata":
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return True
        if status.st_blocks * 512 < node.size:
            return False
    position = 0
    while node.driver == "qcow2" and position < node.size:
        for extent in node.block_status(position, node.size - position, False, 1024):
            if not extent.status & ALLOCATED:
                return False
            position = extent.offset + extent.length
    return True


def _lost(snapshots: Sequence[Any], bitmaps: Sequence[Any]) -> list[str]:
    """What a conversion would not take along."""
    found = ["%d internal snapshots" % len(snapshots)] if snapshots else []
    return [*found, "%d dirty bitmaps" % len(bitmaps)] if bitmaps else found


def wanted(params: Mapping[str, Any]) -> dict[str, Any]:
    """The wanted state from the module's parameters, checked. Raises OptionError in QEMU's words, Refusal."""
    if params["state"] == "absent":
        return {"state": "absent", "path": params["path"]}
    from .diskwright.drivers import lookup_format
    from .diskwright.errors import OptionError

    options = checked(params["format"], params["options"], OWN)
    cls = lookup_format(params["format"])
    for name in ("backing_file", "flatten", "commit"):
        if params[name] not in (None, False) and not cls.supports_backing:
            raise OptionError("Backing file not supported for file format '%s'" % params["format"])
    if params["backing_file"] == "":
        raise Refusal("backing_file: the name is empty; flatten is for an image without a backing file")
    if params["flatten"] and params["commit"]:
        raise Refusal("flatten and commit exclude each other: what an image holds is either its own or its backing file's")
    encryption = params["encryption"]
    want = {key: params.get(key, False) for key in PLAIN}
    want.update(size=created_size(params["format"], virtual_size(params["size"]), options), options=options, private=params["mode"] is not None)
    want["encryption"] = None
    if encryption is not None:
        from ._encryption import Encryption

        want["encryption"] = Encryption(encryption, cls)
    want["backing_encryption"] = params.get("backing_encryption")
    if want["backing_encryption"] is not None and params["flatten"] is False and params["commit"] is False and params["rebase"] != "safe":
        raise Refusal("backing_encryption opens the backing file for flatten, commit and rebase=safe, and is for nothing else")
    return want


def named_files(params: Mapping[str, Any]) -> list[str]:
    """The files that the parameters of one image name besides itself, which they so allow to be opened."""
    folder = os.path.dirname(os.path.abspath(params["path"]))
    names = [params.get("backing_file"), (params.get("options") or {}).get("data_file")]
    return [os.path.join(folder, name) for name in names if isinstance(name, str) and name]


def satisfied(want: State, have: State) -> bool:
    """Whether it can be seen at once that there is nothing to do; what there is to do is known to _steps.py only."""
    if want["state"] != have["state"] or want["state"] == "absent":
        return want["state"] == have["state"]
    if want["format"] != have["format"] or want["encryption"] is not None or want["commit"] or want["size"] not in (None, have["size"]):
        return False
    if (want["flatten"] and have["backing_file"] is not None) or not _has_backing(want, have["backing_file"], have["backing_format"]):
        return False
    for key, value in want["options"].items():
        present = have["options"].get(key, UNTOLD.get(key))
        if present != value and (present is not None or key in have["_amendable"]):
            return False
    return bool(have.get("_preallocated", True))


def plan(want: State, have: State) -> list[Step]:
    """The steps from `have` to `want`; none where nothing is to do. No I/O. Raises Refusal for what cannot or may not be."""
    if satisfied(want, have):
        return []
    from ._steps import plan as all_steps

    return all_steps(want, have)
