# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""http, https, ftp and ftps: a file on a server, read-only (https://www.qemu.org/docs/master/system/qemu-block-drivers.html).

QEMU's BlockdevOptionsCurl describes the options.
"""

from __future__ import annotations

import errno
from typing import Any, Iterable, Optional, Union

from ...errors import Error, OptionError, ProtocolError, ReadOnly
from ...extent import ALLOCATED, DATA, OFFSET_VALID, Extent
from ...hooks import ENVIRONMENT
from ...node import OpenFlags, Protocol, fill_zeroes
from ...options import Options, SecretRef, Size, opt

STORED = DATA | OFFSET_VALID | ALLOCATED
SECTOR = 512  # a multiple of it is the readahead
MAX_TIMEOUT = 10000  # seconds


class UrlOptions(Options):
    """Runtime options of all four."""

    filename: str = opt("", help="nothing: a file is named by its URL", hidden=True)
    url: Optional[str] = opt(None, help="URL of the file")
    readahead: Size = opt(256 << 10, help="how many bytes more than needed a request asks for, a multiple of 512")
    timeout: int = opt(5, help="seconds until the server must have gone on answering; 0 for ever")
    username: Optional[str] = opt(None, help="who the server is told that we are")
    password_secret: Optional[SecretRef] = opt(None, help="id of the secret with the password for it")
    proxy_username: Optional[str] = opt(None, help="who the proxy is told that we are")
    proxy_password_secret: Optional[SecretRef] = opt(None, help="id of the secret with the password for it")
    sslverify: bool = opt(True, help="whether the server's certificate is verified")
    cookie: Optional[str] = opt(None, help="cookies that the server is sent, as name=value; name2=value2")
    cookie_secret: Optional[SecretRef] = opt(None, help="id of the secret with the cookies")


def _text(secret: Optional[SecretRef]) -> str:
    if secret is None:
        return ""
    from ...crypto.secrets import passphrase

    return passphrase(secret).decode("utf-8")


class _Url(Protocol):
    """A file on a server."""

    options_class = UrlOptions
    strong_options = ("url", "sslverify", "username", "password-secret", "proxy-username", "proxy-password-secret", "cookie", "cookie-secret")
    unwritable = True
    refusal = "curl driver does not support writes"
    dirty = None

    def __init__(self, options: UrlOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if flags.writable:
            raise ReadOnly(self.refusal, errno=errno.EACCES)
        url = self._checked(options)
        self.url = url
        from .readahead import Readahead

        try:
            self._transport = self._reach(url, options)
        except (ProtocolError, OSError) as exc:
            from .wire import reason

            raise Error("CURL: Error opening file: %s" % reason(exc), filename=url, errno=errno.EINVAL) from exc
        self._size = self._transport.size
        self._readahead = Readahead(self._transport.fetch, self._size, options.readahead)

    def _checked(self, options: UrlOptions) -> str:
        """The URL, once all options make sense. Raises OptionError in QEMU's words and order."""
        if options.readahead % SECTOR:
            raise OptionError("HTTP_READAHEAD_SIZE %d is not a multiple of %d" % (options.readahead, SECTOR))
        if options.timeout > MAX_TIMEOUT:  # negative ones have become very large
            raise OptionError("timeout parameter is too large or negative")
        if options.cookie is not None and options.cookie_secret is not None:
            raise OptionError("curl driver cannot handle both cookie and cookie secret")
        if options.url is None:
            raise OptionError("curl block driver requires an 'url' option")
        if not options.url.startswith(self.driver + "://"):
            text = "%s curl driver cannot handle the URL '%s' (does not start with '%s://')"
            raise OptionError(text % (self.driver, options.url, self.driver))
        if options.filename:
            raise OptionError("Block protocol '%s' doesn't support the option 'filename'" % self.driver)
        return options.url

    def _reach(self, url: str, options: UrlOptions) -> Any:
        raise NotImplementedError(self.driver)

    def options_name(self) -> str:
        return str(self.full_options["url"]) if set(self.full_options) == {"driver", "url"} else ""

    @classmethod
    def parse_name(cls, filename: str) -> dict[str, Any]:
        return {"url": filename}

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, STORED, self, offset),)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        inside = max(0, min(len(view), self._size - host_offset))
        try:
            self._readahead.read(host_offset, view[:inside])
        except (ProtocolError, OSError) as exc:
            from .wire import reason

            name = self.url.rpartition("@")[2]  # without a password
            raise ProtocolError("%s: %s" % (name, reason(exc)), filename=self.url, offset=host_offset, errno=errno.EIO) from exc
        fill_zeroes(view[inside:])

    def _release_host(self) -> None:
        transport = self.__dict__.get("_transport")
        if transport is not None:
            transport.close()


class Http(_Url):
    """A resource of a web server."""

    driver = "http"

    def _reach(self, url: str, options: UrlOptions) -> Any:
        from .http import Credentials, Http as Transport
        from .proxy import Proxy, proxy_for

        cookie = options.cookie if options.cookie_secret is None else _text(options.cookie_secret)
        password = _text(options.password_secret)
        proxy_password = _text(options.proxy_password_secret)

        def proxy(scheme: str, host: str) -> Optional[Proxy]:
            found = proxy_for(scheme, host, ENVIRONMENT)
            if found is not None and options.proxy_username is not None:
                found = found._replace(username=options.proxy_username, password=proxy_password)
            return found

        return Transport(url, options.timeout, Credentials(options.username, password, cookie or "", options.sslverify), proxy)


class Https(Http):
    """The same, encrypted."""

    driver = "https"


class Ftp(_Url):
    """A file of an FTP server."""

    driver = "ftp"

    def _reach(self, url: str, options: UrlOptions) -> Any:
        from .ftp import Ftp as Transport

        password: Union[str, None] = _text(options.password_secret) if options.username is not None else None
        return Transport(url, options.timeout, options.username, password, options.sslverify)


class Ftps(Ftp):
    """The same, encrypted from the first byte on."""

    driver = "ftps"
