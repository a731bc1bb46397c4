"""The rules judge every row, one number decides, and it ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_agent.rules.evaluate import (
    MAX_SCORE,
    Centre,
    CountAs,
    Decision,
    Distance,
    Limit,
    Missing,
    RuleSet,
    constant,
)

FEATURES = ("a", "b", "c", "d")


def rules(
    limits: dict[str, Limit] | None = None,
    votes: float = 1,
    distance: Distance | None = None,
    default: Decision = "fail",
    missing: Missing = Missing(),  # noqa: B008  frozen
) -> RuleSet:
    return RuleSet(FEATURES, default, missing, limits or {}, votes, distance)


def failed(rule_set: RuleSet, *row: float) -> bool:
    return bool(rule_set.evaluate(np.array([row])).failed[0])


def score(rule_set: RuleSet, *row: float) -> float:
    return float(rule_set.evaluate(np.array([row])).score[0])


EVERYTHING = rules(
    {"a": Limit(-1, 1, -3, 3), "b": Limit(high=2.0, weight=2), "c": Limit(low=0.0, hihi=9.0)},
    votes=2,
    distance=Distance(2.0, {"a": Centre(0, 1), "d": Centre(5, 0.5, 3)}),
)

any_rows = arrays.arrays(
    st.sampled_from([np.float32, np.float64]),
    st.tuples(st.integers(0, 5), st.just(4)),
    elements={"allow_nan": True, "allow_infinity": True},
)


@settings(deadline=None)
@given(any_rows, st.sampled_from(["ok", "violation", "fail"]), st.sampled_from(["pass", "fail"]))
def test_every_row_gets_a_finite_score_and_the_score_decides(
    rows: np.ndarray, count_as: CountAs, default: Decision
) -> None:
    for rule_set in (
        RuleSet(FEATURES, default, Missing(count_as), EVERYTHING.limits, 2, EVERYTHING.distance),
        RuleSet(FEATURES, default, Missing(count_as), {"b": Limit(low=0.1, high=0.1)}),
        constant(default, FEATURES),
    ):
        verdicts = rule_set.evaluate(rows)
        assert verdicts.score.shape == verdicts.failed.shape == (len(rows),)
        assert verdicts.score.dtype == np.float64
        assert ((verdicts.score >= 0) & (verdicts.score <= MAX_SCORE)).all()
        assert (verdicts.failed == (verdicts.score > 1)).all()


@settings(deadline=None)
@given(any_rows)
def test_a_row_is_judged_alike_alone_and_in_company(rows: np.ndarray) -> None:
    together = EVERYTHING.evaluate(rows).score
    alone = [EVERYTHING.evaluate(row[None, :]).score[0] for row in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


finite = st.floats(-1e6, 1e6)


@settings(deadline=None)
@given(st.tuples(finite, finite, finite, finite), st.integers(0, 3), st.floats(1, 100))
def test_moving_further_out_never_lowers_the_score(
    row: tuple[float, ...], column: int, factor: float
) -> None:
    centres = np.array([0.0, 0.0, 4.5, 5.0])  # inside every range, at every centre
    near = np.array(row)
    far = near.copy()
    far[column] = centres[column] + (near[column] - centres[column]) * factor
    low, high = EVERYTHING.evaluate(np.array([near, far])).score
    assert high >= low * (1 - 1e-9)


def test_the_score_is_continuous_across_a_limit_and_one_exactly_there() -> None:
    band = rules({"a": Limit(10.0, 20.0)})
    assert score(band, 15, 0, 0, 0) == 0.0
    assert score(band, 20, 0, 0, 0) == 1.0
    assert score(band, 25, 0, 0, 0) == 2.0
    assert score(band, 5, 0, 0, 0) == 2.0
    steps = [score(band, x, 0, 0, 0) for x in np.linspace(9, 21, 1201)]
    assert np.abs(np.diff(steps)).max() < 0.0021


@pytest.mark.parametrize("limit", [21.1, 0.1, 21.7, -0.3, 1e9 + 0.1])
def test_a_reading_exactly_on_its_limit_is_good_in_float32_and_float64(limit: float) -> None:
    band = rules({"a": Limit(low=limit), "b": Limit(high=limit)})
    for dtype in (np.float32, np.float64):
        assert not band.evaluate(np.array([[limit, limit, 0, 0]], dtype=dtype)).failed[0]


def test_k_votes_fail_a_row_and_fewer_do_not() -> None:
    two = rules({name: Limit(0, 1) for name in FEATURES}, votes=2)
    assert not failed(two, 2, 0.5, 0.5, 0.5)
    assert failed(two, 2, 0.5, -1, 0.5)


def test_weights_are_votes() -> None:
    weighted = rules(
        {"a": Limit(high=1, weight=2), "b": Limit(high=1), "c": Limit(high=1, weight=0)}, votes=2
    )
    assert failed(weighted, 2, 0, 0, 0)
    assert not failed(weighted, 0, 2, 2, 0)
    assert not failed(weighted, 1, 1, 9, 0)


@settings(deadline=None)
@given(arrays.arrays(np.float64, (7, 4), elements=finite), st.integers(1, 4))
def test_equal_weights_count_like_votes_without_weight(rows: np.ndarray, k: int) -> None:
    limits = {name: Limit(-1, 1) for name in FEATURES}
    doubled = {name: Limit(-1, 1, weight=2.0) for name in FEATURES}
    nearly = {**doubled, "d": Limit(-1, 1, weight=2.0 + 1e-12)}  # takes the weighing path
    expected = rules(limits, votes=k).evaluate(rows).score
    np.testing.assert_array_equal(rules(doubled, votes=2 * k).evaluate(rows).score, expected)
    np.testing.assert_array_equal(rules(nearly, votes=2 * k).evaluate(rows).score, expected)
    assert ((np.abs(rows) > 1).sum(axis=1) >= k).tolist() == (expected > 1).tolist()


def test_one_trip_fails_a_row_whatever_the_votes() -> None:
    trip = rules({"a": Limit(0, 1, -1, 2), "b": Limit(0, 1), "c": Limit(0, 1)}, votes=3)
    assert not failed(trip, 2.0, 0, 0, 0)
    assert failed(trip, 2.1, 0, 0, 0)
    assert failed(trip, -1.1, 0, 0, 0)


def test_the_distance_is_the_weighted_root_mean_square_of_scales() -> None:
    far = rules(distance=Distance(2.0, {"a": Centre(10, 2), "b": Centre(0, 1, weight=3)}))
    assert score(far, 14, 3, 0, 0) == pytest.approx(np.sqrt((1 * 4 + 3 * 9) / 4) / 2)


def test_missing_values_do_not_take_part_in_the_distance() -> None:
    far = rules(distance=Distance(1.0, {"a": Centre(0, 1), "b": Centre(0, 1)}))
    assert score(far, 0.5, np.nan, 0, 0) == pytest.approx(0.5)


@pytest.mark.parametrize(("count_as", "fails"), [("ok", False), ("violation", True), ("fail", True)])
def test_a_missing_value_counts_as_the_rules_say(count_as: CountAs, fails: bool) -> None:
    limits = {name: Limit(0, 1) for name in FEATURES}
    assert failed(rules(limits, missing=Missing(count_as)), np.nan, 0.5, 0.5, 0.5) is fails
    assert failed(rules(limits, votes=2, missing=Missing(count_as)), np.nan, 0.5, 0.5, 0.5) is (
        count_as == "fail"
    )


def test_a_missing_value_of_a_feature_without_a_rule_means_nothing() -> None:
    assert not failed(rules({"a": Limit(0, 1)}, missing=Missing("fail")), 0.5, np.nan, np.nan, np.nan)


@pytest.mark.parametrize("default", ["pass", "fail"])
def test_too_many_missing_values_get_the_default_but_a_trip_still_fails(default: Decision) -> None:
    limits = {"a": Limit(0, 1, hihi=5), "b": Limit(0, 1), "c": Limit(0, 1)}
    few = rules(limits, default=default, missing=Missing("ok", 0.5))
    assert failed(few, 0.5, np.nan, np.nan, 0) is (default == "fail")
    assert failed(few, 6, np.nan, np.nan, 0)


@pytest.mark.parametrize("default", ["pass", "fail"])
def test_a_row_of_nothing_gets_the_default(default: Decision) -> None:
    nothing = rules({"a": Limit(0, 1)}, default=default, missing=Missing("ok", 1.0))
    assert failed(nothing, *[np.nan] * 4) is (default == "fail")
    assert failed(constant(default, FEATURES), 1, 2, 3, 4) is (default == "fail")


def test_infinity_is_beyond_every_limit_and_within_none_that_is_absent() -> None:
    one_sided = rules({"a": Limit(high=1.0)})
    assert failed(one_sided, np.inf, 0, 0, 0)
    assert not failed(one_sided, -np.inf, 0, 0, 0)


def test_rows_of_another_width_are_our_bug_and_raise() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\), the rules are for \(n, 4\)"):
        EVERYTHING.evaluate(np.zeros((1, 3)))


def test_reasons_name_the_worst_first_and_are_few() -> None:
    limits = {name: Limit(0, 1, hihi=10) for name in FEATURES}
    reasons = rules(limits).explain(np.array([3.0, 12.0, np.nan, 5.0]))
    assert reasons == ["b 12 above hihi 10", "d 5 above high 1", "a 3 above high 1", "c missing"]
    assert rules(limits).explain(np.array([3.0, 12.0, np.nan, 5.0]), most=2)[1] == "and 3 more"


def test_a_good_row_has_no_reasons() -> None:
    assert EVERYTHING.explain(np.array([0, 0, 1, 5], dtype=np.float32)) == []


def test_the_distance_explains_itself_by_its_largest_part() -> None:
    far = rules(distance=Distance(2.0, {"a": Centre(0, 1), "b": Centre(0, 1)}))
    assert far.explain(np.array([1.0, -7.0, 0, 0])) == ["distance 5 above limit 2, most by b (7 scales off)"]


@pytest.mark.parametrize("tiny", [5e-324, 1e-310, 1e-160])
def test_the_smallest_numbers_are_numbers_too(tiny: float) -> None:
    odd = rules({"a": Limit(0.0, tiny)}, distance=Distance(tiny, {"b": Centre(tiny, tiny, tiny)}))
    rows = np.array([[tiny, tiny, 0, 0], [0.0, 0.0, 0, 0], [np.inf, np.nan, 0, 0], [1e308, -1e308, 0, 0]])
    together = odd.evaluate(rows).score
    assert ((together >= 0) & (together <= MAX_SCORE)).all()
    assert together.tolist() == [odd.evaluate(row[None, :]).score[0] for row in rows]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7, 1.0, 1e-12, 1e12]), min_size=4, max_size=4),
    st.floats(0.0, 1.0, exclude_min=True),
    arrays.arrays(np.float64, (5, 4), elements=finite),
)
def test_votes_of_whatever_weight_are_counted_alike_alone_and_in_company(
    weights: list[float], share: float, rows: np.ndarray
) -> None:
    limits = {name: Limit(-1, 1, weight=weight) for name, weight in zip(FEATURES, weights, strict=True)}
    weighted = rules(limits, votes=max(sum(weights) * share, 1e-12))
    together = weighted.evaluate(rows)
    assert together.score.tolist() == [weighted.evaluate(row[None, :]).score[0] for row in rows]
    votes = (np.abs(rows) > 1) @ np.array(weights)
    sure = np.abs(votes - weighted.votes) > 1e-6 * max(sum(weights), 1.0)
    assert (together.failed == (votes >= weighted.votes))[sure].all()
