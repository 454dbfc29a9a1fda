# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""TLS for both ends of a connection, with the credentials of tls-creds-x509, tls-creds-psk and tls-creds-anon objects.

The files are those of https://www.qemu.org/docs/master/system/tls.html; TLS itself is Python's ssl module.
"""

from __future__ import annotations

import errno
import os
import ssl
from _thread import allocate_lock
from time import monotonic

from ..errors import Error, OptionError, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Mapping, Optional, Union

    Buffer = Union[bytes, bytearray, memoryview]

TYPES = ("tls-creds-x509", "tls-creds-psk", "tls-creds-anon")
RECORD = 64 << 10  # bytes received at a time
PIECE = 1 << 20  # bytes encrypted at a time
MAX_KEYS = 1 << 20  # bytes of keys.psk
MAX_KEY = 256  # bytes of a key, which is what OpenSSL takes
DEFAULT_USER = "qemu"
TORN = "The TLS connection was non-properly terminated."

# Where there is no certificate TLS ends at 1.2, whose suites without one both OpenSSL and GnuTLS have.
_PSK_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES256-GCM-SHA384:kECDHEPSK:kDHEPSK:kPSK"
_ANON_CIPHERS = "ADH-AES256-GCM-SHA384:ADH:AECDH:@SECLEVEL=0"

# The group ffdhe2048 of RFC 7919, for key exchanges without a certificate
_FFDHE2048 = """-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""

_VERSIONS = {"TLS1.0": 1, "TLS1.1": 2, "TLS1.2": 3, "TLS1.3": 4}
_KEPT = ("NORMAL", "@SYSTEM", "SECURE128", "+ANON-DH", "+PSK", "+DHE-PSK", "+ECDHE-PSK", "%SAFE_RENEGOTIATION")


