"""Judging a candidate: verdicts from samples, phases from verdicts, tests that agree with the textbooks."""

from __future__ import annotations

import itertools

import pytest

from fleet.analysis import (
    AnalysisPhase,
    MetricState,
    Verdict,
    advance,
    failed_measurement,
    judge,
    mann_whitney_p,
    permutation_p,
    phase,
    worst,
    worst_verdict,
)
from fleet.config import MetricConfig
from fleet.measure import Sample

FAIL = MetricConfig(name="fail_ratio", compare="control", direction="either", allowed_increase=0.1)
FALLBACK = MetricConfig(name="fallback_ratio", failure_above=0.05)


def sample(device: str = "d", *, rows: float = 200, fallback: float = 0, failed: float = 10) -> Sample:
    return Sample(device, "sha256:x", 10.0, rows, fallback, rows, failed, rows, 0, 0.001)


def many(count: int, **values: float) -> list[Sample]:
    return [sample(f"d{number}", **values) for number in range(count)]


def test_a_fixed_bound_holds_for_the_worst_device_not_for_the_mean() -> None:
    samples = [*many(9), sample("sick", fallback=100)]
    measurement = judge(FALLBACK, samples, [])
    assert measurement.verdict is Verdict.HIGH
    assert measurement.explanation == "fallback_ratio 0.5 on sick, above 0.05"
    assert judge(FALLBACK, many(9), []).verdict is Verdict.PASS


def test_two_canaries_against_four_others_use_the_plain_bound() -> None:
    measurement = judge(FAIL, many(2, failed=120), many(4, failed=10))
    assert (measurement.verdict, measurement.method, measurement.p) == (Verdict.HIGH, "bound", None)
    assert judge(FAIL, many(2, failed=14), many(4, failed=10)).verdict is Verdict.PASS
    assert judge(FAIL, many(2, failed=0), many(4, failed=120)).verdict is Verdict.LOW


def test_a_difference_within_the_noise_of_few_rows_does_not_fail() -> None:
    assert judge(FAIL, many(2, rows=20, failed=5), many(4, rows=20, failed=2)).verdict is Verdict.PASS


def test_ten_canaries_use_an_exact_test_and_five_hundred_devices_a_rank_test() -> None:
    high = [sample(f"c{n}", failed=60 + n) for n in range(10)]
    control = [sample(f"k{n}", failed=10 + n) for n in range(10)]
    exact = judge(FAIL, high, control)
    assert (exact.verdict, exact.method) == (Verdict.HIGH, "permutation")
    assert exact.p == pytest.approx(1 / 184756)
    ranked = judge(FAIL, high, [sample(f"k{n}", failed=10 + n % 20) for n in range(490)])
    assert (ranked.verdict, ranked.method) == (Verdict.HIGH, "mann-whitney")


def test_a_large_difference_of_means_that_one_device_makes_is_not_called_real() -> None:
    # Nine canaries like the others, one wild: the mean is above the limit, the devices are not.
    tested = [*many(9), sample("wild", rows=200, failed=200)]
    config = MetricConfig(name="fail_ratio", compare="control", allowed_increase=0.05)
    measurement = judge(config, tested, many(10))
    assert measurement.p is not None
    assert measurement.p > 0.05
    assert measurement.verdict is Verdict.PASS


def test_direction_says_which_difference_counts() -> None:
    lower = MetricConfig(name="fail_ratio", compare="control", direction="decrease", allowed_increase=0.1)
    assert judge(lower, many(2, failed=120), many(4)).verdict is Verdict.PASS
    assert judge(lower, many(2, failed=0), many(4, failed=120)).verdict is Verdict.LOW


def test_no_data_is_neither_pass_nor_failure() -> None:
    assert judge(FAIL, [], many(4)).verdict is Verdict.NODATA
    assert judge(FAIL, many(2, rows=5), many(4)).verdict is Verdict.NODATA
    assert judge(FAIL, many(2), []).verdict is Verdict.NODATA


def test_without_control_devices_left_the_earlier_reference_is_used() -> None:
    measurement = judge(FAIL, many(2, failed=120), [], reference=0.05)
    assert (measurement.verdict, measurement.method) == (Verdict.HIGH, "reference")
    assert judge(FAIL, many(2, failed=12), [], reference=0.05).verdict is Verdict.PASS


