# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one file that knows AnsibleModule: check mode, diff mode, failure."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule

from . import diskwright as library
from ._plan import Refusal, difference
from .diskwright import kernels
from .diskwright.errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Sequence

    from ._plan import Step

    Task = Callable[[AnsibleModule], Mapping[str, Any]]


def run(task: Task, **declaration: Any) -> None:
    """Run `task` as an Ansible module with check mode, and end the process.

    `declaration` is what AnsibleModule takes. The task's mapping is the module's result. Error, OSError and Refusal become
    a failure that says which file, what and where.
    """
    module = AnsibleModule(supports_check_mode=True, **declaration)
    try:
        result = dict(task(module))
    except (Error, OSError, Refusal) as exc:
        module.fail_json(**failure(exc))
    module.exit_json(diskwright={"version": library.__version__, "kernels": kernels.backend()}, **result)


def failure(exc: Exception) -> dict[str, Any]:
    """The fields of a failed result."""
    fields: dict[str, Any] = {"msg": str(exc), "error": type(exc).__name__}
    for name in ("filename", "offset", "errno", "hint"):
        value = getattr(exc, name, None)
        if value is not None:
            fields[name] = value
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
