#!/usr/bin/python
# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation; the work is done by the action plugin of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: seed_image
short_description: Make the small disk from which a new virtual machine takes its configuration
version_added: 0.1.0
author:
  - The Diskwright authors (@diskwright)
description:
  - Makes an ISO 9660 image of a few text files, with Rock Ridge and Joliet names, as cloud-init's NoCloud and config drives are.
  - An image that has these files and this label, and no others, is left alone, whenever it was made.
  - The image is made on the controller. The role P(diskwright.images.seed_image#role) fills it with what cloud-init and Ignition look for.
options:
  path:
    description: The image on the managed node.
    type: path
    required: true
  files:
    description: The content of the files, by their names. Names may have directories.
    type: dict
    required: true
  label:
    description: The label of the volume, which is what cloud-init finds it by. V(cidata) for NoCloud, V(config-2) for a config drive.
    type: str
    default: cidata
  replace:
    description: Whether a file at O(path) that is no such image may be replaced, which destroys it.
    type: bool
    default: false
  mode:
    description: The permissions of the image. They are V(0600) if not given, since seeds hold secrets.
    type: raw
extends_documentation_fragment:
  - ansible.builtin.files
attributes:
  action:
    description: The image is made on the controller.
    support: full
  async:
    description: The action plugin waits for what it does.
    support: none
  check_mode:
    description: Can run in C(check_mode) and return changed status prediction without modifying target.
    support: full
  diff_mode:
    description: Will return details on what has changed (or possibly needs changing in C(check_mode)), when in diff mode.
    support: full
  idempotent:
    description: A second run with the same parameters changes nothing.
    support: full
  platform:
    description: Target OS/families that can be operated against.
    platforms: posix
    support: full
requirements:
  - The Python package pycdlib on the controller
seealso:
  - name: NoCloud
    description: What cloud-init expects of the files.
    link: https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html
"""

EXAMPLES = r"""
- name: A seed for cloud-init
  diskwright.images.seed_image:
    path: /var/lib/images/web-seed.iso
    files:
      meta-data: |
        instance-id: web
        local-hostname: web
      user-data: |
        #cloud-config
        ssh_pwauth: false

- name: A config drive
  diskwright.images.seed_image:
    path: /var/lib/images/db-config.iso
    label: config-2
    files:
      openstack/latest/meta_data.json: "{{ {'uuid': 'db', 'hostname': 'db'} | to_json }}"
      openstack/latest/user_data: |
        #!/bin/sh
        echo hello
"""

RETURN = r"""
path:
  description: The image.
  returned: success
  type: str
  sample: /var/lib/images/web-seed.iso
label:
  description: The label of the volume.
  returned: success
  type: str
  sample: cidata
files:
  description: The names of the files in it.
  returned: success
  type: list
  elements: str
  sample: [meta-data, user-data]
"""

# what the action plugin takes, besides the attributes of files
ARGUMENTS = {
    "path": {"type": "path", "required": True},
    "files": {"type": "dict", "required": True},
    "label": {"type": "str", "default": "cidata"},
    "replace": {"type": "bool", "default": False},
    "mode": {"type": "raw"},
}
