# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""disk_image: what an image is, what it should be, and the steps from the one to the other."""

from __future__ import annotations

import os

from . import _backing, _encryption
from ._options import OWN, amendable, checked, created_size, joined, stored, virtual_size
from ._plan import Refusal, Step, after
from .diskwright.parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    State = Mapping[str, Any]

# parameters that are taken as they are
PLAIN = ("state", "path", "format", "backing_file", "backing_format", "preallocation", "allow_shrink", "rebase", "allow_unsafe_rebase")
PLAIN += ("flatten", "commit", "allow_backing_change", "allow_data_file_change")
UNTOLD = {"lazy_refcounts": "off", "data_file_raw": "off", "extended_l2": "off"}  # what an image has that tells nothing of it
VERSION_3 = {"lazy_refcounts": "off", "extended_l2": "off"}  # what only images with compat=1.1 tell, and have at first


def exists(path: str) -> dict[str, Any]:
    """The state of `path` as far as removing it needs to know: an image that is damaged can be removed too."""
    import stat

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
        return {"state": "absent", "_backing": _backing.describe(path, want["backing_file"], want["backing_format"]) if want else None}
    if not os.path.exists(path):
        raise Refusal("%s is a symbolic link to %s, which does not exist" % (path, os.path.realpath(path)))
    from .diskwright.graph import open_image

    with open_image(os.path.abspath(path), flags=_backing.looking()) as node:
        have = {
            "state": "present",
            "format": node.driver,
            "size": node.size,
            "backing_file": node.backing_filename,
            "backing_format": node.backing_format,
            "options": stored(node),
            **_encryption.observe(node, want["encryption"] if want and node.driver == want["format"] else None),
        }
        if want:
            bitmaps = node.bitmaps() if want["options"].get("compat") == "0.10" else None
            have.update(_backing.observe(path, node, want), _amendable=amendable(node), _bitmaps=bool(bitmaps and bitmaps.all))
        return have


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
    want = {key: params[key] for key in PLAIN}
    want.update(size=created_size(params["format"], virtual_size(params["size"]), options), options=options, private=params["mode"] is not None)
    want["encryption"] = None if encryption is None else _encryption.Encryption(encryption, cls)
    return want


def plan(want: State, have: State) -> list[Step]:
    """The steps from `have` to `want`; none where nothing is to do. No I/O. Raises Refusal for what cannot or may not be."""
    path = want["path"]
    if want["state"] == "absent":
        return [] if have["state"] == "absent" else [_remove(path)]
    if have["state"] == "absent":
        if want["commit"] and want["backing_file"] is None:
            raise Refusal("%s would have no backing file that commit could write into" % path)
        return [_create(want, have)]
    if want["format"] != have["format"]:
        raise Refusal(
            "%s is a %s image and %s is wanted: convert it with diskwright.images.image_convert, or remove it first"
            % (path, have["format"], want["format"])
        )
    keys = _encryption.plan(want, have)
    address = _encryption.Address(path, want["format"], want["encryption"])
    rebased = _backing.plan(want, have, address)
    have = after(have, rebased)
    if want["commit"] and have["backing_file"] is None:
        raise Refusal("%s has no backing file that commit could write into" % path)
    steps = [*rebased, *_amendment(want, have, address), *_resize(want, have, address), *_backing.commit(want, have, bool(rebased), address)]
    if steps and have["encryption"] is not None and want["encryption"] is None:
        raise Refusal("%s is encrypted: changing it (%s) needs encryption.passphrase" % (path, ", ".join(step.verb for step in steps)))
    return keys + steps


def _remove(path: str) -> Step:
    def run() -> None:
        from ._record import remove

        remove(path)

    return Step("remove", path, "it should be absent", ["rm", "--", path], {"state": "absent"}, run)


