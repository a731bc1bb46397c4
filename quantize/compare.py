"""How far one model's outputs are from another's. Pure: arrays in, numbers out.

SQNR is ``10 log10(power of the reference / power of the difference)`` in dB; 20 dB is 10 % noise, 40 dB 1 %.
What is compared with a budget is not the figure of these rows but what they say of others (``confidence``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from quantize import confidence
from quantize.config import Budget, Metric

IDENTICAL: Final = 200.0  # dB: what a difference of nothing is called, so that it stays a JSON number

LEAST: Final = 10.0  # dB that agreement alone does not make up for, unless it was asked for
CEILING: Final = 4.0  # times the threshold: scores beyond are compared as if they were this
_FEW_TELL: Final = 3.0  # times the differences allowed: what rows must rule out for their figure to count
_BELOW: Final = 0.1  # share of rows that must be below for that


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to noise of ``other`` against ``reference``, any shape, in dB; -IDENTICAL if not finite."""
    signal, noise = reference.astype(np.float64), other.astype(np.float64)
    if not np.isfinite(noise).all():
        return -IDENTICAL
    return decibels(float(np.sum(signal**2)), float(np.sum((signal - noise) ** 2)))


def sqnr_low(reference: np.ndarray, other: np.ndarray) -> float:
    """What the SQNR of other rows is above, 95 of 100 times; rows are the first dimension."""
    if not np.isfinite(other).all():
        return -IDENTICAL
    reference = np.atleast_1d(reference)
    signal = reference.reshape(len(reference), -1).astype(np.float64)
    noise = ((signal - other.reshape(signal.shape).astype(np.float64)) ** 2).sum(axis=1)
    return decibels(1.0, confidence.ratio_below(noise, (signal**2).sum(axis=1)))


