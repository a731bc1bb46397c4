"""Upkeep: what is installed stays what was verified, on the disk and in memory.

A release whose files changed is hashed again and, if it is damaged, said to be so: whoever follows the
repository fetches it again. One that is intact and lost in memory is loaded again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from edge_agent.contract.errors import ContractError
from edge_agent.errors import EdgeError
from edge_agent.store.store import Store
from edge_agent.update.ledger import Ledger, Proven
from edge_agent.update.machine import State
from edge_agent.update.roll_back import RollBack
from edge_agent.update.serving import Serving, status_of

logger = logging.getLogger(__name__)

_RELOAD_SECONDS: Final = 60.0  # between two tries to load again what is intact and does not run


class Upkeep:
    """Looks after the current release of every model."""

    def __init__(
        self,
        store: Store,
        serving: Serving | None,
        ledger: Ledger,
        back: RollBack,
        monotonic: Callable[[], float],
    ) -> None:
        self._store = store
        self._serving = serving
        self._ledger = ledger
        self._back = back
        self._monotonic = monotonic

    async def is_any_damaged(self) -> bool:
        """Whether the files of a current release changed on disk, or serving has lost its model."""
        damaged = False
        for model in await asyncio.to_thread(self._store.models):
            await self._ledger.track(model)
            if self._store.pointer(model) is None:
                continue
            known = self._ledger.models[model].damaged
            if await self.is_intact(model):
                await self._reload(model)
            elif not known:
                damaged = True  # once; where the repository cannot repair it, asking again would not help
        return damaged

    async def is_intact(self, model: str) -> bool:
        """Whether every byte of the current release is right; hashes only where a file has changed."""
        tracked = self._ledger.models[model]

        def look() -> Proven | None:
            proven = tracked.proven
            try:
                if proven is not None and self._is_as_it_was(model, proven):
                    return proven
                bundle = self._store.current(model)
                if bundle is None:
                    return None
                found = Proven.of(bundle)
                bundle.verify()
            except (ContractError, OSError) as error:
                if not tracked.damaged:
                    logger.warning("model %s: the current release is damaged on disk: %s", model, error)
                return None
            return found

        tracked.proven = await asyncio.to_thread(look)
        tracked.damaged = tracked.proven is None and self._store.pointer(model) is not None
        return tracked.proven is not None

    def _is_as_it_was(self, model: str, proven: Proven) -> bool:
        """Whether the same release is current and no file of it has changed; nothing is read or parsed."""
        return self._store.pointer(model) == proven.bundle.digest and Proven.of(proven.bundle) == proven

    async def _reload(self, model: str) -> None:
        """Load an intact release that serving does not run: what broke it in memory may have passed."""
        tracked = self._ledger.models[model]
        status = status_of(self._serving, model)
        if status is None or tracked.record.state in (State.PROBATION, State.ROLLING_BACK):
            return
        if status.state == "rejected":
            return
        right = status.state == "ready" and status.digest == self._store.pointer(model)
        if right or status.state in ("loading", "unloaded"):
            return
        if self._monotonic() - tracked.reloaded < _RELOAD_SECONDS:
            return
        tracked.reloaded = self._monotonic()
        try:
            bundle = await asyncio.to_thread(self._store.current, model)
            await self._back.swap_to(bundle)
        except (EdgeError, ContractError) as error:
            logger.warning("model %s: it is intact on disk and cannot be loaded: %s", model, error)
        else:
            logger.info("model %s: loaded again", model)
