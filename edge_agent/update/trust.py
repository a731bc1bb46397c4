"""Trust: what the release repository says, believed only where the signatures say so (TUF, through ``tuf``).

Invariants:

- the anchor is the root given in the configuration, every time; what lies in the cache is only ever believed
  through it;
- trusted metadata is durable before anything is done because of it, so a power cut does not re-open the door
  to a roll-back of the metadata;
- a clock that stands before a time this device has already been through holds updates (``clock_behind``):
  with it, metadata that expired would look fresh;
- a release is believed if the offline *targets* role names its manifest *and* the online *rollout* role
  assigns that very digest; neither key can do it alone.

``tuf`` writes its cache without fsync and leaves a gap while it replaces ``root.json``
(https://github.com/theupdateframework/python-tuf/pull/3010). It therefore works on a copy in a scratch
folder, and what it has verified is written back through the store's durable layer.

Imported in the worker process only: ``tuf`` and ``cryptography`` cost the serving process 14 MB and more.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, TargetFile
from tuf.ngclient import FetcherInterface, Updater

from edge_agent.contract import assignments, manifest
from edge_agent.contract.assignments import Assignments, Release
from edge_agent.contract.errors import BadAssignments
from edge_agent.contract.repository import (
    ASSIGNMENTS_TARGET,
    METADATA,
    ROLLOUT_ROLE,
    TARGETS,
    manifest_target,
)
from edge_agent.errors import UpdateRejected
from edge_agent.store.fs import Disk, explained
from edge_agent.update.source import Source, SourceFailed

_LARGEST: Final = 5_000_000  # bytes; the largest of tuf's own limits, which it applies per file
_HISTORY: Final = "root_history"
_FLOOR: Final = "clock_floor"  # seconds since the epoch, as text
_CLOCK_SLACK: Final = 3600.0  # seconds: a clock that was set right is not a clock that was lost
# The files that bound what can be trusted; what came last in time comes last here.
_ROLES: Final = ("targets", ROLLOUT_ROLE, "snapshot", "timestamp")


class TrustedRepository:
    """One look at a release repository: ``refresh`` first, then ask. Not for use twice."""

    def __init__(
        self,
        source: Source,
        root: bytes,
        trusted: Path,
        scratch: Path,
        progress: Callable[[], None] = lambda: None,
        *,
        disk: Disk | None = None,
        now: Callable[[], float] = time.time,
        downloads: Path | None = None,
    ) -> None:
        """Copy the trusted metadata into ``scratch`` and start from ``root``.

        Args:
            source: where the repository is read from.
            root: the root metadata that the device trusts from the beginning.
            trusted: the folder of metadata that was verified; durable.
            scratch: a folder for this look only.
            progress: called for every file that came.
            disk: what writes ``trusted``.
            now: the wall clock, seconds since the epoch.
            downloads: where target files are kept; a folder in ``scratch`` if None.

        Raises:
            UpdateRejected: ``root`` is no TUF root metadata (``bad_root``).
            StoreError: the scratch folder cannot be written.
        """
        self._disk = disk or Disk()
        self._trusted = trusted
        self._settled = False
        self._cache = scratch / "tuf"
        self._targets = downloads or scratch / "targets"
        self._root = root
        self._now = now
        self._fetcher = _Fetcher(source, progress)
        with explained("copy", trusted):
            shutil.copytree(trusted, self._cache, symlinks=True)
            self._targets.mkdir(exist_ok=True)
        self._client()

    def refresh(self) -> None:
        """Bring the trusted metadata up to date and make it durable.

        Raises:
            UpdateRejected: a signature, a version, a hash or an expiry is wrong; ``reason`` says which.
            SourceFailed: the repository cannot be read.
            StoreError: the disk refused.
        """
        try:
            self._check_clock()
            with _explained("release metadata"):
                self._client().refresh()
            self._raise_floor()
        finally:
            self._keep()

    def assignments(self) -> Assignments:
        """The signed document.

        Raises:
            UpdateRejected: there is none, or it is not what was signed, or it cannot be read.
            SourceFailed: it cannot be read from the source.
        """
        data = self.target(ASSIGNMENTS_TARGET, assignments.MAX_BYTES)
        try:
            return assignments.parse(data)
        except BadAssignments as error:
            raise UpdateRejected(str(error), reason="bad_assignments") from error

    def manifest(self, model: str, release: Release) -> bytes:
        """The signed manifest of a release.

        Raises:
            UpdateRejected: the offline key knows no such release (``unknown_release``), or one with another
                digest (``digest_mismatch``).
            SourceFailed: it cannot be read from the source.
        """
        path = manifest_target(model, release.version)
        return self.target(path, manifest.MAX_BYTES, expected=release)

    def expires(self) -> float:
        """When the first of the trusted metadata expires, in seconds since the epoch; 0 if there is none."""
        found = []
        roots = sorted((self._cache / _HISTORY).glob("*.root.json"), key=_version)
        for path in (*roots[-1:], *(self._cache / f"{role}.json" for role in _ROLES)):
            # What lies in the cache now was verified a moment ago.
            with contextlib.suppress(OSError, tuf_errors.RepositoryError, ValueError):
                found.append(Metadata.from_bytes(path.read_bytes()).signed.expires.timestamp())
        return min(found, default=0.0)

    def target(self, path: str, limit: int, expected: Release | None = None) -> bytes:
        """The bytes of a signed target file.

        Raises:
            UpdateRejected: the signed metadata name no such target, another digest than ``expected``, or more
                than ``limit`` bytes; or what came is not what was signed.
            SourceFailed: it cannot be read from the source.
            StoreError: the disk refused.
        """
        # A client of its own for each: tuf remembers a delegated role as verified whoever delegated to it,
        # and a role that two delegate to must be verified for each of them.
        client = self._client()
        try:
            with _explained(path):
                info = client.get_targetinfo(path)
        finally:
            self._keep()  # the delegated roles on the way
        with _explained(path):
            if info is None:
                raise UpdateRejected(f"{path} is not in the signed metadata", reason="unknown_release")
            self._check(path, info, limit, expected)
            file = Path(client.find_cached_target(info) or client.download_target(info))
        with explained("read", file):
            return file.read_bytes()

    @staticmethod
    def _check(path: str, info: TargetFile, limit: int, expected: Release | None) -> None:
        if expected is not None and info.hashes.get("sha256") != expected.digest.hex:
            raise UpdateRejected(
                f"{path}: the signed release has digest {info.hashes.get('sha256', 'unknown')[:12]}, "
                f"the assignments name {expected.digest.short}",
                reason="digest_mismatch",
            )
        if info.length > limit:
            raise UpdateRejected(f"{path}: {info.length} bytes, at most {limit} allowed", reason="too_large")

    def _client(self) -> Updater:
        try:
            return Updater(
                str(self._cache), METADATA, str(self._targets), TARGETS, self._fetcher, bootstrap=self._root
            )
        except tuf_errors.RepositoryError as error:
            raise UpdateRejected(
                f"updates.root is no usable TUF root metadata: {error}", reason="bad_root"
            ) from error

    def _keep(self) -> None:
        """Make durable what was verified, oldest root first, the timestamp last."""
        disk = self._disk
        disk.make_durable_dir(self._trusted / _HISTORY)
        if not self._settled:  # an agent that was killed may have left what is equal, and only visible
            disk.settle(self._trusted / _HISTORY)
            disk.settle(self._trusted)
            self._settled = True
        roots = sorted((self._cache / _HISTORY).glob("*.root.json"), key=_version)
        top = [self._cache / f"{role}.json" for role in ("targets", "snapshot", "timestamp")]
        delegated = sorted(set(self._cache.glob("*.json")) - {*top, self._cache / "root.json"})
        for path in (*roots, *delegated, *top):
            kept = self._trusted / path.relative_to(self._cache)
            if path.exists():
                data = path.read_bytes()
                if not kept.exists() or kept.read_bytes() != data:
                    disk.write_durable(kept, data)

    def _check_clock(self) -> None:
        floor = self._floor()
        if self._now() < floor - _CLOCK_SLACK:
            raise UpdateRejected(
                f"this device's clock says {_date(self._now())}, and it has been {_date(floor)} here "
                "already: set the clock; until then no update is taken, and what is installed keeps serving",
                reason="clock_behind",
            )

    def _raise_floor(self) -> None:
        """Remember that it has been this late. Called when the metadata were fresh by this very clock.

        So the floor is never beyond the expiry of signed metadata: a clock that was far ahead for a while
        does not hold updates for ever after.
        """
        now = self._now()
        if now > self._floor() + _CLOCK_SLACK:  # seldom: every write wears the medium
            self._disk.write_durable(self._trusted / _FLOOR, f"{now:.0f}\n".encode())

    def _floor(self) -> float:
        try:
            floor = float((self._trusted / _FLOOR).read_bytes()[:32])
        except (OSError, ValueError):
            return 0.0
        return floor if math.isfinite(floor) else 0.0


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(" ", "seconds")


def _version(root: Path) -> int:
    return int(root.name.split(".")[0])


class _Fetcher(FetcherInterface):
    """tuf's way to a source. Metadata is read once: every lookup of this look sees the same repository."""

    def __init__(self, source: Source, progress: Callable[[], None]) -> None:
        self._source = source
        self._progress = progress
        self._read: dict[str, bytes | SourceFailed] = {}

    def _fetch(self, url: str) -> Iterator[bytes]:
        self._progress()
        try:
            return iter((self._once(url) if url.startswith(f"{METADATA}/") else self._from(url),))
        except SourceFailed as error:
            if error.reason == "not_found":
                raise tuf_errors.DownloadHTTPError(str(error), 404) from error
            raise tuf_errors.DownloadError(str(error)) from error

    def _once(self, url: str) -> bytes:
        if url not in self._read:
            try:
                self._read[url] = self._from(url)
            except SourceFailed as error:
                self._read[url] = error
        found = self._read[url]
        if isinstance(found, SourceFailed):
            raise found
        return found

    def _from(self, url: str) -> bytes:
        return self._source.read(url, _LARGEST)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn tuf's errors into ours: who must act, and one word for it."""
    try:
        yield
    except tuf_errors.ExpiredMetadataError as error:
        raise UpdateRejected(
            f"{what}: {error}; what is installed keeps serving, re-sign the repository "
            "(edge-fleet refresh) or set this device's clock",
            reason="expired",
        ) from error
    except tuf_errors.BadVersionNumberError as error:
        raise UpdateRejected(
            f"{what}: older than what this device has seen: {error}", reason="rolled_back_metadata"
        ) from error
    except tuf_errors.UnsignedMetadataError as error:
        raise UpdateRejected(f"{what}: wrong signature: {error}", reason="signature") from error
    except tuf_errors.LengthOrHashMismatchError as error:
        raise UpdateRejected(f"{what}: not what was signed: {error}", reason="mismatch") from error
    except tuf_errors.RepositoryError as error:
        raise UpdateRejected(f"{what}: {error}", reason="bad_metadata") from error
    except tuf_errors.DownloadLengthMismatchError as error:
        raise UpdateRejected(f"{what}: {error}", reason="too_large") from error
    except tuf_errors.DownloadHTTPError as error:
        raise SourceFailed(f"{what}: {error}", reason="not_found") from error
    except tuf_errors.DownloadError as error:
        cause = error.__cause__ if isinstance(error.__cause__, SourceFailed) else None
        raise SourceFailed(f"{what}: {error}", reason=cause.reason if cause else "unreachable") from error
    except OSError as error:
        raise SourceFailed(f"{what}: {error}", reason="scratch") from error
