"""A release into an OCI registry: its blobs, then the artifact that keeps them (contract/registry.py).

Invariants:

- an artifact is pushed after every blob that it names: what the registry's garbage collection sees is whole;
- pushing again moves nothing: blobs are asked for before they are sent, and are the same bytes for ever;
- a password goes to the registry, or to the token server that it names, and never from TLS to plain HTTP.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Final

import msgspec

from edge_agent import __version__
from edge_agent.contract import registry
from edge_agent.contract.digest import Digest
from edge_agent.contract.registry import Layer
from edge_agent.contract.version import Version
from fleet.errors import FleetConfigError, RegistryError

_MAX_ANSWER: Final = 1 << 16  # bytes of an error that are read for its words


class RegistryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An OCI registry that releases are pushed to when they are published."""

    address: str  # oci://host[:port]/name; oci+http:// without TLS
    credentials_file: str = ""  # `user:password`, or Docker's config.json
    ca_file: str = ""  # PEM: who signs its certificate; empty: the system's authorities
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0  # without a byte


@dataclass(frozen=True, slots=True)
class ReleaseFile:
    """A file of a release, and what it is called in a registry."""

    layer: Layer
    path: Path


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push moved."""

    blobs: int
    bytes: int


class Registry:
    """A repository of a registry, for pushing.

    Raises:
        FleetConfigError: the address, a certificate or the credentials cannot be used.
    """

    def __init__(self, config: RegistryConfig) -> None:
        try:
            self._place = registry.parse_place(config.address)
        except ValueError as error:
            raise FleetConfigError(f"registry.address {error}") from error
        try:
            context = ssl.create_default_context(cafile=config.ca_file or None)
        except (OSError, ValueError) as error:
            raise FleetConfigError(f"registry.ca_file {config.ca_file}: {error}; give a PEM file") from error
        self._config = config
        self._password = self._read_password()
        self._authorization = ""
        opener = urllib.request.OpenerDirector()
        for part in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=context),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            opener.add_handler(part)
        opener.addheaders = [("User-Agent", f"edge-fleet/{__version__}")]
        self._opener = opener

    def __str__(self) -> str:
        return str(self._place)

    def push(self, model: str, version: Version, files: Iterable[ReleaseFile]) -> Pushed:
        """Push a release.

        Raises:
            RegistryError: the registry refused, or does not answer.
            OSError: a file of the release cannot be read.
        """
        files = tuple(files)
        for file in files:
            if (size := file.path.stat().st_size) != file.layer.size:
                raise RegistryError(
                    f"{file.path} has {size} bytes, expected {file.layer.size}: publish again"
                )
        empty = Layer(registry.EMPTY_TYPE, Digest.of_bytes(registry.EMPTY), len(registry.EMPTY), "")
        self._bring(empty, lambda: io.BytesIO(registry.EMPTY))
        moved = [self._bring(file.layer, lambda path=file.path: path.open("rb")) for file in files]  # type: ignore[misc]
        content = registry.artifact(model, version, [file.layer for file in files])
        url = f"{self._place.base}/manifests/{registry.tag(model, version)}"
        headers = {"Content-Type": registry.MANIFEST_TYPE, "Content-Length": str(len(content))}
        with self._ask("PUT", url, headers, lambda: io.BytesIO(content)):
            return Pushed(sum(size > 0 for size in moved), sum(moved))

    def _bring(self, layer: Layer, opened: Callable[[], IO[bytes]]) -> int:
        """Push a blob unless it is there; returns the bytes that moved."""
        try:
            with self._ask("HEAD", self._place.blob(layer.digest)):
                return 0
        except _Refused as refused:
            if refused.status != 404:
                raise
        start = f"{self._place.base}/blobs/uploads/"
        with self._ask("POST", start, {"Content-Length": "0"}) as response:
            location = urllib.parse.urljoin(start, response.headers.get("Location", ""))
        mark = "&" if urllib.parse.urlsplit(location).query else "?"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(layer.size)}
        url = f"{location}{mark}{urllib.parse.urlencode({'digest': layer.digest})}"
        with self._ask("PUT", url, headers, opened):
            return layer.size

    @contextlib.contextmanager
    def _ask(
        self,
        method: str,
        url: str,
        headers: dict[str, str] | None = None,
        body: Callable[[], IO[bytes]] | None = None,
    ) -> Iterator[Any]:
        """One request; where the registry wants to know who asks, it is told once and asked again."""
        with contextlib.ExitStack() as stack:
            try:
                response = self._send(stack, method, url, headers, body, self._authorization)
            except _Refused as refused:
                if refused.status != 401 or not self._is_ours(url):
                    raise
                self._authorization = self._authorized(refused)
                response = self._send(stack, method, url, headers, body, self._authorization)
            yield response

    def _send(
        self,
        stack: contextlib.ExitStack,
        method: str,
        url: str,
        headers: dict[str, str] | None,
        body: Callable[[], IO[bytes]] | None,
        authorization: str,
    ) -> Any:
        if self._place.secure and not url.startswith("https:"):
            raise RegistryError(f"{self._place}: it names {url[:200]}, which is without TLS")
        data = stack.enter_context(body()) if body else None
        request = urllib.request.Request(url, data, dict(headers or {}), method=method)  # noqa: S310 - http(s) only
        if authorization and (self._is_ours(url) or method == "GET"):
            request.add_unredirected_header("Authorization", authorization)
        try:
            return stack.enter_context(
                contextlib.closing(self._opener.open(request, timeout=self._config.timeout_seconds))
            )
        except urllib.error.HTTPError as error:
            with error:
                raise _Refused(method, url, error, _words(error)) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = getattr(error, "reason", None) or error
            raise RegistryError(f"{self._place} does not answer: {why or type(error).__name__}") from error

    def _is_ours(self, url: str) -> bool:
        return urllib.parse.urlsplit(url).netloc == self._place.host

    def _authorized(self, refused: _Refused) -> str:
        challenge = registry.parse_challenge(refused.challenges)
        if challenge is None or (challenge.scheme == "basic" and self._password is None):
            raise RegistryError(
                f"{self._place} wants a password; set registry.credentials_file in fleet.yaml"
            ) from refused
        if challenge.scheme == "basic":
            assert self._password is not None
            return self._password
        try:
            url = registry.token_url(self._place, challenge, "pull,push")
            with contextlib.ExitStack() as stack:
                response = self._send(stack, "GET", url, None, None, self._password or "")
                return registry.bearer(response.read(registry.MAX_ANSWER))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RegistryError(f"{self._place}: {error}") from error

    def _read_password(self) -> str | None:
        path = self._config.credentials_file
        if not path:
            return None
        try:
            return registry.basic(Path(path).read_bytes(), self._place)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise FleetConfigError(f"registry.credentials_file {path}: {why}") from error


class _Refused(RegistryError):
    def __init__(self, method: str, url: str, error: urllib.error.HTTPError, words: str) -> None:
        super().__init__(f"{method} {url.partition('?')[0]}: HTTP {error.code}{words}")
        self.status = error.code
        self.challenges = tuple(error.headers.get_all("WWW-Authenticate") or ())


def _words(error: urllib.error.HTTPError) -> str:
    """What a registry says beside the number: ``{"errors": [{"code", "message"}]}``."""
    try:
        errors = msgspec.json.decode(error.read(_MAX_ANSWER))["errors"]
        return ": " + "; ".join(f"{one['code']} {one['message']}" for one in errors)[:300]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, msgspec.DecodeError):
        return ""
