"""What the updater needs of whoever answers: the agent's inference service, or a test's stand-in for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from edge_agent.contract.bundle import Bundle


class ServedRows(Protocol):
    """What a release has answered since it was swapped in."""

    @property
    def rows(self) -> int:
        """Rows answered."""
        ...

    @property
    def fallback_rows(self) -> int:
        """Of those, the ones the rules answered through a fault of the model."""
        ...

    @property
    def non_finite_rows(self) -> int:
        """Of those again, the ones where its result was not finite."""
        ...

    @property
    def failed_rows(self) -> int:
        """Rows that the model decided fail."""
        ...

    @property
    def latencies(self) -> Sequence[int]:
        """Requests by ``metric_names.LATENCY_BUCKETS``, not cumulated, those beyond it last."""
        ...

    @property
    def scores(self) -> Sequence[int]:
        """A sample of scores, by whole doublings of score / threshold."""
        ...

    @property
    def late_rows(self) -> int:
        """Of ``fallback_rows``, the ones that the model had no time left for."""
        ...


class SeenInShadow(Protocol):
    """What a shadow saw, and how it did. Durations are medians of a request, in seconds."""

    @property
    def requests(self) -> int:
        """Requests compared."""
        ...

    @property
    def rows(self) -> int:
        """Their rows."""
        ...

    @property
    def disagreeing_rows(self) -> int:
        """Rows decided otherwise than by the release that answered, or not decided at all."""
        ...

    @property
    def seconds(self) -> float:
        """Of the shadow."""
        ...

    @property
    def active_seconds(self) -> float:
        """Of the release that answered."""
        ...


class SeenInSplit(Protocol):
    """What a candidate answered, and the release beside it meanwhile."""

    @property
    def candidate(self) -> ServedRows:
        """By the candidate."""
        ...

    @property
    def active(self) -> ServedRows:
        """By the release beside it."""
        ...

    @property
    def ended(self) -> str:
        """Why the candidate answers nothing more; empty: it does."""
        ...


class ServingStatus(Protocol):
    """What one model is doing."""

    @property
    def name(self) -> str:
        """The model."""
        ...

    @property
    def digest(self) -> str | None:
        """The release that is served."""
        ...

    @property
    def state(self) -> str:
        """One of ``metric_names.MODEL_STATES``."""
        ...


class Serving(Protocol):
    """What the updater needs of the inference service."""

    async def prepare(self, bundle: Bundle) -> Any:
        """Load and warm a release beside the one that answers."""
        ...

    def swap(self, prepared: Any) -> None:
        """Let it answer."""
        ...

    def served(self, name: str) -> ServedRows:
        """What it has answered since."""
        ...

    def served_before(self, name: str) -> ServedRows | None:
        """What the release before it had answered when it was replaced; None if nobody knows."""
        ...

    def shadow(self, prepared: Any, share: float) -> None:
        """Let it see a share of the requests beside the one that answers."""
        ...

    def shadow_report(self, name: str) -> SeenInShadow:
        """How it does."""
        ...

    async def end_shadow(self, name: str) -> None:
        """Let it see nothing more; it may still be swapped in."""
        ...

    def split(self, prepared: Any, share: float) -> None:
        """Let it answer a sticky share of the requests beside the one that answers the rest."""
        ...

    def split_report(self, name: str) -> SeenInSplit | None:
        """How both do; None where there is none."""
        ...

    def end_split(self, name: str) -> object:
        """Let it answer nothing more; it may still be swapped in."""
        ...

    def forget(self, prepared: Any) -> None:
        """Free what was prepared, and runs beside nothing any more, and will not be swapped in."""
        ...

    def degrade(self, name: str, state: Literal["rejected"], reason: str) -> None:
        """Let the rules answer until a release is swapped in. May come before the model is known."""
        ...

    def set_killed(self, name: str, killed: bool) -> None:
        """The kill switch. May come before the model is known."""
        ...

    def statuses(self) -> Sequence[ServingStatus]:
        """Every model."""
        ...


def status_of(serving: Serving | None, name: str) -> ServingStatus | None:
    """What a model is doing; None before the agent has taken it up: then its pointer alone decides."""
    if serving is None:
        return None
    return next((status for status in serving.statuses() if status.name == name), None)
