# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What make demo shows of a play: a line for each task that did something or says something."""

from __future__ import annotations

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: brief
type: stdout
short_description: a line for each task that did something
description: [A line for each task that did something, the texts of debug tasks, and one line in the end.]
"""


class CallbackModule(CallbackBase):
    """Ansible's hooks, of those that matter here."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "brief"

    def _line(self, mark, result):
        item = result._result.get("item")
        name = result._task.get_name().strip().replace("diskwright.images.", "")
        self._display.display("  %-8s %s%s" % (mark, name, ": %s" % item if isinstance(item, str) else ""))

    def v2_runner_on_ok(self, result):
        if result._task.action.rsplit(".", 1)[-1] == "debug":
            text = result._result.get("msg", "")
            self._display.display("\n" + "\n".join("  " + line for line in (text if isinstance(text, list) else [text])) + "\n")
        elif "results" in result._result:
            return  # its items had a line each
        elif result._result.get("changed"):
            self._line("changed", result)
        elif result._task.action.startswith("diskwright."):
            self._line("ok", result)

    v2_runner_item_on_ok = v2_runner_on_ok

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self._line("failed", result)
        reason = str(result._result.get("stderr") or result._result.get("msg", "")).strip()
        self._display.display("           %s" % (reason.splitlines() or ["no reason given"])[-1])

    v2_runner_item_on_failed = v2_runner_on_failed

    def v2_playbook_on_stats(self, stats):
        for host in sorted(stats.processed):
            count = stats.summarize(host)
            self._display.display("  tasks: ok=%(ok)d changed=%(changed)d failed=%(failures)d" % count)
