"""Rules that answer when the model cannot: limits, votes and a robust distance, in that order of trust.

Invariants:

- total: ``evaluate`` answers every row of the right width, whatever the numbers (NaN is a missing value,
  infinity is a value beyond every limit); what no rule can judge gets ``default``;
- one number decides: ``failed == (score > 1)``, always;
- the score is continuous and never falls when a value moves further out, so that it ranks rows.

Three parts make the score, the largest counts. Each is 1 exactly where it begins to fail:

- *trip*: ``1 + (x - hihi) / span`` of the worst feature; a single LOLO or HIHI fails the row;
- *vote*: ``1 + (x - high) / span`` of the feature with which the k-th vote is reached, counting votes from
  the worst feature on. ``span`` is half the distance from low to high: 0 in the middle, 1 at the limit;
- *distance*: the weighted root mean square of ``(x - centre) / scale``, divided by its limit.

Fallback rules are plain limits because plants know them (ISA-18.2: LOLO, LO, HI, HIHI).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal

import numpy as np

from edge_agent.errors import BadRules

Decision = Literal["pass", "fail"]
CountAs = Literal["ok", "violation", "fail"]

# A score is sent as JSON and exported as a metric, so it stays finite. A million spans out is far enough.
MAX_SCORE: Final = 1e6
# The score of a failure that has no degree: a missing value that counts as one, a default of fail.
FLAT_FAIL: Final = 2.0
# Infinite readings are worked with as this: far beyond any limit, and its differences do not become NaN.
_FAR: Final = 1e300
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Limit:
    """The limits of one feature, in its own unit; ``None``: no limit on that side.

    Outside ``low``..``high`` the feature has ``weight`` votes to fail. Outside ``lolo``..``hihi`` it fails
    the row alone.
    """

    low: float | None = None
    high: float | None = None
    lolo: float | None = None
    hihi: float | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Centre:
    """Where a feature normally is and how far it normally strays (median and scaled MAD, or similar)."""

    centre: float
    scale: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Distance:
    """Root mean square of ``(x - centre) / scale`` over ``features``; a row beyond ``limit`` fails."""

    limit: float
    features: Mapping[str, Centre]


@dataclass(frozen=True, slots=True)
class Missing:
    """What a missing value means, and from which share of missing values on a row cannot be judged."""

    count_as: CountAs = "ok"
    max_share: float = 0.5


@dataclass(frozen=True, slots=True)
class Verdicts:
    """One verdict per row."""

    score: np.ndarray  # (n,) float64, 0 <= score <= MAX_SCORE; > 1 means fail
    failed: np.ndarray  # (n,) bool


@dataclass(frozen=True)
class RuleSet:
    """The rules of one model: total, checked and compiled into arrays when made.

    Raises:
        BadRules: a rule for a feature that the model lacks, limits out of order, more votes asked than there
            are, a number that makes no sense.
    """

    features: tuple[str, ...]  # the model's features, in input order
    default: Decision
    missing: Missing = Missing()
    limits: Mapping[str, Limit] = field(default_factory=dict)
    votes: float = 1.0  # votes (sum of weights of violated limits) that fail a row
    distance: Distance | None = None
    _compiled: _Compiled = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "_compiled", _Compiled(self))

    @classmethod
    def parse(cls, text: bytes | str, features: Sequence[str]) -> RuleSet:
        """Read rules.yaml for a model with these features, in input order.

        Raises:
            BadRules: see ``edge_agent.rules.parse.parse``.
        """
        from edge_agent.rules import parse  # here: the format knows the rules, not the other way round

        return parse.parse(text, features)

    def to_yaml(self) -> str:
        """The rules as a commented rules.yaml; ``parse`` gives back an equal rule set."""
        from edge_agent.rules import parse

        return parse.to_yaml(self)

    def evaluate(self, rows: np.ndarray) -> Verdicts:
        """Judge rows.

        Args:
            rows: (n, f) of any real dtype, f the number of features; NaN is a missing value.
        """
        score = self._compiled.score(rows)
        return Verdicts(score, score > 1.0)

    def explain(self, row: np.ndarray, most: int = 4) -> list[str]:
        """Say in at most ``most`` short sentences what is wrong with a row; none if nothing is.

        Args:
            row: (f,) of any real dtype.
            most: sentences at most; the last one then says how many more there are.
        """
        reasons = self._compiled.reasons(np.asarray(row, dtype=np.float64).reshape(-1))
        if len(reasons) <= most:
            return reasons
        return [*reasons[: most - 1], f"and {len(reasons) - most + 1} more"]


def constant(decision: Decision, features: Sequence[str]) -> RuleSet:
    """The last resort: rules that judge nothing, so that every row gets ``decision``."""
    return RuleSet(tuple(features), decision)


def _check(rules: RuleSet) -> None:
    known = frozenset(rules.features)
    for section, names in (("limits", rules.limits), ("distance", _features(rules.distance))):
        for name in names:
            if name not in known:
                raise BadRules(f"{section}: the model has no feature {name!r}; {meant(name, rules.features)}")
    for name, limit in rules.limits.items():
        _check_limit(f"limits: {name}", limit)
    total = sum(limit.weight for limit in rules.limits.values() if _has(limit.low, limit.high))
    if rules.votes <= 0.0:
        raise BadRules(f"vote: k is {rules.votes:g}, expected more than 0")
    if total and rules.votes > total + 1e-9:
        raise BadRules(
            f"vote: k is {rules.votes:g}, but the limits have only {total:g} votes together; "
            f"lower k to {total:g} or less"
        )
    if not 0.0 <= rules.missing.max_share <= 1.0:
        raise BadRules(f"missing: max_share is {rules.missing.max_share:g}, expected a share from 0 to 1")
    if rules.distance is not None:
        _check_distance(rules.distance)


def _check_limit(where: str, limit: Limit) -> None:
    bounds = [(key, getattr(limit, key)) for key in ("lolo", "low", "high", "hihi")]
    present = [(key, value) for key, value in bounds if value is not None]
    if not present:
        raise BadRules(f"{where} has no limit; give at least one of low, high, lolo, hihi")
    for (lower, low), (upper, high) in pairwise(present):
        if not low <= high:
            raise BadRules(f"{where}: {lower} {low:g} is above {upper} {high:g}; swap or correct them")
    if not 0.0 <= limit.weight < np.inf:
        raise BadRules(f"{where}: weight is {limit.weight:g}, expected 0 or more")


def _check_distance(distance: Distance) -> None:
    if not 0.0 < distance.limit < np.inf:
        raise BadRules(f"distance: limit is {distance.limit:g}, expected more than 0")
    for name, centre in distance.features.items():
        if not 0.0 < centre.scale < np.inf:
            raise BadRules(f"distance: the scale of {name} is {centre.scale:g}, expected more than 0")
        if not 0.0 <= centre.weight < np.inf:
            raise BadRules(f"distance: the weight of {name} is {centre.weight:g}, expected 0 or more")
    if not any(centre.weight for centre in distance.features.values()):
        raise BadRules("distance has no feature with a weight; name some under features, or leave it out")


def meant(name: str, known: Sequence[str]) -> str:
    """The second half of a message about an unknown name: the one it resembles, or some that exist."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return f"known: {listed}"


