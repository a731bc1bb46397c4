"""Sources: where a release repository is read from. Nothing here is trusted, so nothing here checks anything.

Invariants:

- only ``SourceFailed`` is raised, whatever the network, the disk or the server does;
- every read has a limit in bytes, every wait one in seconds.

Three of them: static files over HTTP(S) (``web.py``), a folder (a mounted ConfigMap, a USB stick, a
checkout), and a branch of a git repository (``git.py``). Members may come from a second one,
``updates.blobs``, which may also be an OCI registry (``oci.py``): a git repository keeps what is signed, and
is no place for large files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

import msgspec

from edge_agent.contract.digest import Digest
from edge_agent.contract.registry import is_registry
from edge_agent.contract.repository import TIMESTAMP
from edge_agent.errors import ConfigError, SourceError

_CHUNK: Final = 1 << 18  # bytes
TIMESTAMP_LIMIT: Final = 16384  # bytes; TUF's own limit


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


class Blobs(Protocol):
    """Where members come from."""

    def stream(self, path: str, offset: int) -> contextlib.AbstractContextManager[Stream]:
        """A large file, from ``offset`` where the source can do that, else from the start.

        Raises:
            SourceFailed: it cannot be read.
        """
        ...


class Source(Blobs, Protocol):
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


class Access(msgspec.Struct, frozen=True):
    """The way to a source, as configured; empty where the environment and the system decide."""

    blobs: str = ""  # another source for members
    proxy: str = ""
    ca_file: str = ""
    client_certificate: str = ""
    client_key: str = ""
    cache: str = ""  # a folder that a source may fill, and that survives
    cache_bytes: int = 512 << 20  # as far as that
    credentials: str = ""  # a file: what an OCI registry is told


DIRECT: Final = Access()


def open_source(text: str, timeout: float, access: Access = DIRECT) -> Source:
    """The source that ``updates.source`` names, its members from ``updates.blobs`` where that is set.

    Raises:
        ConfigError: neither an http(s), file: or git+ URL nor a path; or a certificate is not there.
    """
    if is_registry(text):
        raise ConfigError(
            f"updates.source {text!r}: a registry holds members only; name it in updates.blobs, and in "
            "updates.source where the signed metadata are"
        )
    source = _open_one("source", text, timeout, access)
    return WithBlobs(source, _open_blobs(access.blobs, timeout, access)) if access.blobs else source


def _open_blobs(text: str, timeout: float, access: Access) -> Blobs:
    if is_registry(text):
        from edge_agent.update.oci import RegistryBlobs

        return RegistryBlobs(text, timeout, access)
    return _open_one("blobs", text, timeout, access)


def _open_one(key: str, text: str, timeout: float, access: Access) -> Source:
    parts = urlsplit(text)
    if parts.scheme.startswith("git+"):
        from edge_agent.update.git import GitSource

        return GitSource(text, timeout, access)
    if parts.scheme in ("http", "https"):
        from edge_agent.update.web import HttpSource

        return HttpSource(text, timeout, access)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return FolderSource(Path(unquote(parts.path)))
    if parts.scheme == "":
        return FolderSource(Path(text))
    raise ConfigError(
        f"updates.{key} {text!r}: expected an http(s) URL, a file: URL, a git+https:// or "
        f"git+file:// URL, {'an oci:// URL, ' if key == 'blobs' else ''}or a path"
    )


class WithBlobs:
    """One source for what is signed, another for members."""

    def __init__(self, signed: Source, blobs: Blobs) -> None:
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
        return Seen(Digest.of_bytes(self.read(TIMESTAMP, TIMESTAMP_LIMIT)))

    def read(self, path: str, limit: int) -> bytes:
        """Read a file, one byte beyond the limit at most."""
        with self._open(path) as file:
            try:
                data: bytes = file.read(limit + 1)
            except OSError as error:
                raise self._failed(path, error) from error
        return within(path, data, limit)

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


def within(path: str, data: bytes, limit: int) -> bytes:
    """``data``, unless there is more of it than may be.

    Raises:
        SourceFailed: there is (``too_large``).
    """
    if len(data) > limit:
        raise SourceFailed(f"{path}: more than {limit} bytes", reason="too_large")
    return data
