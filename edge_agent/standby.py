"""An agent whose store another one writes: it serves what is installed, and waits for its turn.

Invariants:

- nothing in here writes; ``Store.take`` alone changes that, and only with the lock;
- what answers is what ``current`` names, within a second of the writer's switch;
- a release that cannot be loaded changes nothing, the one before goes on answering; it is tried again later,
  because the writer may repair it, and another one at once;
- the kill switch and the refusals that the writer has on record hold here, too.

So a pod's rolling update has no gap: the new agent answers before the old one ends, and follows the
repository once the old one is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import ContractError
from edge_agent.errors import EdgeError, StoreError
from edge_agent.serving.service import Service
from edge_agent.store.store import Store

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0  # between two looks at the lock and at what is current
RETRY_SECONDS: Final = 60.0  # between two tries of a release that could not be loaded


class Standby:
    """Keeps serving in step with a store. Lives on one event loop.

    Args:
        store: what is installed.
        service: who answers.
        take_up: serves a model for the first time, by its rules if need be.
    """

    def __init__(self, store: Store, service: Service, take_up: Callable[[str], Awaitable[None]]) -> None:
        self._store = store
        self._service = service
        self._take_up = take_up
        self._failed: dict[str, tuple[Digest, float]] = {}  # what could not be loaded, and when

    async def wait(self) -> None:
        """Follow whoever writes the store, until the store is ours."""
        while not await asyncio.to_thread(self._taken):
            await self.follow()
            await asyncio.sleep(LOOK_SECONDS)

    async def follow(self) -> None:
        """Serve what ``current`` names now, of every model."""
        try:
            models = await asyncio.to_thread(self._store.models)
        except StoreError as error:
            log.warning("%s", error)
            return
        for model in models:
            await self._follow(model)

    async def _follow(self, model: str) -> None:
        digest = await asyncio.to_thread(self._store.pointer, model)
        status = next((status for status in self._service.statuses() if status.name == model), None)
        record = await asyncio.to_thread(self._store.record, model)
        rejection = record.rejection(digest) if digest is not None else None
        if rejection is not None:  # it failed with nothing to go back to: it is not loaded, its rules answer
            if status is None or status.state != "rejected":
                self._service.degrade(model, "rejected", rejection.message)
            if status is None or status.digest is None:
                await self._take_up(model)
        elif status is None:
            await self._take_up(model)
        elif digest is not None and not self._is_served(model, digest, status.digest, status.state):
            await self._load(model, digest)
        self._service.set_killed(model, record.killed)

    def _is_served(self, model: str, digest: Digest, served: str | None, state: str) -> bool:
        """Whether nothing is to be done now: it is there, was sent away on purpose, or failed just now."""
        if digest == served and state in ("ready", "loading", "unloaded"):
            return True
        failed, when = self._failed.get(model, (None, 0.0))
        return digest == failed and time.monotonic() - when < RETRY_SECONDS

    async def _load(self, model: str, digest: Digest) -> None:
        try:
            bundle = await asyncio.to_thread(self._store.current, model)
            if bundle is not None:
                await self._service.load(model, bundle)
        except (EdgeError, ContractError) as error:
            # The writer may have moved on between the two looks and swept this away: the next look tells.
            self._failed[model] = (digest, time.monotonic())
            log.warning("model %s: %s is current and cannot be loaded: %s", model, digest.short, error)
        else:
            log.info("model %s: %s is current, and answers", model, digest.short)

    def _taken(self) -> bool:
        try:
            self._store.take()
        except StoreError:
            return False
        return True
