# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one file that knows AnsibleModule: check mode, diff mode, file attributes, failure."""

from __future__ import annotations

import gc
import os
import signal

from ansible.module_utils.basic import AnsibleModule

from . import _policy
from . import diskwright as library
from ._plan import Refusal, after, difference, visible
from .diskwright.errors import Error, Locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    from ._plan import Step

    Task = Callable[[AnsibleModule], Mapping[str, Any]]


EXPECTED = (Error, OSError, Refusal)  # what a task may raise, and a result says
gc.set_threshold(100000)  # a short run makes no garbage worth the search

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WAITING: dict[str, Any] = {"wait_for_unlock": {"type": "float", "default": 0}}  # what the documentation fragment `waiting` describes
REPORTING: dict[str, Any] = {"progress_file": {"type": "path"}}  # and `reporting`
PAUSE = 0.25  # seconds between two attempts to lock an image

_taken: list[dict[str, Any]] = []  # the steps that were carried out up to now


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
        if module.params.get("progress_file") is not None:
            from . import _progress

            _progress.start(module.params["progress_file"])
        result = _until_unlocked(module, task)
    except EXPECTED as exc:
        _end_report(module, True)
        module.fail_json(**failure(exc), **({"changed": True, "plan": _taken} if _taken else {}))
    except Stopped as exc:
        _end_report(module, True)
        module.fail_json(msg="stopped by %s" % exc, error="Stopped")
    _end_report(module, False)
    gc.freeze()  # the interpreter need not look for garbage at its end either
    module.exit_json(diskwright={"version": library.__version__, "kernels": backend}, **result)


def _end_report(module: AnsibleModule, failed: bool) -> None:
    if module.params.get("progress_file") is None:
        return
    from . import _progress

    try:
        _progress.end(failed)
    except OSError:
        return  # nobody to be told


def _until_unlocked(module: AnsibleModule, task: Task) -> dict[str, Any]:
    """The task's result; where an image is locked the task is tried again, for as long as the parameters say. It is looked at anew each
    time, so that steps that were taken are not taken again."""
    from time import monotonic, sleep

    patience = module.params.get("wait_for_unlock") or 0
    if not 0 <= patience < 1e9:
        raise Refusal("wait_for_unlock: %s is no number of seconds" % patience)
    deadline = monotonic() + patience
    while True:
        try:
            _policy.choose(module.params)
            result = dict(task(module))
            break
        except Locked as exc:
            left = deadline - monotonic()
            if left <= 0:
                if patience:
                    exc.waited = patience
                raise
            sleep(min(PAUSE, left))
    earlier = _taken[: len(_taken) - len(result.get("plan", ()))] if not module.check_mode else []
    if earlier:
        result.update(changed=True, plan=[*earlier, *result["plan"]])
    return result


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
    if isinstance(exc, Locked):
        _name_holder(exc, fields)
    return fields


def _name_holder(exc: Locked, fields: dict[str, Any]) -> None:
    """Say who uses the image, and how."""
    if exc.permission is not None:
        verb, name = exc.permission
        fields["permission"] = {"name": name, "shared": verb == "uses"}
        who = fields.get("holder") or "another process"
        fields["msg"] += ": %s %s the permission '%s'" % (who, "has" if verb == "uses" else "lets nobody else have", name)
    elif "holder" in fields:
        fields["msg"] += ": %s uses it" % fields["holder"]
    if exc.waited is not None:
        fields["msg"] += " (after %g seconds of waiting)" % exc.waited


def carry_out(module: AnsibleModule, path: str, have: Mapping[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    """Apply `steps` unless in check mode; the `changed`, `plan` and `diff` of a result.

    What a step's run returns (counts, a note) is added to its entry in `plan`.
    """
    plan = [step.as_dict() for step in steps]
    result: dict[str, Any] = {"changed": bool(steps), "plan": plan}
    if module._diff:  # pylint: disable=protected-access
        result["diff"] = difference(path, have, steps)
    if steps and not module.check_mode:
        from . import _progress

        for number, (step, entry) in enumerate(zip(steps, plan), 1):
            _progress.begin(number, len(steps), step.verb, step.target)
            entry.update(step.run() or {})
            _taken.append(entry)
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


def set_attributes(module: AnsibleModule, path: str, result: dict[str, Any], params: Optional[Mapping[str, Any]] = None) -> None:
    """Give the file at `path` the owner, mode and so on that the parameters want; `changed` and `diff` follow."""
    if os.path.exists(path):
        attributes = module.load_file_common_arguments({**(params or module.params), "path": path}, path)
        diff: Optional[dict[str, Any]] = result.get("diff")
        result["changed"] = module.set_fs_attributes_if_different(attributes, result["changed"], diff)
