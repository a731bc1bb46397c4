"""Sources: where a release repository is read from. Nothing here is trusted, so nothing here checks anything.

Invariants:

- only ``SourceFailed`` is raised, whatever the network, the disk or the server does;
- every read has a limit in bytes, every wait one in seconds.

Three of them: static files over HTTP(S), a folder (a mounted ConfigMap, a USB stick, a checkout), and a
branch of a git repository (``git.py``). Members may come from a second one, ``updates.blobs``: a git
repository keeps what is signed, and is no place for large files.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

import msgspec

from edge_agent import __version__
from edge_agent.contract.digest import Digest
from edge_agent.contract.repository import TIMESTAMP
from edge_agent.errors import ConfigError, SourceError

_CHUNK: Final = 1 << 18  # bytes
_TIMESTAMP_LIMIT: Final = 16384  # bytes; TUF's own limit
_UNCONDITIONAL: Final = 20  # every so many looks ask without a condition


class SourceFailed(SourceError):
    """The repository could not be read. ``reason`` is one word: unreachable, not_found, too_large, ..."""

    def __init__(self, message: str, *, reason: str = "unreachable") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Seen:
    """The timestamp metadata as it was last seen."""

    digest: Digest
    etag: str | None = None
    looks: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """A file being read: from ``offset``, which may be less than was asked for."""

    offset: int
    chunks: Iterator[bytes]


class Source(Protocol):
    """A release repository's files."""

    def look(self, seen: Seen | None) -> Seen:
        """A cheap look at the timestamp metadata; equal digests mean that nothing changed.

        Raises:
            SourceFailed: it cannot be read.
        """
        ...

    def read(self, path: str, limit: int) -> bytes:
        """A whole small file.

        Raises:
            SourceFailed: it cannot be read (``not_found``), or has more than ``limit`` bytes (``too_large``).
        """
        ...

    def stream(self, path: str, offset: int) -> contextlib.AbstractContextManager[Stream]:
        """A large file, from ``offset`` where the source can do that, else from the start.

        Raises:
            SourceFailed: it cannot be read.
        """
        ...


class Access(msgspec.Struct, frozen=True):
    """The way to a source, as configured; empty where the environment and the system decide."""

    blobs: str = ""  # another source for members
    proxy: str = ""
    ca_file: str = ""
    client_certificate: str = ""
    client_key: str = ""
    cache: str = ""  # a folder that a source may fill, and that survives


DIRECT: Final = Access()


def open_source(text: str, timeout: float, access: Access = DIRECT) -> Source:
    """The source that ``updates.source`` names, its members from ``updates.blobs`` where that is set.

    Raises:
        ConfigError: neither an http(s), file: or git+ URL nor a path; or a certificate is not there.
    """
    source = _open_one(text, timeout, access)
    return WithBlobs(source, _open_one(access.blobs, timeout, access)) if access.blobs else source


def _open_one(text: str, timeout: float, access: Access) -> Source:
    parts = urlsplit(text)
    if parts.scheme.startswith("git+"):
        from edge_agent.update.git import GitSource

        return GitSource(text, timeout, access)
    if parts.scheme in ("http", "https"):
        return HttpSource(text, timeout, access)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return FolderSource(Path(unquote(parts.path)))
    if parts.scheme == "":
        return FolderSource(Path(text))
    raise ConfigError(
        f"updates.source {text!r}: expected an http(s) URL, a file: URL, a git+https:// or "
        "git+file:// URL, or a path"
    )


class WithBlobs:
    """One source for what is signed, another for members."""

    def __init__(self, signed: Source, blobs: Source) -> None:
        self._signed = signed
        self._blobs = blobs

    def look(self, seen: Seen | None) -> Seen:
        """Look at what is signed."""
        return self._signed.look(seen)

    def read(self, path: str, limit: int) -> bytes:
        """Read what is signed."""
        return self._signed.read(path, limit)

    def stream(self, path: str, offset: int) -> contextlib.AbstractContextManager[Stream]:
        """Read a member."""
        return self._blobs.stream(path, offset)


