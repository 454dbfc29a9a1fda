# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""disk_image: the steps from what an image is to what it should be, where that is not the same."""

from __future__ import annotations

import os

from . import _backing, _encryption, _policy, _progress
from ._disk import UNTOLD
from ._options import joined
from ._plan import Refusal, Step, after
from .diskwright.parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping

    State = Mapping[str, Any]

VERSION_3 = {"lazy_refcounts": "off", "extended_l2": "off"}  # what only images with compat=1.1 tell, and have at first


def plan(want: State, have: State) -> list[Step]:
    """The steps from `have` to `want`; none where nothing is to do. No I/O. Raises Refusal for what cannot or may not be."""
    path = want["path"]
    if want["state"] == "absent":
        return [] if have["state"] == "absent" else [_remove(path)]
    if have["state"] == "absent":
        if want["commit"] and want["backing_file"] is None:
            raise Refusal("%s would have no backing file that commit could write into" % path)
        return [_create(want, have)]
    keys = _encryption.plan(want, have) if want["format"] == have["format"] else []
    made = _conversion(want, have)
    have = after(have, made)
    given = want.get("backing_encryption")
    backing = None if given is None else _encryption.Backing(given, have["backing_format"])
    address = _encryption.Address(path, want["format"], want["encryption"], backing=backing)
    rebased = _backing.plan(want, have, address)
    have = after(have, rebased)
    if want["commit"] and have["backing_file"] is None:
        raise Refusal("%s has no backing file that commit could write into" % path)
    amended = _amendment(want, have, address)
    resized = _resize(want, have, address)
    steps = [*rebased, *amended, *resized, *_preallocation(want, after(have, resized)), *_backing.commit(want, have, bool(rebased), address)]
    if (steps or made) and have["encryption"] is not None and want["encryption"] is None:
        verbs = ", ".join(step.verb for step in made + steps)
        raise Refusal("%s is encrypted: changing it (%s) needs encryption.passphrase" % (path, verbs))
    return keys + made + steps


def _fixed(want: State, have: State) -> dict[str, str]:
    """The options that are wanted otherwise and cannot be changed in place, with what they are."""
    found = {}
    for key, value in want["options"].items():
        present = have["options"].get(key, UNTOLD.get(key))
        if present == value or (present is None and key not in have["_amendable"]):
            continue
        if key not in have["_amendable"] or (key == "data_file" and present is None) or (key == "data_file_raw" and value == "on"):
            found[key] = present
    return found


def _conversion(want: State, have: State) -> list[Step]:
    """The step that makes the image anew from itself, where nothing less will do. Raises Refusal where that may not or cannot be."""
    path, fixed = want["path"], {}
    if want["format"] != have["format"]:
        why = "it is a %s image and %s is wanted" % (have["format"], want["format"])
        refusal = "%s is a %s image and %s is wanted: that takes a conversion, which needs allow_convert" % (path, have["format"], want["format"])
    else:
        fixed = _fixed(want, have)
        for key, present in fixed.items():
            if not want["allow_convert"] or key in ("data_file", "data_file_raw"):
                text = "%s has %s=%s and %s is wanted: that cannot be changed in place" % (path, key, present, want["options"][key])
                raise Refusal(text if key in ("data_file", "data_file_raw") else text + ", and a conversion needs allow_convert")
        why = "it has " + ", ".join("%s=%s" % pair for pair in fixed.items())
        refusal = ""
        if not fixed and (have.get("_preallocated", True) or want["format"] == "raw" or not want["allow_convert"]):
            return []
        if not fixed:
            why = "it has not the room in advance that preallocation=%s asks for" % want["preallocation"]
    if not want["allow_convert"]:
        raise Refusal(refusal)
    if have["_lost"]:
        raise Refusal("%s has %s, which a conversion would lose" % (path, " and ".join(have["_lost"])))
    if have["encryption"] is not None or want["encryption"] is not None:
        raise Refusal("%s: an encrypted image is not converted in its place: use image_convert" % path)
    if "data_file" in have["options"]:
        raise Refusal("%s has an external data file, and is not converted in its place" % path)
    return [_convert(want, have, why)]


