"""Alarms over time: the state is a value, the clock a parameter."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.rules.evaluate import (
    MAX_SCORE,
    Centre,
    Decision,
    Distance,
    Lacking,
    Limit,
    Missing,
    Of,
    Rate,
    Rule,
    RuleSet,
    RuleState,
    Stuck,
    When,
)

FEATURES = ("t", "p", "ack")


def limited(limit: Limit, reset: str | None = None) -> RuleSet:
    return RuleSet(FEATURES, "fail", Missing(max_share=1.0), {"t": limit, "ack": Limit(high=9)}, reset=reset)


def ruled(reset: str | None = None, **rules: Rule) -> RuleSet:
    return RuleSet(FEATURES, "pass", Missing(max_share=1.0), rules=rules, reset=reset)


def history(rules: RuleSet, *samples: tuple[float, float], ack: tuple[float, ...] = ()) -> str:
    """F or p for each (time, t); p is 0, ack 1 at the times named."""
    state, decisions = RuleState(), ""
    for now, value in samples:
        verdicts = rules.evaluate(np.array([[value, 0.0, float(now in ack)]]), state=state, now=now)
        assert verdicts.state is not None
        state, decisions = verdicts.state, decisions + ("F" if verdicts.failed[0] else "p")
    return decisions


def seconds(*values: float) -> list[tuple[float, float]]:
    return [(float(now), value) for now, value in enumerate(values)]


def test_a_deadband_holds_the_alarm_until_the_value_is_well_back() -> None:
    high = limited(Limit(0, 85, deadband=5))
    assert history(high, *seconds(84, 86, 84, 81, 80, 84, 86)) == "pFFFppF"
    low = limited(Limit(10, 85, deadband=5))
    assert history(low, *seconds(11, 9, 11, 14, 15, 11)) == "pFFFpp"


def test_each_side_has_its_own_deadband() -> None:
    assert history(limited(Limit(0, 10, deadband=2)), *seconds(5, 11, 9, -1, 1, 3)) == "pFFFFp"


def test_a_trip_has_a_deadband_too() -> None:
    assert history(limited(Limit(hihi=100, deadband=5)), *seconds(99, 101, 97, 95, 97)) == "pFFpp"


def test_an_on_delay_ignores_what_is_short() -> None:
    rules = limited(Limit(0, 85, on_delay=3))
    assert history(rules, *seconds(90, 90, 80, 90, 90, 90, 90, 80)) == "ppppppFp"


def test_an_off_delay_holds_what_was() -> None:
    rules = limited(Limit(0, 85, off_delay=2))
    assert history(rules, *seconds(90, 80, 80, 80, 90, 80, 90, 80, 80, 80)) == "FFFpFFFFFp"


def test_delays_count_time_and_not_rows() -> None:
    rules = limited(Limit(0, 85, on_delay=0.2))
    assert history(rules, (0.1, 90), (0.2, 90), (0.3, 90)) == "ppF"
    assert history(rules, (0, 90), (60, 90)) == "pF"


def test_a_latch_stays_until_a_reset_while_the_value_is_good() -> None:
    rules = limited(Limit(0, 85, latch=True), reset="ack > 0")
    assert history(rules, *seconds(80, 90, 80, 80, 80, 80), ack=(4.0,)) == "pFFFpp"
    assert history(rules, *seconds(80, 90, 90, 80, 80), ack=(2.0,)) == "pFFFF"


def test_a_reset_by_hand_gives_a_state_without_what_is_over() -> None:
    rules = ruled(hot=Rule(When("t > 80"), latch=True))
    state = rules.evaluate(np.array([[90.0, 0, 0]]), state=RuleState(), now=0.0).state
    assert state is not None
    assert state.reset().names == ("hot",)
    state = rules.evaluate(np.array([[70.0, 0, 0]]), state=state, now=1.0).state
    assert state is not None
    assert state.names == ("hot",)
    assert state.reset().names == ()
    assert state.names == ("hot",)  # a value: the old one is as it was


def test_a_missing_value_is_no_news_to_an_alarm() -> None:
    rules = limited(Limit(0, 85, on_delay=2, deadband=5))
    assert history(rules, *seconds(90, math.nan, 90, math.nan, 82, math.nan, 79, math.nan)) == "ppFFFFpp"


def test_a_rule_with_a_delay_is_active_after_it() -> None:
    assert history(ruled(hot=Rule(When("t > 80"), on_delay=2)), *seconds(90, 90, 90, 70)) == "ppFp"


def test_missing_for_a_time_is_a_delay() -> None:
    nan = math.nan
    assert (
        history(ruled(silent=Rule(Lacking("t"), on_delay=2)), *seconds(1, nan, nan, nan, 1, nan)) == "pppFpp"
    )


def test_a_sensor_that_stands_still_is_stuck() -> None:
    rules = ruled(frozen=Rule(Stuck("t", 3)))
    assert history(rules, *seconds(5, 5, 5, 5, 5, 5.1, 5.1)) == "pppFFpp"
    assert history(rules, *seconds(5, 6, 5, 6, 5, 6)) == "pppppp"
    within = ruled(frozen=Rule(Stuck("t", 3, within=0.5)))
    assert history(within, *seconds(5, 5.4, 4.6, 5.5, 5.6)) == "pppFp"
    assert history(within, *seconds(5, 5.4, 5.8, 6.2, 6.6, 7.0)) == "pppppp"  # creeping is moving


def test_a_value_that_moves_too_fast_is_noticed_whatever_the_sampling() -> None:
    rising = ruled(fast=Rule(Rate("t", per=4, rise=5)))
    assert history(rising, *seconds(0, 1, 2, 3, 4, 5, 6)) == "ppppppp"
    assert history(rising, *seconds(0, 2, 4, 6, 6, 6, 6, 6, 6)) == "pppFFpppp"
    assert history(rising, (0, 0), (0.01, 6)) == "pF"
    assert history(rising, *seconds(10, 0, 0)) == "ppp"
    falling = ruled(fast=Rule(Rate("t", per=4, fall=5)))
    assert history(falling, *seconds(10, 0, 0)) == "pFF"


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 3), st.floats(-10, 10)), min_size=1, max_size=30))
def test_a_rate_looks_back_between_one_and_one_and_a_quarter_times_its_time(
    steps: list[tuple[float, float]],
) -> None:
    rules = ruled(fast=Rule(Rate("t", per=4, rise=5)))
    times = np.cumsum([step for step, _ in steps])
    values = np.array([value for _, value in steps])
    rows = np.stack([values, values * 0, values * 0], axis=1)
    failed = rules.evaluate(rows, state=RuleState(), now=times).failed
    for at in range(len(steps)):
        before = times[:at] > times[at] - 4
        sure = before.any() and values[at] - values[:at][before].min() > 5
        before = times[:at] > times[at] - 5
        possible = before.any() and values[at] - values[:at][before].min() > 5
        assert sure <= failed[at] <= possible


def test_rules_combine_what_is_active_and_delays_apply_to_the_combination() -> None:
    rules = ruled(
        hot=Rule(When("t > 80"), "none", off_delay=5),
        loose=Rule(When("p < 2"), "none"),
        both=Rule(Of(("hot", "loose"), 2), on_delay=2),
    )
    assert history(rules, *seconds(90, 70, 70, 70)) == "ppFF"


EVERYTHING = RuleSet(
    FEATURES,
    "fail",
    Missing(),
    {"t": Limit(-1, 1, -3, 3, deadband=0.5, on_delay=1, off_delay=2), "p": Limit(hihi=5, latch=True)},
    distance=Distance(3.0, {"p": Centre(0, 1)}),
    rules={
        "off": Rule(When("ack < 0"), "pass", off_delay=1),
        "silent": Rule(Lacking("t"), "none", on_delay=2),
        "frozen": Rule(Stuck("p", 3), "vote"),
        "fast": Rule(Rate("t", 2, 4, 4), "none", latch=True),
        "two": Rule(Of(("silent", "frozen", "fast"), 2), on_delay=1),
    },
    reset="ack > 0",
)
samples = st.lists(
    st.tuples(
        st.floats(-1, 3),
        *[st.one_of(st.sampled_from([0.0, 0.9, 2.0, 9.0]), st.floats(allow_nan=True))] * 3,
    ),
    max_size=12,
)


def apart(steps: list[tuple[float, ...]]) -> tuple[np.ndarray, np.ndarray]:
    return np.cumsum([step[0] for step in steps]), np.array([step[1:] for step in steps]).reshape(-1, 3)


@settings(deadline=None)
@given(samples)
def test_every_history_is_judged_and_the_score_decides(steps: list[tuple[float, ...]]) -> None:
    times, rows = apart(steps)
    verdicts = EVERYTHING.evaluate(rows, state=RuleState(), now=times)
    assert ((verdicts.score >= 0) & (verdicts.score <= MAX_SCORE)).all()
    assert (verdicts.failed == (verdicts.score > 1)).all()
    for row in rows:
        assert all(isinstance(reason, str) for reason in EVERYTHING.explain(row, state=verdicts.state))


@settings(deadline=None)
@given(samples)
def test_rows_together_are_judged_as_one_after_the_other(steps: list[tuple[float, ...]]) -> None:
    times, rows = apart(steps)
    together = EVERYTHING.evaluate(rows, state=RuleState(), now=times)
    state: RuleState | None = RuleState()
    for at in range(len(rows)):
        alone = EVERYTHING.evaluate(rows[at : at + 1], state=state, now=times[at])
        np.testing.assert_allclose(alone.score[0], together.score[at], rtol=1e-12)
        state = alone.state
    assert state is not None
    assert together.state is not None
    assert state.names == together.state.names


@settings(deadline=None)
@given(samples, st.sampled_from([-1.0, 1.0]), st.floats(0, 5), st.floats(0, 5))
def test_further_out_never_scores_lower_from_the_same_state(
    steps: list[tuple[float, ...]], side: float, near: float, further: float
) -> None:
    rules = RuleSet(
        FEATURES, "pass", limits={"t": Limit(-1, 1, -3, 3, deadband=0.5, on_delay=1, off_delay=2, latch=True)}
    )
    times, rows = apart(steps)
    state = rules.evaluate(rows, state=RuleState(), now=times).state
    now = float(times[-1]) + 1 if len(times) else 0.0
    scores = [
        rules.evaluate(np.array([[side * value, 0, 0]]), state=state, now=now).score[0]
        for value in (near, near + further)
    ]
    # A value that swings through to the other side is another alarm: only this side's state may differ.
    if state is not None and f"t {'low' if side > 0 else 'high'}" not in state.names:
        assert all(first <= second for first, second in pairwise(scores))


def test_the_state_is_as_large_after_a_million_seconds_as_after_one() -> None:
    def size(state: RuleState | None) -> int:
        assert state is not None
        return sum(getattr(state, name).size for name in ("signal", "since", "level", "part", "lowest"))

    rows = np.random.default_rng(0).normal(size=(500, 3)) * 3
    state = EVERYTHING.evaluate(rows[:1], state=RuleState(), now=0.0).state
    later = EVERYTHING.evaluate(rows, state=state, now=np.linspace(0, 1e6, 500)).state
    assert size(state) == size(later)


def test_a_state_is_never_changed() -> None:
    state = EVERYTHING.evaluate(np.zeros((1, 3)), state=RuleState(), now=0.0).state
    assert state is not None
    first = EVERYTHING.evaluate(np.full((1, 3), 9.0), state=state, now=5.0)
    again = EVERYTHING.evaluate(np.full((1, 3), 9.0), state=state, now=5.0)
    np.testing.assert_array_equal(first.score, again.score)
    with pytest.raises(ValueError, match="read-only"):
        state.signal[0] = True


def test_other_rules_begin_anew_and_equal_ones_go_on() -> None:
    hot = ruled(hot=Rule(When("t > 80"), latch=True))
    row = np.array([[70.0, 0, 0]])
    state = hot.evaluate(np.array([[90.0, 0, 0]]), state=RuleState(), now=0.0).state
    assert RuleSet.parse(hot.to_yaml(), FEATURES).evaluate(row, state=state, now=1.0).failed[0]
    other = ruled(hot=Rule(When("t > 85"), latch=True))
    assert not other.evaluate(row, state=state, now=1.0).failed[0]


def test_a_clock_that_goes_back_stands_still() -> None:
    rules = limited(Limit(0, 85, on_delay=3))
    assert history(rules, (10, 90), (0, 90), (11, 90), (13, 90)) == "pppF"


def test_without_a_state_every_row_is_judged_by_itself() -> None:
    rules = ruled(
        hot=Rule(When("t > 80"), on_delay=60, latch=True),
        frozen=Rule(Stuck("t", 1)),
        fast=Rule(Rate("t", 1, 0.1)),
    )
    assert rules.stateful
    verdicts = rules.evaluate(np.array([[90.0, 0, 0], [70.0, 0, 0], [90.0, 0, 0]]))
    assert verdicts.failed.tolist() == [True, False, True]
    assert verdicts.state is None
    assert limited(Limit(0, 85, deadband=5, on_delay=9)).evaluate(np.array([[86.0, 0, 0]])).failed[0]


def test_rules_without_time_need_no_state_and_hand_back_what_they_were_given() -> None:
    state = RuleState()
    rules = limited(Limit(0, 85))
    assert not rules.stateful
    assert rules.evaluate(np.zeros((1, 3)), state=state).state is state


@pytest.mark.parametrize("now", [None, math.nan, math.inf])
def test_a_state_without_a_clock_is_our_bug_and_raises(now: float | None) -> None:
    with pytest.raises(ValueError, match="now"):
        EVERYTHING.evaluate(np.zeros((1, 3)), state=RuleState(), now=now)


def test_reasons_name_what_is_still_active() -> None:
    rules = limited(Limit(0, 85, latch=True))
    state = rules.evaluate(np.array([[90.0, 0, 0]]), state=RuleState(), now=0.0).state
    assert rules.explain(np.array([90.0, 0, 0]), state=state) == ["t 90 above high 85"]
    assert rules.explain(np.array([70.0, 0, 0]), state=state) == ["t high still active"]
    assert rules.explain(np.array([70.0, 0, 0])) == []


@pytest.mark.parametrize("default", ["pass", "fail"])
def test_a_row_of_nothing_gets_the_default_with_a_state_too(default: Decision) -> None:
    rules = RuleSet(FEATURES, default, limits={"t": Limit(0, 1, on_delay=1)})
    verdicts = rules.evaluate(np.full((1, 3), np.nan), state=RuleState(), now=0.0)
    assert verdicts.failed[0] == (default == "fail")
