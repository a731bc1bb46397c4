"""An OCI registry as the place that members come from: ``oci://host[:port]/name``.

``GET /v2/<name>/blobs/sha256:<hex>``, resumed by range, redirected to wherever the registry keeps its blobs.
What a registry wants to be told is answered once for each worker: a token from the server that its challenge
names, or a password. Where it comes from decides nothing: the caller proves every member by its digest.

How a release lies in a registry, and how registries are asked: contract/registry.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from edge_agent.contract import registry
from edge_agent.contract.digest import Digest
from edge_agent.contract.repository import BLOBS
from edge_agent.errors import ConfigError
from edge_agent.update.source import Access, SourceFailed, Stream
from edge_agent.update.web import Refused, Web

_REASONS: Final = {401: "unauthorized", 403: "denied", 404: "not_found", 429: "throttled"}
_ADVICE: Final = {
    "unauthorized": "; is this registry in updates.credentials_file, and is the password right?",
    "denied": "; give this user or token the right to pull",
    "throttled": "; it is tried again later",
}
_MAX_CREDENTIALS: Final = 1 << 20  # bytes


class RegistryBlobs:
    """The blobs of a repository of a registry.

    Raises:
        ConfigError: the address makes no sense, or a certificate or the credentials cannot be read.
    """

    def __init__(self, text: str, timeout: float, access: Access) -> None:
        try:
            self._place = registry.parse_place(text)
        except ValueError as error:
            raise ConfigError(f"updates.blobs {error}") from error
        self._credentials = access.credentials
        self._web = Web(
            timeout, access, secure=True
        )  # a token server may have TLS where the registry has not
        self._authorization = ""
        self._password()

    @contextlib.contextmanager
    def stream(self, path: str, offset: int) -> Iterator[Stream]:
        """Read a blob in pieces."""
        url = self._place.blob(Digest(f"sha256:{path.removeprefix(f'{BLOBS}/')}"))
        with contextlib.ExitStack() as stack:
            try:
                stream = stack.enter_context(self._web.stream(url, offset, self._authorization))
            except Refused as refused:
                if refused.status != 401:
                    raise _named(refused) from refused
                # The first time, or the token is too old by now.
                self._authorization = self._authorized(refused)
                try:
                    stream = stack.enter_context(self._web.stream(url, offset, self._authorization))
                except Refused as again:
                    raise _named(again) from again
            yield stream

    def _authorized(self, refused: Refused) -> str:
        """What to say to this registry."""
        challenge = registry.parse_challenge(refused.headers.get_all("WWW-Authenticate") or ())
        password = self._password()
        if challenge is None or (challenge.scheme == "basic" and password is None):
            raise _named(refused) from refused
        if challenge.scheme == "basic":
            assert password is not None
            return password
        try:
            url = registry.token_url(self._place, challenge, "pull")
            with self._web.get(url, authorization=password or "") as response:
                return registry.bearer(self._web.read(url, response, registry.MAX_ANSWER))
        except Refused as error:
            raise _named(error) from error
        except ValueError as error:
            raise SourceFailed(f"{self._place}: {error}", reason="unauthorized") from error

    def _password(self) -> str | None:
        """Read anew each time: credentials are renewed while an agent runs."""
        if not self._credentials:
            return None
        try:
            with Path(self._credentials).open("rb") as file:
                return registry.basic(file.read(_MAX_CREDENTIALS), self._place)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"updates.credentials_file {self._credentials}: {why}") from error


def _named(refused: Refused) -> SourceFailed:
    reason = _REASONS.get(refused.status, "unreachable")
    return SourceFailed(f"{refused}{_ADVICE.get(reason, '')}", reason=reason)
