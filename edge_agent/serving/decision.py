"""From score to decision. Pure.

A score strictly above the threshold is a ``fail``. The confidence is the logistic of the distance from the
threshold in units of ``spread``: 0.5 at the threshold, towards 1 far from it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edge_agent.contract.manifest import Decision

Scores = npt.NDArray[np.float64]


def fails(score: float, decision: Decision) -> bool:
    """Whether a row of this score is decided ``fail``."""
    return score > decision.threshold


def confidence(score: float, decision: Decision) -> float:
    """How far a finite score is from the threshold, in [0.5, 1]."""
    # 700 keeps exp() inside a float; the confidence is 1.0 long before.
    return 1.0 / (1.0 + math.exp(-min(abs(score - decision.threshold) / decision.spread, 700.0)))


def on_the_models_scale(rules_score: Scores, decision: Decision) -> Scores:
    """Put scores of the rules (fail above 1.0) where the model's threshold means the same.

    A client that compares ``score`` with the manifest's threshold then decides alike, whoever answered.
    """
    threshold = decision.threshold
    scaled = rules_score * threshold if threshold > 0 else threshold + (rules_score - 1.0)
    # Rounding must not move a row across the threshold.
    above = np.nextafter(threshold, np.inf)
    return np.where(rules_score > 1.0, np.maximum(scaled, above), np.minimum(scaled, threshold))
