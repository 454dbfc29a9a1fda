# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Who may connect: the objects authz-simple, authz-list and authz-list-file (https://www.qemu.org/docs/master/system/authz.html).

An identity is the distinguished name of a client's certificate, or the user name of its pre-shared key.
"""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from typing import Any

from ..errors import Error, OptionError

MAX_RULES = 10000
MAX_FILE = 1 << 20  # bytes


class Authorization:
    """Decides by one authz object."""

    def __init__(self, object: Any) -> None:
        """Raises OptionError for an object of another type, or rules that make no sense."""
        self._type: str = object.type
        self._properties: dict[str, Any] = object.properties
        self._read = (0, 0)
        self._rules: dict[str, Any] = {}
        if self._type == "authz-list":
            self._rules = checked(self._properties)
        elif self._type == "authz-list-file":
            self._reload()
        elif self._type != "authz-simple":
            raise OptionError("Object '%s' is not of a type that authorizes" % object.id)

    def allows(self, identity: str) -> bool:
        """Whether the client that proved to be `identity` may go on."""
        if self._type == "authz-simple":
            return bool(identity == self._properties["identity"])
        if self._type == "authz-list-file" and self._properties.get("refresh", True):
            try:
                self._reload()
            except (Error, OSError):
                pass  # the rules that were read before stay in force
        for rule in self._rules["rules"]:
            wanted = str(rule["match"])
            if fnmatchcase(identity, wanted) if rule.get("format", "exact") == "glob" else identity == wanted:
                return bool(rule.get("policy", "deny") == "allow")
        return bool(self._rules.get("policy", "deny") == "allow")

    def _reload(self) -> None:
        path = self._properties["filename"]
        status = os.stat(path)
        seen = (status.st_mtime_ns, status.st_ino)
        if seen == self._read:
            return
        if status.st_size > MAX_FILE:
            raise Error("%s: more than %d bytes of rules" % (path, MAX_FILE), filename=path)
        with open(path, encoding="utf-8") as stream:
            try:
                value = json.load(stream)
            except ValueError as exc:
                raise Error("%s: %s" % (path, exc), filename=path) from None
        if not isinstance(value, dict):
            raise Error("%s: Invalid parameter type for 'obj', expected: QAuthZListFile" % path, filename=path)
        self._rules = checked(value)
        self._read = seen


_SHORT = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "emailAddress": "EMAIL",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "serialNumber": "serialNumber",
    "stateOrProvinceName": "ST",
    "userId": "UID",
}


def distinguished_name(certificate: Any) -> str:
    """The subject of a certificate, as ssl.SSLSocket.getpeercert() gives it, in the form of RFC 4514; "" where there is none."""
    parts = []
    for names in (certificate or {}).get("subject", ()):
        parts.append("+".join("%s=%s" % (_SHORT.get(key, key), escaped(value)) for key, value in names))
    return ",".join(parts)


def escaped(value: str) -> str:
    """A value of a distinguished name."""
    text = "".join("\\" + character if character in ',+"\\<>;' else character for character in value)
    return "\\" + text if text[:1] in (" ", "#") else text


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, whose rules have what they need. Raises OptionError."""
    rules = values.get("rules", [])
    if not isinstance(rules, list) or len(rules) > MAX_RULES:
        raise OptionError("Parameter 'rules' expects a list of at most %d rules" % MAX_RULES)
    for number, rule in enumerate(rules):
        for key, allowed in (("policy", ("allow", "deny")), ("format", ("exact", "glob"))):
            if isinstance(rule, dict) and rule.get(key, allowed[0]) not in allowed:
                raise OptionError("Parameter 'rules.%d.%s' does not accept value '%s'" % (number, key, rule[key]))
        if not isinstance(rule, dict) or not isinstance(rule.get("match"), str) or "policy" not in rule:
            raise OptionError("Parameter 'rules.%d.%s' is missing" % (number, "policy" if isinstance(rule, dict) and "match" in rule else "match"))
    return {"policy": values.get("policy", "deny"), "rules": rules}
