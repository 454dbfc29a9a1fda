# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""shown.py PAGE...: runs what pages of Markdown show, block after block, each page in an empty directory, some pages at a time. The
first failure ends it.

    ```bash     a script; `set -euo pipefail` holds
    ```python   a program
    ```yaml     a playbook, or tasks, which are put into a play of this machine; of anything else nothing is run

Directories that a page names for the reader (/var/lib/images, /srv, /etc/keys) are ones in the page's directory. A comment `<!-- bash ... -->` is a
script that the reader does not see: it makes what a page takes for granted. A comment `<!-- not run: WHY -->` before a block leaves it out. What looks
like a command outside such blocks is an error.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, NamedTuple

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("/var/lib/images", "/srv", "/etc/keys")
FENCE = re.compile(r"^( *)(```+)(\w*)[^`\n]*\n(.*?)^\1\2 *$|^<!-- (bash|not run:)(.*?)-->", re.MULTILINE | re.DOTALL)
LOOSE = re.compile(r"^    (?:\$ )?(?:diskwright|ansible-\w+|ansible|qemu-\w+|pip) .*", re.MULTILINE)
INVENTORY = """[all]
localhost ansible_connection=local ansible_python_interpreter={python}
[hypervisors]
localhost
"""
SECONDS = 120  # for one block


class Block(NamedTuple):
    """A block of a page: its language, its text, and where it begins."""

    language: str
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """What of a page is to be run. Raises ValueError for a command that would not be."""
    skipped = False
    position = 0
    for found in FENCE.finditer(text):
        check_loose(text, position, found.start())
        position = found.end()
        line = text.count("\n", 0, found.start()) + 1
        if found[5] == "not run:":
            skipped = True
        elif found[5]:
            yield Block("bash", found[6], line)
        else:
            if not skipped and found[3] in ("bash", "python", "yaml"):
                indent = len(found[1])
                yield Block(found[3], "".join(part[indent:] for part in found[4].splitlines(keepends=True)), line)
            skipped = False
    check_loose(text, position, len(text))


def check_loose(text: str, start: int, end: int) -> None:
    """Raise ValueError if there is a command between two blocks."""
    found = LOOSE.search(text, start, end)
    if found:
        raise ValueError("line %d shows a command outside a block that is run: %s" % (text.count("\n", 0, found.start()) + 1, found[0].strip()))


def as_play(text: str) -> str:
    """A playbook for YAML that is one, or a list of tasks; empty for anything else."""
    value = YAML(typ="safe").load(text)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        return ""
    if any("hosts" in item or "import_playbook" in item or "ansible.builtin.import_playbook" in item for item in value):
        return text
    tasks = "".join("    " + part for part in text.splitlines(keepends=True))
    return "- hosts: localhost\n  gather_facts: false\n  tasks:\n" + tasks


def command(block: Block, place: Path) -> list[str]:
    """What runs a block; empty for one that is not to be run."""
    text = block.text
    for name in PLACES:
        text = re.sub(r"(?<![\w.~-])%s\b" % re.escape(name), str(place) + name, text)
    if block.language == "bash":
        return ["bash", "-euo", "pipefail", "-c", text]
    if block.language == "python":
        return [sys.executable, "-c", text]
    play = as_play(text)
    if not play:
        return []
    (place / ".play.yml").write_text(play, encoding="utf-8")
    return ["ansible-playbook", "-i", ".inventory", ".play.yml"]


def run(page: Path) -> int:
    """Run a page; how many blocks there were. Raises ValueError, with what the reader would have seen."""
    with tempfile.TemporaryDirectory(prefix="shown-") as folder:
        place = Path(folder)
        for name in PLACES:
            (place / name.lstrip("/")).mkdir(parents=True)
        (place / ".inventory").write_text(INVENTORY.format(python=sys.executable), encoding="utf-8")
        (place / ".bin").mkdir()
        (place / ".bin/qemu-img").symlink_to(ROOT / ".venv/bin/diskwright")  # what a page does with qemu-img, ours does
        paths = [str(place / ".bin"), str(ROOT / ".venv/bin"), os.environ["PATH"]]
        environment = {**os.environ, "HOME": folder, "PATH": ":".join(paths), "TREE": str(ROOT)}
        environment.update(ANSIBLE_LOCALHOST_WARNING="False", ANSIBLE_NOCOLOR="1", ANSIBLE_PIPELINING="1", ANSIBLE_INVENTORY=str(place / ".inventory"))
        collections = [str(place / ".ansible/collections"), *filter(None, [os.environ.get("ANSIBLE_COLLECTIONS_PATH")])]
        environment["ANSIBLE_COLLECTIONS_PATH"] = ":".join(collections)  # what a page installs goes to the first
        count = 0
        for block in blocks(page.read_text(encoding="utf-8")):
            argv = command(block, place)
            if not argv:
                continue
            try:
                done = subprocess.run(argv, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
            except subprocess.TimeoutExpired as exc:
                raise ValueError("line %d takes more than %d seconds:\n%s" % (block.line, SECONDS, block.text)) from exc
            if done.returncode:
                said = (done.stdout + done.stderr).decode(errors="replace")
                raise ValueError("line %d fails with %d:\n%s\n%s" % (block.line, done.returncode, block.text, said))
            count += 1
        return count


def main() -> int:
    total = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [(name, pool.submit(run, Path(name))) for name in sys.argv[1:]]
        for name, page in running:
            try:
                count = page.result()
            except ValueError as exc:
                sys.stderr.write("%s: %s\n" % (name, exc))
                pool.shutdown(cancel_futures=True)
                return 1
            total += count
            if count:
                sys.stdout.write("%s: %d blocks ran\n" % (name, count))
                sys.stdout.flush()
    sys.stdout.write("%d blocks of %d pages ran.\n" % (total, len(running)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
