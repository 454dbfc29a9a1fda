# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one file that knows AnsibleModule: check mode, diff mode, file attributes, failure."""

from __future__ import annotations

import os
import signal

from ansible.module_utils.basic import AnsibleModule

from . import diskwright as library
from ._plan import Refusal, after, difference, visible
from .diskwright.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from ._plan import Step

    Task = Callable[[AnsibleModule], Mapping[str, Any]]


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asks the process to end; what was begun is undone first."""


def run(task: Task, **declaration: Any) -> None:
    """Run `task` as an Ansible module with check mode, and end the process.

    `declaration` is what AnsibleModule takes. The task's mapping is the module's result. Error, OSError and Refusal become
    a failure that says which file, what and where. So does a signal that asks the process to end.
    """
    module = AnsibleModule(supports_check_mode=True, **declaration)
    for number in SIGNALS:
        signal.signal(number, _stop)
    try:
        from .diskwright import kernels

        backend = kernels.backend()
        result = dict(task(module))
    except (Error, OSError, Refusal) as exc:
        module.fail_json(**failure(exc))
    except Stopped as exc:
        module.fail_json(msg="stopped by %s" % exc, error="Stopped")
    module.exit_json(diskwright={"version": library.__version__, "kernels": backend}, **result)


def _stop(number: int, _frame: Any) -> None:
    for again in SIGNALS:  # the first one is enough; undoing is not to be stopped
        signal.signal(again, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


def failure(exc: Exception) -> dict[str, Any]:
    """The fields of a failed result."""
    fields: dict[str, Any] = {"msg": str(exc), "error": type(exc).__name__, **getattr(exc, "details", {})}
    for name in ("filename", "offset", "errno", "hint", "holder"):
        value = getattr(exc, name, None)
        if value is not None:
            fields[name] = value
    if isinstance(exc, OSError) and exc.strerror:
        fields["msg"] = "%s: %s" % (exc.filename, exc.strerror) if exc.filename else exc.strerror
    if str(fields.get("filename", "")) not in fields["msg"]:
        fields["msg"] = "%s: %s" % (fields["filename"], fields["msg"])
    if "holder" in fields:
        fields["msg"] += ": %s uses it" % fields["holder"]
    return fields


def carry_out(module: AnsibleModule, path: str, have: Mapping[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    """Apply `steps` unless in check mode; the `changed`, `plan` and `diff` of a result.

    What a step's run returns (counts, a note) is added to its entry in `plan`.
    """
    plan = [step.as_dict() for step in steps]
    result: dict[str, Any] = {"changed": bool(steps), "plan": plan}
    if module._diff:  # pylint: disable=protected-access
        result["diff"] = difference(path, have, steps)
    if not module.check_mode:
        for step, entry in zip(steps, plan):
            entry.update(step.run() or {})
    return result


def reached(
    module: AnsibleModule,
    have: Mapping[str, Any],
    steps: Sequence[Step],
    observe: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """The state after the steps: observed, or in check mode foretold."""
    foretold = after(have, steps)
    return visible({**foretold, **observe()} if steps and not module.check_mode else foretold)


def set_attributes(module: AnsibleModule, path: str, result: dict[str, Any]) -> None:
    """Give the file at `path` the owner, mode and so on that the parameters want; `changed` and `diff` follow."""
    if os.path.exists(path):
        attributes = module.load_file_common_arguments(module.params, path)
        diff: Optional[dict[str, Any]] = result.get("diff")
        result["changed"] = module.set_fs_attributes_if_different(attributes, result["changed"], diff)
