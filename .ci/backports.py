# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""backports.py SUITE [ETC_APT]: adds SUITE-backports to apt's sources, from the mirror that SUITE itself comes from.

Reads both formats of sources.list(5), and keeps the options of the entry it copies (Signed-By above all)."""

from __future__ import annotations

import os
import re
import sys
from glob import glob


def deb822(text: str, suite: str, wanted: str) -> str | None:
    """The stanza of `suite` rewritten for `wanted`; '' where `wanted` is there already, None where neither is."""
    answer = None
    for stanza in re.split(r"\n\s*\n", text):
        lines = [line for line in stanza.splitlines() if line.strip() and not line.startswith("#")]
        fields: dict[str, str] = {}
        name = ""
        for line in lines:
            if not line[0].isspace():
                name, _colon, line = line.partition(":")
                fields[name] = line.strip()
            else:
                fields[name] += "\n" + line
        if fields.get("Enabled", "yes").lower() in ("no", "false", "0") or "deb" not in fields.get("Types", "").split():
            continue
        suites = fields.get("Suites", "").split()
        if wanted in suites:
            return ""
        if suite in suites and answer is None:
            fields.update(Types="deb", Suites=wanted, Components="main")
            answer = "".join(f"{name}: {value}\n" for name, value in fields.items())
    return answer


def one_line(text: str, suite: str, wanted: str) -> str | None:
    """As deb822(), of the format with a line for each source."""
    answer = None
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+\S", line)
        if not match:
            continue
        if match[3] == wanted:
            return ""
        if match[3] == suite and answer is None:
            answer = f"deb {match[1] or ''}{match[2]} {wanted} main\n"
    return answer


def main(suite: str, etc: str = "/etc/apt") -> int:
    wanted = suite + "-backports"
    found = []
    for path in [os.path.join(etc, "sources.list"), *sorted(glob(os.path.join(etc, "sources.list.d", "*")))]:
        if not os.path.isfile(path) or not path.endswith((".list", ".sources")):
            continue
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            text = stream.read()
        extension = os.path.splitext(path)[1]
        source = (deb822 if extension == ".sources" else one_line)(text, suite, wanted)
        if source == "":
            return 0
        if source:
            found.append((extension, source))
    if not found:
        sys.stderr.write(f"No source of apt's has the suite {suite}, so there is no mirror to take {wanted} from.\n")
        return 1
    extension, source = found[0]
    with open(os.path.join(etc, "sources.list.d", wanted + extension), "w", encoding="utf-8", errors="surrogateescape") as stream:
        stream.write(source)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
