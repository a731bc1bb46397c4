"""Conditions over feature names: ``temperature > 80 and (pressure < 2 or abs(flow - set_flow) > 5)``.

Invariants:

- the grammar below is all there is: names, numbers, comparisons, ``and or not``, ``+ - * /``, ``min max
  abs``. No attribute, no index, no other call; Python's parser and ``eval`` never see the text;
- bounded: ``MAX_CHARACTERS``, ``MAX_NODES`` and ``MAX_DEPTH`` of one expression, so also the time it takes;
- a condition is true, false or *unknown* (Kleene's logic). Whatever a missing value has a part in is unknown,
  unless the rest decides alone: ``unknown or true`` is true, ``unknown and false`` is false;
- numbers and conditions are not mixed: ``(a > 1) + 2`` and ``a and b`` over numbers are refused.

::

    condition   = conjunction {"or" conjunction}
    conjunction = negation {"and" negation}
    negation    = "not" negation | comparison
    comparison  = sum {("<" | "<=" | ">" | ">=" | "==" | "!=") sum}      2 < pressure < 6 reads as it looks
    sum         = term {("+" | "-") term}
    term        = factor {("*" | "/") factor}
    factor      = ("-" | "+") factor | number | name | call | "(" condition ")"
    call        = ("min" | "max" | "abs") "(" sum {"," sum} ")"
    name        = letters, digits and _, or anything in double quotes (as in JSON)

``not`` is worked into the comparisons when the text is read: ``not a > b`` becomes ``a <= b``. In IEEE
arithmetic both are false for a missing value, so the masks of what is *known to be true* need no third value
at run time.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Final

import numpy as np

from edge_agent.errors import BadRules
from edge_agent.rules.names import meant

MAX_CHARACTERS: Final = 2000
MAX_NODES: Final = 200
MAX_DEPTH: Final = 20  # nested parentheses, negations and signs

# A value is a float (one row) or a float64 array (n,); a truth is a bool or a bool array (n,).
Evaluated = Callable[[Sequence[Any]], Any]

_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_WORDS: Final = ("and", "or", "not", "min", "max", "abs")
_OPPOSITE: Final = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_MIRRORED: Final = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_FOREIGN: Final = {
    "&": "and",
    "&&": "and",
    "|": "or",
    "||": "or",
    "!": "not",
    "=": "==",
    "<>": "!=",
    "=>": ">=",
}
_TOKEN: Final = re.compile(
    r"""\s*(?:
      (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])
    | (?P<name>[^\W\d]\w*)
    | (?P<quoted>"(?:[^"\\]|\\.)*")
    | (?P<sign>[<>=!]=|[-+*/(),<>])
    | (?P<foreign>&&?|\|\|?|[=!])
    | (?P<end>\Z)
    | (?P<wrong>.)
    )""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Number:
    """A constant."""

    value: float


@dataclass(frozen=True, slots=True)
class Name:
    """The value of a feature."""

    feature: str


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """``+ - * /``, ``min``, ``max`` of two values; ``abs`` and ``neg`` of one."""

    operation: str
    operands: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of two values."""

    operation: str
    left: Value
    right: Value


@dataclass(frozen=True, slots=True)
class Joined:
    """Conditions joined by ``and`` or ``or``."""

    operation: str
    parts: tuple[Condition, ...]


Value = Number | Name | Arithmetic
Condition = Comparison | Joined


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    column: int  # from 1, as people count


def parse(text: str, features: Sequence[str]) -> Condition:
    """Read a condition over these features.

    Raises:
        BadRules: not in the grammar, too long or too deep, an unknown name; names the column in the text.
    """
    if len(text) > MAX_CHARACTERS:
        raise BadRules(f"the expression has {len(text)} characters, at most {MAX_CHARACTERS} are read")
    return _Reader(text, features).whole()


def negation(condition: Condition) -> Condition:
    """What is known to be true where ``condition`` is known to be false."""
    if isinstance(condition, Comparison):
        return Comparison(_OPPOSITE[condition.operation], condition.left, condition.right)
    other = "or" if condition.operation == "and" else "and"
    return Joined(other, tuple(negation(part) for part in condition.parts))


def names(node: Condition | Value) -> Iterator[str]:
    """The features it speaks of, in order, with repetitions."""
    match node:
        case Name(feature):
            yield feature
        case Arithmetic(_, operands):
            for operand in operands:
                yield from names(operand)
        case Comparison(_, left, right):
            yield from names(left)
            yield from names(right)
        case Joined(_, parts):
            for part in parts:
                yield from names(part)


def compiled(condition: Condition, position: Mapping[str, int]) -> Evaluated:
    """A function from the features' values to whether the condition is known to be true.

    Args:
        condition: as ``parse`` or ``negation`` gives it.
        position: where in the function's argument the value of each feature is. The values are floats or (n,)
            float64 arrays, and the function gives a bool or an (n,) bool array.
    """
    if isinstance(condition, Comparison):
        return _comparison(condition, position)
    parts = [compiled(part, position) for part in condition.parts]
    both = condition.operation == "and"
    if len(parts) == 2:  # the usual case, three times cheaper so
        first, second = parts
        return (lambda c: first(c) & second(c)) if both else (lambda c: first(c) | second(c))
    join = operator.and_ if both else operator.or_
    return lambda c: reduce(join, [part(c) for part in parts])


def above(limit: float) -> float:
    """The limit or its float32 neighbour above: the limit's reading in either precision is not above it."""
    return max(limit, float(np.float32(limit))) if abs(limit) < _FLOAT32_MAX else limit


