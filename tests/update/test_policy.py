"""Decisions without a disk, a clock or a network."""

from __future__ import annotations

import pytest

from edge_agent.config import ProbationConfig
from edge_agent.contract.assignments import Mode, Release, Share
from edge_agent.contract.digest import Digest
from edge_agent.contract.version import Version
from edge_agent.store.state import Rejected, Result, UpdateRecord
from edge_agent.update.machine import Event
from edge_agent.update.policy import Observed, Verdict, decide, judge

OLD = Release(Version("1.0.0"), Digest.of_bytes(b"old"))
NEW = Release(Version("2.0.0"), Digest.of_bytes(b"new"))
FRESH = UpdateRecord()
BURNT = FRESH.rejecting(Rejected(NEW.digest, NEW.version, "selftest", "it differs", 0.0))


@pytest.mark.parametrize(
    ("share", "intact", "record", "event", "result", "reason"),
    [
        (None, True, FRESH, Event.NOTHING_NEW, Result.NO_ARTIFACT, "no_artifact"),
        (Share("m", None), True, FRESH, Event.NOTHING_NEW, Result.NO_ARTIFACT, "no_artifact"),
        (Share("m", OLD), True, FRESH, Event.NOTHING_NEW, Result.ALREADY_INSTALLED, "already_installed"),
        (Share("m", OLD), False, FRESH, Event.NEW_RELEASE, None, "repair"),
        (Share("m", OLD, held=True), False, FRESH, Event.NEW_RELEASE, None, "repair"),
        (Share("m", NEW), True, FRESH, Event.NEW_RELEASE, None, ""),
        (Share("m", NEW, held=True), True, FRESH, Event.HOLD, None, "held"),
        (Share("m", NEW, mode=Mode.SHADOW), True, FRESH, Event.HOLD, None, "shadow"),
        (Share("m", NEW), True, BURNT, Event.NOTHING_NEW, Result.REJECTED, "selftest"),
        (
            Share("m", NEW, minimum_version=Version("3.0.0")), True, FRESH,
            Event.NOTHING_NEW, Result.REJECTED, "below_floor",
        ),
    ],
)  # fmt: skip
def test_what_is_assigned_and_what_runs_decide(
    share: Share | None, intact: bool, record: UpdateRecord, event: Event, result: Result, reason: str
) -> None:
    decision = decide(share, OLD.digest, intact, record)
    assert (decision.event, decision.result, decision.reason) == (event, result, reason)


def test_a_rejected_release_that_had_to_stay_is_reported_as_rejected() -> None:
    """It failed, and there was nothing to go back to: it is not simply `already_installed`."""
    decision = decide(Share("m", NEW), NEW.digest, intact=True, record=BURNT)
    assert (decision.event, decision.result) == (Event.NOTHING_NEW, Result.REJECTED)


CONFIG = ProbationConfig(seconds=60, requests=100, max_seconds=3600, max_fallback_ratio=0.05)


@pytest.mark.parametrize(
    ("seconds", "rows", "fallback", "verdict"),
    [
        (0, 0, 0, Verdict.WAIT),
        (61, 99, 0, Verdict.WAIT),
        (59, 100, 0, Verdict.WAIT),
        (60, 100, 0, Verdict.HEALTHY),
        (60, 100, 5, Verdict.HEALTHY),
        (1, 5, 5, Verdict.WAIT),  # 95 good ones may still come
        (1, 6, 6, Verdict.UNHEALTHY),  # they could not make up for six
        (60, 1000, 51, Verdict.UNHEALTHY),
        (60, 1000, 50, Verdict.HEALTHY),
        (3600, 0, 0, Verdict.HEALTHY),  # no traffic: committed in the end
        (3600, 10, 1, Verdict.UNHEALTHY),
    ],
)
def test_probation_is_judged_by_time_rows_and_fallbacks(
    seconds: float, rows: int, fallback: int, verdict: Verdict
) -> None:
    assert judge(CONFIG, Observed(seconds, rows, fallback, "ready", right=True))[0] is verdict


@pytest.mark.parametrize(
    ("state", "right", "verdict"),
    [("ready", False, Verdict.UNHEALTHY), ("failed", True, Verdict.UNHEALTHY),
     ("corrupt", True, Verdict.UNHEALTHY), ("absent", False, Verdict.UNHEALTHY),
     ("loading", True, Verdict.WAIT), ("unloaded", True, Verdict.WAIT), ("ready", True, Verdict.WAIT)],
)  # fmt: skip
def test_a_release_that_does_not_run_is_unhealthy(state: str, right: bool, verdict: Verdict) -> None:
    assert judge(CONFIG, Observed(1, 0, 0, state, right))[0] is verdict


def test_every_verdict_has_a_word_and_a_sentence() -> None:
    for seen in (Observed(1, 0, 0, "ready", True), Observed(60, 100, 99, "ready", True)):
        _, reason, message = judge(CONFIG, seen)
        assert reason.replace("_", "").isalpha()
        assert message
