"""A branch of a git repository as a source: the GitOps repository itself, fetched shallow by the git program.

``git+https://host/fleet.git#main:repository``: branch ``main`` (the default), and in it the folder
``repository`` (the default), which holds what contract/repository.py lays out. Members are there too, or come
from ``updates.blobs``.

Invariants:

- git is only how files travel: what they are worth is decided by their signatures, so no commit is trusted;
- nothing is checked out: no file name of the repository ever becomes a path on this device, no hook runs;
- all reads of one ``GitSource`` are of one commit;
- whatever the server sends, one fetch writes at most the bundle limit and 64 MB, and leaves the disk room;
  what git says is bounded, and so is its memory.

The copy lies in the store and is only a cache: where git cannot use it, it is removed and fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import tempfile
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
_SMALL: Final = 1 << 20  # bytes of what git says, where it does not give a file
_SPARE: Final = 16 << 20  # bytes left free on the disk
_MEMORY: Final = 256 << 20  # bytes of a git process; what is larger is streamed
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
        self._refused: str | None = None  # a commit that is too large
        self._limit = access.cache_bytes

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
        return self._git("cat-file", "blob", name, room=max(size, _SMALL))

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
                self._fetch(branch, commit)
                commit = self._git("rev-parse", "--verify", f"{_REF}^{{commit}}").decode().strip()
            self._commit = commit
        return self._commit

    def _has(self, commit: str) -> bool:
        try:
            return self._git("rev-parse", "--verify", f"{_REF}^{{commit}}").decode().strip() == commit
        except SourceFailed:
            return False

    def _fetch(self, branch: str, commit: str) -> None:
        if commit == self._refused:  # it would be as large again, every few seconds
            raise SourceFailed(f"{self._url}: {commit[:12]} is too large", reason="too_large")
        free = self._limit
        try:
            if self._copied() > self._limit:
                shutil.rmtree(self._cache, ignore_errors=True)
            if not (self._cache / "HEAD").exists():
                self._git("init", "--quiet", "--bare", str(self._cache), alone=True)
            elif len(list(self._cache.glob("objects/pack/*.pack"))) >= _PACKS:
                self._git("gc", "--quiet", "--prune=now", patience=_FETCH_PATIENCE, room=self._limit)
            free = shutil.disk_usage(self._cache).free - _SPARE
            self._git(
                "fetch", "--quiet", "--depth=1", "--no-tags", "--no-write-fetch-head",
                "--no-recurse-submodules", "--", self._url, f"+{branch}:{_REF}",
                patience=_FETCH_PATIENCE, room=max(min(self._limit, free), 0),
            )  # fmt: skip
        except (SourceFailed, OSError) as error:
            shutil.rmtree(self._cache, ignore_errors=True)  # it may be what is broken, or too much
            if isinstance(error, OSError):
                raise SourceFailed(f"{self._cache}: {error.strerror}", reason="scratch") from error
            if error.reason == "too_large" and free < self._limit:
                raise SourceFailed(
                    f"{error}; only {free} bytes are free for it", reason="disk_full"
                ) from error
            if error.reason == "too_large":
                self._refused = commit
            raise

    def _copied(self) -> int:
        """Bytes of the copy."""
        return sum(pack.stat().st_size for pack in self._cache.glob("objects/pack/*"))

    def _git(self, *arguments: str, alone: bool = False, patience: int = 1, room: int = _SMALL) -> bytes:
        """Run git; no file that it writes, and nothing that it says, has more than ``room`` bytes."""
        # The shell waits until the limits are set, so that git never runs without them.
        command = ["sh", "-c", 'read -r _ && exec "$@"', "sh", *self._command(alone=alone), *arguments]
        with contextlib.ExitStack() as stack:
            try:
                out, said = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
                process = stack.enter_context(
                    subprocess.Popen(
                        command,
                        env=self._environment(),
                        stdin=subprocess.PIPE,
                        stdout=out,
                        stderr=said,
                        restore_signals=False,  # a file that is too large is an error then, not a signal
                        process_group=0,
                    )
                )
            except OSError as error:
                raise SourceFailed(f"git cannot be started: {error.strerror}") from error
            try:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
                if self._scheme != "file":  # there the server is a child of this process, and is trusted
                    resource.prlimit(process.pid, resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
                process.communicate(b"go\n", timeout=self._timeout * patience)
            except subprocess.TimeoutExpired as error:
                raise SourceFailed(f"{self._url}: git {arguments[0]} took too long") from error
            except OSError as error:
                raise SourceFailed(f"git cannot be limited (prlimit): {error.strerror}") from error
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it started
            said.seek(0)
            words = said.read(_SMALL)
            if process.returncode != 0:
                raise self._failed(arguments[0], process.returncode, words)
            out.seek(0)
            return out.read()

    def _failed(self, verb: str, code: int, said: bytes) -> SourceFailed:
        lines = said.decode(errors="replace").strip().splitlines()
        why = next((line for line in lines if line.startswith(("fatal:", "error:"))), "")
        reason = "unreachable"
        if os.strerror(errno.EFBIG).encode() in said:
            reason, why = (
                "too_large",
                "there is more than may be fetched (updates.max_bundle_bytes and 64 MB)",
            )
        elif os.strerror(errno.ENOSPC).encode() in said:
            reason = "disk_full"
        return SourceFailed(f"{self._url}: git {verb}: {why[:300] or code}", reason=reason)

    def _command(self, *, alone: bool = False) -> list[str]:
        settings = {
            "protocol.allow": "never",
            f"protocol.{self._scheme}.allow": "always",
            "core.hooksPath": os.devnull,
            "gc.auto": "0",
            "fetch.unpackLimit": "1",  # one pack, one file: what is limited is files
            "core.bigFileThreshold": "4m",  # larger ones are streamed, not held in memory
            "core.deltaBaseCacheLimit": "16m",
            "pack.threads": "1",
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
