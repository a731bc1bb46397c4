"""Alarms over time: deadband, on-delay, off-delay, latch, rate of change, stuck sensor.

Invariants:

- pure: the state goes in and comes out as a value, and so does the clock;
- the state is bounded by the rules: a few numbers an alarm, whatever is read and for how long;
- time never runs backwards: a clock that does is taken to stand still;
- a missing value is no news: an alarm stays as it was, and a delay that was begun goes on.

Every alarm is a small machine over two signals. The *signal* follows the condition, with the deadband between
on and off. The alarm becomes *active* when the signal was on for the on-delay. It goes when the signal was
off for the off-delay, or at a reset if it latches (ISA-18.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from edge_agent.rules.conditions import Conditions
from edge_agent.rules.expression import above, below
from edge_agent.rules.values import Limit, Of, Rate, Rule, Rules, Stuck

SIDES: Final = ("lolo", "low", "high", "hihi")
# A rate looks back over whole parts of its time: between one and one and a quarter times as far as asked.
_PARTS: Final = 4
_COLUMNS: Final = _PARTS + 1
_FAR: Final = 1e300
_A_HAIR: Final = 1e-9  # seconds: 0.3 - 0.1 is not 0.2


@dataclass(frozen=True, slots=True)
class Alarm:
    """What an alarm is about: a limit's side, or a named rule."""

    name: str  # "oil_pressure high", or the rule's
    feature: str | None  # of a limit
    side: str | None
    rule: Limit | Rule


@dataclass(frozen=True, slots=True, eq=False)
class RuleState:
    """What the rules remember of one source. ``RuleState()`` is that of a source never heard of.

    A value: it never changes, and fits every rule set. One with other alarms forgets what it says.
    """

    now: float = -math.inf  # of the last row, seconds
    alarms: tuple[Alarm, ...] = ()
    signal: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))  # (a,) the deadband applied
    active: np.ndarray = field(
        default_factory=lambda: np.zeros(0, dtype=bool)
    )  # (a,) delays and latch applied
    since: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (a,) when the signal changed, seconds
    level: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (s,) value watched for standing still
    still_since: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (s,) seconds
    part: np.ndarray = field(default_factory=lambda: np.zeros((0, _COLUMNS)))  # (t, 5) what time each is of
    lowest: np.ndarray = field(default_factory=lambda: np.zeros((0, _COLUMNS)))  # (t, 5)
    highest: np.ndarray = field(default_factory=lambda: np.zeros((0, _COLUMNS)))  # (t, 5)

    @property
    def names(self) -> tuple[str, ...]:
        """The alarms that are active: a limit's feature and side, or a rule's name."""
        return tuple(
            alarm.name for alarm, active in zip(self.alarms, self.active.tolist(), strict=True) if active
        )

    def reset(self) -> RuleState:
        """The state with every latched alarm released whose condition is gone."""
        latched = np.array([alarm.rule.latch for alarm in self.alarms], dtype=bool)
        return replace(self, active=self.active & (self.signal | ~latched))


@dataclass(frozen=True, slots=True)
class Held:
    """Which alarms were active at each row."""

    limits: np.ndarray  # (n, l) bool, the limit alarms in the order of ``Timing.alarms``
    rules: np.ndarray  # (n, r) bool, every named rule


