# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_convert: whether a destination is up to date, and the conversion that it needs if not."""

from __future__ import annotations

import os

from . import _content, _policy, _progress, _record
from ._encryption import BACKING_KEY, KEY, SOURCE_KEY, Address, Encryption, key_of, opening
from ._look import observe as observe_disk
from ._options import ENCRYPTION, checked, joined, virtual_size
from ._plan import Refusal, Step
from .diskwright.beside import beside
from .diskwright.parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    State = Mapping[str, Any]


def wanted(params: Mapping[str, Any]) -> dict[str, Any]:
    """The wanted state from the module's parameters, checked. Raises OptionError."""
    if os.path.realpath(params["dest"]) in map(os.path.realpath, params["src"]):
        raise Refusal("%s is source and destination at once" % params["dest"])
    if not params["src"]:
        raise Refusal("src: at least one image is needed")
    for key, name in (("up_to_date", "content"), ("up_to_date", "checksum"), ("content_checksum", True), ("content_file", True)):
        if len(params["src"]) > 1 and params[key] == name:
            raise Refusal("%s=%s needs a single source" % (key, str(name).lower()))
    if params["content_checksum"] and params["changed"] is not None:
        raise Refusal("content_checksum is that of a whole disk, of which changed copies a part")
    for key in ("src_encryption", "backing_encryption"):
        if params[key] is not None and (len(params["src"]) > 1 or params["src_format"] is None):
            raise Refusal("%s needs a single source, and its src_format" % key)
    keys = ("src", "src_format", "dest", "format", "compress", "up_to_date", "replace", "backing_file", "backing_format", "changed", "disk")
    keys += ("verify_manifest", "content_checksum", "content_file", "src_encryption", "backing_encryption")
    from .diskwright.drivers import lookup_format

    options = checked(params["format"], params["options"], ("size", "backing_file", "backing_fmt", *ENCRYPTION))
    given = params["encryption"]
    encryption = None if given is None else Encryption(given, lookup_format(params["format"]))
    if encryption is None and params["format"] == "luks":
        raise Refusal("%s: without encryption.passphrase a luks image cannot be created" % params["dest"])
    if encryption is not None and params["compress"]:
        raise Refusal("compress and encryption exclude each other: compressed data is not encrypted")
    if params["changed"] is not None and (len(params["src"]) > 1 or params["backing_file"] is None):
        raise Refusal("changed needs a single source, and a backing_file that has what did not change")
    if (params["disk"] is not None or params["verify_manifest"]) and params["src_format"] not in PACKAGES:
        raise Refusal("disk and verify_manifest go with src_format=ova and src_format=ovf")
    size = virtual_size(params["size"])
    checksum = params["checksum"]
    if checksum is not None:
        _algorithm(checksum)
        if len(params["src"]) > 1:
            raise Refusal("checksum needs a single source")
    want = {**{key: params[key] for key in keys}, "options": options, "size": size, "checksum": checksum, "encryption": encryption}
    return {**want, "private": params["mode"] is not None}


PACKAGES = ("ova", "ovf")


def names(want: State) -> list[str]:
    """The sources as the library's functions take them."""
    paths = [os.path.abspath(path) for path in want["src"]]
    chosen = {"disk": want["disk"], "verify": "on" if want["verify_manifest"] else None}
    given = {key: value for key, value in chosen.items() if value is not None}
    if want["src_encryption"] is not None:
        given[key_of(want["src_format"])] = SOURCE_KEY
    if want["backing_encryption"] is not None:
        given["backing." + key_of(None)] = BACKING_KEY
    if not given:
        return paths
    from .diskwright.json_text import dumps

    package = {"driver": want["src_format"], **given}
    return ["json:" + dumps({**package, "file": {"driver": "file", "filename": path}}) for path in paths]


def secrets(want: State) -> dict[str, Any]:
    """What opens the sources and their backing files."""
    return {**opening(want["src_encryption"], SOURCE_KEY), **opening(want["backing_encryption"], BACKING_KEY)}


def _algorithm(checksum: str) -> str:
    """The name of the algorithm in ALGORITHM:HEX. Raises Refusal."""
    import hashlib

    name, colon, digest = checksum.partition(":")
    if not colon or name not in hashlib.algorithms_available or name.startswith("shake") or not digest:
        raise Refusal("checksum: '%s' is not ALGORITHM:HEX with an algorithm that this Python has" % checksum)
    return name


