"""The release repository's writer: TUF metadata, manifests, assignments and blobs (contract/repository.py).

Invariants:

- a reader that arrives between any two writes sees a consistent repository: blobs and targets are written
  before the metadata that names them, ``timestamp.json`` last, each by rename;
- nothing that exists is ever re-written, except ``timestamp.json``: versions only grow;
- a release is signed by the offline *targets* key, an assignment by the online *rollout* key, and the rollout
  key is trusted for ``assignments/*`` only: it chooses among signed releases and can introduce none;
- a release is never changed: the same version with other content is refused.

Private keys are only read when something is signed, so a machine that serves or assigns needs the online
keys alone.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError as TufError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from edge_agent.contract import assignments as documents
from edge_agent.contract import manifest as manifests
from edge_agent.contract.assignments import Assignments, Release
from edge_agent.contract.bundle import Bundle
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadManifest
from edge_agent.contract.manifest import FILE_NAME as MANIFEST
from edge_agent.contract.manifest import Manifest
from edge_agent.contract.registry import MEMBER_TYPE, PARCEL_TYPE, SIGNED_TYPE, Layer
from edge_agent.contract.repository import (
    ASSIGNMENTS_PATTERN,
    ASSIGNMENTS_TARGET,
    BLOBS,
    METADATA,
    RELEASES,
    ROLLOUT_ROLE,
    TARGETS,
    TIMESTAMP,
    blob_path,
    manifest_target,
    transfers_target,
)
from edge_agent.contract.transfers import Parcel, Transfers
from edge_agent.contract.transfers import encode as encode_transfers
from edge_agent.contract.transfers import parse as parse_transfers
from edge_agent.contract.version import Version
from fleet import parcels
from fleet.errors import KeyMissing, RepositoryError
from fleet.registry import ReleaseFile

OFFLINE: Final = ("root", "targets")
ONLINE: Final = ("snapshot", "timestamp", ROLLOUT_ROLE)


class ExpiryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Days until each role's metadata expires. Short where the key is online and re-signs by itself.

    An attacker who withholds updates is noticed when the timestamp expires; a week still lets a plant's link
    or its release server be down over a holiday.
    """

    root_days: float = 365.0
    targets_days: float = 365.0
    rollout_days: float = 90.0
    snapshot_days: float = 14.0
    timestamp_days: float = 7.0

    def days(self, role: str) -> float:
        """The lifetime of ``role``'s metadata, in days."""
        return float(getattr(self, f"{role}_days"))


@dataclass(frozen=True, slots=True)
class Published:
    """What ``publish`` did."""

    model: str
    release: Release
    new: bool  # False: this very release was there already
    blobs: int  # members written; the others were there already
    bytes: int  # bytes of those
    parcels: int = 0  # shorter ways for members: compressed, or as a difference to an earlier release


