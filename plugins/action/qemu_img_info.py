# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""qemu_img_info: what is sent is small, and for what that cannot do something larger is sent."""

from __future__ import annotations

from ansible.plugins.action import ActionBase

SMALL = "diskwright.images.qemu_img_info"
LARGE = "diskwright.images.qemu_img_info_full"
MORE = ("map", "measure", "content_checksum")  # parameters that need the larger one in any case


class ActionModule(ActionBase):
    """Runs one module, and another one if a part of the library was missing."""

    _supports_check_mode = True
    _supports_async = True

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        args, in_background = self._task.args, bool(self._task.async_val)
        limits = args.get("limits")
        if not in_background and not any(args.get(key) for key in MORE) and not (isinstance(limits, dict) and limits.get("expansion")):
            found = self._execute_module(SMALL, task_vars=task_vars)
            if found.get("error") != "NotCarried":
                return {**result, **found}
        return {**result, **self._execute_module(LARGE, task_vars=task_vars, wrap_async=in_background)}
