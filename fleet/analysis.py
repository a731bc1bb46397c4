"""Is the candidate as good as what it replaces? Pure: samples in, verdicts out, no clock, no I/O.

Invariants:

- verdicts and phases are combined by ``max`` in their order of badness, never by overwriting;
- no data is never a pass (unless the metric says so) and never a failure: it is ``Nodata``, and in the end a
  person's decision;
- the devices under test are compared with the others over the same minutes, and the devices are the
  observations: rows of one device are not independent of each other (where judges of time series go wrong:
  Kayenta #780, #426).

The comparison is the difference of the devices' mean values. It counts as real when an exact permutation test
says so; where too many arrangements exist, a Mann-Whitney test; where there are too few devices for any test
to reach ``alpha``, a plain bound: the difference, less two standard errors of a ratio, beyond the allowed.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from fleet.config import MetricConfig
from fleet.measure import Sample

_MAX_ARRANGEMENTS = 200_000  # of an exact test: 0.2 s; 10 against 10 devices are 184,756


class Verdict(enum.Enum):
    """The judgement of one measurement, in Kayenta's words, from best to worst."""

    PASS = "Pass"  # noqa: S105 - not a password
    NODATA = "Nodata"
    ERROR = "Error"
    LOW = "Low"
    HIGH = "High"


class AnalysisPhase(enum.Enum):
    """Where an analysis stands, in Argo Rollouts' words, from best to worst."""

    SUCCESSFUL = "Successful"
    PENDING = "Pending"
    RUNNING = "Running"
    INCONCLUSIVE = "Inconclusive"
    ERROR = "Error"
    FAILED = "Failed"


_VERDICTS = tuple(Verdict)
_PHASES = tuple(AnalysisPhase)


class Measurement(msgspec.Struct, frozen=True, omit_defaults=True):
    """One look at one metric, with everything needed to check it by hand."""

    metric: str
    verdict: Verdict
    explanation: str
    value: float | None = None  # mean of the devices under test
    control: float | None = None  # mean of the others
    devices: int = 0  # under test, with data
    controls: int = 0
    observations: float = 0.0  # rows (or requests) of the devices under test
    method: str = ""  # bound, permutation, mann-whitney, reference, fixed
    p: float | None = None


