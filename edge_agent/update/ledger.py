"""The ledger: what is known of every model's update, on disk before the step it announces.

Invariants:

- ``step`` has happened on disk, or not at all: a disk that refuses leaves state and record as they were;
- a result is counted and logged once, however often a poll finds the same again;
- what is shown in the metrics is the state that holds.

Beside the record (``store.state``) it keeps what only this process needs to know. Who moves the machine on,
and why, is ``updater.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from edge_agent.contract import manifest as manifests
from edge_agent.contract.assignments import Release, Split
from edge_agent.contract.bundle import Bundle
from edge_agent.contract.errors import ContractError
from edge_agent.errors import BadRules, EngineError, SourceError, StoreError, UpdateRejected
from edge_agent.store.state import Finished, Rejected, UpdateRecord
from edge_agent.store.store import Store
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.update.child import Aborted, TimedOut
from edge_agent.update.machine import Event, Result, State, advance
from edge_agent.update.messages import SelfTest
from edge_agent.update.policy import Answered
from edge_agent.update.source import SourceFailed

logger = logging.getLogger(__name__)

_GOOD: Final = frozenset({Result.SUCCEEDED, Result.ALREADY_INSTALLED, Result.NO_ARTIFACT})


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOutcome:
    """What one run, install or roll-back came to.

    Attributes:
        model: the model; None where it concerns the repository as a whole.
        result: how it ended; None while it goes on (probation, held) or where there was nothing to look at.
        state: where the model's update machine stands.
        reason: one word.
        message: one sentence.
        version: the release concerned.
        digest: its identity.
        models: after ``run_once``, the outcome of every model; the fields above are the weightiest of them.
    """

    state: State
    model: str | None = None
    result: Result | None = None
    reason: str = ""
    message: str = ""
    version: str | None = None
    digest: str | None = None
    models: tuple[UpdateOutcome, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return {
            "model": self.model,
            "result": self.result.value if self.result else self.state.value,
            "state": self.state.value,
            "reason": self.reason,
            "message": self.message,
            "version": self.version,
            "digest": self.digest,
        }


@dataclass(frozen=True, slots=True)
class InShadow:
    """An admitted release that sees requests and answers a share of them (``ab``) or none, ready for more."""

    bundle: Bundle
    prepared: Any  # the serving side's
    since: float  # monotonic
    ab: Split | None = None

    @property
    def doing(self) -> str:
        """What it does, for people."""
        if self.ab is None:
            return "it sees requests without answering"
        return f"it answers {self.ab.share:.3g} of the requests"


@dataclass(frozen=True, slots=True)
class Proven:
    """A release whose every byte was right, and what its files looked like then."""

    bundle: Bundle
    files: tuple[Any, ...]  # what changes when one is replaced, truncated or written to: a hint to hash again

    @classmethod
    def of(cls, bundle: Bundle) -> Proven:
        """Of a release as its files are now.

        Raises:
            OSError: one is missing.
        """
        files = tuple(
            (name, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            for name in (manifests.FILE_NAME, *sorted(bundle.manifest.members))
            for stat in [(bundle.path / name).stat()]
        )
        return cls(bundle, files)


@dataclass(slots=True)
class Tracked:
    """What is known of one model in this process, beside its record."""

    record: UpdateRecord
    saved: UpdateRecord
    refused: bool = False  # the disk would not have `record`; it is tried again, and said once
    # Monotonic: when the release on probation went live, this process began, or another look at it ...
    active_since: float = 0.0
    look: int = 1  # ... of this number, from 1, ...
    answered_before: Answered | None = None  # ... before which it had answered this
    proven: Proven | None = None  # the release that was last hashed and right
    damaged: bool = False
    reloaded: float = float("-inf")  # monotonic: last try to load again
    self_test: SelfTest | None = None
    shadow: InShadow | None = None  # what sees requests without answering
    counted: tuple[Any, ...] = ()  # the last result that was counted: once per change, not per poll

    def begin(self, now: float, answered: Answered | None = None, look: int = 1) -> None:
        """Probation is looked at from now on."""
        self.active_since, self.answered_before, self.look = now, answered, look

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``edge-agent status --json``."""
        record = self.record
        return {
            "state": record.state.value,
            "candidate": {"version": str(record.candidate.version), "digest": str(record.candidate.digest)}
            if record.candidate
            else None,
            "rollout": record.rollout,
            "killed": record.killed,
            "minimum_version": str(record.minimum_version) if record.minimum_version else None,
            "last_result": record.last_result,
            "last_reason": record.last_reason,
            "last_message": record.last.message if record.last else None,
            "rejected": [
                {"version": str(r.version), "digest": str(r.digest), "reason": r.reason, "message": r.message}
                for r in record.rejected
            ],
            "self_test": self.self_test.as_dict() if self.self_test else None,
        }


