# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""audit: what is worth knowing of many images of one host, from what qemu_img_info and image_check say of each."""

from __future__ import annotations

from ansible.errors import AnsibleFilterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    Record = Mapping[str, Any]

MISSING = "No such file or directory"
UNCHECKED = "does not support checks"
UNTOLD = "the format of its backing file is not recorded, so that whoever writes that decides it"


def audit(images: Any, checks: Any = (), again: Any = ()) -> dict[str, Any]:
    """The images with what is wrong with each, the chains that they form, and sums.

    `images` are entries of qemu_img_info with `inspect`, `chain` and `measure`; `checks` are the `images` of image_check with
    on_error=record; `again` are entries with what is known besides of images that something speaks against.
    """
    try:
        counts = {check["path"]: check for check in checks}
        more = {record["path"]: record for record in again}
        rows = [_row({**record, **more.get(record["path"], {})}, counts.get(record["path"])) for record in images]
    except (KeyError, TypeError) as exc:
        raise AnsibleFilterError("diskwright.images.audit takes entries of qemu_img_info and of image_check: %r" % exc) from exc
    known = {row["path"]: row for row in rows}
    for row in rows:
        row["overlays"] = sorted(other["path"] for other in rows if other["backing"] == row["path"])
    chains = []
    for row in rows:
        if row["backing"] not in known and (row["overlays"] or row["backing"]):
            chains.append(
                {
                    "base": row["backing"] or row["path"],
                    "missing": row["orphan"],
                    "images": list(_tree(row, known, 1 if row["backing"] else 0)),
                }
            )
    return {
        "images": rows,
        "chains": sorted(chains, key=lambda chain: str(chain["base"])),
        "orphans": [row["path"] for row in rows if row["orphan"]],
        "locked": [row["path"] for row in rows if row["holder"]],
        "problems": sum(len(row["problems"]) for row in rows),
        "virtual_size": sum(row["virtual_size"] or 0 for row in rows),
        "actual_size": sum(row["actual_size"] or 0 for row in rows),
        "leaked": sum(row["leaked"] for row in rows),
        "waste": sum(row["waste"] for row in rows),
    }


def _row(record: Record, check: Optional[Record]) -> dict[str, Any]:
    """One image."""
    from os.path import normpath

    chain = record.get("chain") or []
    verdict = record.get("inspect") or {}
    reasons = [str(reason) for reason in verdict.get("reasons") or ()]
    backing = record.get("full_backing_filename") or _named(record["path"], verdict)
    counts = check or {}
    leaked = (counts.get("leaks") or 0) * (record.get("cluster_size") or 0)
    problems = list(reasons)
    if record.get("dirty_flag"):
        problems.append("it was not closed cleanly")
    if counts.get("corruptions") or counts.get("check_errors"):
        problems.append(
            "it is damaged: %d corruptions, %d check errors" % (counts.get("corruptions") or 0, counts.get("check_errors") or 0)
        )
    if leaked:
        problems.append("%d leaked clusters" % counts["leaks"])
    if record.get("backing_filename") and not record.get("backing_filename_format"):
        problems.append(UNTOLD)
    if counts.get("error") and UNCHECKED not in counts["error"] and not reasons:
        problems.append("it could not be checked: %s" % counts["error"])
    return {
        "path": record["path"],
        "format": record.get("format"),
        "virtual_size": record.get("virtual_size"),
        "actual_size": record.get("actual_size"),
        "backing": normpath(backing) if backing else None,
        "depth": max(0, len(chain) - 1),
        "snapshots": len(record.get("snapshots") or ()),
        "encrypted": bool(record.get("encrypted")),
        "holder": record.get("holder") or None,
        "orphan": bool(backing) and any(MISSING in reason for reason in reasons),
        "leaked": leaked,
        "waste": leaked + _slack(record, backing, leaked),
        "problems": problems,
    }


def _named(path: str, verdict: Record) -> Optional[str]:
    """The backing file that an image names which could not be described."""
    from os.path import dirname, join

    for reference in verdict.get("references") or ():
        if reference.get("role") == "backing" and reference.get("image") == path:
            return join(dirname(path), str(reference.get("name")))
    return None


def _slack(record: Record, backing: Optional[str], leaked: int) -> int:
    """Bytes that a fresh copy in the same format would save, leaked clusters apart; of overlays nobody knows."""
    room = (record.get("measure") or {}).get("required")
    if room is None or backing or record.get("snapshots"):
        return 0
    return max(0, (record.get("actual_size") or 0) - int(room) - leaked)


def _tree(row: Record, known: Mapping[str, Record], depth: int, above: Sequence[str] = ()) -> Any:
    """`row` and all that lies on it, each with its depth; a loop is followed once."""
    yield {
        "path": row["path"],
        "depth": depth,
        "format": row["format"],
        "actual_size": row["actual_size"],
        "problems": row["problems"],
        "holder": row["holder"],
    }
    for path in row["overlays"]:
        if path not in above and path != row["path"]:
            yield from _tree(known[path], known, depth + 1, (*above, row["path"]))


def chain_picture(chain: Any, form: str = "svg") -> str:
    """A chain of `audit` as a picture: svg, or mermaid for Markdown."""
    from html import escape
    from os.path import basename

    if form not in ("svg", "mermaid"):
        raise AnsibleFilterError("diskwright.images.chain_picture draws svg and mermaid, not %r" % form)
    rows = list(chain["images"])
    if rows and rows[0]["depth"]:  # the base is not among the images that were looked at
        rows.insert(
            0,
            {
                "path": chain["base"],
                "depth": 0,
                "format": "missing" if chain["missing"] else "elsewhere",
                "problems": ["x"] if chain["missing"] else [],
            },
        )
    if form == "mermaid":
        return _mermaid(rows)
    width = max((len(basename(row["path"])) + len(str(row["format"])) + 3) * 8 + row["depth"] * 32 + 24 for row in rows) if rows else 10
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="monospace" font-size="13">'
        % (width, len(rows) * 36 + 4)
    ]
    at: dict[int, int] = {}
    for number, row in enumerate(rows):
        left, top = row["depth"] * 32 + 2, number * 36 + 2
        if row["depth"]:
            trunk = (row["depth"] - 1) * 32 + 14
            parts.append('<path d="M%d %d V%d H%d" fill="none" stroke="#888"/>' % (trunk, at.get(row["depth"] - 1, 0) + 28, top + 14, left))
        at[row["depth"]] = top
        text = "%s (%s)" % (basename(row["path"]), row["format"])
        colour = "#c0392b" if row["problems"] else "#2c7a4b"
        parts.append(
            '<rect x="%d" y="%d" width="%d" height="28" rx="4" fill="#fff" stroke="%s"/>' % (left, top, len(text) * 8 + 16, colour)
        )
        parts.append('<text x="%d" y="%d">%s</text>' % (left + 8, top + 18, escape(text)))
    return "".join([*parts, "</svg>"])


def _mermaid(rows: Sequence[Record]) -> str:
    from os.path import basename

    lines, above = ["graph BT"], {}
    for number, row in enumerate(rows):
        name = "%s (%s)" % (basename(row["path"]), row["format"])
        lines.append(
            '    n%d["%s"]'
            % (number, "".join("#%d;" % ord(letter) if letter in '"#;<>&' or ord(letter) < 32 else letter for letter in name))
        )
        if row["depth"]:
            lines.append("    n%d --> n%d" % (number, above[row["depth"] - 1]))
        above[row["depth"]] = number
    return "\n".join(lines)


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"audit": audit, "chain_picture": chain_picture}
