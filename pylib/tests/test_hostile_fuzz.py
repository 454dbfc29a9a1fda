# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""A few thousand mutated images (see fuzz.py, which runs more of them by hand); some are compared with qemu-img."""

from __future__ import annotations

from pathlib import Path

import pytest

from effort import BRIEF
from fuzz import Fuzzer

CASES = 150 if BRIEF else 500
DIFFER = 35  # every so many cases are compared with qemu-img


@pytest.mark.parametrize("part", range(4))
def test_mutated_images(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fuzzer = Fuzzer(tmp_path)
    found = []
    for seed in range(part * CASES, (part + 1) * CASES):
        found += fuzzer.case(seed, seed % DIFFER == 0)
    assert not found, "\n".join(found[:20])
