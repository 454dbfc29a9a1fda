#!/usr/bin/python
# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation, and one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_img_info_full
short_description: Describe disk images of all formats
version_added: 0.1.0
author:
  - The Diskwright authors (@diskwright)
description:
  - Is M(diskwright.images.qemu_img_info) with all that it may need, and more to send. That module falls back to this one by itself, so that there
    is no need to name it.
extends_documentation_fragment:
  - diskwright.images.attributes
  - diskwright.images.describing
  - diskwright.images.untrusted
attributes:
  check_mode:
    description: Changes nothing, so that check mode makes no difference.
    support: full
  diff_mode:
    description: Changes nothing, so that there is no difference to show.
    support: N/A
options: {}
seealso:
  - module: diskwright.images.qemu_img_info
"""

EXAMPLES = r"""
- name: Describe a package
  diskwright.images.qemu_img_info_full:
    path: /srv/incoming/appliance.ova

- name: Where the data of an image is
  diskwright.images.qemu_img_info_full:
    path: /var/lib/images/web.vhdx
    map: true
"""

RETURN = r"""
images:
  description: One entry for each image, as M(diskwright.images.qemu_img_info) has them.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: The path that was given.
      type: str
      sample: /var/lib/images/web.vhdx
    exists:
      description: Whether there is such a file.
      type: bool
      sample: true
    inspect:
      description: The verdict on an image that somebody else made.
      returned: with O(inspect)
      type: dict
      sample: {safe: true, reasons: [], references: []}
diskwright:
  description: The version of the library and the kernels in use.
  returned: success
  type: dict
  sample: {version: 0.1.0, kernels: pure}
"""

from ..module_utils._info import ARGUMENTS, describe  # noqa: E402
from ..module_utils._runner import run  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..module_utils import _bundle_reading, _bundle_sources, _bundle_telling  # noqa: E402, F401  # pylint: disable=unused-import


def task(module):
    return {"changed": False, "images": [describe(path, module.params) for path in module.params["path"]]}


def main():
    run(task, argument_spec=ARGUMENTS)


if __name__ == "__main__":
    main()
