# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Arguments that several modules take, as AnsibleModule declares them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NEW_IMAGE: dict[str, Any] = {
    "type": "dict",
    "options": {
        "passphrase": {"type": "str", "no_log": True},
        "passphrase_file": {"type": "path", "no_log": False},
    },
    "mutually_exclusive": [("passphrase", "passphrase_file")],
    "required_one_of": [("passphrase", "passphrase_file")],
}
ANY_IMAGE: dict[str, Any] = {
    **NEW_IMAGE,
    "options": {
        **NEW_IMAGE["options"],
        "old_passphrase": {"type": "str", "no_log": True},
        "old_passphrase_file": {"type": "path", "no_log": False},
        "erase_old": {"type": "bool", "default": False},
        "verify": {"type": "bool", "default": True},
        "keyslot": {"type": "int", "no_log": False},
    },
    "mutually_exclusive": [*NEW_IMAGE["mutually_exclusive"], ("old_passphrase", "old_passphrase_file")],
}
