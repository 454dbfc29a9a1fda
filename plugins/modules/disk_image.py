#!/usr/bin/python
# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation, and one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: disk_image
short_description: Make sure that a disk image exists as it should be, or does not exist
version_added: 0.1.0
author:
  - The Diskwright authors (@diskwright)
description:
  - Creates virtual machine disk images, also encrypted ones, grows and shrinks them, and removes them.
  - Changes the backing file of an existing image, its options and its passphrases, and writes what it holds into its backing file.
  - An image that is as wanted is left alone. A change that would lose data needs the parameter that allows it, and one that
    cannot be made in place is refused.
  - A new image is written beside its final name and renamed when it is complete.
extends_documentation_fragment:
  - ansible.builtin.files
  - diskwright.images.attributes
  - diskwright.images.untrusted
  - diskwright.images.waiting
  - diskwright.images.reporting
options:
  path:
    description: Where the image is. Either this or O(images) must be given.
    type: path
  images:
    description:
      - Several images, each with the options that are its own. All others are those of the task, so that what is alike is said once.
      - One task for a hundred images takes little longer than a task for one, where a loop takes a hundred times as long.
      - They are made and changed one after the other. Where one fails the task fails, and says in RV(images) what was done before.
    type: list
    elements: dict
    suboptions:
      path:
        description: Where the image is.
        type: path
        required: true
      state:
        description: See O(state).
        type: str
        choices: [present, absent]
      format:
        description: See O(format).
        type: str
      size:
        description: See O(size).
        type: str
      backing_file:
        description: See O(backing_file).
        type: str
      backing_format:
        description: See O(backing_format).
        type: str
      options:
        description: See O(options).
        type: dict
      preallocation:
        description: See O(preallocation).
        type: str
        choices: ['off', metadata, falloc, full]
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
      - What is added to an image reads as zeroes, but as noise in one of the format V(luks).
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
      - What to do if an existing image has another backing file than O(backing_file), or none. V(never) refuses.
      - V(moved) makes the image refer to O(backing_file) if that is the old backing file at a new place. The old one is gone, or both
        have the same content.
      - V(safe) takes into the image whatever the old backing file has and O(backing_file) has not, so that it reads as before.
      - V(unsafe) changes only the reference, so that what the image does not hold itself reads as O(backing_file) has it. It needs
        O(allow_unsafe_rebase).
    type: str
    choices: [never, moved, safe, unsafe]
    default: never
  allow_unsafe_rebase:
    description: Whether O(rebase=unsafe) may change what an image reads as.
    type: bool
    default: false
  flatten:
    description: Whether the image should have no backing file. One that has is made to hold all of its data itself, and takes more room.
    type: bool
    default: false
  commit:
    description:
      - Whether whatever the image holds itself should be in its backing file. If it holds anything, that is written there, and
        the image is emptied. It reads as before. It needs O(allow_backing_change).
      - A backing file that is smaller becomes as large as the image.
    type: bool
    default: false
  allow_backing_change:
    description: Whether O(commit) may change the backing file. Other images that are based on it, but for this one, are destroyed by that.
    type: bool
    default: false
  preallocation:
    description:
      - How much of the image, or of the part by which it grows, is allocated beforehand.
      - An existing V(raw) image gets its room in place, and an existing V(qcow2) one by a conversion, if O(allow_convert) allows it.
        V(off) takes no room away.
    type: str
    choices: ['off', metadata, falloc, full]
    default: 'off'
  options:
    description:
      - More options of the format, by the names that C(qemu-img create -o) has for them, for example V(cluster_size) or V(compat).
      - In an existing image those are changed that C(qemu-img amend) can change, for V(qcow2) V(compat), V(lazy_refcounts), V(refcount_bits)
        and, with O(allow_data_file_change), V(data_file). An image that differs in another one is refused.
    type: dict
  allow_convert:
    description:
      - Whether an existing image may be made anew from itself where it cannot be changed in place, because it has another format or
        another V(cluster_size), say. It is written beside the old one, which takes as much room again, and then takes its place.
      - Owner, mode and backing file stay as they are. An image with internal snapshots or dirty bitmaps, which would be lost, with
        encryption or with an external data file is refused all the same.
    type: bool
    default: false
  allow_data_file_change:
    description: Whether an existing image may be made to use another external data file, which changes what it reads as.
    type: bool
    default: false
  encryption:
    description:
      - Makes an encrypted image, of the format V(luks) or of V(qcow2) with a LUKS header inside, and opens an existing one.
      - An image that is not encrypted cannot become so in place, and is refused.
      - No passphrase is ever shown, be it in a plan, a result or a message.
      - That a passphrase opens an image is verified each time unless O(encryption.verify=false), which takes as long as the image was made to
        take, 2 seconds for each key slot in use if nothing else was said. C(iter-time) and C(encrypt.iter-time) in O(options) say it in milliseconds.
      - It takes the Python package C(cryptography) or C(diskwright-accel), or the library libgcrypt, on the managed node.
    type: dict
    suboptions:
      passphrase:
        description:
          - The passphrase that opens the image. Keep it in a vault.
          - If it does not open an existing image and O(encryption.old_passphrase) does, a key slot is added for it.
        type: str
      passphrase_file:
        description:
          - A file on the managed node that holds the passphrase and nothing else.
          - The end of a line belongs to the passphrase, as it does for qemu-img.
        type: path
      old_passphrase:
        description: Another passphrase, which opens an existing image as long as O(encryption.passphrase) does not.
        type: str
      old_passphrase_file:
        description: A file on the managed node that holds it.
        type: path
      erase_old:
        description:
          - Whether the old passphrase should open the image no more. Its key slots are erased, once the new passphrase opens another one.
          - The last key slot is never erased.
        type: bool
        default: false
      verify:
        description:
          - Whether to try if the passphrase opens an existing image. There is no way to know that is as safe and takes less time, since it is
            the trying that is made slow on purpose.
          - With V(false) an existing image that is encrypted is taken to be as it should be, until a step needs to open it.
        type: bool
        default: true
      keyslot:
        description: The number of the key slot, from 0 to 7, for a passphrase that is added. It is the first one that is free if not given.
        type: int
  backing_encryption:
    description: What opens an encrypted backing file, for O(flatten), O(commit) and O(rebase=safe).
    type: dict
    suboptions:
      passphrase:
        description: The passphrase.
        type: str
      passphrase_file:
        description: A file on the managed node that holds it.
        type: path
