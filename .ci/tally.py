# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""tally.py RESULTS: one line for all the JUnit files of a run; exit status 1 where something failed or nothing ran."""

from __future__ import annotations

import sys
from glob import glob
from os.path import join
from xml.etree import ElementTree


def main(results: str) -> int:
    total = failed = skipped = 0
    for path in glob(join(results, "*.xml")):
        for suite in ElementTree.parse(path).getroot().iter("testsuite"):
            total += int(suite.get("tests", 0))
            failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped += int(suite.get("skipped", 0))
    passed = total - failed - skipped
    print(f"tests: {passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
