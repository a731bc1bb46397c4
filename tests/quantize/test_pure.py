"""Comparisons, thresholds and rules: numbers in, numbers out."""

from __future__ import annotations

import numpy as np
import pytest

from quantize import compare, decide, fallback
from quantize.compare import Comparison
from quantize.config import Budget, Threshold


def test_auc_agrees_with_scikit_learn_ties_included():
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    labels = random.random(300) < 0.3
    scores = np.round(random.standard_normal(300) + labels, 1)
    assert compare.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_sqnr_of_one_percent_noise_is_40_db():
    signal = np.ones(1000)
    noise = np.where(np.arange(1000) % 2, 0.01, -0.01)
    assert compare.sqnr(signal, signal + noise) == pytest.approx(40, abs=1e-9)
    assert compare.sqnr(signal, signal) == compare.IDENTICAL
    assert compare.sqnr(signal, np.full(1000, np.nan)) == -compare.IDENTICAL


def test_scores_far_above_the_threshold_do_not_hide_the_others():
    reference = np.array([1.0, 1.0, 1.0, 1e6])
    close = np.array([1.01, 0.99, 1.01, 2e6])
    found = compare.scores(reference, close, (2.0, 2.0), None)
    assert found.sqnr > 40
    assert found.agreement == 1.0
    broken = compare.scores(reference, np.array([1.0, np.nan, 1.0, 1.0]), (2.0, 2.0), None)
    assert not broken.inside(Budget())


def test_where_nothing_is_sure_figures_count_of_rows_that_can_tell_something():
    few = Comparison(rows=20, sqnr=20, sqnr_low=15, agreement=0.996, agreement_low=0.985)
    fewer = Comparison(rows=20, sqnr=20, sqnr_low=15, agreement=1.0, agreement_low=0.9)
    assert not few.inside(Budget())
    assert few.inside(Budget(), surely=False)
    assert not fewer.inside(Budget(), surely=False)


@pytest.mark.parametrize(
    ("comparison", "inside"),
    [
        (Comparison(rows=9, sqnr=30, agreement=0.5), True),
        (Comparison(rows=9, sqnr=30, sqnr_low=24.9, agreement=0.5), False),  # so few say little
        (Comparison(rows=9, sqnr=27, sqnr_low=25.1, agreement=0.5), True),
        (Comparison(rows=400, sqnr=10, agreement=1.0, agreement_low=0.993), True),
        (Comparison(rows=99, sqnr=10, agreement=1.0, agreement_low=0.973), False),
        (Comparison(rows=400, sqnr=9, agreement=1.0, agreement_low=0.993), False),  # a constant agrees, too
        (Comparison(rows=9, sqnr=10, agreement=0.9), False),
        (Comparison(rows=9, sqnr=10, agreement=None), False),
        (Comparison(rows=9, sqnr=40, agreement=1, auc_reference=0.95, auc=0.92), False),
        (Comparison(rows=9, sqnr=12, agreement=0.9, auc_reference=0.95, auc=0.945), True),
        (Comparison(rows=9, sqnr=5, agreement=0.9, auc_reference=0.95, auc=0.945), False),  # hardly related
    ],
)
def test_labels_decide_before_noise_and_agreement(comparison, inside):
    assert comparison.inside(Budget()) is inside


@pytest.mark.parametrize("text", ["quantile:0", "quantile:1", "quantile:", "nan", "inf", "", "0.5x"])
def test_thresholds_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="expected quantile:Q"):
        Threshold.parse(text)


def test_the_spread_is_the_width_that_explains_the_labels():
    random = np.random.default_rng(1)
    scores = random.uniform(0, 10, 20_000)
    labels = random.random(20_000) < 1 / (1 + np.exp(-(scores - 5) / 0.8))
    assert decide.spread_of(scores, labels, 5.0) == pytest.approx(0.8, rel=0.1)
    assert decide.spread_of(np.zeros(10), None, 0.0) > 0


def test_derived_rules_alarm_as_often_as_the_model_and_read_well():
    random = np.random.default_rng(2)
    calibration = random.standard_normal((1000, 4)) * np.array([1, 0.5, 100, 0])
    calibration += np.array([0, 101325, 20, 7])
    calibration[::50, 0] = np.nan
    held_out = np.concatenate([calibration[:200], calibration[:200] + np.array([6, 0, 0, 0])])
    failed = np.arange(400) >= 200
    rules = fallback.derive(("a", "pressure", "c", "constant"), calibration, 0.02, held_out, failed)
    found = fallback.judge(rules, calibration, 0.02, held_out, failed, failed)
    assert found.alarm_rate <= 0.02
    assert found.agreement > 0.9
    assert found.auc > 0.95
    assert "constant" not in rules.limits
    pressure = rules.limits["pressure"]
    assert pressure.lolo is not None
    assert pressure.hihi is not None
    assert 101310 < pressure.lolo < 101325 < pressure.hihi < 101340
    assert type(rules).parse(rules.to_yaml(), rules.features) == rules


def test_features_that_never_vary_leave_rules_that_pass():
    rules = fallback.derive(("a",), np.ones((50, 1)), 0.0, np.ones((5, 1)), np.zeros(5, bool))
    assert not rules.evaluate(np.array([[1.0], [99.0]])).failed.any()


def test_rules_weigh_features_as_the_model_does_where_its_scores_are_known():
    """A model that looks at two of twenty features: a distance over all twenty drowns them."""
    random = np.random.default_rng(3)
    features = tuple(f"f{index}" for index in range(20))
    rows = random.standard_normal((2000, 20)) * np.logspace(-2, 3, 20)
    rows[1000:1060, 3] *= 4
    units = (rows / np.logspace(-2, 3, 20)) ** 2
    scores = 3 * units[:, 3] + units[:, 7]
    calibration, held_out = rows[:800], rows[800:]
    threshold = np.quantile(scores[:800], 0.99)
    failed = scores[800:] > threshold
    found = {}
    for known in (None, scores[:800]):
        rules = fallback.derive(features, calibration, 0.01, held_out[::2], failed[::2], known)
        judged = fallback.judge(rules, calibration, 0.01, held_out[1::2], failed[1::2], None)
        found[known is not None] = judged
        assert judged.alarm_rate <= 0.011
    assert found[True].agreement > 0.99
    assert found[True].agreement > found[False].agreement
    assert found[True].auc_model > 0.99
    distance = found[True].rules.distance
    assert max(distance.features, key=lambda name: distance.features[name].weight) == "f3"


def test_rules_of_many_rows_take_no_longer_than_of_a_sample():
    random = np.random.default_rng(4)
    rows = random.standard_normal((60_000, 8)).astype(np.float32)
    scores = (rows**2).mean(axis=1)
    failed = scores[:500] > 2.5
    rules = fallback.derive(tuple("abcdefgh"), rows, 0.005, rows[:500], failed, scores)
    assert (rules.evaluate(rows).failed.mean() - 0.005) < 0.003