def decibels(power: float, difference: float) -> float:
    """The ratio of two powers; IDENTICAL where there is no difference, -IDENTICAL where it is not finite."""
    if not math.isfinite(difference):
        return -IDENTICAL
    if difference == 0.0:
        return IDENTICAL
    return float(np.clip(10 * np.log10(max(power, 1e-300) / difference), -IDENTICAL, IDENTICAL))


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the share of (bad, good) pairs in which bad scores higher, ties half.

    Args:
        labels: (n,) bool, True = bad; both classes.
        scores: (n,) of any real dtype.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    ranks = below + (counts + 1) / 2  # the mean rank of ties
    bad = int(labels.sum())
    assert 0 < bad < len(labels), "labels of one class were refused when loading"
    total = float(ranks[inverse][labels].sum())
    return (total - bad * (bad + 1) / 2) / (bad * (len(labels) - bad))


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall curve, as the mean precision at each bad row; ties count together.

    Args:
        labels: (n,) bool, True = bad; at least one.
        scores: (n,) of any real dtype.
    """
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    ranked, bad = scores[order], labels[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of every group of equal scores
    found = np.cumsum(bad)[last]
    precision = found / (last + 1)
    return float(np.sum(np.diff(np.concatenate([[0], found])) * precision) / bad.sum())


def f1(labels: np.ndarray, failed: np.ndarray) -> float:
    """Harmonic mean of precision and recall of the bad class; 0 where nothing is found."""
    found = int((labels & failed).sum())
    return 2 * found / max(int(labels.sum()) + int(failed.sum()), 1)


def _accuracy(labels: np.ndarray, failed: np.ndarray) -> float:
    return float((labels == failed).mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One candidate against the reference on the same rows."""

    rows: int
    sqnr: float  # dB, of the score, or the worst output
    agreement: float | None  # share of rows with the same decision, or the same largest class; None: neither
    # What other rows are above, 95 of 100 times. None: not known, the figure has to do.
    sqnr_low: float | None = None  # dB
    agreement_low: float | None = None
    auc_reference: float | None = None
    auc: float | None = None
    ap_reference: float | None = None  # average precision
    ap: float | None = None
    accuracy_reference: float | None = None
    accuracy: float | None = None
    f1_reference: float | None = None
    f1: float | None = None
    caught_reference: float | None = None  # share of bad rows decided fail
    caught: float | None = None
    false_alarms_reference: float | None = None  # share of good rows decided fail
    false_alarms: float | None = None
    mean_score_reference: float | None = None
    mean_score: float | None = None
    # How far each labelled metric of other rows falls at most, 95 of 100 times, by the metric's name.
    drops_high: Mapping[str, float] | None = None

    def metric(self, wanted: Metric) -> tuple[float, float] | None:
        """A labelled metric of the reference and of the candidate; None without labels, or for another."""
        pairs = {
            Metric.AUC: (self.auc_reference, self.auc),
            Metric.AP: (self.ap_reference, self.ap),
            Metric.ACCURACY: (self.accuracy_reference, self.accuracy),
            Metric.F1: (self.f1_reference, self.f1),
        }
        before, after = pairs.get(Metric.AUC if wanted is Metric.AUTO else wanted, (None, None))
        return None if before is None or after is None else (before, after)

    def inside(self, budget: Budget, *, surely: bool = True) -> bool:
        """Whether this is close enough.

        Args:
            budget: what is allowed.
            surely: figures count as far as these rows say something of others; else as they are.
        """
        if self.sqnr <= -IDENTICAL:
            return False
        low = self.least_sqnr if surely else self.sqnr
        if (pair := self.metric(budget.metric)) is not None:
            # A few bad rows are told from good ones by scores that have little to do with those of FP32, too.
            alike = budget.metric is not Metric.AUTO or low >= LEAST
            drop = pair[0] - pair[1]
            if surely and self.drops_high is not None:
                drop = self.drops_high[Metric.AUC if budget.metric is Metric.AUTO else budget.metric]
            return alike and drop <= budget.max_auc_drop
        agreement = self.agreement or 0.0
        if budget.metric is Metric.AGREEMENT:  # a bound of 99 % takes 270 rows: who asks for it alone knows
            return agreement >= budget.min_agreement - 1e-9
        if low >= budget.min_sqnr:
            return True
        # Where nearly every row is passed, a model that answers nothing agrees too.
        agrees = (self.agreement_low or 0.0) >= budget.min_agreement
        if not surely:  # of enough decisions to tell three times as many differences
            several = 1 - _FEW_TELL * (1 - budget.min_agreement)
            agrees = agreement >= budget.min_agreement - 1e-9 and (self.agreement_low or 0.0) >= several
        return budget.metric is not Metric.SQNR and agrees and self.sqnr >= LEAST

    @property
    def least_sqnr(self) -> float:
        """The bound where there is one."""
        return self.sqnr if self.sqnr_low is None else self.sqnr_low

    def verdict(self) -> str:
        """The figures that decide, for people."""
        bound = "" if self.sqnr_low is None else f" (above {self.sqnr_low:.1f})"
        parts = [f"{self.sqnr:.1f} dB{bound}"]
        if self.agreement is not None:
            bound = "" if self.agreement_low is None else f" (above {self.agreement_low:.1%})"
            parts.append(f"agreement {self.agreement:.1%}{bound}")
        if self.auc is not None and self.auc_reference is not None:
            low = "" if self.drops_high is None else f", other rows lose at most {self.drops_high['auc']:.4f}"
            parts.append(f"AUC {self.auc:.4f} (FP32 {self.auc_reference:.4f}{low})")
        if self.f1 is not None and self.f1_reference is not None:
            parts.append(f"F1 {self.f1:.4f} (FP32 {self.f1_reference:.4f})")
        return ", ".join(parts)


