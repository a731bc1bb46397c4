"""What the controller decides, as data: a record and what was seen in, an event and its reason out."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from edge_agent.contract.assignments import Assignments, ModelAssignment, Release
from edge_agent.contract.digest import Digest
from edge_agent.contract.version import Version
from fleet.config import AnalysisConfig, CanaryConfig, MetricConfig, Policy
from fleet.controller import Decision, Observation, decide, moved, wanted
from fleet.inventory import Device
from fleet.machine import Event, Phase
from fleet.measure import Reading, Sample
from fleet.plan import plan
from fleet.status import Evidence, Record

OLD = Release(Version("1.0.0"), Digest.of_bytes(b"old"))
NEW = Release(Version("2.0.0"), Digest.of_bytes(b"new"))
OTHER = Release(Version("0.9.0"), Digest.of_bytes(b"other"))
DEVICES = [f"d{number}" for number in range(8)]
POLICY = Policy(
    canary=CanaryConfig(devices=2),
    waves=(0.6,),
    max_unreachable=0.5,
    in_progress_timeout_seconds=60,
    progress_deadline_seconds=300,
    analysis=AnalysisConfig(
        initial_delay_seconds=10,
        count=2,
        metrics=(
            MetricConfig(name="fallback_ratio", failure_above=0.05, inconclusive_limit=1),
            MetricConfig(name="fail_ratio", compare="control", allowed_increase=0.1, inconclusive_limit=1),
        ),
    ),
)


def record(phase: Phase = Phase.PROGRESSING, policy: Policy = POLICY, **changes: object) -> Record:
    made = Record(
        id="r-1",
        model="pump",
        candidate=NEW,
        stable=OLD,
        policy=policy,
        plan=plan("r-1", [Device(id=device) for device in DEVICES], policy),
        phase=phase,
        reason="",
        started=0.0,
        phase_since=0.0,
        wave_since=0.0,
    )
    return replace(made, **changes)


CANARY = record().plan.canary
A, B = CANARY
WIDER = [device for device in DEVICES if device in record().plan.cohort("r-1", 1)]


def reading(release: Release | None, state: str = "committed", **results: float) -> Reading:
    version, digest = (release.version, release.digest) if release else ("", "")
    return Reading(0.0, reachable=True, version=version, digest=digest, state=state, results=results)


SILENT = Reading(0.0, reachable=False, problem="no route to host")


def seen(
    at: float,
    canary: Reading | dict[str, Reading],
    *,
    fallback: float = 0,
    failed: float = 10,
    data: bool = True,
) -> Observation:
    """The others run the stable release; samples of those that run what they should."""
    readings = {device: reading(OLD) for device in DEVICES}
    readings |= canary if isinstance(canary, dict) else dict.fromkeys(CANARY, canary)
    samples = {}
    for device, one in readings.items():
        if one.reachable and one.digest and data:
            new = one.digest == NEW.digest
            bad = (fallback, failed) if new else (0, 10)
            samples[device] = Sample(device, one.digest, 10.0, 200, bad[0], 200, bad[1], 200, 0, 0.001)
    return Observation(at, readings, samples, compared=True)


def judge(made: Record, *looks: Observation) -> Decision:
    """Look after look, without an event in between, until the last."""
    decision = None
    for look in looks:
        assert decision is None or decision.event is None, decision
        decision = decide(made, look, DEVICES)
        made = decision.record
    assert decision is not None
    return decision


GOOD = [seen(at, reading(NEW)) for at in (1, 12, 23)]


@dataclass(frozen=True)
class Case:
    name: str
    looks: list[Observation]
    event: Event | None
    reason: str
    start: Record = field(default_factory=record)


CASES = [
    Case(
        "a new roll-out starts with its canary",
        [seen(0, reading(OLD))],
        Event.STARTED,
        "2.0.0 first on 2",
        record(Phase.PENDING),
    ),
    Case(
        "a wave that has not taken it is waited for",
        [seen(1, reading(OLD))],
        None,
        "0 of 2 run 2.0.0, waiting for",
    ),
    Case("a wave that warms up is not judged", [seen(1, reading(NEW), fallback=200)], None, "warming up"),
    Case("a good wave widens", GOOD, Event.WIDENED, "wave canary is good: 2 devices"),
    Case(
        "the last wave before everyone promotes",
        [seen(at, dict.fromkeys(WIDER, reading(NEW))) for at in (1, 12, 23)],
        Event.COVERED,
        "is good",
        record(wave=1),
    ),
    Case(
        "a model that raises is taken back",
        [seen(1, reading(NEW)), seen(12, reading(NEW), fallback=50)],
        Event.FAILED,
        "fallback_ratio 0.25",
    ),
    Case(
        "a model that fails more parts than the others is taken back",
        [seen(1, reading(NEW)), seen(12, reading(NEW), failed=120)],
        Event.FAILED,
        "fail_ratio 0.6 on 2 devices against 0.05 on 6 others",
    ),
    Case(
        "a device's own roll-back fails the roll-out",
        [seen(1, {A: reading(NEW), B: reading(OLD, failed_rollback_complete=1)})],
        Event.FAILED,
        f"{B}: the device itself refused or took back the candidate (failed_rollback_complete)",
    ),
    Case(
        "a device that refuses the bundle fails the roll-out",
        [seen(1, {A: reading(NEW), B: reading(OLD, rejected=1)})],
        Event.FAILED,
        "rejected",
    ),
    Case(
        "a refusal from before the roll-out does not count",
        [seen(1, {A: reading(NEW), B: reading(OLD, rejected=1)})],
        None,
        "waiting for",
        record(baseline={B: 1.0}),
    ),
    Case(
        "an agent that restarted begins its counters again",
        [
            seen(1, {A: reading(NEW), B: reading(OLD, rejected=0)}),
            seen(2, {A: reading(NEW), B: reading(OLD, rejected=1)}),
        ],
        Event.FAILED,
        "rejected",
        record(baseline={B: 3.0}),
    ),
    Case(
        "a bad result outside the wave is not the candidate's",
        [seen(1, dict.fromkeys(DEVICES, reading(OLD, rejected=5)) | dict.fromkeys(CANARY, reading(NEW)))],
        None,
        "warming up",
    ),
    Case(
        "a reachable device that never takes it failed",
        [seen(61, {A: reading(NEW), B: reading(OLD, "downloading")})],
        Event.FAILED,
        "runs 1.0.0 60 s after it was assigned 2.0.0 (update state downloading)",
    ),
    Case(
        "a device that holds is waited for",
        [seen(61, {A: reading(NEW), B: reading(OLD, "held")})],
        None,
        "waiting for",
    ),
    Case("a silent device is not failed", [seen(61, {A: reading(NEW), B: SILENT})], None, "warming up"),
    Case("more silence than allowed is waited for", [seen(61, SILENT)], None, "unreachable: "),
    Case(
        "silence until the deadline asks a person",
        [seen(301, SILENT)],
        Event.INCONCLUSIVE,
        "a person decides",
    ),
    Case(
        "no traffic asks a person in the end",
        [seen(1, reading(NEW)), seen(12, reading(NEW), data=False), seen(23, reading(NEW), data=False)],
        Event.INCONCLUSIVE,
        "analysis Inconclusive: fallback_ratio: no device under test had 20 observations",
    ),
    Case("a paused roll-out stays as it is", [*GOOD], None, "", record(Phase.PAUSED)),
    Case(
        "a paused roll-out is still taken back",
        [seen(1, reading(NEW)), seen(12, reading(NEW), fallback=50)],
        Event.FAILED,
        "fallback_ratio",
        record(Phase.PAUSED),
    ),
    Case(
        "a promotion waits for everybody",
        [seen(1, reading(NEW))],
        None,
        "2 of 8 run 2.0.0, waiting for",
        record(Phase.PROMOTING, wave=2),
    ),
    Case(
        "a promotion ends when everybody runs it",
        [seen(1, dict.fromkeys(DEVICES, reading(NEW)))],
        Event.CONVERGED,
        "8 devices run 2.0.0",
        record(Phase.PROMOTING, wave=2),
    ),
    Case(
        "a promotion does not wait for the few that are silent",
        [seen(1, dict.fromkeys(DEVICES, reading(NEW)) | {A: SILENT})],
        Event.CONVERGED,
        "7 devices run 2.0.0",
        record(Phase.PROMOTING, wave=2),
    ),
    Case(
        "a promotion is taken back by what the control was before",
        [seen(1, dict.fromkeys(DEVICES, reading(NEW)) | {A: reading(OLD)}, failed=120)],
        Event.FAILED,
        "fail_ratio",
        record(Phase.PROMOTING, wave=2, references={"fail_ratio": 0.05}),
    ),
    Case(
        "a roll-back waits for the stable digest",
        [seen(1, {A: reading(OLD), B: reading(NEW)})],
        None,
        f"1 of 2 run 1.0.0, waiting for {B}",
        record(Phase.ROLLING_BACK),
    ),
    Case(
        "another release is not the stable one",
        [seen(1, {A: reading(OLD), B: reading(OTHER)})],
        None,
        "waiting for",
        record(Phase.ROLLING_BACK),
    ),
    Case(
        "a roll-back waits for silent devices",
        [seen(1, {A: reading(OLD), B: SILENT})],
        None,
        "unreachable",
        record(Phase.ROLLING_BACK),
    ),
    Case(
        "but not for ever, and says so",
        [seen(301, {A: reading(OLD), B: SILENT})],
        Event.RESTORED,
        f"1 devices run 1.0.0 again; unreachable, they follow when they return: {B}",
        record(Phase.ROLLING_BACK),
    ),
    Case(
        "a roll-back ends when all are back",
        [seen(1, reading(OLD))],
        Event.RESTORED,
        "2 devices run 1.0.0 again",
        record(Phase.ROLLING_BACK),
    ),
    Case(
        "a person's abort ends as one",
        [seen(1, reading(OLD))],
        Event.STOPPED,
        "again",
        record(Phase.ROLLING_BACK, stopped=True),
    ),
    Case(
        "nothing is concluded while blind",
        [Observation(1, problem="Prometheus is away")],
        None,
        "cannot measure",
        record(Phase.ROLLING_BACK),
    ),
    Case(
        "nothing begins while blind",
        [Observation(1, problem="Prometheus is away")],
        None,
        "cannot measure",
        record(Phase.PENDING),
    ),
    Case(
        "blind for long asks a person",
        [seen(1, reading(NEW)), *(Observation(at, problem="away") for at in range(12, 17))],
        Event.INCONCLUSIVE,
        "analysis Error",
        record(),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_decision(case: Case) -> None:
    decision = judge(case.start, *case.looks)
    assert decision.event is case.event, decision.reason
    assert case.reason in decision.reason


def test_samples_of_another_digest_are_no_evidence() -> None:
    # Both canaries answer perfectly, but with the release before: their samples must not pass the wave.
    look = seen(12, reading(NEW))
    stale = {
        device: Sample(device, OLD.digest, 10.0, 200, 0, 200, 10, 200, 0, 0.001) for device in look.samples
    }
    decision = judge(record(bake_since=0.0), Observation(12, look.readings, stale, compared=True))
    assert decision.record.metrics["fallback_ratio"].passes == 0
    assert decision.record.metrics["fallback_ratio"].nodata == 1


def test_a_tolerated_failure_is_counted_but_does_not_stop() -> None:
    policy = replace(POLICY, max_failed=1)
    decision = judge(record(policy=policy), seen(1, {A: reading(NEW), B: reading(OLD, rejected=1)}))
    assert decision.event is None
    assert set(decision.record.failed) == {B}


def test_a_dry_run_metric_never_decides() -> None:
    metrics = (replace(POLICY.analysis.metrics[0], dry_run=True),)
    policy = replace(POLICY, analysis=replace(POLICY.analysis, metrics=metrics))
    decision = judge(record(policy=policy, bake_since=0.0), seen(12, reading(NEW), fallback=200))
    assert decision.record.metrics["fallback_ratio"].failures == 1
    assert decision.event is Event.WIDENED


def test_held_devices_take_no_part() -> None:
    decision = judge(record(held=(B,)), seen(1, {A: reading(NEW), B: reading(OLD)}))
    assert decision.reason == "warming up"


def test_a_new_stretch_begins_with_its_own_clock_and_measurements() -> None:
    decision = judge(record(), *GOOD)
    after = moved(decision.record, Event.WIDENED, decision.reason, decision.evidence, 23.0)
    assert (after.wave, after.wave_since, after.bake_since, after.metrics) == (1, 23.0, None, {})
    assert after.history[-1].evidence.metrics["fail_ratio"].passes == 2
    assert after.references == {"fail_ratio": pytest.approx(0.05)}


def test_what_each_phase_wants_is_computed_from_the_record_alone() -> None:
    document = Assignments(5, {"pump": ModelAssignment(OLD)})
    progressing = wanted(document, record())
    entry = progressing.models["pump"]
    assert (progressing.serial, entry.stable) == (6, OLD)
    assert entry.candidate is not None
    assert (entry.candidate.release, entry.candidate.rollout) == (NEW, "r-1")
    assert {device for device in DEVICES if device in entry.candidate.cohort} == set(CANARY)
    assert wanted(progressing, record()) is progressing
    everyone = wanted(document, record(Phase.PROMOTING, wave=2)).models["pump"].candidate
    assert everyone is not None
    assert "a device nobody listed" in everyone.cohort
    assert wanted(progressing, record(Phase.SUCCEEDED)).models["pump"] == ModelAssignment(NEW)
    for phase in (Phase.ROLLING_BACK, Phase.ROLLED_BACK, Phase.ABORTED):
        assert wanted(progressing, record(phase)).models["pump"] == ModelAssignment(OLD)
    assert wanted(document, record(Phase.PENDING)) is document


def test_an_abort_by_a_person_is_remembered_until_the_end() -> None:
    aborted = moved(record(), Event.ABORTED, "by hand", Evidence(), 1.0)
    assert (aborted.phase, aborted.stopped) == (Phase.ROLLING_BACK, True)
    decision = judge(aborted, seen(2, reading(OLD)))
    assert moved(aborted, Event.STOPPED, decision.reason, decision.evidence, 2.0).phase is Phase.ABORTED