class Credentials:
    """What one end of TLS shows and asks for, made from an object; `endpoint` is "client" or "server"."""

    def __init__(self, objects: Mapping[str, Any], name: str, endpoint: str) -> None:
        """Raises OptionError for an object that is not there or not fit, Error where its files are not, Unsupported where Python
        cannot do what it wants."""
        found = objects.get(name)
        if found is None:
            raise OptionError("No TLS credentials with id '%s'" % name)
        if found.type not in TYPES:
            raise OptionError("Object with id '%s' is not TLS credentials" % name)
        properties = found.properties
        if properties.get("endpoint", "client") != endpoint:
            raise OptionError("Expected TLS credentials for a %s endpoint" % endpoint)
        self.type = found.type
        self.endpoint = endpoint
        self._objects = objects
        self._directory: Optional[str] = properties.get("dir")
        self._verify: bool = properties.get("verify-peer", True)
        self._properties = properties
        self._psk: Any = None  # keeps what C calls
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if endpoint == "server" else ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname = False
        self.context.verify_mode = ssl.CERT_NONE
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.type == "tls-creds-x509":
            self._use_certificates()
        else:
            self.context.maximum_version = ssl.TLSVersion.TLSv1_2
            if endpoint == "server":
                self._use_group()
            if self.type == "tls-creds-psk":
                self._use_keys()
            else:
                self._set_ciphers(_ANON_CIPHERS, "TLS without certificates or keys (tls-creds-anon)")
        self._apply_priority(properties.get("priority") or "")

    def _file(self, name: str, needed: bool = True) -> Optional[str]:
        """The path of a file of the credentials; None where it may be missing and is."""
        if self._directory is None:
            if needed:
                raise OptionError("Missing 'dir' property value")
            return None
        path = "%s/%s" % (self._directory, name)
        try:
            os.stat(path)
        except (OSError, ValueError) as exc:
            if needed or getattr(exc, "errno", errno.ENOENT) != errno.ENOENT:
                reason = getattr(exc, "strerror", None) or "No such file or directory"
                raise Error("Unable to access credentials %s: %s" % (path, reason), filename=path) from exc
            return None
        return path

    # -- certificates --------------------------------------------------------------------------------------------

    def _use_certificates(self) -> None:
        context, server = self.context, self.endpoint == "server"
        authority = self._file("ca-cert.pem")
        try:
            context.load_verify_locations(authority)
        except (ssl.SSLError, OSError):
            raise Error("Unable to import CA certificate list %s" % authority, filename=authority) from None
        revoked = self._file("ca-crl.pem", False)
        if revoked is not None:
            try:
                context.load_verify_locations(revoked)
            except (ssl.SSLError, OSError):
                raise Error("Cannot load CRL list %s" % revoked, filename=revoked) from None
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        side = "server" if server else "client"
        certificate, key = self._file(side + "-cert.pem", server), self._file(side + "-key.pem", server)
        if certificate is not None and key is not None:
            self._load(certificate, key)
        if server:
            self._use_group()
        if self._verify or not server:
            context.verify_mode = ssl.CERT_REQUIRED

    def _load(self, certificate: str, key: str) -> None:
        password = b""
        if "passwordid" in self._properties:
            from .secrets import secret_bytes

            password = secret_bytes(self._objects, self._properties["passwordid"])

        def give() -> bytes:
            return password

        try:
            self.context.load_cert_chain(certificate, key, give)
        except (ssl.SSLError, OSError, ValueError) as exc:
            reason = getattr(exc, "reason", None) or str(exc)
            raise Error("Cannot load certificate '%s' & key '%s': %s" % (certificate, key, reason), filename=certificate) from None

    def _use_group(self) -> None:
        """Diffie-Hellman parameters for a server: dh-params.pem, or a group that everybody has."""
        path = self._file("dh-params.pem", False)
        if path is not None:
            try:
                self.context.load_dh_params(path)
            except (ssl.SSLError, OSError):
                raise Error("Unable to load DH parameters from %s" % path, filename=path) from None
            return
        from tempfile import NamedTemporaryFile

        with NamedTemporaryFile("w", suffix=".pem") as file:
            file.write(_FFDHE2048)
            file.flush()
            self.context.load_dh_params(file.name)

    # -- keys ----------------------------------------------------------------------------------------------------

    def _use_keys(self) -> None:
        path = self._file("keys.psk")
        keys = _read_keys(str(path))
        if not hasattr(self.context, "set_psk_client_callback"):
            from .psk import check

            check()
        self._set_ciphers(_PSK_CIPHERS, "TLS with shared keys (tls-creds-psk)")
        if self.endpoint == "server":
            self._serve_keys(keys)
            return
        user = self._properties.get("username", DEFAULT_USER)
        if user not in keys:
            raise Error("Username %s not found in PSK file %s" % (user, path), filename=path)

        def choose(_hint: Optional[str]) -> tuple[str, bytes]:
            return user, keys[user]

        if hasattr(self.context, "set_psk_client_callback"):
            self.context.set_psk_client_callback(choose)
        else:
            from .psk import client_key

            self._psk = client_key(self.context, user, keys[user])

    def _serve_keys(self, keys: dict[str, bytes]) -> None:
        def find(user: Optional[str]) -> bytes:
            return keys.get(user or "", b"")

        if hasattr(self.context, "set_psk_server_callback"):
            self.context.set_psk_server_callback(find)
        else:
            from .psk import server_keys

            self._psk = server_keys(self.context, keys)

    # -- ciphers and versions ------------------------------------------------------------------------------------

    def _set_ciphers(self, ciphers: str, what: str) -> None:
        try:
            self.context.set_ciphers(ciphers)
        except ssl.SSLError:
            raise Unsupported("%s is not supported by this Python's %s" % (what, ssl.OPENSSL_VERSION)) from None

    def _apply_priority(self, priority: str) -> None:
        """What a GnuTLS priority string says of versions; the rest has no counterpart here. Raises OptionError."""
        if not priority:
            return
        allowed = {3, 4} if self.type == "tls-creds-x509" else {3}
        for word in priority.split(":"):
            version = word[1:].replace("VERS-", "", 1)
            if word in _KEPT:
                continue
            if word in ("SECURE192", "SECURE256", "PFS"):
                if self.type == "tls-creds-x509":
                    self._set_ciphers("ECDHE+AES256:ECDHE+CHACHA20" if word != "PFS" else "ECDHE:DHE", "priority %s" % word)
            elif word[1:] in ("VERS-ALL", "VERS-TLS-ALL") and word[0] in "-!+":
                allowed = set() if word[0] != "+" else {3, 4}
            elif version in _VERSIONS and word[0] in "-!+" and word[1:].startswith("VERS-"):
                (allowed.add if word[0] == "+" else allowed.discard)(_VERSIONS[version])
            else:
                raise OptionError(
                    "Cannot set TLS session priority %s: '%s' has no counterpart here" % (priority, word),
                    hint="NORMAL, PFS, SECURE128, SECURE192, SECURE256 and the versions of TLS (-VERS-TLS1.3) are understood.",
                )
        allowed &= {3, 4}
        if not allowed:
            raise OptionError("Cannot set TLS session priority %s: it leaves no version of TLS that is secure" % priority)
        names = {3: ssl.TLSVersion.TLSv1_2, 4: ssl.TLSVersion.TLSv1_3}
        self.context.minimum_version, self.context.maximum_version = names[min(allowed)], names[max(allowed)]

    # -- use -----------------------------------------------------------------------------------------------------

    def wrap(self, channel: Any, deadline: float, hostname: Optional[str] = None) -> TlsChannel:
        """Shake hands over `channel` until `deadline` (of time.monotonic). A client makes sure that the certificate is for `hostname`.

        Raises Error, after which the channel is of no use.
        """
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        check = self.type == "tls-creds-x509" and self.endpoint == "client"
        if check and hostname is None:
            raise Error("No hostname for certificate validation", errno=errno.EINVAL)
        self.context.check_hostname = check
        try:
            session = self.context.wrap_bio(incoming, outgoing, self.endpoint == "server", hostname if check else None)
        except (ValueError, TypeError):  # no name at all
            raise Error("Certificate does not match the hostname %s" % hostname, errno=errno.EINVAL) from None
        tls = TlsChannel(channel, session, incoming, outgoing)
        tls.shake_hands(deadline, hostname)
        return tls


