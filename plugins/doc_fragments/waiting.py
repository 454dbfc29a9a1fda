# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What to do about images in use."""

from __future__ import annotations


class ModuleDocFragment:
    """The parameter of modules that lock images."""

    DOCUMENTATION = r"""
options:
  wait_for_unlock:
    description:
      - For how many seconds to try again if another process uses the image in a way that excludes what is to be done.
      - The error of an image that stays locked names the process (RV(ignore:holder)), as far as the user may see it, and the permission
        (RV(ignore:permission)) that it holds, or does not share.
    type: float
    default: 0
"""