class Keys:
    """The key folder: ``offline/{root,targets}.pem`` and ``online/{snapshot,timestamp,rollout}.pem``.

    Folders are 0700, files 0600, PKCS#8 PEM, ed25519.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, role: str) -> Path:
        """Where ``role``'s private key lies."""
        return self.path / ("offline" if role in OFFLINE else "online") / f"{role}.pem"

    def create(self) -> None:
        """Generate every key.

        Raises:
            RepositoryError: one of them exists already; none is overwritten.
        """
        for role in (*OFFLINE, *ONLINE):
            path = self.file(role)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError as error:
                raise RepositoryError(f"key {path} exists already; it is never overwritten") from error
            with os.fdopen(descriptor, "wb") as file:
                file.write(CryptoSigner.generate_ed25519().private_bytes)
        for folder in (self.path, self.path / "offline", self.path / "online"):
            folder.chmod(0o700)

    def has(self, role: str) -> bool:
        """Whether the private key of ``role`` is on this machine."""
        return self.file(role).is_file()

    def signer(self, role: str) -> CryptoSigner:
        """The signer of ``role``.

        Raises:
            KeyMissing: not on this machine, not readable, or not an ed25519 PEM.
        """
        path = self.file(role)
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            where = "bring it from where offline keys are kept" if role in OFFLINE else "restore it"
            raise KeyMissing(f"the {role} key {path} cannot be read ({error.strerror}); {where}") from error
        except (ValueError, TypeError) as error:
            raise KeyMissing(f"the {role} key {path} is not an unencrypted PKCS#8 PEM") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyMissing(f"the {role} key {path} is not an ed25519 key")
        return CryptoSigner(key)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time: ``rollout run``, ``serve`` and a person may sign at the same moment."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Repository:
    """A release repository on disk. Every method that signs takes the lock of the key folder.

    Args:
        path: the folder that is served: ``metadata/``, ``targets/``, ``blobs/``.
        keys: the private keys; may be absent as long as nothing is signed.
        expiry: lifetimes of new metadata.
        clock: the present time, UTC.
    """

    def __init__(
        self,
        path: Path,
        keys: Keys,
        expiry: ExpiryConfig | None = None,
        clock: Callable[[], datetime.datetime] = _now,
    ) -> None:
        self.path = path
        self.keys = keys
        self._expiry = expiry or ExpiryConfig()
        self._clock = clock

    @classmethod
    def create(
        cls,
        path: Path,
        keys: Keys,
        expiry: ExpiryConfig | None = None,
        clock: Callable[[], datetime.datetime] = _now,
    ) -> Repository:
        """Generate keys and write the first metadata: no releases, and assignments that say nothing.

        Raises:
            RepositoryError: there is a repository, or a key, already.
        """
        self = cls(path, keys, expiry, clock)
        if self._file(TIMESTAMP).exists() or any(path.glob(f"{METADATA}/*.root.json")):
            raise RepositoryError(f"{path} already holds a release repository")
        keys.create()
        for folder in (METADATA, TARGETS, BLOBS):
            self._file(folder).mkdir(parents=True, exist_ok=True)
        with keys.locked():
            root = Root(expires=self._expires("root"), consistent_snapshot=True)
            for name in ("root", "timestamp", "snapshot", "targets"):
                root.add_key(keys.signer(name).public_key, name)
            self._sign("root", root)
            targets = Targets(expires=self._expires("targets"))
            public = keys.signer(ROLLOUT_ROLE).public_key
            role = DelegatedRole(
                ROLLOUT_ROLE, [public.keyid], 1, terminating=True, paths=[ASSIGNMENTS_PATTERN]
            )
            targets.delegations = Delegations({public.keyid: public}, {ROLLOUT_ROLE: role})
            self._sign("targets", targets)
            data = documents.encode(Assignments(serial=1))
            rollout = Targets(expires=self._expires(ROLLOUT_ROLE))
            rollout.targets[ASSIGNMENTS_TARGET] = self._write_target(ASSIGNMENTS_TARGET, data)
            self._sign(ROLLOUT_ROLE, rollout)
            snapshot = Snapshot(expires=self._expires("snapshot"))
            self._sign_snapshot(snapshot, targets.version, rollout.version)
        return self

    def root(self) -> bytes:
        """The first root metadata: what devices get as their anchor of trust."""
        return self._read("1.root.json")

    def releases(self) -> dict[str, tuple[Release, ...]]:
        """Every published release by model, ascending by version.

        Raises:
            RepositoryError: the metadata cannot be read.
        """
        found: dict[str, list[Release]] = {}
        for path, target in self._targets().targets.items():
            if not path.startswith(RELEASES):
                continue
            _, model, name = path.split("/")
            release = Release(
                Version(name.removesuffix(".json")), Digest("sha256:" + target.hashes["sha256"])
            )
            found.setdefault(model, []).append(release)
        return {
            model: tuple(sorted(some, key=lambda release: release.version))
            for model, some in sorted(found.items())
        }

    def release(self, model: str, version: Version) -> Release:
        """One published release.

        Raises:
            RepositoryError: it was not published; names those that were.
        """
        known = self.releases().get(model, ())
        for release in known:
            if release.version == version:
                return release
        versions = ", ".join(release.version for release in known) or "none"
        raise RepositoryError(
            f"{model} {version} is not published; published: {versions}; run edge-fleet publish first"
        )

    def assignments(self) -> Assignments:
        """The signed document as it stands.

        Raises:
            RepositoryError: the metadata or the document cannot be read.
            BadAssignments: the document is wrong.
        """
        target = self._rollout().targets[ASSIGNMENTS_TARGET]
        try:
            data = self._target_file(ASSIGNMENTS_TARGET, target.hashes["sha256"]).read_bytes()
            target.verify_length_and_hashes(data)
        except (OSError, TufError) as error:
            raise RepositoryError(f"{self.path}: the assignments document is damaged: {error}") from error
        return documents.parse(data)

    def expires(self) -> dict[str, datetime.datetime]:
        """When each role's metadata expires.

        Raises:
            RepositoryError: the metadata cannot be read.
        """
        return {
            "root": self._root().expires,
            "targets": self._targets().expires,
            ROLLOUT_ROLE: self._rollout().expires,
            "snapshot": self._snapshot().expires,
            "timestamp": self._timestamp().expires,
        }

    def publish(
        self, bundle: Bundle, deliver: Callable[[tuple[ReleaseFile, ...]], object] | None = None
    ) -> Published:
        """Make a verified bundle a signed release. Needs the offline targets key.

        Idempotent: the same bundle again changes nothing.

        Args:
            bundle: what to publish.
            deliver: brings the files to another place that devices fetch from, before the release is signed:
                whoever reads that it exists can fetch it. What it raises ends the call, with nothing signed.

        Raises:
            BadBundle: a member is missing or altered.
            KeyMissing: the targets key, or an online key, is not here; nothing was changed.
            RepositoryError: this version exists with other content.
        """
        bundle.verify()
        manifest = bundle.manifest
        release = Release(manifest.version, bundle.digest)
        path = manifest_target(manifest.name, manifest.version)
        data = (bundle.path / MANIFEST).read_bytes()
        with self.keys.locked():
            targets = self._targets()
            known = targets.targets.get(path)
            if known is not None and known.hashes["sha256"] != bundle.digest.hex:
                raise RepositoryError(
                    f"{manifest.name} {manifest.version} is published with digest "
                    f"{known.hashes['sha256'][:12]}, this bundle has {bundle.digest.short}; "
                    "a release is never changed: use a new version"
                )
            if known is None:
                for role in ("targets", "snapshot", "timestamp"):
                    self.keys.signer(role)  # before the first byte is written
            written = [self._write_blob(bundle, name) for name in sorted(manifest.members)]
            transfers = self._transfers(targets, manifest) if known else self._write_parcels(bundle)
            made = 0 if known else sum(map(len, transfers.members.values()))
            if known is None:
                if made:
                    target = transfers_target(manifest.name, manifest.version)
                    targets.targets[target] = self._write_target(target, encode_transfers(transfers))
                targets.targets[path] = self._write_target(path, data)
            if deliver is not None:
                deliver(self._files_of(release, manifest, transfers))
            if known is None:
                targets.version += 1
                targets.expires = self._expires("targets")
                self._sign("targets", targets)
                self._sign_snapshot(self._snapshot(), targets=targets.version)
        return Published(
            manifest.name, release, known is None, sum(size > 0 for size in written), sum(written), made
        )

    def files(self, model: str, version: Version) -> tuple[ReleaseFile, ...]:
        """The files of a published release: manifest, members, parcels.

        Raises:
            RepositoryError: it was not published, or what is there is damaged.
        """
        release = self.release(model, version)
        try:
            data = self._target_file(manifest_target(model, version), release.digest.hex).read_bytes()
            manifest = manifests.parse(data)
            return self._files_of(release, manifest, self._transfers(self._targets(), manifest))
        except (OSError, BadManifest) as error:
            raise RepositoryError(f"{model} {version} cannot be read: {error}") from error

    def _files_of(
        self, release: Release, manifest: Manifest, transfers: Transfers
    ) -> tuple[ReleaseFile, ...]:
        signed = self._target_file(manifest_target(manifest.name, manifest.version), release.digest.hex)
        found = [
            ReleaseFile(Layer(SIGNED_TYPE, release.digest, signed.stat().st_size, MANIFEST), signed),
            *(
                ReleaseFile(Layer(MEMBER_TYPE, one.digest, one.size, name), self._file(blob_path(one.digest)))
                for name, one in sorted(manifest.members.items())
            ),
        ]
        for name, some in sorted(transfers.members.items()):
            for parcel in some:
                title = f"{name}.{parcel.digest.short}.zst"
                layer = Layer(PARCEL_TYPE, parcel.digest, parcel.size, title, parcel.base)
                found.append(ReleaseFile(layer, self._file(blob_path(parcel.digest))))
        return tuple(found)

    def _transfers(self, targets: Targets, manifest: Manifest) -> Transfers:
        target = transfers_target(manifest.name, manifest.version)
        if target not in targets.targets:
            return Transfers()
        sha256 = targets.targets[target].hashes["sha256"]
        return parse_transfers(self._target_file(target, sha256).read_bytes())

    def assign(self, document: Assignments) -> None:
        """Sign a new assignments document with the online rollout key.

        Raises:
            RepositoryError: the serial does not grow, or a release it names was not published.
            BadAssignments: the document contradicts itself.
            KeyMissing: an online key is not here; nothing was changed.
        """
        data = documents.encode(document)
        documents.parse(data)  # nothing that a device would refuse is ever signed
        with self.keys.locked():
            serial = self.assignments().serial
            if document.serial <= serial:
                raise RepositoryError(
                    f"assignments serial {document.serial} is not above {serial}: "
                    "somebody else assigned meanwhile, try again"
                )
            published = self.releases()
            for model, entry in document.models.items():
                for release in (entry.stable, entry.candidate.release if entry.candidate else None):
                    if release is not None and release not in published.get(model, ()):
                        raise RepositoryError(
                            f"{model} {release.version} ({release.digest.short}) is not a published release"
                        )
            rollout = self._rollout()
            rollout.targets[ASSIGNMENTS_TARGET] = self._write_target(ASSIGNMENTS_TARGET, data)
            rollout.version += 1
            rollout.expires = self._expires(ROLLOUT_ROLE)
            self._sign(ROLLOUT_ROLE, rollout)
            self._sign_snapshot(self._snapshot(), rollout=rollout.version)

    def refresh(self, *, force: bool = False) -> tuple[str, ...]:
        """Re-sign the online metadata of which less than half of its life is left; returns the roles.

        Raises:
            KeyMissing: an online key is not here.
            RepositoryError: the metadata cannot be read.
        """
        with self.keys.locked():
            due = [role for role in ONLINE if force or self._due(role)]
            if ROLLOUT_ROLE in due:
                rollout = self._rollout()
                rollout.version += 1
                rollout.expires = self._expires(ROLLOUT_ROLE)
                self._sign(ROLLOUT_ROLE, rollout)
                self._sign_snapshot(self._snapshot(), rollout=rollout.version)
                return ONLINE
            if "snapshot" in due:
                self._sign_snapshot(self._snapshot())
                return ("snapshot", "timestamp")
            if "timestamp" in due:
                self._sign_timestamp(self._snapshot().version)
            return tuple(due)

    def refresh_offline(self) -> tuple[str, ...]:
        """Re-sign root and targets with the offline keys, and what follows from it.

        Raises:
            KeyMissing: an offline or online key is not here; nothing was changed.
        """
        with self.keys.locked():
            for role in (*OFFLINE, "snapshot", "timestamp"):
                self.keys.signer(role)
            root, targets = self._root(), self._targets()
            root.version += 1
            root.expires = self._expires("root")
            self._sign("root", root)
            targets.version += 1
            targets.expires = self._expires("targets")
            self._sign("targets", targets)
            self._sign_snapshot(self._snapshot(), targets=targets.version)
        return OFFLINE

    # Reading: our own files, so their signatures are the devices' business; the form is checked by tuf.

    def _root(self) -> Root:
        versions = sorted(
            int(path.name.split(".")[0]) for path in self._file(METADATA).glob("[0-9]*.root.json")
        )
        if not versions:
            raise RepositoryError(f"{self.path} is not a release repository: no {METADATA}/N.root.json")
        return Metadata[Root].from_bytes(self._read(f"{versions[-1]}.root.json")).signed

    def _timestamp(self) -> Timestamp:
        return Metadata[Timestamp].from_bytes(self._read("timestamp.json")).signed

    def _snapshot(self) -> Snapshot:
        version = self._timestamp().snapshot_meta.version
        return Metadata[Snapshot].from_bytes(self._read(f"{version}.snapshot.json")).signed

    def _targets(self) -> Targets:
        return self._targets_of("targets")

    def _rollout(self) -> Targets:
        return self._targets_of(ROLLOUT_ROLE)

    def _targets_of(self, role: str) -> Targets:
        version = self._snapshot().meta[f"{role}.json"].version
        return Metadata[Targets].from_bytes(self._read(f"{version}.{role}.json")).signed

    def _read(self, name: str) -> bytes:
        try:
            return self._file(f"{METADATA}/{name}").read_bytes()
        except OSError as error:
            raise RepositoryError(
                f"{self.path} is not a usable release repository: {METADATA}/{name}: {error.strerror}"
            ) from error

    def _file(self, relative: str) -> Path:
        return self.path / relative

    # Writing

    def _expires(self, role: str) -> datetime.datetime:
        life = datetime.timedelta(days=self._expiry.days(role))
        return self._clock().replace(microsecond=0) + life

    def _due(self, role: str) -> bool:
        left = self.expires()[role] - self._clock()
        return left < datetime.timedelta(days=self._expiry.days(role)) / 2

    def _sign(self, role: str, signed: Root | Targets | Snapshot | Timestamp) -> None:
        metadata: Metadata[Any] = Metadata(signed)
        metadata.sign(self.keys.signer(role))
        name = (
            f"{METADATA}/{role}.json" if role == "timestamp" else f"{METADATA}/{signed.version}.{role}.json"
        )
        _write(self._file(name), metadata.to_bytes(JSONSerializer(compact=True)), replace=role == "timestamp")

    def _sign_snapshot(
        self, snapshot: Snapshot, targets: int | None = None, rollout: int | None = None
    ) -> None:
        if self._file(f"{METADATA}/{snapshot.version}.snapshot.json").exists():
            snapshot.version += 1
        snapshot.expires = self._expires("snapshot")
        for role, version in (("targets", targets), (ROLLOUT_ROLE, rollout)):
            if version is not None:
                snapshot.meta[f"{role}.json"] = MetaFile(version)
        self._sign("snapshot", snapshot)
        self._sign_timestamp(snapshot.version)

    def _sign_timestamp(self, snapshot: int) -> None:
        exists = self._file(TIMESTAMP).exists()
        timestamp = self._timestamp() if exists else Timestamp()
        timestamp.version += exists
        timestamp.expires = self._expires("timestamp")
        timestamp.snapshot_meta = MetaFile(snapshot)
        self._sign("timestamp", timestamp)

    def _target_file(self, target: str, sha256: str) -> Path:
        folder, name = target.rsplit("/", 1)
        return self._file(f"{TARGETS}/{folder}/{sha256}.{name}")

    def _write_target(self, target: str, data: bytes) -> TargetFile:
        info = TargetFile.from_data(target, data, ["sha256"])
        _write(self._target_file(target, info.hashes["sha256"]), data)
        return info

    def _write_parcels(self, bundle: Bundle) -> Transfers:
        """Make what may travel instead of each member, and write it among the blobs.

        Differences are to what devices are likely to have: the version before, and what is assigned now.
        """
        found: dict[str, tuple[Parcel, ...]] = {}
        if not parcels.available():
            return Transfers()
        bases = self._bases(bundle.manifest.name, bundle.manifest.version)
        for name, member in sorted(bundle.manifest.members.items()):
            if member.size < parcels.SMALLEST:
                continue
            data = bundle.read(name)
            frames: dict[Digest | None, bytes | None] = {None: parcels.compressed(data)}
            for base in bases:
                old = base.members.get(name)
                if old is not None and old.digest != member.digest and old.digest not in frames:
                    with contextlib.suppress(OSError):
                        content = self._file(blob_path(old.digest)).read_bytes()
                        if Digest.of_bytes(content) == old.digest:
                            frames[old.digest] = parcels.difference(content, data)
            made = []
            for digest, frame in frames.items():
                if frame is not None:
                    parcel = Parcel(Digest.of_bytes(frame), len(frame), digest)
                    _write(self._file(blob_path(parcel.digest)), frame)
                    made.append(parcel)
            if made:
                found[name] = tuple(made)
        return Transfers(found)

    def _bases(self, model: str, version: Version) -> list[Manifest]:
        releases = self.releases().get(model, ())
        wanted = [release for release in releases if release.version < version][-1:]
        entry = self.assignments().models.get(model)
        if entry is not None:
            candidate = entry.candidate.release if entry.candidate else None
            wanted += [release for release in (entry.stable, candidate) if release is not None]
        found = []
        for release in dict.fromkeys(wanted):
            path = manifest_target(model, release.version)
            # What cannot be read is no base; that it is damaged comes out where it is needed.
            with contextlib.suppress(OSError, BadManifest):
                found.append(manifests.parse(self._target_file(path, release.digest.hex).read_bytes()))
        return found

    def _write_blob(self, bundle: Bundle, name: str) -> int:
        """Copy a member to its place; 0 if it was there already, else its size."""
        member = bundle.manifest.members[name]
        place = self._file(blob_path(member.digest))
        if place.exists() and Digest.of_file(place) == member.digest:
            return 0
        place.parent.mkdir(parents=True, exist_ok=True)
        with _staged(place) as staged, bundle.member(name).open("rb") as source, staged.open("wb") as out:
            shutil.copyfileobj(source, out)
        return member.size


def _write(place: Path, data: bytes, *, replace: bool = False) -> None:
    """Write a file so that it is there whole or not at all.

    A file of that name with other bytes can only be left by a run that died before ``timestamp.json`` named
    it: nobody has read it, and it is replaced.
    """
    if not replace and place.exists() and place.read_bytes() == data:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with _staged(place) as staged:
        staged.write_bytes(data)


@contextlib.contextmanager
def _staged(place: Path) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=place.parent)
    os.close(descriptor)
    staged = Path(name)
    try:
        yield staged
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        staged.chmod(0o644)
        staged.replace(place)
        folder = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        staged.unlink(missing_ok=True)
