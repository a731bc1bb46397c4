"""The manifest: what a bundle is, what it needs, and what came into it.

Invariants of a ``Manifest`` that ``parse`` returned:

- its format version is one this code knows;
- names of model, tensors and members are safe in paths, topics and label values;
- the decision block names an output that exists.

The bundle's identity is the digest of the manifest's bytes as they were read, never of a re-encoding.
It holds no time stamp: the same inputs and versions give the same digest.
"""

from __future__ import annotations

import enum
import re
from typing import Annotated, Final

import msgspec

from edge_agent.contract import wire
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import BadManifest
from edge_agent.contract.version import Version

FORMAT: Final = 1
FILE_NAME: Final = "manifest.json"
MAX_BYTES: Final = 1 << 20  # a manifest of 4,000 named features takes 120 kB
MAX_MEMBERS: Final = 64
MAX_TENSORS: Final = 64

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_MEMBER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class Task(enum.Enum):
    """What the model is for; decides how its output becomes a decision."""

    ANOMALY = "anomaly"
    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    RAW = "raw"


class Datatype(enum.Enum):
    """Tensor element types, by their Open Inference Protocol names."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    FP32 = "FP32"
    FP64 = "FP64"

    __hash__ = object.__hash__  # by identity, as they are equal; Enum's own is Python code at every look-up


class TensorSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One input or output of the model.

    ``shape`` has -1 where a dimension varies; the first dimension is the batch.
    ``features`` and ``units`` name the columns of the last dimension.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    features: tuple[str, ...] | None = None
    units: tuple[str, ...] | None = None


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the output becomes a decision: a score above the threshold is a ``fail``.

    Attributes:
        output: the output tensor that holds one score a row.
        threshold: scores strictly above it are decided ``fail``.
        spread: width of the logistic that turns the distance from the threshold into a confidence,
            in units of the score; measured on held-out scores.
    """

    output: str
    threshold: float
    spread: Annotated[float, msgspec.Meta(gt=0)] = 1.0


class Member(msgspec.Struct, frozen=True):
    """A file of the bundle, addressed by its content."""

    digest: Digest
    size: Annotated[int, msgspec.Meta(ge=0)]  # bytes


class Requirements(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a device must have. Empty ``arch`` means any machine."""

    arch: tuple[str, ...] = ()  # platform.machine(): aarch64, x86_64
    opset: int = 0
    agent: Version | None = None  # the oldest agent that can run it


class Provenance(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where the bundle came from."""

    source_model: Digest | None = None
    calibration_data: Digest | None = None
    command: str = ""
    tools: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """``manifest.json``. Unknown fields are kept out of the way, not refused."""

    name: str
    version: Version
    task: Task
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    members: dict[str, Member]
    format: Annotated[int, msgspec.Meta(ge=1)] = msgspec.field(default=-1)
    decision: Decision | None = None
    precision: str = ""  # "int8", "fp32", ...: what runs, for people
    requires: Requirements = Requirements()
    provenance: Provenance = Provenance()

    @property
    def size(self) -> int:
        """Bytes of all members together."""
        return sum(member.size for member in self.members.values())


def is_plain(name: str) -> bool:
    """Whether ``name`` can be a file of a bundle: no path, no ``..``, nothing a file system chokes on."""
    return _MEMBER.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Return ``name`` if it can be a model's name.

    Raises:
        ValueError: it cannot; says what a name looks like.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"model name {name[:80]!r}: expected 1-64 characters of a-z, 0-9, '.', '_', '-', "
            "starting and ending with a letter or digit"
        )
    return name


def parse(data: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        BadManifest: unreadable, of an unknown format version, or contradicting itself.
    """
    if len(data) > MAX_BYTES:
        raise BadManifest(f"{FILE_NAME}: {len(data)} bytes, expected at most {MAX_BYTES}")
    try:
        manifest = wire.from_json(data, Manifest)
        _check(manifest)
    except ValueError as error:
        raise BadManifest(f"{FILE_NAME}: {error}") from error
    return manifest


def encode(manifest: Manifest) -> bytes:
    """The manifest's canonical bytes.

    Raises:
        BadManifest: it contradicts itself: nothing that we would refuse to read is ever written.
    """
    stamped = msgspec.structs.replace(manifest, format=FORMAT)
    try:
        _check(stamped)
    except ValueError as error:
        raise BadManifest(f"{FILE_NAME}: {error}") from error
    return wire.to_json(stamped)


def _check(manifest: Manifest) -> None:
    if manifest.format != FORMAT:
        raise ValueError(f"format version {manifest.format}, this program reads {FORMAT}: update it")
    check_name(manifest.name)
    if not manifest.members or len(manifest.members) > MAX_MEMBERS:
        raise ValueError(f"{len(manifest.members)} members, expected 1 to {MAX_MEMBERS}")
    for name in manifest.members:
        if not is_plain(name) or name == FILE_NAME:
            raise ValueError(f"member name {name[:80]!r} is not a plain file name")
    for kind, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        if not tensors or len(tensors) > MAX_TENSORS:
            raise ValueError(f"{len(tensors)} {kind}s, expected 1 to {MAX_TENSORS}")
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise ValueError(f"two {kind}s have the same name")
        for tensor in tensors:
            _check_tensor(kind, tensor)
    decision = manifest.decision
    if decision is not None and decision.output not in {tensor.name for tensor in manifest.outputs}:
        raise ValueError(f"decision.output {decision.output!r} is not an output of the model")
    if manifest.task is Task.ANOMALY and decision is None:
        raise ValueError("task anomaly needs a decision block")


def _check_tensor(kind: str, tensor: TensorSpec) -> None:
    if any(dimension < -1 or dimension == 0 for dimension in tensor.shape):
        raise ValueError(f"{kind} {tensor.name!r} has shape {list(tensor.shape)}, expected sizes or -1")
    for label, names in (("features", tensor.features), ("units", tensor.units)):
        if names is not None and (not tensor.shape or len(names) != tensor.shape[-1]):
            width = tensor.shape[-1] if tensor.shape else "no last dimension"
            raise ValueError(
                f"{kind} {tensor.name!r} has {len(names)} {label} for a last dimension of {width}"
            )