class FolderSource:
    """A repository in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def look(self, seen: Seen | None) -> Seen:
        """Read the timestamp metadata: some hundred bytes."""
        return Seen(Digest.of_bytes(self.read(TIMESTAMP, _TIMESTAMP_LIMIT)))

    def read(self, path: str, limit: int) -> bytes:
        """Read a file, one byte beyond the limit at most."""
        with self._open(path) as file:
            try:
                data: bytes = file.read(limit + 1)
            except OSError as error:
                raise self._failed(path, error) from error
        return _within(path, data, limit)

    @contextlib.contextmanager
    def stream(self, path: str, offset: int) -> Iterator[Stream]:
        """Read a file in pieces."""
        with self._open(path) as file:
            file.seek(offset)
            yield Stream(offset, self._chunks(path, file))

    def _chunks(self, path: str, file: Any) -> Iterator[bytes]:
        try:
            while chunk := file.read(_CHUNK):
                yield chunk
        except OSError as error:
            raise self._failed(path, error) from error

    def _open(self, path: str) -> Any:
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise SourceFailed(f"path {path[:200]!r} leaves the repository", reason="not_found")
        try:
            return (self._folder / path).open("rb")
        except OSError as error:
            raise self._failed(path, error) from error

    def _failed(self, path: str, error: OSError) -> SourceFailed:
        # No repository at all is a medium that is not there; one file less is a broken repository.
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = "not_found" if gone and self._folder.is_dir() else "unreachable"
        return SourceFailed(f"{self._folder / path}: {error.strerror}", reason=reason)


class HttpSource:
    """A repository on a static web server. Without ``updates.proxy`` the environment names the proxy."""

    def __init__(self, url: str, timeout: float, access: Access = DIRECT) -> None:
        """Raises ``ConfigError`` where a certificate cannot be read."""
        proxies = {"http": access.proxy, "https": access.proxy} if access.proxy else None
        self._base = url.rstrip("/") + "/"
        self._timeout = timeout
        # Only what is needed: no file:, no ftp:, no cookies, no authentication from .netrc.
        opener = urllib.request.OpenerDirector()
        for part in (
            urllib.request.ProxyHandler(proxies),
            urllib.request.UnknownHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=_tls(access) if url.startswith("https:") else None),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            opener.add_handler(part)
        opener.addheaders = [("User-Agent", f"edge-agent/{__version__}")]
        self._opener = opener

    def look(self, seen: Seen | None) -> Seen:
        """One conditional GET; without an ETag, or every so often, an unconditional one.

        Some servers make the ETag from the time in whole seconds and the size: two changes within one
        second look like one to them. The unconditional look finds the second.
        """
        looks = seen.looks + 1 if seen else 0
        conditional = seen is not None and seen.etag is not None and looks % _UNCONDITIONAL
        headers = {"If-None-Match": seen.etag} if conditional and seen and seen.etag else {}
        try:
            with self._get(TIMESTAMP, headers) as response:
                data = self._read(TIMESTAMP, response, _TIMESTAMP_LIMIT)
                return Seen(Digest.of_bytes(data), response.headers.get("ETag"), looks)
        except _NotModified:
            assert seen is not None  # only then was there a condition
            return Seen(seen.digest, seen.etag, looks)

    def read(self, path: str, limit: int) -> bytes:
        """GET a file, one byte beyond the limit at most."""
        with self._get(path, {}) as response:
            return self._read(path, response, limit)

    @contextlib.contextmanager
    def stream(self, path: str, offset: int) -> Iterator[Stream]:
        """GET a file in pieces, with a Range where only the rest is wanted."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._get(path, headers) as response:
            # 206 only counts if it begins where we asked; a server without ranges answers 200 and the whole.
            begins = f"bytes {offset}-"
            resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(begins)
            if response.status == 206 and not resumed:
                raise SourceFailed(f"{self._base}{path}: an unexpected part was answered")
            yield Stream(offset if resumed else 0, self._chunks(path, response))

    def _chunks(self, path: str, response: Any) -> Iterator[bytes]:
        while True:
            with self._explained(path):
                chunk = response.read(_CHUNK)
            if not chunk:
                return
            yield chunk

    def _read(self, path: str, response: Any, limit: int) -> bytes:
        with self._explained(path):
            data: bytes = response.read(limit + 1)
        return _within(path, data, limit)

    @contextlib.contextmanager
    def _get(self, path: str, headers: dict[str, str]) -> Iterator[Any]:
        request = urllib.request.Request(self._base + path, headers=headers)  # noqa: S310 - http(s) handlers only
        with self._explained(path):
            response = self._opener.open(request, timeout=self._timeout)
        if response is None:
            raise SourceFailed(f"{self._base}{path}: no answer")
        with contextlib.closing(response):
            yield response

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 304:
                raise _NotModified from None
            reason = "not_found" if error.code in (403, 404, 410) else "unreachable"
            raise SourceFailed(f"{self._base}{path}: HTTP {error.code}", reason=reason) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = getattr(error, "reason", None) or error
            raise SourceFailed(f"{self._base}{path}: {cause or type(error).__name__}") from error


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


class _NotModified(Exception):
    pass


def _within(path: str, data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise SourceFailed(f"{path}: more than {limit} bytes", reason="too_large")
    return data
