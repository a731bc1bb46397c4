"""Bins of the reference: where quantize cuts a column, and how a device counts rows into the same bins.

Invariants:

- reference and live values are compared in float32, the precision that models see: a value that equals an
  edge on the workstation equals it on the device;
- every value is counted exactly once: in a bin, or as missing (NaN). Infinities fall into the outer bins.

The inner edges are quantiles of the reference, so that each bin expects about the same share of rows; a value
equal to an edge belongs to the bin above it. A column with one value only gets a bin of its own for that
value, so that a move to either side shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from edge_agent.contract.baseline import Baseline, Histogram

# Past every float32 edge, yet an edge of padding (infinity) is past it.
_LARGEST: Final = np.finfo(np.float32).max


def baseline_of(
    rows: np.ndarray, names: Sequence[str], scores: np.ndarray | None, bins: int = 10
) -> Baseline:
    """The baseline of reference rows.

    Args:
        rows: (n, f) of any real dtype, NaN is a missing value.
        names: the f features, in input order.
        scores: (n,), what the model scored these rows; None if it has no score.
        bins: bins per column at most; fewer where a column has few values.
    """
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] != len(names):
        raise ValueError(f"rows have shape {rows.shape}, expected (n, {len(names)})")
    if scores is not None and np.shape(scores) != (len(rows),):
        raise ValueError(f"scores have shape {np.shape(scores)}, expected ({len(rows)},)")
    features = tuple(_histogram(name, rows[:, column], bins) for column, name in enumerate(names))
    score = None if scores is None else _histogram("score", np.asarray(scores), bins)
    return Baseline(rows=len(rows), features=features, score=score)


def as_float32(values: np.ndarray) -> np.ndarray:
    """Values as float32; what is too large becomes infinite, which is no error here."""
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float32)


class Bins:
    """The bins of several columns, padded to the same number, and the counting into them.

    ``counts`` have shape (columns, width): the bins of a column first, then unused ones, which stay 0.
    """

    def __init__(self, histograms: Sequence[Histogram]) -> None:
        most = max((len(histogram.edges) for histogram in histograms), default=0)
        self.columns = len(histograms)
        self.width = most + 1
        self.used = np.array([len(histogram.counts) for histogram in histograms], dtype=np.int64)
        self.reference = np.zeros((self.columns, self.width), dtype=np.int64)
        self.reference_missing = np.array([histogram.missing for histogram in histograms], dtype=np.int64)
        # (most, columns): one row of edges is compared with whole rows of values at once.
        self._edges = np.full((most, self.columns), np.inf, dtype=np.float32)
        for column, histogram in enumerate(histograms):
            self.reference[column, : len(histogram.counts)] = histogram.counts
            self._edges[: len(histogram.edges), column] = as_float32(np.array(histogram.edges))
        self._first = np.arange(self.columns) * (self.width + 1)  # the last bin of each counts the missing

    def count(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count (n, columns) float32 rows: counts (columns, width) and missing (columns,), int64."""
        bins = np.zeros(rows.shape, dtype=np.int64)
        finite = np.minimum(rows, _LARGEST)
        for edges in self._edges:
            bins += finite >= edges
        bins[np.isnan(rows)] = self.width
        bins += self._first
        flat = np.bincount(bins.ravel(), minlength=self.columns * (self.width + 1))
        table = flat.reshape(self.columns, self.width + 1)
        return table[:, :-1], table[:, -1]


def _histogram(name: str, values: np.ndarray, bins: int) -> Histogram:
    values = as_float32(values)
    present = values[~np.isnan(values)]
    edges = _edges(present[np.isfinite(present)], bins)
    histogram = Histogram(name, tuple(edges.tolist()), (0,) * (len(edges) + 1))
    counts, missing = Bins([histogram]).count(values[:, None])
    return Histogram(name, histogram.edges, tuple(counts[0].tolist()), int(missing[0]))


def _edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Ascending inner edges, float32."""
    if values.size == 0:
        return np.empty(0, dtype=np.float32)
    smallest, largest = values.min(), values.max()
    if smallest == largest:
        return np.array([smallest, np.nextafter(smallest, np.float32(np.inf))], dtype=np.float32)
    inner = np.quantile(values.astype(np.float64), np.arange(1, bins) / bins)
    return np.unique(inner.astype(np.float32))
