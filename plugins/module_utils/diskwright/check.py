# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""What a check finds, and the reference tally that the formats' checks share."""

from __future__ import annotations


class CheckResult:
    """The counts of QEMU's ImageCheck; `check_errors` are those that kept the check from finishing.

    `messages` are the lines for a person, in order. Offsets in bytes; counts in clusters of the format.
    """

    __slots__ = (
        "check_errors",
        "image_end_offset",
        "corruptions",
        "leaks",
        "corruptions_fixed",
        "leaks_fixed",
        "total_clusters",
        "allocated_clusters",
        "fragmented_clusters",
        "compressed_clusters",
        "messages",
    )

    def __init__(self) -> None:
        self.check_errors = 0
        self.image_end_offset = 0
        self.corruptions = 0
        self.leaks = 0
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        self.total_clusters = 0
        self.allocated_clusters = 0
        self.fragmented_clusters = 0
        self.compressed_clusters = 0
        self.messages: list[str] = []

    @property
    def clean(self) -> bool:
        """Nothing is wrong (any more)."""
        return not (self.check_errors or self.corruptions or self.leaks)
