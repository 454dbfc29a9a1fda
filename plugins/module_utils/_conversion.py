# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_convert: whether a destination is up to date, and the conversion that it needs if not."""

from __future__ import annotations

import json
import os

from ._disk import observe as observe_disk
from ._options import checked, joined
from ._plan import Refusal, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    State = Mapping[str, Any]

RECORD_LIMIT = 1 << 16  # bytes of a record that are read


def wanted(params: Mapping[str, Any]) -> dict[str, Any]:
    """The wanted state from the module's parameters, checked. Raises OptionError."""
    if params["dest"] in params["src"] or os.path.realpath(params["dest"]) in map(os.path.realpath, params["src"]):
        raise Refusal("%s is source and destination at once" % params["dest"])
    options = checked(params["format"], params["options"], ("size", "backing_file", "backing_fmt"))
    want = {key: params[key] for key in ("src", "src_format", "dest", "format", "compress", "up_to_date", "replace", "backing_file", "backing_format")}
    return {**want, "options": options}


def request(want: State) -> dict[str, Any]:
    """What of the wanted state decides what the destination looks like."""
    return {key: want[key] for key in ("src_format", "format", "options", "compress", "backing_file", "backing_format")}


def record_path(dest: str) -> str:
    """Where it is written down what `dest` was made from."""
    return os.path.join(os.path.dirname(dest), ".%s.source.json" % os.path.basename(dest))


def identity(path: str) -> dict[str, Any]:
    """What tells one version of a file from another without reading it. Raises OSError."""
    status = os.stat(path)
    return {
        "path": os.path.realpath(path),
        "device": status.st_dev,
        "inode": status.st_ino,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }


def observe(want: State) -> dict[str, Any]:
    """The state of the destination; `current` says whether it is up to date, `reason` why not."""
    have = observe_disk(want["dest"])
    if have["state"] == "absent":
        return {**have, "current": False, "reason": "it does not exist"}
    reason = _difference_in_form(want, have)
    if not reason:
        reason = {"exists": lambda: "", "source": lambda: _difference_from_record(want), "content": lambda: _difference_in_content(want)}[
            want["up_to_date"]
        ]()
    return {**have, "current": not reason, "reason": reason}


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
    try:
        with open(record_path(want["dest"]), encoding="utf-8") as file:
            record = json.loads(file.read(RECORD_LIMIT))
        if record["request"] != request(want):
            return "it was made with other parameters"
        if record["sources"] != [identity(path) for path in want["src"]]:
            return "its source has changed since"
        if record["inode"] != os.stat(want["dest"]).st_ino:
            return "it was replaced since"
    except FileNotFoundError:
        return "there is no record of what it was made from"
    except (ValueError, KeyError, TypeError):
        return "the record of what it was made from cannot be read"
    return ""


def _difference_in_content(want: State) -> str:
    from .diskwright.commands.compare import compare

    if len(want["src"]) > 1:
        raise Refusal("up_to_date=content needs a single source")
    result = compare(want["src"][0], want["dest"], format1=want["src_format"], format2=want["format"], force_share=True)
    return "" if result.identical else "its content is different"


def plan(want: State, have: State) -> list[Step]:
    """A conversion unless the destination is up to date. No I/O. Raises Refusal where it may not be replaced."""
    if have["current"]:
        return []
    dest = want["dest"]
    if have["state"] == "present" and not want["replace"]:
        raise Refusal("%s exists, but %s: making it anew destroys it, and needs replace" % (dest, have["reason"]))
    argv = ["qemu-img", "convert", *(["-f", want["src_format"]] if want["src_format"] else []), "-O", want["format"]]
    if want["compress"]:
        argv.append("-c")
    if want["backing_file"]:
        argv += ["-B", want["backing_file"], "-F", want["backing_format"]]
    options = joined(want["options"])
    if options:
        argv += ["-o", options]
    change = {"state": "present", "format": want["format"], "backing_file": want["backing_file"], "current": True, "reason": ""}
    return [Step("convert", dest, have["reason"], argv + list(want["src"]) + [dest], change, lambda: _run(want, options))]


def _run(want: State, options: Optional[str]) -> Mapping[str, Any]:
    """Convert beside the final name, rename, and write down what it was made from."""
    from ._beside import beside
    from .diskwright.commands.convert import convert

    dest = want["dest"]
    sources = [identity(path) for path in want["src"]]
    if os.path.lexists(record_path(dest)):
        os.unlink(record_path(dest))  # a record must never outlive what it describes
    with beside(dest) as temporary:
        convert(
            want["src"],
            temporary,
            format=want["src_format"],
            target_format=want["format"],
            options=options,
            compress=want["compress"],
            backing=want["backing_file"],
            backing_format=want["backing_format"],
            target_cache="writeback",
        )
        if [identity(path) for path in want["src"]] != sources:
            raise Refusal("%s was changed while it was being converted" % ", ".join(want["src"]))
    record = {"sources": sources, "request": request(want), "inode": os.stat(dest).st_ino}
    with beside(record_path(dest)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1, sort_keys=True)
    return {"bytes": os.stat(dest).st_blocks * 512}