seealso:
  - module: diskwright.images.image_convert
  - module: diskwright.images.image_snapshot
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

- name: An encrypted clone
  diskwright.images.disk_image:
    path: /var/lib/images/secret.qcow2
    backing_file: template.qcow2
    encryption:
      passphrase: "{{ vault_disk_passphrase }}"

- name: Another passphrase for it
  diskwright.images.disk_image:
    path: /var/lib/images/secret.qcow2
    encryption:
      passphrase_file: /etc/keys/new
      old_passphrase_file: /etc/keys/old
      erase_old: true

- name: Base a clone on another template, without a change of its content
  diskwright.images.disk_image:
    path: /var/lib/images/clone1.qcow2
    backing_file: template-2.qcow2
    rebase: safe

- name: A clone that needs its template no more
  diskwright.images.disk_image:
    path: /var/lib/images/clone1.qcow2
    flatten: true

- name: Write what an overlay holds into the image below it
  diskwright.images.disk_image:
    path: /var/lib/images/web-overlay.qcow2
    backing_file: web.qcow2
    commit: true
    allow_backing_change: true

- name: Ten clones in one task
  diskwright.images.disk_image:
    backing_file: template.qcow2
    size: 20G
    images:
      - path: /var/lib/images/node1.qcow2
      - path: /var/lib/images/node2.qcow2
      - path: /var/lib/images/node3.qcow2
        size: 40G

- name: Another format, which takes a conversion
  diskwright.images.disk_image:
    path: /var/lib/images/legacy.img
    format: qcow2
    allow_convert: true

- name: Wait up to a minute for whoever uses the image
  diskwright.images.disk_image:
    path: /var/lib/images/web.qcow2
    size: 60G
    wait_for_unlock: 60

- name: A long task, whose progress is in a file
  diskwright.images.disk_image:
    path: /var/lib/images/clone2.qcow2
    flatten: true
    progress_file: /run/flatten.json
  async: 3600
  poll: 0

- name: No disk
  diskwright.images.disk_image:
    path: /var/lib/images/old.qcow2
    state: absent
"""

RETURN = r"""
image:
  description: The image as it is after the task, or would be in check mode.
  returned: success, with O(path)
  type: dict
  sample:
    state: present
    format: qcow2
    size: 21474836480
    backing_file: null
    backing_format: null
    encryption: luks
    key_slots: 1
    options: {cluster_size: "65536", compat: "1.1"}
images:
  description: The same for each image, with its path, in the order in which they were given.
  returned: with O(images)
  type: list
  elements: dict
  sample:
    - {path: /var/lib/images/node1.qcow2, changed: false, state: present, format: qcow2, size: 21474836480}