def below(limit: float) -> float:
    """The limit or its float32 neighbour below."""
    return min(limit, float(np.float32(limit))) if abs(limit) < _FLOAT32_MAX else limit


class _Reader:
    """Recursive descent; every step down and every node is counted."""

    def __init__(self, text: str, features: Sequence[str]) -> None:
        self._features = features
        self._known = frozenset(features)
        self._tokens = list(_tokens(text))
        self._at = 0
        self._nodes = 0
        self._depth = 0

    def whole(self) -> Condition:
        if self._next.kind == "end":
            raise BadRules("the expression is empty; write a condition such as temperature > 80")
        first = self._next
        condition = self._as_condition(self._condition(), first)
        if self._next.kind != "end":
            raise _bad(self._next, f"unexpected {self._next.text!r}")
        return condition

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, *texts: str) -> _Token | None:
        token = self._next
        if token.kind not in ("sign", "word") or token.text not in texts:
            return None
        self._at += 1
        return token

    def _count(self) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _bad(
                self._next, f"more than {MAX_NODES} parts; split the rule and combine the halves with of"
            )

    def _down(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _bad(self._next, f"nested deeper than {MAX_DEPTH}")

    def _condition(self) -> Condition | Value:
        return self._joined("or", lambda: self._joined("and", self._negation))

    def _joined(self, word: str, part: Callable[[], Condition | Value]) -> Condition | Value:
        begin = self._next
        first = part()
        if not (self._next.kind == "word" and self._next.text == word):
            return first
        parts = [self._as_condition(first, begin)]
        while self._take(word):
            begin = self._next
            parts.append(self._as_condition(part(), begin))
        self._count()
        return Joined(word, tuple(parts))

    def _negation(self) -> Condition | Value:
        if not self._take("not"):
            return self._comparison()
        self._down()
        begin = self._next
        condition = negation(self._as_condition(self._negation(), begin))
        self._depth -= 1
        return condition

    def _comparison(self) -> Condition | Value:
        begin = self._next
        left = self._sum()
        found: list[Condition] = []
        while token := self._take("<", "<=", ">", ">=", "==", "!="):
            low = self._as_value(left, begin)
            begin = self._next
            right = self._as_value(self._sum(), begin)
            if isinstance(low, Number) and isinstance(right, Number):
                raise _bad(token, "compares two numbers; name a feature on one side")
            self._count()
            found.append(Comparison(token.text, low, right))
            left = right
        if not found:
            return left
        return found[0] if len(found) == 1 else Joined("and", tuple(found))

    def _sum(self) -> Condition | Value:
        return self._chain(("+", "-"), lambda: self._chain(("*", "/"), self._factor))

    def _chain(self, signs: tuple[str, ...], part: Callable[[], Condition | Value]) -> Condition | Value:
        begin = self._next
        left = part()
        while token := self._take(*signs):
            value = self._as_value(left, begin)
            begin = self._next
            right = self._as_value(part(), begin)
            if token.text == "/" and right == Number(0.0):
                raise _bad(token, "divides by zero")
            left = self._folded(token, token.text, value, right)
        return left

    def _factor(self) -> Condition | Value:
        token = self._next
        if sign := self._take("-", "+"):
            self._down()
            value = self._as_value(self._factor(), token)
            self._depth -= 1
            return self._folded(sign, "neg", value) if sign.text == "-" else value
        if self._take("("):
            self._down()
            inner = self._condition()
            self._close(token)
            return inner
        if call := self._take("min", "max", "abs"):
            return self._call(call)
        self._at += 1
        self._count()
        if token.kind == "number":
            number = float(token.text)
            if not math.isfinite(number):
                raise _bad(token, f"{token.text} is too large")
            return Number(number)
        if token.kind == "name":
            if token.text not in self._known:
                raise _bad(
                    token, f"the model has no feature {token.text!r}; {meant(token.text, self._features)}"
                )
            return Name(token.text)
        raise _bad(
            token, f"expected a name or a number, got {token.text!r}" if token.text else "ends too early"
        )

    def _call(self, call: _Token) -> Value:
        if not self._take("("):
            raise _bad(
                self._next,
                f"expected ( after {call.text}; a feature of that name is written in double quotes",
            )
        self._down()
        arguments = []
        while True:
            begin = self._next
            arguments.append(self._as_value(self._condition(), begin))
            if not self._take(","):
                break
        self._close(call)
        if call.text == "abs":
            if len(arguments) != 1:
                raise _bad(call, f"abs takes one value, got {len(arguments)}")
            return self._folded(call, "abs", arguments[0])
        if len(arguments) == 1:
            raise _bad(call, f"{call.text} takes two values or more, got 1")
        return reduce(lambda left, right: self._folded(call, call.text, left, right), arguments)

    def _close(self, opened: _Token) -> None:
        self._depth -= 1
        if not self._take(")"):
            token = self._next
            got = "the end" if token.kind == "end" else repr(token.text)
            raise _bad(token, f"expected ) for column {opened.column}, got {got}")

    def _folded(self, token: _Token, operation: str, *operands: Value) -> Value:
        """Arithmetic, or its result where it is only of numbers."""
        self._count()
        numbers = [operand.value for operand in operands if isinstance(operand, Number)]
        if len(numbers) < len(operands):
            return Arithmetic(operation, operands)
        result = _OPERATIONS[operation](*numbers)
        if not math.isfinite(result):
            raise _bad(token, f"the result of {token.text} is too large")
        return Number(result)

    @staticmethod
    def _as_condition(node: Condition | Value, begin: _Token) -> Condition:
        if isinstance(node, Comparison | Joined):
            return node
        raise _bad(
            begin, "a number where a condition is expected; compare it with something, as in temperature > 80"
        )

    @staticmethod
    def _as_value(node: Condition | Value, begin: _Token) -> Value:
        if isinstance(node, Number | Name | Arithmetic):
            return node
        raise _bad(begin, "a condition where a number is expected; join conditions with and, or")


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while True:
        found = _TOKEN.match(text, at)
        assert found is not None  # "wrong" and "end" match whatever is left
        assert found.lastgroup is not None
        kind, word = found.lastgroup, found[found.lastgroup]
        token = _Token(kind, word, found.start(kind) + 1)
        if kind == "foreign":
            raise _bad(token, f"{word!r} is not known here; write {_FOREIGN[word]}")
        if kind == "wrong":
            if word == '"':
                raise _bad(token, "the quoted name does not end")
            raise _bad(
                token, f"{word!r} is not known here; names with other signs are written in double quotes"
            )
        if kind == "quoted":
            try:
                yield _Token("name", json.loads(word), token.column)
            except ValueError:
                raise _bad(token, f"{word} is not a name in double quotes as JSON writes them") from None
        else:
            yield _Token("word", word, token.column) if word in _WORDS else token
        if kind == "end":
            return
        at = found.end()


def _bad(token: _Token, says: str) -> BadRules:
    return BadRules(f"column {token.column}: {says}")


def _divided(left: Any, right: Any) -> Any:
    """Division by zero is unknown, not infinity: nothing is known about a ratio to nothing."""
    if isinstance(right, float):
        return left / right if right else left * math.nan
    return left / np.where(right == 0.0, np.nan, right)


def _least(left: Any, right: Any) -> Any:
    if isinstance(left, float) and isinstance(right, float):
        return math.nan if math.isnan(left) or math.isnan(right) else min(left, right)
    return np.minimum(left, right)


def _greatest(left: Any, right: Any) -> Any:
    if isinstance(left, float) and isinstance(right, float):
        return math.nan if math.isnan(left) or math.isnan(right) else max(left, right)
    return np.maximum(left, right)


_OPERATIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _divided,
    "min": _least,
    "max": _greatest,
    "neg": operator.neg,
    "abs": abs,
}


