# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][:KEY=VALUE...], with a backslash in front of what is not to divide
(https://docs.ceph.com/en/latest/rbd/qemu-rbd/)."""

from __future__ import annotations

from ...errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SETTINGS = "=keyvalue-pairs"  # the option for what a name has of the cluster's own settings, as in QEMU


def parse(filename: str) -> dict[str, Any]:
    """The options that a name stands for. Raises OptionError in QEMU's words."""
    if not filename.startswith("rbd:"):
        raise OptionError("File name must start with 'rbd:'")
    where, settings = _split(filename[4:], ":")
    pool, rest = _split(where, "/")
    if rest is None:
        raise OptionError("Pool name is required")
    rest, snapshot = _split(rest, "@")
    namespace, image = _split(rest, "/")
    if image is None:
        namespace, image = "", namespace
    found: dict[str, Any] = {"pool": _plain(pool), "namespace": _plain(namespace), "image": _plain(image)}
    if snapshot is not None:
        found["snapshot"] = _plain(snapshot)
    others: list[str] = []
    while settings is not None:
        item, settings = _split(settings, ":")
        key, value = _split(item, "=")
        key = _plain(key)
        if value is None:
            raise OptionError("conf option %s has no value" % key)
        if key in ("conf", "id"):
            found["user" if key == "id" else "conf"] = _plain(value)
        else:
            others += [key, _plain(value)]
    if others:
        from ...json_text import dumps

        found[SETTINGS] = dumps(others)
    return found


def _split(text: str, mark: str) -> tuple[str, Any]:
    """What is in front of the first `mark` without a backslash before it, and what is behind it; None where there is none."""
    position = 0
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == mark:
            return text[:position], text[position + 1 :]
        position += 1
    return text, None


def _plain(text: str) -> str:
    """`text` without its backslashes."""
    parts = []
    position = 0
    while position < len(text):
        if text[position] == "\\" and position + 1 < len(text):
            position += 1
        parts.append(text[position])
        position += 1
    return "".join(parts)
