"""Assignments: the signed document that says what runs where.

Every device reads the same document and works out its own share (``assigned``, pure), so 5 devices or
50,000 cost the fleet side the same. Desired state names a digest; the version beside it is for people.

Per model: the ``stable`` release for everybody, at most one ``candidate`` for its cohort, held devices that
keep what they have, ``minimum_version`` below which nothing runs, and ``killed``, the switch that makes
every device answer from its rules.
"""

from __future__ import annotations

import enum
import hashlib
from typing import Annotated, Final

import msgspec

from edge_agent.contract import wire
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadAssignments
from edge_agent.contract.manifest import check_name
from edge_agent.contract.version import Version

FORMAT: Final = 1
MAX_BYTES: Final = 4 << 20  # 50,000 explicit device names


class Mode(enum.Enum):
    """What a candidate does on the devices of its cohort."""

    ACTIVE = "active"  # it answers
    SHADOW = "shadow"  # it sees the requests and answers none


class Release(msgspec.Struct, frozen=True):
    """A release by identity: the manifest's digest, and the version for people."""

    version: Version
    digest: Digest


class Cohort(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who gets the candidate: devices by name, and every device whose place is below ``share``.

    A device's place is a number in [0, 1) hashed from ``salt`` and its name: growing ``share`` only ever adds
    devices, and another roll-out (another salt) begins with others.
    """

    devices: tuple[str, ...] = ()
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    salt: str = ""

    def __contains__(self, device: object) -> bool:
        return isinstance(device, str) and (device in self.devices or place(self.salt, device) < self.share)


class Split(msgspec.Struct, frozen=True):
    """How long a candidate answers a share of a device's requests beside the release that answers the rest.

    It goes live when it has answered ``requests``, or after ``seconds``, if it is no worse.
    """

    share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    requests: Annotated[int, msgspec.Meta(ge=1)] = 1000
    seconds: Annotated[float, msgspec.Meta(gt=0)] = 3600.0


class Candidate(msgspec.Struct, frozen=True):
    """The release under roll-out. Agents that do not know ``ab`` do what ``mode`` says."""

    release: Release
    cohort: Cohort
    mode: Mode = Mode.ACTIVE
    rollout: str = ""  # the roll-out's id, for evidence
    ab: Split | msgspec.UnsetType = msgspec.UNSET


class ModelAssignment(msgspec.Struct, frozen=True, omit_defaults=True):
    """What runs where, for one model."""

    stable: Release | None = None
    candidate: Candidate | None = None
    held: tuple[str, ...] = ()
    minimum_version: Version | None = None
    killed: bool = False


class Assignments(msgspec.Struct, frozen=True):
    """``assignments.json``. ``serial`` grows by one with every change."""

    serial: int
    models: dict[str, ModelAssignment] = {}
    format: int = FORMAT


class Share(msgspec.Struct, frozen=True):
    """One device's part of the document, for one model."""

    model: str
    release: Release | None
    mode: Mode = Mode.ACTIVE
    rollout: str = ""
    held: bool = False
    killed: bool = False
    minimum_version: Version | None = None
    ab: Split | None = None

    @property
    def beside(self) -> bool:
        """Whether the release first runs beside another one, and what answers is not replaced yet."""
        return self.mode is Mode.SHADOW or self.ab is not None


def place(salt: str, device: str) -> float:
    """A device's place in [0, 1) in the order of ``salt``: uniform, the same everywhere."""
    digest = hashlib.sha256(f"{salt}\0{device}".encode()).digest()
    # 53 bits are what a float holds exactly: the result stays below 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def assigned(document: Assignments, model: str, device: str) -> Share | None:
    """What ``document`` says ``device`` should run for ``model``; None if it does not speak of the model."""
    entry = document.models.get(model)
    if entry is None:
        return None
    share = Share(
        model,
        entry.stable,
        held=device in entry.held,
        killed=entry.killed,
        minimum_version=entry.minimum_version,
    )
    candidate = entry.candidate
    if candidate is not None and device in candidate.cohort:
        return msgspec.structs.replace(
            share,
            release=candidate.release,
            mode=candidate.mode,
            rollout=candidate.rollout,
            ab=None if candidate.ab is msgspec.UNSET else candidate.ab,
        )
    return share


def parse(data: bytes) -> Assignments:
    """Read ``assignments.json``.

    Raises:
        BadAssignments: unreadable, of an unknown format version, or contradicting itself.
    """
    if len(data) > MAX_BYTES:
        raise BadAssignments(f"assignments: {len(data)} bytes, expected at most {MAX_BYTES}")
    try:
        document = wire.from_json(data, Assignments)
        if document.format != FORMAT:
            raise ValueError(f"format version {document.format}, this program reads {FORMAT}: update it")
        for name, entry in document.models.items():
            check_name(name)
            releases = (entry.stable, entry.candidate.release if entry.candidate else None)
            for release in releases:
                if release and entry.minimum_version and release.version < entry.minimum_version:
                    raise ValueError(
                        f"models.{name}: version {release.version} is below "
                        f"minimum_version {entry.minimum_version}"
                    )
    except ValueError as error:
        raise BadAssignments(f"assignments: {error}") from error
    return document


def encode(document: Assignments) -> bytes:
    """The document's canonical bytes."""
    return wire.to_json(document)
