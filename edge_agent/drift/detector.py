"""Does what the device sees still look like what the model was calibrated on?

Invariants: memory does not grow; without drift a window of independent rows raises an alarm about once in a
thousand, whatever the number of features; each release starts anew, as its baseline is its own.

Each full window gets one verdict. A feature drifts if its PSI is large (``PSI_ALARM``) and larger than
chance allows for N reference rows, M live rows and that many features (``distance``), or if clearly more of
its values are missing than in the reference, which catches most real sensor faults. The model drifts if a
feature or the score does.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from edge_agent.contract.baseline import Baseline
from edge_agent.drift import distance
from edge_agent.drift.window import Window

PSI_ALARM: Final = 0.25  # "significant shift" by the convention of credit scoring: an effect size, not a test
MISSING_ALARM: Final = 0.05  # more missing values than in the reference, as a share of rows
FALSE_ALARMS: Final = 0.001  # probability of an alarm per window without drift, over all features
MIN_ROWS_PER_BIN: Final = 5  # present values below this times the bins say nothing about a distribution


@dataclass(frozen=True, slots=True)
class DriftVerdict:
    """What a full window says."""

    drifting: bool
    features: tuple[str, ...]  # those that drift, worst first
    # psi_max: largest PSI of a feature; psi_score: of the score, 0 without one; both less what chance brings.
    # missing_max: largest share of missing values of a feature.
    statistics: dict[str, float]
    rows: int


class DriftDetector:
    """Compares tumbling windows of answered rows with the baseline of the bundle."""

    def __init__(self, baseline: Baseline, window_rows: int) -> None:
        if window_rows < 1:
            raise ValueError(f"window_rows is {window_rows}, expected at least 1")
        self._baseline = baseline
        self._window_rows = window_rows
        self._names = tuple(histogram.name for histogram in baseline.features)
        self._features = Window(baseline.features)
        self._score = Window([baseline.score]) if baseline.score else None
        # Bonferroni: the score is one more test, and each feature has two.
        self._alpha = FALSE_ALARMS / max(2 * len(self._names) + 1, 1)

    @property
    def rows_in_window(self) -> int:
        """Rows in the window being filled."""
        return self._features.rows

    def update(self, rows: np.ndarray, scores: np.ndarray | None) -> DriftVerdict | None:
        """Take answered rows in; the verdict if they filled a window (the last one, if several).

        Args:
            rows: (n, f) of any real dtype, NaN is a missing value.
            scores: (n,), the model's scores of these rows; None if there are none.
        """
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != len(self._names):
            raise ValueError(f"rows have shape {rows.shape}, the baseline is for (n, {len(self._names)})")
        verdict = None
        start = 0
        while start < len(rows):
            stop = min(len(rows), start + self._window_rows - self._features.rows)
            self._features.add(rows[start:stop])
            if self._score is not None and scores is not None:
                self._score.add(np.asarray(scores)[start:stop, None])
            start = stop
            if self._features.rows == self._window_rows:
                verdict = self._judge()
                self._features.clear()
                if self._score is not None:
                    self._score.clear()
        return verdict

    def _judge(self) -> DriftVerdict:
        psi, drifts = self._compare(self._features)
        _, missing = self._features.totals()
        rows = self._features.rows
        share = missing / rows
        reference = self._features.bins.reference_missing
        lacking = (share - reference / max(self._baseline.rows, 1) > MISSING_ALARM) & (
            distance.share_excess(reference, self._baseline.rows, missing, rows)
            > NormalDist().inv_cdf(1.0 - self._alpha)
        )
        score_psi, score_drifts = np.zeros(1), np.zeros(1, dtype=bool)
        if self._score is not None and self._score.rows:
            score_psi, score_drifts = self._compare(self._score)
        badness = np.where(drifts, psi, 0.0) + np.where(lacking, share, 0.0)
        worst = np.argsort(-badness, kind="stable")[: int((drifts | lacking).sum())]
        return DriftVerdict(
            drifting=bool(len(worst)) or bool(score_drifts[0]),
            features=tuple(self._names[column] for column in worst),
            statistics={
                "psi_max": float(psi.max(initial=0.0)),
                "psi_score": float(score_psi[0]),
                "missing_max": float(share.max(initial=0.0)),
            },
            rows=rows,
        )

    def _compare(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """The PSI of each column less what chance brings, and whether the column drifts by it."""
        bins = window.bins
        counts, _ = window.totals()
        degrees = bins.used - 1
        reference_rows, live_rows = bins.reference.sum(axis=1), counts.sum(axis=1)
        noise = distance.noise(reference_rows, live_rows)
        raw = distance.psi(bins.reference, counts, bins.used)
        enough = np.minimum(reference_rows, live_rows) >= MIN_ROWS_PER_BIN * bins.used
        psi = np.where(enough, np.maximum(raw - degrees * noise, 0.0), 0.0)
        by_chance = noise * distance.chi_square_quantile(degrees, 1.0 - self._alpha)
        return psi, enough & (psi >= PSI_ALARM) & (raw > by_chance)
