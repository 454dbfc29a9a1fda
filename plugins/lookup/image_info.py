# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""image_info: what disk images on the controller are."""

from __future__ import annotations

DOCUMENTATION = r"""
name: image_info
author:
  - The Diskwright authors (@diskwright)
version_added: 0.1.0
short_description: Describe disk images on the controller
description:
  - Returns for images on the controller what M(diskwright.images.qemu_img_info) returns for images on managed nodes.
  - Changes nothing, and works on images in use.
options:
  _terms:
    description: The paths of the images.
    type: list
    elements: str
    required: true
  format:
    description: The format of the images. It is told from their content if not given.
    type: str
  backing_chain:
    description: Whether to describe the backing files too, down to the last.
    type: bool
    default: false
  missing_ok:
    description: Whether an image that does not exist is described by RV(_list[].exists=false) rather than being an error.
    type: bool
    default: false
seealso:
  - module: diskwright.images.qemu_img_info
"""

EXAMPLES = r"""
- name: The virtual size of a template on the controller
  ansible.builtin.debug:
    msg: "{{ lookup('diskwright.images.image_info', 'files/template.qcow2').virtual_size }}"
"""

RETURN = r"""
_list:
  description: One entry for each image, in the order in which they were given.
  type: list
  elements: dict
  contains:
    path:
      description: The path that was given.
      type: str
      sample: files/template.qcow2
    exists:
      description: Whether there is such a file. If not, nothing else is returned for it.
      type: bool
      sample: true
    format:
      description: The format.
      type: str
      sample: qcow2
    virtual_size:
      description: The size of the disk, in bytes.
      type: int
      sample: 21474836480
    chain:
      description: With O(backing_chain), the same of the image and each of its backing files.
      type: list
      elements: dict
"""

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase
from ansible_collections.diskwright.images.plugins.module_utils._info import describe
from ansible_collections.diskwright.images.plugins.module_utils.diskwright.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional


class LookupModule(LookupBase):
    """What Ansible loads."""

    def run(self, terms: list[Any], variables: Optional[dict[str, Any]] = None, **kwargs: Any) -> list[Any]:
        """The entries, one for each path. Raises AnsibleLookupError."""
        self.set_options(var_options=variables, direct=kwargs)
        params = {name: self.get_option(name) for name in ("format", "backing_chain", "missing_ok")}
        found = []
        for term in terms:
            try:
                found.append(describe(str(term), {**params, "map": False, "measure": None}))
            except (Error, OSError) as exc:
                raise AnsibleLookupError("diskwright.images.image_info: %s" % exc) from exc
        return found
