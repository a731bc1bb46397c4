"""A fleet folder, which is a git repository: where its parts lie, how it is made and opened.

::

    fleet.yaml devices.yaml       people
    repository/                   the release repository; its blobs/ are not in git
    rollouts/<id>.json            records with their evidence
    keys/{offline,online}/*.pem   never in git
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.contract import wire
from edge_agent.contract.assignments import Release
from edge_agent.contract.version import Version
from fleet import config as config_file
from fleet import inventory, measure, release, status
from fleet.config import FleetConfig
from fleet.errors import FleetConfigError, RolloutError
from fleet.git import Git
from fleet.inventory import Device
from fleet.machine import Phase
from fleet.measure import Source
from fleet.registry import Registry
from fleet.repository import Keys, Repository

_IGNORED: Final = "/keys/\n/repository/blobs/\n/.lock\n.*.new\n.new-*\n"


@dataclass(frozen=True, slots=True)
class Folder:
    """A fleet folder: a git repository."""

    root: Path

    @property
    def config(self) -> Path:
        """fleet.yaml, written by people."""
        return self.root / "fleet.yaml"

    @property
    def devices(self) -> Path:
        """devices.yaml, written by people."""
        return self.root / "devices.yaml"

    @property
    def repository(self) -> Path:
        """The release repository, served to the devices."""
        return self.root / "repository"

    @property
    def rollouts(self) -> Path:
        """Roll-out records with their evidence."""
        return self.root / "rollouts"

    @property
    def keys(self) -> Path:
        """Private keys; ignored by git."""
        return self.root / "keys"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One decision at a time, whoever makes it."""
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True, slots=True)
class Fleet:
    """An opened fleet folder: what every verb works on."""

    folder: Folder
    config: FleetConfig
    repository: Repository
    git: Git

    def devices(self) -> tuple[Device, ...]:
        """The inventory, as it is on disk now.

        Raises:
            FleetConfigError: devices.yaml is wrong.
        """
        return inventory.load(self.folder.devices)

    def source(self) -> Source:
        """Prometheus where the fleet has one, else the devices themselves."""
        if self.config.prometheus is not None:
            return measure.Prometheus(self.config.prometheus)
        return measure.Scraper(self.config.scrape)

    def registry(self) -> Registry | None:
        """Where members are pushed to beside the repository, if anywhere.

        Raises:
            FleetConfigError: what fleet.yaml says about it cannot be used.
        """
        return Registry(self.config.registry) if self.config.registry is not None else None

    def commit(self, subject: str, body: str = "", trailers: Mapping[str, str] | None = None) -> str | None:
        """Commit what the tool owns: metadata, targets, records."""
        return self.git.commit([self.folder.repository, self.folder.rollouts], subject, body, trailers)

    def assign_stable(self, model: str, version: Version, phase: Phase, reason: str) -> Release:
        """Make a published release the stable one for everybody, at once: bootstrap and fleet-wide rollback.

        Raises:
            RolloutError: a roll-out of the model is open.
            RepositoryError: it is not published, or was signed meanwhile.
        """
        with self.folder.locked():
            refuse_open(self, model)
            chosen = self.repository.release(model, version)
            document = self.repository.assignments()
            changed = release.with_stable(document, model, chosen)
            if changed is not document:
                self.repository.assign(changed)
            self.commit(
                f"{model} {version} is the stable release",
                reason,
                {"Model": model, "Phase": phase.value, "Reason": reason},
            )
        return chosen


def refuse_open(fleet: Fleet, model: str) -> None:
    """No two roll-outs of one model at a time.

    Raises:
        RolloutError: there is one.
    """
    for record in status.open_records(fleet.folder.rollouts, model):
        raise RolloutError(
            f"roll-out {record.id} is {record.phase.value}; finish it with edge-fleet rollout run, "
            "or stop it with edge-fleet rollout abort"
        )


def find(path: Path) -> Folder:
    """The fleet folder at ``path``.

    Raises:
        FleetConfigError: there is none.
    """
    folder = Folder(path.resolve())
    if not folder.config.is_file():
        raise FleetConfigError(
            f"{path} is no fleet (no fleet.yaml); give one with -C DIR, or make one: edge-fleet init DIR"
        )
    return folder


def opened(path: Path) -> Fleet:
    """The fleet folder at ``path`` with its parts.

    Raises:
        FleetConfigError: there is none, or fleet.yaml is wrong.
    """
    folder = find(path)
    config = config_file.load(folder.config)
    repository = Repository(folder.repository, Keys(folder.keys), config.expiry)
    return Fleet(folder, config, repository, Git(folder.root))


def create(path: Path, name: str = "") -> Fleet:
    """A new fleet folder: git repository, templates, keys, first metadata, first commit.

    Raises:
        FleetConfigError: there is a fleet, or another thing with its file names.
        GitError: git is missing or refused.
    """
    folder = Folder(path.resolve())
    for taken in (folder.config, folder.devices, folder.repository, folder.keys):
        if taken.exists():
            raise FleetConfigError(f"{taken} exists already; edge-fleet init wants a folder without a fleet")
    folder.root.mkdir(parents=True, exist_ok=True)
    git = Git.init(folder.root)
    ignored = folder.root / ".gitignore"
    before = ignored.read_text() if ignored.exists() else ""
    ignored.write_text(before + _IGNORED)
    keys = Keys(folder.keys)
    Repository.create(folder.repository, keys)
    folder.rollouts.mkdir(exist_ok=True)
    folder.devices.write_text(inventory.TEMPLATE)
    # Last: a folder with fleet.yaml is a whole fleet.
    folder.config.write_text(
        config_file.TEMPLATE.format(name=wire.to_json(name or folder.root.name).decode().strip())
    )
    git.commit(
        [ignored, folder.config, folder.devices, folder.repository],
        "A fleet: keys made, first metadata signed",
        trailers={"Phase": "Pending", "Reason": "init"},
    )
    return opened(folder.root)