class TlsChannel:
    """TLS over a channel, which is anything with `sock`, `set_timeout`, `receive_into`, `send` and `close`.

    One thread may send while another one receives, which ssl.SSLSocket does not promise.
    """

    reading = "Cannot read from TLS channel"  # how messages begin

    def __init__(self, channel: Any, session: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        self.sock = channel.sock
        self.session = session
        self._channel = channel
        self._incoming = incoming
        self._outgoing = outgoing
        self._lock = allocate_lock()  # the session is for one thread at a time
        self._buffer = memoryview(bytearray(RECORD))

    def set_timeout(self, seconds: float) -> None:
        """How long the peer may be silent."""
        self._channel.set_timeout(seconds)

    def shake_hands(self, deadline: float, hostname: Optional[str]) -> None:
        """Raises Error in QEMU's words, where it has some."""
        try:
            while True:
                try:
                    self.session.do_handshake()
                    self._send_pending()
                    return
                except ssl.SSLWantReadError:
                    self._send_pending()
                left = deadline - monotonic()
                if left <= 0:
                    raise Error("TLS handshake failed: the peer does not answer", errno=errno.ETIMEDOUT)
                self._channel.set_timeout(left)
                if not self._fill():
                    raise Error("TLS handshake failed: %s" % TORN, errno=errno.EIO)
        except ssl.SSLCertVerificationError as exc:
            self._tell()
            if "ostname mismatch" in str(exc) or "IP address mismatch" in str(exc):
                raise Error("Certificate does not match the hostname %s" % hostname, errno=errno.EINVAL) from None
            raise Error("Verify failed: %s" % exc.verify_message, errno=errno.EINVAL) from None
        except ssl.SSLError as exc:
            self._tell()
            raise Error("TLS handshake failed: %s" % _reason(exc), errno=errno.EIO) from None
        except BlockingIOError:
            raise Error("TLS handshake failed: the peer does not answer", errno=errno.ETIMEDOUT) from None
        except OSError as exc:
            raise Error("TLS handshake failed: %s" % (exc.strerror or exc), errno=errno.EIO) from None

    def _tell(self) -> None:
        """Let the peer know of a failure."""
        try:
            self._send_pending()
        except OSError:
            pass

    def _send_pending(self) -> None:
        data = self._outgoing.read()
        if data:
            self._channel.send(data)

    def _fill(self) -> bool:
        """Receive what is encrypted; False at the end."""
        count = self._channel.receive_into(self._buffer)
        with self._lock:
            if count:
                self._incoming.write(self._buffer[:count])
            else:
                self._incoming.write_eof()
        return bool(count)

    def receive_into(self, view: memoryview, _whole: bool = False) -> int:
        """Receive some bytes; 0 at the end. Raises OSError also where the end comes without a good-bye."""
        while True:
            with self._lock:
                try:
                    return self.session.read(len(view), view)  # type: ignore[return-value]
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLZeroReturnError:
                    return 0
                except ssl.SSLError as exc:
                    raise OSError(errno.EIO, _reason(exc)) from None
            if not self._fill():
                raise OSError(errno.EIO, TORN)

    def send(self, *parts: Buffer) -> None:
        """Send all of `parts`; one caller at a time."""
        whole = list(parts)
        if len(whole) > 1 and sum(len(memoryview(part).cast("B")) for part in whole) <= RECORD:
            whole = [b"".join(whole)]  # one record
        for part in whole:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), PIECE):
                with self._lock:
                    try:
                        self.session.write(view[start : start + PIECE])
                    except ssl.SSLError as exc:
                        raise OSError(errno.EIO, "Cannot write to TLS channel: %s" % _reason(exc)) from None
                    data = self._outgoing.read()
                self._channel.send(data)

    def close(self) -> None:
        """Say good-bye, if there is anybody to say it to, and close."""
        try:
            with self._lock:
                try:
                    self.session.unwrap()
                except ssl.SSLError:
                    pass  # the other side need not answer
            self._send_pending()
        except (OSError, ValueError):
            pass
        self._channel.close()


def _reason(exc: ssl.SSLError) -> str:
    """Why it failed, in words."""
    return (exc.reason or str(exc)).replace("_", " ").lower()


def _read_keys(path: str) -> dict[str, bytes]:
    """The keys of a keys.psk file ("user:hex" lines) by their users. Raises Error."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_KEYS + 1)
    except OSError as exc:
        raise Error("Unable to access credentials %s: %s" % (path, exc.strerror), filename=path, errno=exc.errno) from None
    if len(data) > MAX_KEYS:
        raise Error("%s is longer than %d bytes" % (path, MAX_KEYS), filename=path)
    keys = {}
    for line in data.decode("utf-8", "replace").splitlines():
        user, colon, text = line.strip().partition(":")
        if not colon or user.startswith("#"):
            continue
        try:
            key = bytes.fromhex(text)
        except ValueError:
            key = b""
        if not 0 < len(key) <= MAX_KEY:
            raise Error("%s: the key of '%s' is not valid" % (path, user), filename=path)
        keys[user] = key
    return keys
