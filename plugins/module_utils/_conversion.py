# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_convert: whether a destination is up to date, and the conversion that it needs if not."""

from __future__ import annotations

import json
import os

from ._beside import beside, record_path
from ._disk import observe as observe_disk
from ._options import checked, joined
from ._plan import Refusal, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    State = Mapping[str, Any]

RECORD_LIMIT = 1 << 20  # bytes of a record that are read


def wanted(params: Mapping[str, Any]) -> dict[str, Any]:
    """The wanted state from the module's parameters, checked. Raises OptionError."""
    if os.path.realpath(params["dest"]) in map(os.path.realpath, params["src"]):
        raise Refusal("%s is source and destination at once" % params["dest"])
    if len(params["src"]) > 1 and params["up_to_date"] == "content":
        raise Refusal("up_to_date=content needs a single source")
    keys = ("src", "src_format", "dest", "format", "compress", "up_to_date", "replace", "backing_file", "backing_format")
    options = checked(params["format"], params["options"], ("size", "backing_file", "backing_fmt"))
    return {**{key: params[key] for key in keys}, "options": options, "private": params["mode"] is not None}


def request(want: State) -> dict[str, Any]:
    """What of the wanted state decides what the destination looks like."""
    return {key: want[key] for key in ("src_format", "format", "options", "compress", "backing_file", "backing_format")}


def identities(want: State) -> list[dict[str, Any]]:
    """What tells the present versions of the sources and their backing files from others, without reading them. Raises
    Error and OSError."""
    from .diskwright.commands.info import info

    found = []
    for path in want["src"]:
        for record in info(os.path.abspath(path), format=want["src_format"], backing_chain=True, force_share=True):
            path = os.path.realpath(record.filename)
            identity: dict[str, Any] = {"path": path}
            if os.path.exists(path):  # else it is no plain file, and its name must do
                status = os.stat(path)
                identity.update(inode=status.st_ino, size=status.st_size, mtime_ns=status.st_mtime_ns)
            found.append(identity)
    return found


def observe(want: State) -> dict[str, Any]:
    """The state of the destination; `current` says whether it is up to date, `_reason` why not."""
    have = observe_disk(want["dest"])
    if have["state"] == "absent":
        identities(want)  # a source that is missing or no image is an error in check mode too
        return {**have, "current": False, "_reason": "it does not exist"}
    reason = _difference_in_form(want, have)
    if not reason and want["up_to_date"] == "source":
        reason = _difference_from_record(want)
    elif not reason and want["up_to_date"] == "content":
        reason = _difference_in_content(want)
    return {**have, "current": not reason, "_reason": reason}


def _difference_in_form(want: State, have: State) -> str:
    if want["format"] != have["format"]:
        return "it is a %s image" % have["format"]
    for key, value in want["options"].items():
        present = have["options"].get(key)
        if present is not None and present != value:
            return "it has %s=%s" % (key, present)
    if (want["backing_file"] or None) != have["backing_file"]:
        return "its backing file is %s" % (have["backing_file"] or "none")
    return ""


def _difference_from_record(want: State) -> str:
    if not os.path.isfile(want["dest"]):
        raise Refusal("%s is not a file, so nothing is recorded beside it: up_to_date must be content or exists" % want["dest"])
    try:
        with open(record_path(want["dest"]), encoding="utf-8") as file:
            record = json.loads(file.read(RECORD_LIMIT))
        if record["request"] != request(want):
            return "it was made with other parameters"
        if record["sources"] != identities(want):
            return "its source has changed since"
        if record["inode"] != os.stat(want["dest"]).st_ino:
            return "it was replaced since"
    except FileNotFoundError as exc:
        if exc.filename != record_path(want["dest"]):
            raise
        return "there is no record of what it was made from"
    except (ValueError, KeyError, TypeError):
        return "the record of what it was made from cannot be read"
    return ""


def _difference_in_content(want: State) -> str:
    from .diskwright.commands.compare import compare

    source, dest = os.path.abspath(want["src"][0]), os.path.abspath(want["dest"])
    result = compare(source, dest, format1=want["src_format"], format2=want["format"], force_share=True)
    return "" if result.identical else "its content is different"


def plan(want: State, have: State) -> list[Step]:
    """A conversion unless the destination is up to date. No I/O. Raises Refusal where it may not be replaced."""
    if have["current"]:
        return []
    dest = want["dest"]
    if have["state"] == "present" and not want["replace"]:
        raise Refusal("%s exists, but %s: making it anew destroys it, and needs replace" % (dest, have["_reason"]))
    argv = ["qemu-img", "convert", *(["-f", want["src_format"]] if want["src_format"] else []), "-O", want["format"]]
    if want["compress"]:
        argv.append("-c")
    if want["backing_file"]:
        argv += ["-B", want["backing_file"], "-F", want["backing_format"]]
    options = joined(want["options"])
    if options:
        argv += ["-o", options]
    change = {"state": "present", "format": want["format"], "backing_file": want["backing_file"], "current": True, "_reason": ""}
    return [Step("convert", dest, have["_reason"], [*argv, *want["src"], dest], change, lambda: _run(want, options))]


def _run(want: State, options: Optional[str]) -> Mapping[str, Any]:
    """Convert beside the final name, write down what it was made from, and rename."""
    from .diskwright.commands.convert import convert

    dest = os.path.abspath(want["dest"])
    sources = identities(want)
    with beside(dest, want["private"]) as temporary:
        convert(
            [os.path.abspath(path) for path in want["src"]],
            temporary,
            format=want["src_format"],
            target_format=want["format"],
            options=options,
            compress=want["compress"],
            backing=want["backing_file"],
            backing_format=want["backing_format"],
            target_cache="writeback" if temporary == dest else "unsafe",
        )
        if identities(want) != sources:
            raise Refusal("%s was changed while it was being converted" % ", ".join(want["src"]))
        if temporary != dest:
            # Before the rename: a record of an image that never came about harms nothing, since it has another inode.
            _write_record(record_path(dest), {"sources": sources, "request": request(want), "inode": os.stat(temporary).st_ino})
    return {"bytes": os.stat(dest).st_blocks * 512}


def _write_record(path: str, record: Mapping[str, Any]) -> None:
    with beside(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1, sort_keys=True)
