"""Named rules: what they do to the score, and which rank above which."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.errors import BadRules
from edge_agent.rules.evaluate import (
    MAX_SCORE,
    Centre,
    CountAs,
    Decision,
    Distance,
    Effect,
    Lacking,
    Limit,
    Missing,
    Of,
    Rate,
    Rule,
    RuleSet,
    Stuck,
    When,
)
from edge_agent.rules.values import MAX_RULES

FEATURES = ("a", "b", "c")


def made(default: Decision = "pass", **parts: Any) -> RuleSet:
    return RuleSet(FEATURES, default, **parts)


def score(rules: RuleSet, *row: float) -> float:
    alone = rules.evaluate(np.array([row])).score
    together = rules.evaluate(np.array([row, row])).score
    np.testing.assert_allclose(together, [alone[0]] * 2, rtol=1e-12)
    return float(alone[0])


def test_a_rule_fails_a_row_with_its_score() -> None:
    rules = made(rules={"hot": Rule(When("a > 80")), "mild": Rule(When("a > 70"), score=1.5)})
    assert [score(rules, a, 0, 0) for a in (60, 75, 90)] == [0.0, 1.5, 2.0]


def test_a_row_that_no_rule_decides_gets_the_default() -> None:
    rules = made("fail", rules={"good": Rule(When("a < 80"), "pass", score=0.25)})
    assert score(rules, 60, 0, 0) == 0.25
    assert score(rules, 90, 0, 0) == 2.0
    assert score(rules, math.nan, 0, 0) == 2.0


def test_a_pass_rule_suppresses_all_but_a_trip() -> None:
    rules = made(
        limits={"a": Limit(0, 1, -5, 5)},
        rules={"hot": Rule(When("b > 0")), "off": Rule(When("c > 0"), "pass")},
    )
    assert score(rules, 3, 1, 0) == 5.0
    assert score(rules, 3, 1, 1) == 0.0
    assert score(rules, 6, 1, 1) == 3.0


def test_a_voting_rule_has_its_weight_in_the_votes_of_the_limits() -> None:
    rules = made(
        limits={"a": Limit(0, 1), "b": Limit(0, 1)},
        votes=2,
        rules={"odd": Rule(When("c > 0"), "vote"), "worse": Rule(When("c > 5"), "vote", weight=2.0)},
    )
    assert score(rules, 3, 0.5, 0) <= 1
    assert score(rules, 3, 0.5, 1) > 1
    assert score(rules, 0.5, 0.5, 1) <= 1
    assert score(rules, 0.5, 0.5, 6) > 1
    only = made(votes=2, rules={name: Rule(When(f"{name} > 0"), "vote", score=3.0) for name in "abc"})
    assert [score(only, *row) for row in ((1, 0, 0), (1, 0, 1), (1, 1, 1))] == [0.0, 3.0, 3.0]


def test_k_of_n_rules_fail_a_row_and_fewer_do_not() -> None:
    members = {name: Rule(When(f"{name} > 0"), "none") for name in "abc"}
    rules = made(rules={**members, "two": Rule(Of(("a", "b", "c"), 2))})
    assert [score(rules, *row) for row in ((1, 0, 0), (1, 0, 1), (1, 1, 1))] == [0.0, 2.0, 2.0]


def test_a_weighted_combination_adds_the_weights_of_what_is_active() -> None:
    rules = made(
        rules={
            "x": Rule(When("a > 0"), "none", weight=0.5),
            "y": Rule(When("b > 0"), "none", weight=0.3),
            "z": Rule(When("c > 0"), "none", weight=0.4),
            "sum": Rule(Of(("x", "y", "z"), 0.7), "none"),
            "not alone": Rule(Of(("sum", "z"), 1.4)),
        }
    )
    assert score(rules, 1, 1, 0) == 0.0
    assert score(rules, 0, 1, 1) == 2.0


def test_a_combination_without_history_is_that_of_the_present_row() -> None:
    rules = made(rules={"gone": Rule(Lacking("a"), "none", on_delay=5), "any": Rule(Of(("gone",), 1))})
    assert score(rules, math.nan, 0, 0) == 2.0


def test_what_a_rule_reads_counts_among_the_missing() -> None:
    rules = made("fail", limits={"a": Limit(0, 1)}, rules={"hot": Rule(When("b > 0"))})
    assert score(rules, 0.5, math.nan, 0) <= 1
    strict = made("fail", missing=Missing(max_share=0.4), limits={"a": Limit(0, 1)}, rules=rules.rules)
    assert score(strict, 0.5, math.nan, 0) == 2.0


def test_a_rule_that_can_be_decided_speaks_although_too_much_is_missing() -> None:
    rules = made("pass", missing=Missing(max_share=0.0), rules={"hot": Rule(When("a > 0 or b > 0"))})
    assert score(rules, 1, math.nan, 0) == 2.0
    assert score(rules, 0, math.nan, 0) == 0.0


def test_one_vote_that_outranks_trips_does_not_hide_a_trip_from_a_pass_rule() -> None:
    rules = made(limits={"a": Limit(0, 1, hihi=5)}, rules={"off": Rule(When("c > 0"), "pass")})
    assert score(rules, 6, 0, 1) > 1


effects = st.sampled_from(["fail", "pass", "vote"])
cells = st.one_of(st.floats(allow_nan=True), st.sampled_from([0.0, 1.0, 2.0]))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a > 1", "b < c", "not a/b > c", "abs(c) >= 1"]), effects), max_size=4
    ),
    st.booleans(),
    st.sampled_from(["ok", "violation", "fail"]),
    st.lists(st.tuples(cells, cells, cells), max_size=4),
)
def test_every_row_is_judged_and_rules_move_the_score_their_way(
    chosen: list[tuple[str, Effect]], limits: bool, count_as: CountAs, table: list[tuple[float, ...]]
) -> None:
    parts: dict[str, Any] = {"missing": Missing(count_as)}
    if limits:
        parts["limits"] = {"a": Limit(-1, 1, -3, 3), "b": Limit(high=2.0, weight=1.5)}
        parts["distance"] = Distance(2.0, {"c": Centre(0.0, 1.0)})
    rules = {f"r{at}": Rule(When(text), effect) for at, (text, effect) in enumerate(chosen)}
    try:
        rule_set = made(rules=rules, **parts)
        fewer = made(rules={key: rule for key, rule in rules.items() if rule.decision == "vote"}, **parts)
        failing = made(rules={key: rule for key, rule in rules.items() if rule.decision != "pass"}, **parts)
    except BadRules as error:
        if "every row would pass" not in str(error):
            raise
        return
    rows = np.array(table).reshape(-1, 3)
    verdicts = rule_set.evaluate(rows)
    assert ((verdicts.score >= 0) & (verdicts.score <= MAX_SCORE)).all()
    assert (verdicts.failed == (verdicts.score > 1)).all()
    alone = [rule_set.evaluate(row[None, :]).score[0] for row in rows]
    np.testing.assert_allclose(verdicts.score, alone, rtol=1e-12)
    if (
        len(failing.rules) == len(rules) or limits
    ):  # else the votes alone would not be judged by the same parts
        assert (failing.evaluate(rows).score >= fewer.evaluate(rows).score).all()
        assert (verdicts.score <= failing.evaluate(rows).score).all()
    for row in rows:
        assert all(isinstance(reason, str) for reason in rule_set.explain(row))


def test_reasons_name_the_rules_and_a_pass_rule_silences_the_rest() -> None:
    rules = made(
        limits={"a": Limit(0, 1, hihi=9)},
        rules={
            "hot": Rule(When("b > 0")),
            "gone": Rule(Lacking("c"), "none"),
            "both": Rule(Of(("hot", "gone"), 2)),
            "off": Rule(When("b < 0"), "pass"),
        },
    )
    reasons = rules.explain(np.array([3.0, 1.0, np.nan]))
    assert reasons == ["rule hot: b > 0", "rule both: 2 of hot, gone", "a 3 above high 1"]
    assert rules.explain(np.array([10.0, -1.0, 0.0])) == ["a 10 above hihi 9"]
    assert rules.explain(np.array([3.0, -1.0, 0.0])) == []


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"rules": {"x": Rule(When("d > 1"))}}, "rules: x: when: column 1: the model has no feature 'd'"),
        ({"rules": {"x": Rule(Lacking("d"))}}, "rules: x: missing: the model has no feature 'd'"),
        ({"rules": {"x": Rule(Stuck("a", 0))}}, "rules: x: for is 0 s"),
        ({"rules": {"x": Rule(Stuck("a", 1, -1))}}, "rules: x: within is -1"),
        ({"rules": {"x": Rule(Rate("a", 0, 1))}}, "rules: x: per is 0 s"),
        ({"rules": {"x": Rule(Rate("a", 1))}}, "rules: x: give rise, fall or both"),
        ({"rules": {"x": Rule(Rate("a", 1, -1))}}, "rules: x: rise is -1"),
        ({"rules": {"x": Rule(Of(("y",), 1)), "y": Rule(When("a > 1"))}}, "'y' above this one; stands below"),
        ({"rules": {"x": Rule(When("a > 1")), "y": Rule(Of(("z",), 1))}}, "no rule 'z' above this one"),
        ({"rules": {"x": Rule(When("a > 1")), "y": Rule(Of(("x", "x"), 2))}}, "names a rule twice"),
        ({"rules": {"x": Rule(When("a > 1")), "y": Rule(Of(("x",), 2))}}, "k is 2, expected more than 0"),
        ({"rules": {"x": Rule(When("a > 1"), "none")}}, "rules: x has no effect"),
        ({"rules": {"x": Rule(When("a > 1"), score=1.0)}}, "score is 1, expected more than 1"),
        ({"rules": {"x": Rule(When("a > 1"), "pass", 2.0)}}, "score is 2, expected from 0 to 1"),
        ({"rules": {"x": Rule(When("a > 1"), "none", 2.0)}}, "score is 2, expected none"),
        ({"rules": {"x": Rule(When("a > 1"), weight=0)}}, "weight is 0, expected more than 0"),
        ({"rules": {"x": Rule(When("a > 1"), on_delay=-1)}}, "on_delay is -1 s"),
        ({"rules": {"x": Rule(When("a > 1"), off_delay=1e9)}}, "off_delay is 1e+09 s"),
        ({"rules": {"x": Rule(When("a > 1"), "pass")}}, "every row would pass: that is the default"),
        ({"default": "fail", "rules": {"x": Rule(When("a > 1"))}}, "every row would fail"),
        ({"rules": {"x": Rule(When("a > 1"), "vote")}, "votes": 2}, "only 1 votes together"),
        ({"limits": {"a": Limit(0, 1, deadband=2)}}, "deadband 2 is wider than from low to high (1)"),
        ({"limits": {"a": Limit(0, 1, deadband=-1)}}, "deadband is -1"),
        ({"limits": {"a": Limit(0, 1, on_delay=math.inf)}}, "on_delay is inf s"),
        ({"limits": {"a": Limit(0, 1)}, "reset": "b > 0"}, "reset has nothing to release"),
        ({"limits": {"a": Limit(0, 1, latch=True)}, "reset": "d > 0"}, "reset.when: column 1"),
        ({"rules": {f"r{at}": Rule(When("a > 1")) for at in range(MAX_RULES + 1)}}, "there are 501"),
    ],
)
def test_rules_that_make_no_sense_are_refused(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRules) as refused:
        made(**parts)
    assert says in str(refused.value)