class _Compiled:
    """The rules as arrays over the columns they concern."""

    def __init__(self, rules: RuleSet) -> None:
        self._rules = rules
        position = {name: column for column, name in enumerate(rules.features)}
        limits = sorted(rules.limits.items(), key=lambda item: position[item[0]])
        voting = [(name, limit) for name, limit in limits if _has(limit.low, limit.high) and limit.weight > 0]
        tripping = [(name, limit) for name, limit in limits if _has(limit.lolo, limit.hihi)]
        self._width = len(rules.features)
        self._used = self._columns(
            sorted({position[name] for name in (*rules.limits, *_features(rules.distance))})
        )
        self._vote = _Band.of(
            [(position[name], limit.low, limit.high, self._span(name)) for name, limit in voting], self._width
        )
        self._trip = _Band.of(
            [(position[name], limit.lolo, limit.hihi, self._span(name)) for name, limit in tripping],
            self._width,
        )
        weights = np.array([limit.weight for _, limit in voting])
        # Equal weights need a partition only, three times cheaper than the sort that weighing needs.
        self._kth = (
            int(np.ceil(rules.votes / weights[0] - 1e-9)) if weights.size and np.ptp(weights) == 0 else 0
        )
        self._weights = weights
        if rules.distance is not None:
            near = sorted(rules.distance.features.items(), key=lambda item: position[item[0]])
            self._near = self._columns([position[name] for name, _ in near])
            self._centre = np.array([item.centre for _, item in near])
            self._inverse_scale = np.array([1.0 / item.scale for _, item in near])
            weight = np.array([item.weight for _, item in near])
            self._near_weight = weight / weight.sum()

    def score(self, rows: np.ndarray) -> np.ndarray:
        rules = self._rules
        x = np.asarray(rows, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != self._width:
            raise ValueError(f"rows have shape {x.shape}, the rules are for (n, {self._width})")
        judged_by_default = FLAT_FAIL if rules.default == "fail" else 0.0
        if self._used is None:
            return np.full(len(x), judged_by_default)
        missing = np.isnan(x)
        some_missing = bool(missing.any())
        x = np.minimum(np.maximum(x, -_FAR), _FAR)  # keeps NaN
        score = np.zeros(len(x))
        with np.errstate(over="ignore", invalid="ignore"):
            if self._vote is not None:
                score = self._voted(self._vote.excess(x))
            if rules.distance is not None:
                np.maximum(score, self._distance(x, missing if some_missing else None), out=score)
            if some_missing:
                lacking = missing[:, self._used]
                share = lacking.mean(axis=1)
                unjudged = (share > rules.missing.max_share) | (share == 1.0)
                score[unjudged] = judged_by_default
                if rules.missing.count_as == "fail":
                    np.maximum(score, np.where(lacking.any(axis=1), FLAT_FAIL, 0.0), out=score)
            if self._trip is not None:
                trip = np.fmax.reduce(self._trip.excess(x), axis=1, initial=0.0)
                np.maximum(score, trip, out=score)
        return np.minimum(score, MAX_SCORE, out=score)

    def reasons(self, row: np.ndarray) -> list[str]:
        """Trips, then violated limits, then the distance, then missing values; worst first in each."""
        rules = self._rules
        trips: list[tuple[float, str]] = []
        limits: list[tuple[float, str]] = []
        lacking: list[str] = []
        distant: list[tuple[float, str]] = []
        for name, value in zip(rules.features, row.tolist(), strict=True):
            limit = rules.limits.get(name)
            centre = rules.distance.features.get(name) if rules.distance else None
            if np.isnan(value):
                if limit or centre:
                    lacking.append(f"{name} missing")
                continue
            if limit:
                for found, low, high in ((trips, "lolo", "hihi"), (limits, "low", "high")):
                    if sentence := _outside(name, value, limit, low, high):
                        found.append((sentence[0] / self._span(name), sentence[1]))
                        break
            if centre and centre.weight:
                distant.append((abs(value - centre.centre) / centre.scale, name))
        reasons = [text for found in (trips, limits) for _, text in sorted(found, reverse=True)]
        if rules.distance and distant:
            with np.errstate(over="ignore", invalid="ignore"):
                x = np.minimum(np.maximum(row[None, :], -_FAR), _FAR)
                ratio = float(self._distance(x, np.isnan(x))[0])
            if ratio > 1.0:
                strays, name = max(distant)
                value = ratio * rules.distance.limit
                reasons.append(
                    f"distance {value:.4g} above limit {rules.distance.limit:.4g}, "
                    f"most by {name} ({strays:.3g} scales off)"
                )
        return reasons + lacking

    def _voted(self, excess: np.ndarray) -> np.ndarray:
        """The excess with which the votes are reached: (n, m) -> (n,)."""
        if self._rules.missing.count_as == "ok":
            np.fmax(excess, 0.0, out=excess)  # fmax: a missing value is as good as the middle
        else:
            excess = np.where(np.isnan(excess), FLAT_FAIL, np.maximum(excess, 0.0))
        if self._kth == 1:
            return np.asarray(excess.max(axis=1))
        if self._kth:
            at = excess.shape[1] - self._kth
            return np.partition(excess, at, axis=1)[:, at].copy()
        order = np.argsort(excess, axis=1)[:, ::-1]  # worst first
        reached = self._weights[order].cumsum(axis=1) >= self._rules.votes - 1e-9
        each = np.arange(len(excess))
        return np.asarray(excess[each, order[each, reached.argmax(axis=1)]])

    def _distance(self, x: np.ndarray, missing: np.ndarray | None) -> np.ndarray:
        """Distance over its limit; features that are missing do not take part: (n, f) -> (n,)."""
        assert self._rules.distance is not None
        z = ((x if self._near is None else x[:, self._near]) - self._centre) * self._inverse_scale
        z *= z
        np.minimum(z, MAX_SCORE**2, out=z)
        if missing is None:
            mean = z @ self._near_weight
        else:
            lacking = missing if self._near is None else missing[:, self._near]
            weight = np.where(lacking, 0.0, self._near_weight)
            total = weight.sum(axis=1)
            mean = (np.where(lacking, 0.0, z) * weight).sum(axis=1) / np.where(total > 0, total, 1.0)
        return np.asarray(np.sqrt(mean) / self._rules.distance.limit)

    def _columns(self, columns: list[int]) -> np.ndarray | slice | None:
        """An index of columns: a slice (a view, no copy) if all of them, None if there are none."""
        if not columns:
            return None
        return slice(None) if columns == list(range(self._width)) else np.array(columns)

    def _span(self, name: str) -> float:
        """The length by which an excess is measured: half the band, or the next best that is known."""
        limit = self._rules.limits[name]
        candidates = [
            _between(limit.low, limit.high, 0.5),
            _between(limit.lolo, limit.hihi, 0.5),
            _between(limit.high, limit.hihi, 1.0),
            _between(limit.lolo, limit.low, 1.0),
        ]
        if self._rules.distance and name in self._rules.distance.features:
            candidates.append(self._rules.distance.features[name].scale)
        known = [value for value in (limit.high, limit.low, limit.hihi, limit.lolo) if value is not None]
        candidates += [abs(value) for value in known]
        return next((value for value in candidates if value > 0.0), 1.0)


class _Band:
    """Lower and upper limits of some columns."""

    def __init__(
        self, columns: np.ndarray | slice, low: np.ndarray, high: np.ndarray, span: np.ndarray
    ) -> None:
        self._columns = columns
        self._low, self._high, self._inverse_span = low, high, 1.0 / span

    @classmethod
    def of(cls, bands: list[tuple[int, float | None, float | None, float]], width: int) -> _Band | None:
        if not bands:
            return None
        columns = [column for column, _, _, _ in bands]
        return cls(
            slice(None) if columns == list(range(width)) else np.array(columns),
            np.array([-np.inf if low is None else _below(low) for _, low, _, _ in bands]),
            np.array([np.inf if high is None else _above(high) for _, _, high, _ in bands]),
            np.array([span for _, _, _, span in bands]),
        )

    def excess(self, x: np.ndarray) -> np.ndarray:
        """1 at a limit, more beyond it, less within; NaN where missing: (n, f) -> (n, m)."""
        x = x[:, self._columns]
        excess: np.ndarray = x - self._high
        np.maximum(excess, self._low - x, out=excess)
        excess *= self._inverse_span
        excess += 1.0
        return excess


def _has(*values: float | None) -> bool:
    return any(value is not None for value in values)


def _features(distance: Distance | None) -> Mapping[str, Centre]:
    return distance.features if distance else {}


def _between(low: float | None, high: float | None, share: float) -> float:
    return 0.0 if low is None or high is None else (high - low) * share


def _above(high: float) -> float:
    """The limit or its float32 neighbour above: a reading that *is* the limit passes in either precision."""
    return max(high, float(np.float32(high))) if abs(high) < _FLOAT32_MAX else high


def _below(low: float) -> float:
    return min(low, float(np.float32(low))) if abs(low) < _FLOAT32_MAX else low


def _outside(name: str, value: float, limit: Limit, low: str, high: str) -> tuple[float, str] | None:
    lowest, highest = getattr(limit, low), getattr(limit, high)
    if highest is not None and value > _above(highest):
        return value - highest, f"{name} {value:.4g} above {high} {highest:.4g}"
    if lowest is not None and value < _below(lowest):
        return lowest - value, f"{name} {value:.4g} below {low} {lowest:.4g}"
    return None