class MetricState(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the measurements of one metric in one wave came to."""

    passes: int = 0
    failures: int = 0
    nodata: int = 0  # in a row
    errors: int = 0  # in a row
    last: Measurement | None = None


def worst_verdict(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of ``verdicts``; Pass of none."""
    return max(verdicts, key=_VERDICTS.index, default=Verdict.PASS)


def worst(phases: Iterable[AnalysisPhase]) -> AnalysisPhase:
    """The worst of ``phases``; Successful of none."""
    return max(phases, key=_PHASES.index, default=AnalysisPhase.SUCCESSFUL)


def judge(
    config: MetricConfig,
    candidate: Sequence[Sample],
    control: Sequence[Sample],
    reference: float | None = None,
) -> Measurement:
    """One measurement of a metric.

    Args:
        config: the metric and its conditions.
        candidate: samples under the digest under test.
        control: samples of the same time under the stable digest.
        reference: the control's mean of an earlier measurement, used when no control device is left.
    """
    tested = _values(config, candidate)
    if not tested:
        return Measurement(
            config.name,
            Verdict.NODATA,
            f"{config.name}: no device under test had {config.min_rows} observations",
        )
    judged = []
    if config.compare == "control":  # first: of equal verdicts the comparison says more
        judged.append(_compare(config, tested, _values(config, control), reference))
    judged.append(_fixed(config, tested))
    return max(judged, key=lambda measurement: _VERDICTS.index(measurement.verdict))


def failed_measurement(config: MetricConfig, problem: str) -> Measurement:
    """A measurement that could not be taken."""
    return Measurement(config.name, Verdict.ERROR, f"{config.name}: {problem}")


def advance(
    config: MetricConfig, state: MetricState, measurement: Measurement, *, counting: bool
) -> MetricState:
    """The state after one more measurement; before ``counting`` only failures are noted."""
    verdict = measurement.verdict
    if verdict is Verdict.NODATA and not config.must_have_data:
        verdict = Verdict.PASS
    state = replace(state, last=measurement)
    if verdict in {Verdict.HIGH, Verdict.LOW}:
        return replace(state, failures=state.failures + 1, nodata=0, errors=0)
    if not counting:
        return state
    if verdict is Verdict.NODATA:
        return replace(state, nodata=state.nodata + 1)
    if verdict is Verdict.ERROR:
        return replace(state, errors=state.errors + 1)
    return replace(state, passes=state.passes + 1, nodata=0, errors=0)


def phase(config: MetricConfig, state: MetricState, count: int) -> AnalysisPhase:
    """Where one metric stands after its measurements."""
    if state.failures > config.failure_limit:
        return AnalysisPhase.FAILED
    if state.errors > config.consecutive_error_limit:
        return AnalysisPhase.ERROR
    if state.nodata > config.inconclusive_limit:
        return AnalysisPhase.INCONCLUSIVE
    if state.passes >= count:
        return AnalysisPhase.SUCCESSFUL
    return AnalysisPhase.RUNNING if state.last else AnalysisPhase.PENDING


class _Value(msgspec.Struct, frozen=True):
    device: str
    value: float
    observations: float


def _values(config: MetricConfig, samples: Sequence[Sample]) -> list[_Value]:
    found = []
    for sample in samples:
        value, observations = sample.value(config.name)
        if value is not None and observations >= config.min_rows:
            found.append(_Value(sample.device, value, observations))
    return found


def _mean(values: Sequence[_Value]) -> float:
    return sum(one.value for one in values) / len(values)


def _fixed(config: MetricConfig, tested: list[_Value]) -> Measurement:
    """Bounds that hold for every device; the worst device decides."""
    verdict, explanation = Verdict.PASS, f"{config.name} {_mean(tested):.4g} on {len(tested)} devices"
    highest = max(tested, key=lambda one: one.value)
    lowest = min(tested, key=lambda one: one.value)
    if config.failure_above is not None and highest.value > config.failure_above:
        verdict = Verdict.HIGH
        explanation = f"{config.name} {highest.value:.4g} on {highest.device}, above {config.failure_above:g}"
    elif config.failure_below is not None and lowest.value < config.failure_below:
        verdict = Verdict.LOW
        explanation = f"{config.name} {lowest.value:.4g} on {lowest.device}, below {config.failure_below:g}"
    return Measurement(
        config.name,
        verdict,
        explanation,
        value=_mean(tested),
        devices=len(tested),
        observations=sum(one.observations for one in tested),
        method="fixed",
    )


def _compare(
    config: MetricConfig, tested: list[_Value], control: list[_Value], reference: float | None
) -> Measurement:
    value, other = _mean(tested), _mean(control) if control else reference
    observations = sum(one.observations for one in tested)
    if other is None:
        explanation = f"{config.name}: no control device had {config.min_rows} observations"
        return Measurement(config.name, Verdict.NODATA, explanation, value=value, devices=len(tested))
    difference = value - other
    method, p, margin = "reference", None, 0.0
    if control:
        method, p = _test([one.value for one in tested], [one.value for one in control])
        if p is None:
            margin = 2.0 * _ratio_error(config, tested, control)
    real = p is None or p <= config.alpha
    verdict = Verdict.PASS
    if real and difference - margin > config.allowed_increase and config.direction != "decrease":
        verdict = Verdict.HIGH
    elif real and -difference - margin > config.allowed_increase and config.direction != "increase":
        verdict = Verdict.LOW
    said = f", p {p:.3g}" if p is not None else ""
    return Measurement(
        config.name,
        verdict,
        f"{config.name} {value:.4g} on {len(tested)} devices against {other:.4g} on {len(control)} others: "
        f"{difference:+.4g}, allowed {config.allowed_increase:g} ({method}{said})",
        value=value,
        control=other,
        devices=len(tested),
        controls=len(control),
        observations=observations,
        method=method,
        p=p,
    )


def _test(tested: list[float], control: list[float]) -> tuple[str, float | None]:
    """Method and one-sided p of "the groups differ in the direction that they do"."""
    n, m = len(tested), len(control)
    arrangements = math.comb(n + m, n)
    # Below 1/0.05 arrangements no outcome whatever could be called unlikely.
    if arrangements < 20:
        return "bound", None
    if arrangements <= _MAX_ARRANGEMENTS:
        return "permutation", permutation_p(tested, control)
    return "mann-whitney", mann_whitney_p(tested, control)


def permutation_p(tested: Sequence[float], control: Sequence[float]) -> float:
    """Exact one-sided permutation test of the difference of means (Fisher, Pitman).

    The share of arrangements whose difference is at least as large, in the observed direction.
    """
    values = [*tested, *control]
    n = len(tested)
    observed, total = sum(tested), sum(values)
    up = observed * len(values) >= total * n
    slack = 1e-12 * max(1.0, abs(total))  # sums of the same numbers in another order
    extreme = everything = 0
    for chosen in itertools.combinations(values, n):
        everything += 1
        extreme += sum(chosen) >= observed - slack if up else sum(chosen) <= observed + slack
    return extreme / everything


def mann_whitney_p(tested: Sequence[float], control: Sequence[float]) -> float:
    """One-sided Mann-Whitney test, normal approximation with ties and continuity corrected."""
    n, m = len(tested), len(control)
    ranked = sorted([(value, True) for value in tested] + [(value, False) for value in control])
    rank_sum = ties = 0.0
    position = 0
    for _, group in itertools.groupby(ranked, key=lambda pair: pair[0]):
        members = list(group)
        rank = position + (len(members) + 1) / 2
        rank_sum += rank * sum(is_tested for _, is_tested in members)
        ties += len(members) ** 3 - len(members)
        position += len(members)
    u = rank_sum - n * (n + 1) / 2
    size = n + m
    variance = n * m / 12 * (size + 1 - ties / (size * (size - 1)))
    if variance <= 0:
        return 1.0  # every value is the same
    z = (abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return 0.5 * math.erfc(z / math.sqrt(2))


def _ratio_error(config: MetricConfig, tested: list[_Value], control: list[_Value]) -> float:
    """Standard error of a difference of ratios by their rows; 0 for what is no ratio."""
    if not config.name.endswith("_ratio"):
        return 0.0
    a, b = (sum(one.observations for one in group) for group in (tested, control))
    pooled = sum(one.value * one.observations for one in (*tested, *control)) / (a + b)
    return math.sqrt(max(pooled * (1 - pooled), 0.0) * (1 / a + 1 / b))
