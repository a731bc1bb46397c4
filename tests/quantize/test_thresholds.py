"""Where pass ends: what each kind of threshold promises, and what confidence means."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from edge_agent.contract import bundle
from quantize.config import Threshold
from quantize.decide import Scored, spread_of, threshold_of
from quantize.errors import BadData
from tests.quantize import models
from tests.quantize.models import quantize_fast as quantize


def scored(good: np.ndarray, bad: np.ndarray) -> Scored:
    return Scored(np.concatenate([good, bad]), np.repeat([False, True], [len(good), len(bad)]))


@pytest.mark.parametrize("text", ["quantile:0.99", "fpr:0.01", "f1", "cost:10/1", "0.25", "-1000"])
def test_a_threshold_is_written_as_it_is_read(text):
    assert str(Threshold.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["fpr:0", "fpr:1", "cost:1", "cost:0/1", "cost:inf/1", "f2", "f1:0.5", "cost:/"]
)
def test_thresholds_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="expected quantile:Q"):
        Threshold.parse(text)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_fpr_holds_for_good_rows_to_come(rate):
    """On average over many calibrations no more than the rate fails, however few rows there were."""
    random = np.random.default_rng(0)
    wanted = Threshold(quantile=None, fpr=rate)
    shares = []
    for _ in range(400):
        threshold = threshold_of(random.gamma(2.0, size=int(random.integers(120, 300))), wanted)
        shares.append((random.gamma(2.0, size=500) > threshold).mean())
    assert np.mean(shares) <= rate * 1.1
    assert np.mean(shares) > rate * 0.4


def test_fpr_prefers_good_rows_that_the_model_was_not_trained_on():
    random = np.random.default_rng(1)
    calibration = random.normal(1.0, 0.1, 500)  # seen in training: scores too low
    held_out = scored(random.normal(2.0, 0.1, 500), random.normal(9.0, 1.0, 50))
    assert threshold_of(calibration, Threshold(quantile=None, fpr=0.05), held_out) > 2.0
    few = scored(held_out.scores[:10], held_out.scores[-5:])
    assert threshold_of(calibration, Threshold(quantile=None, fpr=0.05), few) < 1.5


def f1_of(scores: Scored, threshold: float) -> float:
    failed = scores.scores > threshold
    caught = (failed & scores.labels).sum()
    return 2 * caught / (failed.sum() + scores.labels.sum())


def test_f1_is_the_best_of_all_thresholds():
    random = np.random.default_rng(2)
    held_out = scored(random.normal(0, 1, 300), random.normal(1.5, 1, 60))
    found = threshold_of(np.zeros(10), Threshold(quantile=None, f1=True), held_out)
    best = max(f1_of(held_out, value) for value in np.linspace(-4, 6, 2001))
    assert f1_of(held_out, found) >= best - 1e-9


@pytest.mark.parametrize("cost", [(1.0, 1.0), (20.0, 1.0), (1.0, 20.0)])
def test_cost_is_the_cheapest_of_all_thresholds(cost):
    random = np.random.default_rng(3)
    held_out = scored(random.normal(0, 1, 300), random.normal(1.5, 1, 60))

    def paid(threshold: float) -> float:
        failed = held_out.scores > threshold
        return cost[0] * (~failed & held_out.labels).sum() + cost[1] * (failed & ~held_out.labels).sum()

    found = threshold_of(np.zeros(10), Threshold(quantile=None, cost=cost), held_out)
    assert paid(found) <= min(paid(value) for value in np.linspace(-5, 7, 4001)) + 1e-9


def test_equal_scores_are_on_the_same_side():
    held_out = Scored(np.array([0.0, 1.0, 1.0, 1.0, 2.0]), np.array([False, False, True, False, True]))
    for wanted in (Threshold(quantile=None, f1=True), Threshold(quantile=None, cost=(1.0, 1.0))):
        found = threshold_of(np.zeros(10), wanted, held_out)
        assert found not in (0.0, 1.0, 2.0)


@pytest.mark.parametrize("text", ["f1", "cost:5/1"])
def test_a_threshold_from_labels_without_labels_says_what_is_missing(
    autoencoder, calibration, tmp_path, capsys, text
):
    assert quantize(autoencoder, calibration, tmp_path / "out", "--quiet", "--threshold", text) == 1
    assert f"--threshold {text} needs labelled rows" in capsys.readouterr().err
    with pytest.raises(BadData):
        threshold_of(np.zeros(10), Threshold.parse(text))


def test_confidence_is_how_often_held_out_decisions_are_right():
    """Reliability: of the decisions with a confidence of about c, about c are right."""
    random = np.random.default_rng(4)
    scores = random.normal(0, 2, 40_000)
    labels = random.random(40_000) < 1 / (1 + np.exp(-(scores - 1.0) / 0.7))
    spread = spread_of(scores[:2000], labels[:2000], 1.0)
    confidence = 1 / (1 + np.exp(-np.abs(scores - 1.0) / spread))
    right = (scores > 1.0) == labels
    edges = np.linspace(0.5, 1.0, 6)
    for low, high in pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        assert abs(right[inside].mean() - confidence[inside].mean()) < 0.05


def test_fpr_reaches_the_bundle(autoencoder, calibration, tmp_path):
    assert (
        quantize(autoencoder, calibration, tmp_path / "a", "--scale", "standard", "--threshold", "fpr:0.1")
        == 0
    )
    manifest = bundle.open_bundle(tmp_path / "a" / "unit-1.2.3").manifest
    assert "--threshold=fpr:0.1" in manifest.provenance.command
    assert manifest.decision.threshold > 0


@pytest.mark.parametrize("text", ["f1", "cost:5/1"])
def test_labels_of_the_rows_for_choosing_make_the_threshold(autoencoder, calibration, tmp_path, text):
    held_out = models.write_rows(
        tmp_path / "held.npz",
        np.concatenate([models.rows(100, seed=2), models.bad_rows(60)]),
        y=np.repeat([0, 1], [100, 60]),
    )
    options = ("--scale", "standard", "--validation", str(held_out), "--threshold", text)
    assert quantize(autoencoder, calibration, tmp_path / "a", *options) == 0
    assert bundle.open_bundle(tmp_path / "a" / "unit-1.2.3").manifest.decision.threshold > 0
