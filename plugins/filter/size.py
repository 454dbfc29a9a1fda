# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""size: bytes of a size as QEMU reads it. human_size: a number of bytes as QEMU prints it."""

from __future__ import annotations

from ansible.errors import AnsibleFilterError
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.errors import OptionError
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.units import format_size, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable


def size(value: Any) -> int:
    """The bytes that `value`, a text in QEMU's size grammar or a number, means."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise AnsibleFilterError("diskwright.images.size takes a text or a number, not %r" % type(value).__name__)
    try:
        return parse_size(str(value))
    except OptionError as exc:
        raise AnsibleFilterError("diskwright.images.size: %s" % exc) from exc


def human_size(value: Any) -> str:
    """`value`, a number of bytes or a text in QEMU's size grammar, as qemu-img info prints it."""
    return format_size(size(value))


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"size": size, "human_size": human_size}
