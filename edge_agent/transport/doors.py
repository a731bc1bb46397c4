"""Who may come in: TLS, bearer tokens, client certificates, and how much each client may ask.

Invariants:

- a token is never kept, only its SHA-256: tokens are 256 random bits (``new_token``), which no dictionary
  holds, so a fast hash is enough; it is compared with every entry in constant time;
- a certificate, key, client CA or token file that changes is taken up within ``RENEWAL_SECONDS``; one that
  cannot be used is reported once and the old one stays in force;
- what is kept of strangers is bounded.

A token file holds one ``NAME sha256:HEX`` a line; ``#`` begins a comment. ``edge-agent token`` writes it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import ssl
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.config import HttpConfig, TlsConfig
from edge_agent.errors import ConfigError

RENEWAL_SECONDS: Final = 1.0  # how often the files behind the doors are looked at
MAX_TOKENS: Final = 1024
MAX_CLIENTS: Final = 4096  # clients whose rate is remembered; the one seen longest ago is forgotten first

CERTIFICATE: Final = "certificate of a client"  # no token has a name with spaces
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HASH: Final = re.compile(r"sha256:([0-9a-f]{64})")


class Tokens:
    """The names and hashes of one token file. Frozen: a changed file makes a new one."""

    def __init__(self, hashes: dict[str, bytes]) -> None:
        self._hashes = hashes

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """Read a token file.

        Raises:
            ConfigError: it cannot be read, or a line is not one name and one hash; names the line.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(f"http.tokens_file {path}: {why}; make one with edge-agent token") from error
        hashes: dict[str, bytes] = {}
        for number, line in enumerate(lines, 1):
            content = line.partition("#")[0].split()
            if not content:
                continue
            name, value = content[0], content[1] if len(content) == 2 else ""
            match = _HASH.fullmatch(value)
            if match is None or not _NAME.fullmatch(name) or name in hashes or len(hashes) >= MAX_TOKENS:
                # The line itself is not shown: somebody may have pasted a token into it.
                raise ConfigError(
                    f"http.tokens_file {path} line {number}: expected a new name and sha256:<64 hex digits>, "
                    f"at most {MAX_TOKENS} of them; make them with edge-agent token"
                )
            hashes[name] = bytes.fromhex(match[1])
        return cls(hashes)

    @property
    def names(self) -> tuple[str, ...]:
        """Whose tokens these are."""
        return tuple(self._hashes)

    def owner(self, token: bytes) -> str | None:
        """Whose token this is. Takes the same time whichever it is, or if it is nobody's."""
        presented = hashlib.sha256(token).digest()
        found = None
        for name, known in self._hashes.items():
            if hmac.compare_digest(presented, known):
                found = name
        return found

    def with_new(self, name: str) -> tuple[Tokens, str]:
        """These and a new token of ``name``; the token itself is nowhere but in the result.

        Raises:
            ConfigError: the name is taken, or none.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"token name {name[:80]!r}: expected 1 to 63 letters, digits, dots, dashes or underscores"
            )
        if name in self._hashes:
            raise ConfigError(
                f"there is a token named {name!r} already; revoke it first, or take another name"
            )
        token = new_token()
        return Tokens({**self._hashes, name: hashlib.sha256(token.encode()).digest()}), token

    def without(self, name: str) -> Tokens:
        """These without the token of ``name``.

        Raises:
            ConfigError: there is none.
        """
        if name not in self._hashes:
            raise ConfigError(f"no token named {name[:80]!r}, there are {', '.join(self._hashes) or 'none'}")
        return Tokens({other: value for other, value in self._hashes.items() if other != name})

    def write(self, path: Path) -> None:
        """Replace the file at once, readable by its owner only; who owned it before still does.

        Raises:
            ConfigError: it cannot be written.
        """
        lines = [f"{name} sha256:{value.hex()}\n" for name, value in self._hashes.items()]
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write("# one client a line: a name, and the SHA-256 of its token\n")
                    file.writelines(lines)
                    file.flush()
                    os.fsync(file.fileno())
                if path.exists():
                    before = path.stat()
                    os.chown(temporary, before.st_uid, before.st_gid)
                    Path(temporary).chmod(before.st_mode & 0o777)
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; choose another file with --file") from error


def new_token() -> str:
    """256 random bits, fit for a header."""
    return secrets.token_urlsafe(32)


def tls_context(config: TlsConfig) -> ssl.SSLContext:
    """A server's TLS context: 1.2 or newer, client certificates as configured.

    Raises:
        ConfigError: a file cannot be read, is no PEM, or the key is not the certificate's.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    try:
        # An encrypted key would make OpenSSL ask a terminal that a service has not got.
        context.load_cert_chain(config.certificate, config.key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"http.tls.certificate {config.certificate} and http.tls.key {config.key}: {_why(error)}; "
            "expected a PEM chain and its unencrypted PEM key"
        ) from error
    if config.client_ca:
        try:
            context.load_verify_locations(config.client_ca)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"http.tls.client_ca {config.client_ca}: {_why(error)}; expected PEM certificates"
            ) from error
        required = config.client_certificates == "required"
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    return context


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"OpenSSL says {(error.reason or str(error)).lower().replace('_', ' ')}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells whether a file was replaced, without reading it."""

    seen: tuple[tuple[int, int, int] | None, ...]

    @classmethod
    def of(cls, config: HttpConfig) -> Stamp:
        """The state of every file behind the doors."""
        paths = [config.tokens_file] if config.tokens_file else []
        if config.tls is not None:
            paths += [config.tls.certificate, config.tls.key]
            paths += [config.tls.client_ca] if config.tls.client_ca else []
        return cls(tuple(_stat(path) for path in paths))


