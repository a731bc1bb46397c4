"""More rows for the original network to answer: mixed of several calibration rows, and with features swapped.

What a smaller network should give is known for any row, because the original gives it. So rows that nobody
measured are as good as others, as long as they are like those that come: mixing keeps mean and covariance of
the data, swapping keeps each feature's own distribution and breaks what it has to do with the others, as an
anomaly does. No label is needed for either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

_OF: Final = (2, 4, 8, 16)  # rows that one is mixed of, a quarter each: few keep shape, many bring variety
_SWAPPED: Final = 0.5  # of a row's features come from another row, at most


def mixed(inputs: Mapping[str, np.ndarray], count: int, chance: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows ``m + sum(c_i (x_i - m))``, the squares of c adding up to 1: as far from the mean as the given.

    Args:
        inputs: arrays by input, one entry a row, of a floating type.
        count: rows to make.
        chance: which rows, and how much of each.
    """
    rows = len(next(iter(inputs.values())))
    most = max(_OF)
    share = np.abs(chance.standard_normal((count, most)))
    share[np.arange(most) >= np.resize(_OF, count)[:, None]] = 0
    share /= np.sqrt((share**2).sum(axis=1, keepdims=True))
    which = chance.integers(0, rows, (count, most))
    made = {}
    for name, values in inputs.items():
        middle = np.nan_to_num(np.nanmean(values, axis=0, dtype=np.float64)).astype(values.dtype)
        total = np.zeros((count, *values.shape[1:]), values.dtype)
        for index in range(most):
            used = np.flatnonzero(share[:, index])
            factor = share[used, index].astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
            total[used] += factor * (values[which[used, index]] - middle)
        total += middle
        made[name] = total
    return made


def swapped(values: np.ndarray, source: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """Rows with some features of other rows: up to half of them, another share in each row.

    Args:
        values: (n, features).
        source: (m, features): where the other values come from.
        chance: which.
    """
    share = chance.uniform(0, _SWAPPED, (len(values), 1))
    other = source[chance.integers(0, len(source), len(values))]
    made: np.ndarray = np.where(chance.random(values.shape) < share, other, values)
    return made