def _verify(path: str, checksum: str) -> None:
    """Raise Refusal unless the file at `path` has the checksum."""
    import hashlib

    total = hashlib.new(_algorithm(checksum))
    with open(path, "rb") as file:
        while True:
            piece = file.read(1 << 20)
            if not piece:
                break
            total.update(piece)
    found = "%s:%s" % (_algorithm(checksum), total.hexdigest())
    if found != checksum.lower():
        raise Refusal("%s has the checksum %s, not %s" % (path, found, checksum))


def request(want: State) -> dict[str, Any]:
    """What of the wanted state decides what the destination looks like."""
    form = {key: want[key] for key in ("src_format", "checksum", "format", "options", "size", "compress", "backing_file", "backing_format")}
    form.update((key, want[key]) for key in ("changed", "disk") if want[key] is not None)
    form.update((key, True) for key in ("content_file",) if want[key])
    return form if want["encryption"] is None else {**form, "encrypted": True}


def identities(want: State) -> list[dict[str, Any]]:
    """What tells the present versions of the sources and their backing files from others, without reading them. Raises
    Error and OSError."""
    from .diskwright.describe import info

    found: list[dict[str, Any]] = []
    quick = {**want, "verify_manifest": False, "src_encryption": None, "backing_encryption": None}  # looking takes no passphrase
    for name in names(quick):
        for record in info(name, format=want["src_format"], backing_chain=True, force_share=True, policy=_policy.current()):
            _policy.check_size(record.filename, record.virtual_size)
            for path in dict.fromkeys(map(os.path.realpath, _files(record.as_dict()))):
                identity: dict[str, Any] = {"path": path}
                if os.path.exists(path):  # else it is no plain file, and its name must do
                    status = os.stat(path)
                    identity.update(inode=status.st_ino, size=status.st_size, mtime_ns=status.st_mtime_ns)
                found.append(identity)
    return found


def _files(record: Mapping[str, Any]) -> list[str]:
    """The names of an image and of the nodes that hold it: data files and extents are files of their own."""
    own = record["filename"]
    return [*([] if own.startswith("json:") else [own]), *(name for child in record.get("children", ()) for name in _files(child["info"]))]


def observe(want: State) -> dict[str, Any]:
    """The state of the destination; `current` says whether it is up to date, `_reason` why not."""
    have = observe_disk(want["dest"])
    if have["state"] == "absent":
        identities(want)  # a source that is missing or no image is an error in check mode too
        return {**have, "current": False, "_reason": "it does not exist", "_data": _data(want)}
    reason = _difference_in_form(want, have)
    if not reason and want["up_to_date"] == "source":
        reason = _difference_from_record(want)
    elif not reason and want["up_to_date"] == "content":
        reason = _difference_in_content(want)
    elif not reason and want["up_to_date"] == "checksum":
        reason = _content.difference(want["dest"], lambda: _content.of_source(want["src"][0], lambda: _open_source(want)))
    return {**have, "current": not reason, "_reason": reason, "_data": _data(want) if reason else 0}


def _open_source(want: State) -> Any:
    from .diskwright.graph import open_image
    from .diskwright.node import OpenFlags

    name = names(want)[0]
    format = None if name.startswith("json:") else want["src_format"]
    return open_image(name, format, OpenFlags(force_share=True), policy=_policy.current(), objects=secrets(want))


def _data(want: State) -> Optional[int]:
    """How many bytes of data the sources hold; None where that cannot be told without reading them. Raises Denied for more than the
    task allows."""
    from ._extents import data_bytes

    if want["changed"] is not None or want["verify_manifest"]:
        return None
    total = 0
    for path in want["src"]:
        with _open_source({**want, "src": [path]}) as node:
            if node.streamed:
                return None
            content = data_bytes(node)
            _policy.check_expansion(path, content, os.path.getsize(path))
            total += content
    return total


def _difference_in_form(want: State, have: State) -> str:
    if want["format"] != have["format"]:
        return "it is a %s image" % have["format"]
    if (want["encryption"] is None) != (have["encryption"] is None):
        return "it is encrypted" if have["encryption"] else "it is not encrypted"
    for key, value in want["options"].items():
        present = have["options"].get(key)
        if present is not None and present != value:
            return "it has %s=%s" % (key, present)
    if want["size"] is not None and want["size"] != have["size"]:
        return "it is %d bytes large" % have["size"]
    if (want["backing_file"] or None) != have["backing_file"]:
        return "its backing file is %s" % (have["backing_file"] or "none")
    return ""


