"""The inference service: THE place that decides whether the model or the rules answer.

Invariants:

- a request that was accepted is answered, by the model if it can, else by the rules of its bundle;
  why it was the rules is one of ``metric_names.REASONS``, in the answer and in the counters;
- what a request began with is what answers it: a swap never touches requests in flight;
- nothing here blocks the event loop but the run of a model measured to be fast;
- time is read from ``time.monotonic``: uvloop's own clock has whole milliseconds, too coarse here.

``choose`` is the decision, pure; the rest brings it the facts and carries it out.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, cast

import msgspec
import numpy as np

from edge_agent.config import DriftConfig, EngineConfig, ServingConfig
from edge_agent.contract.bundle import Bundle
from edge_agent.contract.errors import ContractError
from edge_agent.contract.manifest import Decision, Manifest
from edge_agent.errors import BadRules, EngineError, InvalidInput, Overloaded, Unavailable, UnknownModel
from edge_agent.rules.evaluate import RuleSet, constant
from edge_agent.serving import tensors
from edge_agent.serving.batcher import Batcher, Pending, Timings
from edge_agent.serving.decision import fails, on_the_models_scale
from edge_agent.serving.engine import Sessions
from edge_agent.serving.history import History, Noted
from edge_agent.serving.release import Release, features, load, longest_stall, read_rules, retire, rows_of
from edge_agent.serving.room import Tenant, fits, who_leaves
from edge_agent.serving.shadow import Shadow, ShadowReport
from edge_agent.serving.split import Served, Split, SplitReport, why_not_beside
from edge_agent.serving.tensors import Feeds, Tensor
from edge_agent.serving.watch import DriftWatch
from edge_agent.telemetry.metrics import AgentMetrics

log = logging.getLogger(__name__)

State = Literal["ready", "loading", "absent", "corrupt", "unloaded", "failed", "rejected"]

# What the state of the model says about why the rules answer.
_REASON_BY_STATE: Final[Mapping[str, str]] = {
    "loading": "no_model",
    "absent": "no_model",
    "corrupt": "corrupt_model",
    "unloaded": "unloaded",
    "failed": "model_error",
    "rejected": "rejected",
}
# Of its time, so much of a request is left for the rules to answer inside it when the model is late.
_RESERVED_SHARE: Final = 0.05
_MOST_RESERVED: Final = 0.005  # seconds


class Facts(NamedTuple):
    """What is known before the model is asked."""

    state: str
    killed: bool
    breaker_open: bool
    time_left: float  # seconds


def choose(facts: Facts) -> str:
    """Why the rules must answer, or ``ok`` if the model shall be asked.

    The kill switch comes first: it holds whatever the model could do.
    """
    if facts.killed:
        return "killed"
    if facts.state != "ready":
        return _REASON_BY_STATE[facts.state]
    if facts.time_left <= 0:
        return "deadline"
    if facts.breaker_open:
        return "breaker_open"
    return "ok"


class Answer(msgspec.Struct, frozen=True, gc=False):
    """One answered request of n rows.

    ``source`` and ``reason`` say who answered and why. A fallback gives only the decision output, put on the
    scale of the model, so that the manifest's threshold still holds. ``scores`` has n floats, and is None
    exactly where ``decision``, the manifest's decision block, is.
    """

    model: str
    version: str
    digest: str
    source: str
    reason: str
    outputs: dict[str, Tensor]
    scores: list[float] | None
    decision: Decision | None
    seconds: float

    @property
    def failed(self) -> list[bool] | None:
        """What was decided on each row."""
        if self.scores is None or self.decision is None:
            return None
        return [fails(score, self.decision) for score in self.scores]


Then = Callable[[Answer | Exception], None]
"""Told once what became of a request."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """What one model is doing, for people and for the repository index."""

    name: str
    version: str | None
    digest: str | None
    state: str
    reason: str
    precision: str
    drifting: bool | None


PreparedModel = Release
"""A release that is loaded and warm. Made by ``prepare``, spent by ``swap`` or ``forget``."""


@dataclass(slots=True, eq=False)
class _Slot:
    """One model name and what stands behind it now."""

    name: str
    watch: DriftWatch
    release: Release | None = None
    state: State = "absent"
    reason: str = ""
    killed: bool = False
    failures: int = 0  # in a row; the breaker counts them
    open_until: float = 0.0
    rows: int = 0
    fallback_rows: int = 0
    late_rows: int = 0
    late: bool = False  # whether the last fault was that its time ran out
    non_finite_rows: int = 0
    failed_rows: int = 0
    latencies_before: tuple[int, ...] = ()  # of this version when it was swapped in
    before: Served | None = None  # what the release before came to
    shadow: Shadow | None = None
    split: Split[Release] | None = None
    history: History | None = None  # where the rules need one
    asked: float = 0.0  # when it was asked last, and ...
    loaded: float = 0.0  # ... when its model came into memory: time.monotonic()
    made_room: bool = False  # unloaded for others: the next request brings it back

    @property
    def candidate(self) -> Manifest | None:
        """Of what is in memory beside the release, in its shadow or for a share of its requests."""
        if self.shadow is not None:
            return self.shadow.manifest
        return self.split.release.manifest if self.split is not None else None


class Service:
    """Every model of this agent. Lives on one event loop."""

    def __init__(
        self, serving: ServingConfig, engine: EngineConfig, drift: DriftConfig, metrics: AgentMetrics
    ) -> None:
        self._serving = serving
        self._engine = engine
        self._drift = drift
        self._metrics = metrics
        self._limit = _inside(serving.deadline_ms / 1000)
        self._budget = engine.memory_budget_mb * 1e6
        self._sessions = Sessions(engine)
        self._slots: dict[str, _Slot] = {}
        self._loading: set[asyncio.Task[None]] = set()

    # -- requests ------------------------------------------------------------------------------------------

    def submit(
        self,
        model: str | None,
        version: str | None,
        inputs: Mapping[str, Tensor],
        *,
        deadline: float | None = None,
        source: str = "",
        key: str = "",
    ) -> asyncio.Future[Answer]:
        """``ask`` with a promise of the answer, for those who can wait in a coroutine.

        Raises:
            InvalidInput, UnknownModel, Overloaded, Unavailable: as ``ask``.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def settle(answer: Answer | Exception) -> None:
            if future.done():  # the caller went away
                return
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

        self.ask(model, version, inputs, settle, deadline=deadline, source=source, key=key)
        return future

    def ask(
        self,
        model: str | None,
        version: str | None,
        inputs: Mapping[str, Tensor],
        then: Then,
        *,
        deadline: float | None = None,
        source: str = "",
        key: str = "",
    ) -> None:
        """Accept a request and call ``then`` with its answer: at once if the rules give it, else later.

        Args:
            model: the model's name; None means the only one.
            version: the version the caller insists on, or None.
            inputs: tensors by name, as decoded. They are not altered; the caller must not alter them either.
            then: must not raise.
            deadline: seconds from now; None takes the configured default.
            source: what the rows come from in the order of time, a machine: each has alarms of its own.
            key: what an A/B split keeps to the same release where there is no source.

        Raises:
            InvalidInput: the tensors do not fit the model.
            UnknownModel: no such model, or another version of it.
            Overloaded: too many rows wait already.
            Unavailable: the model is known but not even its rules are.
        """
        slot, release = self._find(model, version)
        feeds, rows = tensors.conform(release.manifest.inputs, inputs, self._serving.max_request_rows)
        now = slot.asked = time.monotonic()
        limit = self._limit if deadline is None else _inside(deadline)
        reason = choose(Facts(slot.state, slot.killed, now < slot.open_until, limit))
        noted = None
        chosen = release
        if slot.split is not None and slot.release is not None:
            if version is None and slot.split.takes(source or key, feeds):
                chosen = slot.split.release
            release = slot.release  # its rules answer, also where the candidate's version is wanted
        if (
            slot.failures >= self._serving.breaker_failures
            and reason == "ok"
            and (chosen is release or version is None)  # else it insists on the candidate
        ):
            # Half open: this one tries, and the others wait for what becomes of it.
            slot.open_until = now + self._serving.breaker_seconds
            chosen = release
        if reason != "ok":
            if reason == "breaker_open":  # without time left it was not asked, which is no fault of it
                self._fell_back(slot, release, rows, reason)
            if slot.history is not None:
                noted = slot.history.note(source, rows_of(release.manifest, feeds, rows), now)
            then(self._by_rules(slot, release, release, feeds, rows, reason, now, noted))
            if slot.made_room:
                self._bring_back(slot)
            return
        assert chosen.batcher is not None
        waiting = chosen.batcher.pending_rows
        if waiting and waiting + rows > self._serving.max_pending_rows:
            raise Overloaded(
                f"{waiting} rows wait for model {slot.name!r}, the limit is "
                f"{self._serving.max_pending_rows}; "
                "send less or try again"
            )
        if slot.history is not None:
            noted = slot.history.note(source, rows_of(release.manifest, feeds, rows), now)
        chosen.batcher.add(
            _Request(
                feeds, rows, now, now + limit, then=then, slot=slot, release=chosen, noted=noted,
                fallback=release,
            )
        )  # fmt: skip

    def manifest(self, model: str | None, version: str | None = None) -> Manifest:
        """The manifest of the release that answers.

        Raises:
            UnknownModel: no such model, or another version of it.
            InvalidInput: no name given and there are several models.
            Unavailable: the model is known but nothing of it can be read.
        """
        return self._find(model, version)[1].manifest

    def alarms(self, name: str) -> dict[str, tuple[str, ...]]:
        """The rules' alarms over time that are active, by source; sources without are left out."""
        history = self._slot(name).history
        return history.alarms() if history is not None else {}

    def statuses(self) -> list[ModelStatus]:
        """Every model known here."""
        return [
            ModelStatus(
                slot.name,
                slot.release.manifest.version if slot.release else None,
                slot.release.bundle.digest if slot.release else None,
                slot.state,
                "killed by the assignments" if slot.killed else slot.reason,
                slot.release.manifest.precision if slot.release else "",
                slot.watch.verdict.drifting if slot.watch.verdict else None,
            )
            for slot in self._slots.values()
        ]

    def ready(self) -> bool:
        """Whether there is a model, and every known one can answer, by itself or by its rules."""
        return bool(self._slots) and all(slot.release is not None for slot in self._slots.values())

    # -- the life of a model -------------------------------------------------------------------------------

    async def start(self, name: str, bundle: Bundle | None, spare: Bundle | None = None) -> None:
        """Take up what the store holds: the model if it is intact, else its rules.

        Args:
            name: the model's name.
            bundle: the current release, None if there is none.
            spare: the previous release: its rules answer where even the current ones are unreadable.
        """
        if bundle is None:
            self.degrade(name, "absent", "nothing is installed")
            return
        slot = self._slot(name)
        if slot.state == "rejected":  # said before it was taken up: what failed is not run again
            await self._rules_only(name, [b for b in (bundle, spare) if b], "rejected", slot.reason)
            return
        slot.state = "loading"
        try:
            prepared = await self.prepare(bundle)
        except (ContractError, BadRules) as error:
            await self._rules_only(name, [b for b in (bundle, spare) if b], "corrupt", str(error))
        except EngineError as error:
            await self._rules_only(name, [b for b in (bundle, spare) if b], "failed", str(error))
        else:
            self.swap(prepared)

    async def prepare(self, bundle: Bundle) -> PreparedModel:
        """Verify, load and warm a bundle while the current release goes on answering.

        Raises:
            ContractError: a member is missing or altered, or does not fit the manifest.
            BadRules: its rules cannot be read.
            EngineError: onnxruntime refuses the model.
        """
        started = time.perf_counter()
        stall = asyncio.create_task(longest_stall(), name="stall")
        try:
            loaded = await asyncio.to_thread(
                load, bundle, self._sessions, self._engine, self._drift, self._serving.default_decision
            )
        finally:
            stall.cancel()
            stalled = await stall
        manifest = bundle.manifest
        release = Release(
            bundle,
            manifest,
            loaded.rules,
            self._metrics.for_release(manifest.name, manifest.version),
            engine=loaded.engine,
            detector=loaded.detector,
            load_seconds=time.perf_counter() - started,
            stall_seconds=stalled,
        )
        release.batcher = Batcher(
            loaded.engine,
            max_rows=self._engine.max_batch_rows,
            joinable=tensors.batchable(manifest.inputs, manifest.outputs),
            inline=loaded.inline,
            finish=self._finish,
            observe_rows=release.metrics.batch,
            delay=self._engine.batch_delay_us * 1e-6,
        )
        return release

    def swap(self, prepared: PreparedModel) -> None:
        """Let a prepared release answer from now on; requests in flight finish on the one before."""
        name = prepared.manifest.name
        slot = self._slot(name)
        self.end_split(name)
        if slot.release is not None and slot.release.bundle.digest != prepared.bundle.digest:
            slot.before = self.served(name)
        before, slot.release = slot.release, prepared
        slot.failures, slot.open_until = 0, 0.0
        slot.rows = slot.fallback_rows = slot.late_rows = slot.non_finite_rows = slot.failed_rows = 0
        slot.latencies_before = tuple(prepared.metrics.latencies)
        slot.watch.end()
        slot.watch = DriftWatch(name, self._metrics)
        self._remember(slot, prepared.rules)
        self._say(slot, "ready", "")
        self._metrics.model_info(name, prepared.manifest.version, prepared.bundle.digest)
        self._metrics.model_loaded(name, prepared.load_seconds)
        self._metrics.serving_gap(name, prepared.stall_seconds)
        retire(before)
        slot.loaded, slot.made_room = time.monotonic(), False
        self._make_room(slot, prepared.manifest)

    def degrade(self, name: str, state: State, reason: str) -> None:
        """The model cannot answer from now on; its rules do."""
        slot = self._slot(name)
        slot.made_room = False
        before = slot.release
        if before is not None:
            slot.release = Release(before.bundle, before.manifest, before.rules, before.metrics)
            retire(before)
        self._say(slot, state, reason)
        log.warning("model %s: %s: %s", name, state, reason)

    async def load(self, name: str, bundle: Bundle) -> None:
        """Load a bundle again after ``unload`` or a fault; on failure the rules answer, the reason is kept.

        Raises:
            ContractError, BadRules, EngineError: as ``prepare``.
        """
        try:
            prepared = await self.prepare(bundle)
        except (ContractError, BadRules) as error:
            if self._slot(name).state != "ready":
                self.degrade(name, "corrupt", str(error))
            raise
        except EngineError as error:
            if self._slot(name).state != "ready":
                self.degrade(name, "failed", str(error))
            raise
        self.swap(prepared)

    def unload(self, name: str) -> None:
        """Free the model's memory; its rules answer until it is loaded again.

        Raises:
            UnknownModel: no such model.
        """
        self._find(name, None)
        self.degrade(name, "unloaded", "unloaded by an operator")

    def set_killed(self, name: str, killed: bool) -> None:
        """The signed kill switch: the rules answer whatever the model could do."""
        slot = self._slot(name)
        if slot.killed != killed:
            slot.killed = killed
            log.warning("model %s: kill switch %s", name, "on" if killed else "off")

    def served(self, name: str) -> Served:
        """What the current release has answered since it was swapped in."""
        slot = self._slot(name)
        now = slot.release.metrics.latencies if slot.release else ()
        since = slot.latencies_before or (0,) * len(now)
        return Served(
            slot.rows, slot.fallback_rows, slot.non_finite_rows, slot.failed_rows,
            tuple(count - then for count, then in zip(now, since, strict=False)),
            tuple(slot.watch.scores.tolist()),
            slot.late_rows,
        )  # fmt: skip

    def served_before(self, name: str) -> Served | None:
        """What the release before the current one had answered when it was replaced; None if unknown."""
        return self._slot(name).before

    def shadow(self, prepared: PreparedModel, share: float) -> None:
        """Let a prepared release see a share of the requests that the model answers, and answer none."""
        assert prepared.engine is not None
        slot = self._slot(prepared.manifest.name)
        if slot.shadow is not None or slot.split is not None:
            raise RuntimeError(f"model {slot.name}: there is a candidate already")
        slot.shadow = Shadow(prepared.manifest, prepared.engine, share)
        if slot.release is not None:
            self._make_room(slot, slot.release.manifest)

    def shadow_report(self, name: str) -> ShadowReport:
        """How the shadow does; all zero where there is none."""
        shadow = self._slot(name).shadow
        return shadow.report() if shadow else ShadowReport()

    async def end_shadow(self, name: str) -> None:
        """Stop looking. The prepared release is the caller's again, to ``swap`` or to forget."""
        slot = self._slot(name)
        shadow, slot.shadow = slot.shadow, None
        if shadow is not None:
            await shadow.stop()

    def split(self, prepared: PreparedModel, share: float) -> None:
        """Let a prepared release answer a sticky share of the requests; ``swap`` ends it.

        Raises:
            EngineError: it takes or gives something else than the release that it would stand beside.
        """
        slot = self._slot(prepared.manifest.name)
        if slot.release is None or slot.split is not None or slot.shadow is not None:
            raise RuntimeError(f"model {slot.name}: nothing to stand beside, or somebody does already")
        if why := why_not_beside(slot.release.manifest, prepared.manifest):
            raise EngineError(f"model {slot.name} {prepared.manifest.version} cannot answer a share: {why}")
        slot.split = Split(
            prepared,
            str(prepared.manifest.version),
            share,
            prepared.bundle.digest.encode(),
            self.served(slot.name),
            tuple(prepared.metrics.latencies),
            prepared.detector,
        )
        prepared.detector = None  # drift is judged on the rows of one release
        self._make_room(slot, slot.release.manifest)
        self._metrics.split_share(slot.name, slot.split.version, share)
        log.info("model %s: %s answers %.3g of the requests", slot.name, prepared.manifest.version, share)

    def split_report(self, name: str) -> SplitReport | None:
        """How a candidate and the release beside it do; None where there is no split."""
        slot = self._slots.get(name)
        if slot is None or slot.split is None:
            return None
        return slot.split.report(self.served(name), tuple(slot.split.release.metrics.latencies))

    def end_split(self, name: str) -> SplitReport | None:
        """Let the candidate answer nothing more; it is the caller's again, to ``swap`` or to forget."""
        slot = self._slot(name)
        report, split = self.split_report(name), slot.split
        if split is not None:
            slot.split = None
            split.release.detector = split.kept
            self._metrics.split_share(name, split.version, None)
        return report

    def forget(self, prepared: PreparedModel) -> None:
        """Free a prepared release that will not be swapped in, once it has answered what it was asked."""
        retire(prepared)

    def timings(self, name: str) -> Timings:
        """Where the time of what the current release computed went."""
        release = self._slots[name].release if name in self._slots else None
        return release.batcher.timings if release is not None and release.batcher is not None else Timings()

    def running(self, name: str) -> str | None:
        """The digest of the release whose model answers; None if the rules do."""
        slot = self._slots.get(name)
        if slot is None or slot.release is None or slot.state != "ready":
            return None
        return slot.release.bundle.digest

    async def watch_drift(self, interval: float = 1.0) -> None:
        """Look at a bounded sample of the answered rows, off the hot path, for ever."""
        while True:
            await asyncio.sleep(interval)
            for slot in list(self._slots.values()):
                release = slot.release
                if release is None:
                    continue
                try:
                    await slot.watch.look(release.detector, release.manifest.decision)
                except Exception:  # whatever it is: watching must not take answering along
                    log.exception("model %s: drift cannot be judged", slot.name)

    # -- inside --------------------------------------------------------------------------------------------

    def _staying(self, slot: _Slot, coming: Manifest) -> list[Manifest]:
        """What stays in memory with a model that comes: candidates, and what each is compared with."""
        staying = [coming]
        for other in self._slots.values():
            if other.candidate is not None:
                staying.append(other.candidate)
                if other is not slot and other.release is not None and other.release.engine is not None:
                    staying.append(other.release.manifest)
        return staying

    def _in_the_way(self, slot: _Slot, coming: Manifest) -> list[_Slot]:
        """Who must leave for a model of this slot."""
        others = [
            Tenant(other.name, other.release.manifest, other.asked)
            for other in self._slots.values()
            if other is not slot
            and other.candidate is None
            and other.release is not None
            and other.release.engine is not None
        ]
        leaving = who_leaves(self._budget, self._staying(slot, coming), others)
        return [self._slots[name] for name in leaving]

    def _make_room(self, slot: _Slot, coming: Manifest) -> None:
        for other in self._in_the_way(slot, coming):
            self.degrade(other.name, "unloaded", f"made room for {slot.name}, comes back when it is asked")
            other.made_room = True

    def _bring_back(self, slot: _Slot) -> None:
        """Load a model that had made room, off the loop; nobody leaves who came a moment ago."""
        release = slot.release
        if release is None:
            return
        staying = self._staying(slot, release.manifest)
        if len(staying) > 1 and not fits(self._budget, staying):
            return  # a candidate has its place, until it is judged
        now = time.monotonic()
        others = self._in_the_way(slot, release.manifest)
        if any(now - other.loaded < self._engine.stay_seconds for other in others):
            return  # two that do not fit together would only load and never answer
        slot.made_room = False

        async def load(bundle: Bundle) -> None:
            try:
                prepared = await self.prepare(bundle)
                # Meanwhile another release may have been swapped in, or an operator has unloaded it.
                if slot.release is release and slot.state == "unloaded":
                    self.swap(prepared)
            except (ContractError, BadRules) as error:
                self.degrade(slot.name, "corrupt", str(error))
            except EngineError as error:
                self.degrade(slot.name, "failed", str(error))

        task = asyncio.get_running_loop().create_task(load(release.bundle), name=f"load {slot.name}")
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            self._slots[name] = _Slot(name, DriftWatch(name, self._metrics))
        return self._slots[name]

    def _find(self, model: str | None, version: str | None) -> tuple[_Slot, Release]:
        if model is None:
            if len(self._slots) != 1:
                known = ", ".join(self._slots) or "none"
                raise (InvalidInput if self._slots else UnknownModel)(
                    f"model: name one, this agent serves {known}"
                )
            slot = next(iter(self._slots.values()))
        elif model in self._slots:
            slot = self._slots[model]
        else:
            raise UnknownModel(
                f"no model {model[:80]!r} here, this agent serves {', '.join(self._slots) or 'none'}"
            )
        release = slot.release
        if release is None:
            raise Unavailable(f"model {slot.name!r} is {slot.state}: {slot.reason or 'try again shortly'}")
        if version is not None and version != release.manifest.version:
            if slot.split is not None and version == slot.split.version and not slot.split.ended:
                return slot, slot.split.release
            raise UnknownModel(
                f"model {slot.name!r} has no version {version[:80]!r} here, it is {release.manifest.version}"
            )
        return slot, release

    def _remember(self, slot: _Slot, rules: RuleSet) -> None:
        """These rules answer from now on: with what the ones before remembered, as far as it fits."""
        if slot.history is not None:
            slot.history.adopt(rules)
        if not rules.stateful:
            slot.history = None
        elif slot.history is None:
            slot.history = History(rules, self._serving.max_sources)

    def _say(self, slot: _Slot, state: State, reason: str) -> None:
        slot.state, slot.reason = state, reason
        self._metrics.model_state(slot.name, state)

    async def _rules_only(self, name: str, bundles: list[Bundle], state: State, reason: str) -> None:
        """The first bundle whose rules can be read answers; the last resort is the configured constant."""
        for bundle in bundles:
            try:
                rules = await asyncio.to_thread(read_rules, bundle, self._serving.default_decision)
            except (ContractError, BadRules) as error:
                log.warning("rules of %s %s cannot be used: %s", name, bundle.manifest.version, error)
                continue
            break
        else:
            bundle = bundles[0]
            rules = constant(self._serving.default_decision, features(bundle.manifest))
        manifest = bundle.manifest
        metrics = self._metrics.for_release(name, manifest.version)
        slot = self._slot(name)
        slot.release = Release(bundle, manifest, rules, metrics)
        self._remember(slot, rules)
        self._metrics.model_info(name, manifest.version, bundle.digest)
        self.degrade(name, state, reason)

    def _finish(self, pending: list[Pending], result: Feeds | EngineError | None) -> None:
        requests = cast("list[_Request]", pending)
        slot, release = requests[0].slot, requests[0].release
        if result is None:
            self._fault(slot, release, late=True)
            for request in requests:
                self._give_up(request, "deadline")
        elif isinstance(result, EngineError):
            if slot.failures == 0:
                log.warning("model %s %s: %s", slot.name, release.manifest.version, result)
            self._fault(slot, release, late=False)
            for request in requests:
                self._give_up(request, "model_error")
        else:
            if slot.failures and slot.release is release:
                slot.failures, slot.open_until = 0, 0.0
            try:
                self._by_model(slot, release, requests, result)
            except Exception as error:  # a fault of ours: whoever was not told yet must not wait for ever
                log.exception("model %s: answers were lost", slot.name)
                for request in requests:
                    if not request.told:
                        request.told = True
                        request.then(error)

    def _fault(self, slot: _Slot, release: Release, *, late: bool) -> None:
        """The engine raised, or was late: once for all requests it was late for in one turn of the loop."""
        if slot.release is release:
            slot.late = late
            slot.failures += 1
            if slot.failures >= self._serving.breaker_failures:
                # Half open after this time: one request tries, and its failure opens it again.
                slot.open_until = time.monotonic() + self._serving.breaker_seconds
        elif (
            (split := slot.split) is not None
            and split.release is release
            and not (late and slot.failures)  # where both are late it is the machine that is busy
            and split.fault(self._serving.breaker_failures)
        ):
            self._metrics.split_share(slot.name, split.version, 0.0)
            log.warning(
                "model %s: %s failed %d times in a row, it answers nothing more",
                slot.name, split.version, split.failures,
            )  # fmt: skip

    def _give_up(self, request: _Request, reason: str) -> None:
        slot = request.slot
        request.told = True
        self._fell_back(slot, request.release, request.rows, reason)
        try:
            answer: Answer | Exception = self._by_rules(
                slot, request.fallback, request.release, request.feeds, request.rows, reason,
                request.started, request.noted,
            )  # fmt: skip
        except Exception as error:
            log.exception("model %s: its rules failed", slot.name)
            answer = error
        request.then(answer)

    def _fell_back(self, slot: _Slot, asked: Release, rows: int, reason: str) -> None:
        """The rules answer through a fault of the model that was asked."""
        if slot.release is asked:
            slot.fallback_rows += rows
            if reason == "non_finite":
                slot.non_finite_rows += rows
            elif reason == "deadline" or (reason == "breaker_open" and slot.late):
                slot.late_rows += rows
        elif slot.split is not None and slot.split.release is asked:
            slot.split.fell_back(rows, reason)

    def _by_model(self, slot: _Slot, release: Release, requests: list[_Request], outputs: Feeds) -> None:
        """Answer the requests of one batch; what costs a microsecond a call is done once for all of them."""
        manifest, decision = release.manifest, release.manifest.decision
        values: list[float] | None = None
        if decision is not None:
            column = outputs[decision.output].ravel()
            values = (column if column.dtype.kind == "f" else column.astype(np.float64)).tolist()
            if not math.isfinite(sum(values)) and not all(map(math.isfinite, values)):
                # The rows' fault as often as the model's: it does not open the breaker, it is counted.
                for request in requests:
                    if not all(map(math.isfinite, values[request.begin : request.begin + request.rows])):
                        self._give_up(request, "non_finite")
                requests = [request for request in requests if not request.told]
        if not requests:
            return
        now = time.monotonic()
        rows = failed_rows = 0
        answers = []
        seconds = []
        # Plain strings: the encoder would ask what a Version is, at every answer.
        name, version, digest = manifest.name, str(manifest.version), str(release.bundle.digest)
        for request in requests:
            begin, end = request.begin, request.begin + request.rows
            rows += request.rows
            took = now - request.started
            seconds.append(took)
            scores = values[begin:end] if request.joined and values is not None else values
            if scores is not None and decision is not None:
                failed_rows += [fails(score, decision) for score in scores].count(True)
            answers.append(Answer(
                name, version, digest, "model", "ok",
                {key: value[begin:end] for key, value in outputs.items()} if request.joined else outputs,
                scores, decision, took,
            ))  # fmt: skip
        if slot.release is release:
            slot.rows += rows
            slot.failed_rows += failed_rows
            if slot.shadow is not None:
                for request, answer in zip(requests, answers, strict=True):
                    slot.shadow.offer(request.feeds, request.rows, answer.failed, answer.seconds)
        elif slot.split is not None and slot.split.release is release:
            slot.split.answered(rows, failed_rows)
        release.metrics.all_answered("ok", rows, failed_rows, seconds)
        watched = release.detector is not None and decision is not None
        for request, answer in zip(requests, answers, strict=True):
            request.told = True
            request.then(answer)
            if watched and slot.watch.waiting < self._drift.max_rows_per_second:
                slot.watch.offer(next(iter(request.feeds.values())), np.array(answer.scores))

    def _by_rules(
        self,
        slot: _Slot,
        release: Release,
        asked: Release,
        feeds: Feeds,
        rows: int,
        reason: str,
        started: float,
        noted: Noted | None,
    ) -> Answer:
        """Answer from the rules of ``release``; it counts as an answer of the one that was ``asked``."""
        manifest = release.manifest
        decision = manifest.decision
        outputs: dict[str, Tensor] = {}
        values: list[float] | None = None
        failed_rows = 0
        if decision is not None:
            if noted is None:
                judged = release.rules.evaluate(rows_of(manifest, feeds, rows)).score
            else:
                judged = noted.history.judge(noted)
            scores = on_the_models_scale(judged, decision)
            values = scores.tolist()
            failed_rows = int(np.count_nonzero(judged > 1.0))
            spec = next(output for output in manifest.outputs if output.name == decision.output)
            shape = (rows, *(1 for _ in spec.shape[1:]))
            outputs[spec.name] = scores.astype(tensors.numpy_dtype(spec.datatype)).reshape(shape)
        seconds = time.monotonic() - started
        asked.metrics.answered(reason, rows, failed_rows, seconds)
        if slot.release is asked:
            slot.rows += rows
        elif slot.split is not None and slot.split.release is asked:
            slot.split.rows += rows
        return Answer(
            manifest.name, manifest.version, release.bundle.digest, "fallback", reason,
            outputs, values, decision, seconds,
        )  # fmt: skip


class _Request(Pending, eq=False, kw_only=True):
    """A pending request, and where its answer goes."""

    then: Then
    slot: _Slot
    release: Release
    fallback: Release  # whose rules answer if it cannot: the same, but for a candidate
    noted: Noted | None  # by the rules' history, where they have one
    told: bool = False


def _inside(deadline: float) -> float:
    """How long the model may take, so that somebody answers inside the deadline."""
    return deadline - min(deadline * _RESERVED_SHARE, _MOST_RESERVED)
