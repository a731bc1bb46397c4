"""Where pass ends, and how sure a decision is. Pure.

A score strictly above the threshold is a ``fail``; the confidence of either decision is
``1 / (1 + exp(-|score - threshold| / spread))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from quantize.config import Threshold
from quantize.errors import BadData

_WIDTHS: Final = 200  # spreads tried, evenly in the logarithm: 4 % steps over three decades and a half


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores (n,) of held-out rows and their labels (n,), True = bad."""

    scores: np.ndarray
    labels: np.ndarray


def threshold_of(scores: np.ndarray, wanted: Threshold, held_out: Scored | None = None) -> float:
    """The threshold that was asked for.

    Args:
        scores: (n,) of good calibration rows.
        wanted: what was asked for.
        held_out: labelled rows kept for choosing, if there are.

    Raises:
        BadData: it takes labelled rows and there are none.
    """
    if wanted.value is not None:
        return wanted.value
    if wanted.quantile is not None:
        return float(np.quantile(scores.astype(np.float64), wanted.quantile))
    if wanted.fpr is not None:
        return _for_false_alarms(scores, wanted.fpr, held_out)
    if held_out is None:
        raise BadData(
            f"--threshold {wanted} needs labelled rows: give --validation with y (1 = bad), or use fpr:0.01"
        )
    return _least_cost(held_out, wanted.cost)


def _for_false_alarms(scores: np.ndarray, rate: float, held_out: Scored | None) -> float:
    """The smallest threshold that a good row to come exceeds with a probability of ``rate`` at most.

    Split conformal prediction (Vovk et al. 2005): of n good rows exchangeable with those to come, the
    ceil((n + 1) (1 - rate))-th smallest score. Held-out good rows if they are enough for that, since a model
    may have been trained on the calibration rows; else those; the largest score if even they are too few.
    """
    good = scores
    if held_out is not None:
        apart = held_out.scores[~held_out.labels]
        if np.ceil((len(apart) + 1) * (1 - rate)) <= len(apart):
            good = apart
    ordered = np.sort(good.astype(np.float64))
    place = int(np.ceil((len(ordered) + 1) * (1 - rate) - 1e-9))
    return float(ordered[min(place, len(ordered)) - 1])


def _least_cost(held_out: Scored, cost: tuple[float, float] | None) -> float:
    """The threshold with the best F1 (``cost`` None), or with the least cost of mistakes.

    Candidates lie half way between neighbouring scores, and outside both ends; of equals the middle one.
    """
    order = np.argsort(held_out.scores, kind="stable")
    scores, bad = held_out.scores[order].astype(np.float64), held_out.labels[order]
    # With the threshold above the first k scores: k rows pass.
    missed = np.concatenate([[0], np.cumsum(bad)])
    alarms = np.concatenate([[0], np.cumsum(~bad[::-1])])[::-1]
    caught = bad.sum() - missed
    if cost is None:
        value = 2 * caught / np.maximum(2 * caught + missed + alarms, 1)
    else:
        value = -(cost[0] * missed + cost[1] * alarms)
    span = max(float(scores[-1] - scores[0]), abs(float(scores[-1])) * 1e-6, 1e-12)
    between = (scores[1:] + scores[:-1]) / 2
    candidates = np.concatenate([[scores[0] - 0.01 * span], between, [scores[-1] + 0.01 * span]])
    possible = np.concatenate([[True], scores[1:] > scores[:-1], [True]])  # equal scores cannot be told apart
    best = np.flatnonzero(possible & (value >= value[possible].max() - 1e-12))
    return float(candidates[best[len(best) // 2]])


def spread_of(scores: np.ndarray, labels: np.ndarray | None, threshold: float) -> float:
    """The width of the logistic, in units of the score, from rows for choosing.

    With labels it is the width under which held-out labels are most likely (logistic regression through the
    threshold); without, the scaled median distance from the threshold, so that a typical good row is passed
    with a confidence of 0.73.

    Args:
        scores: (n,) of held-out rows.
        labels: (n,) bool, True = bad, or None.
        threshold: where the logistic is 0.5.
    """
    distance = scores.astype(np.float64) - threshold
    typical = float(np.median(np.abs(distance)))
    if typical <= 0.0:
        return max(abs(threshold), 1.0) * 1e-3
    if labels is None:
        return _rounded(typical)
    widths = typical * np.logspace(-2, 1.5, _WIDTHS)
    signed = np.where(labels, distance, -distance)
    loss = [float(np.logaddexp(0.0, -signed / width).mean()) for width in widths]
    return _rounded(float(widths[int(np.argmin(loss))]))


def _rounded(value: float) -> float:
    """Three digits: more would pretend a precision that held-out rows do not give."""
    return float(f"{value:.3g}")
