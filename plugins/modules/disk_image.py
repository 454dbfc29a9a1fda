#!/usr/bin/python
# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation, and one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: disk_image
short_description: Make sure that a disk image exists, with a size and a format, or does not exist
version_added: 0.1.0
author:
  - The Diskwright authors (@diskwright)
description:
  - Creates virtual machine disk images, grows and shrinks them, and removes them.
  - An image that is as wanted is left alone. A change that would lose data needs the parameter that allows it, and one that
    cannot be made in place is refused.
  - A new image is written beside its final name and renamed when it is complete.
extends_documentation_fragment:
  - ansible.builtin.files
  - diskwright.images.attributes
options:
  path:
    description: Where the image is.
    type: path
    required: true
  state:
    description: Whether the image should exist.
    type: str
    choices: [present, absent]
    default: present
  format:
    description: The format of the image.
    type: str
    default: qcow2
  size:
    description:
      - The virtual size in bytes, rounded up to a whole number of 512-byte sectors. The suffixes V(k), V(M), V(G), V(T), V(P) and V(E)
        count in 1024s.
      - Without it a new image takes the size of its backing file, and an existing one keeps its own.
    type: str
  allow_shrink:
    description: Whether an image may be made smaller, which destroys what lies beyond the new end.
    type: bool
    default: false
  backing_file:
    description:
      - What the image itself does not hold is read from this one. A relative name is relative to the image and stored as given.
    type: str
  backing_format:
    description: The format of O(backing_file). It is told from its content if not given, and always stored in the image.
    type: str
  rebase:
    description:
      - What to do if an existing image has another backing file than O(backing_file). V(never) refuses.
      - V(moved) makes the image refer to O(backing_file) if that is the old backing file at a new place. The old one is gone, or both
        have the same content.
    type: str
    choices: [never, moved]
    default: never
  preallocation:
    description: How much of the image, or of the part by which it grows, is allocated beforehand. Says nothing about an existing image.
    type: str
    choices: ['off', metadata, falloc, full]
    default: 'off'
  options:
    description:
      - More options of the format, by the names that C(qemu-img create -o) has for them, for example V(cluster_size) or V(compat).
      - An existing image that differs in one of them is refused.
    type: dict
seealso:
  - module: diskwright.images.image_convert
  - module: diskwright.images.qemu_img_info
"""

EXAMPLES = r"""
- name: A disk of 20 GiB
  diskwright.images.disk_image:
    path: /var/lib/images/web.qcow2
    size: 20G

- name: Grow it; nothing happens if it is that large already
  diskwright.images.disk_image:
    path: /var/lib/images/web.qcow2
    size: 40G

- name: A thin clone of a template
  diskwright.images.disk_image:
    path: /var/lib/images/clone1.qcow2
    backing_file: template.qcow2

- name: A disk with options of its format
  diskwright.images.disk_image:
    path: /var/lib/images/db.qcow2
    size: 100G
    preallocation: metadata
    options:
      cluster_size: 128k
      lazy_refcounts: true
    mode: "0600"

- name: No disk
  diskwright.images.disk_image:
    path: /var/lib/images/old.qcow2
    state: absent
"""

RETURN = r"""
image:
  description: The image as it is after the task, or would be in check mode.
  returned: success
  type: dict
  sample:
    state: present
    format: qcow2
    size: 21474836480
    backing_file: null
    backing_format: null
    options: {cluster_size: "65536", compat: "1.1"}
plan:
  description: The steps that were taken, or would be in check mode, each with the command that it replaces and the reason for it.
  returned: success
  type: list
  elements: dict
  sample:
    - verb: resize
      target: /var/lib/images/web.qcow2
      command: qemu-img resize -f qcow2 /var/lib/images/web.qcow2 42949672960
      why: it is 21474836480 bytes large and 42949672960 are wanted
diskwright:
  description: The version of the library and the kernels in use.
  returned: success
  type: dict
  sample: {version: 0.1.0, kernels: pure}
"""

from ..module_utils._disk import exists, observe, plan, wanted  # noqa: E402
from ..module_utils._runner import carry_out, reached, run, set_attributes  # noqa: E402

ARGUMENTS = {
    "path": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "format": {"type": "str", "default": "qcow2"},
    "size": {"type": "str"},
    "allow_shrink": {"type": "bool", "default": False},
    "backing_file": {"type": "str"},
    "backing_format": {"type": "str"},
    "rebase": {"type": "str", "choices": ["never", "moved"], "default": "never"},
    "preallocation": {"type": "str", "choices": ["off", "metadata", "falloc", "full"], "default": "off"},
    "options": {"type": "dict"},
}


def task(module):
    path = module.params["path"]
    want = wanted(module.params)
    have = observe(path, want["backing_file"]) if want["state"] == "present" else exists(path)
    steps = plan(want, have)
    result = carry_out(module, path, have, steps)
    if want["state"] == "present":
        result["image"] = reached(module, have, steps, lambda: observe(path))
        set_attributes(module, path, result)
    else:
        result["image"] = {"state": "absent"}
    return result


def main():
    run(task, argument_spec=ARGUMENTS, add_file_common_args=True, required_by={"backing_format": "backing_file"})


if __name__ == "__main__":
    main()
