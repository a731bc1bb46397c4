"""Limits, votes and distance as arrays: the score of a row, and what named rules make of it.

Invariant: the same score in company as alone, and on the short path as on the long one.

Rows without missing values and of ordinary size take the short path; the long path treats NaN and
infinity.

Excess is the distance beyond a limit in spans: 0 at the limit, positive beyond, -1 in the middle.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from edge_agent.rules.expression import above, below
from edge_agent.rules.timing import Held, Timing
from edge_agent.rules.values import A_HAIR, FLAT_FAIL, MAX_SCORE, Rules

# The excess of an alarm that is active though its value is back inside the limit, or hardly outside.
_HELD: Final = 0.01
# Infinite readings are worked with as this: far beyond any limit, and its differences do not become NaN.
_FAR: Final = 1e300
# Squares, and products of differences, of numbers up to this stay far from overflow.
_TAME: Final = 1e50


class Scoring:
    """The rules as arrays over the columns they concern."""

    def __init__(self, rules: Rules, also_read: list[int], timing: Timing | None) -> None:
        self._rules = rules
        position = {name: column for column, name in enumerate(rules.features)}
        limits = sorted(rules.limits.items(), key=lambda item: position[item[0]])
        self._width = len(rules.features)
        near = rules.distance.features if rules.distance else {}
        self._used = self._columns(sorted({*(position[name] for name in (*rules.limits, *near)), *also_read}))
        self._vote = self._band("low", "high", timing)
        self._trip = self._band("lolo", "hihi", timing)
        named = list(rules.rules.values())
        self._voting = np.array(
            [at for at, rule in enumerate(named) if rule.decision == "vote"], dtype=np.intp
        )
        self._failing = np.array(
            [at for at, rule in enumerate(named) if rule.decision == "fail"], dtype=np.intp
        )
        self._passing = np.array(
            [at for at, rule in enumerate(named) if rule.decision == "pass"], dtype=np.intp
        )
        self._flat = np.array([rule.effective_score for rule in named])
        self._judging = bool(limits) or rules.distance is not None or self._voting.size > 0
        self._default = FLAT_FAIL if rules.default == "fail" else 0.0
        self._weights = np.array(
            [*(rules.limits[name].weight for name in (self._vote.names if self._vote else ())),
             *(named[at].weight for at in self._voting)]
        )  # fmt: skip
        # Equal weights need a partition only, three times cheaper than the sort that weighing needs.
        self._kth = (
            int(np.ceil(rules.votes / self._weights[0] * (1.0 - A_HAIR)))
            if self._weights.size and np.ptp(self._weights) == 0
            else 0
        )
        # The votes are reached by this many of the worst, whichever they are.
        self._votes = rules.votes * (1.0 - A_HAIR)
        lightest = np.sort(self._weights).cumsum()
        self._enough = min(int(lightest.searchsorted(self._votes)) + 1, len(lightest))
        self._without_votes = 0.0 if self._judging else self._default
        # With one vote to fail, a value beyond hihi is as far or further beyond high: one will do.
        self._votes_outrank_trips = (
            self._kth == 1
            and not self._passing.size
            and all(
                limit.weight > 0.0
                and not (limit.low is None and limit.lolo is not None)
                and not (limit.high is None and limit.hihi is not None)
                for _, limit in limits
            )
        )
        bands = [band for band in (self._vote, self._trip) if band is not None]
        self._tame = not self._voting.size and all(band.tame for band in bands)
        if rules.distance is not None:
            counting = [(position[name], item) for name, item in near.items() if item.weight > 0.0]
            counting.sort(key=lambda pair: pair[0])
            chosen = self._columns([at for at, _ in counting])
            assert chosen is not None  # some feature has a weight
            self._near = chosen
            self._centre = np.array([item.centre for _, item in counting])
            self._inverse_scale = 1.0 / np.maximum([item.scale for _, item in counting], 1.0 / _FAR)
            weight = np.array([item.weight for _, item in counting])
            weight = weight / weight.max()  # so that the sum is finite
            self._near_weight = weight / weight.sum()
            self._inverse_limit = min(1.0 / rules.distance.limit, _FAR)
            self._tame &= bool(np.abs(self._centre).max() < _TAME and self._inverse_scale.max() < _TAME)

    def score(self, x: np.ndarray, active: np.ndarray | None, held: Held | None) -> np.ndarray:
        """Score rows.

        Args:
            x: (n, f) float64.
            active: (n, r) bool, which named rules are active; None: none.
            held: what time-dependent alarms say; None: limits are judged by the present value alone.

        Returns:
            (n,) float64, 0 to MAX_SCORE.
        """
        voting = active if self._voting.size else None
        score: Any
        trip: Any
        if held is None and voting is None and self._is_ordinary(x):
            score, trip = self._ordinary(x[0] if len(x) == 1 else x)
        elif held is None and len(x) == 1:
            score, trip = self._any(x[0], None if voting is None else voting[0], None)
        else:
            score, trip = self._any(x, voting, held)
        if active is not None:
            if self._failing.size:
                fails = np.where(active[:, self._failing], self._flat[self._failing], 0.0)
                score = np.maximum(score, fails.max(axis=1))
            if self._passing.size:
                passes = np.where(active[:, self._passing], self._flat[self._passing], MAX_SCORE)
                score = np.minimum(score, passes.min(axis=1))
        if trip is not None:
            score = _larger(score, trip)
        whole = np.empty(len(x))
        whole[:] = score
        return np.minimum(whole, MAX_SCORE, out=whole)

    def distance(self, x: np.ndarray) -> np.ndarray:
        """The distance over its limit, missing values left out: (n, f) -> (n,)."""
        x = np.minimum(np.maximum(x, -_FAR), _FAR)
        with np.errstate(all="ignore"):
            return np.asarray(self._distance(x, np.isnan(x)))

    def span(self, name: str) -> float:
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
        return float(next((value for value in candidates if value > 0.0), 1.0))

    def _is_ordinary(self, x: np.ndarray) -> bool:
        """Whether there is no NaN, no infinity and nothing near overflow in it, nor in the rules."""
        if not (self._tame and x.size):
            return False
        flat = x.reshape(-1)  # argmax finds NaN first, and costs a quarter of max
        return bool(flat.item(flat.argmin()) > -_TAME and flat.item(flat.argmax()) < _TAME)

    # What follows works on one row (f,) as on many (n, f), along the last axis: for one row, numpy takes
    # half the time when it is an array of one dimension.

    def _ordinary(self, x: np.ndarray) -> tuple[Any, Any]:
        """Base score and trip of rows without NaN, infinity or numbers near overflow."""
        if self._vote is not None:
            score = _larger(self._reached(self._vote.excess(x)) + 1.0, 0.0)
        else:
            score = self._without_votes
        if self._rules.distance is not None:
            score = _larger(score, self._distance(x, None))
        if self._trip is None or self._votes_outrank_trips:
            return score, None
        return score, self._trip.excess(x).max(axis=-1) + 1.0

    def _any(self, x: np.ndarray, active: np.ndarray | None, held: Held | None) -> tuple[Any, Any]:
        """Base score and trip of whatever rows."""
        rules = self._rules
        missing = np.isnan(x)
        some_missing = np.count_nonzero(missing) > 0
        x = np.minimum(np.maximum(x, -_FAR), _FAR)  # keeps NaN
        score: Any = self._without_votes
        with np.errstate(all="ignore"):
            if self._weights.size:
                score = self._voted(x, active, held)
            if rules.distance is not None:
                score = _larger(score, self._distance(x, missing if some_missing else None))
            if some_missing and self._used is not None:
                score = self._with_missing(score, missing[..., self._used])
            if self._trip is None:
                return score, None
            excess = self._trip.excess(x)
            if held is not None:
                self._trip.hold(excess, held)
            return score, np.fmax.reduce(excess, axis=-1, initial=-1.0) + 1.0

    def _with_missing(self, score: Any, lacking: np.ndarray) -> Any:
        """What missing values make of the score; ``lacking`` (..., u): of the features that the rules use."""
        most, fails = self._rules.missing.max_share, self._rules.missing.count_as == "fail"
        if lacking.ndim == 1:
            count = np.count_nonzero(lacking)  # ten times cheaper than along an axis
            share = count / len(lacking)
            score = self._default if share > most or share == 1.0 else score
            return max(score, FLAT_FAIL) if fails and count else score
        share = lacking.mean(axis=-1)
        score = np.where((share > most) | (share == 1.0), self._default, score)
        return np.where((share > 0.0) & fails, np.maximum(score, FLAT_FAIL), score)

    def _voted(self, x: np.ndarray, active: np.ndarray | None, held: Held | None) -> Any:
        """The score of the votes: (..., f) -> (...)."""
        columns = []
        if self._vote is not None:
            excess = self._vote.excess(x)
            if held is not None:
                self._vote.hold(excess, held)
            if self._rules.missing.count_as == "ok":
                np.fmax(excess, -1.0, out=excess)  # fmax: a missing value is as good as the middle
            else:
                np.maximum(excess, -1.0, out=excess)
                np.copyto(excess, FLAT_FAIL - 1.0, where=np.isnan(excess))
            columns.append(excess)
        if self._voting.size:
            flat = self._flat[self._voting] - 1.0
            if active is None:
                columns.append(np.full((*x.shape[:-1], len(flat)), -1.0))
            else:
                columns.append(np.where(active[..., self._voting], flat, -1.0))
        return self._reached(columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)) + 1.0

    def _reached(self, excess: np.ndarray) -> Any:
        """The excess with which the votes are reached, counting from the worst: (..., m) -> (...)."""
        if self._kth == 1:
            return excess.max(axis=-1)
        if self._kth:
            at = excess.shape[-1] - self._kth
            excess.partition(at, axis=-1)
            return excess[..., at]
        if excess.ndim == 1:
            worst = excess.argpartition(-self._enough)[-self._enough :]
            worst = worst[excess[worst].argsort()[::-1]]
            first = int(self._weights[worst].cumsum().searchsorted(self._votes))
            return excess[worst[min(first, len(worst) - 1)]]  # the order of adding may cost the last bit
        order = np.argsort(excess, axis=-1)[:, ::-1]  # worst first
        fewer = np.count_nonzero(self._weights[order].cumsum(axis=-1) < self._votes, axis=-1)
        first = np.minimum(fewer, excess.shape[-1] - 1)
        each = np.arange(len(excess))
        return excess[each, order[each, first]]

    def _distance(self, x: np.ndarray, missing: np.ndarray | None) -> Any:
        """Distance over its limit; features that are missing do not take part: (..., f) -> (...)."""
        z = (x if isinstance(self._near, slice) else x.take(self._near, axis=-1)) - self._centre
        z *= self._inverse_scale
        z *= z
        np.minimum(z, MAX_SCORE**2, out=z)
        if missing is None:
            mean = z.dot(self._near_weight)
        else:
            lacking = missing if isinstance(self._near, slice) else missing.take(self._near, axis=-1)
            np.copyto(z, 0.0, where=lacking)
            total = (~lacking).astype(np.float64).dot(self._near_weight)
            mean = z.dot(self._near_weight) / np.maximum(total, 1e-300)  # all missing: 0 / 1e-300
        return np.sqrt(mean) * self._inverse_limit

    def _columns(self, columns: list[int]) -> np.ndarray | slice | None:
        """An index of columns: a slice (a view, no copy) if all of them, None if there are none."""
        if not columns:
            return None
        return slice(None) if columns == list(range(self._width)) else np.array(columns)

    def _band(self, low: str, high: str, timing: Timing | None) -> _Band | None:
        """The limits of these two names; those that have no votes need no voting."""
        chosen = [
            (name, at, getattr(self._rules.limits[name], low), getattr(self._rules.limits[name], high))
            for at, name in enumerate(self._rules.features)
            if name in self._rules.limits and (low == "lolo" or self._rules.limits[name].weight > 0.0)
        ]
        bounded = [item for item in chosen if not (item[2] is None and item[3] is None)]
        if not bounded:
            return None
        alarms: dict[tuple[str | None, str | None], int] = {}
        if timing is not None:
            alarms = {(alarm.feature, alarm.side): index for index, alarm in enumerate(timing.limits)}
        index = self._columns([at for _, at, _, _ in bounded])
        assert index is not None
        return _Band(
            [name for name, _, _, _ in bounded],
            index,
            np.array([-np.inf if least is None else below(least) for _, _, least, _ in bounded]),
            np.array([np.inf if most is None else above(most) for _, _, _, most in bounded]),
            np.array([self.span(name) for name, _, _, _ in bounded]),
            [(alarms.get((name, low), -1), alarms.get((name, high), -1)) for name, _, _, _ in bounded],
        )


class _Band:
    """Lower and upper limits of some columns."""

    def __init__(
        self,
        names: list[str],
        columns: np.ndarray | slice,
        low: np.ndarray,
        high: np.ndarray,
        span: np.ndarray,
        alarms: list[tuple[int, int]],
    ) -> None:
        self.names = names
        self._columns = columns
        self._low = low if np.isfinite(low).any() else None
        self._high = high if np.isfinite(high).any() else None
        self._inverse_span = 1.0 / np.maximum(span, 1.0 / _FAR)
        ends = np.concatenate([low[np.isfinite(low)], high[np.isfinite(high)]])
        self.tame = bool(np.abs(ends).max() < _TAME and self._inverse_span.max() < _TAME)
        self._timed = np.array([at for at, pair in enumerate(alarms) if pair != (-1, -1)], dtype=np.intp)
        self._low_alarm = np.array([alarms[at][0] for at in self._timed], dtype=np.intp)
        self._high_alarm = np.array([alarms[at][1] for at in self._timed], dtype=np.intp)

    def excess(self, x: np.ndarray) -> np.ndarray:
        """0 at a limit, more beyond it, less within; NaN where missing: (..., f) -> (..., m)."""
        if not isinstance(self._columns, slice):
            x = x.take(self._columns, axis=-1)
        excess: np.ndarray
        if self._high is None:
            excess = self._low - x
        else:
            excess = x - self._high
            if self._low is not None:
                np.maximum(excess, self._low - x, out=excess)
        excess *= self._inverse_span
        return excess

    def hold(self, excess: np.ndarray, held: Held) -> None:
        """Let alarms that are active count although the value is back, and others not yet, in place."""
        if not self._timed.size:
            return
        none = np.zeros((len(excess), 1), dtype=bool)
        active = np.concatenate([held.limits, none], axis=1)  # -1 finds the column of none
        holds = active[:, self._low_alarm] | active[:, self._high_alarm]
        present = excess[:, self._timed]
        excess[:, self._timed] = np.where(holds, np.fmax(present, _HELD), np.minimum(present, 0.0))


def _larger(left: Any, right: Any) -> Any:
    """Of two numbers or arrays without NaN; numpy's own takes five times as long for two numbers."""
    if isinstance(left, float) and isinstance(right, float):
        return max(left, right)
    return np.maximum(left, right)


def _between(low: float | None, high: float | None, share: float) -> float:
    return 0.0 if low is None or high is None else (high - low) * share