def _stat(path: str) -> tuple[int, int, int] | None:
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


@dataclass(frozen=True, slots=True)
class Doors:
    """What the listener on the port asks of a client. ``open`` when it asks nothing."""

    context: ssl.SSLContext | None
    tokens: Tokens | None
    certificates: bool  # client certificates are looked at
    either: bool  # a certificate or a token, not both
    stamp: Stamp

    @classmethod
    def build(cls, config: HttpConfig) -> Doors:
        """Read every file that the configuration names. Blocks.

        Raises:
            ConfigError: as ``tls_context`` and ``Tokens.read``.
        """
        stamp = Stamp.of(config)  # before reading: a change meanwhile is seen the next time
        tls = config.tls
        return cls(
            tls_context(tls) if tls is not None else None,
            Tokens.read(Path(config.tokens_file)) if config.tokens_file else None,
            tls is not None and bool(tls.client_ca),
            tls is not None and bool(tls.client_ca) and tls.client_certificates == "accepted",
            stamp,
        )

    @classmethod
    def shut(cls) -> Doors:
        """Before anything listens."""
        return cls(None, None, certificates=False, either=False, stamp=Stamp(()))

    @property
    def guarded(self) -> bool:
        """Whether a client has to say who it is."""
        return self.tokens is not None or self.certificates

    def identify(self, authorization: bytes | None, certified: bool) -> str | None:
        """Who asks: the token's name, ``CERTIFICATE``, or None if nobody who may.

        Args:
            authorization: the header's value.
            certified: the client showed a certificate that the client CA signed.
        """
        if self.certificates:
            if certified and (self.either or self.tokens is None):
                return CERTIFICATE
            if not certified and not self.either:
                return None
        if self.tokens is None or authorization is None:
            return None
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        return self.tokens.owner(token.strip())

    def what_is_wanted(self, authorization: bytes | None) -> str:
        """One sentence for a client that was not let in."""
        if authorization is not None and self.tokens is not None:
            return "Authorization: this is no token of this device, expected: Bearer TOKEN"
        ways = ["a token (Authorization: Bearer TOKEN)"] if self.tokens is not None else []
        if self.certificates:
            ways.append("a client certificate")
        return f"this device wants {(' or ' if self.either else ' and ').join(ways)}"


class Rates:
    """A token bucket per client: ``per_second`` requests on average, ``burst`` at once."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # left, when

    def wait(self, client: str, now: float | None = None) -> float:
        """Take one; 0, or how many seconds until this client may ask again (then nothing is taken)."""
        now = time.monotonic() if now is None else now
        left, when = self._buckets.get(client, (self._burst, now))
        left = min(self._burst, left + (now - when) * self._per_second)
        allowed = left >= 1.0
        if allowed:
            left -= 1.0
        self._buckets[client] = (left, now)
        self._buckets.move_to_end(client)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / self._per_second
