# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Options of a format between a playbook's mapping and QEMU's `k=v,k2=v2`."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional

    from .diskwright.node import Format

ENCRYPTION = ("key-secret", "encrypt.key-secret", "encrypt.format", "encryption")  # what the parameter encryption stands for
OWN = ("size", "backing_file", "backing_fmt", "preallocation", *ENCRYPTION)  # what disk_image has parameters for
_COMPAT = {"v2": "0.10", "0.1": "0.10", "v3": "1.1"}  # spellings of one value (0.1 is YAML's 0.10), and the one that info shows


def as_text(value: Any) -> str:
    """A value as one writes it after `-o key=`."""
    return value if isinstance(value, str) else ("off", "on")[value] if isinstance(value, bool) else str(value)


def virtual_size(text: Optional[str]) -> Optional[int]:
    """The size in bytes that a playbook gives in QEMU's grammar, rounded up to whole sectors. Raises OptionError."""
    from .diskwright.units import parse_size

    return None if text is None else -(-parse_size(text, (1 << 63) - 512) // 512) * 512


def created_size(format: str, size: Optional[int], options: Mapping[str, str]) -> Optional[int]:
    """The size that an image of `format` has which is made with this size and these options. Raises Error."""
    from .diskwright.drivers import lookup_format

    if size is None:
        return None
    declared = lookup_format(format).create_options
    own = {key: value for key, value in options.items() if key in declared.fields}
    return lookup_format(format).created_size(declared.from_mapping({**own, "size": size}))


def joined(options: Mapping[str, str]) -> Optional[str]:
    """`k=v,k2=v2`, or None for no options."""
    return ",".join("%s=%s" % (key, value.replace(",", ",,")) for key, value in options.items()) or None


def checked(format: str, options: Optional[Mapping[str, Any]], own: tuple[str, ...] = ()) -> dict[str, str]:
    """The creation options of a playbook as text, each checked against the declaration of `format` and spelled as info
    shows it. `own` are keys that the module has parameters for. Raises OptionError."""
    from .diskwright.drivers import lookup_format, lookup_protocol
    from .diskwright.errors import OptionError
    from .diskwright.options import parse_value

    cls = lookup_format(format)
    if not cls.creatable:
        raise OptionError("Format '%s' cannot be created" % format)
    fields = {**lookup_protocol("file").create_options.fields, **cls.create_options.fields}
    good = {}
    for key, value in (options or {}).items():
        if key in own:
            raise OptionError("options: '%s' has a parameter of its own" % key)
        if key not in fields:
            raise OptionError("Invalid parameter '%s' for format '%s'" % (key, format))
        good[key] = as_text(parse_value(fields[key], as_text(value), key))
    if "compat" in good:
        good["compat"] = _COMPAT.get(good["compat"], good["compat"])
    return good


def stored(node: Format) -> dict[str, str]:
    """What an image's creation options must have been, as far as the image tells."""
    details = dict(node.format_specific() or {})
    encryption = {"encrypt." + key: value for key, value in details.pop("encrypt", {}).items()}
    found = {**encryption, **details, **{key.replace("-", "_"): value for key, value in details.items()}}
    if node.cluster_size:
        found["cluster_size"] = node.cluster_size
    return {key: as_text(value) for key, value in found.items() if key in node.create_options.fields}


def amendable(node: Format) -> list[str]:
    """The creation options that an image tells and that can be changed in it, apart from those that disk_image has parameters for."""
    fields = node.amend_options.fields if node.amend_options is not None else {}
    return sorted(key for key in fields if key in node.create_options.fields and key not in OWN and not key.endswith("iter-time"))
