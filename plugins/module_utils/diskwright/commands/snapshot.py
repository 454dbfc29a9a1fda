# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""`snapshot`: the internal snapshots of an image (https://www.qemu.org/docs/master/tools/qemu-img.html)."""

from __future__ import annotations

from ..errors import Error
from ..getopt import Parser
from ..graph import Graph, prefixed
from ..node import OpenFlags
from . import spec
from .spec import FLAG, VALUE, Command, Option, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from diskwright.commands.ui import UI

    from ..graph import OpenPolicy
    from ..node import Node, Snapshot

ACTIONS = ("list", "apply", "create", "delete")

COMMAND = Command(
    "snapshot",
    "List the internal snapshots of an image, or make, apply or delete one.",
    ["[-f FMT | --image-opts] [-l | -c NAME | -a NAME_OR_ID | -d NAME]", "[-q] [-U] [--object OBJDEF]... FILENAME"],
    [
        spec.HELP,
        spec.QUIET,
        spec.OBJECT,
        spec.FORMAT,
        spec.IMAGE_OPTS,
        spec.FORCE_SHARE,
        Option("-l --list", FLAG, help="list the snapshots; what is done if nothing else is asked for"),
        Option("-a --apply", VALUE, "NAME_OR_ID", "give the disk the content and the size of that snapshot:\nwhat it holds now is lost"),
        Option("-c --create", VALUE, "NAME", "make a snapshot of that name, even if there is one"),
        Option("-d --delete", VALUE, "NAME", "delete the first snapshot of that name"),
    ],
    [("FILENAME", "the image")],
)


def main(args: Sequence[str], ui: UI) -> int:
    """Run `snapshot` with the arguments `args`; the exit code."""
    given = spec.Given()
    for option, value in COMMAND.parse(Parser(COMMAND.options, args, ui.posixly_correct), ui):
        if option is None:
            given.operands.append(value or "")
            continue
        if option.key in ACTIONS and any(action in given for action in ACTIONS):
            raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
        COMMAND.take(given, option, value)
    if len(given.operands) != 1:
        raise UsageError("Expecting one image file name")
    spec.check_one_image_form("image_opts" in given, given.get("format"))
    action = next((action for action in ACTIONS if action in given), "list")
    found = snapshot(
        given.operands[0],
        action,
        given[action] if action != "list" else "",
        format=given.get("format"),
        image_opts="image_opts" in given,
        force_share="force_share" in given,
        objects=given.objects,
        warn=ui.caution,
    )
    if action == "list" and found:
        from .info import snapshot_lines

        ui.write("\n".join(["Snapshot list:", *snapshot_lines(found), ""]))
    return 0


def snapshot(
    filename: str,
    action: str = "list",
    name: str = "",
    *,
    format: Optional[str] = None,
    image_opts: bool = False,
    force_share: bool = False,
    objects: Optional[Mapping[str, Any]] = None,
    policy: Optional[OpenPolicy] = None,
    warn: Optional[Callable[[str], None]] = None,
) -> list[Snapshot]:
    """Do one thing with the internal snapshots of the image `filename`; those that it has afterwards.

    `action` is "list", "create" (a snapshot `name`; there may be several of one name), "apply" (the one with the ID `name`,
    or else that name) or "delete" (the first of that name). `force_share` is only for listing. Each change is whole or not
    there at all, whatever happens. Raises OptionError, Error or OSError.
    """
    if action not in ACTIONS:
        raise spec.OptionError("Unknown action '%s'" % action)
    flags = OpenFlags(writable=action != "list", force_share=force_share)
    with Graph(policy, objects, warn).open(filename, format, flags, image_opts) as node:
        try:
            if action == "create":
                node.create_snapshot(name)
            elif action == "apply":
                node.apply_snapshot(name)
            elif action == "delete":
                node.delete_snapshot(name)
        except Error as exc:
            raise prefixed("Could not %s snapshot '%s': " % (action, name), exc, filename) from exc
        except OSError as exc:
            text = "Could not %s snapshot '%s': %s" % (action, name, exc.strerror or exc)
            raise Error(text, filename=filename, errno=exc.errno) from exc
        return node.snapshots()


def load(node: Node, text: str) -> None:
    """Have `node`, which is open for reading, show the snapshot that -l names: an ID or else a name, or
    "snapshot.id=ID,snapshot.name=NAME". Raises Error "Failed to load snapshot: ..."."""
    try:
        if text.startswith("snapshot."):
            from ..options import split_pairs

            wanted = dict(split_pairs(text))
            node.load_snapshot(wanted.get("snapshot.id"), wanted.get("snapshot.name"))
            return
        try:
            node.load_snapshot(id=text)
        except Error:
            node.load_snapshot(name=text)
    except Error as exc:
        raise prefixed("Failed to load snapshot: ", exc, node.filename) from exc
