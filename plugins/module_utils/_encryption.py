# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""How a module says with which passphrase an image is made and opened, and how it changes key slots. No secret is part of a plan,
of a state or of a message: secrets are objects, as for qemu-img, and known by their ids."""

from __future__ import annotations

import os

from . import _policy, _progress
from ._plan import Refusal, Step
from .diskwright.parts import part

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, Sequence

    from .diskwright.node import Format
    from .diskwright.objects import UserObject

    State = Mapping[str, Any]

KEY, OLD_KEY, SOURCE_KEY, BACKING_KEY = "key", "old-key", "source-key", "backing-key"  # ids of secrets
HIDDEN = "(not shown)"


class Encryption:
    """What the parameter `encryption` asks for, of an image of the format whose class is `cls`."""

    def __init__(self, params: State, cls: type[Format]) -> None:
        """Raises Refusal for a format without encryption, and for parameters that contradict each other."""
        fields = cls.create_options.fields
        self.prefix = "encrypt." if "encrypt.key-secret" in fields else ""
        if self.prefix + "key-secret" not in fields:
            raise Refusal("the %s format has no encryption" % cls.driver)
        self.objects = _secret(KEY, params["passphrase"], params["passphrase_file"])
        self.objects.update(_secret(OLD_KEY, params.get("old_passphrase"), params.get("old_passphrase_file")))
        self.old = OLD_KEY in self.objects
        self.erase_old = params.get("erase_old", False)
        self.verify = params.get("verify", True)
        if not self.verify and self.old:
            raise Refusal("encryption: verify=false leaves open whether the old passphrase is needed")
        self.keyslot = params.get("keyslot")
        if self.erase_old and not self.old:
            raise Refusal("encryption: erase_old needs old_passphrase or old_passphrase_file")
        if self.keyslot is not None and not 0 <= self.keyslot < 8:
            raise Refusal("encryption: keyslot must be from 0 to 7")

    def creation_options(self) -> dict[str, str]:
        """The options that make an image encrypted."""
        return {**({"encrypt.format": "luks"} if self.prefix else {}), self.prefix + "key-secret": KEY}

    def words(self, *ids: str) -> list[str]:
        """The arguments of qemu-img that define the secrets of these ids."""
        return _words(self.objects, *ids)


class Backing:
    """What opens the encrypted backing file of an image."""

    def __init__(self, params: State, driver: Optional[str]) -> None:
        self.objects = opening(params, BACKING_KEY)
        self.key = key_of(driver)


def _words(objects: Mapping[str, UserObject], *ids: str) -> list[str]:
    words = []
    for id in ids:
        path = objects[id].properties.get("file")
        source = "file=%s" % path.replace(",", ",,") if path is not None else "data=" + HIDDEN
        words += ["--object", "secret,id=%s,%s" % (id, source)]
    return words


def opening(params: Optional[State], id: str) -> dict[str, UserObject]:
    """The secret of another image, as the object `id`; none where nothing is given."""
    return {} if params is None else _secret(id, params["passphrase"], params["passphrase_file"])


def key_of(driver: Optional[str]) -> str:
    """The name of the option of `driver` that takes the secret which opens an image."""
    return "key-secret" if driver == "luks" else "encrypt.key-secret"


def _secret(id: str, text: Optional[str], path: Optional[str]) -> dict[str, UserObject]:
    from .diskwright.objects import UserObject

    if text is None and path is None:
        return {}
    _policy.limit_keys()
    return {id: UserObject("secret", id, {"data": text} if path is None else {"file": os.path.abspath(path)})}


class Address:
    """How an existing image is named: to qemu-img by `words`, then its options, then `operand`; to the library by `name` and `arguments`."""

    def __init__(
        self,
        path: str,
        format: str,
        encryption: Optional[Encryption] = None,
        opened_by: str = KEY,
        also: Sequence[str] = (),
        backing: Optional[Backing] = None,
    ) -> None:
        """`encryption` is that of an encrypted image, which the secret `opened_by` opens; `also` are secrets that a command needs besides, and
        `backing` is what opens an encrypted backing file."""
        objects = {**(encryption.objects if encryption else {}), **(backing.objects if backing else {})}
        if not objects:
            self.words, self.operand = ["-f", format], path
            self.name = os.path.abspath(path)
            self.arguments: dict[str, Any] = {"format": format, "objects": None, "policy": _policy.current()}
            return
        from .diskwright.json_text import dumps

        given: dict[str, Any] = {"driver": format}
        if encryption is not None:
            given[encryption.prefix + "key-secret"] = opened_by
        if backing is not None:
            given["backing." + backing.key] = BACKING_KEY
        self.words = [*_words(objects, *([opened_by, *also] if encryption else []), *([BACKING_KEY] if backing else [])), "--image-opts"]
        options = "".join("%s=%s," % pair for pair in given.items())
        self.operand = "%sfile.filename=%s" % (options, path.replace(",", ",,"))
        self.name = "json:" + dumps({**given, "file": {"driver": "file", "filename": os.path.abspath(path)}})
        self.arguments = {"format": None, "objects": objects, "policy": _policy.current()}


def observe(node: Format, encryption: Optional[Encryption]) -> dict[str, Any]:
    """How an image is encrypted, how many key slots are in use, and which ones the passphrases open.

    Raises Error where a secret cannot be read.
    """
    if not node.encrypted:
        return {"encryption": None}
    from .diskwright.options import SecretRef

    details: Mapping[str, Any] = node.format_specific() or {}
    details = details.get("encrypt", details)
    have: dict[str, Any] = {"encryption": details.get("format", node.driver)}
    if "slots" in details:
        have["key_slots"] = sum(1 for slot in details["slots"] if slot["active"])
    if encryption is not None and not encryption.verify:
        have["_slots"], have["_old_slots"] = None, []
    elif encryption is not None:
        have["_slots"] = node.key_slots(SecretRef(KEY, encryption.objects))
        matters = encryption.old and (encryption.erase_old or not have["_slots"])
        have["_old_slots"] = node.key_slots(SecretRef(OLD_KEY, encryption.objects)) if matters else []
    return have


def plan(want: State, have: State) -> list[Step]:
    """The steps after which the passphrase opens the image, and the old one does not if it is to be erased. No I/O. Raises Refusal."""
    encryption: Optional[Encryption] = want["encryption"]
    if encryption is None:
        return []
    path = want["path"]
    if have["encryption"] is None:
        raise Refusal("%s is not encrypted, and cannot be encrypted in place: make an encrypted image, and convert it into that" % path)
    slots, old_slots = have["_slots"], have["_old_slots"]
    if slots is None:
        if encryption.old:
            raise Refusal("%s has the encryption %s, whose passphrase cannot be changed" % (path, have["encryption"]))
        return []
    if not slots and not old_slots:
        raise Refusal("%s: the passphrase opens no key slot%s" % (path, ", nor does the old one" if encryption.old else ""))
    steps = []
    count = have["key_slots"]
    if not slots:
        options = {"state": "active", "new-secret": KEY}
        if encryption.keyslot is not None:
            options["keyslot"] = str(encryption.keyslot)
        seconds = want["options"].get(encryption.prefix + "iter-time")
        if seconds is not None:
            options["iter-time"] = seconds
        count += 1
        change = {"_slots": [0 if encryption.keyslot is None else encryption.keyslot], "key_slots": count}
        steps.append(_amend(want, OLD_KEY, KEY, options, "the passphrase opens no key slot", change))
    doomed = [slot for slot in old_slots if slot not in slots] if encryption.erase_old else []
    if doomed:
        change = {"_old_slots": [slot for slot in old_slots if slot in slots], "key_slots": count - len(doomed)}
        why = "the old passphrase opens %d key slots" % len(doomed)
        steps.append(_amend(want, KEY, OLD_KEY, {"state": "inactive", "old-secret": OLD_KEY}, why, change))
    return steps


def _amend(want: State, opened_by: str, other: str, options: Mapping[str, str], why: str, change: State) -> Step:
    encryption: Encryption = want["encryption"]
    address = Address(want["path"], want["format"], encryption, opened_by, [other])
    text = ",".join("%s%s=%s" % (encryption.prefix, key, value) for key, value in options.items())

    def run() -> None:
        amend = part(__package__, "diskwright.commands.amend").amend

        amend(address.name, text, progress=_progress.tell, **address.arguments)

    return Step("amend", want["path"], why, ["qemu-img", "amend", *address.words, "-o", text, address.operand], change, run)
