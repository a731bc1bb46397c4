"""The named rules: which of them hold, row by row.

Invariant: bounded work, whatever the numbers: a pass over each expression, compiled once.

One row is the hot path: the expressions then run over Python floats, ten times cheaper than arrays of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edge_agent.rules import expression
from edge_agent.rules.values import A_HAIR, Lacking, Of, Rules, When, features_of

# From the gathered values to whether it is known to hold.
_Test = Callable[[Sequence[Any]], Any]


class Conditions:
    """The conditions of a rule set, over the columns that they read."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.names = tuple(rules.rules)
        self.weights = np.array([rule.weight for rule in rules.rules.values()])
        number = {name: index for index, name in enumerate(self.names)}
        column = {name: index for index, name in enumerate(rules.features)}
        read = dict.fromkeys(
            feature
            for rule in rules.rules.values()
            for feature in features_of(rule.condition, rules.features)
        )
        if rules.reset is not None:
            read.update(dict.fromkeys(features_of(When(rules.reset), rules.features)))
        self.columns = [column[feature] for feature in read]
        self._gathered = np.array(self.columns, dtype=np.intp)
        self._position = {feature: index for index, feature in enumerate(read)}
        self._true: list[tuple[int, _Test]] = []
        self._false: list[tuple[int, _Test]] = []  # of the timed ones: only they ask
        self.combinations: list[tuple[int, list[int], float]] = []  # rule, its members, k
        for name, rule in rules.rules.items():
            at = number[name]
            match rule.condition:
                case When(text):
                    tree = expression.parse(text, rules.features)
                    self._true.append((at, expression.compiled(tree, self._position)))
                    if rule.timed:
                        opposite = expression.negation(tree)
                        self._false.append((at, expression.compiled(opposite, self._position)))
                case Lacking(feature):
                    self._true.append((at, _is_missing(self._position[feature])))
                    if rule.timed:
                        self._false.append((at, _is_there(self._position[feature])))
                case Of(members, k):
                    self.combinations.append((at, [number[member] for member in members], k * (1.0 - A_HAIR)))
                case _:  # needs history: timing.py
                    pass
        self._reset = (
            expression.compiled(expression.parse(rules.reset, rules.features), self._position)
            if rules.reset is not None
            else None
        )

    def active(self, x: np.ndarray) -> np.ndarray | None:
        """Which rules hold for a row by itself, without history: (n, f) -> (n, r) bool; None if none does."""
        if len(x) != 1:
            active = self.known(x)[0]
            for rule, members, k in self.combinations:
                active[:, rule] = active[:, members] @ self.weights[members] >= k
            return active if active.any() else None
        values = x[0, self._gathered].tolist()
        held = [False] * len(self.names)
        for rule, test in self._true:
            held[rule] = test(values)
        if True not in held:  # so no combination holds either: k is more than 0
            return None
        for rule, members, k in self.combinations:
            held[rule] = sum(self.weights.item(member) for member in members if held[member]) >= k
        return np.array([held])

    def known(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is known to hold, and not to hold, leaving out combinations: (n, f) -> twice (n, r) bool.

        That it does not hold is worked out for timed rules only.
        """
        values = self._values(x)
        true, false = np.zeros((2, len(x), len(self.names)), dtype=bool)
        with np.errstate(all="ignore"):
            for rule, test in self._true:
                true[:, rule] = test(values)
            for rule, test in self._false:
                false[:, rule] = test(values)
        return true, false

    def resets(self, x: np.ndarray) -> np.ndarray:
        """Which rows release what is latched: (n, f) -> (n,) bool."""
        if self._reset is None:
            return np.zeros(len(x), dtype=bool)
        with np.errstate(all="ignore"):
            return np.asarray(self._reset(self._values(x)))

    def _values(self, x: np.ndarray) -> list[np.ndarray]:
        return list(x.T[self._gathered])


def _is_missing(at: int) -> _Test:
    return lambda c: math.isnan(c[at]) if isinstance(c[at], float) else np.isnan(c[at])


def _is_there(at: int) -> _Test:
    return lambda c: ~np.isnan(c[at])
