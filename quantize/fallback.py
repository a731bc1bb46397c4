"""Rules for when the model cannot answer, derived from the calibration data (``edge_agent.rules``).

The idea: every candidate is set so that it alarms on calibration rows about as often as the model does; the
one that agrees best with the model on rows kept for choosing wins. A candidate has limits per feature (around
the median, as wide as the 1 % and 99 % quantiles ask for, times one factor for all) of which k must be
violated, or a robust distance, or both; limits far out (``lolo``, ``hihi``) catch a broken sensor alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_agent.rules.evaluate import Centre, Distance, Limit, Missing, RuleSet
from quantize import compare

_TAIL: Final = 0.01  # of the rows of a feature lie beyond its unscaled limits, on either side
_FAR_OUT: Final = 3.0  # times as far as the furthest calibration row: lolo and hihi
_DIGITS: Final = 4  # significant digits of what a feature varies by: people read the limits
_MOST_ROWS: Final = 8192  # that limits come from: their 1 % tails are 80 rows then
_RIDGE: Final = 0.03  # of the mean energy of a feature
_GRADIENT_STEPS: Final = 300
_NO_SAY: Final = 0.02  # of the mean weight: features below are left out of the distance
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
    reach: np.ndarray  # from the centre to the furthest value
    varies: np.ndarray  # bool: constant features have no limits


def derive(
    features: Sequence[str],
    calibration: np.ndarray,
    model_alarm_rate: float,
    selection: np.ndarray,
    selection_failed: np.ndarray,
    calibration_scores: np.ndarray | None = None,
) -> RuleSet:
    """The rule set that agrees best with the model at the same alarm rate.

    Args:
        features: names of the f columns.
        calibration: (n, f) good rows, NaN = missing.
        model_alarm_rate: share of them that the model fails.
        selection: (m, f) rows to choose on.
        selection_failed: (m,) bool, what the model decides for them.
        calibration_scores: (n,) the model's scores of the calibration rows: candidates may then weigh the
            features of their distance as the model does.
    """
    if len(calibration) > _MOST_ROWS:
        every = np.linspace(0, len(calibration) - 1, _MOST_ROWS).round().astype(int)
        calibration = calibration[every]
        calibration_scores = None if calibration_scores is None else calibration_scores[every]
    rows = calibration.astype(np.float64)
    normal = _normal_of(rows)
    width = int(normal.varies.sum())
    if not width:
        return RuleSet(tuple(features), default="pass")
    best: tuple[float, RuleSet] | None = None
    rate = model_alarm_rate
    weightings: list[np.ndarray | None] = [None]
    if calibration_scores is not None:
        weightings.append(_weights_of(normal, rows, calibration_scores))
    candidates = [_rule_set(features, normal, rows, None, rate, weights) for weights in weightings]
    for votes in sorted({1, 2, 3, max(1, width // 20), max(1, width // 10)}):
        if votes <= width:
            candidates.append(_rule_set(features, normal, rows, (votes, rate), None))
            candidates += [
                _rule_set(features, normal, rows, (votes, rate / 2), rate / 2, weights)
                for weights in weightings
            ]
    for rules in candidates:
        verdicts = rules.evaluate(selection)
        agreement = float((verdicts.failed == selection_failed).mean())
        figure = round(_auc_or(selection_failed, verdicts.score, agreement) + agreement, 6)
        if best is None or figure > best[0]:  # of equals the first: the simplest
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
        np.nanmax(np.abs(rows - centre), axis=0),
        varies,
    )


def _weights_of(normal: _Normal, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """What each feature's squared distance adds to the model's score: (f,) >= 0, their mean above 0 is 1.

    Least squares with weights that cannot be negative, by projected gradient on the Gram matrix; a ridge
    pulls towards equal weights, so that features which say little keep a say.
    """
    squares = ((rows - normal.centre) / normal.scale) ** 2
    squares = np.where(normal.varies, np.where(np.isnan(squares), np.nanmean(squares, axis=0), squares), 0.0)
    # A few rows far out would be all that least squares sees.
    squares = np.minimum(squares, np.quantile(squares, 1 - _TAIL, axis=0))
    target = np.minimum(scores.astype(np.float64), np.quantile(scores, 1 - _TAIL))
    design = np.column_stack([squares, np.ones(len(rows))])
    gram, moment = design.T @ design, design.T @ target
    equal = max(
        float(target @ squares.sum(axis=1)) / max(float((squares.sum(axis=1) ** 2).sum()), 1e-300), 0.0
    )
    ridge = _RIDGE * np.trace(gram[:-1, :-1]) / max(int(normal.varies.sum()), 1)
    gram[:-1, :-1] += ridge * np.eye(len(normal.varies))
    moment[:-1] += ridge * equal
    step = 1.0 / np.linalg.norm(gram, 2)
    weights = np.append(np.full(len(normal.varies), equal), 0.0)
    for _ in range(_GRADIENT_STEPS):
        weights -= step * (gram @ weights - moment)
        weights[:-1] = np.maximum(weights[:-1], 0.0)
    found = np.where(normal.varies, weights[:-1], 0.0)
    if found.max(initial=0.0) <= 0:
        return normal.varies.astype(np.float64)
    found = found / found[found > 0].mean()
    return np.where(found > _NO_SAY, found, 0.0)


def _rule_set(
    features: Sequence[str],
    normal: _Normal,
    rows: np.ndarray,
    vote: tuple[int, float] | None,
    distance_rate: float | None,
    weights: np.ndarray | None = None,
) -> RuleSet:
    """Rules with limits that vote (k, the alarm rate they get), a distance (its alarm rate), or both."""
    offset = rows - normal.centre
    excess = np.maximum(offset / normal.above, -offset / normal.below)[:, normal.varies]
    excess = np.where(np.isnan(excess), 0.0, excess)
    # The k-th largest excess of a row decides its vote: its quantile is the factor that gives the alarm rate.
    votes, factor = 1, 0.0
    if vote is not None:
        votes = vote[0]
        factor = _upper(np.sort(excess, axis=1)[:, -votes], vote[1])
    limits, centres = {}, {}
    for column, name in enumerate(features):
        if not normal.varies[column]:
            continue
        centre, width = float(normal.centre[column]), float(normal.scale[column])
        low, high = (factor * float(side[column]) for side in (normal.below, normal.above))
        # The same on both sides: the score of a trip is then 0 at the centre, and ranks rows.
        far = max(_FAR_OUT * float(normal.reach[column]), low, high)
        limits[name] = Limit(
            low=_round(centre - low, width) if vote else None,
            high=_round(centre + high, width) if vote else None,
            lolo=_round(centre - far, width),
            hihi=_round(centre + far, width),
        )
        weight = 1.0 if weights is None else float(f"{weights[column]:.2g}")
        if weight > 0:
            centres[name] = Centre(_round(centre, width), _round(width, width), weight)
    say = np.array([centres[name].weight if name in centres else 0.0 for name in features])
    squares = (offset[:, say > 0] / normal.scale[say > 0]) ** 2
    present = ~np.isnan(squares)
    total = np.maximum((present * say[say > 0]).sum(axis=1), 1e-300)
    mean = (np.where(present, squares, 0.0) * say[say > 0]).sum(axis=1) / total
    limit = 0.0 if distance_rate is None else _upper(np.sqrt(mean), distance_rate)
    return RuleSet(
        tuple(features),
        default="pass",
        missing=Missing(count_as="ok", max_share=0.5),
        limits=limits,
        votes=float(votes),
        distance=Distance(limit=_round(limit * 1.0005, limit), features=centres) if limit > 0 else None,
    )


def _upper(values: np.ndarray, rate: float) -> float:
    """A bound that ``rate`` of ``values`` (n,) exceed; for none, 5 % above the largest."""
    exceed = min(int(rate * len(values) + 1e-9), len(values) - 1)
    # Limits are rounded for people; the hair above keeps the row that sets the bound inside it.
    return float(np.sort(values)[-1 - exceed]) * (1.0001 if exceed else 1.05)


def _round(value: float, width: float) -> float:
    """``value``, to the digits that matter beside ``width``: 101325.4 varying by 2 is not 101330."""
    return round(value, _DIGITS - 1 - int(np.floor(np.log10(width))))
