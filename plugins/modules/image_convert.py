#!/usr/bin/python
# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation, and one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_convert
short_description: Keep a disk image converted from another
version_added: 0.1.0
author:
  - The Diskwright authors (@diskwright)
description:
  - Converts a disk image to another format, or compacts, compresses or concatenates images into a new one.
  - A destination that is up to date is left alone. What that means is the choice of O(up_to_date).
  - The destination is written beside its final name and renamed when it is complete. The source is never changed.
extends_documentation_fragment:
  - ansible.builtin.files
  - diskwright.images.attributes
  - diskwright.images.untrusted
  - diskwright.images.waiting
  - diskwright.images.reporting
options:
  src:
    description:
      - The image on the managed node to convert. Several are concatenated in their order.
      - A name with a comma must be written as a list of one, since Ansible splits a plain string at commas.
    type: list
    elements: path
    required: true
  src_format:
    description:
      - The format of O(src). It is told from the content if not given.
      - State it for raw images that others may have written to, since whoever writes a raw image decides what its content looks like.
    type: str
  disk:
    description:
      - Which disk of a package to convert, with O(src_format=ova) and O(src_format=ovf). Its number (the first is V(0)), its id, or the name of its file.
      - It is the first one if not given.
    type: str
  verify_manifest:
    description:
      - Whether all files of a package are compared with the checksums of its manifest before it is converted. A package without a
        manifest has nothing to be compared with.
    type: bool
    default: false
  checksum:
    description:
      - What O(src) must have, as ALGORITHM:HEX. Verified whenever O(src) is about to be converted, but not in check mode.
    type: str
  src_encryption:
    description: What opens O(src), if it is encrypted. It needs O(src_format).
    type: dict
    suboptions:
      passphrase:
        description: The passphrase.
        type: str
      passphrase_file:
        description: A file on the managed node that holds it.
        type: path
  backing_encryption:
    description: What opens the backing file of O(src), if that is an encrypted qcow2 image. It needs O(src_format).
    type: dict
    suboptions:
      passphrase:
        description: The passphrase.
        type: str
      passphrase_file:
        description: A file on the managed node that holds it.
        type: path
  content_checksum:
    description:
      - Whether to return the checksum of what was copied in RV(plan[].content_checksum). It is SHA-256 over the SHA-256 digests of all blocks of
        64 KiB that the disk reads as, so that it is the same in each format, compressed or not, and however sparse. It is computed
        while the data is copied.
    type: bool
    default: false
  content_file:
    description:
      - Whether to keep that checksum in a file beside O(dest), whose name is that of O(dest) with C(.content.json) added. The file holds the keys
        C(algorithm), C(content), and C(file) with size, inode and time of modification of the image that it is about.
    type: bool
    default: false
  dest:
    description: The image to make.
    type: path
    required: true
  format:
    description: The format of O(dest).
    type: str
    default: qcow2
  options:
    description: Options of the format, by the names that C(qemu-img convert -o) has for them, for example V(compression_type).
    type: dict
  size:
    description:
      - The virtual size of O(dest), with the suffixes V(k), V(M), V(G), V(T), V(P) and V(E) that count in 1024s. It must not be smaller
        than that of O(src), which is the default.
      - What is added reads as zeroes, but as noise in an image of the format V(luks).
    type: str
  compress:
    description: Whether to compress the data.
    type: bool
    default: false
  backing_file:
    description:
      - Makes O(dest) an overlay of this image, which must have the content of the backing file of O(src). Only what differs is stored.
      - A relative name is relative to O(dest).
    type: str
  backing_format:
    description: The format of O(backing_file).
    type: str
  changed:
    description:
      - The name of a dirty bitmap of O(src). Only what it has marked is copied, into an overlay of O(backing_file), which must have
        the content that O(src) had when the bitmap was made or cleared last. That is an incremental backup.
      - An inconsistent bitmap is refused. M(diskwright.images.image_bitmap) makes and clears bitmaps.
    type: str
  encryption:
    description:
      - Makes O(dest) an encrypted image, of the format V(luks) or of V(qcow2) with a LUKS header inside. Excludes O(compress).
      - The passphrase of a destination that is left alone may be another one. M(diskwright.images.disk_image) changes it.
      - No passphrase is ever shown, be it in a plan, a result or a message.
      - It takes the Python package C(cryptography) or C(diskwright-accel), or the library libgcrypt, on the managed node.
    type: dict
    suboptions:
      passphrase:
        description: The passphrase. Keep it in a vault.
        type: str
      passphrase_file:
        description:
          - A file on the managed node that holds the passphrase and nothing else.
          - The end of a line belongs to the passphrase, as it does for qemu-img.
        type: path
  up_to_date:
    description:
      - V(source) looks at a record that is kept with the destination (in an extended attribute, or in a hidden file beside it). The
        destination is up to date if it was made from the same files, unchanged since by name, size, inode and time of
        modification, with the same parameters. What was written to the destination afterwards stays.
      - V(content) compares the content of the source and the destination, which means reading both.
      - V(checksum) compares the content checksums of the two that are kept beside them, see O(content_file). Where O(src) has none it is
        read; where O(dest) has none, or was written since, it is made anew. Other than with V(source), a source that is renewed without a change of
        its content leaves the destination alone. Implies O(content_file=true).
      - V(exists) leaves every image of the wanted form alone.
    type: str
    choices: [source, content, checksum, exists]
    default: source
  replace:
    description: Whether a destination that exists and is not up to date may be replaced, which destroys its content.
    type: bool
    default: false
seealso:
  - module: diskwright.images.disk_image
  - module: diskwright.images.qemu_img_info
