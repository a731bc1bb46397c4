"""The reference is cut and live rows are counted in the same way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_agent.contract import baseline
from edge_agent.drift.binning import Bins, baseline_of

columns = arrays.arrays(
    st.sampled_from([np.float32, np.float64]),
    st.tuples(st.integers(0, 60), st.integers(1, 3)),
    elements={"allow_nan": True, "allow_infinity": True},
)


@given(columns)
def test_every_value_is_counted_once_and_as_searchsorted_would(rows: np.ndarray) -> None:
    built = baseline_of(rows, [f"f{i}" for i in range(rows.shape[1])], None, bins=5)
    for column, histogram in enumerate(built.features):
        with np.errstate(over="ignore"):
            values = rows[:, column].astype(np.float32)
        present = values[~np.isnan(values)]
        bins = np.searchsorted(np.array(histogram.edges, dtype=np.float32), present, side="right")
        assert np.bincount(bins, minlength=len(histogram.counts)).tolist() == list(histogram.counts)
        assert sum(histogram.counts) + histogram.missing == len(rows)


@given(columns)
def test_a_baseline_survives_its_file(rows: np.ndarray) -> None:
    built = baseline_of(rows, [f"f{i}" for i in range(rows.shape[1])], rows[:, 0])
    assert baseline.parse(baseline.encode(built)) == built


def test_bins_of_a_continuous_column_hold_equal_shares() -> None:
    built = baseline_of(np.random.default_rng(0).normal(size=(1000, 1)), ["x"], None, bins=10)
    assert built.features[0].counts == (100,) * 10


def test_a_column_of_few_values_has_few_bins() -> None:
    built = baseline_of(np.array([[0.0], [0.0], [0.0], [1.0]] * 25), ["switch"], None)
    assert built.features[0].edges == (0.0, 1.0)
    assert built.features[0].counts == (0, 75, 25)


def test_a_constant_column_notices_a_move_to_either_side() -> None:
    built = baseline_of(np.full((50, 1), 0.1), ["constant"], None)
    assert built.features[0].counts == (0, 50, 0)
    counts, _ = Bins(built.features).count(np.array([[0.09], [0.1], [0.11]], dtype=np.float32))
    assert counts[0].tolist() == [1, 1, 1]


def test_a_column_without_any_value_has_one_bin_and_all_missing() -> None:
    built = baseline_of(np.full((5, 1), np.nan), ["dead"], None)
    assert (built.features[0].edges, built.features[0].counts, built.features[0].missing) == ((), (0,), 5)


def test_columns_of_different_bins_do_not_disturb_each_other() -> None:
    generator = np.random.default_rng(1)
    rows = np.column_stack([generator.normal(size=400), np.repeat([0.0, 1.0], 200), np.zeros(400)])
    built = baseline_of(rows, ["a", "b", "c"], None)
    counts, missing = Bins(built.features).count(rows.astype(np.float32))
    for column, histogram in enumerate(built.features):
        assert counts[column].tolist() == [*histogram.counts, *[0] * (10 - len(histogram.counts))]
    assert missing.tolist() == [0, 0, 0]


def test_rows_that_do_not_fit_their_names_are_our_bug_and_raise() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(n, 1\)"):
        baseline_of(np.zeros((2, 3)), ["a"], None)
    with pytest.raises(ValueError, match=r"scores have shape \(1,\), expected \(2,\)"):
        baseline_of(np.zeros((2, 1)), ["a"], np.zeros(1))
