"""The updater: follows a release repository, and takes a release live only after it proved itself here.

Invariants:

- the state is on disk before the step it announces, so a power cut in any step resumes (``machine.RESUME``);
- until ``activating`` the release that answers is not touched; after it, the one before stays on disk until
  the next update, and answers again by itself if the new one fails on probation;
- a release that failed here by being run stays rejected, across restarts, until an operator installs it by
  hand;
- nothing that goes wrong in here reaches serving: errors are results, with a reason, counted and logged;
- nothing here blocks the event loop: hashing, fsync and the network run in threads or in the worker process.

``run_once`` is the story: watch, look, check, and for each model decide (``policy.py``) and update. Going
back is in ``roll_back.py``, what runs beside what answers in ``beside.py``, what keeps the installed release
right in ``upkeep.py``, the worker in ``workshop.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import platform
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_agent import __version__
from edge_agent.config import EngineConfig, UpdatesConfig
from edge_agent.contract.assignments import Release, Share
from edge_agent.contract.bundle import Bundle, open_bundle
from edge_agent.contract.digest import Digest
from edge_agent.contract.errors import ContractError
from edge_agent.contract.manifest import Manifest
from edge_agent.contract.version import Version
from edge_agent.errors import (
    EdgeError,
    InvalidInput,
    StoreError,
    UnknownModel,
    UpdateRejected,
)
from edge_agent.store.state import UpdateRecord
from edge_agent.store.store import Store
from edge_agent.telemetry.metrics import AgentMetrics
from edge_agent.update import polls
from edge_agent.update.beside import Beside
from edge_agent.update.child import Hands
from edge_agent.update.holds import NOT_HELD, Hold, Holds
from edge_agent.update.ledger import Ledger, Proven, UpdateOutcome, result_of
from edge_agent.update.machine import BUSY, RESTING, RESUME, Event, Result, State
from edge_agent.update.messages import Check, Checked, Fetch, ReadManifest, SelfTest, Test
from edge_agent.update.policy import (
    Answered,
    Observed,
    Verdict,
    check_fit,
    check_floor,
    decide,
    judge,
)
from edge_agent.update.polls import Backoff
from edge_agent.update.roll_back import RollBack
from edge_agent.update.serving import Serving, status_of
from edge_agent.update.source import Seen, Source, open_source
from edge_agent.update.staging import make_folder, stage_local
from edge_agent.update.upkeep import Upkeep
from edge_agent.update.workshop import Workshop

logger = logging.getLogger(__name__)

_WATCH_SECONDS: Final = 1.0  # between two looks at a release on probation
_SPARE_BYTES: Final = 16 << 20  # left free on the disk beside what an update needs: records, metrics queue

# Seen by running it here, and the same tomorrow. What its manifest already says is looked at anew each time,
# because the agent, its configuration or the floor may have changed.
_PERMANENT: Final = frozenset(
    {"selftest", "too_slow", "no_golden", "engine", "rules", "external_data", "custom_operators"}
)

# Weightiest last: what run_once reports for a device with several models.
_WEIGHT: Final = (
    Result.NO_ARTIFACT, Result.ALREADY_INSTALLED, None, Result.SUCCEEDED, Result.ABORTED, Result.TIMED_OUT,
    Result.REJECTED, Result.FAILED_NO_STATE_CHANGE, Result.FAILED_ROLLBACK_COMPLETE,
    Result.FAILED_UNABLE_TO_ROLLBACK,
)  # fmt: skip


@dataclass(slots=True)
class _Known:
    """What is known of the repository in this process."""

    seen: Seen | None = None
    checked: bool = False  # the repository as `seen` was checked and nothing is left to do about it
    expires: float = 0.0  # seconds since the epoch
    serial: int = 0
    last_check: float = 0.0
    trouble: UpdateOutcome | None = None  # what keeps it from being followed
    waits: bool = False  # a release waits for the end of a hold of this device
    outcome: UpdateOutcome = field(default_factory=lambda: UpdateOutcome(state=State.IDLE))


class Updater:
    """The updates of one agent. All methods run on one event loop.

    Args:
        config: where releases come from; an empty ``source`` means nowhere, and local installs still work.
        device: this device's name, as the assignments know it.
        store: the store, open for writing.
        serving: who answers; None where no agent runs (``edge-agent install`` on a stopped agent): then
            nothing is swapped, and the release is on probation from the agent's next start.
        metrics: where states and results are counted.
        engine: how the self-test runs the model.
        now: the wall clock, seconds since the epoch.
        monotonic: a clock that never goes back, seconds.
        rng: for jitter; by default one that the device's name seeds.
    """

    def __init__(
        self,
        config: UpdatesConfig,
        device: str,
        store: Store,
        serving: Serving | None,
        metrics: AgentMetrics | None,
        *,
        engine: EngineConfig | None = None,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._config = config
        self._store = store
        self._serving = serving
        self._metrics = metrics
        self._now = now
        self._monotonic = monotonic
        self._rng = rng or random.Random(device)  # spread over the site, and the same at every start
        self._holds = Holds(store.layout.root, config.windows)
        self._hold: Hold | None = None  # as it was looked at last
        self._turn = asyncio.Lock()  # one thing at a time: run, install or roll-back
        self._source: Source | None = None
        self._ledger = Ledger(store, metrics, now, monotonic)
        self._models = self._ledger.models
        self._back = RollBack(store, serving, self._ledger, now)
        self._upkeep = Upkeep(store, serving, self._ledger, self._back, monotonic)
        self._beside = Beside(config, serving, self._ledger, monotonic)
        self._workshop = Workshop(config, device, store, engine or EngineConfig())
        self._known = _Known()
        self._retry = Backoff(config.interval_seconds, self._rng)

    # The story

    async def run(self) -> None:
        """Follow the repository and watch releases on probation, until cancelled. Never raises by itself."""
        pauses = polls.pauses(self._config.interval_seconds, self._config.jitter, self._rng)
        poll_at = self._monotonic() + next(pauses)
        while True:
            due = self._monotonic() >= poll_at
            try:
                if due:
                    await self.run_once()
                else:
                    async with self._turn:
                        await self._watch()
            except Exception:
                logger.exception("the updater failed unexpectedly; it goes on")
                self._retry.failed(self._monotonic())
            if due:
                poll_at = self._monotonic() + next(pauses)
            await asyncio.sleep(min(_WATCH_SECONDS, max(poll_at - self._monotonic(), 0.01)))

    async def run_once(self) -> UpdateOutcome:
        """One round: judge what is on probation, look at the repository, and bring about what it says.

        Never raises for what a repository, a release or the disk does; the outcome says it.
        """
        async with self._turn:
            await self._watch()
            if await self._is_due():
                await self._check()
            return self._known.trouble or self._known.outcome

    async def _is_due(self) -> bool:
        """Whether the worker must be started: something changed, broke, or is to be tried again."""
        if await self._upkeep.is_any_damaged():
            self._known.checked = False
        if await self._look_at_holds() is None and self._known.waits:
            self._known.checked = self._known.waits = False
        if not self._config.source:
            return False
        try:
            if self._source is None:
                # Only to look: members are the worker's.
                access = msgspec.structs.replace(self._workshop.access(), blobs="")
                self._source = await asyncio.to_thread(
                    open_source, self._config.source, self._config.timeout_seconds, access
                )
            seen = await asyncio.to_thread(self._source.look, self._known.seen)
        except EdgeError as error:
            self._no_repository(Result.FAILED_NO_STATE_CHANGE, getattr(error, "reason", "config"), str(error))
            return False
        changed = self._known.seen is None or seen.digest != self._known.seen.digest
        self._known.seen = seen
        self._reached()
        if changed:
            self._known.checked = False
            self._retry.succeeded()
        if self._known.expires and self._now() >= self._known.expires and self._known.checked:
            self._no_repository(Result.REJECTED, "expired", "the release metadata has expired")
        return not self._known.checked and self._monotonic() >= self._retry.not_before

    async def _check(self) -> None:
        """Let the worker read the repository, then follow it for every model."""
        try:
            async with self._workshop.open() as (scratch, hands):
                checked = await hands.ask(Check())
                assert isinstance(checked, Checked)
                self._trusted(checked)
                outcomes = []
                for model, share in sorted(checked.shares.items()):
                    await self._ledger.track(model)
                    async with self._attempt(model, share.release if share else None) as attempt:
                        outcomes.append(await self._follow(model, share, hands, scratch))
                    if attempt.error is not None:
                        outcomes.append(await self._end_of(attempt))
        except (EdgeError, OSError) as error:
            self._retry.failed(self._monotonic())
            self._no_repository(*result_of(error), str(error))
            return
        if any(one.result in _TRY_AGAIN or one.state is State.ROLLING_BACK for one in outcomes):
            self._retry.failed(self._monotonic())
        else:
            self._known.checked = True
            self._retry.succeeded()
        if outcomes:
            weightiest = max(outcomes, key=lambda outcome: _WEIGHT.index(outcome.result))
            self._known.outcome = dataclasses.replace(weightiest, models=tuple(outcomes))
        else:
            self._known.outcome = UpdateOutcome(
                state=State.IDLE, result=Result.NO_ARTIFACT, reason="no_artifact",
                message="the assignments name no model",
            )  # fmt: skip

    async def _follow(self, model: str, share: Share | None, hands: Hands, scratch: Path) -> UpdateOutcome:
        """Bring one model to what the assignments say."""
        tracked = self._models[model]
        await self._heed(model, share)
        wanted = share.release if share else None
        if tracked.record.state is State.PROBATION:
            candidate = tracked.record.candidate
            if wanted is None or (candidate and wanted.digest == candidate.digest) or (share and share.held):
                return self._ledger.outcome(model, None, "probation", "on probation", candidate)
            await self._abandon(model, f"{wanted.version} is wanted instead")
        if tracked.record.state is State.ROLLING_BACK:
            return self._ledger.outcome(model, None, "rolling_back", "rolling back", tracked.record.candidate)
        if tracked.record.state is State.SHADOWING:
            candidate = tracked.record.candidate
            same = wanted is not None and candidate is not None and wanted.digest == candidate.digest
            held = (share is not None and share.held) or self._hold is not None
            if wanted is None or held or (same and share is not None and share.beside):
                text = tracked.shadow.doing if tracked.shadow else ""
                return self._ledger.outcome(model, None, "shadow", text, candidate)
            if same:
                return await self._promote(model)
            await self._beside.leave(model, Result.ABORTED, "superseded", f"{wanted.version} is wanted")

        self._ledger.move(model, Event.POLL)
        current = self._store.pointer(model)
        hold = await self._look_at_holds()
        decision = decide(share, current, await self._upkeep.is_intact(model), tracked.record, hold)
        self._known.waits |= hold is not None and decision.event is Event.HOLD
        if decision.event is not Event.NEW_RELEASE or share is None or wanted is None:
            self._ledger.move(model, decision.event)
            await self._ledger.save(model, tolerant=True)
            if decision.result is not None:
                self._ledger.count(model, decision.result, decision.reason, wanted)
            return self._ledger.outcome(model, decision.result, decision.reason, decision.message, wanted)
        return await self._update(model, share, wanted, hands, scratch)

    async def _update(
        self, model: str, share: Share, release: Release, hands: Hands, scratch: Path
    ) -> UpdateOutcome:
        """Download, verify, stage, test and take live."""
        staged = scratch / release.digest.hex
        async with self._attempt(model, release) as attempt:
            logger.info("model %s: %s (%s) is assigned", model, release.version, release.digest.short)
            await self._begin(model, Event.NEW_RELEASE, release, share.rollout)
            await asyncio.to_thread(make_folder, staged)
            await hands.ask(ReadManifest(model, release, str(staged)))
            manifest = (await asyncio.to_thread(open_bundle, staged)).manifest
            self._refuse_unfit(model, manifest, share.minimum_version)
            lacking = await asyncio.to_thread(self._store.lacks, manifest)
            needed = sum(member.size for member in lacking.values())
            spare = await asyncio.to_thread(self._refuse_without_space, manifest, needed)
            await hands.ask(Fetch(str(staged), tuple(sorted(lacking)), spare))

            await self._ledger.step(model, Event.FETCHED)
            bundle = await asyncio.to_thread(self._store.admit, staged)
            await self._ledger.step(model, Event.VERIFIED)
            repair = self._store.pointer(model) == release.digest
            prepared = await self._proven(model, bundle, hands)
            if not repair and (hold := await self._look_at_holds()) is not None:
                if self._serving:
                    self._serving.forget(prepared)
                raise _Held(f"{release.version} waits: {hold}", hold.kind)
            if share.beside and self._serving and not repair:
                await self._beside.begin(model, bundle, prepared, share.ab)
            else:
                await self._switch(model, bundle, prepared, Event.PASSED)
        return await self._end_of(attempt)

    async def _take_live(self, model: str, bundle: Bundle, hands: Hands) -> None:
        """Test an admitted release, warm it, switch to it; from here on it is on probation."""
        prepared = await self._proven(model, bundle, hands)
        await self._switch(model, bundle, prepared, Event.PASSED)

    async def _proven(self, model: str, bundle: Bundle, hands: Hands) -> Any:
        """Test an admitted release in the worker, then load and warm it here; it answers nothing yet."""
        tracked = self._models[model]
        await self._ledger.step(model, Event.TEST)
        report = await hands.ask(Test(str(bundle.path)))
        assert isinstance(report, SelfTest)
        tracked.self_test = report
        if not report.passed:
            raise UpdateRejected(report.message, reason=report.reason)
        return await self._serving.prepare(bundle) if self._serving else None

    async def _switch(self, model: str, bundle: Bundle, prepared: Any, event: Event) -> None:
        tracked = self._models[model]
        before = self._store.pointer(model)
        previous = before if before != bundle.digest else tracked.record.previous
        await self._ledger.step(model, event, previous=previous, starts=1 if self._serving else 0)
        await asyncio.to_thread(self._store.activate, bundle)
        if self._serving:
            self._serving.swap(prepared)
        tracked.begin(self._monotonic())
        tracked.proven = await asyncio.to_thread(Proven.of, bundle)
        self._ledger.move(model, Event.ACTIVATED)
        await self._ledger.save(model, tolerant=True)  # `activating` on disk resumes to the same

    # In the shadow

    async def _promote(self, model: str) -> UpdateOutcome:
        """What was in the shadow answers from now on, and is on probation."""
        tracked = self._models[model]
        shadow = tracked.shadow
        assert shadow is not None
        assert self._serving is not None
        async with self._attempt(model, tracked.record.candidate) as attempt:
            await self._serving.end_shadow(model)
            tracked.shadow = None
            try:
                await self._switch(model, shadow.bundle, shadow.prepared, Event.AGREED)
            finally:
                self._serving.end_split(model)  # not before: who got the candidate goes on getting it
        return await self._end_of(attempt)

    # Probation

    async def _watch(self) -> None:
        """Judge what is on probation, and finish roll-backs that the disk refused."""
        if self._serving is None:
            return
        for model, tracked in list(self._models.items()):
            record = tracked.record
            if record.state is State.ROLLING_BACK:
                self._known.outcome = await self._back.go_back(model)
            elif record.state is State.SHADOWING and tracked.shadow is not None:
                verdict, reason, message = self._beside.judge(model, tracked.shadow)
                if verdict is Verdict.UNHEALTHY:
                    result = Result.ABORTED if reason == "superseded" else Result.REJECTED
                    self._known.outcome = await self._beside.leave(model, result, reason, message)
                    if result is Result.ABORTED:  # nothing is known against it: it begins again
                        self._known.checked = False
                elif verdict is Verdict.HEALTHY and await self._look_at_holds() is None:
                    logger.info("model %s: in the shadow, %s", model, message)
                    self._known.outcome = await self._promote(model)
            elif record.state is State.PROBATION and record.candidate and not record.killed:
                seen = self._observe(model, record.candidate)
                verdict, reason, message = judge(self._config.probation, seen)
                if verdict is Verdict.HEALTHY:
                    text = f"{record.candidate.version} proved itself: {message}"
                    outcome = await self._ledger.finish(model, Event.HEALTHY, Result.SUCCEEDED, reason, text)
                    self._known.outcome = outcome
                elif verdict is Verdict.AGAIN:
                    logger.info("model %s: %s; looking again", model, message)
                    answered = Answered.of(self._serving.served(model))
                    tracked.begin(self._monotonic(), answered, tracked.look + 1)
                elif verdict is Verdict.UNHEALTHY:
                    # Of a release that rotted on the disk nothing is known: it is repaired, not refused.
                    self._known.outcome = await self._back.take_back(
                        model, Event.UNHEALTHY, reason, message, reject=reason != "corrupt"
                    )
            # What was said and the disk refused to keep: a restart must not find the state before it.
            await self._ledger.save(model, tolerant=True)

    def _observe(self, model: str, candidate: Release) -> Observed:
        assert self._serving is not None
        status = status_of(self._serving, model)
        served = self._serving.served(model) if status else None
        before = self._serving.served_before(model) if status else None
        tracked = self._models[model]
        now = Answered.of(served) if served else None
        if now is not None and tracked.answered_before is not None:
            now = now.since(tracked.answered_before)
        return Observed(
            seconds=self._monotonic() - tracked.active_since,
            rows=served.rows if served else 0,
            fallback_rows=served.fallback_rows - served.late_rows if served else 0,
            state=status.state if status else "absent",
            right=status is not None and status.digest == candidate.digest,
            non_finite_rows=served.non_finite_rows if served else 0,
            now=now,
            before=Answered.of(before) if before else None,
            look=tracked.look,
        )

    async def _abandon(self, model: str, why: str) -> None:
        """Another release is wanted while one is on probation: first go back to one that proved itself."""
        tracked = self._models[model]
        has_previous = (await asyncio.to_thread(self._previous_digest, model)) is not None
        logger.info("model %s: probation is given up: %s", model, why)
        if not has_previous:
            await self._ledger.finish(model, Event.SUPERSEDED, Result.ABORTED, "superseded", why)
            return
        await self._back.take_back(model, Event.ROLL_BACK, "superseded", why, reject=False)
        if tracked.record.state is State.ROLLING_BACK:
            raise StoreError(f"model {model}: the roll-back is not finished", reason="rolling_back")

    # What an operator does

    async def install(self, path: Path) -> UpdateOutcome:
        """Install a local bundle, a folder or a ``.tar``: the same verification, self-test and probation.

        The operator vouches for it instead of the repository's signatures; the signed floor still holds.
        Where the device follows a repository that names another release of the model, the next check goes
        back to that one.
        """
        self._workshop.interrupt()
        async with self._turn:
            await self._watch()
            release: Release | None = None
            model = None
            try:
                async with self._workshop.open() as (scratch, hands):
                    staged = scratch / "bundle"
                    limit = self._config.max_bundle_bytes
                    bundle = await asyncio.to_thread(stage_local, path, staged, limit)
                    model, release = bundle.name, Release(bundle.manifest.version, bundle.digest)
                    await self._ledger.track(model)
                    outcome = await self._install(model, release, bundle, hands)
            except (EdgeError, ContractError, OSError) as error:
                result, reason = result_of(error)
                return UpdateOutcome(
                    state=self._models[model].record.state if model in self._models else State.IDLE,
                    model=model, result=result, reason=reason, message=str(error),
                    version=release.version if release else None, digest=release.digest if release else None,
                )  # fmt: skip
            self._known.checked = False  # the repository may want something else
            return outcome

    async def _install(self, model: str, release: Release, staged: Bundle, hands: Hands) -> UpdateOutcome:
        tracked = self._models[model]
        refused = tracked.record.rejection(release.digest) is not None
        if (
            self._store.pointer(model) == release.digest
            and not refused
            and await self._upkeep.is_intact(model)
        ):
            message = f"{model} {release.version} is installed"
            return self._ledger.outcome(
                model, Result.ALREADY_INSTALLED, "already_installed", message, release
            )
        if tracked.record.state is State.PROBATION:
            await self._abandon(model, "an operator installs another release")
        elif tracked.record.state is State.SHADOWING:
            await self._beside.leave(model, Result.ABORTED, "operator", "an operator installs a release")
        async with self._attempt(model, release) as attempt:
            tracked.record = tracked.record.forgiving(release.digest)
            await self._begin(model, Event.INSTALL, release, rollout="")
            self._refuse_unfit(model, staged.manifest, tracked.record.minimum_version)
            bundle = await asyncio.to_thread(self._store.admit, staged.path)
            await self._ledger.step(model, Event.VERIFIED)
            await self._take_live(model, bundle, hands)
        outcome = await self._end_of(attempt)
        if outcome.result is None:  # on probation: to the operator it is done
            message = f"{model} {release.version} is live, on probation"
            if self._serving is None:
                message = (
                    f"{model} {release.version} is installed; no agent runs: it answers from the next start "
                    "on, on probation at first"
                )
            return self._ledger.outcome(model, Result.SUCCEEDED, "installed", message, release)
        return outcome

    async def roll_back(self, model: str | None) -> UpdateOutcome:
        """Go back to the previous release, at once and offline. The one left stays rejected.

        Raises:
            InvalidInput: no model was named and there are several, or none.
            UnknownModel: the store holds no such model.
        """
        name = self._named(model)
        self._workshop.interrupt()
        async with self._turn:
            tracked = await self._ledger.track(name)
            current = self._store.pointer(name)
            if tracked.record.state is State.SHADOWING:
                await self._beside.leave(name, Result.ABORTED, "operator", "an operator rolls back")
            release = await asyncio.to_thread(self._release_of, name, tracked.record, current)
            if tracked.record.state in RESTING or tracked.record.state is State.PROBATION:
                try:
                    # What cannot succeed is refused before anything is said or done.
                    await asyncio.to_thread(self._back.way_back, name, tracked.record)
                except (StoreError, UpdateRejected) as error:
                    return self._ledger.outcome(name, *result_of(error), str(error), release)
            if tracked.record.state is not State.ROLLING_BACK:
                tracked.record = msgspec.structs.replace(tracked.record, candidate=release)
                await self._back.take_back(name, Event.ROLL_BACK, "operator", "rolled back by an operator")
            else:
                await self._back.go_back(name)
            last = tracked.record.last
            back = await asyncio.to_thread(self._store.current, name)
            if last is None or back is None or tracked.record.state is State.ROLLING_BACK:
                return self._ledger.outcome(
                    name, Result.FAILED_UNABLE_TO_ROLLBACK, "store", "the disk refused; tried again", release
                )
            version = back.manifest.version
            message = f"{name} is back at {version}" if last.result is Result.SUCCEEDED else last.message
            return self._ledger.outcome(
                name, last.result, last.reason, message, Release(version, back.digest)
            )

    async def hold(self, until: str | None, reason: str) -> dict[str, Any]:
        """Let nothing new begin, until a time (ISO 8601) or until ``release_hold``; over restarts.

        Raises:
            InvalidInput: ``until`` is no time, or is over.
            StoreError: the disk refused.
        """
        self._hold = await asyncio.to_thread(self._holds.set, until, reason, self._now())
        logger.info("updates are held: %s", self._hold)
        return self._hold.as_dict()

    async def release_hold(self) -> dict[str, Any]:
        """End that hold; what is still in force afterwards, a maintenance window's, is in the answer.

        Raises:
            StoreError: the disk refused.
        """
        await asyncio.to_thread(self._holds.release)
        hold = await self._look_at_holds()
        return hold.as_dict() if hold else NOT_HELD

    async def heed(self, message: bytes) -> dict[str, Any]:
        """A message about holds came (``holds.Holds.heed``); returns the hold that is in force now.

        Raises:
            InvalidInput: it cannot be understood, or is too late.
            StoreError: the disk refused.
        """
        said = await asyncio.to_thread(self._holds.heed, message, self._now())
        logger.info("a message about updates: %s", f"hold, {said}" if said else "go on")
        hold = await self._look_at_holds()
        return hold.as_dict() if hold else NOT_HELD

    async def _look_at_holds(self) -> Hold | None:
        self._hold = await asyncio.to_thread(self._holds.in_force, self._now())
        return self._hold

    def status(self) -> dict[str, Any]:
        """Where every update stands, for ``edge-agent status``."""
        known = self._known
        return {
            "source": self._config.source,
            "last_check": known.last_check or None,
            "metadata_expires": known.expires or None,
            "serial": known.serial or None,
            "hold": self._hold.as_dict() if self._hold else NOT_HELD,
            "trouble": {"reason": known.trouble.reason, "message": known.trouble.message}
            if known.trouble
            else None,
            "models": {
                model: {**tracked.as_dict(), "shadow": self._beside.as_dict(model)}
                for model, tracked in sorted(self._models.items())
            },
        }

    # After a restart

    async def recover(self) -> None:
        """Before serving starts: finish or undo what a power cut interrupted. Never raises."""
        for model in await asyncio.to_thread(self._store.models):
            try:
                await self._resume(model)
            except Exception:
                logger.exception("model %s: its update is not resumed; what is current is served", model)

    async def stop(self) -> None:
        """The agent ends in good order: that says nothing against a release, and is not counted."""
        for model, tracked in self._models.items():
            record = tracked.record
            if record.state is State.PROBATION and record.starts:
                tracked.record = msgspec.structs.replace(record, starts=record.starts - 1)
            elif record.state in _RUNS_THE_MODEL:
                tracked.record = msgspec.structs.replace(record, state=RESUME[record.state])
            await self._ledger.save(model, tolerant=True)

    async def _resume(self, model: str) -> None:
        tracked = await self._ledger.track(model)
        tracked.begin(self._monotonic())
        if tracked.record.killed and self._serving:
            self._serving.set_killed(model, killed=True)
        was, release = tracked.record.state, tracked.record.candidate
        state = RESUME[was]
        if was in BUSY:
            # A power cut while downloading says nothing about the model; one while it is run may.
            interrupted = tracked.record.interrupted + (was in _RUNS_THE_MODEL)
            logger.warning("model %s: the agent ended while %s; on with %s", model, was.value, state.value)
            tracked.record = msgspec.structs.replace(tracked.record, state=state, interrupted=interrupted)
            await self._ledger.save(model, tolerant=True)
            if interrupted > self._config.probation.max_restarts and state is State.IDLE and release:
                message = f"the agent ended {interrupted} times while installing it"
                self._ledger.reject(model, release, "crash_loop", message)
                self._ledger.record_end(model, Result.REJECTED, "crash_loop", message, release)
                await self._ledger.save(model, tolerant=True)
        if state is State.ACTIVATING and release is not None:
            await self._resume_activating(model, release)
        if tracked.record.state is State.PROBATION:
            starts = tracked.record.starts + 1
            tracked.record = msgspec.structs.replace(tracked.record, starts=starts)
            await self._ledger.save(model, tolerant=True)
            if starts > 1 + self._config.probation.max_restarts:
                await self._back.take_back(
                    model, Event.UNHEALTHY, "crash_loop", f"the agent ended {starts - 1} times on probation"
                )
        elif tracked.record.state is State.ROLLING_BACK:
            await self._back.go_back(model)
        self._back.withdraw(model)

    async def _resume_activating(self, model: str, release: Release) -> None:
        """The self-test had passed; whether the pointer moved is unknown, and moving it again is harmless."""
        try:
            bundle = await asyncio.to_thread(open_bundle, self._store.layout.release(release.digest))
            await asyncio.to_thread(bundle.verify)
            await asyncio.to_thread(self._store.activate, bundle)
        except (StoreError, ContractError) as error:
            logger.warning("model %s: %s is not activated: %s", model, release.version, error)
            self._ledger.move(model, Event.FAIL)
        else:
            self._ledger.move(model, Event.ACTIVATED)
        await self._ledger.save(model, tolerant=True)

    # Parts of the story

    @contextlib.asynccontextmanager
    async def _attempt(self, model: str, release: Release | None) -> AsyncIterator[_Attempt]:
        """Whatever goes wrong inside becomes a result; what was current answers as before."""
        attempt = _Attempt(model, release)
        try:
            yield attempt
        except (EdgeError, ContractError, OSError) as error:
            attempt.error = error
        except Exception as error:
            logger.exception("model %s: the update failed unexpectedly", model)
            attempt.error = error

    async def _end_of(self, attempt: _Attempt) -> UpdateOutcome:
        model, release, error = attempt.model, attempt.release, attempt.error
        record = self._models[model].record
        if isinstance(error, _Held):  # it is in the store by now; the end of the hold begins it again
            for event in (Event.FAIL, Event.POLL, Event.HOLD):
                self._ledger.move(model, event)
            await self._ledger.save(model, tolerant=True)
            self._known.waits = True
            return self._ledger.outcome(model, None, error.reason, str(error), release)
        if error is None and record.state is State.SHADOWING:
            shadow = self._models[model].shadow
            text = shadow.doing if shadow else ""
            return self._ledger.outcome(model, None, "shadow", text, release)
        if error is None:
            return self._ledger.outcome(model, None, "probation", "live, on probation", release)
        result, reason = result_of(error)
        if release is not None and result is Result.REJECTED and reason in _PERMANENT:
            self._ledger.reject(model, release, reason, str(error))
        moved = release is not None and self._store.pointer(model) == release.digest
        if record.state is State.ACTIVATING and moved:
            # A disk that cannot make the switch durable says nothing about the release.
            to_blame = not isinstance(error, StoreError)
            return await self._back.take_back(model, Event.UNHEALTHY, reason, str(error), reject=to_blame)
        if record.state in BUSY and record.state is not State.ROLLING_BACK:
            return await self._ledger.finish(model, Event.FAIL, result, reason, str(error))
        return self._ledger.outcome(model, result, reason, str(error), release)

    async def _begin(self, model: str, event: Event, release: Release, rollout: str) -> None:
        record = self._models[model].record
        again = event is Event.NEW_RELEASE and record.candidate == release
        await self._ledger.step(
            model, event, candidate=release, rollout=rollout, started=self._now(),
            interrupted=record.interrupted if again else 0,
        )  # fmt: skip

    async def _heed(self, model: str, share: Share | None) -> None:
        """Kill switch and floor hold from now on, and while offline."""
        if share is None:
            return
        tracked = self._models[model]
        if self._serving:
            self._serving.set_killed(model, share.killed)
        if (tracked.record.killed, tracked.record.minimum_version) != (share.killed, share.minimum_version):
            tracked.record = msgspec.structs.replace(
                tracked.record, killed=share.killed, minimum_version=share.minimum_version
            )
            await self._ledger.save(model, tolerant=True)

    def _refuse_unfit(self, model: str, manifest: Manifest, minimum: Version | None) -> None:
        if manifest.name != model:
            raise UpdateRejected(
                f"the manifest is of model {manifest.name!r}, expected {model!r}", reason="wrong_model"
            )
        check_floor(manifest.version, minimum)
        check_fit(manifest, platform.machine(), Version(__version__), self._config.max_bundle_bytes)

    def _refuse_without_space(self, manifest: Manifest, needed: int) -> int:
        """Returns the bytes that are left over."""
        free = self._store.free_bytes()
        if needed + _SPARE_BYTES > free:
            raise StoreError(
                f"{manifest.name} {manifest.version} needs {needed} bytes and {_SPARE_BYTES} to spare, "
                f"{free} are free in {self._store.layout.root}; free some space",
                reason="disk_full",
            )
        return free - _SPARE_BYTES - needed

    # The repository

    def _reached(self) -> None:
        self._known.last_check = self._now()
        if self._known.trouble and self._known.trouble.result is Result.FAILED_NO_STATE_CHANGE:
            logger.info("the release repository answers again")
            self._known.trouble = None
        if self._metrics:
            self._metrics.update_check_time.set(self._now())

    def _trusted(self, checked: Checked) -> None:
        self._known.trouble = None
        self._known.expires, self._known.serial = checked.expires, checked.serial
        if self._metrics:
            self._metrics.metadata_expiry.set(checked.expires)
            self._metrics.assignments_serial.set(checked.serial)

    def _no_repository(self, result: Result, reason: str, message: str) -> None:
        """The repository cannot be followed: say so once; what is installed keeps serving."""
        if self._known.trouble is None or self._known.trouble.reason != reason:
            logger.warning("updates: %s (%s); what is installed keeps serving", message, reason)
            if result is Result.REJECTED:
                for model in self._models:
                    self._ledger.count(model, result, reason, None)
        self._known.trouble = UpdateOutcome(state=State.IDLE, result=result, reason=reason, message=message)

    def _named(self, model: str | None) -> str:
        known = self._store.models()
        if model is None:
            if len(known) != 1:
                raise InvalidInput(
                    f"name the model: the store holds {', '.join(known)}"
                    if known
                    else "the store holds no model; install one first"
                )
            return known[0]
        if model not in known:
            raise UnknownModel(f"no model {model[:80]!r} in the store, it holds {', '.join(known) or 'none'}")
        return model

    def _previous_digest(self, model: str) -> Digest | None:
        previous = self._store.pointer(model, "previous")
        return previous if previous != self._store.pointer(model) else None

    def _release_of(self, model: str, record: UpdateRecord, current: Digest | None) -> Release | None:
        """The release that answers: version and digest, also where its manifest is damaged."""
        if record.candidate is not None and record.candidate.digest == current:
            return record.candidate
        with contextlib.suppress(ContractError):
            bundle = self._store.current(model)
            if bundle is not None:
                return Release(bundle.manifest.version, bundle.digest)
        return Release(Version("0.0.0"), current) if current else None


class _Held(EdgeError):
    """A hold came into force while the release was on its way."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class _Attempt:
    model: str
    release: Release | None
    error: Exception | None = None


_RUNS_THE_MODEL: Final = (State.TESTING, State.SHADOWING, State.ACTIVATING)
_TRY_AGAIN: Final = frozenset(
    {
        Result.FAILED_NO_STATE_CHANGE,
        Result.FAILED_UNABLE_TO_ROLLBACK,
        Result.TIMED_OUT,
        Result.ABORTED,
    }
)