"""

EXAMPLES = r"""
- name: A compressed qcow2 image from a raw one
  diskwright.images.image_convert:
    src: /srv/incoming/disk.raw
    src_format: raw
    dest: /var/lib/images/template.qcow2
    compress: true
    options:
      compression_type: zlib

- name: A template of 20 GiB from a verified download
  diskwright.images.image_convert:
    src: /srv/incoming/debian-12.qcow2
    checksum: sha256:2bfe9a3b0a4e9e5d6fd8f3c1b1e0c1f1c0f5e8d5b2d8f6f4d7f0c9a4d1a2b3c4
    dest: /var/lib/images/debian-12.qcow2
    size: 20G
    mode: "0444"

- name: Follow a source that is renewed now and then
  diskwright.images.image_convert:
    src: /srv/incoming/nightly.qcow2
    dest: /srv/raw/nightly.raw
    format: raw
    replace: true

- name: An encrypted copy
  diskwright.images.image_convert:
    src: /srv/incoming/disk.raw
    dest: /var/lib/images/secret.luks
    format: luks
    encryption:
      passphrase_file: /etc/keys/secret

- name: What was written since the full backup
  diskwright.images.image_convert:
    src: /var/lib/images/web.qcow2
    dest: /srv/backup/web-monday.qcow2
    backing_file: web-full.qcow2
    backing_format: qcow2
    changed: since-full-backup

- name: A copy with the checksum of its content beside it
  diskwright.images.image_convert:
    src: /var/lib/images/web.qcow2
    dest: /srv/backup/web.qcow2
    compress: true
    up_to_date: checksum
    replace: true

- name: An image of unknown origin, which is to be no trouble
  diskwright.images.image_convert:
    src: /srv/incoming/upload.qcow2
    src_format: qcow2
    dest: /var/lib/images/upload.qcow2
    implicit_references: none
    limits:
      virtual_size: 100G
      expansion: 100

- name: Only if the content is different
  diskwright.images.image_convert:
    src: /srv/incoming/disk.raw
    dest: /var/lib/images/copy.qcow2
    up_to_date: content
    replace: true
"""

RETURN = r"""
image:
  description: The destination as it is after the task, or would be in check mode.
  returned: success
  type: dict
  sample: {state: present, format: qcow2, size: 21474836480, current: true}
plan:
  description: The conversion that was made, or would be in check mode, with the reason for it.
  returned: success
  type: list
  elements: dict
  contains:
    verb:
      description: What is done.
      type: str
      sample: convert
    target:
      description: The image.
      type: str
      sample: /var/lib/images/web.qcow2
    command:
      description: The command that it replaces.
      type: str
      sample: qemu-img convert -f raw -O qcow2 -c /srv/incoming/disk.raw /var/lib/images/template.qcow2
    why:
      description: The reason.
      type: str
      sample: it does not exist
    cost:
      description: How many bytes it will write, as far as that can be told beforehand.
      returned: where it can be told
      type: int
      sample: 0
    bytes:
      description: The bytes that the destination takes in its file system.
      returned: where it was made
      type: int
      sample: 431030272
    content_checksum:
      description: The checksum of the content, in hexadecimal digits.
      returned: with O(content_checksum) or O(content_file), where it was made
      type: str
      sample: 0f3c8a5b6d0e7a4f1c2b9d8e7f6a5b4c3d2e1f0a9b8c7d6e5f4a3b2c1d0e9f8a
diskwright:
  description: The version of the library and the kernels in use.
  returned: success
  type: dict
  sample: {version: 0.1.0, kernels: pure}
"""

import os  # noqa: E402

from ..module_utils import _policy  # noqa: E402
from ..module_utils._conversion import observe, plan, wanted  # noqa: E402
from ..module_utils._arguments import NEW_IMAGE  # noqa: E402
from ..module_utils._look import observe as observe_disk  # noqa: E402
from ..module_utils._runner import REPORTING, WAITING, carry_out, reached, run, set_attributes  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..module_utils import _bundle_converting  # noqa: E402, F401  # pylint: disable=unused-import

ARGUMENTS = {
    **_policy.ARGUMENTS,
    **WAITING,
    **REPORTING,
    "src_encryption": NEW_IMAGE,
    "backing_encryption": NEW_IMAGE,
    "content_checksum": {"type": "bool", "default": False},
    "content_file": {"type": "bool", "default": False},
    "src": {"type": "list", "elements": "path", "required": True},
    "src_format": {"type": "str"},
    "disk": {"type": "str"},
    "verify_manifest": {"type": "bool", "default": False},
    "checksum": {"type": "str"},
    "dest": {"type": "path", "required": True},
    "format": {"type": "str", "default": "qcow2"},
    "options": {"type": "dict"},
    "size": {"type": "str"},
    "compress": {"type": "bool", "default": False},
    "backing_file": {"type": "str"},
    "backing_format": {"type": "str"},
    "changed": {"type": "str"},
    "encryption": NEW_IMAGE,
    "up_to_date": {"type": "str", "choices": ["source", "content", "checksum", "exists"], "default": "source"},
    "replace": {"type": "bool", "default": False},
}


def task(module):
    dest = module.params["dest"]
    backing = module.params["backing_file"]
    _policy.choose(module.params, [] if backing is None else [os.path.join(os.path.dirname(os.path.abspath(dest)), backing)])
    want = wanted(module.params)
    have = observe(want)
    steps = plan(want, have)
    result = carry_out(module, dest, have, steps)
    result["image"] = reached(module, have, steps, lambda: observe_disk(dest))
    set_attributes(module, dest, result)
    return result


def main():
    rules = {"required_together": [("backing_file", "backing_format")], "required_by": {"changed": "backing_file"}}
    run(task, argument_spec=ARGUMENTS, add_file_common_args=True, **rules)


if __name__ == "__main__":
    main()