def _create(want: State, have: State) -> Step:
    path, size, format, why = want["path"], want["size"], want["backing_format"], "it does not exist"
    if size is None and want["backing_file"] is None:
        raise Refusal("%s does not exist, and without a size or a backing file it cannot be created" % path)
    options = dict(want["options"])
    argv = ["qemu-img", "create", "-f", want["format"]]
    objects: Mapping[str, Any] = {}
    encryption = want["encryption"]
    if encryption is not None:
        options.update(encryption.creation_options())
        argv += encryption.words(_encryption.KEY)
        objects = encryption.objects
    elif want["format"] == "luks":
        raise Refusal("%s does not exist, and without encryption.passphrase a luks image cannot be created" % path)
    if want["preallocation"] != "off":
        options["preallocation"] = want["preallocation"]
    if want["backing_file"] is not None:
        if have["_backing"]:
            size = have["_backing"]["size"] if size is None else size
            format = format or have["_backing"]["format"]
        else:
            why += ", nor yet does its backing file"
        argv += ["-b", want["backing_file"], *(["-F", format] if format else [])]
    text = joined(options)
    argv += ["-o", text] if text else []
    argv += [path, *([str(want["size"])] if want["size"] is not None else [])]

    def run() -> None:
        from .diskwright.beside import beside
        create = part(__package__, "diskwright.commands.create").create

        with beside(path, want["private"]) as temporary:
            create(temporary, want["size"], format=want["format"], options=text, backing=want["backing_file"], backing_format=format, objects=objects)

    change = {key: want[key] for key in ("state", "format", "backing_file", "options")}
    change.update(size=size, backing_format=format, encryption=None, _data=False, _bitmaps=False, _amendable=list(want["options"]))
    if encryption is not None:
        change.update(encryption="luks", key_slots=1, _slots=[0], _old_slots=[])
    return Step("create", path, why, argv, change, run)


def _amendment(want: State, have: State, address: _encryption.Address) -> list[Step]:
    """The step that changes options in place. Raises Refusal for those that cannot be changed."""
    path, changes = want["path"], {}
    for key, value in want["options"].items():
        present = have["options"].get(key, UNTOLD.get(key))
        if present == value or (present is None and key not in have["_amendable"]):
            continue
        fixed = key not in have["_amendable"] or (key == "data_file" and present is None) or (key == "data_file_raw" and value == "on")
        if fixed:
            raise Refusal("%s has %s=%s and %s is wanted: that cannot be changed in place" % (path, key, present, value))
        if key == "data_file" and not want["allow_data_file_change"]:
            raise Refusal("%s has data_file=%s: naming another one changes what it reads as, and needs allow_data_file_change" % (path, present))
        changes[key] = value
    if not changes:
        return []
    options = {**have["options"], **changes}
    if options.get("compat") == "0.10":
        _refuse_version_3(path, options, have)
        options = {key: value for key, value in options.items() if key not in VERSION_3}
    elif changes.get("compat") == "1.1":
        options = {**VERSION_3, **options}
    text = joined(changes) or ""

    def run() -> None:
        amend = part(__package__, "diskwright.commands.amend").amend

        amend(address.name, text, **address.arguments)

    why = "it has " + ", ".join("%s=%s" % (key, have["options"].get(key, UNTOLD.get(key))) for key in changes)
    return [Step("amend", path, why, ["qemu-img", "amend", *address.words, "-o", text, address.operand], {"options": options}, run)]


def _refuse_version_3(path: str, options: State, have: State) -> None:
    """Raise Refusal for what an image with compat=0.10 cannot have."""
    reasons = ["%s=%s" % (key, options[key]) for key in VERSION_3 if key != "lazy_refcounts" and options.get(key, "off") != "off"]
    if options.get("lazy_refcounts") == "on" and have["options"].get("lazy_refcounts") != "on":
        reasons.append("lazy_refcounts=on")
    if options.get("refcount_bits", "16") != "16":
        reasons.append("refcount_bits=%s" % options["refcount_bits"])
    reasons += ["data_file=%s" % options["data_file"]] if "data_file" in options else []
    reasons += ["dirty bitmaps"] if have["_bitmaps"] else []
    if reasons:
        raise Refusal("%s: an image with compat=0.10 cannot have %s" % (path, ", ".join(reasons)))


def _resize(want: State, have: State, address: _encryption.Address) -> list[Step]:
    size, path = want["size"], want["path"]
    if size is None or size == have["size"]:
        return []
    grows = size > have["size"]
    if not grows and not want["allow_shrink"]:
        raise Refusal(
            "%s is %d bytes large and %d are wanted: shrinking destroys what lies beyond the new end, and needs allow_shrink"
            % (path, have["size"], size)
        )
    argv = ["qemu-img", "resize", *address.words, *([] if grows else ["--shrink"])]
    preallocation = want["preallocation"] if grows else "off"
    if preallocation != "off":
        argv += ["--preallocation", preallocation]
    why = "it is %d bytes large and %d are wanted" % (have["size"], size)

    def run() -> None:
        resize = part(__package__, "diskwright.commands.resize").resize

        resize(address.name, size, shrink=not grows, preallocation=preallocation, **address.arguments)

    return [Step("resize", path, why, [*argv, address.operand, str(size)], {"size": size}, run)]
