# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Which proxy a URL is fetched through, by the variables that libcurl heeds (https://curl.se/libcurl/c/libcurl-env.html)."""

from __future__ import annotations

import ipaddress
from typing import Mapping, NamedTuple, Optional
from urllib.parse import unquote, urlsplit

from ...errors import ProtocolError, Unsupported

DEFAULT_PORT = 1080  # libcurl's, of a proxy without one


class Proxy(NamedTuple):
    """An HTTP proxy, and who we are to it."""

    host: str
    port: int
    username: Optional[str]
    password: str


def proxy_for(scheme: str, host: str, environment: Mapping[str, str]) -> Optional[Proxy]:
    """The proxy for `host`, None for none. Raises ProtocolError for one that is not well-formed, Unsupported for one that is not HTTP."""
    names = [scheme + "_proxy", scheme.upper() + "_PROXY", "all_proxy", "ALL_PROXY"]
    if scheme == "http":
        del names[1]  # of a CGI program it would be what a client sent as a header "Proxy:"
    text = next((environment[name] for name in names if environment.get(name)), "")
    if not text or _is_direct(host, environment.get("no_proxy") or environment.get("NO_PROXY") or ""):
        return None
    try:
        parts = urlsplit(text if "://" in text else "http://" + text)
        proxy_host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        proxy_host, port = None, 0
    if not proxy_host:
        raise ProtocolError("Unsupported proxy syntax in '%s'" % text.rpartition("@")[2])
    if parts.scheme.lower() != "http":
        raise Unsupported("Unsupported proxy scheme for '%s'" % text.rpartition("@")[2])
    username = unquote(parts.username) if parts.username is not None else None
    return Proxy(proxy_host, port, username, unquote(parts.password or ""))


def _is_direct(host: str, exceptions: str) -> bool:
    """Whether `host` is one of the `exceptions`: host and domain names, addresses and networks, or "*"."""
    if exceptions.strip() == "*":
        return True
    host = host.lower().rstrip(".")
    address = _address(host)
    for item in exceptions.replace(",", " ").split():
        item = item.lower().strip("[]").strip(".")
        if address is not None:
            try:
                if address in ipaddress.ip_network(item, strict=False):
                    return True
            except ValueError:
                continue
        elif item and (host == item or host.endswith("." + item)):
            return True
    return False


def _address(host: str) -> Optional[ipaddress._BaseAddress]:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
