"""Files over HTTP(S): the way there, and static files as a source.

Invariants, of every request:

- only ``SourceFailed`` is raised, whatever the server, a proxy or something in between does;
- a redirection never leads from TLS to plain HTTP, and takes ``Authorization`` along to the same host only;
- no cookies, no ``.netrc``, no other scheme than HTTP and HTTPS.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from email.message import Message
from typing import Any, Final
from urllib.parse import urlsplit

from edge_agent import __version__
from edge_agent.contract.digest import Digest
from edge_agent.contract.repository import TIMESTAMP
from edge_agent.errors import ConfigError
from edge_agent.update.source import DIRECT, TIMESTAMP_LIMIT, Access, Seen, SourceFailed, Stream, within

_CHUNK: Final = 1 << 18  # bytes
_UNCONDITIONAL: Final = 20  # every so many looks ask without a condition
_REASONS: Final = {403: "not_found", 404: "not_found", 410: "not_found"}


class Refused(SourceFailed):
    """The server answered, and not with what was asked for."""

    def __init__(self, url: str, status: int, headers: Message) -> None:
        super().__init__(f"{url}: HTTP {status}", reason=_REASONS.get(status, "unreachable"))
        self.status = status
        self.headers = headers


class Web:
    """GET requests. Without ``updates.proxy`` the environment names the proxy.

    Raises:
        ConfigError: a certificate cannot be read.
    """

    def __init__(self, timeout: float, access: Access = DIRECT, *, secure: bool) -> None:
        proxies = {"http": access.proxy, "https": access.proxy} if access.proxy else None
        self._timeout = timeout
        # Only what is needed: no file:, no ftp:, no cookies, no authentication from .netrc.
        opener = urllib.request.OpenerDirector()
        for part in (
            urllib.request.ProxyHandler(proxies),
            urllib.request.UnknownHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=_tls(access) if secure else None),
            urllib.request.HTTPDefaultErrorHandler(),
            _Redirections(),
            urllib.request.HTTPErrorProcessor(),
        ):
            opener.add_handler(part)
        opener.addheaders = [("User-Agent", f"edge-agent/{__version__}")]
        self._opener = opener

    @contextlib.contextmanager
    def get(
        self, url: str, headers: Mapping[str, str] | None = None, authorization: str = ""
    ) -> Iterator[Any]:
        """The response to a GET.

        Raises:
            Refused: the answer is an error, or 304.
            SourceFailed: there is no answer.
        """
        request = urllib.request.Request(url, headers=dict(headers or {}))  # noqa: S310 - http(s) handlers only
        if authorization:
            request.add_unredirected_header("Authorization", authorization)
        with _explained(url):
            response = self._opener.open(request, timeout=self._timeout)
        if response is None:
            raise SourceFailed(f"{url}: no answer")
        with contextlib.closing(response):
            yield response

    def read(self, url: str, response: Any, limit: int) -> bytes:
        """The body of a response, one byte beyond the limit at most."""
        with _explained(url):
            data: bytes = response.read(limit + 1)
        return within(url, data, limit)

    @contextlib.contextmanager
    def stream(self, url: str, offset: int, authorization: str = "") -> Iterator[Stream]:
        """A file in pieces, with a Range where only the rest is wanted."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self.get(url, headers, authorization) as response:
            # 206 only counts if it begins where we asked; a server without ranges answers 200 and the whole.
            begins = f"bytes {offset}-"
            resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(begins)
            if response.status == 206 and not resumed:
                raise SourceFailed(f"{url}: an unexpected part was answered")
            yield Stream(offset if resumed else 0, _chunks(url, response))


class HttpSource:
    """A repository on a static web server."""

    def __init__(self, url: str, timeout: float, access: Access = DIRECT) -> None:
        """Raises ``ConfigError`` where a certificate cannot be read."""
        self._base = url.rstrip("/") + "/"
        self._web = Web(timeout, access, secure=url.startswith("https:"))

    def look(self, seen: Seen | None) -> Seen:
        """One conditional GET; without an ETag, or every so often, an unconditional one.

        Some servers make the ETag from the time in whole seconds and the size: two changes within one
        second look like one to them. The unconditional look finds the second.
        """
        looks = seen.looks + 1 if seen else 0
        conditional = seen is not None and seen.etag is not None and looks % _UNCONDITIONAL
        headers = {"If-None-Match": seen.etag} if conditional and seen and seen.etag else {}
        url = self._base + TIMESTAMP
        try:
            with self._web.get(url, headers) as response:
                data = self._web.read(url, response, TIMESTAMP_LIMIT)
                return Seen(Digest.of_bytes(data), response.headers.get("ETag"), looks)
        except Refused as refused:
            if refused.status != 304 or seen is None:
                raise
            return Seen(seen.digest, seen.etag, looks)

    def read(self, path: str, limit: int) -> bytes:
        """GET a file, one byte beyond the limit at most."""
        with self._web.get(self._base + path) as response:
            return self._web.read(self._base + path, response, limit)

    def stream(self, path: str, offset: int) -> contextlib.AbstractContextManager[Stream]:
        """GET a file in pieces."""
        return self._web.stream(self._base + path, offset)


class _Redirections(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request to make instead."""
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if before.scheme == "https" and after.scheme != "https":
            raise urllib.error.URLError(f"redirected to {after.scheme}://{after.netloc}, without TLS")
        authorization = req.unredirected_hdrs.get("Authorization")
        if new is not None and authorization and before[:2] == after[:2]:
            new.add_unredirected_header("Authorization", authorization)
        return new


def _chunks(url: str, response: Any) -> Iterator[bytes]:
    while True:
        with _explained(url):
            chunk = response.read(_CHUNK)
        if not chunk:
            return
        yield chunk


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise Refused(url, error.code, error.headers) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", None) or error
        raise SourceFailed(f"{url}: {cause or type(error).__name__}") from error


def _tls(access: Access) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=access.ca_file or None)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConfigError(f"updates.ca_file {access.ca_file}: {_why(error)}; give a PEM file") from error
    if access.client_certificate:
        try:
            # The password is given so that an encrypted key fails instead of asking a person.
            context.load_cert_chain(access.client_certificate, access.client_key or None, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"updates.client_certificate {access.client_certificate}: {_why(error)}; give a PEM "
                "file, with its key not encrypted, there or in updates.client_key"
            ) from error
    return context


def _why(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
