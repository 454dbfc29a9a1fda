# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_check: what a check finds, and the repair that a finding asks for."""

from __future__ import annotations

from ._plan import Refusal, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    State = Mapping[str, Any]

COUNTS = ("check_errors", "corruptions", "leaks")


def observe(path: str, format: Optional[str], force_share: bool) -> dict[str, Any]:
    """The counts of a check of the image at `path`, with QEMU's names. Raises Error and OSError, Unsupported where the
    format has no check."""
    return _counts(_check(path, format, None, force_share))


def _check(path: str, format: Optional[str], repair: Optional[str], force_share: bool) -> Any:
    from .diskwright.commands.check import check

    return check(path, format=format, repair=repair, force_share=force_share)


def _counts(result: Any) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in result.as_dict().items()}


def plan(want: State, have: State) -> list[Step]:
    """One repair if `want` allows it and `have` shows something that it would mend, else nothing."""
    leaks, corruptions = have.get("leaks", 0), have.get("corruptions", 0)
    repair = want["repair"]
    if repair == "none" or not (leaks or (corruptions and repair == "all")):
        return []
    path = want["path"]
    change = {"leaks": 0, "corruptions": 0} if repair == "all" else {"leaks": 0}

    def run() -> Mapping[str, Any]:
        result = _counts(_check(path, want["format"], repair, False))
        return {key: result.get(key, 0) for key in ("leaks_fixed", "corruptions_fixed")}

    argv = ["qemu-img", "check", "-r", repair, *(["-f", want["format"]] if want["format"] else []), path]
    return [Step("repair", path, "%d corruptions and %d leaked clusters were found" % (corruptions, leaks), argv, change, run)]


def judge(path: str, counts: State, tolerate: str) -> None:
    """Raise Refusal unless what is left is tolerated: "nothing", "leaks" or "everything"."""
    if tolerate == "everything":
        return
    left = [name for name in COUNTS if counts.get(name) and not (name == "leaks" and tolerate == "leaks")]
    if left:
        found = ", ".join("%d %s" % (counts[name], name.replace("_", " ")) for name in left)
        raise Refusal("%s is not consistent: %s" % (path, found))
