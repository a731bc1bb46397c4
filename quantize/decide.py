"""Where pass ends, and how sure a decision is. Pure.

A score strictly above the threshold is a ``fail``; the confidence of either decision is
``1 / (1 + exp(-|score - threshold| / spread))``.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from quantize.config import Threshold

_WIDTHS: Final = 200  # spreads tried, evenly in the logarithm: 4 % steps over three decades and a half


def threshold_of(scores: np.ndarray, wanted: Threshold) -> float:
    """The threshold: the number that was given, or the quantile of ``scores`` (n,) of good rows."""
    if wanted.value is not None:
        return wanted.value
    assert wanted.quantile is not None
    return float(np.quantile(scores.astype(np.float64), wanted.quantile))


def spread_of(scores: np.ndarray, labels: np.ndarray | None, threshold: float) -> float:
    """The width of the logistic, in units of the score.

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
