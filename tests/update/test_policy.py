"""Decisions without a disk, a clock or a network."""

from __future__ import annotations

import pytest

from edge_agent.config import ProbationConfig
from edge_agent.contract.assignments import Mode, Release, Share
from edge_agent.contract.digest import Digest
from edge_agent.contract.version import Version
from edge_agent.store.state import Rejected, Result, UpdateRecord
from edge_agent.update.holds import Hold
from edge_agent.update.machine import Event
from edge_agent.update.policy import Answered, Observed, Verdict, compare, decide, judge

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
        (Share("m", NEW, mode=Mode.SHADOW), True, FRESH, Event.NEW_RELEASE, None, ""),
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


def histogram(**counts: int) -> tuple[int, ...]:
    """Counts by bin: ``_3=100`` puts a hundred into the third bin of twelve."""
    return tuple(counts.get(f"_{index}", 0) for index in range(12))


USUAL = Answered(1000, 50, histogram(_4=1000), histogram(_5=100))


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (USUAL, None),
        (Answered(100, 30, histogram(_4=100), histogram(_5=60)), None),
        (Answered(100, 40, histogram(_4=100), histogram(_5=60)), "decisions"),
        (Answered(49, 49, histogram(_4=49), histogram(_11=49)), None),  # too few to say so
        (Answered(100, 5, histogram(_4=94, _10=6), histogram(_5=60)), "latency"),
        (Answered(100, 5, histogram(_4=96, _11=4), histogram(_5=60)), None),  # 4 % are late
        (Answered(100, 5, histogram(_0=100), histogram(_5=60)), None),  # faster is fine
        (Answered(100, 5, histogram(_5=100), histogram(_5=60)), None),  # twice the usual
        (Answered(100, 5, histogram(_4=100), histogram(_8=60)), None),
        (Answered(100, 5, histogram(_4=100), histogram(_9=60)), "scores"),
        (Answered(100, 5, histogram(_4=100), histogram(_1=60)), "scores"),
    ],
)
def test_probation_compares_with_the_release_before(now: Answered, reason: str | None) -> None:
    found = compare(CONFIG, now, USUAL)
    assert (found[0] if found else None) == reason
    verdict = judge(
        CONFIG,
        Observed(60, 100, 0, "ready", True, now=now, before=USUAL, look=3 if reason == "latency" else 1),
    )
    assert verdict[:2] == ((Verdict.UNHEALTHY, reason) if reason else (Verdict.HEALTHY, "healthy"))


SLOW = Answered(100, 5, histogram(_10=100), histogram(_5=60))


@pytest.mark.parametrize(
    ("look", "seconds", "now", "verdict"),
    [
        (1, 60, SLOW, Verdict.AGAIN),  # the machine may be busy
        (2, 60, SLOW, Verdict.AGAIN),
        (3, 60, SLOW, Verdict.UNHEALTHY),  # three times is no accident
        (2, 59, SLOW, Verdict.WAIT),  # each look takes its time, ...
        (2, 60, Answered(100, 5, histogram(_10=99)), Verdict.WAIT),  # ... and its requests
        (2, 3600, Answered(100, 5, histogram(_10=99)), Verdict.AGAIN),
        (2, 3600, Answered(100, 5, histogram(_10=9)), Verdict.HEALTHY),  # nobody asks: nothing is against it
        (2, 60, USUAL, Verdict.HEALTHY),
        (
            1,
            60,
            Answered(100, 90, histogram(_4=100)),
            Verdict.UNHEALTHY,
        ),  # what it decides is not the machine's
    ],
)
def test_a_slow_moment_is_looked_at_again(look: int, seconds: float, now: Answered, verdict: Verdict) -> None:
    seen = Observed(seconds, 300, 0, "ready", True, now=now, before=USUAL, look=look)
    assert judge(CONFIG, seen)[0] is verdict


def late(rows: int, late_rows: int) -> Answered:
    return Answered(rows - late_rows, 5, histogram(_4=rows), histogram(_5=60), late_rows)


@pytest.mark.parametrize(
    ("look", "now", "before", "verdict"),
    [
        (1, late(100, 5), USUAL, Verdict.HEALTHY),
        (1, late(100, 6), USUAL, Verdict.AGAIN),
        (1, late(100, 100), USUAL, Verdict.AGAIN),  # the rules answer meanwhile
        (2, late(100, 100), USUAL, Verdict.AGAIN),
        (3, late(100, 6), USUAL, Verdict.UNHEALTHY),
        (3, late(100, 6), None, Verdict.UNHEALTHY),  # a first release, too
        (3, late(100, 14), late(1000, 100), Verdict.HEALTHY),  # callers give no more time
        (3, late(100, 16), late(1000, 100), Verdict.UNHEALTHY),
    ],
)
def test_a_busy_moment_is_no_slow_model_and_a_slow_model_is_found(
    look: int, now: Answered, before: Answered | None, verdict: Verdict
) -> None:
    seen = Observed(60, 100, 0, "ready", True, now=now, before=before, look=look)
    found, reason, message = judge(CONFIG, seen)
    assert found is verdict
    assert verdict is Verdict.HEALTHY or (reason, "its time was over" in message) == ("deadline", True)


def test_what_was_answered_since_is_a_difference() -> None:
    earlier, now = late(100, 10), late(150, 30)
    assert now.since(earlier) == Answered(30, 0, histogram(_4=50), histogram(), 20)
    assert now.since(earlier).late_share == 0.4


def test_what_answers_faster_than_two_milliseconds_is_not_too_slow() -> None:
    quick, slower = Answered(100, 5, histogram(_0=100)), Answered(100, 5, histogram(_5=100))
    assert compare(CONFIG, slower, quick) is None


@pytest.mark.parametrize(
    ("rows", "non_finite", "verdict"),
    [
        (10, 2, Verdict.WAIT),
        (10, 3, Verdict.UNHEALTHY),
        (1000, 20, Verdict.HEALTHY),
        (1000, 21, Verdict.UNHEALTHY),
    ],
)
def test_results_that_are_not_finite_have_a_limit_of_their_own(
    rows: int, non_finite: int, verdict: Verdict
) -> None:
    seen = Observed(60 if rows >= 100 else 1, rows, non_finite, "ready", True, non_finite_rows=non_finite)
    assert judge(CONFIG, seen)[0] is verdict


@pytest.mark.parametrize(
    ("share", "record", "reason"),
    [
        (Share("m", NEW), FRESH, "window"),
        (Share("m", OLD), FRESH, "already_installed"),
        (Share("m", NEW), BURNT, "selftest"),  # it will not come after the hold, either
    ],
)
def test_a_hold_of_the_device_keeps_what_is_new_waiting(
    share: Share, record: UpdateRecord, reason: str
) -> None:
    assert decide(share, OLD.digest, True, record, Hold("window", "not now")).reason == reason