def test_a_fixed_bound_beside_a_comparison_decides_by_the_worse() -> None:
    both = MetricConfig(name="fail_ratio", compare="control", allowed_increase=0.9, failure_above=0.5)
    assert judge(both, many(2, failed=120), many(4)).verdict is Verdict.HIGH


def test_permutation_p_counts_arrangements() -> None:
    assert permutation_p([5, 6], [1, 2, 3]) == pytest.approx(1 / 10)
    assert permutation_p([1, 1], [1, 1]) == 1.0
    values = [0.3, 0.1, 0.4, 0.15, 0.92, 0.6]
    tested, control = values[:3], values[3:]
    by_hand = [
        sum(chosen) / 3 - sum(v for v in values if v not in chosen) / 3
        for chosen in itertools.combinations(values, 3)
    ]
    observed = sum(tested) / 3 - sum(control) / 3
    assert permutation_p(tested, control) == sum(d <= observed + 1e-12 for d in by_hand) / 20


def test_mann_whitney_agrees_with_a_count_by_hand() -> None:
    # 6 of the 30 pairs have the tested value above: U = 6, mean 15, variance 30, z = 8.5 / sqrt(30).
    assert mann_whitney_p([1.1, 2.2, 3.3, 4.4, 5.5], [3, 4, 5, 6, 7, 8]) == pytest.approx(0.0603, abs=1e-4)
    assert mann_whitney_p([1, 1], [1, 1, 1]) == 1.0


def test_the_worst_decides_and_nothing_overwrites_it() -> None:
    for order in itertools.permutations(
        [AnalysisPhase.SUCCESSFUL, AnalysisPhase.FAILED, AnalysisPhase.ERROR]
    ):
        assert worst(order) is AnalysisPhase.FAILED
    assert worst([AnalysisPhase.SUCCESSFUL, AnalysisPhase.RUNNING]) is AnalysisPhase.RUNNING
    assert worst([AnalysisPhase.RUNNING, AnalysisPhase.INCONCLUSIVE]) is AnalysisPhase.INCONCLUSIVE
    assert worst([]) is AnalysisPhase.SUCCESSFUL
    assert worst_verdict([Verdict.NODATA, Verdict.PASS]) is Verdict.NODATA


def _after(config: MetricConfig, *looks: str) -> MetricState:
    state = MetricState()
    kinds = {
        "good": judge(config, many(2), many(4)),
        "bad": judge(config, many(2, fallback=150, failed=150), many(4)),
        "none": judge(config, [], []),
        "error": failed_measurement(config, "Prometheus is away"),
    }
    for look in looks:
        state = advance(config, state, kinds[look], counting=True)
    return state


@pytest.mark.parametrize(
    ("changes", "looks", "expected"),
    [
        ({}, [], AnalysisPhase.PENDING),
        ({}, ["good"] * 2, AnalysisPhase.RUNNING),
        ({}, ["good"] * 3, AnalysisPhase.SUCCESSFUL),
        ({}, ["good", "bad"], AnalysisPhase.FAILED),
        ({"failure_limit": 1}, ["good", "bad", "good", "good"], AnalysisPhase.SUCCESSFUL),
        ({"failure_limit": 1}, ["bad", "good", "bad"], AnalysisPhase.FAILED),
        ({"inconclusive_limit": 1}, ["none", "none"], AnalysisPhase.INCONCLUSIVE),
        ({"inconclusive_limit": 1}, ["none", "good", "none"], AnalysisPhase.RUNNING),
        ({"must_have_data": False}, ["none"] * 3, AnalysisPhase.SUCCESSFUL),
        ({"consecutive_error_limit": 1}, ["error", "error"], AnalysisPhase.ERROR),
        ({"consecutive_error_limit": 1}, ["error", "good", "error"], AnalysisPhase.RUNNING),
    ],
)
def test_phases_follow_from_counts(changes: dict, looks: list[str], expected: AnalysisPhase) -> None:
    config = MetricConfig(name="fallback_ratio", failure_above=0.05, **changes)
    assert phase(config, _after(config, *looks), count=3) is expected


def test_before_counting_begins_only_failures_are_noted() -> None:
    state = advance(FALLBACK, MetricState(), judge(FALLBACK, many(2), []), counting=False)
    assert (state.passes, state.failures) == (0, 0)
    bad = judge(FALLBACK, many(2, fallback=200), [])
    assert advance(FALLBACK, state, bad, counting=False).failures == 1
