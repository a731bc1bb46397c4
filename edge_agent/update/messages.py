"""What the updater and its worker say to each other: one JSON object a line, one answer a command.

Paths, not contents: manifests and members lie in the staging folder that both know. The first line is
``Setup``. While a command takes long the worker sends ``Progress``; its silence is what times out.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from edge_agent.config import EngineConfig
from edge_agent.contract import wire
from edge_agent.contract.assignments import Release, Share
from edge_agent.errors import EdgeError, StoreError, UpdateRejected
from edge_agent.update.source import DIRECT, Access, SourceFailed

AGENT_PID: Final = "EDGE_AGENT_PID"  # in the worker's environment: the process it must not outlive
MAX_LINE: Final = 1 << 20  # bytes


class Setup(msgspec.Struct, frozen=True, tag=True):
    """Who asks, and where things lie."""

    device: str
    source: str
    root: str
    models: tuple[str, ...]
    tuf: str  # trusted metadata, durable
    partial: str  # half downloads, kept between runs
    scratch: str  # this run's own folder
    timeout: float  # seconds without a byte
    engine: EngineConfig
    access: Access = DIRECT
    blobs: str = ""  # the store's members by digest: what a difference is applied to


class Check(msgspec.Struct, frozen=True, tag=True):
    """Refresh the trusted metadata and say what this device should run."""


class ReadManifest(msgspec.Struct, frozen=True, tag=True):
    """Put the signed manifest of a release into ``folder``."""

    model: str
    release: Release
    folder: str


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Put the members ``names`` of the manifest in ``folder`` beside it."""

    folder: str
    names: tuple[str, ...]
    spare: int  # bytes of the disk that may be used beside the members themselves, for parcels


class Test(msgspec.Struct, frozen=True, tag=True):
    """Run the golden vectors of a bundle folder on this machine."""

    __test__ = False  # not a pytest class

    bundle: str


Command = Check | ReadManifest | Fetch | Test


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Still at work."""

    bytes: int


class Checked(msgspec.Struct, frozen=True, tag=True):
    """What the trusted repository says."""

    shares: dict[str, Share | None]
    serial: int
    expires: float  # seconds since the epoch: when the first of the trusted metadata expires


class Done(msgspec.Struct, frozen=True, tag=True):
    """The command was carried out."""

    bytes: int = 0  # fetched


class SelfTest(msgspec.Struct, frozen=True, tag=True):
    """How the golden vectors went on this machine."""

    passed: bool
    reason: str  # "ok", "selftest", "too_slow", "no_golden"
    message: str
    vectors: int = 0
    worst: float = 0.0  # largest |got - expected|
    median_seconds: float = 0.0  # of one row
    budget_seconds: float = 0.0  # 0: none

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return {field: getattr(self, field) for field in self.__struct_fields__}


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The command was not carried out."""

    kind: str  # "rejected", "source", "store", "bug"
    reason: str
    message: str

    def error(self) -> EdgeError:
        """The exception to raise on the updater's side."""
        if self.kind == "rejected":
            return UpdateRejected(self.message, reason=self.reason)
        if self.kind == "store":
            return StoreError(self.message, reason=self.reason)
        return SourceFailed(self.message, reason=self.reason)


Reply = Progress | Checked | Done | SelfTest | Failed


def encode(message: Setup | Command | Reply) -> bytes:
    """One line."""
    return msgspec.json.encode(message, enc_hook=wire.to_builtins) + b"\n"


def decode_setup(line: bytes) -> Setup:
    """Read the first line.

    Raises:
        ValueError: it is not a ``Setup``.
    """
    return wire.from_json(line, Setup)


def decode_command(line: bytes) -> Command:
    """Read a command.

    Raises:
        ValueError: it is none.
    """
    return wire.from_json(line, Command)  # type: ignore[arg-type]


def decode_reply(line: bytes) -> Reply:
    """Read an answer.

    Raises:
        ValueError: it is none.
    """
    return wire.from_json(line, Reply)  # type: ignore[arg-type]
