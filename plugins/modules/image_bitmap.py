#!/usr/bin/python
# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation, and one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_bitmap
short_description: Make, remove and change persistent dirty bitmaps of disk images
version_added: 0.1.0
author:
  - The Diskwright authors (@diskwright)
description:
  - A dirty bitmap records which parts of a disk are written, so that an incremental backup need copy no more than those. This module
    makes them, removes them, clears them, says whether they record, and merges them.
  - An image that another process uses is refused. What bitmaps there are is told by M(diskwright.images.qemu_img_info), also of
    images in use, in RV(diskwright.images.qemu_img_info#module:images[].format_specific).
extends_documentation_fragment:
  - diskwright.images.attributes
  - diskwright.images.untrusted
  - diskwright.images.waiting
options:
  path:
    description: The image. It must be of a format that stores bitmaps, such as V(qcow2) with C(compat=1.1).
    type: path
    required: true
  format:
    description: Its format. It is told from its content if not given.
    type: str
  name:
    description: The name of the bitmap.
    type: str
    required: true
  state:
    description:
      - V(present) makes the bitmap if there is none. So do all of the following but V(absent).
      - V(absent) removes it, and with it what it recorded.
      - V(cleared) makes it forget what it recorded. One that has recorded nothing is left alone.
      - V(enabled) has it record writes, which a new one does anyway. V(disabled) has it record none.
      - V(merged) adds to it what the bitmaps O(merge) have recorded. It is left alone if it has all of that.
    type: str
    choices: [present, absent, cleared, enabled, disabled, merged]
    default: present
  granularity:
    description:
      - How many bytes of the disk share a bit. A power of two from V(512) to V(2G), with the suffixes V(k), V(M) and V(G).
      - Without it a new bitmap has the image's cluster size, but from 4 to 64 KiB, and an existing one keeps its own.
    type: str
  replace:
    description:
      - Whether a bitmap that is inconsistent, or has another granularity, may be made anew, which loses what it recorded.
      - An inconsistent one was in use when the program that wrote to the image ended before its time. What it recorded means nothing.
    type: bool
    default: false
  merge:
    description: The names of the bitmaps to merge, with O(state=merged).
    type: list
    elements: str
  source_file:
    description: The image that has the bitmaps O(merge), if it is another one. Its disk must have the same size.
    type: path
  source_format:
    description: The format of O(source_file). It is told from its content if not given.
    type: str
notes:
  - Encrypted images need no passphrase, since bitmaps are not encrypted.
seealso:
  - module: diskwright.images.qemu_img_info
  - module: diskwright.images.image_snapshot
  - name: Dirty bitmaps and incremental backup
    description: What bitmaps are for, and how a virtual machine uses them.
    link: https://www.qemu.org/docs/master/interop/bitmaps.html
"""

EXAMPLES = r"""
- name: Record what is written from now on
  diskwright.images.image_bitmap:
    path: /var/lib/images/web.qcow2
    name: since-full-backup

- name: Start anew, after a full backup
  diskwright.images.image_bitmap:
    path: /var/lib/images/web.qcow2
    name: since-full-backup
    state: cleared
    replace: true

- name: Take over what two bitmaps of an overlay recorded
  diskwright.images.image_bitmap:
    path: /var/lib/images/web.qcow2
    name: since-full-backup
    state: merged
    merge: [monday, tuesday]
    source_file: /var/lib/images/web-overlay.qcow2
    source_format: qcow2

- name: No bitmap
  diskwright.images.image_bitmap:
    path: /var/lib/images/web.qcow2
    name: since-full-backup
    state: absent
"""

RETURN = r"""
bitmap:
  description: The bitmap as it is after the task, or would be in check mode. Null if there is none.
  returned: success
  type: dict
  contains:
    name:
      description: The name.
      type: str
      sample: since-full-backup
    granularity:
      description: How many bytes of the disk share a bit.
      type: int
      sample: 65536
    enabled:
      description: Whether it records writes.
      type: bool
      sample: true
    inconsistent:
      description: Whether it is in use by another process, or was when one ended before its time.
      type: bool
      sample: false
    dirty_bytes:
      description: How many bytes of the disk it has recorded as written. Null if it is inconsistent.
      type: int
      sample: 1048576
plan:
  description: The step that was taken, or would be in check mode, with the command that it replaces and the reason for it.
  returned: success
  type: list
  elements: dict
  sample:
    - verb: bitmap
      target: /var/lib/images/web.qcow2
      command: qemu-img bitmap --add /var/lib/images/web.qcow2 since-full-backup
      why: there is no such bitmap
diskwright:
  description: The version of the library and the kernels in use.
  returned: success
  type: dict
  sample: {version: 0.1.0, kernels: pure}
"""

from ..module_utils._bitmap import observe, plan, wanted  # noqa: E402
from ..module_utils import _policy  # noqa: E402
from ..module_utils._runner import WAITING, carry_out, reached, run  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..module_utils import _bundle_snapshots  # noqa: E402, F401  # pylint: disable=unused-import

ARGUMENTS = {
    **_policy.ARGUMENTS,
    **WAITING,
    "path": {"type": "path", "required": True},
    "format": {"type": "str"},
    "name": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent", "cleared", "enabled", "disabled", "merged"], "default": "present"},
    "granularity": {"type": "str"},
    "replace": {"type": "bool", "default": False},
    "merge": {"type": "list", "elements": "str"},
    "source_file": {"type": "path"},
    "source_format": {"type": "str"},
}


def task(module):
    want = wanted(module.params)
    have = observe(want)
    steps = plan(want, have)
    result = carry_out(module, want["path"], have, steps)
    result["bitmap"] = reached(module, have, steps, lambda: observe(want))["bitmap"]
    return result


def main():
    required_by = {"source_file": "merge", "source_format": "source_file"}
    run(task, argument_spec=ARGUMENTS, required_if=[("state", "merged", ["merge"])], required_by=required_by)


if __name__ == "__main__":
    main()
