# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_check: what a check finds, and the repair that a finding asks for."""

from __future__ import annotations

import os

from . import _policy
from ._plan import Refusal, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, Sequence

    from .diskwright.commands.check import ImageCheck

    State = Mapping[str, Any]

COUNTS = ("check_errors", "corruptions", "leaks")
MESSAGES = 100  # lines about single findings that a result keeps


def observe(path: str, format: Optional[str], force_share: bool) -> dict[str, Any]:
    """The counts of a check of the image at `path`, with QEMU's names, and lines on what was found. Raises Error and OSError,
    Unsupported where the format has no check."""
    return _counts(_check(path, format, None, force_share))


def _check(path: str, format: Optional[str], repair: Optional[str], force_share: bool) -> ImageCheck:
    from .diskwright.commands.check import check

    result = check(os.path.abspath(path), format=format, repair=repair, force_share=force_share, no_io=True, policy=_policy.current())
    if result.failure is not None:
        raise Refusal("%s: the check failed: %s" % (path, result.failure), check=_counts(result))
    return result


def _counts(result: ImageCheck) -> dict[str, Any]:
    counts = {key.replace("-", "_"): value for key, value in result.as_dict().items()}
    return {**dict.fromkeys(COUNTS, 0), **counts, "messages": result.messages[:MESSAGES]}


def plan(want: State, have: State) -> list[Step]:
    """One repair if `want` allows it and `have` shows something that it would mend, else nothing."""
    leaks, corruptions, repair = have["leaks"], have["corruptions"], want["repair"]
    if repair == "none" or not (leaks or (corruptions and repair == "all")):
        return []
    path = want["path"]

    def run() -> Mapping[str, Any]:
        result = _counts(_check(path, want["format"], repair, False))
        return {key: result.get(key, 0) for key in ("leaks_fixed", "corruptions_fixed")}

    change = {"leaks": 0, "messages": []}
    if repair == "all":
        change["corruptions"] = 0
    argv = ["qemu-img", "check", "-r", repair, *(["-f", want["format"]] if want["format"] else []), path]
    return [Step("repair", path, "%d corruptions and %d leaked clusters were found" % (corruptions, leaks), argv, change, run)]


def judge(images: Sequence[State], tolerate: str) -> None:
    """Raise Refusal unless what is left of each image's counts is tolerated: "nothing", "leaks" or "everything"."""
    if tolerate == "everything":
        return
    bad = []
    for counts in images:
        left = [name for name in COUNTS if counts[name] and not (name == "leaks" and tolerate == "leaks")]
        if left:
            found = ", ".join("%d %s" % (counts[name], name.replace("_", " ")) for name in left)
            bad.append("%s is not consistent: %s" % (counts["path"], found))
    if bad:
        single = {"check": {key: value for key, value in images[0].items() if key != "path"}} if len(images) == 1 else {}
        raise Refusal("; ".join(bad), images=list(images), **single)