class Ledger:
    """Every model's update, as far as it is known here."""

    def __init__(
        self,
        store: Store,
        metrics: AgentMetrics | None,
        now: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self.models: dict[str, Tracked] = {}
        self._store = store
        self._metrics = metrics
        self._now = now
        self._monotonic = monotonic

    async def track(self, model: str) -> Tracked:
        """What is known of a model; read from the store the first time."""
        if model not in self.models:
            record = await asyncio.to_thread(self._store.record, model)
            self.models[model] = Tracked(record, record, active_since=self._monotonic())
            if self._metrics:
                self._metrics.update_results(model, [result.value for result in Result])
            self.show(model)
        return self.models[model]

    def move(self, model: str, event: Event, **changes: Any) -> None:
        """Move the machine on in memory; ``changes`` are fields of the record."""
        tracked = self.models[model]
        before = tracked.record.state
        state = advance(before, event)
        tracked.record = msgspec.structs.replace(tracked.record, state=state, **changes)
        logger.debug("model %s: %s -> %s (%s)", model, before.value, state.value, event.value)
        self.show(model)

    async def step(self, model: str, event: Event, **changes: Any) -> None:
        """Announce the next step on disk; without that it does not happen.

        Raises:
            StoreError: the disk refused; the state is as it was.
        """
        tracked = self.models[model]
        before = tracked.record
        self.move(model, event, **changes)
        try:
            await self.save(model)
        except StoreError:
            tracked.record = before
            self.show(model)
            raise

    async def save(self, model: str, *, tolerant: bool = False) -> None:
        """Put the record on disk if it differs from what is there.

        Raises:
            StoreError: the disk refused, and ``tolerant`` was not asked for.
        """
        tracked = self.models[model]
        if tracked.record == tracked.saved:
            return
        try:
            await asyncio.to_thread(self._store.save, model, tracked.record)
        except StoreError as error:
            if not tolerant:
                raise
            if not tracked.refused:
                logger.error("model %s: the update state is not on disk: %s", model, error)
            tracked.refused = True
        else:
            tracked.saved, tracked.refused = tracked.record, False

    async def finish(
        self, model: str, event: Event, result: Result, reason: str, message: str
    ) -> UpdateOutcome:
        """The update is over: say so on disk, in the metrics and in the log, and clean up."""
        release = self.models[model].record.candidate
        self.move(model, event)
        self.record_end(model, result, reason, message, release)
        await self.save(model, tolerant=True)
        with contextlib.suppress(StoreError):  # garbage that stays is only garbage
            await asyncio.to_thread(self._store.collect_garbage)
            if result in (Result.SUCCEEDED, Result.REJECTED):  # nobody will resume them
                await asyncio.to_thread(self._store.forget_partial)
        return self.outcome(model, result, reason, message, release)

    def record_end(
        self, model: str, result: Result, reason: str, message: str, release: Release | None
    ) -> None:
        """Note in memory how the update ended, and count it."""
        tracked = self.models[model]
        version, digest = (release.version, release.digest) if release else ("", "")
        finished = Finished(result, reason, message, str(version), str(digest), self._now())
        tracked.record = msgspec.structs.replace(tracked.record, last=finished)
        self.count(model, result, reason, release)

    def reject(self, model: str, release: Release, reason: str, message: str) -> None:
        """Refuse a release here from now on; in memory until the next ``save``."""
        tracked = self.models[model]
        tracked.record = tracked.record.rejecting(
            Rejected(release.digest, release.version, reason, message, self._now())
        )

    def count(self, model: str, result: Result, reason: str, release: Release | None) -> None:
        """Count and log a result once: a poll that finds the same again is no new update."""
        tracked = self.models[model]
        key = (result, reason, release)
        same_release = len(tracked.counted) == 3 and tracked.counted[2] == release
        quiet = result is Result.ALREADY_INSTALLED and same_release
        if key == tracked.counted or quiet:
            return
        tracked.counted = key
        level = logging.INFO if result in _GOOD else logging.WARNING
        version = release.version if release else ""
        logger.log(level, "model %s: update %s (%s) %s", model, result.value, reason, version)
        if self._metrics:
            self._metrics.update_result(model, result.value)

    def show(self, model: str) -> None:
        """Show the state in the metrics."""
        if self._metrics:
            self._metrics.update_state(
                model, self.models[model].record.state.value, [state.value for state in State]
            )

    def outcome(
        self, model: str, result: Result | None, reason: str, message: str, release: Release | None
    ) -> UpdateOutcome:
        """What to tell whoever asked, as things stand."""
        return UpdateOutcome(
            model=model, result=result, state=self.models[model].record.state, reason=reason,
            message=message, version=release.version if release else None,
            digest=release.digest if release else None,
        )  # fmt: skip


def result_of(error: Exception) -> tuple[Result, str]:
    """The one table from what went wrong to result and reason."""
    match error:
        case UpdateRejected():
            return Result.REJECTED, error.reason
        case EngineError():
            return Result.REJECTED, "engine"
        case BadRules():
            return Result.REJECTED, "rules"
        case ContractError():
            return Result.REJECTED, "bad_bundle"
        case TimedOut():
            return Result.TIMED_OUT, "timed_out"
        case Aborted():
            return Result.ABORTED, "operator"
        case StoreError() | SourceFailed():
            return Result.FAILED_NO_STATE_CHANGE, error.reason
        case SourceError():
            return Result.FAILED_NO_STATE_CHANGE, "unreachable"
        case OSError():
            return Result.FAILED_NO_STATE_CHANGE, "os"
        case _:
            return Result.FAILED_NO_STATE_CHANGE, "bug"
