"""The update record: what the update machine must still know after a power cut.

One JSON file per model, replaced atomically *before* the step it announces. A rejected digest stays here
across restarts, with its reason. The words live beside the format; which of them may follow which is
``update.machine``'s business.

A medium may rot. The file holds its own checksum, so that a changed letter is a damaged file and not another
digest; and what nothing else remembers (``lasting``: refusals, the kill switch, the floor) is in a second
file that is written only when it changes.
"""

from __future__ import annotations

import enum
import hashlib
from typing import Final

import msgspec

from edge_agent.contract import wire
from edge_agent.contract.assignments import Release
from edge_agent.contract.digest import Digest
from edge_agent.contract.version import Version

FORMAT: Final = 1
MAX_BYTES: Final = 1 << 20
MAX_REJECTED: Final = 64  # the oldest are forgotten; a roll-out rejects a few, not hundreds


class State(enum.Enum):
    """Where an update stands."""

    IDLE = "idle"
    CHECKING = "checking"
    HELD = "held"
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"
    STAGED = "staged"
    TESTING = "testing"
    SHADOWING = "shadowing"
    ACTIVATING = "activating"
    PROBATION = "probation"
    COMMITTED = "committed"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"


class Result(enum.Enum):
    """How an update ended. Only ``failed_unable_to_rollback`` is a failed update; see docs/operations.md."""

    SUCCEEDED = "succeeded"
    ALREADY_INSTALLED = "already_installed"
    NO_ARTIFACT = "no_artifact"
    REJECTED = "rejected"
    FAILED_NO_STATE_CHANGE = "failed_no_state_change"
    FAILED_ROLLBACK_COMPLETE = "failed_rollback_complete"
    FAILED_UNABLE_TO_ROLLBACK = "failed_unable_to_rollback"
    ABORTED = "aborted"
    TIMED_OUT = "timed_out"


class Rejected(msgspec.Struct, frozen=True):
    """A release this device will not install again by itself."""

    digest: Digest
    version: Version
    reason: str  # one word
    message: str  # one sentence
    at: float  # seconds since the epoch, by the device's clock


class Finished(msgspec.Struct, frozen=True):
    """How the last update ended."""

    result: Result
    reason: str
    message: str
    version: str
    digest: str
    at: float  # seconds since the epoch, by the device's clock


class UpdateRecord(msgspec.Struct, frozen=True):
    """``update.json``."""

    state: State = State.IDLE
    candidate: Release | None = None  # the release being installed or on probation
    previous: Digest | None = None  # what answered when the candidate was activated
    starts: int = 0  # process starts that the candidate has seen on probation, the first included
    interrupted: int = 0  # times the process died while it was installing the candidate
    started: float = 0.0  # seconds since the epoch: when this update began
    rejected: tuple[Rejected, ...] = ()
    last: Finished | None = None
    killed: bool = False  # the signed kill switch: it holds while the device is offline, too
    minimum_version: Version | None = None  # the signed floor: no roll-back goes below it
    rollout: str = ""  # the roll-out that brought the candidate, for evidence
    checksum: str = ""  # in the file only: SHA-256 of the document with this field empty
    format: int = FORMAT

    @property
    def last_result(self) -> str | None:
        """The word for how the last update ended."""
        return self.last.result.value if self.last else None

    @property
    def last_reason(self) -> str | None:
        """Why it ended so, one word."""
        return self.last.reason if self.last else None

    def lasting(self) -> UpdateRecord:
        """What must not be forgotten with the rest: what was refused, the kill switch, the floor."""
        return UpdateRecord(rejected=self.rejected, killed=self.killed, minimum_version=self.minimum_version)

    def rejection(self, digest: Digest) -> Rejected | None:
        """Why this device refuses ``digest``; None if it does not."""
        return next((entry for entry in self.rejected if entry.digest == digest), None)

    def rejecting(self, entry: Rejected) -> UpdateRecord:
        """The record with one more refused release."""
        others = tuple(old for old in self.rejected if old.digest != entry.digest)
        return msgspec.structs.replace(self, rejected=(*others, entry)[-MAX_REJECTED:])

    def forgiving(self, digest: Digest) -> UpdateRecord:
        """The record without the refusal of ``digest``: an operator asked for it by hand."""
        return msgspec.structs.replace(
            self, rejected=tuple(entry for entry in self.rejected if entry.digest != digest)
        )


def parse(data: bytes) -> UpdateRecord:
    """Read ``update.json``.

    Raises:
        ValueError: unreadable, altered, or written by an agent with another format.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes, expected at most {MAX_BYTES}")
    record = wire.from_json(data, UpdateRecord)
    if record.format != FORMAT:
        raise ValueError(f"format version {record.format}, this program reads {FORMAT}")
    # Without one it was written before there was any.
    plain = msgspec.structs.replace(record, checksum="")
    if record.checksum and record.checksum != _checksum(plain):
        raise ValueError("its checksum is wrong, the medium has altered it")
    return plain


def encode(record: UpdateRecord) -> bytes:
    """The bytes of ``update.json``."""
    return wire.to_json(msgspec.structs.replace(record, checksum=_checksum(record)))


def _checksum(record: UpdateRecord) -> str:
    return hashlib.sha256(wire.to_json(record)).hexdigest()
