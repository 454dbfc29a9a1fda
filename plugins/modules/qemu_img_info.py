#!/usr/bin/python
# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation, and one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: qemu_img_info
short_description: Describe disk images
version_added: 0.1.0
author:
  - The Diskwright authors (@diskwright)
description:
  - Returns what disk images are. Their sizes, formats and options, their backing chains, where their data is, and how much room
    their content would take in another format.
  - Changes nothing, and works on images that a running virtual machine uses.
extends_documentation_fragment:
  - diskwright.images.attributes
attributes:
  check_mode:
    description: Changes nothing, so that check mode makes no difference.
    support: full
  diff_mode:
    description: Changes nothing, so that there is no difference to show.
    support: N/A
options:
  path:
    description:
      - The images.
      - A name with a comma must be written as a list of one, since Ansible splits a plain string at commas.
    type: list
    elements: path
    required: true
    aliases: [paths]
  format:
    description: The format of the images. It is told from their content if not given.
    type: str
  backing_chain:
    description: Whether to describe the backing files too, down to the last.
    type: bool
    default: false
  map:
    description: Whether to return where the data of each image is.
    type: bool
    default: false
  measure:
    description: Whether to return how many bytes a new image with the content of each image would need.
    type: dict
    suboptions:
      format:
        description: The format of that new image.
        type: str
        default: qcow2
      options:
        description: Options of that format, by the names that C(qemu-img measure -o) has for them.
        type: dict
  missing_ok:
    description: Whether an image that does not exist is described by RV(images[].exists=false) rather than being an error.
    type: bool
    default: false
seealso:
  - module: diskwright.images.disk_image
  - module: diskwright.images.image_bitmap
  - module: diskwright.images.image_check
  - module: diskwright.images.image_snapshot
"""

EXAMPLES = r"""
- name: What is this image?
  diskwright.images.qemu_img_info:
    path: /var/lib/images/web.qcow2
  register: web

- name: It is large enough
  ansible.builtin.assert:
    that: web.images[0].virtual_size >= 10 * 1024 ** 3

- name: Several images with their chains, in one task
  diskwright.images.qemu_img_info:
    path:
      - /var/lib/images/clone1.qcow2
      - /var/lib/images/clone2.qcow2
    backing_chain: true

- name: Room that a raw copy would take
  diskwright.images.qemu_img_info:
    path: /var/lib/images/web.qcow2
    measure:
      format: raw
"""

RETURN = r"""
images:
  description: One entry for each image, in the order in which they were given.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: The path that was given.
      type: str
      sample: /var/lib/images/web.qcow2
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
    actual_size:
      description: The bytes that the image takes in its file system.
      type: int
      sample: 200704
    cluster_size:
      description: The size of a cluster in bytes, where the format has clusters.
      type: int
      sample: 65536
    dirty_flag:
      description: Whether the image was not closed cleanly.
      type: bool
      sample: false
    backing_filename:
      description: The name of the backing file as it is stored in the image.
      type: str
      sample: template.qcow2
    full_backing_filename:
      description: The same name, resolved.
      type: str
      sample: /var/lib/images/template.qcow2
    backing_filename_format:
      description: The format of the backing file as it is stored in the image.
      type: str
      sample: qcow2
    children:
      description: The nodes below that hold the image, as qemu-img info has them.
      type: list
      elements: dict
      sample: [{name: file, info: {filename: /var/lib/images/web.qcow2, format: file, virtual_size: 196616, actual_size: 200704, children: []}}]
    filename:
      description: The name of the image; a description in JSON where no plain name opens the same bytes.
      type: str
      sample: /var/lib/images/web.qcow2
    snapshots:
      description: Internal snapshots, if there are any, as qemu-img info has them.
      type: list
      elements: dict
      sample:
        - id: "1"
          name: before-upgrade
          date_sec: 1767225600
          date_nsec: 250000000
          vm_state_size: 0
          vm_clock_sec: 0
          vm_clock_nsec: 0
          icount: 0
    format_specific:
      description: What the format stores besides, by type. For qcow2 that has its bitmaps, and how it is encrypted.
      type: dict
      sample:
        type: qcow2
        data:
          compat: "1.1"
          refcount_bits: 16
          bitmaps: [{name: since-full-backup, granularity: 65536, flags: [auto]}]
    chain:
      description: The same for the image and each of its backing files, top first.
      returned: with O(backing_chain)
      type: list
      elements: dict
    map:
      description: Runs of bytes that are stored alike.
      returned: with O(map)
      type: list
      elements: dict
      sample: [{start: 0, length: 65536, depth: 0, present: true, zero: false, data: true, compressed: false, offset: 327680}]
    measure:
      description: The bytes that a new image would need.
      returned: with O(measure)
      type: dict
      sample: {required: 393216, fully_allocated: 21478375424}
diskwright:
  description: The version of the library and the kernels in use.
  returned: success
  type: dict
  sample: {version: 0.1.0, kernels: pure}
"""

from ..module_utils._info import describe  # noqa: E402
from ..module_utils._runner import run  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..module_utils import _bundle_looking  # noqa: E402, F401

ARGUMENTS = {
    "path": {"type": "list", "elements": "path", "required": True, "aliases": ["paths"]},
    "format": {"type": "str"},
    "backing_chain": {"type": "bool", "default": False},
    "map": {"type": "bool", "default": False},
    "measure": {"type": "dict", "options": {"format": {"type": "str", "default": "qcow2"}, "options": {"type": "dict"}}},
    "missing_ok": {"type": "bool", "default": False},
}


def task(module):
    return {"changed": False, "images": [describe(path, module.params) for path in module.params["path"]]}


def main():
    run(task, argument_spec=ARGUMENTS)


if __name__ == "__main__":
    main()
