"""The formulas against published values and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.drift import distance


@pytest.mark.parametrize(
    ("degrees", "probability", "tabled"),
    [
        (1, 0.95, 3.841),
        (2, 0.99, 9.210),
        (9, 0.95, 16.919),
        (9, 0.999, 27.877),
        (9, 0.9999, 33.720),
        (19, 0.99, 36.191),
    ],
)
def test_the_chi_square_quantile_agrees_with_the_tables(
    degrees: int, probability: float, tabled: float
) -> None:
    assert distance.chi_square_quantile(np.array([degrees]), probability)[0] == pytest.approx(
        tabled, rel=0.03
    )


def test_equal_shares_have_no_distance_whatever_the_rows() -> None:
    reference, live = np.array([[1000, 2000, 3000]]), np.array([[10, 20, 30]])
    assert distance.psi(reference, live, np.array([3]))[0] == pytest.approx(0.0, abs=1e-3)


def test_the_index_of_a_known_pair() -> None:
    reference, live = np.array([[500_000, 500_000]]), np.array([[250_000, 750_000]])
    expected = 0.25 * np.log(2) + 0.25 * np.log(1.5)
    assert distance.psi(reference, live, np.array([2]))[0] == pytest.approx(expected, rel=1e-4)


def test_padding_bins_do_not_take_part() -> None:
    reference, live = np.array([[40, 60]]), np.array([[70, 30]])
    padded = np.array([[40, 60, 0, 0]]), np.array([[70, 30, 0, 0]])
    used = np.array([2])
    assert distance.psi(*padded, used) == pytest.approx(distance.psi(reference, live, used))


def test_an_empty_bin_stays_finite() -> None:
    assert np.isfinite(distance.psi(np.array([[0, 0]]), np.array([[0, 9]]), np.array([2]))).all()


def test_without_drift_the_index_is_on_average_what_the_noise_says() -> None:
    generator = np.random.default_rng(7)
    reference = generator.multinomial(2000, [0.1] * 10, size=4000)
    live = generator.multinomial(500, [0.1] * 10, size=4000)
    index = distance.psi(reference, live, np.full(4000, 10))
    expected = 9 * distance.noise(np.array([2000]), np.array([500]))[0]
    assert index.mean() == pytest.approx(expected, rel=0.05)
    cut = expected / 9 * distance.chi_square_quantile(np.array([9]), 0.99)[0]
    assert (index > cut).mean() == pytest.approx(0.01, abs=0.005)


def test_a_share_that_grew_by_chance_is_within_a_few_standard_errors_and_a_real_one_is_not() -> None:
    excess = distance.share_excess(np.array([10, 10, 0]), 1000, np.array([12, 100, 0]), 1000)
    assert abs(excess[0]) < 1 < 8 < excess[1]
    assert excess[2] == 0
