# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the modules that describe images take."""

from __future__ import annotations


class ModuleDocFragment:
    """The parameters of qemu_img_info and of what it falls back to."""

    DOCUMENTATION = r"""
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
  content_checksum:
    description:
      - Whether to return the checksum of the content, for which all of it is read. It is the same for all images with the same content, see
        O(diskwright.images.image_convert#module:content_checksum).
    type: bool
    default: false
  inspect:
    description:
      - Whether to return a verdict on each image that somebody else made, in RV(images[].inspect). What the image refers to is compared with
        O(implicit_references) and its cost with O(limits), and no file is opened but those that are allowed.
      - An image that is not safe, or no image at all, is no error then; nothing else is returned for it.
    type: bool
    default: false
  missing_ok:
    description: Whether an image that does not exist is described by RV(images[].exists=false) rather than being an error.
    type: bool
    default: false
"""
