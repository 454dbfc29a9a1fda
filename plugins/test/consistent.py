# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""consistent: nothing is wrong with the metadata of an image on the controller."""

from __future__ import annotations

from ansible.errors import AnsibleFilterError
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.commands.check import NoCheck, check
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional


def consistent(path: Any, format: Optional[str] = None, leaks: bool = False) -> bool:
    """Whether the image `path` has no corruptions, and no leaks either unless `leaks`; what cannot be checked is consistent."""
    try:
        found = check(str(path), format=format, force_share=True, no_io=True)
    except NoCheck:
        return True
    except (Error, OSError) as exc:
        raise AnsibleFilterError("diskwright.images.consistent: %s" % exc) from exc
    result = found.result
    return found.failure is None and not (result.corruptions or result.check_errors or result.leaks and not leaks)


class TestModule:
    """What Ansible loads."""

    def tests(self) -> dict[str, Callable[..., bool]]:
        return {"consistent": consistent}
