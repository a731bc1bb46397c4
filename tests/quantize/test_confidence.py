"""What a few rows say about others."""

from __future__ import annotations

import numpy as np
import pytest

from quantize import compare, confidence
from quantize.config import Budget, Metric


@pytest.mark.parametrize(("spread", "least"), [(0.2, 0.9), (1.0, 0.8)])
@pytest.mark.parametrize("rows", [6, 20, 100])
def test_the_bound_of_a_ratio_holds_about_as_often_as_it_says(rows, spread, least):
    """Noise of rows is log-normal here: the more uneven, the more often few rows miss the worst of them."""
    chance = np.random.default_rng(rows)
    signal = chance.lognormal(0, 0.5, (4000, rows))
    noise = signal * 0.01 * chance.lognormal(-(spread**2) / 2, spread, signal.shape)
    held = np.mean([confidence.ratio_below(*pair) >= 0.01 for pair in zip(noise, signal, strict=True)])
    assert least <= held <= 0.99


def test_a_bound_gets_closer_with_more_rows_and_with_rows_that_are_alike():
    chance = np.random.default_rng(1)
    reference = chance.standard_normal((400, 30))
    noise = chance.standard_normal((400, 30)) * 0.05
    uneven = noise * chance.lognormal(0, 1, (400, 1))

    def gap(some: np.ndarray, rows: int) -> float:
        figures = reference[:rows], (reference + some)[:rows]
        return compare.sqnr(*figures) - compare.sqnr_low(*figures)

    assert 0 < gap(noise, 400) < gap(noise, 8)
    assert gap(noise, 100) < gap(uneven, 100)


def test_one_row_and_rows_without_a_difference_say_what_they_are():
    assert compare.sqnr_low(np.ones((1, 3)), np.full((1, 3), 1.1)) == pytest.approx(20.0)
    assert compare.sqnr_low(np.ones((5, 3)), np.ones((5, 3))) == compare.IDENTICAL
    assert compare.sqnr_low(np.ones((5, 3)), np.full((5, 3), np.nan)) == -compare.IDENTICAL
    assert confidence.ratio_below(np.ones(4), np.zeros(4)) == np.inf


@pytest.mark.parametrize("bad", [10, 40])
def test_the_bound_of_a_falling_auc_holds_about_as_often_as_it_says(bad):
    """Two models whose true AUCs are alike: how often is the true change, which is none, below the bound?"""
    chance = np.random.default_rng(bad)
    labels = np.arange(200) < bad
    held = []
    for _ in range(300):
        shared = chance.standard_normal(200) + 1.5 * labels
        before, after = (shared + 0.3 * chance.standard_normal(200) for _ in range(2))

        def drop(kept: np.ndarray, before: np.ndarray = before, after: np.ndarray = after) -> float:
            return compare.auc(labels[kept], before[kept]) - compare.auc(labels[kept], after[kept])

        held.append(confidence.change_below(drop, labels) >= 0)
    assert 0.88 <= np.mean(held) <= 0.99


def test_one_bad_row_says_nothing_of_others():
    labels = np.arange(10) == 3
    assert confidence.change_below(lambda kept: float(kept.sum()), labels) == 10.0


def test_a_budget_of_labelled_rows_is_held_by_what_they_say_of_others():
    """The AUC falls by little on these rows; a dozen bad ones do not show that it does on others."""
    chance = np.random.default_rng(3)
    labels = np.arange(250) < 12
    reference = chance.random(250) + 0.6 * labels
    candidate = reference + chance.normal(0, 0.12, 250)
    found = compare.scores(reference, candidate, (0.9, 0.9), labels)
    assert found.drops_high is not None
    drop = found.drops_high["auc"] + (found.auc or 0) - (found.auc_reference or 0)
    assert drop > 0
    budget = Budget(metric=Metric.AUC, max_auc_drop=found.drops_high["auc"] - drop / 2)
    assert found.inside(budget, surely=False)
    assert not found.inside(budget)


def test_labelled_rows_do_not_excuse_scores_that_are_mostly_noise():
    """Bad rows are so far out that any noise leaves the AUC as it is; the other rows' scores are gone."""
    chance = np.random.default_rng(4)
    labels = np.arange(400) < 100
    reference = chance.random(400) + 3.0 * labels
    candidate = reference * chance.choice([0.5, 1.6], 400)
    candidate[labels] += 4
    found = compare.scores(reference, candidate, (1.5, 1.5), labels)
    assert found.auc == found.auc_reference == 1.0
    assert found.inside(Budget(metric=Metric.AUC))
    assert not found.inside(Budget())


def test_student_s_t_is_that_of_scipy():
    from scipy.stats import t

    for freedom in (1, 2, 3, 4, 7, 20, 200):
        assert confidence.student(freedom) == pytest.approx(t.ppf(0.95, freedom), rel=5e-3)


def test_a_share_of_99_percent_takes_270_rows_without_a_difference():
    for rows, enough in ((260, False), (275, True)):
        assert (confidence.share_above(np.ones((rows, 1), bool)) >= 0.99) is enough
    assert confidence.share_above(np.ones((12, 24), bool)) >= 0.99


def test_decisions_of_one_row_count_less_where_they_are_alike():
    scattered, together = np.ones((40, 24), bool), np.ones((40, 24), bool)
    scattered[::4, 5] = False
    together[7, 2:12] = False
    assert scattered.mean() == together.mean()
    assert confidence.share_above(together) < confidence.share_above(scattered) < scattered.mean()
