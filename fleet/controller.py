"""The roll-out controller: observe -> decide (pure) -> act, one step at a time.

Invariants:

- ``decide`` is pure: record, observation and inventory in, decision out; everything it needs survives in the
  record, so any controller can go on where another stopped;
- the record is written before what it wants is signed, and ``wanted`` computes the assignments from the
  record alone: a crash in between is repaired by the next step;
- every decision is one git commit with its evidence;
- the abort rules are live in every phase in which a device runs the candidate, Paused included;
- unreachable is never failed, and never success.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from edge_agent.contract.assignments import Assignments, Candidate, Release
from edge_agent.contract.version import Version
from fleet import analysis, measure, release, status
from fleet.analysis import AnalysisPhase, Measurement, MetricState
from fleet.errors import MeasurementError, RolloutError
from fleet.folder import Fleet, refuse_open
from fleet.inventory import Device
from fleet.machine import FINAL, RUNNING, Event, Phase, advance, allowed
from fleet.measure import BAD_RESULTS, Reading, Sample, Source
from fleet.plan import plan
from fleet.status import Entry, Evidence, Record


@dataclass(frozen=True, slots=True)
class Observation:
    """What one look at the fleet showed."""

    at: float
    readings: Mapping[str, Reading] = field(default_factory=dict)
    samples: Mapping[str, Sample] = field(default_factory=dict)  # devices with two readings under one digest
    compared: bool = False  # there was an earlier look to compare with
    problem: str = ""  # the source could not be asked


@dataclass(frozen=True, slots=True)
class Decision:
    """The record as it should be, and what moved it, if anything."""

    record: Record
    event: Event | None
    reason: str
    evidence: Evidence


def decide(record: Record, seen: Observation, devices: Collection[str]) -> Decision:
    """What to do about a roll-out. Pure.

    Args:
        record: the roll-out as it stands.
        seen: the devices as they stand; its ``at`` is the only clock.
        devices: ids of the inventory.
    """
    members, others = _split(record, devices)
    if seen.problem:
        # Blind: nothing is concluded about devices, but the metrics count the error.
        if record.phase in RUNNING:
            record = _measure(record, seen, [], [])
        return _judged(record, seen, Evidence(wave=_wave_name(record)), f"cannot measure: {seen.problem}")
    reachable = [device for device in members if _reading(seen, device).reachable]
    unreachable = tuple(device for device in members if device not in reachable)
    target = record.stable if record.phase is Phase.ROLLING_BACK else record.candidate
    waiting = tuple(device for device in reachable if seen.readings[device].digest != target.digest)
    evidence = Evidence(
        wave=_wave_name(record),
        running=len(reachable) - len(waiting),
        waiting=waiting,
        unreachable=unreachable,
    )
    match record.phase:
        case Phase.PENDING:
            record = replace(record, baseline=_bad_results(seen))
            first = record.plan.waves[0]
            reason = f"{record.candidate.version} first on {first.devices}: {_some(record.plan.canary)}"
            return Decision(record, Event.STARTED, reason, evidence)
        case Phase.PROGRESSING | Phase.PAUSED | Phase.PROMOTING:
            record = _note_failures(record, seen, reachable)
            within = len(unreachable) <= record.policy.max_unreachable * len(members)
            if record.bake_since is None and not waiting and within and members:
                record = replace(record, bake_since=seen.at)
            record = _measure(record, seen, members, others)
            waits = _say_waiting(record, evidence, len(members))
            return _judged(record, seen, evidence, waits)
        case Phase.ROLLING_BACK:
            late = seen.at - record.phase_since > record.policy.progress_deadline_seconds
            if waiting or (unreachable and not late):
                return Decision(record, None, _say_waiting(record, evidence, len(members)), evidence)
            reason = f"{len(reachable)} devices run {record.stable.version} again"
            if unreachable:
                reason += f"; unreachable, they follow when they return: {_some(unreachable)}"
            return Decision(record, Event.STOPPED if record.stopped else Event.RESTORED, reason, evidence)
        case _:
            return Decision(record, None, record.reason, evidence)


def wanted(document: Assignments, record: Record) -> Assignments:
    """The assignments that ``record`` wants. Pure; the same document where they say so already."""
    match record.phase:
        case Phase.PROGRESSING | Phase.PAUSED | Phase.PROMOTING:
            cohort = record.plan.cohort(record.id, record.wave)
            candidate = Candidate(record.candidate, cohort, rollout=record.id)
            return release.with_candidate(document, record.model, candidate)
        case Phase.SUCCEEDED:
            return release.with_stable(document, record.model, record.candidate)
        case Phase.ROLLING_BACK | Phase.ROLLED_BACK | Phase.ABORTED:
            return release.without_candidate(document, record.model)
        case Phase.PENDING:
            return document


def moved(record: Record, event: Event, reason: str, evidence: Evidence, at: float) -> Record:
    """The record after ``event``. Pure.

    Raises:
        KeyError: the table does not allow it: our bug.
    """
    phase = advance(record.phase, event)
    wave = record.wave
    if event is Event.WIDENED:
        wave += 1
    elif phase is Phase.PROMOTING:
        wave = len(record.plan.waves) - 1
    if event in {Event.WIDENED, Event.COVERED, Event.PROMOTED, Event.RESUMED, Event.STARTED}:
        # A new stretch of the roll-out: its own clock and its own measurements.
        record = replace(record, wave_since=at, bake_since=None, metrics={})
    return replace(
        record,
        phase=phase,
        wave=wave,
        reason=reason,
        phase_since=record.phase_since if phase is record.phase else at,
        stopped=record.stopped or event is Event.ABORTED,
        history=(*record.history, Entry(status.stamp(at), event, phase, reason, evidence)),
    )


def _split(record: Record, devices: Collection[str]) -> tuple[list[str], list[str]]:
    """Devices of the present wave, and those outside it."""
    cohort = record.plan.cohort(record.id, record.wave)
    free = [device for device in devices if device not in record.held]
    if record.phase is Phase.PENDING:
        return [], free
    return [d for d in free if d in cohort], [d for d in free if d not in cohort]


def _reading(seen: Observation, device: str) -> Reading:
    return seen.readings.get(device) or Reading(seen.at, reachable=False, problem="not read")


def _wave_name(record: Record) -> str:
    return record.plan.waves[record.wave].name


def _bad_results(seen: Observation) -> dict[str, float]:
    """Bad results so far, of devices that have any."""
    return {device: one.bad_results for device, one in seen.readings.items() if one.bad_results}


def _note_failures(record: Record, seen: Observation, reachable: Sequence[str]) -> Record:
    """Devices that refused the candidate, went back from it, or never took it."""
    failed, baseline = dict(record.failed), dict(record.baseline)
    limit = record.policy.in_progress_timeout_seconds
    for device in reachable:
        one = seen.readings[device]
        before = baseline.get(device, 0.0)
        if one.bad_results < before:  # the agent restarted: its counters begin again
            before = baseline[device] = one.bad_results
        if device in failed:
            continue
        if one.bad_results > before:
            kinds = [result for result in BAD_RESULTS if one.results.get(result)]
            failed[device] = f"the device itself refused or took back the candidate ({', '.join(kinds)})"
        elif (
            one.digest != record.candidate.digest
            and one.state != "held"  # the device says: not now
            and seen.at - record.wave_since > limit
        ):
            failed[device] = (
                f"runs {one.version or 'nothing'} {limit:.0f} s after it was assigned "
                f"{record.candidate.version} (update state {one.state or 'unknown'})"
            )
    return replace(record, failed=failed, baseline=baseline)


def _measure(record: Record, seen: Observation, members: Sequence[str], others: Sequence[str]) -> Record:
    """Take one measurement of every metric, if this is the time for it."""
    settings = record.policy.analysis
    counting = record.bake_since is not None and seen.at >= record.bake_since + settings.initial_delay_seconds
    # The canary warms up unjudged; later waves are judged while they widen, on the devices that run it.
    if not (counting or record.wave > 0) or not (seen.compared or seen.problem):
        return record
    tested = [
        seen.samples[d]
        for d in members
        if d in seen.samples and seen.samples[d].digest == record.candidate.digest
    ]
    control = [
        seen.samples[d]
        for d in others
        if d in seen.samples and seen.samples[d].digest == record.stable.digest
    ]
    metrics, references = dict(record.metrics), dict(record.references)
    for config in settings.metrics:
        if seen.problem:
            measurement = analysis.failed_measurement(config, seen.problem)
        else:
            measurement = analysis.judge(config, tested, control, references.get(config.name))
        if measurement.controls and measurement.control is not None:
            references[config.name] = measurement.control
        state = metrics.get(config.name, MetricState())
        metrics[config.name] = analysis.advance(config, state, measurement, counting=counting)
    return replace(record, metrics=metrics, references=references)


def _judged(record: Record, seen: Observation, evidence: Evidence, waits: str) -> Decision:
    """Abort rules first, then what the phase waits for."""
    evidence = replace(evidence, failed=record.failed, metrics=record.metrics)
    if record.phase not in RUNNING:
        return Decision(record, None, waits or record.reason, evidence)
    if len(record.failed) > record.policy.max_failed:
        device, why = sorted(record.failed.items())[0]
        reason = f"{len(record.failed)} failed devices, allowed {record.policy.max_failed}; {device}: {why}"
        return Decision(record, Event.FAILED, reason, evidence)
    overall, worst = _overall(record)
    if overall is AnalysisPhase.FAILED:
        return Decision(record, Event.FAILED, worst.explanation if worst else "analysis failed", evidence)
    if record.phase is Phase.PAUSED:
        return Decision(record, None, record.reason, evidence)
    if record.phase is Phase.PROMOTING and not waits:
        reason = f"{evidence.running} devices run {record.candidate.version}"
        return Decision(record, Event.CONVERGED, reason, evidence)
    if overall in {AnalysisPhase.INCONCLUSIVE, AnalysisPhase.ERROR} and record.phase is Phase.PROGRESSING:
        why = worst.explanation if worst else "no measurement"
        return Decision(record, Event.INCONCLUSIVE, f"analysis {overall.value}: {why}", evidence)
    if record.phase is Phase.PROGRESSING and not waits and overall is AnalysisPhase.SUCCESSFUL:
        last = record.wave + 2 >= len(record.plan.waves)
        reason = f"wave {evidence.wave} is good: {evidence.running} devices, {_say_metrics(record)}"
        return Decision(record, Event.COVERED if last else Event.WIDENED, reason, evidence)
    late = seen.at - record.wave_since
    if late > record.policy.progress_deadline_seconds:
        reason = f"not decided after {late:.0f} s: {waits or f'analysis {overall.value}'}; a person decides"
        return Decision(record, Event.INCONCLUSIVE, reason, evidence)
    return Decision(record, None, waits or _say_metrics(record), evidence)


def _overall(record: Record) -> tuple[AnalysisPhase, Measurement | None]:
    """The worst metric decides. Before the first measurement of a metric the analysis is Pending."""
    settings = record.policy.analysis
    judged = [
        (analysis.phase(config, record.metrics.get(config.name, MetricState()), settings.count), config.name)
        for config in settings.metrics
        if not config.dry_run
    ]
    overall = analysis.worst(one for one, _ in judged)
    for one, name in judged:
        if one is overall:
            return overall, record.metrics.get(name, MetricState()).last
    return overall, None


def _say_waiting(record: Record, evidence: Evidence, members: int) -> str:
    """What the wave still waits for; nothing if it runs what it should."""
    parts = []
    version = record.stable.version if record.phase is Phase.ROLLING_BACK else record.candidate.version
    if evidence.waiting:
        parts.append(f"{evidence.running} of {members} run {version}, waiting for {_some(evidence.waiting)}")
    if evidence.unreachable and (
        record.phase is Phase.ROLLING_BACK
        or len(evidence.unreachable) > record.policy.max_unreachable * members
    ):
        parts.append(f"unreachable: {_some(evidence.unreachable)}")
    return "; ".join(parts)


def _say_metrics(record: Record) -> str:
    settings = record.policy.analysis
    if not record.metrics:
        return "warming up" if settings.metrics else "no metrics"
    parts = []
    for config in settings.metrics:
        state = record.metrics.get(config.name, MetricState())
        value = f" {state.last.value:.3g}" if state.last and state.last.value is not None else ""
        parts.append(f"{config.name}{value} {min(state.passes, settings.count)}/{settings.count}")
    return ", ".join(parts)


def _some(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def start(
    fleet: Fleet, model: str, version: Version, *, again: bool = False, now: float | None = None
) -> Record:
    """Record a new roll-out and sign its first wave.

    Raises:
        RolloutError: one is open, there is nothing to replace, or this release was rolled back before and
            ``again`` is not set.
        RepositoryError: the release is not published.
    """
    at = time.time() if now is None else now
    with fleet.folder.locked():
        refuse_open(fleet, model)
        candidate = fleet.repository.release(model, version)
        document = fleet.repository.assignments()
        entry = document.models.get(model)
        if entry is None or entry.stable is None:
            raise RolloutError(
                f"{model} has no stable release to fall back to; use edge-fleet publish --stable"
            )
        if entry.stable == candidate:
            raise RolloutError(f"{model} {version} is the stable release already")
        earlier = [one for one in status.records(fleet.folder.rollouts) if one.model == model]
        for one in earlier:
            if one.candidate == candidate and one.phase is Phase.ROLLED_BACK and not again:
                raise RolloutError(
                    f"{model} {version} was rolled back by {one.id} ({one.reason}); --again tries it again"
                )
        number = 1 + sum(one.candidate.version == version for one in earlier)
        rollout = f"{model}-{version}-{number}"
        free = [device for device in fleet.devices() if device.id not in entry.held]
        policy = fleet.config.policy
        record = Record(
            id=rollout,
            model=model,
            candidate=candidate,
            stable=entry.stable,
            policy=policy,
            plan=plan(rollout, free, policy),
            phase=Phase.PENDING,
            reason="recorded",
            started=at,
            phase_since=at,
            wave_since=at,
            held=entry.held,
        )
        status.save(fleet.folder.rollouts, record)
        fleet.commit(
            f"{model} {version}: roll-out recorded",
            "\n".join(record.plan.reasons),
            {"Rollout-Id": rollout, "Phase": record.phase.value, "Reason": record.reason},
        )
        return record


def command(fleet: Fleet, rollout: str, event: Event, reason: str, now: float | None = None) -> Record:
    """A person's decision: pause, resume, promote, abort.

    Raises:
        RolloutError: it makes no sense in the present phase.
    """
    at = time.time() if now is None else now
    with fleet.folder.locked():
        record = status.load(fleet.folder.rollouts, rollout)
        if not allowed(record.phase, event):
            raise RolloutError(f"roll-out {rollout} is {record.phase.value}: it cannot be {event.value} now")
        evidence = Evidence(wave=_wave_name(record), failed=record.failed, metrics=record.metrics)
        return _act(fleet, Decision(record, event, reason, evidence), at)


def previous_stable(fleet: Fleet, model: str) -> Release:
    """What the stable release of ``model`` replaced, by the records.

    Raises:
        RolloutError: no roll-out brought the present one.
    """
    current = release.stable(fleet.repository.assignments(), model)
    for record in reversed(status.records(fleet.folder.rollouts)):
        if record.model == model and record.phase is Phase.SUCCEEDED and record.candidate == current:
            return record.stable
    what = f"{model} {current.version}" if current else f"{model}, which has no stable release,"
    raise RolloutError(f"no roll-out replaced anything with {what}; say where to go with --to VERSION")


class Controller:
    """Steps one roll-out. Keeps the last readings in memory, everything else in the record."""

    def __init__(
        self, fleet: Fleet, source: Source | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._fleet = fleet
        self._source = source or fleet.source()
        self._clock = clock
        self._last: dict[str, Reading] = {}

    def step(self, rollout: str) -> Record:
        """Look, decide, act; returns the record as it is now.

        Raises:
            FleetError: the fleet folder, git or the keys stand in the way; the next step tries again.
        """
        record = status.load(self._fleet.folder.rollouts, rollout)
        devices = self._fleet.devices()
        seen = self._observe(devices, record.model)
        with self._fleet.folder.locked():
            record = status.load(self._fleet.folder.rollouts, rollout)  # a person may have decided meanwhile
            decision = decide(record, seen, [device.id for device in devices])
            return _act(self._fleet, decision, seen.at)

    def run(self, rollout: str, wait: Callable[[float], object] = time.sleep) -> Iterator[Record]:
        """Step until the roll-out is settled, ``interval_seconds`` between the starts of two steps."""
        while True:
            began = time.monotonic()
            record = self.step(rollout)
            yield record
            if record.settled:
                return
            left = began + record.policy.interval_seconds - time.monotonic()
            if record.phase is not Phase.PENDING and left > 0:
                wait(left)

    def _observe(self, devices: Sequence[Device], model: str) -> Observation:
        try:
            readings = self._source.read(devices, model)
        except MeasurementError as error:
            return Observation(self._clock(), problem=str(error))
        at = self._clock()
        samples = {}
        for device, after in readings.items():
            before = self._last.get(device)
            sample = measure.between(device, before, after) if before else None
            if sample is not None:
                samples[device] = sample
        compared = bool(self._last)
        for device, after in readings.items():
            before = self._last.get(device)
            # Prometheus may not have scraped since: the older reading stays the one to compare with.
            if before is None or after.at > before.at or not after.reachable:
                self._last[device] = after
        return Observation(at, readings, samples, compared)


def _act(fleet: Fleet, decision: Decision, at: float) -> Record:
    """Write, sign, commit. Nothing is signed or committed when nothing changed."""
    record = decision.record
    if decision.event is not None:
        record = moved(record, decision.event, decision.reason, decision.evidence, at)
    else:
        record = replace(record, reason=decision.reason or record.reason)
    status.save(fleet.folder.rollouts, record)
    document = fleet.repository.assignments()
    changed = wanted(document, record)
    if changed is not document:
        fleet.repository.assign(changed)
    if record.phase in FINAL and not record.settled:
        record = replace(record, settled=True)
        status.save(fleet.folder.rollouts, record)
    if decision.event is not None or changed is not document:
        fleet.commit(
            f"{record.model} {record.candidate.version}: {record.phase.value}",
            f"{record.reason}\n\nEvidence: rollouts/{record.id}.json",
            {"Rollout-Id": record.id, "Phase": record.phase.value, "Reason": record.reason},
        )
    return record