class Timing:
    """The alarms of a rule set that need history."""

    def __init__(self, rules: Rules, conditions: Conditions) -> None:
        self._conditions = conditions
        column = {name: index for index, name in enumerate(rules.features)}
        number = {name: index for index, name in enumerate(rules.rules)}
        of_limits = [
            Alarm(f"{name} {side}", name, side, limit)
            for name, limit in rules.limits.items()
            if limit.timed
            for side in SIDES
            if getattr(limit, side) is not None
        ]
        timed = [(name, rule) for name, rule in rules.rules.items() if rule.timed]
        plain = [(name, rule) for name, rule in timed if not isinstance(rule.condition, Stuck | Rate | Of)]
        stuck = [(name, rule.condition) for name, rule in timed if isinstance(rule.condition, Stuck)]
        rates = [(name, rule.condition) for name, rule in timed if isinstance(rule.condition, Rate)]
        combined = [name for name, rule in timed if isinstance(rule.condition, Of)]
        ordered = (
            [name for name, _ in plain] + [name for name, _ in stuck] + [name for name, _ in rates] + combined
        )
        self.alarms = (*of_limits, *(Alarm(name, None, None, rules.rules[name]) for name in ordered))
        self.limits = of_limits
        self._on_delay = np.array([alarm.rule.on_delay for alarm in self.alarms]) - _A_HAIR
        self._off_delay = np.array([alarm.rule.off_delay for alarm in self.alarms]) - _A_HAIR
        self._latch = np.array([alarm.rule.latch for alarm in self.alarms], dtype=bool)
        # Limits: sign * value > bound turns on, <= bound - deadband turns off.
        self._sign = np.array([1.0 if alarm.side in ("high", "hihi") else -1.0 for alarm in of_limits])
        self._bound = np.array([_bound(alarm) for alarm in of_limits])
        self._deadband = np.array(
            [alarm.rule.deadband for alarm in of_limits if isinstance(alarm.rule, Limit)]
        )
        self._limit_columns = np.array([column[alarm.feature or ""] for alarm in of_limits], dtype=np.intp)
        # Where each kind stands among the alarms.
        begin = len(of_limits)
        self._plain = slice(begin, begin + len(plain))
        self._stuck = slice(self._plain.stop, self._plain.stop + len(stuck))
        self._rates = slice(self._stuck.stop, self._stuck.stop + len(rates))
        self._simple = slice(0, self._rates.stop)
        self._plain_rules = np.array([number[name] for name, _ in plain], dtype=np.intp)
        self._simple_rules = np.array(
            [number[name] for name in ordered[: len(ordered) - len(combined)]], dtype=np.intp
        )
        self._alarm_of = {number[name]: self._rates.stop + index for index, name in enumerate(combined)}
        self._stuck_columns = np.array([column[item.feature] for _, item in stuck], dtype=np.intp)
        self._within = np.array([item.within for _, item in stuck])
        self._still_for = np.array([item.seconds for _, item in stuck]) - _A_HAIR
        self._rate_columns = np.array([column[item.feature] for _, item in rates], dtype=np.intp)
        self._part = np.array([item.per / _PARTS for _, item in rates])
        self._rise = np.array([math.inf if item.rise is None else item.rise for _, item in rates])
        self._fall = np.array([math.inf if item.fall is None else item.fall for _, item in rates])

    def start(self) -> RuleState:
        """The state of a source never heard of."""
        alarms, stuck, rates = len(self.alarms), len(self._within), (len(self._part), _COLUMNS)
        return RuleState(
            -math.inf,
            self.alarms,
            np.zeros(alarms, dtype=bool),
            np.zeros(alarms, dtype=bool),
            np.full(alarms, -math.inf),
            np.full(stuck, math.nan),
            np.full(stuck, math.inf),
            np.full(rates, -math.inf),
            np.full(rates, math.inf),
            np.full(rates, -math.inf),
        )

    def run(self, x: np.ndarray, state: RuleState, now: np.ndarray) -> tuple[RuleState, Held]:
        """Follow rows of one source in the order of time.

        Args:
            x: (n, f) float64, NaN = missing.
            state: after the row before the first.
            now: (n,) seconds, finite.
        """
        if state.alarms is not self.alarms and state.alarms != self.alarms:
            state = self.start()
        x = np.minimum(np.maximum(x, -_FAR), _FAR)  # infinities have differences then; NaN stays
        true, false = self._conditions.known(x)
        resets = self._conditions.resets(x).tolist()
        reading = x[:, self._limit_columns] * self._sign
        turns_on, turns_off = np.zeros((2, len(x), len(self.alarms)), dtype=bool)
        limits = slice(0, len(self.limits))
        turns_on[:, limits] = reading > self._bound
        turns_off[:, limits] = (reading <= self._bound) & (reading <= self._bound - self._deadband)
        turns_on[:, self._plain] = true[:, self._plain_rules]
        turns_off[:, self._plain] = false[:, self._plain_rules]
        still, moving = x[:, self._stuck_columns], x[:, self._rate_columns]
        held = Held(np.zeros((len(x), len(self.limits)), dtype=bool), true)
        state = replace(
            state,
            alarms=self.alarms,
            **{name: getattr(state, name).copy() for name in _ARRAYS},
        )
        clock = state.now
        for row in range(len(x)):
            clock = max(clock, float(now[row]))
            on, off = turns_on[row], turns_off[row]
            if still.shape[1]:
                on[self._stuck], off[self._stuck] = self._stands_still(state, still[row], clock)
            if moving.shape[1]:
                on[self._rates], off[self._rates] = self._moves(state, moving[row], clock)
            self._step(state, self._simple, on, off, clock, resets[row])
            active = held.rules[row]
            active[self._simple_rules] = state.active[len(self.limits) : self._rates.stop]
            for rule, members, k in self._conditions.combinations:
                holds = bool(active[members] @ self._conditions.weights[members] >= k)
                if rule in self._alarm_of:
                    alarm = self._alarm_of[rule]
                    on[alarm], off[alarm] = holds, not holds
                    self._step(state, slice(alarm, alarm + 1), on, off, clock, resets[row])
                    holds = bool(state.active[alarm])
                active[rule] = holds
            held.limits[row] = state.active[limits]
        for name in _ARRAYS:
            getattr(state, name).setflags(write=False)
        return replace(state, now=clock), held

    def _step(
        self, state: RuleState, part: slice, on: np.ndarray, off: np.ndarray, now: float, reset: bool
    ) -> None:
        """Take some alarms one row further. ``state`` is this run's own copy."""
        signal, active, since = state.signal[part], state.active[part], state.since[part]
        latch = self._latch[part]
        follows = on[part] | (signal & ~off[part])
        since[follows != signal] = now
        signal[:] = follows
        lasted = now - since
        active |= signal & (lasted >= self._on_delay[part])
        active &= signal | latch | (lasted < self._off_delay[part])
        if reset:
            active &= signal | ~latch

    def _stands_still(self, state: RuleState, value: np.ndarray, now: float) -> tuple[np.ndarray, np.ndarray]:
        there = ~np.isnan(value)
        moved = there & ~(np.abs(value - state.level) <= self._within)
        state.level[moved] = value[moved]
        state.still_since[moved] = now
        stuck = there & (now - state.still_since >= self._still_for)
        return stuck, there & ~stuck

    def _moves(self, state: RuleState, value: np.ndarray, now: float) -> tuple[np.ndarray, np.ndarray]:
        there = ~np.isnan(value)
        part = np.floor(now / self._part)
        each, at = np.arange(len(part)), (part % (_COLUMNS)).astype(np.intp)
        begun = state.part[each, at] != part
        state.part[each[begun], at[begun]] = part[begun]
        state.lowest[each[begun], at[begun]] = math.inf
        state.highest[each[begun], at[begun]] = -math.inf
        recent = state.part >= (part - _PARTS)[:, None]
        lowest = np.where(recent, state.lowest, math.inf).min(axis=1)
        highest = np.where(recent, state.highest, -math.inf).max(axis=1)
        moves = there & ((value - lowest > self._rise) | (highest - value > self._fall))
        state.lowest[each, at] = np.fmin(state.lowest[each, at], value)
        state.highest[each, at] = np.fmax(state.highest[each, at], value)
        return moves, there & ~moves


_ARRAYS: Final = ("signal", "active", "since", "level", "still_since", "part", "lowest", "highest")


def _bound(alarm: Alarm) -> float:
    limit = float(getattr(alarm.rule, alarm.side or ""))
    return above(limit) if alarm.side in ("high", "hihi") else -below(limit)
