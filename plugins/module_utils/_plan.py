# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Step and plan: the way from the state that is to the state that is wanted.

A plan is a list of steps, made by a pure function `plan(want, have)` without any I/O. Check mode and diff mode show the
very steps that a run applies.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Mapping, Optional, Sequence

    State = Mapping[str, Any]


class Refusal(Exception):
    """The wanted state cannot be reached from the state that is, or not without a permission that was not given.

    `details` are more fields for the result of the failed task.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


class Step:
    """One step: a `verb` on a `target`, and `why` it is needed.

    `argv` is what an operator would have typed (and then `more`), `change` what becomes different in the state, `run` does
    it; what it returns is added to the step in the task's result. Only `run` does any I/O. `cost` is how many bytes it will write, as far as
    that can be told beforehand; None where it cannot.
    """

    __slots__ = ("verb", "target", "why", "argv", "change", "run", "more", "cost")

    def __init__(
        self,
        verb: str,
        target: str,
        why: str,
        argv: Sequence[str],
        change: State,
        run: Callable[[], Optional[Mapping[str, Any]]],
        more: Sequence[Sequence[str]] = (),
        cost: Optional[int] = None,
    ) -> None:
        self.verb = verb
        self.target = target
        self.why = why
        self.argv = tuple(argv)
        self.change = change
        self.run = run
        self.more = tuple(more)
        self.cost = cost

    def line(self) -> str:
        """The command that the step replaces, or several."""
        from shlex import quote

        return " && ".join(" ".join(quote(word) for word in words) for words in (self.argv, *self.more))

    def as_dict(self) -> dict[str, Any]:
        """For a module's result."""
        entry: dict[str, Any] = {"verb": self.verb, "target": self.target, "command": self.line(), "why": self.why}
        return entry if self.cost is None else {**entry, "cost": self.cost}


def after(have: State, steps: Sequence[Step]) -> dict[str, Any]:
    """The state that `steps` lead to from `have`, as far as it can be told beforehand."""
    state = dict(have)
    for step in steps:
        state.update(step.change)
    return state


def visible(state: State) -> dict[str, Any]:
    """What of a state is of interest to people: keys with an underscore in front are the planner's own."""
    return {key: value for key, value in state.items() if not key.startswith("_")}


def difference(path: str, have: State, steps: Sequence[Step]) -> dict[str, Any]:
    """What a diff shows: the two states, and below the second the steps that lead there."""
    before, wanted = [
        {key: value for key, value in visible(state).items() if value is not None} for state in (have, after(have, steps))
    ]
    if steps:
        wanted["plan"] = ["%s  # %d bytes" % (step.line(), step.cost) if step.cost else step.line() for step in steps]
    return {"before_header": path, "after_header": path, "before": before, "after": wanted}
