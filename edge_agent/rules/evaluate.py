"""Rules that answer when the model cannot: limits, votes, a robust distance, and named rules.

Invariants:

- total: ``evaluate`` answers every row of the right width, whatever the numbers (NaN is a missing value,
  infinity is a value beyond every limit); what no rule can judge gets ``default``;
- pure: no clock and no memory of its own. What time-dependent rules remember is a value (``RuleState``) that
  the caller keeps, one for each source of rows, and hands back; ``now`` is the caller's too;
- one number decides: ``failed == (score > 1)``, always;
- limits and distance give a continuous score that never falls when a value moves further out, so that it
  ranks rows; a named rule gives a fixed score; *fail* never lowers a score, *pass* never raises it.

Three parts make the score, the largest counts. Each is 1 exactly where it begins to fail:

- *trip*: ``1 + (x - hihi) / span`` of the worst feature; a single LOLO or HIHI fails the row;
- *vote*: ``1 + (x - high) / span`` of the feature with which the k-th vote is reached, counting votes from
  the worst feature on. ``span`` is half the distance from low to high: 0 in the middle, 1 at the limit;
- *distance*: the weighted root mean square of ``(x - centre) / scale``, divided by its limit.

Then the named rules: a *fail* rule raises the score, a *pass* rule lowers it (suppressed by design), a trip
outranks both.

Fallback rules are plain limits because plants know them (ISA-18.2: LOLO, LO, HI, HIHI).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_agent.rules import parse as yaml_form
from edge_agent.rules.conditions import Conditions
from edge_agent.rules.expression import above, below
from edge_agent.rules.scoring import Scoring
from edge_agent.rules.timing import Alarm, RuleState, Timing
from edge_agent.rules.values import (
    A_HAIR,
    FLAT_FAIL,
    MAX_SCORE,
    Centre,
    CountAs,
    Decision,
    Distance,
    Effect,
    Lacking,
    Limit,
    Missing,
    Of,
    Rate,
    Rule,
    Rules,
    Stuck,
    When,
)

__all__ = [
    "FLAT_FAIL",
    "MAX_SCORE",
    "Alarm",
    "Centre",
    "CountAs",
    "Decision",
    "Distance",
    "Effect",
    "Lacking",
    "Limit",
    "Missing",
    "Of",
    "Rate",
    "Rule",
    "RuleSet",
    "RuleState",
    "Stuck",
    "Verdicts",
    "When",
    "constant",
]

_LATEST = 1e12  # seconds; a clock beyond that is not a clock


@dataclass(frozen=True, slots=True)
class Verdicts:
    """One verdict per row."""

    score: np.ndarray  # (n,) float64, 0 <= score <= MAX_SCORE; > 1 means fail
    failed: np.ndarray  # (n,) bool
    state: RuleState | None = None  # after the last row, where one was given: keep it for the next


@dataclass(frozen=True)
class RuleSet(Rules):
    """The rules of one model: total, checked and compiled when made.

    Raises:
        BadRules: see ``edge_agent.rules.values.Rules``.
    """

    _conditions: Conditions | None = field(init=False, repr=False, compare=False)
    _timing: Timing | None = field(init=False, repr=False, compare=False)
    _scoring: Scoring = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        conditions = Conditions(self)
        timing = Timing(self, conditions) if self.stateful else None
        object.__setattr__(self, "_conditions", conditions if self.rules else None)
        object.__setattr__(self, "_timing", timing)
        object.__setattr__(self, "_scoring", Scoring(self, conditions.columns, timing))

    @classmethod
    def parse(cls, text: bytes | str, features: Sequence[str]) -> RuleSet:
        """Read rules.yaml for a model with these features, in input order.

        Raises:
            BadRules: see ``edge_agent.rules.parse.parse``.
        """
        said = yaml_form.parse(text, features)
        return cls(
            said.features,
            said.default,
            said.missing,
            said.limits,
            said.votes,
            said.distance,
            said.rules,
            said.reset,
        )

    def to_yaml(self) -> str:
        """The rules as a commented rules.yaml; ``parse`` gives back an equal rule set."""
        return yaml_form.to_yaml(self)

    def evaluate(
        self, rows: np.ndarray, *, state: RuleState | None = None, now: float | np.ndarray | None = None
    ) -> Verdicts:
        """Judge rows.

        Without ``state`` every row is judged by itself: delays are 0, there is no deadband and no latch, and
        nothing is stuck or moves too fast.

        Args:
            rows: (n, f) of any real dtype, f the number of features; NaN is a missing value. With ``state``:
                of one source, in the order of time.
            state: what the rules remember of that source: the last ``Verdicts.state``, or ``RuleState()``.
            now: seconds of a clock that does not jump, for all rows or (n,). Must be given with ``state``.
        """
        x = np.asarray(rows, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.features):
            raise ValueError(f"rows have shape {x.shape}, the rules are for (n, {len(self.features)})")
        if state is None or self._timing is None:
            score = self._scoring.score(x, self._conditions.active(x) if self._conditions else None, None)
        else:
            state, held = self._timing.run(x, state, _clock(now, len(x)))
            score = self._scoring.score(x, held.rules if self.rules else None, held)
        return Verdicts(score, score > 1.0, state)

    def explain(self, row: np.ndarray, most: int = 4, *, state: RuleState | None = None) -> list[str]:
        """Say in at most ``most`` short sentences what is wrong with a row; none if nothing is.

        Args:
            row: (f,) of any real dtype.
            most: sentences at most; the last one then says how many more there are.
            state: as ``evaluate`` gave it back for this row; None: the row by itself.
        """
        reasons = self._reasons(np.asarray(row, dtype=np.float64).reshape(-1), state)
        if len(reasons) <= most:
            return reasons
        return [*reasons[: most - 1], f"and {len(reasons) - most + 1} more"]

    def _reasons(self, row: np.ndarray, state: RuleState | None) -> list[str]:
        """Trips, rules, violated limits, the distance, then missing values; worst first in each."""
        trips: list[tuple[float, str]] = []
        limits: list[tuple[float, str]] = []
        lacking: list[str] = []
        distant: list[tuple[float, str]] = []
        known = self._timing is not None and state is not None and state.alarms == self._timing.alarms
        alarms = set(state.names) if known and state is not None else set()
        for name, value in zip(self.features, row.tolist(), strict=True):
            limit = self.limits.get(name)
            centre = self.distance.features.get(name) if self.distance else None
            if limit and known and limit.timed:
                for found, sides in ((trips, ("lolo", "hihi")), (limits, ("low", "high"))):
                    for side in sides:
                        if f"{name} {side}" in alarms:
                            found.append(
                                (
                                    0.0,
                                    _outside(name, value, limit, *sides)[1] or f"{name} {side} still active",
                                )
                            )
                            break
            elif limit and not math.isnan(value):
                for found, sides in ((trips, ("lolo", "hihi")), (limits, ("low", "high"))):
                    excess, sentence = _outside(name, value, limit, *sides)
                    if sentence:
                        found.append((excess / self._scoring.span(name), sentence))
                        break
            if math.isnan(value):
                lacking += [f"{name} missing"] if limit or centre else []
            elif centre and centre.weight:
                distant.append((abs(value - centre.centre) / centre.scale, name))
        worst = [text for _, text in sorted(trips, reverse=True)]
        active = self._active(row, alarms if known else None)
        if any(self.rules[name].decision == "pass" for name in active):
            return worst  # all else is suppressed
        reasons = worst + [
            f"rule {name}: {_said(self.rules[name])}"
            for name in active
            if self.rules[name].decision != "none"
        ]
        reasons += [text for _, text in sorted(limits, reverse=True)]
        if self.distance and distant:
            ratio = float(self._scoring.distance(row[None, :])[0])
            if ratio > 1.0:
                strays, name = max(distant)
                reasons.append(
                    f"distance {ratio * self.distance.limit:.4g} above limit {self.distance.limit:.4g}, "
                    f"most by {name} ({strays:.3g} scales off)"
                )
        return reasons + lacking

    def _active(self, row: np.ndarray, alarms: set[str] | None) -> list[str]:
        """The named rules that are active."""
        if self._conditions is None:
            return []
        if alarms is None:
            active = self._conditions.active(row[None, :])
            return (
                [] if active is None else [name for name, on in zip(self.rules, active[0], strict=True) if on]
            )
        true = self._conditions.known(row[None, :])[0][0].tolist()
        held: dict[str, bool] = {}
        for (name, rule), known in zip(self.rules.items(), true, strict=True):
            if rule.timed:
                held[name] = name in alarms
            elif isinstance(rule.condition, Of):
                weight = sum(self.rules[member].weight for member in rule.condition.rules if held[member])
                held[name] = weight >= rule.condition.k * (1.0 - A_HAIR)
            else:
                held[name] = known
        return [name for name, on in held.items() if on]


def constant(decision: Decision, features: Sequence[str]) -> RuleSet:
    """The last resort: rules that judge nothing, so that every row gets ``decision``."""
    return RuleSet(tuple(features), decision)


def _clock(now: float | np.ndarray | None, rows: int) -> np.ndarray:
    if now is None:
        raise ValueError("a state without now; give the time of the rows in seconds")
    times = np.broadcast_to(np.asarray(now, dtype=np.float64), (rows,))
    if not (np.abs(times) < _LATEST).all():
        raise ValueError("now is not a time in seconds")
    return times


def _outside(name: str, value: float, limit: Limit, low: str, high: str) -> tuple[float, str]:
    """How far a value is out, and a sentence that says so; empty if it is not."""
    lowest, highest = getattr(limit, low), getattr(limit, high)
    if highest is not None and value > above(highest):
        return value - highest, f"{name} {value:.4g} above {high} {highest:.4g}"
    if lowest is not None and value < below(lowest):
        return lowest - value, f"{name} {value:.4g} below {low} {lowest:.4g}"
    return 0.0, ""


def _said(rule: Rule) -> str:
    match rule.condition:
        case When(text):
            return text
        case Lacking(feature):
            return f"{feature} missing"
        case Stuck(feature, seconds, _):
            return f"{feature} has not changed for {seconds:g} s"
        case Rate(feature, per, _, _):
            return f"{feature} moves too much within {per:g} s"
        case Of(names, k):
            return f"{k:g} of {', '.join(names)}"
