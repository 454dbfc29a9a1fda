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
  - What is sent to the managed node is made for images of the formats raw and qcow2 that are not encrypted. For others, and for what takes more
    (O(map), O(measure), O(content_checksum), the limit O(limits.expansion), and C(async)), this sends
    M(diskwright.images.qemu_img_info_full) by itself, which is twice as large.
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
  action:
    description: Runs on the controller to choose what is sent.
    support: full
options: {}
seealso:
  - module: diskwright.images.qemu_img_info_full
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

- name: An upload is only used if it is harmless
  diskwright.images.qemu_img_info:
    path: /srv/incoming/upload.qcow2
    inspect: true
    implicit_references: none
    limits:
      virtual_size: 100G
  register: upload

- name: It is
  ansible.builtin.assert:
    that: upload.images[0].inspect.safe
    fail_msg: "{{ upload.images[0].inspect.reasons | join(', ') }}"

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
    inspect:
      description: The verdict on an image that somebody else made.
      returned: with O(inspect)
      type: dict
      contains:
        safe:
          description: Whether there is no reason against it.
          type: bool
          sample: false
        reasons:
          description: Each reason, in words.
          type: list
          elements: str
          sample: ["/srv/incoming/upload.qcow2: the image refers to the backing file '/etc/shadow', which the open policy refuses (mode 'none')"]
        references:
          description: The files that the image and those below it name, as far as they are allowed to be opened.
          type: list
          elements: dict
          sample: [{image: /srv/incoming/upload.qcow2, role: backing, name: /etc/shadow, allowed: false}]
    content_checksum:
      description: The checksum of the content, in hexadecimal digits.
      returned: with O(content_checksum)
      type: str
      sample: 0f3c8a5b6d0e7a4f1c2b9d8e7f6a5b4c3d2e1f0a9b8c7d6e5f4a3b2c1d0e9f8a
    measure:
      description: The bytes that a new image would need; V(null) where the image, or one of its chain that is described, is encrypted.
      returned: with O(measure)
      type: dict
      sample: {required: 393216, fully_allocated: 21478375424}
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
    from ..module_utils import _bundle_looking  # noqa: E402, F401  # pylint: disable=unused-import


def task(module):
    return {"changed": False, "images": [describe(path, module.params) for path in module.params["path"]]}


def main():
    run(task, argument_spec=ARGUMENTS)


if __name__ == "__main__":
    main()
