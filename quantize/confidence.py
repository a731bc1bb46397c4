"""What a few rows say about others: one-sided bounds that hold for 95 of 100 draws. Pure: numbers in and out.

A figure of nine rows is that of these nine rows. A budget is about the rows that come, so what is compared
with it is a bound: of the SQNR by the spread of its rows (a ratio of sums, by the jackknife's linear form, on
the scale of its logarithm, with Student's t), of a share by Wilson's score, of what labelled rows tell by a
jackknife of groups. All get closer to the figure the more rows there are and the more alike they are; no
number of rows is special.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np

_GROUPS: Final = 20  # of labelled rows: the jackknife leaves one out at a time
_NORMAL: Final = 1.6448536269514722  # the 95 % quantile of the normal distribution


def ratio_below(parts: np.ndarray, wholes: np.ndarray) -> float:
    """What ``sum(parts) / sum(wholes)`` of other rows is below.

    Args:
        parts: (n,) of each row, not negative.
        wholes: (n,) of each row, not negative.

    Returns:
        The upper end; the ratio itself where there is one row, which says nothing of others.
    """
    whole = float(wholes.sum())
    if whole <= 0:
        return math.inf if float(parts.sum()) > 0 else 0.0
    ratio = float(parts.sum()) / whole
    rows = len(parts)
    if rows < 2 or ratio == 0.0:
        return ratio
    apart = parts - ratio * wholes  # what leaving a row out changes, to first order
    error = math.sqrt(float(np.sum(apart**2)) * rows / (rows - 1)) / whole
    return ratio * math.exp(min(student(rows - 1) * error / ratio, 50.0))


def share_above(same: np.ndarray) -> float:
    """What the share of equal decisions of other rows is above.

    Decisions of one row count less where they are alike: as many as would vary as much if each stood alone.

    Args:
        same: (n, decisions) of each row, bool.
    """
    rows, each = same.shape
    square = _NORMAL**2
    missed = 1 - float(same.mean())
    alike = 1.0
    if rows > 1 and each > 1 and 0 < missed < 1:
        by_row = 1 - same.mean(axis=1)
        alike = float(np.clip(by_row.var(ddof=1) * each / (missed * (1 - missed)), 1.0, each))
    count = rows * each / alike
    middle = missed + square / (2 * count)
    spread = _NORMAL * math.sqrt(missed * (1 - missed) / count + square / (4 * count**2))
    return float(1 - (middle + spread) / (1 + square / count))


def change_below(change: Callable[[np.ndarray], float], labels: np.ndarray) -> float:
    """What a change of some figure of labelled rows is below on other rows: the delete-a-group jackknife.

    Args:
        change: of the rows that are kept, (n,) bool.
        labels: (n,) bool; every group has its share of both classes.

    Returns:
        The upper end; the change itself where a class has one row, which says nothing of others.
    """
    groups = min(_GROUPS, int(labels.sum()), int((~labels).sum()))
    whole = change(np.ones(len(labels), bool))
    if groups < 2:
        return whole
    group = np.empty(len(labels), np.int64)
    for kind in (False, True):
        rows = np.flatnonzero(labels == kind)
        group[rows] = np.arange(len(rows)) % groups
    without = np.array([change(group != left) for left in range(groups)])
    error = math.sqrt((groups - 1) / groups * float(((without - without.mean()) ** 2).sum()))
    return whole + student(groups - 1) * error


def student(freedom: int) -> float:
    """The 95 % quantile of Student's t: exact for 1 and 2, else Cornish and Fisher's series."""
    if freedom == 1:
        return math.tan(0.45 * math.pi)
    if freedom == 2:
        return 0.9 * math.sqrt(2 / (1 - 0.9**2))
    z = _NORMAL
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))
