# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an image may make a module do: which files it may have it open, and how much work it may be."""

from __future__ import annotations

from .diskwright.names import OpenPolicy
from .diskwright.parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Sequence

MAX_CHAIN = 64  # images above one another
MAX_ITERATIONS = 12000000  # of the derivation of a key, as OpenStack has it

# what the documentation fragment `untrusted` describes
ARGUMENTS: dict[str, Any] = {
    "implicit_references": {"type": "str", "choices": ["none", "same_directory", "listed", "any"], "default": "same_directory"},
    "allowed_references": {"type": "list", "elements": "str", "default": []},
    "limits": {
        "type": "dict",
        "options": {
            "virtual_size": {"type": "str"},
            "expansion": {"type": "int"},
            "chain_depth": {"type": "int", "default": MAX_CHAIN},
            "key_derivation": {"type": "int", "default": MAX_ITERATIONS, "no_log": False},
        },
    },
}
# The same with the values that are taken where nothing is said.
LIMITS = {"virtual_size": None, "expansion": None, "chain_depth": MAX_CHAIN, "key_derivation": MAX_ITERATIONS}

_current = OpenPolicy()
_limits: Mapping[str, Any] = dict(LIMITS)


def current() -> OpenPolicy:
    """The policy under which this task opens images."""
    return _current


def limits() -> Mapping[str, Any]:
    """The limits of this task, by the names that they have as suboptions; sizes in bytes."""
    return _limits


def choose(params: Mapping[str, Any], named: Sequence[str] = ()) -> None:
    """Take the policy of a task from its parameters; `named` are the files that those name themselves. Raises Refusal, OptionError."""
    global _current, _limits
    from ._plan import Refusal

    wanted = {**LIMITS, **(params.get("limits") or {})}
    for key, least in (("expansion", 1), ("chain_depth", 1), ("key_derivation", 1000)):
        if wanted[key] is not None and wanted[key] < least:
            raise Refusal("limits: %s must be at least %d" % (key, least))
    if wanted["virtual_size"] is not None:
        from .diskwright.units import parse_size

        wanted["virtual_size"] = parse_size(wanted["virtual_size"], (1 << 63) - 512)
    mode = params.get("implicit_references", "any")
    listed = list(params.get("allowed_references") or ())
    if listed and mode == "none":
        raise Refusal("allowed_references names what implicit_references=none refuses")
    if not listed and mode == "listed":
        raise Refusal("implicit_references=listed needs allowed_references")
    places = [entry for entry in listed if entry.startswith("/")]
    names = [entry for entry in listed if not entry.startswith("/")]
    if mode == "any":
        _current = OpenPolicy("any", max_chain=wanted["chain_depth"], names=names)
    else:
        protocols = ("file", "host_device")
        _current = OpenPolicy(mode, [*places, *named], json=False, protocols=protocols, max_chain=wanted["chain_depth"], names=names)
    _limits = wanted


def limit_keys() -> None:
    """From now on no key slot is tried that takes longer to try than the task allows."""
    part(__package__, "diskwright.crypto.luks").limit_iterations(_limits["key_derivation"])


def check_size(path: str, size: int) -> None:
    """Raise Denied for an image whose disk is larger than the task allows."""
    most = _limits["virtual_size"]
    if most is not None and size > most:
        from .diskwright.errors import Denied

        raise Denied("%s: its disk has %d bytes, and limits.virtual_size is %d" % (path, size, most), filename=path)


def check_expansion(path: str, content: int, stored: int) -> None:
    """Raise Denied for an image of `stored` bytes whose `content` bytes are more times that than the task allows."""
    most = _limits["expansion"]
    if most is not None and content > most * max(stored, 1):
        from .diskwright.errors import Denied

        text = "%s: its %d bytes hold %d bytes of data, and limits.expansion is %d" % (path, stored, content, most)
        raise Denied(text, filename=path)
