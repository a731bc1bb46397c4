"""A branch of a git repository as a source: the GitOps repository itself, fetched shallow by the git program.

``git+https://host/fleet.git#main:repository``: branch ``main`` (the default), and in it the folder
``repository`` (the default), which holds what contract/repository.py lays out. Members are there too, or come
from ``updates.blobs``.

Invariants:

- git is only how files travel: what they are worth is decided by their signatures, so no commit is trusted;
- nothing is checked out: no file name of the repository ever becomes a path on this device, no hook runs;
- all reads of one ``GitSource`` are of one commit.

The copy lies in the store and is only a cache: where git cannot use it, it is removed and fetched again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import urlsplit

from edge_agent.contract.digest import Digest
from edge_agent.contract.repository import TIMESTAMP
from edge_agent.errors import ConfigError
from edge_agent.update.source import Access, Seen, SourceFailed, Stream

_CHUNK: Final = 1 << 18  # bytes
_TIMESTAMP_LIMIT: Final = 16384  # bytes; TUF's own limit
_REF: Final = "refs/edge/current"
_PACKS: Final = 20  # fetches before the copy is packed again: each leaves a pack
_FETCH_PATIENCE: Final = 20  # times the time-out, for a whole fetch; git itself watches for silence


class GitSource:
    """A repository in a folder of a branch.

    Raises:
        ConfigError: the URL makes no sense, or there is no git program.
    """

    def __init__(self, text: str, timeout: float, access: Access) -> None:
        parts = urlsplit(text)
        self._scheme = parts.scheme.removeprefix("git+")
        branch, _, folder = parts.fragment.partition(":")
        if self._scheme not in ("https", "http", "file") or not parts.path.strip("/"):
            raise ConfigError(f"updates.source {text!r}: expected git+https://host/path#branch:folder")
        if shutil.which("git") is None:
            raise ConfigError(f"updates.source {text!r} needs the git program; install git")
        if not access.cache:
            raise ConfigError(f"updates.source {text!r} needs a store to keep its copy in")
        self._url = parts._replace(scheme=self._scheme, fragment="").geturl()
        self._branch = branch or "main"
        self._folder = (folder or "repository").strip("/")
        self._cache = Path(access.cache)
        self._timeout = timeout
        self._access = access
        self._commit: str | None = None

    def look(self, seen: Seen | None) -> Seen:
        """Ask for the branch's commit; only another one is fetched."""
        self._commit = None
        commit = self._fetched()
        if seen is not None and seen.etag == commit:
            return seen
        return Seen(Digest.of_bytes(self.read(TIMESTAMP, _TIMESTAMP_LIMIT)), commit)

    def read(self, path: str, limit: int) -> bytes:
        """A file of the commit."""
        name = self._object(path)
        size = self._size(path, name)
        if size > limit:
            raise SourceFailed(f"{path}: more than {limit} bytes", reason="too_large")
        return self._git("cat-file", "blob", name)

    @contextlib.contextmanager
    def stream(self, path: str, offset: int) -> Iterator[Stream]:
        """A large file of the commit; what comes before ``offset`` is read and thrown away."""
        name = self._object(path)
        self._size(path, name)
        process = subprocess.Popen(
            [*self._command(), "cat-file", "blob", name], env=self._environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            left = offset
            while left and (skipped := process.stdout.read(min(left, _CHUNK))):
                left -= len(skipped)
            yield Stream(offset - left, iter(lambda: process.stdout.read(_CHUNK), b""))  # type: ignore[union-attr]
        finally:
            process.stdout.close()
            process.kill()
            process.wait()

    def _object(self, path: str) -> str:
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise SourceFailed(f"path {path[:200]!r} leaves the repository", reason="not_found")
        return f"{self._fetched()}:{self._folder}/{path}"

    def _size(self, path: str, name: str) -> int:
        try:
            return int(self._git("cat-file", "-s", name))
        except SourceFailed as error:
            raise SourceFailed(f"{self._url}: no {self._folder}/{path} in branch {self._branch}",
                               reason="not_found") from error  # fmt: skip

    def _fetched(self) -> str:
        """The commit that is read, here by now."""
        if self._commit is None:
            branch = f"refs/heads/{self._branch}"
            answer = self._git("ls-remote", "--", self._url, branch, alone=True).split()
            if not answer:
                raise SourceFailed(f"{self._url}: no branch {self._branch}", reason="not_found")
            commit = answer[0].decode("ascii", "replace")
            if not self._has(commit):
                self._fetch(branch)
                commit = self._git("rev-parse", "--verify", f"{_REF}^{{commit}}").decode().strip()
            self._commit = commit
        return self._commit

    def _has(self, commit: str) -> bool:
        try:
            return self._git("rev-parse", "--verify", f"{_REF}^{{commit}}").decode().strip() == commit
        except SourceFailed:
            return False

    def _fetch(self, branch: str) -> None:
        try:
            if not (self._cache / "HEAD").exists():
                self._git("init", "--quiet", "--bare", str(self._cache), alone=True)
            elif len(list(self._cache.glob("objects/pack/*.pack"))) >= _PACKS:
                self._git("gc", "--quiet", "--prune=now", patience=_FETCH_PATIENCE)
            self._git(
                "fetch", "--quiet", "--depth=1", "--no-tags", "--no-write-fetch-head",
                "--no-recurse-submodules", "--", self._url, f"+{branch}:{_REF}", patience=_FETCH_PATIENCE,
            )  # fmt: skip
        except SourceFailed:
            shutil.rmtree(self._cache, ignore_errors=True)  # it may be what is broken
            raise

    def _git(self, *arguments: str, alone: bool = False, patience: int = 1) -> bytes:
        command = [*self._command(alone=alone), *arguments]
        try:
            done = subprocess.run(
                command, env=self._environment(), stdin=subprocess.DEVNULL, capture_output=True,
                timeout=self._timeout * patience, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise SourceFailed(f"{self._url}: git {arguments[0]} took too long") from error
        except OSError as error:
            raise SourceFailed(f"git cannot be started: {error.strerror}") from error
        if done.returncode != 0:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            said = next((line for line in words if line.startswith(("fatal:", "error:"))), "")
            raise SourceFailed(f"{self._url}: git {arguments[0]}: {said or done.returncode}")
        return done.stdout

    def _command(self, *, alone: bool = False) -> list[str]:
        settings = {
            "protocol.allow": "never",
            f"protocol.{self._scheme}.allow": "always",
            "core.hooksPath": os.devnull,
            "gc.auto": "0",
            "maintenance.auto": "false",
            "http.lowSpeedLimit": "1",
            "http.lowSpeedTime": str(max(1, round(self._timeout))),
            "http.proxy": self._access.proxy,
            "http.sslCAInfo": self._access.ca_file,
            "http.sslCert": self._access.client_certificate,
            "http.sslKey": self._access.client_key or self._access.client_certificate,
        }
        where = [] if alone else [f"--git-dir={self._cache}"]
        return [
            "git",
            *where,
            *(part for key, value in settings.items() if value for part in ("-c", f"{key}={value}")),
        ]

    @staticmethod
    def _environment() -> dict[str, str]:
        # Nobody is there to be asked for a password, and a GIT_DIR of whoever started the agent is not ours.
        kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        return {**kept, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
