# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Images that other products made, from the folder that DISKWRIGHT_SAMPLES names (by default ../shared/samples beside the checkout)."""

from __future__ import annotations

import bz2
import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("DISKWRIGHT_SAMPLES") or Path(__file__).parents[3] / "shared" / "samples")


def sample(name: str, directory: Path) -> Path:
    """Unpack the sample `name` into `directory`. Without the folder the test is skipped; where CI is set it fails."""
    packed = FOLDER / (name + ".bz2")
    if not packed.exists():
        reason = "no sample images: %s does not exist (DISKWRIGHT_SAMPLES names their folder)" % packed
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    path = directory / name
    path.write_bytes(bz2.decompress(packed.read_bytes()))
    return path