def _shown(reference: np.ndarray, candidate: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores up to ``CEILING`` times a positive threshold.

    What is far above fails whatever it is exactly; left as they are, a few rows with a score of a thousand
    would be all that an SQNR sees. Where nearly all are that far, nothing is cut.
    """
    ceiling = CEILING * threshold
    if threshold <= 0 or not np.isfinite(candidate).all() or (reference < ceiling).mean() < _BELOW:
        return reference, candidate
    return np.minimum(reference, ceiling), np.minimum(candidate, ceiling)


def scores(
    reference: np.ndarray, candidate: np.ndarray, thresholds: tuple[float, float], labels: np.ndarray | None
) -> Comparison:
    """Compare scores.

    Args:
        reference: (n,) scores of the FP32 model.
        candidate: (n,) scores of the other.
        thresholds: of the reference and of the candidate: each decides with its own.
        labels: (n,) bool, True = bad, or None.
    """
    failed_reference, failed = reference > thresholds[0], candidate > thresholds[1]
    shown = _shown(reference, candidate, thresholds[0])
    comparison = Comparison(
        rows=len(reference),
        sqnr=sqnr(*shown),
        sqnr_low=sqnr_low(*shown),
        agreement=float((failed_reference == failed).mean()),
        agreement_low=confidence.share_above((failed_reference == failed)[:, None]),
        mean_score_reference=float(reference.astype(np.float64).mean()),
        mean_score=float(candidate.astype(np.float64).mean()),
    )
    if labels is None or not np.isfinite(candidate).all():
        return comparison
    figures: dict[Metric, tuple[Callable[[np.ndarray, np.ndarray], float], np.ndarray, np.ndarray]] = {
        Metric.AUC: (auc, reference, candidate),
        Metric.AP: (average_precision, reference, candidate),
        Metric.ACCURACY: (_accuracy, failed_reference, failed),
        Metric.F1: (f1, failed_reference, failed),
    }

    def drop(metric: Metric, kept: np.ndarray) -> float:
        figure, before, after = figures[metric]
        return figure(labels[kept], before[kept]) - figure(labels[kept], after[kept])

    return replace(
        comparison,
        drops_high={
            str(metric): confidence.change_below(partial(drop, metric), labels) for metric in figures
        },
        auc_reference=auc(labels, reference),
        auc=auc(labels, candidate),
        ap_reference=average_precision(labels, reference),
        ap=average_precision(labels, candidate),
        accuracy_reference=_accuracy(labels, failed_reference),
        accuracy=_accuracy(labels, failed),
        f1_reference=f1(labels, failed_reference),
        f1=f1(labels, failed),
        caught_reference=float(failed_reference[labels].mean()),
        caught=float(failed[labels].mean()),
        false_alarms_reference=float(failed_reference[~labels].mean()),
        false_alarms=float(failed[~labels].mean()),
    )


def outputs(reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]) -> Comparison:
    """Compare the outputs of a model without a score: the worst SQNR, agreement of the largest class.

    Classes are the last dimension of an output of two or three dimensions; an image has none. Signed integers
    are names (of classes, of places), equal or not; where a model gives nothing else, the share that differs
    is its noise: 99 % alike are 20 dB. Unsigned ones are measures, such as pixels. An output of another size
    (as many detections as there are) is another answer.
    """
    sqnrs, lows, agreements, agreements_low, named, named_low = [], [], [], [], [], []
    for name, found in reference.items():
        before, after = found.reshape(-1), candidate[name].reshape(-1)
        if found.shape != candidate[name].shape:
            sqnrs.append(-IDENTICAL)
            lows.append(-IDENTICAL)
            agreements.append(0.0)
            agreements_low.append(0.0)
            continue
        if not before.size:
            continue
        if before.dtype.kind in "ib":
            same = before == after
            named.append(float(same.mean()))
            named_low.append(confidence.share_above(same.reshape(len(np.atleast_1d(found)), -1)))
            continue
        if np.any(before != 0):  # a state that is always zero has no signal
            sqnrs.append(sqnr(before, after))
            lows.append(sqnr_low(found, candidate[name]))
        elif np.any(after != 0):
            sqnrs.append(-IDENTICAL)
            lows.append(-IDENTICAL)
        if 2 <= found.ndim <= 3 and found.shape[-1] > 1:
            same = found.argmax(axis=-1) == candidate[name].argmax(axis=-1)
            agreements.append(float(same.mean()))
            agreements_low.append(confidence.share_above(same.reshape(len(same), -1)))
    if named and not sqnrs:
        sqnrs.append(decibels(1.0, 1.0 - min(named)))
        lows.append(decibels(1.0, 1.0 - min(named_low)))
    agreements += named
    agreements_low += named_low
    rows = len(next(iter(reference.values())))
    return Comparison(
        rows=rows,
        sqnr=min(sqnrs, default=IDENTICAL),
        sqnr_low=min(lows, default=IDENTICAL),
        agreement=min(agreements, default=None),
        agreement_low=min(agreements_low, default=None),
    )
