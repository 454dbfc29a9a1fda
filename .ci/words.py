# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What no file of the repository may contain."""

from __future__ import annotations

import re
import subprocess
import sys

# Typographic quotes, dashes and spaces, which ansible-test and the importer refuse; paths of one developer's machine; hosts of
# package registries and mirrors (the machine's own configuration names them, the project does not).
FORBIDDEN = {
    "a typographic quote, dash or space": re.compile("[\u2018-\u201f\u2010-\u2015\u00a0\u2007\u202f\ufeff]"),
    "a path of somebody's machine": re.compile(r"/(?:work|home/\w+|Users/\w+|root)/(?!\.\.\.)"),
    "the host of a registry": re.compile(
        r"pypi\.org|pythonhosted\.org|crates\.io(?!-index)|deb\.debian\.org|debian\.org/debian|galaxy\.ansible\.com|proxy\.golang\.org|registry\.npmjs\.org"
    ),
}
# These say what they say on purpose: the pattern list itself, licence texts, and cargo's lock file, which names its registry.
EXEMPT = re.compile(r"\.ci/words\.py|COPYING|LICENSES/.*|pylib/LICENSE|.*Cargo\.lock")


def main() -> int:
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], check=True, capture_output=True).stdout.split(b"\0")
    status = 0
    for name in sorted(set(names) - {b""}):
        path = name.decode()
        if EXEMPT.fullmatch(path):
            continue
        try:
            with open(path, encoding="utf-8") as stream:
                text = stream.read()
        except (UnicodeDecodeError, IsADirectoryError, FileNotFoundError):
            continue  # an image among the tests' samples, the library's link, a file just removed
        for number, line in enumerate(text.splitlines(), 1):
            for what, pattern in FORBIDDEN.items():
                if pattern.search(line):
                    print(f"{path}:{number}: {what}: {line.strip()[:100]}")
                    status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
