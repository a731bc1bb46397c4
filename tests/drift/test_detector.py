"""Drift is found, and nothing is found where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.drift.binning import baseline_of
from edge_agent.drift.detector import DriftDetector

NAMES = [f"f{i}" for i in range(64)]


def reference(rows: int = 1000, seed: int = 0) -> np.ndarray:
    """Columns of four kinds: normal, skewed, counts, and a constant."""
    generator = np.random.default_rng(seed)
    return np.column_stack(
        [
            generator.normal(size=(rows, 32)),
            generator.lognormal(sigma=1.5, size=(rows, 16)),
            generator.poisson(0.7, size=(rows, 15)),
            np.full(rows, 3.3),
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("window_rows", [50, 100, 500, 1000])
@pytest.mark.parametrize("reference_rows", [150, 1000])
def test_resampled_reference_windows_raise_no_alarm(window_rows: int, reference_rows: int) -> None:
    generator = np.random.default_rng(42)
    seen = reference(reference_rows)
    detector = DriftDetector(baseline_of(seen, NAMES, seen.sum(axis=1)), window_rows)
    for _ in range(40):
        rows = seen[generator.integers(0, len(seen), window_rows)]
        verdict = detector.update(rows, rows.sum(axis=1))
        assert verdict is not None
        assert not verdict.drifting, verdict
        assert verdict.features == ()


@pytest.mark.parametrize("window_rows", [100, 1000])
def test_fresh_rows_of_the_same_kind_raise_no_alarm(window_rows: int) -> None:
    detector = DriftDetector(baseline_of(reference(), NAMES, None), window_rows)
    for seed in range(1, 21):
        verdict = detector.update(reference(window_rows, seed), None)
        assert verdict is not None
        assert not verdict.drifting, verdict


def test_shifted_features_are_named_worst_first() -> None:
    detector = DriftDetector(baseline_of(reference(), NAMES, None), 500)
    rows = reference(500, 1)
    rows[:, 3] += 1.0
    rows[:, 7] += 3.0
    rows[:, 63] += 0.001  # the constant one
    verdict = detector.update(rows, None)
    assert verdict is not None
    assert verdict.drifting
    assert set(verdict.features) == {"f3", "f7", "f63"}
    assert verdict.features.index("f7") < verdict.features.index("f3")
    assert verdict.statistics["psi_max"] > 1.0
    assert verdict.rows == 500


def test_a_wider_spread_is_drift_too() -> None:
    detector = DriftDetector(baseline_of(reference(), NAMES, None), 1000)
    rows = reference(1000, 1)
    rows[:, 5] *= 2.5
    verdict = detector.update(rows, None)
    assert verdict is not None
    assert verdict.features == ("f5",)


@pytest.mark.parametrize("share", [0.15, 1.0])
def test_a_feature_that_goes_missing_is_named(share: float) -> None:
    detector = DriftDetector(baseline_of(reference(), NAMES, None), 1000)
    rows = reference(1000, 1)
    rows[: int(1000 * share), 9] = np.nan
    verdict = detector.update(rows, None)
    assert verdict is not None
    assert verdict.features == ("f9",)
    assert verdict.statistics["missing_max"] == pytest.approx(share)


def test_values_that_were_missing_before_may_go_on_missing() -> None:
    seen = reference()
    seen[::4, 9] = np.nan
    detector = DriftDetector(baseline_of(seen, NAMES, None), 500)
    rows = reference(500, 1)
    rows[::4, 9] = np.nan
    verdict = detector.update(rows, None)
    assert verdict is not None
    assert not verdict.drifting
    assert verdict.statistics["missing_max"] == pytest.approx(0.25)


def test_a_shifted_score_is_drift_even_where_no_feature_is() -> None:
    seen = reference()
    detector = DriftDetector(baseline_of(seen, NAMES, seen[:, 0]), 500)
    rows = reference(500, 1)
    verdict = detector.update(rows, rows[:, 0] + 2.0)
    assert verdict is not None
    assert verdict.drifting
    assert verdict.features == ()
    assert verdict.statistics["psi_score"] > 1.0


def test_how_rows_arrive_does_not_matter() -> None:
    base = baseline_of(reference(), NAMES, None)
    rows = reference(1000, 5)
    at_once = DriftDetector(base, 300)
    one_by_one = DriftDetector(base, 300)
    last = at_once.update(rows, None)
    verdicts = [one_by_one.update(rows[i : i + 1], None) for i in range(1000)]
    assert [i for i, verdict in enumerate(verdicts) if verdict] == [299, 599, 899]
    assert verdicts[899] == last
    assert at_once.rows_in_window == one_by_one.rows_in_window == 100


def test_a_window_forgets_the_one_before() -> None:
    detector = DriftDetector(baseline_of(reference(), NAMES, None), 200)
    first = detector.update(reference(200, 1) + 5, None)
    second = detector.update(reference(200, 2), None)
    assert first is not None
    assert first.drifting
    assert second is not None
    assert not second.drifting


def test_infinite_and_enormous_values_are_counted_not_raised() -> None:
    detector = DriftDetector(baseline_of(reference(), NAMES, None), 100)
    rows = reference(100, 1).astype(np.float64)
    rows[:50, 0], rows[50:, 0] = np.inf, 1e300
    rows[:, 1] = -np.inf
    verdict = detector.update(rows, None)
    assert verdict is not None
    assert set(verdict.features) == {"f0", "f1"}


def test_rows_of_another_width_are_our_bug_and_raise() -> None:
    detector = DriftDetector(baseline_of(reference(), NAMES, None), 100)
    with pytest.raises(ValueError, match=r"shape \(1, 3\), the baseline is for \(n, 64\)"):
        detector.update(np.zeros((1, 3)), None)
