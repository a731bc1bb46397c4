"""A/B on the device: a candidate answers a share of the requests, the release beside it the rest.

Invariants:

- sticky: a key gets the same release as long as the candidate is the same, over restarts too, and a larger
  share only ever adds keys;
- what the candidate cannot answer is answered by the rules of the release beside it, on the scale of that
  release, and counted as a fault of the candidate;
- a candidate that fails so often in a row that a breaker would open answers nothing more.

The key of a request is what names its rows' source, else its id, else its rows themselves.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from edge_agent.contract.manifest import Manifest, TensorSpec
from edge_agent.serving.tensors import Feeds

Release = TypeVar("Release")


@dataclass(frozen=True, slots=True)
class Served:
    """What a release has answered since it was swapped in.

    Attributes:
        rows: all of them.
        fallback_rows: those answered by the rules, through a fault of the model.
        non_finite_rows: of those, the ones where the model's result was not finite.
        failed_rows: rows that the model decided fail.
        latencies: requests by ``metric_names.LATENCY_BUCKETS``, not cumulated, those beyond it last.
        scores: a sample of the model's scores by doublings of score / threshold.
        late_rows: of ``fallback_rows``, those for which the model's time ran out, or a breaker that opened
            for that was open.
    """

    rows: int
    fallback_rows: int
    non_finite_rows: int = 0
    failed_rows: int = 0
    latencies: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()
    late_rows: int = 0

    def since(self, then: Served) -> Served:
        """What came on top of ``then``, an earlier count of the same release."""
        return Served(
            self.rows - then.rows,
            self.fallback_rows - then.fallback_rows,
            self.non_finite_rows - then.non_finite_rows,
            self.failed_rows - then.failed_rows,
            tuple(now - before for now, before in zip(self.latencies, then.latencies, strict=True)),
            tuple(now - before for now, before in zip(self.scores, then.scores, strict=True)),
            self.late_rows - then.late_rows,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for people."""
        return {
            "requests": sum(self.latencies),
            "rows": self.rows,
            "failed_rows": self.failed_rows,
            "fallback_rows": self.fallback_rows,
            "late_rows": self.late_rows,
            "non_finite_rows": self.non_finite_rows,
        }


@dataclass(frozen=True, slots=True)
class SplitReport:
    """How both did so far, in requests that either could have got."""

    version: str
    share: float
    candidate: Served
    active: Served
    ended: str = ""  # why the candidate answers nothing more; empty: it does

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for people."""
        return {
            "version": self.version,
            "share": self.share,
            "ended": self.ended,
            "candidate": self.candidate.as_dict(),
            "active": self.active.as_dict(),
        }


@dataclass(slots=True, eq=False)
class Split(Generic[Release]):
    """A candidate that answers, and what it came to. Lives on the loop."""

    release: Release
    version: str
    share: float
    salt: bytes  # the candidate's digest: another candidate gets other keys first
    before: Served  # the release beside it, when this began
    latencies: tuple[int, ...]  # the candidate's, then
    kept: Any = None  # what the candidate does without meanwhile
    ended: str = ""
    failures: int = 0  # in a row
    rows: int = field(default=0, init=False)
    failed_rows: int = field(default=0, init=False)
    fallback_rows: int = field(default=0, init=False)
    non_finite_rows: int = field(default=0, init=False)
    late_rows: int = field(default=0, init=False)

    def takes(self, key: str, feeds: Feeds) -> bool:
        """Whether the candidate answers this request."""
        if self.ended:
            return False
        hashed = hashlib.sha256(self.salt)
        if key:
            hashed.update(key.encode())
        else:
            for tensor in feeds.values():
                hashed.update(tensor.data if tensor.flags.c_contiguous else tensor.tobytes())
        # 53 bits are what a float holds exactly: the place stays below 1.
        return (int.from_bytes(hashed.digest()[:8], "big") >> 11) / (1 << 53) < self.share

    def answered(self, rows: int, failed_rows: int) -> None:
        """The candidate answered."""
        self.failures = 0
        self.rows += rows
        self.failed_rows += failed_rows

    def fell_back(self, rows: int, reason: str) -> None:
        """The rules answer for it, through a fault of its own."""
        self.fallback_rows += rows
        if reason == "non_finite":
            self.non_finite_rows += rows
        elif reason == "deadline":
            self.late_rows += rows

    def fault(self, most: int) -> bool:
        """It raised, or was late; returns whether it ended by this one, the last of ``most`` in a row."""
        self.failures += 1
        if self.ended or self.failures < most:
            return False
        self.ended = "breaker_open"
        return True

    def report(self, active: Served, latencies: tuple[int, ...]) -> SplitReport:
        """How both did, given what the active release and the candidate's histogram have come to."""
        since = tuple(now - then for now, then in zip(latencies, self.latencies, strict=True))
        candidate = Served(
            self.rows, self.fallback_rows, self.non_finite_rows, self.failed_rows, since,
            late_rows=self.late_rows,
        )  # fmt: skip
        return SplitReport(self.version, self.share, candidate, active.since(self.before), self.ended)


def why_not_beside(active: Manifest, candidate: Manifest) -> str:
    """Why a candidate cannot answer the requests of a release: another form; empty where it can."""
    for kind, ours, theirs in (
        ("inputs", active.inputs, candidate.inputs),
        ("outputs", active.outputs, candidate.outputs),
    ):
        if [_form(spec) for spec in ours] != [_form(spec) for spec in theirs]:
            return f"its {kind} are not those of {active.version}"
    if (active.decision is None) != (candidate.decision is None):
        return f"one of it and {active.version} decides, the other does not"
    return ""


def _form(spec: TensorSpec) -> tuple[Any, ...]:
    return spec.name, spec.datatype, tuple(spec.shape), spec.features
