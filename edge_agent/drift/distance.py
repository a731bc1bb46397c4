"""How far counts are from their reference, and how far they may be by chance alone. Pure formulas.

The population stability index (PSI) of B bins, ``sum((p - q) * ln(p / q))``, is noise at small windows:
without any drift ``PSI / (1/N + 1/M)`` is about chi-square distributed with B-1 degrees of freedom (Yurdakul
2018; Potgieter et al., arXiv 2307.11878), N and M being the rows behind reference and window. So a limit on
the index alone, the folklore of 0.1 and 0.25, calls hundreds of features drifting at 100 rows and misses
small shifts at a million. Here the index must be large *and* improbable.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np


def psi(reference: np.ndarray, live: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The index of each column, smoothed by half a count per bin so that an empty bin stays finite.

    Args:
        reference: counts, (columns, width).
        live: counts, (columns, width).
        used: bins in use of each column, (columns,); those after them do not take part.
    """
    in_use = np.arange(reference.shape[1]) < used[:, None]
    p = np.where(in_use, reference + 0.5, 1.0)
    q = np.where(in_use, live + 0.5, 1.0)
    p /= (reference.sum(axis=1) + 0.5 * used)[:, None]
    q /= (live.sum(axis=1) + 0.5 * used)[:, None]
    return np.asarray(np.where(in_use, (p - q) * np.log(p / q), 0.0).sum(axis=1))


def noise(reference_rows: np.ndarray, live_rows: np.ndarray) -> np.ndarray:
    """``1/N + 1/M``: what the index of one degree of freedom is on average without drift."""
    return np.asarray(1.0 / np.maximum(reference_rows, 1) + 1.0 / np.maximum(live_rows, 1))


def chi_square_quantile(degrees: np.ndarray, probability: float) -> np.ndarray:
    """Quantile of the chi-square distribution by Wilson and Hilferty (1931), within a few per cent."""
    z = NormalDist().inv_cdf(probability)
    degrees = np.maximum(degrees, 1).astype(np.float64)
    ninth = 2.0 / (9.0 * degrees)
    return np.asarray(degrees * np.maximum(1.0 - ninth + z * np.sqrt(ninth), 0.0) ** 3)


def share_excess(reference: np.ndarray, reference_rows: int, live: np.ndarray, live_rows: int) -> np.ndarray:
    """By how many standard errors the live share is above the reference share (two-proportion z test).

    Args:
        reference: how many of ``reference_rows``, (columns,).
        reference_rows: N.
        live: how many of ``live_rows``, (columns,).
        live_rows: M.
    """
    n, m = max(reference_rows, 1), max(live_rows, 1)
    pooled = (reference + live + 1.0) / (n + m + 2.0)  # never 0 or 1: a share of nothing has an error too
    error = np.sqrt(pooled * (1.0 - pooled) * (1.0 / n + 1.0 / m))
    return np.asarray((live / m - reference / n) / error)