def _value(value: Value, position: Mapping[str, int]) -> Evaluated:
    match value:
        case Number(number):
            return lambda _: number
        case Name(feature):
            return operator.itemgetter(position[feature])
        case Arithmetic(operation, operands):
            apply = _OPERATIONS[operation]
            first = _value(operands[0], position)
            if len(operands) == 1:
                return lambda c: apply(first(c))
            second = _value(operands[1], position)
            return lambda c: apply(first(c), second(c))


def _comparison(comparison: Comparison, position: Mapping[str, int]) -> Evaluated:
    operation, left, right = comparison.operation, comparison.left, comparison.right
    if isinstance(left, Number) and isinstance(right, Name):
        operation, left, right = _MIRRORED[operation], right, left
    if isinstance(left, Name) and isinstance(right, Number):
        return _with_number(operation, position[left.feature], right.value)
    a, b = _value(left, position), _value(right, position)
    match operation:
        case "<":
            return lambda c: a(c) < b(c)
        case "<=":
            return lambda c: a(c) <= b(c)
        case ">":
            return lambda c: a(c) > b(c)
        case ">=":
            return lambda c: a(c) >= b(c)
        case "==":
            return lambda c: a(c) == b(c)
        case _:  # not c[at] != number: a missing value is not known to differ
            return lambda c: _differ(a(c), b(c))


def _differ(left: Any, right: Any) -> Any:
    return (left < right) | (left > right)


def _with_number(operation: str, at: int, number: float) -> Evaluated:
    """A feature against a number as people wrote it: the float32 reading of 21.1 equals 21.1."""
    low, high = below(number), above(number)
    match operation:
        case "<":
            return lambda c: c[at] < low
        case "<=":
            return lambda c: c[at] <= high
        case ">":
            return lambda c: c[at] > high
        case ">=":
            return lambda c: c[at] >= low
        case "==":
            return lambda c: (c[at] >= low) & (c[at] <= high)
        case _:
            return lambda c: (c[at] < low) | (c[at] > high)