def _difference_from_record(want: State) -> str:
    if not os.path.isfile(want["dest"]):
        raise Refusal("%s is not a file, so nothing is recorded about it: up_to_date must be content or exists" % want["dest"])
    record = _record.read(want["dest"])
    if record is None:
        return "there is no record of what it was made from"
    if record.get("request") != _record.digest(request(want)):
        return "it was made with other parameters"
    return "" if record.get("sources") == _record.digest(identities(want)) else "its source has changed since"


def _difference_in_content(want: State) -> str:
    compare = part(__package__, "diskwright.commands.compare").compare

    dest = Address(want["dest"], want["format"], want["encryption"])
    formats = {"format1": want["src_format"], "format2": dest.arguments["format"]}
    name = names(want)[0]
    if name.startswith("json:"):
        formats["format1"] = None
    objects = {**secrets(want), **(dest.arguments["objects"] or {})}
    result = compare(name, dest.name, objects=objects, force_share=True, policy=_policy.current(), progress=_progress.tell, **formats)
    return "" if result.identical else "its content is different"


def plan(want: State, have: State) -> list[Step]:
    """A conversion unless the destination is up to date. No I/O. Raises Refusal where it may not be replaced."""
    if have["current"]:
        return []
    dest = want["dest"]
    if have["state"] == "present" and not want["replace"]:
        raise Refusal("%s exists, but %s: making it anew destroys it, and needs replace" % (dest, have["_reason"]))
    encryption = want["encryption"]
    # qemu-img has no such option: this line is ours
    program = ["qemu-img", "convert"] if want["changed"] is None else ["diskwright", "convert", "--changed", want["changed"]]
    argv = [*program, *(encryption.words(KEY) if encryption else [])]
    argv += [*(["-f", want["src_format"]] if want["src_format"] else []), "-O", want["format"]]
    if want["compress"]:
        argv.append("-c")
    if want["backing_file"]:
        argv += ["-B", want["backing_file"], "-F", want["backing_format"]]
    options = joined({**want["options"], **(encryption.creation_options() if encryption else {})})
    if options:
        argv += ["-o", options]
    change = {"state": "present", "format": want["format"], "backing_file": want["backing_file"], "current": True, "_reason": ""}
    more = []
    if want["size"] is not None:
        change["size"] = want["size"]
        address = Address(dest, want["format"], encryption)
        more.append(["qemu-img", "resize", *address.words, address.operand, str(want["size"])])
    sources = want["src"] if names(want)[0][:5] != "json:" else names(want)
    return [Step("convert", dest, have["_reason"], [*argv, *sources, dest], change, lambda: _run(want, options), more, cost=have.get("_data"))]


def _run(want: State, options: Optional[str]) -> Mapping[str, Any]:
    """Convert beside the final name, write down what it was made from, and rename."""
    from .diskwright.commands.convert import convert

    resize = part(__package__, "diskwright.commands.resize").resize
    dest = os.path.abspath(want["dest"])
    sources = identities(want)
    if want["checksum"] is not None:
        _verify(want["src"][0], want["checksum"])
    found: list[str] = []
    source_names = names(want)
    with beside(dest, want["private"]) as temporary:
        convert(
            source_names,
            temporary,
            format=None if source_names[0].startswith("json:") else want["src_format"],
            target_format=want["format"],
            options=options,
            compress=want["compress"],
            backing=want["backing_file"],
            backing_format=want["backing_format"],
            changed=want["changed"],
            target_cache="writeback" if temporary == dest else "unsafe",
            objects={**secrets(want), **(want["encryption"].objects if want["encryption"] else {})},
            policy=_policy.current(),
            content=found.append if want["content_checksum"] or want["content_file"] or want["up_to_date"] == "checksum" else None,
            progress=_progress.tell,
        )
        if want["size"] is not None:
            address = Address(temporary, want["format"], want["encryption"])
            resize(address.name, want["size"], **address.arguments)
        if identities(want) != sources:
            raise Refusal("%s was changed while it was being converted" % ", ".join(want["src"]))
        if temporary != dest:
            _record.write(dest, temporary, {"request": _record.digest(request(want)), "sources": _record.digest(sources)})
    result: dict[str, Any] = {"bytes": os.stat(dest).st_blocks * 512}
    if found:
        result["content_checksum"] = found[0]
        if want["content_file"] or want["up_to_date"] == "checksum":
            _content.write(dest, found[0])
    return result