plan:
  description:
    - The steps that were taken, or would be in check mode, each with the command that it replaces, the reason for it, and how many
      bytes it will write as far as that can be told beforehand (RV(plan[].cost)).
    - The least that leads to the wanted state is done. In this order that is nothing, a change of a few bytes of metadata (C(amend), C(resize),
      C(rebase) without data), data that is moved (C(rebase), C(commit)), and last a conversion.
  returned: success
  type: list
  elements: dict
  contains:
    verb:
      description: What is done.
      type: str
      sample: resize
    target:
      description: The image.
      type: str
      sample: /var/lib/images/web.qcow2
    command:
      description: The command that it replaces.
      type: str
      sample: qemu-img resize -f qcow2 /var/lib/images/web.qcow2 42949672960
    why:
      description: The reason.
      type: str
      sample: it is 21474836480 bytes large and 42949672960 are wanted
    cost:
      description: How many bytes it will write, as far as that can be told beforehand.
      returned: where it can be told
      type: int
      sample: 0
diskwright:
  description: The version of the library and the kernels in use.
  returned: success
  type: dict
  sample: {version: 0.1.0, kernels: pure}
"""

import os  # noqa: E402

from ..module_utils import _policy  # noqa: E402
from ..module_utils._disk import exists, named_files, observe, plan, wanted  # noqa: E402
from ..module_utils._arguments import ANY_IMAGE, NEW_IMAGE  # noqa: E402
from ..module_utils._plan import Refusal  # noqa: E402
from ..module_utils._runner import REPORTING, WAITING, carry_out, reached, run, set_attributes  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..module_utils import _bundle_remaking, _bundle_writing  # noqa: E402, F401  # pylint: disable=unused-import

EACH = {
    "path": {"type": "path", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"]},
    "format": {"type": "str"},
    "size": {"type": "str"},
    "backing_file": {"type": "str"},
    "backing_format": {"type": "str"},
    "options": {"type": "dict"},
    "preallocation": {"type": "str", "choices": ["off", "metadata", "falloc", "full"]},
}
ARGUMENTS = {
    "path": {"type": "path"},
    "images": {"type": "list", "elements": "dict", "options": EACH},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "format": {"type": "str", "default": "qcow2"},
    "size": {"type": "str"},
    "allow_shrink": {"type": "bool", "default": False},
    "backing_file": {"type": "str"},
    "backing_format": {"type": "str"},
    "rebase": {"type": "str", "choices": ["never", "moved", "safe", "unsafe"], "default": "never"},
    "allow_unsafe_rebase": {"type": "bool", "default": False},
    "flatten": {"type": "bool", "default": False},
    "commit": {"type": "bool", "default": False},
    "allow_backing_change": {"type": "bool", "default": False},
    "preallocation": {"type": "str", "choices": ["off", "metadata", "falloc", "full"], "default": "off"},
    "options": {"type": "dict"},
    "allow_convert": {"type": "bool", "default": False},
    "allow_data_file_change": {"type": "bool", "default": False},
    "encryption": ANY_IMAGE,
    "backing_encryption": NEW_IMAGE,
    **_policy.ARGUMENTS,
    **WAITING,
    **REPORTING,
}


def task(module):
    if module.params["images"] is None:
        return one(module, module.params)
    result = {"changed": False, "plan": [], "images": []}
    places = set()
    for own in module.params["images"]:
        params = {**module.params, **{key: value for key, value in own.items() if value is not None}}
        place = os.path.realpath(params["path"])
        if place in places:
            raise Refusal("%s is in the list of images twice" % params["path"])
        places.add(place)
        try:
            done = one(module, params)
        except Refusal as exc:
            exc.details["images"] = result["images"]
            raise
        result["changed"] = result["changed"] or done["changed"]
        result["plan"] += done["plan"]
        result["images"].append({"path": params["path"], "changed": done["changed"], **done["image"]})
        if "diff" in done:
            result.setdefault("diff", []).append(done["diff"])
    return result


def one(module, params):
    path = params["path"]
    _policy.choose(params, named_files(params))
    want = wanted(params)
    have = observe(path, want) if want["state"] == "present" else exists(path)
    steps = plan(want, have)
    result = carry_out(module, path, have, steps)
    if want["state"] == "present":
        result["image"] = reached(module, have, steps, lambda: observe(path))
        set_attributes(module, path, result, params)
    else:
        result["image"] = {"state": "absent"}
    return result


def main():
    run(
        task,
        argument_spec=ARGUMENTS,
        add_file_common_args=True,
        required_one_of=[("path", "images")],
        required_by={"backing_format": ("backing_file",)},
        mutually_exclusive=[("path", "images"), ("backing_file", "flatten")],
    )


if __name__ == "__main__":
    main()
