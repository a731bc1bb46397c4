"""A bounded sample of what a release answers, looked at for drift beside the requests.

Rows are counted on the event loop, in slices of a tenth of a millisecond: a thread would keep the interpreter
from answering for as long as it likes.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import numpy as np
import numpy.typing as npt

from edge_agent.contract.manifest import Decision
from edge_agent.drift.detector import DriftDetector, DriftVerdict
from edge_agent.drift.window import BLOCK_ROWS
from edge_agent.serving.decision import Scores
from edge_agent.serving.tensors import Tensor
from edge_agent.telemetry.metrics import AgentMetrics

log = logging.getLogger(__name__)

_OCTAVES: Final = 10  # scores are counted by doublings, from 2**-10 to 2**10 times the threshold


class DriftWatch:
    """What was answered since a release was swapped in. Lives on one event loop.

    Attributes:
        waiting: rows that are still to be looked at.
        scores: of the rows looked at, by whole doublings of score / threshold.
        verdict: on the last full window; None before the first.
    """

    def __init__(self, name: str, metrics: AgentMetrics) -> None:
        self.waiting = 0
        self.scores: npt.NDArray[np.int64] = np.zeros(2 * _OCTAVES + 1, np.int64)
        self.verdict: DriftVerdict | None = None
        self._name = name
        self._metrics = metrics
        self._rows: list[tuple[Tensor, Scores]] = []
        self._over = False

    def offer(self, features: Tensor, scores: Scores) -> None:
        """Rows were answered: (n, f) and (n,)."""
        self._rows.append((features, scores))
        self.waiting += len(scores)

    def end(self) -> None:
        """Look at nothing more: another release answers."""
        self._over = True

    async def look(self, detector: DriftDetector | None, decision: Decision | None) -> None:
        """Look at what waits."""
        rows, self._rows, self.waiting = self._rows, [], 0
        if detector is None or not rows:
            return
        self.scores += _by_octave([scores for _, scores in rows], decision)
        for features, scores in rows:
            for begin in range(0, len(features), BLOCK_ROWS):
                part = slice(begin, begin + BLOCK_ROWS)
                verdict = detector.update(features[part], scores[part])
                if verdict is not None:
                    self._judged(verdict)
                await asyncio.sleep(0)
                if self._over:
                    return
        self._metrics.drift_rows(self._name, detector.rows_in_window)

    def _judged(self, verdict: DriftVerdict) -> None:
        if verdict.drifting and not (self.verdict and self.verdict.drifting):
            log.warning("model %s: drift in %s", self._name, ", ".join(verdict.features[:5]) or "the score")
        self.verdict = verdict
        self._metrics.drift(self._name, verdict.statistics, len(verdict.features))


def _by_octave(scores: list[Scores], decision: Decision | None) -> npt.NDArray[np.int64]:
    """Counts by log2(score / threshold), rounded; all zero where there is no threshold above zero."""
    if decision is None or decision.threshold <= 0:
        return np.zeros(2 * _OCTAVES + 1, np.int64)
    ratios = np.maximum(np.concatenate(scores), 1e-300) / decision.threshold
    octaves = np.clip(np.rint(np.log2(ratios)), -_OCTAVES, _OCTAVES).astype(np.int64)
    return np.bincount(octaves + _OCTAVES, minlength=2 * _OCTAVES + 1)
