"""Rules for when the model cannot answer, derived from the calibration data (``edge_agent.rules``).

The idea: every candidate is set so that it alarms on calibration rows about as often as the model does; the
one that agrees best with the model on rows kept for choosing wins. Each candidate has limits per feature
(around the median, as wide as the 1 % and 99 % quantiles ask for, times one factor for all), a number of
votes k, and a robust distance; limits far out (``lolo``, ``hihi``) catch a broken sensor alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_agent.rules.evaluate import Centre, Distance, Limit, Missing, RuleSet
from quantize import compare

_TAIL: Final = 0.01  # of the rows of a feature lie beyond its unscaled limits, on either side
_FAR_OUT: Final = 3.0  # times the furthest calibration row: lolo and hihi
_DIGITS: Final = 5  # significant digits of a limit: people read them
_MAD_TO_SIGMA: Final = 1.4826  # median absolute deviation of a normal distribution to its deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """The chosen rules and how they did on rows that neither derived nor chose them."""

    rules: RuleSet
    votes: float
    alarm_rate: float  # on calibration rows
    model_alarm_rate: float
    agreement: float  # with the model's decisions, on the rows of the final judgement
    auc_model: float | None  # how well the rules rank the rows that the model fails
    auc: float | None  # against the labels
    caught: float | None  # share of bad rows that the rules fail
    false_alarms: float | None


@dataclass(frozen=True, slots=True)
class _Normal:
    """The normal state, per feature: (f,) each."""

    centre: np.ndarray
    below: np.ndarray  # from the centre to the 1 % quantile
    above: np.ndarray  # from the centre to the 99 % quantile
    scale: np.ndarray
    varies: np.ndarray  # bool: constant features have no limits


def derive(
    features: Sequence[str],
    calibration: np.ndarray,
    model_alarm_rate: float,
    selection: np.ndarray,
    selection_failed: np.ndarray,
) -> RuleSet:
    """The rule set that agrees best with the model at the same alarm rate.

    Args:
        features: names of the f columns.
        calibration: (n, f) good rows, NaN = missing.
        model_alarm_rate: share of them that the model fails.
        selection: (m, f) rows to choose on.
        selection_failed: (m,) bool, what the model decides for them.
    """
    rows = calibration.astype(np.float64)
    normal = _normal_of(rows)
    width = int(normal.varies.sum())
    if not width:
        return RuleSet(tuple(features), default="pass")
    best: tuple[tuple[float, float], RuleSet] | None = None
    for votes in sorted({1, 2, 3, max(1, width // 20), max(1, width // 10)}):
        if votes > width:
            continue
        # Limits and distance share the alarms; each alone gets half.
        for limits_share, distance_share in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0)):
            rules = _rule_set(
                features,
                normal,
                rows,
                votes,
                limits_share * model_alarm_rate,
                distance_share * model_alarm_rate,
            )
            verdicts = rules.evaluate(selection)
            agreement = float((verdicts.failed == selection_failed).mean())
            ranking = _auc_or(selection_failed, verdicts.score, agreement)
            figure = (round(ranking + agreement, 6), -float(votes))
            if best is None or figure > best[0]:
                best = (figure, rules)
    assert best is not None
    return best[1]


def judge(
    rules: RuleSet,
    calibration: np.ndarray,
    model_alarm_rate: float,
    rows: np.ndarray,
    failed: np.ndarray,
    labels: np.ndarray | None,
) -> Fallback:
    """Measure ``rules`` on the rows of the final judgement.

    Args:
        rules: what is judged.
        calibration: (n, f) rows they were derived from.
        model_alarm_rate: share of those that the model fails.
        rows: (m, f) rows not used before.
        failed: (m,) bool, the model's decisions.
        labels: (m,) bool, True = bad, or None.
    """
    verdicts = rules.evaluate(rows)
    both = failed.any() and not failed.all()
    return Fallback(
        rules=rules,
        votes=rules.votes,
        alarm_rate=float(rules.evaluate(calibration).failed.mean()),
        model_alarm_rate=model_alarm_rate,
        agreement=float((verdicts.failed == failed).mean()),
        auc_model=compare.auc(failed, verdicts.score) if both else None,
        auc=None if labels is None else compare.auc(labels, verdicts.score),
        caught=None if labels is None else float(verdicts.failed[labels].mean()),
        false_alarms=None if labels is None else float(verdicts.failed[~labels].mean()),
    )


def _auc_or(labels: np.ndarray, scores: np.ndarray, otherwise: float) -> float:
    return compare.auc(labels, scores) if labels.any() and not labels.all() else otherwise


def _normal_of(rows: np.ndarray) -> _Normal:
    centre = np.nanmedian(rows, axis=0)
    low, high = np.nanquantile(rows, (_TAIL, 1 - _TAIL), axis=0)
    deviation = np.nanstd(rows, axis=0)
    # Mostly-constant features have a MAD or a tail of 0; their deviation is the next best width.
    scale = np.nanmedian(np.abs(rows - centre), axis=0) * _MAD_TO_SIGMA
    varies = deviation > 1e-6 * np.maximum(np.abs(centre), 1e-30)
    scale = np.where(scale > 1e-3 * deviation, scale, np.where(varies, deviation, 1.0))
    below, above = centre - low, high - centre
    return _Normal(
        centre,
        np.where(below > 1e-3 * scale, below, scale),
        np.where(above > 1e-3 * scale, above, scale),
        scale,
        varies,
    )


def _rule_set(
    features: Sequence[str],
    normal: _Normal,
    rows: np.ndarray,
    votes: int,
    limits_rate: float,
    distance_rate: float,
) -> RuleSet:
    offset = rows - normal.centre
    excess = np.maximum(offset / normal.above, -offset / normal.below)[:, normal.varies]
    excess = np.where(np.isnan(excess), 0.0, excess)
    # The k-th largest excess of a row decides its vote: its quantile is the factor that gives the alarm rate.
    factor = _upper(np.sort(excess, axis=1)[:, -votes], limits_rate)
    far = _FAR_OUT * float(excess.max())
    limits = {
        name: Limit(
            low=_round(centre - factor * below),
            high=_round(centre + factor * above),
            lolo=_round(centre - max(far, factor) * below),
            hihi=_round(centre + max(far, factor) * above),
        )
        for name, centre, below, above, varies in zip(
            features, normal.centre, normal.below, normal.above, normal.varies, strict=True
        )
        if varies
    }
    centres = {
        name: Centre(_round(centre), _round(scale))
        for name, centre, scale, varies in zip(
            features, normal.centre, normal.scale, normal.varies, strict=True
        )
        if varies
    }
    squares = (offset[:, normal.varies] / normal.scale[normal.varies]) ** 2
    present = ~np.isnan(squares)
    mean = np.where(present, squares, 0.0).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
    limit = _upper(np.sqrt(mean), distance_rate)
    return RuleSet(
        tuple(features),
        default="pass",
        missing=Missing(count_as="ok", max_share=0.5),
        limits=limits,
        votes=float(votes),
        distance=Distance(limit=_round(limit * 1.0001), features=centres) if limit > 0 else None,
    )


def _upper(values: np.ndarray, rate: float) -> float:
    """A bound that ``rate`` of ``values`` (n,) exceed; for none, 5 % above the largest."""
    exceed = int(rate * len(values) + 1e-9)
    # Limits are rounded for people; the hair above keeps the row that sets the bound inside it.
    return float(np.sort(values)[-1 - exceed]) * (1.0001 if exceed else 1.05)


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
