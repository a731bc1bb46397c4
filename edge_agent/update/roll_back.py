"""Going back: to the release before, or, where there is none, to the rules.

Invariants:

- the old release answers before its pointer moves: a disk that refuses does not keep a bad model in service;
- going back is idempotent, and repeated until the disk lets it happen;
- what was rejected here is nothing to go back to, and answers nothing more: its rules do.

When to go back is ``policy.py``'s and the updater's to say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from edge_agent.contract.bundle import Bundle
from edge_agent.contract.errors import ContractError
from edge_agent.errors import EdgeError, StoreError
from edge_agent.store.state import Rejected, UpdateRecord
from edge_agent.store.store import Store
from edge_agent.update.ledger import Ledger, UpdateOutcome
from edge_agent.update.machine import Event, Result
from edge_agent.update.policy import check_floor
from edge_agent.update.serving import Serving, status_of

logger = logging.getLogger(__name__)

_NO_WAY_BACK: Final = ("no_previous", "corrupt_previous")
_RESULT_OF_TAKING_BACK: Final = {
    "operator": Result.SUCCEEDED,
    "aborted": Result.ABORTED,
    "superseded": Result.ABORTED,
}


class RollBack:
    """The way back of every model.

    Args:
        store: what there is to go back to.
        serving: who answers; None where no agent runs.
        ledger: where it is written down.
        now: the wall clock, seconds since the epoch.
    """

    def __init__(
        self, store: Store, serving: Serving | None, ledger: Ledger, now: Callable[[], float]
    ) -> None:
        self._store = store
        self._serving = serving
        self._ledger = ledger
        self._now = now

    async def take_back(
        self, model: str, event: Event, reason: str, message: str, *, reject: bool = True
    ) -> UpdateOutcome:
        """Go back to the release before, and refuse this one from now on if it is to blame."""
        tracked = self._ledger.models[model]
        release = tracked.record.candidate
        if release is not None and reject:
            logger.warning("model %s: %s is taken back: %s", model, release.version, message)
            entry = Rejected(release.digest, release.version, reason, message, self._now())
            tracked.record = tracked.record.rejecting(entry)
        self._ledger.move(model, event)
        # A disk that refuses does not keep a bad model in service.
        await self._ledger.save(model, tolerant=True)
        return await self.go_back(model, reason, message)

    async def go_back(
        self, model: str, reason: str = "aborted", message: str = "superseded"
    ) -> UpdateOutcome:
        """Carry out ``rolling_back``: idempotent, repeated until the disk lets it happen.

        Where there is no way back, a release that failed answers nothing more: its rules do.
        """
        record = self._ledger.models[model].record
        release = record.candidate
        rejection = record.rejection(release.digest) if release else None
        if rejection is not None:  # whatever was said then, also before a restart
            reason, message = rejection.reason, rejection.message
        result = _RESULT_OF_TAKING_BACK.get(reason, Result.FAILED_ROLLBACK_COMPLETE)
        already = release is not None and self._store.pointer(model) != release.digest
        try:
            if not already:
                previous = await asyncio.to_thread(self.way_back, model, record)
                await self.swap_to(previous)
                await asyncio.to_thread(self._store.roll_back, model)
            else:
                await self.swap_to(await asyncio.to_thread(self._store.current, model))
        except (EdgeError, ContractError) as error:
            why = getattr(error, "reason", "corrupt_previous")
            text = f"{message}; and there is no way back: {error}"
            if isinstance(error, StoreError) and why not in _NO_WAY_BACK:
                # The old release answers already; its pointer is tried again with the next look.
                self._ledger.count(model, Result.FAILED_UNABLE_TO_ROLLBACK, why, release)
                return self._ledger.outcome(model, Result.FAILED_UNABLE_TO_ROLLBACK, why, text, release)
            self.withdraw(model)
            # As before it came: rules answer, and nothing was lost.
            if why == "no_previous" and (rejection is not None or reason == "corrupt"):
                text = f"{message}; no release was before it, so its rules answer"
                return await self._ledger.finish(model, Event.ROLLED_BACK, result, reason, text)
            return await self._ledger.finish(model, Event.FAIL, Result.FAILED_UNABLE_TO_ROLLBACK, why, text)
        return await self._ledger.finish(model, Event.ROLLED_BACK, result, reason, message)

    def way_back(self, model: str, record: UpdateRecord) -> Bundle:
        """The release to go back to.

        Raises:
            StoreError: there is none, or it was rejected here itself (``no_previous``), or it is damaged
                (``corrupt_previous``).
            UpdateRejected: it is below the signed floor.
        """
        previous = self._store.intact_previous(model)
        version = previous.manifest.version
        if (rejection := record.rejection(previous.digest)) is not None:
            raise StoreError(
                f"model {model}: the previous release {version} was rejected here ({rejection.reason}); "
                "install another one",
                reason="no_previous",
            )
        check_floor(version, record.minimum_version)
        return previous

    def withdraw(self, model: str) -> None:
        """Let the rules answer where what is current was rejected here; also before serving has begun."""
        current = self._store.pointer(model)
        rejection = self._ledger.models[model].record.rejection(current) if current else None
        if rejection is not None and self._serving is not None:
            self._serving.degrade(model, "rejected", rejection.message)

    async def swap_to(self, bundle: Bundle | None) -> None:
        """Let a release answer, unless it does already, or serving has not begun.

        Raises:
            EdgeError, ContractError: it cannot be loaded.
        """
        if bundle is None or self._serving is None:
            return
        status = status_of(self._serving, bundle.name)
        if status is None or (status.state == "ready" and status.digest == bundle.digest):
            return
        self._serving.swap(await self._serving.prepare(bundle))