def _convert(want: State, have: State, why: str) -> Step:
    path, backing, format = want["path"], have["backing_file"], have["backing_format"]
    from .diskwright.drivers import lookup_format

    options = dict(want["options"])
    if want["format"] == have["format"]:
        told = {key: value for key, value in have["options"].items() if key not in ("compression_type",)}
        options = {**told, **options}
    if backing is not None and not lookup_format(want["format"]).supports_backing:
        raise Refusal("%s has a backing file, and a %s image cannot have one: flatten it first" % (path, want["format"]))
    if want["preallocation"] != "off":
        options["preallocation"] = want["preallocation"]
    text = joined(options)
    argv = ["qemu-img", "convert", "-f", have["format"], "-O", want["format"], *(["-o", text] if text else [])]
    if backing is not None:
        argv += ["-B", backing, *(["-F", format] if format else [])]

    def run() -> None:
        from .diskwright.beside import beside

        convert = part(__package__, "diskwright.commands.convert").convert
        full = os.path.abspath(path)
        before = os.stat(full)
        with beside(path) as temporary:
            convert(
                [full],
                temporary,
                format=have["format"],
                target_format=want["format"],
                options=text,
                backing=backing,
                backing_format=format,
                policy=_policy.current(),
                progress=_progress.tell,
            )
            now = os.stat(full)
            if (now.st_ino, now.st_size, now.st_mtime_ns) != (before.st_ino, before.st_size, before.st_mtime_ns):
                raise Refusal("%s was changed while it was being converted" % path)

    kept = have["options"] if want["format"] == have["format"] else {}
    change = {"format": want["format"], "options": {**kept, **want["options"]}, "_preallocated": True, "_amendable": list(want["options"])}
    return Step("convert", path, why, [*argv, path, path + ".new"], change, run, [["mv", path + ".new", path]], cost=have["_stored"])


def _preallocation(want: State, have: State) -> list[Step]:
    """The step that gives a raw image its room; other formats have it from their conversion."""
    if have.get("_preallocated", True) or have["format"] != "raw":
        return []
    path = want["path"]

    def run() -> None:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(handle, 0, have["size"])
        finally:
            os.close(handle)

    why = "it has not the room in advance that preallocation=%s asks for" % want["preallocation"]
    argv = ["fallocate", "-l", str(have["size"]), path]
    return [Step("allocate", path, why, argv, {"_preallocated": True}, run, cost=have["size"])]


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
            create(
                temporary,
                want["size"],
                format=want["format"],
                options=text,
                backing=want["backing_file"],
                backing_format=format,
                objects=objects,
                policy=_policy.current(),
            )

    change = {key: want[key] for key in ("state", "format", "backing_file", "options")}
    change.update(size=size, backing_format=format, encryption=None, _data=False, _bitmaps=False, _amendable=list(want["options"]))
    if encryption is not None:
        change.update(encryption="luks", key_slots=1, _slots=[0], _old_slots=[])
    cost = size if want["preallocation"] in ("falloc", "full") else 0
    return Step("create", path, why, argv, change, run, cost=cost)


def _amendment(want: State, have: State, address: _encryption.Address) -> list[Step]:
    """The step that changes options in place. Raises Refusal for those that may not be changed."""
    path, changes = want["path"], {}
    for key, value in want["options"].items():
        present = have["options"].get(key, UNTOLD.get(key))
        if present == value or (present is None and key not in have["_amendable"]):
            continue
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

        amend(address.name, text, progress=_progress.tell, **address.arguments)

    why = "it has " + ", ".join("%s=%s" % (key, have["options"].get(key, UNTOLD.get(key))) for key in changes)
    return [Step("amend", path, why, ["qemu-img", "amend", *address.words, "-o", text, address.operand], {"options": options}, run, cost=0)]


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

    cost = size - have["size"] if preallocation in ("falloc", "full") else 0
    return [Step("resize", path, why, [*argv, address.operand, str(size)], {"size": size}, run, cost=cost)]
