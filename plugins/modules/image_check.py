#!/usr/bin/python
# Copyright (c) 2026 The Diskwright authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation, and one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_check
short_description: Check the consistency of disk images, and repair them
version_added: 0.1.0
author:
  - The Diskwright authors (@diskwright)
description:
  - Checks the metadata of disk images and fails if one is damaged.
  - Repairs what was found if O(repair) allows it. An image without findings is not written to.
  - An image that another process has open for writing is not checked, since its metadata changes meanwhile.
extends_documentation_fragment:
  - diskwright.images.attributes
  - diskwright.images.untrusted
  - diskwright.images.waiting
options:
  path:
    description: The image. Either this or O(paths) must be given.
    type: path
  paths:
    description: Several images. All of them are checked, and repaired where they may be, before the task fails for one.
    type: list
    elements: path
  format:
    description: Its format. It is told from its content if not given.
    type: str
  repair:
    description:
      - V(none) only checks, V(leaks) gives back clusters that nothing refers to, which is always safe.
      - V(all) mends everything, with a risk of choosing wrongly where the metadata contradict each other.
    type: str
    choices: [none, leaks, all]
    default: none
  tolerate:
    description: What may be left without the task failing. Leaked clusters waste space and do no harm.
    type: str
    choices: [nothing, leaks, everything]
    default: leaks
  on_error:
    description:
      - V(fail) stops at the first image that cannot be checked. V(record) goes on, and says why in RV(images[].error).
      - Images of a format without a check, and those that somebody else writes, cannot be checked.
    type: str
    choices: [fail, record]
    default: fail
  force_share:
    description: Whether to check an image that another process writes. Findings may then mean nothing. Excludes repair.
    type: bool
    default: false
seealso:
  - module: diskwright.images.qemu_img_info
"""

EXAMPLES = r"""
- name: Fail if the image is damaged
  diskwright.images.image_check:
    path: /var/lib/images/web.qcow2

- name: Three images in one task
  diskwright.images.image_check:
    paths:
      - /var/lib/images/node1.qcow2
      - /var/lib/images/node2.qcow2
      - /var/lib/images/node3.qcow2

- name: Give leaked clusters back
  diskwright.images.image_check:
    path: /var/lib/images/web.qcow2
    repair: leaks
    tolerate: nothing
"""

RETURN = r"""
check:
  description: What the check found, after the repair if there was one. Further counts that are zero are missing.
  returned: with a single image, unless it could not be checked
  type: dict
  contains:
    check_errors:
      description: How many errors kept the check from seeing everything.
      type: int
      sample: 0
    corruptions:
      description: How many contradictions there are in the metadata.
      type: int
      sample: 0
    leaks:
      description: How many clusters are taken that nothing refers to.
      type: int
      sample: 3
    messages:
      description: A line on each of the first hundred findings.
      type: list
      elements: str
      sample: [Leaked cluster 5 refcount=1 reference=0]
    filename:
      description: The image.
      type: str
      sample: /var/lib/images/web.qcow2
    format:
      description: Its format.
      type: str
      sample: qcow2
    image_end_offset:
      description: Where the last cluster in use ends, in bytes.
      type: int
      sample: 1312030720
    total_clusters:
      description: How many clusters the disk has.
      type: int
      sample: 327680
    allocated_clusters:
      description: How many of them are stored in the image.
      type: int
      sample: 20011
    fragmented_clusters:
      description: How many of those do not follow their neighbour.
      type: int
      sample: 12
    compressed_clusters:
      description: How many of those are compressed.
      type: int
      sample: 20011
images:
  description:
    - The same for each image, with its path, in the order in which they were given; with O(on_error=record) C(error) in place
      of it where one could not be checked.
  returned: always, unless an image could not be checked
  type: list
  elements: dict
  contains:
    path:
      description: The path that was given.
      type: str
      sample: /var/lib/images/node1.qcow2
    error:
      description: Why it could not be checked.
      returned: with O(on_error=record), where that is so
      type: str
      sample: This image format does not support checks
    corruptions:
      description: How many contradictions there are in the metadata. The other keys of RV(check) follow.
      type: int
      sample: 0
plan:
  description: The repair that was made, or would be in check mode, with the counts of what it mended.
  returned: success
  type: list
  elements: dict
  sample:
    - verb: repair
      target: /var/lib/images/web.qcow2
      command: qemu-img check -r leaks /var/lib/images/web.qcow2
      why: 0 corruptions and 3 leaked clusters were found
      leaks_fixed: 3
      corruptions_fixed: 0
diskwright:
  description: The version of the library and the kernels in use.
  returned: success
  type: dict
  sample: {version: 0.1.0, kernels: pure}
"""

from ..module_utils import _policy  # noqa: E402
from ..module_utils._plan import Refusal  # noqa: E402
from ..module_utils._repair import judge, observe, plan  # noqa: E402
from ..module_utils._runner import EXPECTED, WAITING, carry_out, failure, reached, run  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..module_utils import _bundle_checking  # noqa: E402, F401  # pylint: disable=unused-import

ARGUMENTS = {
    **_policy.ARGUMENTS,
    **WAITING,
    "path": {"type": "path"},
    "paths": {"type": "list", "elements": "path"},
    "format": {"type": "str"},
    "repair": {"type": "str", "choices": ["none", "leaks", "all"], "default": "none"},
    "tolerate": {"type": "str", "choices": ["nothing", "leaks", "everything"], "default": "leaks"},
    "on_error": {"type": "str", "choices": ["fail", "record"], "default": "fail"},
    "force_share": {"type": "bool", "default": False},
}


def task(module):
    want = module.params
    paths = [want["path"]] if want["paths"] is None else want["paths"]
    if not paths:
        raise Refusal("paths: at least one image is needed")
    if want["force_share"] and want["repair"] != "none":
        raise Refusal("force_share excludes repair: nobody else may write to an image while it is repaired")
    result = {"changed": False, "plan": [], "images": []}
    found = {}
    for path in paths:
        own = {**want, "path": path}
        try:
            have = observe(path, want["format"], want["force_share"])
        except EXPECTED as exc:
            if want["on_error"] == "fail":
                raise
            result["images"].append({"path": path, "error": failure(exc)["msg"]})
            continue
        steps = plan(own, have)
        done = carry_out(module, path, have, steps)
        found = reached(module, have, steps, lambda path=path: observe(path, want["format"], False))
        result["changed"] = result["changed"] or done["changed"]
        result["plan"] += done["plan"]
        result["images"].append({"path": path, **found})
        if "diff" in done:
            result.setdefault("diff", []).append(done["diff"])
    if len(paths) == 1 and found:
        result.update(check=found, **({"diff": done["diff"]} if "diff" in done else {}))
    judge([image for image in result["images"] if "error" not in image], want["tolerate"])
    return result


def main():
    run(task, argument_spec=ARGUMENTS, required_one_of=[("path", "paths")], mutually_exclusive=[("path", "paths")])


if __name__ == "__main__":
    main()
