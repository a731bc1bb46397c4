"""The store: which releases are on this device, and which one answers.

Invariants, whatever system call the power failed in:

- ``current`` of a model resolves to a complete release whose every byte was verified before the pointer
  moved: the old one or the new one, never neither, never a mixture;
- ``previous`` is another such release, or absent;
- one process writes (``flock``); readers need no lock;
- everything that is not reachable from a pointer or a record is garbage, and nothing else is;
- what is found is not relied on before it is durable: a process that was killed, or refused an fsync, leaves
  renames that everybody sees and a power cut may undo.

A release is a folder of hard links into a content-addressed blob folder, so releases that share members share
their bytes, and a member on the device is never fetched twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final

from edge_agent.contract import manifest as manifests
from edge_agent.contract.bundle import Bundle, open_bundle
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadBundle, BadDigest, ContractError
from edge_agent.contract.manifest import Manifest, Member
from edge_agent.errors import StoreError
from edge_agent.store import state
from edge_agent.store.fs import Disk, explained, unique
from edge_agent.store.layout import CURRENT, LASTING, PREVIOUS, RECORD, Layout
from edge_agent.store.state import UpdateRecord

logger = logging.getLogger(__name__)

_NOT_OURS: Final = -1  # lock descriptor of a read-only view


class Store:
    """One store, opened for writing with ``open`` or for looking with ``read``."""

    def __init__(self, layout: Layout, disk: Disk, lock: int) -> None:
        self.layout = layout
        self._disk = disk
        self._lock = lock
        self._settled = False  # whether everything that can be seen here survives a power cut
        self.refusal: StoreError | None = None  # why `open_or_read` could not take it

    @classmethod
    def open(cls, path: Path, disk: Disk | None = None) -> Store:
        """Take the store for writing: create it, lock it, remove what a crash left.

        Raises:
            StoreError: another agent has it (``reason`` is ``locked``), or the disk refuses.
        """
        store = cls(Layout(path.absolute()), disk or Disk(), _NOT_OURS)
        store.take()
        return store

    @classmethod
    def read(cls, path: Path) -> Store:
        """A view of the store that takes no lock and changes nothing."""
        return cls(Layout(path.absolute()), Disk(), _NOT_OURS)

    @classmethod
    def open_or_read(cls, path: Path, disk: Disk | None = None) -> Store:
        """The store for writing, or a view of it while it cannot be written.

        So a second agent serves what the first one installed (a pod's rolling update), and an agent serves
        from a disk that has become read-only. Ask ``writable``, and ``refusal`` for why not; ``take`` tries
        again.

        Raises:
            StoreError: it cannot be written, and there is nothing in it to serve either.
        """
        store = cls(Layout(path.absolute()), disk or Disk(), _NOT_OURS)
        try:
            store.take()
        except StoreError as error:
            if not store.models():
                raise
            store.refusal = error
        return store

    def take(self) -> None:
        """Become the one that writes: create what is missing, lock, remove what a crash left.

        Nothing happens where this view writes already. What ``current`` names may have changed since the last
        look: another agent may have had the store until now.

        Raises:
            StoreError: another agent has it (``reason`` is ``locked``), or the disk refuses; this stays a
                view.
        """
        if self.writable:
            return
        layout = self.layout
        for folder in (layout.blobs, layout.releases, layout.models, layout.partial, layout.tuf):
            self._disk.make_durable_dir(folder)
        self._lock = _take_lock(layout.lock)
        try:
            self._sweep()
        except BaseException:
            self.close()
            raise
        with contextlib.suppress(StoreError):  # tried again before anything is written
            self._settle()

    def close(self) -> None:
        """Give the lock back. Harmless when repeated."""
        if self._lock != _NOT_OURS:
            os.close(self._lock)
            self._lock = _NOT_OURS

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def disk(self) -> Disk:
        """What changes the disk here, for what else is written into the store: the TUF metadata."""
        return self._disk

    @property
    def writable(self) -> bool:
        """Whether this view holds the lock."""
        return self._lock != _NOT_OURS

    # What is there

    def models(self) -> list[str]:
        """The models that have a release or a record here, sorted."""
        with explained("read", self.layout.models):
            try:
                return sorted(path.name for path in self.layout.models.iterdir() if path.is_dir())
            except FileNotFoundError:
                return []
            except NotADirectoryError as error:
                raise StoreError(f"{self.layout.root} is no folder; choose another store") from error

    def current(self, model: str) -> Bundle | None:
        """The release that answers for ``model``; None if none was ever activated.

        Raises:
            BadBundle: there is one, but its manifest is not what it was when it was admitted.
        """
        return self._pointed(model, CURRENT)

    def previous(self, model: str) -> Bundle | None:
        """The release that a roll-back would bring back.

        Raises:
            BadBundle: there is one, but its manifest is not what it was when it was admitted.
        """
        # Equal pointers are what a crash in the middle of `activate` or `roll_back` leaves: no previous.
        if self.pointer(model, PREVIOUS) == self.pointer(model, CURRENT):
            return None
        return self._pointed(model, PREVIOUS)

    def intact_previous(self, model: str) -> Bundle:
        """The release that a roll-back would bring back, every byte of it verified.

        Raises:
            StoreError: there is none (``reason`` is ``no_previous``), or it is damaged
                (``corrupt_previous``).
        """
        try:
            bundle = self.previous(model)
            if bundle is not None:
                bundle.verify()
        except ContractError as error:
            raise StoreError(
                f"model {model}: the previous release is damaged ({error}); install a release",
                reason="corrupt_previous",
            ) from error
        if bundle is None:
            raise StoreError(
                f"model {model}: there is no previous release to go back to; install one",
                reason="no_previous",
            )
        return bundle

    def pointer(self, model: str, name: str = CURRENT) -> Digest | None:
        """The digest that ``current`` (or ``previous``) names, without looking at the release."""
        try:
            return Digest("sha256:" + (self.layout.model(model) / name).readlink().name)
        except (OSError, BadDigest):
            return None

    def lacks(self, manifest: Manifest) -> dict[str, Member]:
        """The members of ``manifest`` that are not in the store, or are not what they should be.

        Reads every byte of those that are: only what has just been proven is used again.
        """
        return {name: member for name, member in manifest.members.items() if not self._holds(member)}

    def free_bytes(self) -> int:
        """Bytes that an unprivileged writer can still put on the store's file system."""
        with explained("look at", self.layout.root):
            return shutil.disk_usage(self.layout.root).free

    # Bringing a release in

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A unique empty folder on the store's file system, removed afterwards.

        Raises:
            StoreError: it cannot be made.
        """
        with self._writing():
            folder = self.layout.staging / unique("")
            self._disk.make_durable_dir(folder)
        try:
            yield folder
        finally:
            # Garbage that cannot be removed now is swept at the next start.
            shutil.rmtree(folder, ignore_errors=True)

    def admit(self, staged: Path) -> Bundle:
        """Make a staged release durable without activating it. Takes the files out of ``staged``.

        ``staged`` holds ``manifest.json`` and the members that ``lacks`` named; more do no harm. Repeating it
        changes nothing; a member or release that was damaged on the disk is replaced, in every
        release that uses it.

        Raises:
            BadBundle, BadManifest: the staged release is not what its manifest says. Nothing was changed.
            StoreError: the disk refused. What was active stays active and whole.
        """
        with self._writing():
            return self._admit(staged)

    def _admit(self, staged: Path) -> Bundle:
        bundle = open_bundle(staged)
        for name, member in bundle.manifest.members.items():
            if (staged / name).is_symlink():
                raise BadBundle(f"bundle {staged}: member {name} is a link, expected a plain file")
            if (staged / name).exists():
                bundle.verify_member(name)
            elif not self._holds(member):
                raise BadBundle(f"bundle {staged}: member {name} is neither staged nor in the store")
        for name, member in bundle.manifest.members.items():
            if not self._holds(member):
                self._disk.adopt(staged / name, self.layout.blob(member.digest))
        manifest = (staged / manifests.FILE_NAME).read_bytes()
        self._publish(bundle, manifest)
        self._heal({member.digest for member in bundle.manifest.members.values()})
        admitted = open_bundle(self.layout.release(bundle.digest))
        admitted.verify()
        return admitted

    def activate(self, bundle: Bundle) -> None:
        """Make an admitted release the one that answers; the one before becomes ``previous``.

        Raises:
            StoreError: the disk refused; ``current`` is as it was.
        """
        with self._writing():
            self._activate(bundle)

    def _activate(self, bundle: Bundle) -> None:
        if bundle.path != self.layout.release(bundle.digest):
            raise StoreError(f"release {bundle.digest.short} was not admitted to {self.layout.root}")
        folder = self.layout.model(bundle.name)
        old = self.pointer(bundle.name)
        if old == bundle.digest:
            return
        self._disk.make_durable_dir(folder)
        # A release that is damaged is nothing to go back to: the previous one before it stays.
        if old is not None and self._intact(old):
            self._disk.replace_symlink(folder / PREVIOUS, self.layout.target(old))
        try:
            self._disk.replace_symlink(folder / CURRENT, self.layout.target(bundle.digest))
        except StoreError:
            # Only the folder's fsync can have failed after the switch; the caller is told "nothing changed".
            if self.pointer(bundle.name) == bundle.digest:
                with contextlib.suppress(StoreError):
                    self._point_back(folder / CURRENT, old)
            raise
        logger.info("model %s: %s is active, before it %s", bundle.name, bundle.digest.short, old)

    def roll_back(self, model: str) -> Bundle:
        """Make ``previous`` the release that answers, and return it.

        Raises:
            StoreError: there is none (``reason`` is ``no_previous``), it is damaged
                (``corrupt_previous``), or the disk refused; ``current`` is as it was.
        """
        with self._writing():
            bundle = self.intact_previous(model)
            folder = self.layout.model(model)
            self._disk.replace_symlink(folder / CURRENT, self.layout.target(bundle.digest))
            self._disk.remove(folder / PREVIOUS)
        logger.info("model %s: rolled back to %s", model, bundle.digest.short)
        return bundle

    # The update machine's record

    def record(self, model: str) -> UpdateRecord:
        """The persisted update state.

        A fresh one if there is none. Of a damaged one what must last is left, from its second file.
        """
        path = self.layout.model(model) / RECORD
        try:
            return _read_record(path)
        except FileNotFoundError:
            return UpdateRecord()
        except (OSError, ValueError) as error:
            logger.error("%s cannot be read (%s): the update state starts afresh", path, error)
        with contextlib.suppress(OSError, ValueError):
            return _read_record(path.with_name(LASTING)).lasting()
        return UpdateRecord()

    def save(self, model: str, record: UpdateRecord) -> None:
        """Persist the update state.

        Raises:
            StoreError: the disk refused; the record on disk is the old one.
        """
        folder = self.layout.model(model)
        with self._writing():
            self._disk.make_durable_dir(folder)
            # First what must last, where it changed: seldom.
            if record.lasting() != self._lasting(folder):
                self._disk.write_durable(folder / LASTING, state.encode(record.lasting()))
            self._disk.write_durable(folder / RECORD, state.encode(record))

    @staticmethod
    def _lasting(folder: Path) -> UpdateRecord | None:
        try:
            return _read_record(folder / LASTING)
        except FileNotFoundError:
            return UpdateRecord()
        except (OSError, ValueError):
            return None  # to be written anew

    # Garbage

    def collect_garbage(self) -> int:
        """Remove releases and blobs that no pointer and no record names; returns how many entries went.

        Raises:
            StoreError: the disk refused; nothing that is referenced was touched.
        """
        with self._writing():
            return self._collect_garbage()

    def _collect_garbage(self) -> int:
        kept = set[str]()
        for model in self.models():
            record = self.record(model)
            candidate = record.candidate.digest if record.candidate else None
            for digest in (
                self.pointer(model), self.pointer(model, PREVIOUS), candidate, record.previous,
            ):  # fmt: skip
                if digest is not None:
                    kept.add(digest.hex)
        needed = set[str]()
        for name in kept:
            folder = self.layout.releases / name
            if not folder.exists():
                continue
            try:
                members = open_bundle(folder).manifest.members.values()
            except ContractError:
                return 0  # a damaged manifest no longer says which blobs it needs: keep everything
            needed.update(member.digest.hex for member in members)
        with explained("read", self.layout.root):
            garbage = [path for path in self.layout.releases.iterdir() if path.name not in kept]
            garbage += [path for path in self.layout.blobs.iterdir() if path.name not in needed]
        for path in garbage:
            self._disk.remove_tree(path)
        return len(garbage)

    def forget_partial(self) -> None:
        """Remove half downloads: an update has ended, and they were for one before it.

        Raises:
            StoreError: one of them cannot be removed.
        """
        with self._writing():
            with explained("read", self.layout.partial):
                halves = list(self.layout.partial.iterdir())
            for path in halves:
                self._disk.remove_tree(path)

    # Parts

    def _pointed(self, model: str, name: str) -> Bundle | None:
        digest = self.pointer(model, name)
        if digest is None:
            return None
        bundle = open_bundle(self.layout.release(digest))
        if bundle.digest != digest:
            raise BadBundle(
                f"release {bundle.path}: the manifest has digest {bundle.digest.short}, "
                f"expected {digest.short}; it was altered on the disk"
            )
        return bundle

    def _intact(self, digest: Digest) -> bool:
        try:
            bundle = open_bundle(self.layout.release(digest))
            bundle.verify()
        except ContractError:
            return False
        return bundle.digest == digest

    def _holds(self, member: Member) -> bool:
        blob = self.layout.blob(member.digest)
        try:
            return blob.stat().st_size == member.size and Digest.of_file(blob) == member.digest
        except OSError:
            return False

    def _publish(self, bundle: Bundle, manifest: bytes) -> None:
        """Make the release folder, or make an existing one right again, one atomic entry at a time."""
        release = self.layout.release(bundle.digest)
        if release.is_dir():
            if not _same(release / manifests.FILE_NAME, manifest):
                self._disk.write_durable(release / manifests.FILE_NAME, manifest)
            self._link_members(bundle.manifest, release)
            return
        with self.staging() as folder:
            whole = folder / bundle.digest.hex
            self._disk.make_durable_dir(whole)
            self._disk.write_durable(whole / manifests.FILE_NAME, manifest)
            self._link_members(bundle.manifest, whole)
            self._disk.publish_dir(whole, release)

    def _link_members(self, manifest: Manifest, folder: Path) -> None:
        for name, member in manifest.members.items():
            self._disk.replace_link(folder / name, self.layout.blob(member.digest))

    def _heal(self, blobs: set[Digest]) -> None:
        """Releases hold hard links: where a damaged blob was replaced, they still hold the damaged one."""
        with explained("read", self.layout.releases):
            folders = list(self.layout.releases.iterdir())
        for folder in folders:
            try:
                manifest = open_bundle(folder).manifest
            except ContractError:
                continue
            for name, member in manifest.members.items():
                if member.digest in blobs:
                    self._disk.replace_link(folder / name, self.layout.blob(member.digest))

    def _point_back(self, link: Path, old: Digest | None) -> None:
        if old is None:
            self._disk.remove(link)
        else:
            self._disk.replace_symlink(link, self.layout.target(old))

    def _sweep(self) -> None:
        """Undo what a crash left: half-filled folders and temporary names. Half downloads stay."""
        with explained("read", self.layout.root):
            staged = [path for path in self.layout.staging.iterdir() if path != self.layout.partial]
            folders = [
                self.layout.blobs, self.layout.tuf, *self.layout.tuf.iterdir(),
                *self.layout.models.iterdir(), *self.layout.releases.iterdir(),
            ]  # fmt: skip
        for path in staged:
            try:
                self._disk.remove_tree(path)
            except StoreError as error:
                # A worker that outlived its agent for a moment may still write there. It is only garbage, and
                # the next start tries again: no reason not to serve.
                logger.warning("%s", error)
        for folder in folders:
            if folder.is_dir():
                self._disk.sweep(folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around everything that changes the store: only for its owner, and on durable ground."""
        if not self.writable:
            raise StoreError(
                f"store {self.layout.root} is open for reading only; another agent may be using it",
                reason="not_locked",
            )
        if not self._settled:
            self._settle()
        try:
            yield
        except StoreError:
            self._settled = False
            raise

    def _settle(self) -> None:
        """Make durable what a killed process, or a failed fsync, has left visible only."""
        layout = self.layout
        with explained("read", layout.root):
            folders = [
                layout.root, layout.blobs.parent, layout.blobs, layout.staging,
                *(folder for folder in layout.tuf.iterdir() if folder.is_dir()), layout.tuf,
                *layout.releases.iterdir(), layout.releases, *layout.models.iterdir(), layout.models,
            ]  # fmt: skip
        for folder in folders:
            self._disk.settle(folder)
        self._settled = True


def _read_record(path: Path) -> UpdateRecord:
    with path.open("rb") as file:
        return state.parse(file.read(state.MAX_BYTES + 1))


def _same(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


def _take_lock(path: Path) -> int:
    with explained("open", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise StoreError(
            f"store {path.parent} is in use by another agent (process {owner or 'unknown'}); "
            "stop it or give another store",
            reason="locked",
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise StoreError(f"cannot lock {path}: {error.strerror}", reason="store") from error
    # For people; the lock itself is the flock. A full disk must not keep an agent from its store.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
