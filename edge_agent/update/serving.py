"""What the updater needs of whoever answers: the agent's inference service, or a test's stand-in for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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

    def set_killed(self, name: str, killed: bool) -> None:
        """The kill switch. May come before the model is known."""
        ...

    def statuses(self) -> Sequence[ServingStatus]:
        """Every model."""
        ...
