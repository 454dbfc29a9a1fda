#!/usr/bin/python
# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation, and one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_snapshot
short_description: Make, remove and apply internal snapshots of disk images
version_added: 0.1.0
author:
  - The Diskwright authors (@diskwright)
description:
  - Makes internal snapshots of disk images, removes them, and sets disks back to them.
  - Several images at once are the disks of one virtual machine. All of them are locked before the first one is changed, and where one
    fails, what was done to the others is undone, so that a snapshot covers the whole machine or does not exist.
  - The machine must be shut down. An image that another process uses is refused.
  - What snapshots there are is told by M(diskwright.images.qemu_img_info), also of images in use.
extends_documentation_fragment:
  - diskwright.images.attributes
  - diskwright.images.untrusted
  - diskwright.images.waiting
options:
  path:
    description:
      - The images. Each must be of a format that has internal snapshots, such as V(qcow2).
      - A name with a comma must be written as a list of one, since Ansible splits a plain string at commas.
    type: list
    elements: path
    required: true
    aliases: [paths]
  format:
    description: The format of the images. It is told from their content if not given.
    type: str
  name:
    description: The name of the snapshot. Where an image has several of one name, V(applied) means the newest and V(absent) all of them.
    type: str
  id:
    description: The ID of the snapshot, in place of O(name), for V(absent) and V(applied). Only for a single image.
    type: str
  state:
    description:
      - V(present) makes a snapshot of every image, unless there is one of that name.
      - V(absent) removes it from every image that has it. This cannot be undone. Should it fail halfway, run it again.
      - V(applied) gives every disk the content and the size that it had. A disk that was not changed since is left alone.
    type: str
    choices: [present, absent, applied]
    default: present
  keep:
    description:
      - Keeps only so many of the newest snapshots of each image, and removes the others.
      - With O(state=present) that is done after the snapshot was made. This one stays and counts, however old it is.
      - With O(state=absent) it takes the place of O(name), and may be V(0).
    type: int
  match:
    description: Which snapshots O(keep) is about, as a shell pattern that their names match. Others are neither counted nor removed.
    type: str
    default: '*'
  complete:
    description:
      - Whether a snapshot that only some of the images have may be made of the others too, although it is of another moment there.
    type: bool
    default: false
  allow_rollback:
    description: Whether V(applied) may change a disk, which destroys what it holds now.
    type: bool
    default: false
notes:
  - A run that was killed may leave the snapshot on some of several images. The next one removes it there and makes it of all of them. Where the
    file system has no extended attributes, which say so, it is refused unless O(complete) is set.
  - Encrypted images need no passphrase, since snapshots are made of encrypted data as it is.
  - While several disks are set back, each one has a snapshot C(diskwright-undo) of what it held. Only a run that was killed leaves
    one behind. The next one with O(state=applied) and O(allow_rollback=true) removes it once all disks are set back.
seealso:
  - module: diskwright.images.qemu_img_info
  - module: diskwright.images.image_bitmap
"""

EXAMPLES = r"""
- name: Keep what the disk holds, before the upgrade
  diskwright.images.image_snapshot:
    path: /var/lib/images/web.qcow2
    name: before-upgrade

- name: One snapshot of a machine with two disks
  diskwright.images.image_snapshot:
    path:
      - /var/lib/images/db-system.qcow2
      - /var/lib/images/db-data.qcow2
    name: before-upgrade

- name: Go back to it
  diskwright.images.image_snapshot:
    path:
      - /var/lib/images/db-system.qcow2
      - /var/lib/images/db-data.qcow2
    name: before-upgrade
    state: applied
    allow_rollback: true

- name: A snapshot for each day, of which the newest seven are kept
  diskwright.images.image_snapshot:
    path: /var/lib/images/web.qcow2
    name: daily-{{ '%Y-%m-%d' | strftime }}
    keep: 7
    match: daily-*

- name: Remove a snapshot by its ID
  diskwright.images.image_snapshot:
    path: /var/lib/images/web.qcow2
    id: "3"
    state: absent
"""

RETURN = r"""
images:
  description: The images as they are after the task, or would be in check mode, in the order in which they were given.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: The path that was given.
      type: str
      sample: /var/lib/images/web.qcow2
    format:
      description: The format.
      type: str
      sample: qcow2
    size:
      description: The size of the disk, in bytes.
      type: int
      sample: 21474836480
    holds:
      description: Whether the disk is as it was when the snapshot was made.
      returned: with O(state=applied)
      type: bool
      sample: true
    snapshots:
      description: The internal snapshots, in the order in which the image lists them.
      type: list
      elements: dict
      contains:
        id:
          description: The ID.
          type: str
          sample: "1"
        name:
          description: The name.
          type: str
          sample: before-upgrade
        date:
          description: When it was made, in seconds since 1970. Null in check mode for one that would be made.
          type: float
          sample: 1767225600.25
        size:
          description: The size that the disk had, in bytes.
          type: int
          sample: 21474836480
        vm_state_size:
          description: The bytes of the state of the running machine that belongs to it. They are 0 if it was shut down.
          type: int
          sample: 0
plan:
  description: The steps that were taken, or would be in check mode, each with the commands that it replaces and the reason for it.
  returned: success
  type: list
  elements: dict
  sample:
    - verb: create
      target: /var/lib/images/db-system.qcow2, /var/lib/images/db-data.qcow2
      command: >-
        qemu-img snapshot -c before-upgrade /var/lib/images/db-system.qcow2 &&
        qemu-img snapshot -c before-upgrade /var/lib/images/db-data.qcow2
      why: there is no snapshot 'before-upgrade'
diskwright:
  description: The version of the library and the kernels in use.
  returned: success
  type: dict
  sample: {version: 0.1.0, kernels: pure}
"""

from ..module_utils import _policy  # noqa: E402
from ..module_utils._runner import WAITING, carry_out, reached, run  # noqa: E402
from ..module_utils._snapshot import observe, plan, unmark, wanted  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..module_utils import _bundle_snapshots  # noqa: E402, F401  # pylint: disable=unused-import

ARGUMENTS = {
    **_policy.ARGUMENTS,
    **WAITING,
    "path": {"type": "list", "elements": "path", "required": True, "aliases": ["paths"]},
    "format": {"type": "str"},
    "name": {"type": "str"},
    "id": {"type": "str"},
    "state": {"type": "str", "choices": ["present", "absent", "applied"], "default": "present"},
    "keep": {"type": "int"},
    "match": {"type": "str", "default": "*"},
    "complete": {"type": "bool", "default": False},
    "allow_rollback": {"type": "bool", "default": False},
}


def task(module):
    want = wanted(module.params)
    have = observe(want)
    steps = plan(want, have)
    result = carry_out(module, ", ".join(want["paths"]), have, steps)
    if not module.check_mode:
        unmark(have["_unfinished"])
    images = reached(module, have, steps, lambda: observe(want))["images"]
    result["images"] = [{"path": path, **images[path]} for path in want["paths"]]
    return result


def main():
    run(task, argument_spec=ARGUMENTS, mutually_exclusive=[("name", "id")], required_if=[("state", "present", ["name"])])


if __name__ == "__main__":
    main()
