# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an image may make a module do."""

from __future__ import annotations


class ModuleDocFragment:
    """The parameters of the policy on images that somebody else made."""

    DOCUMENTATION = r"""
options:
  implicit_references:
    description:
      - Which files an image may make this module open by naming them, as backing file, data file, extent or parent.
      - V(none) allows no file, V(same_directory) those in the directory of the image that names them or below it, links out of it excepted.
        V(listed) allows those in O(allowed_references), and V(any) all, as QEMU does.
      - Files that a parameter of the task names are always allowed.
    type: str
    choices: [none, same_directory, listed, any]
    default: same_directory
  allowed_references:
    description:
      - Files that are allowed besides. A path allows the file, or all files in the directory, that has it.
      - Anything else is compared with the name as the image stores it. Names of servers (C(nbd://...)) and descriptions (C(json:...)) are
        allowed in no other way, but with O(implicit_references=any).
    type: list
    elements: str
    default: []
  limits:
    description: How much work an image may be. One that is more is refused.
    type: dict
    suboptions:
      virtual_size:
        description: How large its disk may be, in bytes or with the suffixes V(k), V(M), V(G), V(T), V(P) and V(E). Without it any size is good.
        type: str
      expansion:
        description:
          - How many times as many bytes of data as the image is large it may hold, where its data is read. Compressed images of ordinary
            content hold no more than 10 times as many. Without it any number is good.
        type: int
      chain_depth:
        description: How many images may lie above one another.
        type: int
        default: 64
      key_derivation:
        description: How many iterations trying a passphrase at one key slot may take.
        type: int
        default: 12000000
"""
